"""Options of labeling many files: who computes, in how many processes, and the size of parts."""

from dataclasses import dataclass
from typing import ClassVar

from minllama.options.base import CheckedOptions, Range, option

ENGINES = ("local", "ray")


@dataclass(frozen=True, kw_only=True)
class LabelingOptions(CheckedOptions):
    """How many files are labeled; see `minllama.labeling`."""

    group: ClassVar[str] = "Scale"

    engine: str = option(
        "local",
        "who labels the files of --input into Parquet parts in the folder --output: this process "
        "(local), or Ray Data (ray), in the cluster that RAY_ADDRESS names, else on this machine",
        choices=ENGINES,
    )
    actors: int = option(
        1, "processes of Ray that label, each with the classifier", within=Range(1, 100_000)
    )
    actor_cpus: float = option(1.0, "processors of each", within=Range(0, 4096))
    actor_gpus: float = option(0.0, "GPUs of each, such as 1 or 0.25", within=Range(0, 64))
    rows_per_part: int = option(
        8192, "rows of a part, which is written whole or not at all", within=Range(1, 2**24)
    )
