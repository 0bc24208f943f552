"""Loading, saving and initializing weights: the base class of models.

Imports `minllama.checkpoints`, which is above this package, only when a model is loaded or saved.
"""

import math
import os
from importlib import import_module
from typing import Any, Protocol, Self

import torch
from torch import nn

from minllama.model.config import LlamaConfig


class OpenCheckpoint(Protocol):
    """The parts of an open `minllama.Checkpoint` that a model uses."""

    @property
    def config(self) -> LlamaConfig: ...
    @property
    def source(self) -> str: ...


class LlamaPreTrainedModel(nn.Module):
    """Base of models with weights in files: a config, initial weights, load and save."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        # The source of the weights, as in `Checkpoint.source`; None without one.
        self.source: str | None = None
        # The weight format that matrices were then quantized to; None for dense ones.
        self.quantize: str | None = None
        # The integers that quantized matrices are multiplied with on a CPU.
        self.activations = "int16"
        # The dtype in which an engine computes long passes with quantized matrices on a CPU
        # that multiplies it faster than integers; None for `dtype`.
        self.long_dtype: torch.dtype | None = None
        # The rows of its weights that this process has, where none has all of them and its own
        # parameters are empty: `minllama.distributed.sharded_llama.ShardedLlama`.
        self.shards: Any = None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computation: that of the norms, since matrices may have other formats."""
        norms = (p for name, p in self.named_parameters() if name.endswith("norm.weight"))
        return next(norms).dtype

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
        activations: str = "int16",
        base: str | os.PathLike[str] | None = None,
        **config_changes: Any,
    ) -> Self:
        """Load a model from a file, a folder or a Hugging Face id, in evaluation mode.

        Args:
            source: path or id; None for the embedded default model. A PEFT adapter is merged into
                its base.
            dtype: of the weights, torch's or its name; None for float32 on a CPU and bfloat16 on a
                GPU.
            device: None for a GPU if there is one.
            quantize: weight format: "int8" or "int4", "stored" for a GGUF file's quantized blocks,
                "auto" for the fastest format for this file and machine
                (`minllama.quantization.modules`). Quantized weights cannot be trained, only
                adapters beside them. None for a dense model.
            activations: "int8" for quantized weights times activations of 8 bits instead of 16,
                which is faster on a CPU and less exact (docs/benchmarks.md).
            base: the base model of a PEFT adapter; None for the one that its config names.
            config_changes: fields of LlamaConfig to set, such as `dropout=0.1, causal=False`.

        Raises:
            MinllamaError: the checkpoint is missing, damaged, or not a Llama.

        Warns:
            SlowDtypeWarning: this machine only emulates `dtype`.
            CheckpointWarning: the checkpoint contradicts itself.
        """
        checkpoints = import_module("minllama.checkpoints.load")
        model: Self = checkpoints.load_model(
            *(cls, source),
            dtype=dtype,
            device=device,
            quantize=quantize,
            activations=activations,
            base=base,
            **config_changes,
        )
        return model

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: OpenCheckpoint,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        quantize: str | None = None,
        activations: str = "int16",
        **config_changes: Any,
    ) -> Self:
        """Load a model from an open `minllama.Checkpoint`; see `from_pretrained`."""
        checkpoints = import_module("minllama.checkpoints.load")
        model: Self = checkpoints.load_checkpoint(
            *(cls, checkpoint),
            dtype=dtype,
            device=device,
            quantize=quantize,
            activations=activations,
            **config_changes,
        )
        return model

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a Hugging Face folder (config.json, model.safetensors) that transformers loads.

        The folder is written atomically; other files in an existing one are kept. Quantized weights
        are written dequantized, in float32.

        Raises:
            MinllamaError: it cannot be written; an existing file is unchanged.
        """
        import_module("minllama.checkpoints.load").save_model(self, folder)
