"""Options of `minllama plan`: the model's work, the hardware, and the job."""

import math
import re
from dataclasses import dataclass
from typing import ClassVar

from minllama.errors import OptionError
from minllama.options.base import CheckedOptions, Range, option
from minllama.options.loading import DTYPES

PLANNED_METHODS = ("frozen", "lora", "full")
PLANNED_FORMATS = ("none", "int8", "int4")
DEVICES = ("cuda", "cpu")
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True, kw_only=True)
class PlanOptions(CheckedOptions):
    """What to plan; see `minllama.planning`."""

    group: ClassVar[str] = "Method"

    method: str | None = option(
        None,
        "plan only this method: forward passes (frozen, which is also zero-shot and classify), "
        "low-rank adapters (lora) or all weights (full); by default all three",
        choices=PLANNED_METHODS,
        common=True,
    )
    seq_len: int = option(512, "tokens of a text, prompt included", within=Range(1), common=True)
    batch_size: int = option(
        16, "texts that a GPU computes at a time", within=Range(1, 10**6), common=True
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass")
    dtype: str = option("bfloat16", "data type of weights that are not trained", choices=DTYPES)
    quantize: str = option(
        "none", "weight format of weights that are not trained", choices=PLANNED_FORMATS
    )
    r: int = option(8, "rank of adapters on all linear layers", within=Range(1), group="Adapters")
    no_autocast: bool = option(False, "train all weights without bfloat16 arithmetic")

    gpus: int = option(1, "number of GPUs", within=Range(1, 10**6), group="Hardware", common=True)
    gpu_memory: str = option(
        "80GB",
        "memory of each, such as 80GB (10^9) or 80GiB (2^30)",
        group="Hardware",
        common=True,
    )
    reserve: float = option(
        0.1,
        "fraction of it to leave free, for CUDA's context and gaps between tensors",
        within=Range(0, 1, high_open=True),
        group="Hardware",
    )
    device: str = option(
        "cuda",
        "cuda, or cpu for a process without a GPU, whose memory is that of --gpu-memory",
        choices=DEVICES,
        group="Hardware",
    )
    bandwidth: str = option(
        "12.5GB",
        "bytes a second that each GPU exchanges with the others (12.5GB is 100 Gbit/s)",
        group="Hardware",
    )

    rows: float | None = option(
        None, "texts of the job, such as 1e9", within=Range(1, 1e15), group="Job", common=True
    )
    epochs: int = option(1, "passes over them", within=Range(1, 10**6), group="Job")
    rate: float | None = option(
        None,
        "texts a second of one GPU by --method, as measured (minllama train and classify show it)",
        within=Range(0, 1e9, low_open=True),
        group="Job",
    )
    price: float | None = option(
        None, "cost of a GPU for an hour", within=Range(0, 1e6), group="Job"
    )
    startup: float = option(
        60.0,
        "seconds until a worker has started and loaded the model",
        within=Range(0, 1e6),
        group="Job",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        size_of(self.gpu_memory, "gpu_memory")
        size_of(self.bandwidth, "bandwidth")
        if self.rows is None and (self.rate is not None or self.price is not None):
            raise OptionError("rate and price are of a job; give its rows too")
        if self.rows is not None and (self.rate is None or self.method is None):
            raise OptionError(
                "a job needs its method and the measured rate of one GPU; give method and rate, "
                "or omit rows"
            )


def size_of(text: str, name: str) -> float:
    """The number of bytes that a text such as `80GB` or `16 GiB` names.

    Args:
        text: a number and a unit.
        name: of the option, for the error.

    Raises:
        OptionError: it is no size above 0.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([KMGT]?I?)B?\s*", text.upper(), re.ASCII)
    scale = {**UNITS, **BINARY_UNITS}.get(match[2]) if match is not None else None
    size = float(match[1]) * scale if match is not None and scale is not None else 0.0
    if not 0 < size < math.inf:
        raise OptionError(f"{name} must be a size such as 80GB or 16GiB, not {text!r}")
    return size
