"""Read Meta's checkpoints: a folder of params.json and consolidated.00.pth, .01.pth, ...

Each .pth is one model-parallel shard; a tensor is joined from its shards when it is requested. Rows
of q and k are interleaved as in minllama.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minllama.checkpoints.json_object import read_object
from minllama.checkpoints.state_dict import add_zero_biases, check_extent, has_bias, translate
from minllama.checkpoints.types import Checkpoint, LazyTensor, lazy
from minllama.checkpoints.wrapped import load_state_dict, without_wrappers
from minllama.errors import CheckpointError, naming
from minllama.model.config import LlamaConfig, RopeScaling, meta_hidden_dim

SHARD = re.compile(r"consolidated\.(\d+)\.pth")

OUR_NAMES = {
    "tok_embeddings": "tok_embeddings",
    "norm": "norm",
    "output": "output",
    "layers.{i}.attention_norm": "layers.{i}.attention_norm",
    "layers.{i}.attention.wq": "layers.{i}.attention.compute_query",
    "layers.{i}.attention.wk": "layers.{i}.attention.compute_key",
    "layers.{i}.attention.wv": "layers.{i}.attention.compute_value",
    "layers.{i}.attention.wo": "layers.{i}.attention.compute_output",
    "layers.{i}.ffn_norm": "layers.{i}.ffn_norm",
    "layers.{i}.feed_forward.w1": "layers.{i}.feed_forward.w1",
    "layers.{i}.feed_forward.w2": "layers.{i}.feed_forward.w2",
    "layers.{i}.feed_forward.w3": "layers.{i}.feed_forward.w3",
}
EMBEDDING = "tok_embeddings.weight"
# Buffers that follow from the config, and state that training code stores with the weights.
BUFFERS = ("rope.freqs", "freqs_cis", "freqs_cos", "freqs_sin", "attention.mask")
# Matrices that are sharded, by dimension; every shard has a full copy of all others.
SHARDED_BY_ROWS = ("compute_query", "compute_key", "compute_value", "w1", "w3", "output")
SHARDED_BY_COLUMNS = ("compute_output", "w2")

REQUIRED = ("dim", "n_layers", "n_heads")
SUPPORTED_KEYS = {
    *REQUIRED,
    *("n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "hidden_dim", "norm_eps"),
    *("rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor"),
    "max_seq_len",
}
# Keys of releases that are not Llamas with dense weights, with the reasons.
UNSUPPORTED_KEYS = {
    "quantization_args": "its weights are quantized (SpinQuant, QLoRA); use the release in "
    "bfloat16, or a GGUF file",
    "lora_args": "its weights are quantized, with adapters beside them; use the release in "
    "bfloat16, or a GGUF file",
    "vision_chunk_size": "it has a vision encoder (Llama 3.2 11B, 90B); choose a text-only model",
    "vision_num_cross_attention_layers": "it has a vision encoder (Llama 3.2 11B, 90B); choose a "
    "text-only model",
    "vision_args": "it has a vision encoder; choose a text-only model",
    "moe_args": "it is a mixture of experts; choose a dense Llama",
}
# Width, heads and key heads of Llama 3.2's small models, 1B and 3B, and of models pruned from
# them: params.json states that their angles are scaled, but not the factor, 32 (Llama 3.1: 8).
LLAMA_32 = {(2048, 32, 8), (3072, 24, 8)}
UNUSED = {"max_batch_size"}  # of Meta's own cache


def is_meta(path: Path) -> bool:
    """Whether `path` is a folder with a params.json and at least one consolidated.NN.pth."""
    return (path / "params.json").is_file() and any(
        SHARD.fullmatch(file.name) for file in path.iterdir()
    )


def read_meta(path: Path) -> Checkpoint:
    """Open a folder of Meta's; weights are mapped into memory, not read.

    Raises:
        CheckpointError: a file is missing or damaged, shards do not fit each other, or params.json
            has an unknown key.
    """
    from minllama.tokenizer.load import find_vocabulary

    params_path = path / "params.json"
    params = read_object(params_path)
    with naming(params_path):
        _supported_params(params)  # the kind of model is checked before its tensors
    shards = [without_wrappers(load_state_dict(file), EMBEDDING) for file in _shard_files(path)]
    with naming(path):
        tensors, ignored = _joined(shards, params)
    with naming(params_path):
        config = config_from_params(params, tensors)
        _check_shard_count(config, shards)
        check_extent(config, tensors)
    add_zero_biases(config, tensors)
    ignored += sorted(UNUSED & set(params))
    vocabulary = partial(find_vocabulary, path)
    return Checkpoint(path, "Meta", config, tensors, vocabulary, tuple(ignored))


def config_from_params(params: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> LlamaConfig:
    """A LlamaConfig from the content of a params.json.

    `vocab_size` is -1 in many, and then the embedding's rows. The context is in none of Meta's own:
    without `max_seq_len` it is that of the generation which the other fields show: Llama 3.1 and
    later (`use_scaled_rope`) 131072, Code Llama (theta 1e6) 16384, Llama 3 (theta 5e5) 8192,
    Llama 2 4096, Llama 1 (epsilon 1e-6) 2048. Where angles are scaled without a stated factor,
    it is 32 for the shapes of Llama 3.2's 1B and 3B, and 8 for all others.

    Raises:
        MinllamaError: a key is missing or not known, or the values contradict one another.
    """
    given = _supported_params(params)
    if missing := [key for key in REQUIRED if key not in given]:
        raise CheckpointError(f"{', '.join(missing)} is missing; download the file again")
    if given.get("vocab_size", -1) == -1:
        given["vocab_size"] = next(iter(tensors[EMBEDDING].shape), None)
    same = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta")
    fields = {key: given[key] for key in same if key in given}
    config = LlamaConfig(
        **fields,
        hidden_dim=given.get("hidden_dim") or _hidden_dim(given),
        tie_embeddings="output.weight" not in tensors,
        attention_bias=has_bias(tensors, ".attention."),
        ffn_bias=has_bias(tensors, ".feed_forward."),
    )
    scaling = _scaling(given, config)
    max_seq_len = given.get("max_seq_len") or _usual_context(config, scaling)
    return config.replace(rope_scaling=scaling, max_seq_len=max_seq_len)


def _supported_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The relevant keys; raises an error for unsupported ones."""
    given = {key: value for key, value in params.items() if value is not None}
    for key, what in UNSUPPORTED_KEYS.items():
        if key in given:
            raise CheckpointError(f"{key} is not supported: {what}")
    if unknown := sorted(set(given) - SUPPORTED_KEYS - UNUSED):
        raise CheckpointError(
            f"{', '.join(unknown)}: unknown to minllama, so the model may compute something "
            f"else; known: {', '.join(sorted(SUPPORTED_KEYS))}"
        )
    return given


