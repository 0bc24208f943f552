"""Count the parameters of a config: of one layer, beside the layers, and those that are trained."""

import math

from minllama.checkpoints.state_dict import tensor_shapes
from minllama.model.config import LlamaConfig

# Bytes of a weight in blocks of 32 with a float16 scale: `minllama.quantization.modules`.
QUANTIZED_BYTES = {"int8": 1 + 2 / 32, "int4": 0.5 + 2 / 32}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def layer_parameters(config: LlamaConfig) -> int:
    """Parameters of one layer."""
    return _count(config, "layers.0.")


def layer_matrices(config: LlamaConfig) -> int:
    """Parameters of the seven matrices of a layer."""
    shapes = tensor_shapes(config.replace(n_layers=1))
    return sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if name.startswith("layers.0.") and len(shape) == 2
    )


def other_parameters(config: LlamaConfig) -> int:
    """Parameters of the embeddings, the last norm and the output matrix."""
    return _count(config, "tok_embeddings.", "norm.", "output.")


def all_parameters(config: LlamaConfig) -> int:
    """Parameters of the whole model."""
    return config.n_layers * layer_parameters(config) + other_parameters(config)


def trained_parameters(config: LlamaConfig, method: str, r: int) -> tuple[int, int]:
    """Parameters that a method trains: of one layer, and beside the layers.

    A classifier's head is too small to count. An output matrix of its own is not trained, since a
    head does not use it.
    """
    if method == "full":
        untrained = 0 if config.tie_embeddings else config.vocab_size * config.dim
        return layer_parameters(config), other_parameters(config) - untrained
    if method == "lora":
        shapes = tensor_shapes(config.replace(n_layers=1))
        matrices = [
            shape
            for name, shape in shapes.items()
            if name.startswith("layers.0.") and len(shape) == 2
        ]
        return r * sum(rows + columns for rows, columns in matrices), 0
    return 0, 0


def _count(config: LlamaConfig, *prefixes: str) -> int:
    shapes = tensor_shapes(config.replace(n_layers=1))
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefixes))
