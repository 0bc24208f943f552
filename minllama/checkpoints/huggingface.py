"""Hugging Face folders: config.json, safetensors (or pytorch_model.bin) and tokenizer files.

Hugging Face's words for a Llama appear here and nowhere else. Reading is lazy: shapes come from the
files' headers, numbers are mapped into memory when a tensor is asked for.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minllama.atomic import atomic_folder
from minllama.checkpoints.base import Checkpoint, LazyTensor, lazy
from minllama.config import LlamaConfig, RopeScaling
from minllama.errors import CheckpointError, MinllamaError
from minllama.vocabulary import Vocabulary

CONFIG_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "attention_bias": "attention_bias",
    "ffn_bias": "mlp_bias",
}
REQUIRED = ("dim", "n_layers", "n_heads", "hidden_dim", "vocab_size")
DEFAULTS = {"max_seq_len": 2048, "norm_eps": 1e-6}  # where transformers' differ from ours

SCALING_KEYS = {
    "factor": "factor",
    "original_max_seq_len": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
}
SCALING_FIELDS = {  # which of them each kind has, as transformers checks them
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_seq_len", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_max_seq_len", "beta_fast", "beta_slow", "attention_factor"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
}

# Keys that say nothing about what the model computes.
HARMLESS_KEYS = {
    *("model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout"),
    *("pretraining_tp", "_name_or_path", "is_llama_config", "rope_interleaved", "_attn_implementation_autoset"),
    *("transformers.js_config", "return_dict", "output_attentions", "output_hidden_states"),
    *("id2label", "label2id", "problem_type", "is_encoder_decoder", "chunk_size_feed_forward"),
}  # fmt: skip

NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.compute_query": "self_attn.q_proj",
    "attention.compute_key": "self_attn.k_proj",
    "attention.compute_value": "self_attn.v_proj",
    "attention.compute_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
OUR_LAYER_NAMES = {theirs: ours for ours, theirs in LAYER_NAMES.items()}
OUR_NAMES = {theirs: ours for ours, theirs in NAMES.items()}

WEIGHT_FILES = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
MAX_SHARD_SIZE = "5GB"


def is_huggingface(path: Path) -> bool:
    """Whether `path` is a folder with a config.json that names a model type."""
    return (path / "config.json").is_file()


def read_huggingface(path: Path) -> Checkpoint:
    """Open a Hugging Face folder; nothing but headers is read.

    Raises:
        CheckpointError: a file is missing or damaged, or the model is not a Llama.
    """
    from minllama.vocabulary import find_vocabulary

    raw = _read_json(path / "config.json")
    config = config_from_huggingface(raw, path / "config.json")
    ignored = sorted(set(raw) - set(CONFIG_KEYS.values()) - HARMLESS_KEYS - _ROPE_KEYS)
    tensors = {}
    prefix = "model."
    stored = dict(_stored_tensors(path))
    if stored and not any(name.startswith(prefix) for name in stored):
        stored = {prefix + name: tensor for name, tensor in stored.items()}  # a bare LlamaModel
    for name, tensor in stored.items():
        ours = our_name(name)
        if name.endswith("rotary_emb.inv_freq") or (
            config.tie_embeddings and ours == "output.weight"
        ):
            ignored.append(name)
        else:
            tensors[ours] = _permuted(ours, tensor, config)
    return Checkpoint(
        path, "Hugging Face", config, tensors, find_vocabulary(path), ignored=tuple(ignored)
    )


def write_huggingface(
    folder: str | os.PathLike[str],
    config: LlamaConfig,
    tensors: Mapping[str, Tensor],
    *,
    vocabulary: Vocabulary | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a folder that transformers loads: config.json, model.safetensors, tokenizer files.

    Weights above 5 GB are split into shards with an index. The folder appears whole or not at all.

    Args:
        folder: where to; other files in an existing folder are kept.
        config: what the Llama is.
        tensors: ours, by our names; read one shard at a time.
        vocabulary: its tokenizer's files are written too; None leaves those that are there.
        dtype: of the weights; None for as they are.

    Raises:
        MinllamaError: the format has no words for this config, or the folder cannot be written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    first = next(iter(tensors.values()))
    stated_dtype = str(dtype or first.dtype).removeprefix("torch.")
    raw_config = config_to_huggingface(config, stated_dtype, vocabulary)
    # Shards are planned on shapes alone: meta tensors have no numbers.
    plan = split_torch_state_dict_into_shards(
        {name: t.to("meta", dtype or t.dtype) for name, t in tensors.items()},
        max_shard_size=MAX_SHARD_SIZE,
        filename_pattern="model{suffix}.safetensors",
    )
    with atomic_folder(folder, replaces=lambda name: bool(WEIGHT_FILES.fullmatch(name))) as staging:
        for file, names in plan.filename_to_tensors.items():
            shard = {
                their_name(name): for_huggingface(name, tensors[name], config).to(dtype=dtype)
                for name in names
            }
            try:
                save_file(
                    {name: tensor.contiguous() for name, tensor in shard.items()},
                    staging / file,
                    metadata={"format": "pt"},
                )
            except SafetensorError as error:
                raise MinllamaError(f"cannot write {folder}: {error}") from error
        if plan.is_sharded:
            where = {their_name(name): file for name, file in plan.tensor_to_filename.items()}
            index = {"metadata": plan.metadata, "weight_map": dict(sorted(where.items()))}
            _write_json(staging / "model.safetensors.index.json", index)
        _write_json(staging / "config.json", raw_config)
        if vocabulary is not None:
            _write_vocabulary(staging, vocabulary)


def config_from_huggingface(raw: dict[str, Any], where: Path) -> LlamaConfig:
    """A LlamaConfig from the content of a config.json.

    Raises:
        CheckpointError: it is not a Llama, lacks a key, or computes something that ours does not.
    """
    model_type = raw.get("model_type")
    if model_type != "llama":
        raise CheckpointError(
            f"{where}: model_type is {model_type!r}, and minllama runs 'llama' only; "
            "choose a model of the Llama family"
        )
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(
            f"{where}: the weights are quantised with {method!r}, which is not read; "
            "use the unquantised checkpoint or a GGUF file"
        )
    if (activation := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise CheckpointError(f"{where}: hidden_act is {activation!r}; a Llama's is 'silu'")
    fields = {ours: raw[theirs] for ours, theirs in CONFIG_KEYS.items() if _given(raw, theirs)}
    if missing := [CONFIG_KEYS[ours] for ours in REQUIRED if ours not in fields]:
        raise CheckpointError(f"{where}: {', '.join(missing)} is missing; download the file again")
    fields = DEFAULTS | fields
    try:
        scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        theta = scaling.pop("rope_theta", raw.get("rope_theta"))
        return LlamaConfig(
            **fields,
            rope_theta=10000.0 if theta is None else theta,
            rope_scaling=_scaling_from_huggingface(scaling, raw, fields["max_seq_len"]),
        )
    except (TypeError, ValueError, MinllamaError) as error:
        raise CheckpointError(f"{where}: {error}") from error


_ROPE_KEYS = {
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"),
    *("hidden_act", "quantization_config"),
}


def _scaling_from_huggingface(
    raw_scaling: dict[str, Any], raw: dict[str, Any], max_seq_len: int
) -> RopeScaling | None:
    kind = raw_scaling.get("rope_type", raw_scaling.get("type", "default"))
    if raw_scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise MinllamaError("partial_rotary_factor is not 1: a Llama rotates whole heads")
    if kind == "default":
        return None
    if kind not in SCALING_FIELDS:
        raise MinllamaError(
            f"rope scaling {kind!r} is not known; known are default, {', '.join(SCALING_FIELDS)}"
        )
    fields = {
        ours: raw_scaling[SCALING_KEYS[ours]]
        for ours in SCALING_FIELDS[kind]
        if _given(raw_scaling, SCALING_KEYS[ours])
    }
    if "original_max_seq_len" in SCALING_FIELDS[kind]:
        original = raw.get("original_max_position_embeddings") or max_seq_len
        fields.setdefault("original_max_seq_len", original)
    if kind == "yarn" and "factor" not in fields:
        fields["factor"] = max_seq_len / fields["original_max_seq_len"]
    if "factor" not in fields:
        raise MinllamaError(f"rope scaling {kind!r} has no factor")
    return RopeScaling(kind, **fields)


def config_to_huggingface(
    config: LlamaConfig, dtype: str, vocabulary: Vocabulary | None
) -> dict[str, Any]:
    """The content of a config.json, in the form that old and new transformers read alike.

    Raises:
        MinllamaError: the format has no words for this config.
    """
    if not config.causal:
        raise MinllamaError("a Hugging Face Llama is always causal; this one is bidirectional")
    raw = {theirs: getattr(config, ours) for ours, theirs in CONFIG_KEYS.items()}
    raw |= {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "torch_dtype": dtype,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
    }
    if scaling := config.rope_scaling:
        if scaling.kind not in SCALING_FIELDS:
            raise MinllamaError(
                f"config.json has no words for rope scaling {scaling.kind!r}, a divisor for each "
                "frequency; convert to gguf instead"
            )
        fields = {SCALING_KEYS[ours]: getattr(scaling, ours) for ours in SCALING_FIELDS[scaling.kind]}
        given = {key: value for key, value in fields.items() if value is not None}
        raw["rope_scaling"] = {"rope_type": scaling.kind, **given}
    if vocabulary is not None:
        raw |= {"bos_token_id": vocabulary.bos_id, "eos_token_id": _eos_ids(vocabulary)}
    return raw


def our_name(theirs: str) -> str:
    """Our name of one of Hugging Face's tensors; an unknown one keeps its name."""
    if theirs in OUR_NAMES:
        return OUR_NAMES[theirs]
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", theirs):
        layer, part, kind = match.groups()
        if part in OUR_LAYER_NAMES:
            return f"layers.{layer}.{OUR_LAYER_NAMES[part]}.{kind}"
    return theirs