def _scaling(given: Mapping[str, Any], config: LlamaConfig) -> RopeScaling | None:
    is_scaled = given.get("use_scaled_rope", False)
    if not isinstance(is_scaled, bool):
        raise CheckpointError(f"use_scaled_rope must be true or false, not {is_scaled!r}"[:100])
    if not is_scaled:
        return None
    usual = 32.0 if (config.dim, config.n_heads, config.n_kv_heads) in LLAMA_32 else 8.0
    return RopeScaling(
        "llama3",
        factor=given.get("rope_scaling_factor", usual),
        high_freq_factor=given.get("rope_high_freq_factor", 4.0),
        original_max_seq_len=8192,
    )


def _hidden_dim(given: Mapping[str, Any]) -> int:
    multiple_of = given.get("multiple_of", 256)
    multiplier = given.get("ffn_dim_multiplier")
    if type(given["dim"]) is not int:
        raise CheckpointError(f"dim must be an integer above 0, not {given['dim']!r}")
    if type(multiple_of) is not int or multiple_of < 1:
        raise CheckpointError(f"multiple_of must be an integer above 0, not {multiple_of!r}")
    if multiplier is not None and (
        type(multiplier) not in (int, float) or not 0 < multiplier < 1e6
    ):
        raise CheckpointError(f"ffn_dim_multiplier must be a number above 0, not {multiplier!r}")
    return meta_hidden_dim(given["dim"], multiple_of, multiplier)


