"""Options of a server in several processes: how many, and what each of them gets."""

from dataclasses import dataclass
from typing import ClassVar

from minllama.errors import OptionError
from minllama.options.base import CheckedOptions, Range, option


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions(CheckedOptions):
    """How many processes serve behind one address; see `minllama.server.replicas`."""

    group: ClassVar[str] = "Scale"

    replicas: int | None = option(
        None,
        "serve in this many processes behind one address, by Ray Serve, on the machines of the "
        "cluster that RAY_ADDRESS names, or on this one; by default in this process, without Ray",
        within=Range(1, 10_000),
    )
    max_replicas: int | None = option(
        None,
        "start up to this many while each has more than half of --max-sequences to do, and end "
        "them when they have not",
        within=Range(1, 10_000),
    )
    replica_cpus: float = option(1.0, "processors of each", within=Range(0, 4096))
    replica_gpus: float = option(0.0, "GPUs of each, such as 1 or 0.25", within=Range(0, 64))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_replicas is not None and self.max_replicas < (self.replicas or 1):
            raise OptionError(
                f"max_replicas ({self.max_replicas}) must not be below replicas "
                f"({self.replicas or 1})"
            )

    @property
    def numbers(self) -> str:
        """How many replicas there may be, such as 2, or 2 to 5."""
        least, most = self.replicas or 1, self.max_replicas or 0
        return f"{least} to {most}" if most > least else str(least)

    @property
    def uses_ray(self) -> bool:
        """Whether there are replicas, rather than this process alone."""
        return self.replicas is not None or self.max_replicas is not None
