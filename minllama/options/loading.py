"""How somebody wants a model's weights, as one value instead of an argument for each."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # an option names them, and loads nothing heavy
    import torch


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is opened, as far as somebody has said it; None where not.

    Attributes:
        dtype: of the weights, torch's or its name.
        device: where they are to be.
        quantize: a word of `QUANTIZE`, "none" for dense weights, "auto" for what is fastest with
            file and machine; None for what a classifier was trained on, and dense elsewhere.
        base: of an adapter or classifier, where it is now.
        tokenizer: file or folder of the tokenizer, where none is beside the model.
    """

    dtype: "torch.dtype | str | None" = None
    device: "torch.device | str | None" = None
    quantize: str | None = None
    base: str | os.PathLike[str] | None = None
    tokenizer: str | os.PathLike[str] | None = None