def _usual_context(config: LlamaConfig, scaling: RopeScaling | None) -> int:
    if scaling is not None:
        return 131072
    if config.rope_theta > 10000:
        return 16384 if config.rope_theta >= 1e6 else 8192
    return 2048 if config.norm_eps < 1e-5 else 4096


def _shard_files(folder: Path) -> list[Path]:
    numbered = {
        int(match[1]): file for file in folder.iterdir() if (match := SHARD.fullmatch(file.name))
    }
    for number in range(len(numbered)):
        if number not in numbered:
            missing = folder / f"consolidated.{number:02d}.pth"
            raise CheckpointError(f"{missing} is missing; download it again")
    return [numbered[number] for number in range(len(numbered))]


def _joined(
    shards: list[dict[str, Tensor]], params: Mapping[str, Any]
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Every tensor over all shards, by minllama's name, and the names of ignored ones."""
    tensors, ignored = {}, []
    for shard in shards:
        if lacking := set(shards[0]) ^ set(shard):
            raise CheckpointError(f"{min(lacking)} is in some shards but not in others")
    for name in shards[0]:
        if name.endswith(BUFFERS):
            ignored.append(name)
            continue
        ours = translate(name, OUR_NAMES) or name
        parts = [shard[name] for shard in shards]
        tensors[ours] = _join(name, parts, _sharded_dim(ours, parts[0], params))
    if EMBEDDING not in tensors:
        raise CheckpointError(f"the tensor {EMBEDDING} is missing; the model is incomplete")
    return tensors, ignored


def _sharded_dim(ours: str, part: Tensor, params: Mapping[str, Any]) -> int | None:
    """The dimension along which a tensor is sharded; `None` if each shard has all of it."""
    module = ours.split(".")[-2] if "." in ours else ours
    if ours.endswith(".bias") and part.dim() == 1:  # one for each row
        return 0 if module in SHARDED_BY_ROWS else None
    if part.dim() != 2:
        return None
    if module == "tok_embeddings":
        # Llama 1 and 2 split the width, Llama 3 the vocabulary.
        return 0 if part.shape[1] == params.get("dim") else 1
    if module in SHARDED_BY_ROWS:
        return 0
    return 1 if module in SHARDED_BY_COLUMNS else None


def _join(name: str, parts: list[Tensor], dim: int | None) -> LazyTensor:
    first = parts[0]
    if any(part.shape != first.shape or part.dtype != first.dtype for part in parts):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise CheckpointError(
            f"{name} differs between shards ({shapes}); they are from different models"
        )
    part = lazy(first)
    if dim is None or len(parts) == 1:
        return part
    shape = list(first.shape)
    shape[dim] *= len(parts)
    n_bytes = part.stored_bytes * len(parts)
    return LazyTensor(tuple(shape), part.stored_as, n_bytes, partial(torch.cat, parts, dim=dim))


def _check_shard_count(config: LlamaConfig, shards: list[dict[str, Tensor]]) -> None:
    query = shards[0].get("layers.0.attention.wq.weight")
    rows = config.n_heads * config.head_dim
    if query is None or query.dim() != 2 or not query.shape[0] or rows % query.shape[0]:
        return  # for the loader to report
    if (needed := rows // query.shape[0]) != len(shards):
        raise CheckpointError(
            f"it describes a model of {needed} shards, but there are {len(shards)} "
            "consolidated.NN.pth; download the others"
        )
