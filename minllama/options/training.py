"""Options for training, for low-rank adapters, and for weight formats."""

import math
from dataclasses import dataclass
from typing import ClassVar

from minllama.errors import OptionError
from minllama.options.base import CheckedOptions, Range, option
from minllama.options.classification import CLASS_METRICS, VALUE_METRICS

# Weight formats other than dense (floating-point) weights: see
# `minllama.quantization.modules.quantized`.
QUANTIZE = ("stored", "int8", "int4")
# Integers beside quantized weights: see `minllama.quantization.modules.set_activations`.
ACTIVATIONS = ("int16", "int8")
EPOCHS = 3  # by default


@dataclass(frozen=True, kw_only=True)
class LoRAOptions(CheckedOptions):
    """Low-rank adapters beside frozen weights; see `minllama.lora`."""

    group: ClassVar[str] = "Adapters"

    target_modules: tuple[str, ...] = option(
        ("all-linear",),
        "modules to adapt: all-linear, names such as compute_query or q_proj, or a regular "
        "expression that matches the full dotted name; repeatable",
    )
    r: int = option(8, "rank of the adapters", within=Range(1))
    lora_alpha: float = option(
        16.0, "scale adapters by lora_alpha / r", within=Range(0, low_open=True)
    )
    lora_dropout: float = option(
        0.0, "probability of dropping an adapter's input during training", within=Range(0, 1)
    )
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) instead (rsLoRA)")
    use_dora: bool = option(False, "also learn the magnitude of each row of a weight (DoRA)")

    @property
    def scaling(self) -> float:
        """The factor of B A (Hu et al. 2021, sec. 4.1; Kalajdzievski 2023 for rsLoRA)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target_modules:
            raise OptionError("target_modules is empty; name a module or all-linear")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(CheckedOptions):
    """How to train a classifier; see `minllama.training.trainer`."""

    group: ClassVar[str] = "Training"

    epochs: int | None = option(
        None,
        f"number of passes over the training texts (default {EPOCHS}; auto trains up to {EPOCHS}, "
        "and up to 8 with many classes)",
        within=Range(1),
        common=True,
    )
    batch_size: int = option(16, "number of texts per batch", within=Range(1))
    gradient_accumulation: int = option(
        1,
        "number of batches per optimizer step: the effect of a larger batch in less memory",
        within=Range(1),
    )
    lr: float | None = option(
        None,
        "peak learning rate (default 3e-4 for lora, 2e-5 for full)",
        within=Range(0, low_open=True),
    )
    head_lr: float | None = option(
        None, "peak learning rate of the head (default 1e-3)", within=Range(0, low_open=True)
    )
    weight_decay: float = option(
        0.0, "decoupled weight decay of matrices, multiplied by the learning rate", within=Range(0)
    )
    schedule: str = option(
        "linear",
        "decay of the learning rate after the warm-up: linear, cosine, or none (constant)",
        choices=("linear", "cosine", "constant"),
    )
    warmup: float = option(
        0.06, "fraction of the steps over which the learning rate rises", within=Range(0, 1)
    )
    clip: float = option(
        1.0, "clip the norm of the gradients to this; 0 for no clipping", within=Range(0)
    )
    autocast: str = option(
        "auto",
        "multiply matrices in bfloat16: auto for float32 weights where the hardware is fast at it",
        choices=("auto", "on", "off"),
    )
    gradient_checkpointing: bool = option(
        False,
        "recompute activations in the backward pass: far less memory, 1.4 to 1.9 times as slow",
    )
    parallel: str = option(
        "auto",
        "what several processes (torchrun) divide: ddp texts alone, fsdp also trained weights, "
        "gradients and moments, layer by layer; auto: fsdp where ddp does not fit into memory",
        choices=("auto", "ddp", "fsdp"),
    )
    class_weights: str = option(
        "none",
        "balanced: weight the loss of each class by its inverse frequency",
        choices=("none", "balanced"),
    )
    ordinal: float = option(
        0.0,
        "for ordered classes such as stars: smooth targets over neighboring classes, with this "
        "width in classes",
        within=Range(0),
    )
    self_distillation: float = option(
        0.0,
        "weight of the untrained classifier's own predictions in the targets, against forgetting",
        within=Range(0, 1, high_open=True),
    )
    patience: int = option(
        0,
        "stop after this many evaluations without improvement; 0 to never stop early",
        within=Range(0),
    )
    metric: str = option(
        "accuracy",
        "metric on the dev split that selects the best weights: "
        f"{', '.join(CLASS_METRICS[:-1])} or {CLASS_METRICS[-1]}; for regression "
        f"{VALUE_METRICS[0]} (its default), {', '.join(VALUE_METRICS[1:-1])} or "
        f"{VALUE_METRICS[-1]}",
        choices=(*CLASS_METRICS, *VALUE_METRICS),
    )
    keep: str = option(
        "best",
        "which weights to keep: the best on the dev split by --metric, or the last",
        choices=("best", "last"),
    )
    evals_per_epoch: int = option(
        1, "number of evaluations on the dev split per epoch", within=Range(1)
    )
    seed: int = option(
        0,
        "seed of the order of texts and of dropout; the same seed gives the same weights",
        within=Range(0, 2**32 - 1),  # what scikit-learn takes
    )
    save_every: int = option(100, "steps between two checkpoints, for --resume", within=Range(1))
    tensorboard: bool = option(False, "also write curves for TensorBoard", group="Output")
