"""Read and write Hugging Face folders: config.json, weights and tokenizer files.

Hugging Face's names of a Llama's tensors occur only here. Reading is lazy: shapes come from the
files' headers, and a tensor is mapped into memory when it is requested.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minllama.atomic import atomic_folder
from minllama.checkpoints.huggingface_config import (
    config_from_huggingface,
    config_to_huggingface,
    eos_ids,
    ignored_keys,
    rope_contradiction,
)
from minllama.checkpoints.huggingface_head import (
    HEAD_BIAS,
    HEAD_WEIGHT,
    SequenceHead,
    head_from_huggingface,
    head_settings,
)
from minllama.checkpoints.json_object import read_object
from minllama.checkpoints.safetensors_file import write_safetensors
from minllama.checkpoints.state_dict import (
    add_zero_biases,
    check_extent,
    check_writable,
    has_bias,
    translate,
)
from minllama.checkpoints.types import Checkpoint, LazyTensor, lazy, without_values
from minllama.checkpoints.wrapped import load_state_dict, without_wrappers
from minllama.errors import (
    CheckpointError,
    CheckpointWarning,
    OptionError,
    TokenizerError,
    naming,
    warn_caller,
)
from minllama.model.config import LlamaConfig
from minllama.tokenizer.size import check_fits, count_tokens
from minllama.tokenizer.vocabulary import Vocabulary

NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.attention.compute_query": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.compute_key": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.compute_value": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.compute_output": "model.layers.{i}.self_attn.o_proj",
    "layers.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.feed_forward.w1": "model.layers.{i}.mlp.gate_proj",
    "layers.{i}.feed_forward.w2": "model.layers.{i}.mlp.down_proj",
    "layers.{i}.feed_forward.w3": "model.layers.{i}.mlp.up_proj",
    "norm": "model.norm",
    "output": "lm_head",
}
OUR_NAMES = {theirs: ours for ours, theirs in NAMES.items()}
# Tensors that show whether all names in a file have a further prefix.
ROOTS = ("model.embed_tokens.weight", "embed_tokens.weight", "lm_head.weight")
EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
WEIGHT_FILES = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
MAX_SHARD_SIZE = "5GB"
# Of a safetensors file, a hundred times those of Llama 3.1 405B.
MAX_HEADER_BYTES = 2**24
MAX_TENSORS = 2**16


def is_huggingface(path: Path) -> bool:
    """Whether `path` is a folder with a config.json that names a model type."""
    return (path / "config.json").is_file()


def has_weights(path: Path) -> bool:
    """Whether a folder contains weights in files with Hugging Face's names."""
    return any(WEIGHT_FILES.fullmatch(file.name) for file in path.iterdir())


def read_huggingface(path: Path) -> Checkpoint:
    """Open a Hugging Face folder; nothing but headers is read.

    Raises:
        CheckpointError: a file is missing or damaged, or the model is not a Llama.
    """
    from minllama.tokenizer.load import find_vocabulary

    raw = read_object(path / "config.json")
    with naming(path / "config.json"):
        config = config_from_huggingface(raw)
        ignored = ignored_keys(raw)
    if contradiction := rope_contradiction(raw):
        warn_caller(f"{path / 'config.json'}: {contradiction}", CheckpointWarning)
    tensors: dict[str, LazyTensor] = {}
    prefix = "model."
    stored = without_wrappers(dict(_stored_tensors(path)), *ROOTS)
    with naming(path):
        _check_no_adapter(stored)
        head = head_from_huggingface(raw, stored)
    if stored and not any(name.startswith(prefix) for name in stored):
        stored = {  # a bare LlamaModel, perhaps with a head on it
            name if name in (HEAD_WEIGHT, HEAD_BIAS) else prefix + name: tensor
            for name, tensor in stored.items()
        }
    for name, tensor in stored.items():
        if name.endswith("rotary_emb.inv_freq"):
            ignored.append(name)
        else:
            ours = translate(name, OUR_NAMES) or name  # the loader reports unknown names
            tensors[ours] = _permuted(ours, tensor, config)
    config = _with_head(config, tensors, ignored, path)
    with naming(path):
        _check_biases(config, tensors)
        check_extent(config, tensors)
    add_zero_biases(config, tensors)
    vocabulary = partial(find_vocabulary, path)
    return Checkpoint(path, "Hugging Face", config, tensors, vocabulary, tuple(ignored), head=head)


