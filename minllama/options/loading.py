"""How to load a model: dtype, device, weight format, base and tokenizer, as one value."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # an option names them, and loads nothing heavy
    import torch

DTYPES = ("float32", "bfloat16", "float16")  # of weights that are not quantized


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How to load a model, as far as specified; None for defaults.

    Attributes:
        dtype: of the weights, torch's or its name.
        device: of the weights.
        quantize: one of `QUANTIZE`, "none" for dense weights, "auto" for the fastest with this file
            and machine; None for the format a classifier was trained on, and dense elsewhere.
        activations: one of `ACTIVATIONS`: the integers that a CPU multiplies quantized weights
            with. int8 is faster and less exact, and computes in float32 between products.
        base: base model of an adapter or classifier, if it has moved.
        tokenizer: file or folder of the tokenizer, if there is none beside the model.
    """

    dtype: "torch.dtype | str | None" = None
    device: "torch.device | str | None" = None
    quantize: str | None = None
    activations: str = "int16"
    base: str | os.PathLike[str] | None = None
    tokenizer: str | os.PathLike[str] | None = None