def their_name(ours: str) -> str:
    """Hugging Face's name of one of our tensors."""
    if ours in NAMES:
        return NAMES[ours]
    _, layer, rest = ours.split(".", 2)
    part, kind = rest.rsplit(".", 1)
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"


def rotated_heads(ours: str, config: LlamaConfig) -> int | None:
    """How many heads the rows of a tensor belong to, if they are rotated; None if not."""
    if ".compute_query." in ours:
        return config.n_heads
    if ".compute_key." in ours:
        return config.n_kv_heads
    return None


def to_interleaved(rows: Tensor, n_heads: int) -> Tensor:
    """Half-split rows (x0 x2 ... x1 x3 ...) of each head to interleaved ones (x0 x1 x2 x3 ...).

    (n_heads * C, ...) -> the same shape. Hugging Face rotates channel i with i + C/2, Meta rotates
    2i with 2i + 1: the same function once the rows of W_q and W_k are in the other order.
    """
    return rows.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def to_half_split(rows: Tensor, n_heads: int) -> Tensor:
    """The inverse of `to_interleaved`."""
    return rows.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def for_huggingface(ours: str, tensor: Tensor, config: LlamaConfig) -> Tensor:
    """One of our tensors with its rows in Hugging Face's order."""
    n_heads = rotated_heads(ours, config)
    return tensor if n_heads is None else to_half_split(tensor, n_heads)


