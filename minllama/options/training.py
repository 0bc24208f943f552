"""How weights are stored and trained, and adapters beside them."""

import math
from dataclasses import dataclass

from minllama.errors import OptionError
from minllama.options.base import CheckedOptions, Range, option
from minllama.options.classification import CLASS_METRICS, VALUE_METRICS

# Forms that weights may be kept in instead of numbers: see
# `minllama.quantization.modules.quantized`.
QUANTIZE = ("stored", "int8", "int4")


@dataclass(frozen=True, kw_only=True)
class LoRAOptions(CheckedOptions):
    """Low-rank adapters beside frozen weights; see `minllama.lora`."""

    target_modules: tuple[str, ...] = option(
        ("all-linear",),
        "adapt these: all-linear, or names such as compute_query or q_proj, or a regular "
        "expression for the whole dotted name; may be given several times",
    )
    r: int = option(8, "rank of the adapters", within=Range(1))
    lora_alpha: float = option(
        16.0, "adapters are scaled by lora_alpha / r", within=Range(0, low_open=True)
    )
    lora_dropout: float = option(
        0.0, "probability of dropping an adapter's input while training", within=Range(0, 1)
    )
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) instead (rsLoRA)")
    use_dora: bool = option(False, "learn the magnitude of each row of a weight as well (DoRA)")

    @property
    def scaling(self) -> float:
        """What B A is multiplied by (Hu et al. 2021, sec. 4.1; Kalajdzievski 2023 for rsLoRA)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target_modules:
            raise OptionError("target_modules is empty; name a module, or all-linear")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(CheckedOptions):
    """How a classifier is trained; see `minllama.training.trainer`."""

    epochs: int = option(3, "how often each training text is seen", within=Range(1))
    batch_size: int = option(16, "how many texts are computed together", within=Range(1))
    gradient_accumulation: int = option(
        1,
        "how many batches make one step: what a larger batch does, in less memory",
        within=Range(1),
    )
    lr: float | None = option(
        None,
        "highest learning rate (where not given 3e-4 for lora and 2e-5 for full)",
        within=Range(0, low_open=True),
    )
    head_lr: float | None = option(
        None, "that of the head (where not given 1e-3)", within=Range(0, low_open=True)
    )
    weight_decay: float = option(
        0.0, "shrink matrices by this share times the learning rate, each step", within=Range(0)
    )
    schedule: str = option(
        "linear",
        "how the learning rate falls after the warm-up: linear, cosine, or constant (not at all)",
        choices=("linear", "cosine", "constant"),
    )
    warmup: float = option(
        0.06, "share of the steps over which the learning rate rises", within=Range(0, 1)
    )
    clip: float = option(
        1.0, "scale gradients down to at most this norm; 0 leaves them", within=Range(0)
    )
    autocast: str = option(
        "auto",
        "multiply in bfloat16: auto does so for float32 weights where the hardware is good at it",
        choices=("auto", "on", "off"),
    )
    gradient_checkpointing: bool = option(
        False,
        "keep fewer activations and compute them twice: 1.4 to 1.9 times as long, in far less "
        "memory",
    )
    class_weights: str = option(
        "none",
        "balanced: errors of rare classes cost more, in proportion",
        choices=("none", "balanced"),
    )
    ordinal: float = option(
        0.0,
        "classes stand in order, as stars do: spread targets over neighbours, by so many classes",
        within=Range(0),
    )
    self_distillation: float = option(
        0.0,
        "share of each target that is the classifier's own answer before training, against "
        "forgetting",
        within=Range(0, 1, high_open=True),
    )
    patience: int = option(
        0, "stop after this many evaluations without a gain; 0 never does", within=Range(0)
    )
    metric: str = option(
        "accuracy",
        "what is best on the dev split: accuracy, macro_f1, log_loss; of numbers rmse (where not "
        "given), mae, r2, pearson, spearman",
        choices=(*CLASS_METRICS, *VALUE_METRICS),
    )
    keep: str = option(
        "best",
        "which weights to keep: the best by that metric on the dev split, or the last",
        choices=("best", "last"),
    )
    evals_per_epoch: int = option(
        1, "how often to evaluate on the dev split in each epoch", within=Range(1)
    )
    seed: int = option(
        0,
        "of order and dropout: the same gives the same weights",
        within=Range(0, 2**32 - 1),  # what scikit-learn takes
    )
    save_every: int = option(
        100, "steps between two checkpoints, from which a cut run goes on", within=Range(1)
    )
    tensorboard: bool = option(False, "write the curves for TensorBoard, too")
