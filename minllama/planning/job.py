"""Time and cost of a job from the measured rate of one GPU, and where more GPUs stop helping.

Labeling needs no exchange between GPUs: its limit is that each worker must start. A training step
ends with an exchange of gradients, and of weights where they are sharded, in rings: each GPU sends
and receives (n - 1) / n of the bytes once to spread or gather them, twice to add them up. Time for
it is added to that of computing, although some of it overlaps: the plan is on the safe side.
"""

from collections.abc import Callable
from dataclasses import dataclass

from minllama.model.config import LlamaConfig
from minllama.options.planning import PlanOptions, size_of
from minllama.planning.memory import BFLOAT16, FLOAT32, Sharding
from minllama.planning.parameters import (
    DTYPE_BYTES,
    QUANTIZED_BYTES,
    all_parameters,
    trained_parameters,
)

WORTHWHILE = 0.9  # of the rate of one GPU, which each of several must keep
HOUR = 3600.0
MOST_GPUS = 10**7


@dataclass(frozen=True)
class JobPlan:
    """A job on the GPUs of the options.

    Attributes:
        sharding: of the model.
        hours: until it is done.
        gpu_hours: of all GPUs together.
        cost: of them; None without a price.
        efficiency: the rate of a GPU among the others, as a fraction of its rate alone.
        exchanged: bytes that each GPU sends in a training step; 0 for labeling.
        most_gpus: with more, each keeps less than WORTHWHILE of its rate.
        reason: what stops the scaling there.
    """

    sharding: Sharding
    hours: float
    gpu_hours: float
    cost: float | None
    efficiency: float
    exchanged: float
    most_gpus: int
    reason: str


def plan_job(config: LlamaConfig, sharding: Sharding, options: PlanOptions) -> JobPlan:
    """The job that the options describe; they have its method, rows and rate.

    Args:
        config: of the model.
        sharding: of the model over the GPUs.
        options: the work, the hardware and the job.
    """
    assert options.rows is not None
    assert options.rate is not None
    method = options.method or "frozen"
    computing = options.rows * options.epochs / options.rate  # seconds of one GPU
    per_step = options.batch_size / options.rate
    bandwidth = size_of(options.bandwidth, "bandwidth")

    def waiting(gpus: int) -> float:
        """Seconds of a step for the exchange."""
        return exchanged_bytes(config, method, sharding, options, gpus) / bandwidth

    def efficiency(gpus: int) -> float:
        stretched = computing * (1 + waiting(gpus) / per_step)  # of all GPUs together
        return computing / (stretched + gpus * options.startup)

    gpus = options.gpus
    hours = computing / gpus / efficiency(gpus) / HOUR
    most = _most(lambda n: efficiency(n) >= WORTHWHILE)
    waits = waiting(most + 1) / per_step
    starts = (most + 1) * options.startup / computing
    reason = (
        f"a step of {per_step:.3g} s waits {waiting(most + 1):.3g} s for the exchange"
        if waits > starts
        else f"workers start for {options.startup:g} s each"
    )
    return JobPlan(
        sharding=sharding,
        hours=hours,
        gpu_hours=gpus * hours,
        cost=None if options.price is None else options.price * gpus * hours,
        efficiency=efficiency(gpus),
        exchanged=exchanged_bytes(config, method, sharding, options, gpus),
        most_gpus=most,
        reason=reason,
    )


def exchanged_bytes(
    config: LlamaConfig, method: str, sharding: Sharding, options: PlanOptions, gpus: int
) -> float:
    """Bytes that each GPU sends in one training step, and as many that it receives.

    Replicated: gradients are added up, 2 (n - 1) / n of their bytes. Sharded: weights are gathered
    for the forward and the backward pass, and gradients are added up and stay spread.
    """
    if method == "frozen" or gpus == 1:
        return 0.0
    share = (gpus - 1) / gpus
    of_layer, beside = trained_parameters(config, method, options.r)
    gradients = FLOAT32 * (config.n_layers * of_layer + beside)
    if sharding == "replicated":
        return 2 * share * gradients
    width = BFLOAT16
    if method == "full" and options.no_autocast:
        width = FLOAT32
    stored = QUANTIZED_BYTES.get(options.quantize, DTYPE_BYTES[options.dtype])
    weights = (width if method == "full" else stored) * all_parameters(config)
    return share * (2 * weights + gradients)


def _most(is_worthwhile: Callable[[int], bool]) -> int:
    """The most GPUs for which that is true; 1 if for none."""
    enough, too_many = 1, 2
    while too_many < MOST_GPUS and is_worthwhile(too_many):
        enough, too_many = too_many, 2 * too_many
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        enough, too_many = (middle, too_many) if is_worthwhile(middle) else (enough, middle)
    return enough