def _permuted(ours: str, stored: LazyTensor, config: LlamaConfig) -> LazyTensor:
    n_heads = rotated_heads(ours, config)
    # A misshapen one is left alone, so that the loader can report it beside all the others.
    if n_heads is None or stored.shape[0] != n_heads * config.head_dim:
        return stored

    def load() -> Tensor:
        return to_interleaved(stored.load(), n_heads)

    return LazyTensor(stored.shape, stored.stored_as, stored.stored_bytes, load)


def _stored_tensors(folder: Path) -> Iterator[tuple[str, LazyTensor]]:
    """Every tensor of a folder's weight files, by Hugging Face's name."""
    from minllama.checkpoints.torch_file import load_torch_file

    readers: dict[str, Callable[[Path], Iterator[tuple[str, LazyTensor]]]] = {
        "model.safetensors": read_safetensors,
        "pytorch_model.bin": lambda path: (
            (name, lazy(tensor)) for name, tensor in load_torch_file(path).items()
        ),
    }
    for file, read in readers.items():
        if (index := folder / f"{file}.index.json").is_file():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index}: it has no weight_map; download it again")
            for shard in sorted(set(weight_map.values())):
                if Path(str(shard)).name != shard:  # a downloaded index must not leave its folder
                    raise CheckpointError(f"{index}: {shard!r} is not a file of this folder")
                if not (folder / shard).is_file():
                    raise CheckpointError(f"{folder / shard} is missing; download it again")
                yield from read(folder / shard)
            return
        if (folder / file).is_file():
            yield from read(folder / file)
            return
    raise CheckpointError(
        f"{folder}: no weights beside config.json; "
        "there should be a model.safetensors or a pytorch_model.bin"
    )


def read_safetensors(path: Path) -> Iterator[tuple[str, LazyTensor]]:
    """Every tensor of a safetensors file, mapped into memory.

    Raises:
        CheckpointError: the file is cut, damaged or empty.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")  # type: ignore[no-untyped-call]
        for name in file.keys():  # noqa: SIM118  (not a dict)
            part = file.get_slice(name)
            stored_as = part.get_dtype()
            if stored_as not in _SAFETENSORS_BYTES:
                raise CheckpointError(
                    f"{path}: {name} is stored as {stored_as}, which is not a weight; "
                    f"read are {', '.join(_SAFETENSORS_BYTES)}"
                )
            shape = tuple(part.get_shape())
            size = torch.Size(shape).numel() * _SAFETENSORS_BYTES[stored_as]
            yield name, LazyTensor(shape, stored_as, size, partial(file.get_tensor, name))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); download it again"
        ) from error


_SAFETENSORS_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def _write_vocabulary(folder: Path, vocabulary: Vocabulary) -> None:
    from minllama.vocabulary import to_files

    for name, content in to_files(vocabulary).items():
        (folder / name).write_bytes(content)
    generation = {"bos_token_id": vocabulary.bos_id, "eos_token_id": _eos_ids(vocabulary)}
    _write_json(folder / "generation_config.json", generation)


def _eos_ids(vocabulary: Vocabulary) -> int | list[int] | None:
    """One id, or the list that transformers takes where several tokens end a text."""
    ids = dict.fromkeys([vocabulary.eos_id, *vocabulary.stop_ids])
    several = [i for i in ids if i is not None]
    return several if len(several) > 1 else vocabulary.eos_id


def _given(raw: Mapping[str, Any], key: str) -> bool:
    return raw.get(key) is not None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object; download it again")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
