"""The tensor names and shapes that a config implies, and checks for all readers.

A model is allocated from its config before its tensors are loaded, so a config that its tensors
contradict is refused here, before a billion layers are allocated.
"""

import re
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from minllama.checkpoints.types import LazyTensor, without_values
from minllama.errors import CheckpointError, MinllamaError
from minllama.model.config import LlamaConfig
from minllama.text import first_few

# Rotary tables cover the whole context; the longest of real models is ten million tokens.
MAX_CONTEXT = 2**24
MAX_LAYERS = 2**12  # thirty times the deepest of real models
MAX_LISTED = 20
"""How many problems of a checkpoint one error lists; the rest are counted."""

_NUMBER = re.compile(r"\.(\d+)\.")


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a Llama, in the order of the forward pass."""
    query_dim, key_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    dim, hidden_dim = config.dim, config.hidden_dim
    projections = {
        "attention.compute_query": (query_dim, dim, config.attention_bias),
        "attention.compute_key": (key_dim, dim, config.attention_bias),
        "attention.compute_value": (key_dim, dim, config.attention_bias),
        "attention.compute_output": (dim, query_dim, config.attention_bias),
        "feed_forward.w1": (hidden_dim, dim, config.ffn_bias),
        "feed_forward.w2": (dim, hidden_dim, config.ffn_bias),
        "feed_forward.w3": (hidden_dim, dim, config.ffn_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (config.vocab_size, dim)}
    for layer in range(config.n_layers):
        shapes[f"layers.{layer}.attention_norm.weight"] = (dim,)
        shapes[f"layers.{layer}.ffn_norm.weight"] = (dim,)
        for name, (rows, columns, has_bias) in projections.items():
            shapes[f"layers.{layer}.{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"layers.{layer}.{name}.bias"] = (rows,)
    shapes["norm.weight"] = (dim,)
    if not config.tie_embeddings:
        shapes["output.weight"] = (config.vocab_size, dim)
    return shapes


def has_bias(tensors: Iterable[str], part: str) -> bool:
    """Whether there is a bias among the tensors of `.attention.` or of `.feed_forward.`."""
    return any(name.endswith(".bias") and part in name for name in tensors)


def add_zero_biases(config: LlamaConfig, tensors: dict[str, LazyTensor]) -> None:
    """Add biases of zeros to projections that have none if others have one.

    Qwen's attention has biases on q, k and v only. As in transformers and llama.cpp.
    """
    present = [part for part in (".attention.", ".feed_forward.") if has_bias(tensors, part)]
    for name, shape in tensor_shapes(config).items():
        is_absent = name.endswith(".bias") and name not in tensors
        if is_absent and any(part in name for part in present):
            tensors[name] = LazyTensor(shape, "zero", 0, partial(torch.zeros, shape))


def differences(
    actual: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Messages about missing, unexpected and misshapen tensors."""
    return [
        *(f"{name} is missing" for name in expected if name not in actual),
        *(f"{name} is unexpected" for name in actual if name not in expected),
        *(
            f"{name} has shape {actual[name]}, but the config implies {shape}"
            for name, shape in expected.items()
            if name in actual and actual[name] != shape
        ),
    ]


def listed(problems: list[str]) -> str:
    """The first MAX_LISTED `problems`, as one line."""
    return first_few(problems, MAX_LISTED, "; ")


def check_writable(config: LlamaConfig, tensors: Mapping[str, Tensor]) -> None:
    """Check tensors against their config before anything is written.

    Raises:
        MinllamaError: one line that lists every difference.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in without_values(tensors).items()}
    if problems := differences(shapes, tensor_shapes(config)):
        raise MinllamaError(f"the tensors disagree with their config: {listed(problems)}")


def translate(name: str, table: Mapping[str, str]) -> str | None:
    """A tensor's name in another scheme; None if the table lacks it.

    Args:
        name: `layers.3.attention.compute_query.weight`.
        table: module names without `.weight` or `.bias`, `{i}` for the layer's number:
            `layers.{i}.attention.compute_query` -> `blk.{i}.attn_q`.
    """
    module, _, kind = name.rpartition(".")
    layer_index = _NUMBER.search(module)
    if layer_index is not None:
        module = f"{module[: layer_index.start()]}.{{i}}.{module[layer_index.end() :]}"
    translated = table.get(module)
    if translated is None or kind not in ("weight", "bias"):
        return None
    return f"{translated.replace('{i}', layer_index[1]) if layer_index else translated}.{kind}"


def check_extent(config: LlamaConfig, tensors: Mapping[str, LazyTensor]) -> None:
    """Check the sizes that a config claims against the tensors that exist.

    The loader lists differences of single tensors; this checks sizes that no tensor supports.

    Raises:
        CheckpointError: more layers than there are tensors for, a width that no tensor has, or a
            context that no model has.
    """
    layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    if config.n_layers > len(layers):
        raise CheckpointError(
            f"the config has {config.n_layers} layers, but there are tensors of {len(layers)}; "
            "the file is incomplete"
        )
    if config.n_layers > MAX_LAYERS:
        raise CheckpointError(
            f"{config.n_layers} layers exceed the limit of {MAX_LAYERS}; its config is damaged"
        )
    widest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    sizes = {
        "dim": config.dim,
        "hidden_dim": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "n_heads * head_dim": config.n_heads * config.head_dim,
    }
    for name, size in sizes.items():
        if size > widest:
            raise CheckpointError(
                f"the config has {name} {size}, but no tensor is wider than {widest}; its config "
                "is from another model"
            )
    if config.max_seq_len > MAX_CONTEXT:
        raise CheckpointError(
            f"a context of {config.max_seq_len} tokens exceeds the limit of {MAX_CONTEXT}"
        )