def declared_head(path: Path) -> SequenceHead:
    """The head that the config.json in a folder describes, whether its weights exist or not.

    Raises:
        CheckpointError: it is damaged.
    """
    config = path / "config.json"
    if not config.is_file():
        return SequenceHead(None, None, None)
    with naming(config):
        return head_settings(read_object(config))


def _with_head(
    config: LlamaConfig, tensors: dict[str, LazyTensor], ignored: list[str], path: Path
) -> LlamaConfig:
    """Resolve a tied config if the file has an output matrix as well.

    As in transformers 5: if it equals the embedding they are tied, otherwise it is used; if the
    embedding is missing, it is used for both.
    """
    if not config.tie_embeddings or OUTPUT not in tensors:
        return config
    if EMBEDDING not in tensors:
        tensors[EMBEDDING] = tensors.pop(OUTPUT)
        return config
    if _are_equal(tensors[EMBEDDING], tensors[OUTPUT]):
        del tensors[OUTPUT]
        ignored.append(NAMES["output"] + ".weight")
        return config
    warn_caller(
        f"{path}: config.json sets tie_word_embeddings, but the weights have a different "
        "lm_head.weight, which is used; set tie_word_embeddings to false",
        CheckpointWarning,
    )
    return config.replace(tie_embeddings=False)


def _are_equal(one: LazyTensor, other: LazyTensor) -> bool:
    if one.shape != other.shape:
        return False
    first, second = one.load(), other.load()
    if first.dtype != second.dtype:
        first, second = first.float(), second.float()
    return torch.equal(first, second)


def _check_no_adapter(stored: Mapping[str, LazyTensor]) -> None:
    name = next((name for name in stored if ".lora_" in name), None)
    if name is not None:
        raise CheckpointError(
            f"the weights are of a PEFT model with adapters ({name}); save the result of "
            "merge_and_unload(), or save the adapter with save_pretrained()"
        )


def _check_biases(config: LlamaConfig, tensors: Mapping[str, LazyTensor]) -> None:
    """Refuse biases that the config denies: transformers leaves them out, llama.cpp adds them."""
    for key, is_set, part in (
        ("attention_bias", config.attention_bias, ".attention."),
        ("mlp_bias", config.ffn_bias, ".feed_forward."),
    ):
        if not is_set and has_bias(tensors, part):
            name = next(n for n in tensors if n.endswith(".bias") and part in n)
            raise CheckpointError(
                f"the weights have biases ({their_name(name)}), but config.json does not set "
                f"{key}; set it to true, or remove the biases from the file"
            )


