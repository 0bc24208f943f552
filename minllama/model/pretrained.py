"""What a model has whose weights come from files: a config, initial weights, load and save.

Knows nothing of what the model computes.
"""

import math
import os
from typing import Any, Self

import torch
from torch import nn

from minllama.checkpoints.huggingface import write_huggingface
from minllama.checkpoints.load import (
    check_shapes,
    load_weights,
    long_dtype,
    warn_if_slow,
    without_initial_values,
)
from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.state_dict import tensor_shapes
from minllama.checkpoints.types import Checkpoint
from minllama.engine import cuda_graph
from minllama.kernels.cpu.ops import most_rows
from minllama.model.config import LlamaConfig
from minllama.quantization.modules import state_in_numbers


class LlamaPreTrainedModel(nn.Module):
    """What a model has whose weights come from files: a config, initial weights, load and save."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        # What the weights were loaded from, as `Checkpoint.source` names it; None for none.
        self.source: str | None = None
        # The word of `minllama.options.QUANTIZE` by which it was then quantised.
        self.quantize: str | None = None
        # What passes over many tokens are computed in where no gradients are asked for, beside
        # quantized matrices on a CPU that multiplies it faster than integers; None for `dtype`.
        self.long_dtype: torch.dtype | None = None
        # Counts what may have put other modules or tensors into the place of those there were.
        self.replacements = 0

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: the norms' dtype, for matrices may be kept in other forms."""
        norms = (p for name, p in self.named_parameters() if name.endswith("norm.weight"))
        return next(norms).dtype

    def dtype_of_pass(self, n_tokens: int) -> torch.dtype:
        """What a forward pass over so many tokens is computed in between its matrices."""
        long = self.long_dtype
        if long is None or torch.is_grad_enabled() or n_tokens <= most_rows(long):
            return self.dtype
        return long if self.device.type == "cpu" else self.dtype

    def _replaced(self) -> None:
        """Note that modules or tensors may be others from now on."""
        self.replacements += 1
        cuda_graph.forget(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._replaced()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._replaced()
        return super().load_state_dict(*args, **kwargs)

    def set_submodule(self, *args: Any, **kwargs: Any) -> None:
        self._replaced()
        super().set_submodule(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        self.replacements += 1
        return super().train(mode)

    def init_weights(self) -> None:
        """Normal(0, 0.02) for matrices, zero for biases, one for norms.

        The two projections of each layer that write to the residual stream are scaled by
        1 / sqrt(2 n_layers), so that its variance does not grow with depth (Radford et al. 2019,
        sec. 2.3).
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("compute_output.weight", "w2.weight")):
                nn.init.normal_(parameter, std=residual_std)
            else:
                nn.init.normal_(parameter, std=0.02)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        quantize: str | None = None,
        base: str | os.PathLike[str] | None = None,
        **config_changes: Any,
    ) -> Self:
        """Load a model from a file, a folder or a Hugging Face id, in evaluation mode.

        Args:
            source: path or id; None for the embedded default model. A PEFT adapter is merged into
                its base.
            dtype: of the weights, torch's or its name; None for float32 on a CPU and bfloat16 on a
                GPU.
            device: None for the GPU where there is one.
            quantize: "int8" or "int4" for weights in so many bits, "stored" for a GGUF file's
                blocks as they are, "auto" for what generates fastest from this file on this
                machine (`minllama.quantization.modules`). Quantised weights cannot be trained, only
                adapters beside them. None for a dense model.
            base: the base of a PEFT adapter; None for the one that its config names.
            config_changes: fields of LlamaConfig to set, such as `dropout=0.1, causal=False`.

        Raises:
            MinllamaError: the checkpoint is missing, damaged, or not a Llama.

        Warns:
            SlowDtypeWarning: this machine only emulates `dtype`.
            CheckpointWarning: the checkpoint contradicts itself.
        """
        warn_if_slow(dtype, device)
        return cls.from_checkpoint(
            open_checkpoint(source, base=base),
            dtype=dtype,
            device=device,
            quantize=quantize,
            **config_changes,
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        quantize: str | None = None,
        **config_changes: Any,
    ) -> Self:
        """Load a model from a checkpoint that is open; see `from_pretrained`."""
        # Before a module is built: a file may claim thousands of layers and name a tensor in each.
        check_shapes(checkpoint, tensor_shapes(checkpoint.config))
        # No memory and no random numbers: the weights are assigned.
        with torch.device("meta"), without_initial_values():
            model = cls(checkpoint.config.replace(**config_changes))
        model.quantize = load_weights(
            model, checkpoint, dtype=dtype, device=device, quantize=quantize
        )
        if quantize == "auto" and dtype is None:
            model.long_dtype = long_dtype(model)
        model.source = checkpoint.source
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a Hugging Face folder (config.json, model.safetensors) that transformers loads.

        The folder appears whole or not at all; other files in an existing one are kept. Weights in
        fewer bits are written as the numbers that they stand for, in float32.

        Raises:
            MinllamaError: it cannot be written; what was there is untouched.
        """
        write_huggingface(folder, self.config, state_in_numbers(self))