def write_huggingface(
    folder: str | os.PathLike[str],
    config: LlamaConfig,
    tensors: Mapping[str, Tensor],
    *,
    vocabulary: Vocabulary | None = None,
    dtype: torch.dtype | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that transformers loads: config.json, model.safetensors, tokenizer files.

    Weights above 5 GB are split into shards with an index. The folder appears whole or not at all.

    Args:
        folder: the target; other files in an existing folder are kept.
        config: of the model.
        tensors: ours, by our names; read one shard at a time.
        vocabulary: also write the tokenizer's files; None keeps existing ones.
        dtype: of the weights; None for the current one.
        generation: settings for generation_config.json besides token ids; needs a vocabulary.

    Raises:
        MinllamaError: the format cannot represent this config, the tensors contradict it, the
            tokenizer (or an existing one in the folder) has more tokens than the model has rows, or
            the folder cannot be written.
    """
    if vocabulary is None:
        _check_existing_tokenizer(Path(folder), config)
    with atomic_folder(folder, replaces=lambda name: bool(WEIGHT_FILES.fullmatch(name))) as staging:
        write_files(
            staging, config, tensors, vocabulary=vocabulary, dtype=dtype, generation=generation
        )


def write_files(
    folder: Path,
    config: LlamaConfig,
    tensors: Mapping[str, Tensor],
    *,
    vocabulary: Vocabulary | None = None,
    dtype: torch.dtype | None = None,
    head: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write the files of `write_huggingface` into an existing folder.

    Args:
        folder, config, tensors, vocabulary, dtype, generation: as there.
        head: further tensors, by Hugging Face's names.
        settings: entries of config.json for that head, which override others.

    Raises:
        MinllamaError: as there.
        OSError: the folder cannot be written.
    """
    check_writable(config, tensors)
    if vocabulary is not None:
        check_fits(count_tokens(vocabulary), config.vocab_size, vocabulary.origin)
    if dtype is not None and dtype not in SAFETENSORS_DTYPES.values():
        known = ", ".join(str(known) for known in SAFETENSORS_DTYPES.values())
        raise OptionError(f"dtype must be one of {known}, not {dtype}")
    first = next(iter(without_values(tensors).values()))
    stated_dtype = str(dtype or first.dtype).removeprefix("torch.")
    raw_config = config_to_huggingface(config, stated_dtype, vocabulary) | dict(settings or {})
    _write_json(folder / "config.json", raw_config)
    _write_shards(folder, tensors, head or {}, config, dtype)
    if vocabulary is not None:
        _write_vocabulary(folder, vocabulary, generation or {})


def _write_shards(
    folder: Path,
    tensors: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    config: LlamaConfig,
    dtype: torch.dtype | None,
) -> None:
    """Write tensors to model.safetensors, or to shards of it and their index, one at a time.

    Args:
        folder: exists.
        tensors: by our names.
        head: further ones, by Hugging Face's names.
        config: of the model.
        dtype: of what is written; None for each tensor's own.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    ours = {their_name(name): name for name in tensors}

    def read(name: str) -> Tensor:
        if name in head:
            return head[name].to(dtype=dtype)
        return for_huggingface(ours[name], tensors[ours[name]], config).to(dtype=dtype)

    stored = without_values(tensors)
    like = {name: stored[of_us].to(dtype=dtype) for name, of_us in ours.items()}
    like |= {name: tensor.to(dtype=dtype) for name, tensor in without_values(head).items()}
    # Shards are planned by shape alone.
    plan = split_torch_state_dict_into_shards(
        like, max_shard_size=MAX_SHARD_SIZE, filename_pattern="model{suffix}.safetensors"
    )
    for file, names in plan.filename_to_tensors.items():
        write_safetensors(folder / file, {name: like[name] for name in names}, read)
    if plan.is_sharded:
        where = dict(sorted(plan.tensor_to_filename.items()))
        index = {"metadata": plan.metadata, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)


def _check_existing_tokenizer(folder: Path, config: LlamaConfig) -> None:
    """Raise TokenizerError if the tokenizer in `folder` has more tokens than the model has rows."""
    from minllama.tokenizer.load import find_vocabulary

    try:
        vocabulary = find_vocabulary(folder) if folder.is_dir() else None
    except TokenizerError:
        return  # opening it reports the damage
    if vocabulary is not None:
        check_fits(count_tokens(vocabulary), config.vocab_size, str(folder))


def their_name(ours: str) -> str:
    """Hugging Face's name of a tensor."""
    theirs = translate(ours, NAMES)
    assert theirs is not None, f"not a tensor of a Llama: {ours}"
    return theirs


def rotated_heads(ours: str, config: LlamaConfig) -> int | None:
    """The number of heads of a tensor's rows, if they are rotated; None if not."""
    if ".compute_query." in ours:
        return config.n_heads
    if ".compute_key." in ours:
        return config.n_kv_heads
    return None


def to_interleaved(rows: Tensor, n_heads: int) -> Tensor:
    """Half-split rows (x0 x2 ... x1 x3 ...) of each head to interleaved ones (x0 x1 x2 x3 ...).

    (n_heads * C, ...) -> the same shape. Hugging Face rotates channel i with i + C/2, Meta rotates
    2i with 2i + 1: the same function after permuting the rows of W_q and W_k.
    """
    pairs: Tensor = rows.unflatten(0, (n_heads, 2, -1))
    return pairs.transpose(1, 2).flatten(0, 2)


def to_half_split(rows: Tensor, n_heads: int) -> Tensor:
    """The inverse of `to_interleaved`."""
    pairs: Tensor = rows.unflatten(0, (n_heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def for_huggingface(ours: str, tensor: Tensor, config: LlamaConfig) -> Tensor:
    """A tensor with its rows in Hugging Face's order."""
    n_heads = rotated_heads(ours, config)
    return tensor if n_heads is None else to_half_split(tensor, n_heads)


def _permuted(ours: str, stored: LazyTensor, config: LlamaConfig) -> LazyTensor:
    n_heads = rotated_heads(ours, config)
    # A misshapen one stays unchanged: the loader reports it together with all the others.
    if n_heads is None or stored.shape[:1] != (n_heads * config.head_dim,):
        return stored

    head_dim, read = config.head_dim, stored.load_rows

    def load() -> Tensor:
        return to_interleaved(stored.load(), n_heads)

    def load_rows(start: int, stop: int) -> Tensor:
        assert read is not None
        first, last = start // head_dim, -(-stop // head_dim)  # heads with such rows
        heads = to_interleaved(read(first * head_dim, last * head_dim), last - first)
        return heads[start - first * head_dim : stop - first * head_dim]

    return LazyTensor(
        stored.shape,
        stored.stored_as,
        stored.stored_bytes,
        load,
        load_rows=None if read is None else load_rows,
    )


def _stored_tensors(folder: Path) -> Iterator[tuple[str, LazyTensor]]:
    """Every tensor of a folder's weight files, by Hugging Face's name."""
    readers: dict[str, Callable[[Path], Iterator[tuple[str, LazyTensor]]]] = {
        "model.safetensors": read_safetensors,
        "pytorch_model.bin": lambda path: (
            (name, lazy(tensor)) for name, tensor in load_state_dict(path).items()
        ),
    }
    for file, read in readers.items():
        # A single file takes precedence: an index next to it may remain from an earlier save.
        if (folder / file).is_file():
            yield from read(folder / file)
            return
        if (index := folder / f"{file}.index.json").is_file():
            weight_map = read_object(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index}: no weight_map; download it again")
            for shard in sorted(dict.fromkeys(map(str, weight_map.values()))):
                if Path(shard).name != shard:  # a downloaded index must not leave its folder
                    raise CheckpointError(f"{index}: {shard!r} is not a file in this folder")
                if not (folder / shard).is_file():
                    raise CheckpointError(f"{folder / shard} is missing; download it again")
                yield from read(folder / shard)
            return
    raise CheckpointError(
        f"{folder}: no weights beside config.json; add model.safetensors or pytorch_model.bin"
    )


def read_safetensors(path: Path) -> Iterator[tuple[str, LazyTensor]]:
    """Every tensor of a safetensors file, mapped into memory.

    Raises:
        CheckpointError: the file is truncated, damaged or empty.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # The library reports every failure as a missing file.
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
        if MAX_HEADER_BYTES < header_bytes <= path.stat().st_size:
            raise CheckpointError(
                f"{path}: its header of {header_bytes} bytes is far larger than any model's; the "
                "file is damaged"
            )
        file = safe_open(path, framework="pt")
        names = file.keys()
        if len(names) > MAX_TENSORS:
            raise CheckpointError(f"{path}: it names {len(names)} tensors; the file is damaged")
        for name in names:
            part = file.get_slice(name)
            if (stored := part.get_dtype()) not in SAFETENSORS_DTYPES:
                raise CheckpointError(
                    f"{path}: {name} is stored as {stored}, which is not a weight type; "
                    f"supported: {', '.join(SAFETENSORS_DTYPES)}"
                )
            dtype = SAFETENSORS_DTYPES[stored]
            try:
                shape = tuple(part.get_shape())
            except (OverflowError, ValueError) as error:  # which the library accepts
                raise CheckpointError(
                    f"{path}: the shape of {name} is damaged ({error})"
                ) from error
            if max(shape, default=0) >= 2**63:
                raise CheckpointError(f"{path}: {name} has shape {shape}; the file is damaged")
            size = math.prod(shape) * dtype.itemsize
            kind = str(dtype).removeprefix("torch.")
            load, load_rows = partial(file.get_tensor, name), partial(_rows_of, part)
            yield name, LazyTensor(shape, kind, size, load, load_rows=load_rows)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({error}); download it again"
        ) from error


def _rows_of(part: Any, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a slice that `safe_open` gave, mapped into memory."""
    rows: Tensor = part[start:stop]
    return rows


def _write_vocabulary(folder: Path, vocabulary: Vocabulary, generation: Mapping[str, Any]) -> None:
    from minllama.tokenizer.huggingface import to_files

    for name, content in to_files(vocabulary).items():
        (folder / name).write_bytes(content)
    ids = {"bos_token_id": vocabulary.bos_id, "eos_token_id": eos_ids(vocabulary)}
    _write_json(folder / "generation_config.json", {**generation, **ids})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
