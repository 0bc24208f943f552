"""Read and write llama2.c checkpoints (https://github.com/karpathy/llama2.c).

Supports what its training script saves with torch (`.pt`, also with the course's names of
projections), and what its C programs run (`.bin`: the legacy export, version 1, and version 2 in
int8). Rows of q and k are interleaved as in minllama. Files are recognized by content.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minllama.atomic import atomic_file
from minllama.checkpoints import meta
from minllama.checkpoints.state_dict import (
    add_zero_biases,
    check_extent,
    check_writable,
    has_bias,
    tensor_shapes,
    translate,
)
from minllama.checkpoints.torch_file import (
    dense_tensors,
    first_pickle,
    is_torch_file,
    load_torch_file,
)
from minllama.checkpoints.types import Checkpoint, LazyTensor, lazy
from minllama.errors import CheckpointError, CheckpointWarning, MinllamaError, naming, warn_caller
from minllama.model.config import LlamaConfig
from minllama.quantization.gguf_blocks import view_as
from minllama.tokenizer.vocabulary import Vocabulary

# llama2.c uses Meta's names; the course has its own for attention projections.
OUR_NAMES = meta.OUR_NAMES | {
    f"layers.{{i}}.attention.compute_{part}": f"layers.{{i}}.attention.compute_{part}"
    for part in ("query", "key", "value", "output")
}
COMPILED = "_orig_mod."  # what torch.compile puts before names
# Tables that follow from the config, and the causal mask.
BUFFERS = ("freqs_cos", "freqs_sin", "freqs_cis", "attention.mask")
KNOWN_ARGS = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "multiple_of"),
    *("norm_eps", "layer_norm_eps", "max_seq_len", "max_position_embeddings", "dropout"),
    *("rope_theta", "rope_scaling"),
}

MAGIC = struct.pack("<I", 0x616B3432)  # "ak42"
INTS = struct.Struct("<7i")  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, context
VERSIONED = struct.Struct("<4si7iBi")  # magic, version, the seven, shared output, group size
VERSIONED_HEADER_BYTES = 256
# Constants of run.c, for every file.
FIXED = {
    "rope_theta": 10000.0,
    "norm_eps": 1e-5,
    "rope_scaling": None,
    "attention_bias": False,
    "ffn_bias": False,
    "causal": True,
}

ROPE_TABLE = "rope table"
MATRICES = (
    *("attention.compute_query", "attention.compute_key", "attention.compute_value"),
    "attention.compute_output",
)
FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
LEGACY_ORDER = (
    *("tok_embeddings", "attention_norm", *MATRICES, "ffn_norm", *FEED_FORWARD, "norm"),
    *(ROPE_TABLE, ROPE_TABLE, "output"),
)
VERSIONED_ORDER = (
    *("attention_norm", "ffn_norm", "norm", "tok_embeddings", *MATRICES, *FEED_FORWARD, "output"),
)


def is_torch_checkpoint(path: Path) -> bool:
    """Whether `path` is a file of torch.save other than a plain state dict.

    A bare state dict (Meta's consolidated.00.pth, a pytorch_model.bin) is a part of a folder.
    """
    if not path.is_file() or not is_torch_file(path):
        return False
    pickled = first_pickle(path)
    return b"model_args" in pickled or b"layers." not in pickled


def read_torch_checkpoint(path: Path) -> Checkpoint:
    """Open a training checkpoint of llama2.c or of the course: `model_args` and `model`.

    The output is tied if it equals the embedding. Arguments that do not describe the model are
    listed as ignored; a tensor with an unknown name keeps it, so that the loader refuses it.

    Raises:
        CheckpointError: the file is damaged, is not such a checkpoint, or its pickle contains code.
    """
    from minllama.tokenizer.load import find_vocabulary

    values = load_torch_file(path)
    args, state = values.get("model_args"), values.get("model")
    if not isinstance(args, dict) or not isinstance(state, dict):
        raise CheckpointError(
            f"{path} has no model_args and model, so it is not a llama2.c checkpoint; if it is "
            "part of a checkpoint of Meta's or Hugging Face's, name the folder"
        )
    names = {str(name).removeprefix(COMPILED): tensor for name, tensor in state.items()}
    ignored = [name for name in names if name.endswith(BUFFERS)]
    tensors = {
        translate(name, OUR_NAMES) or name: tensor
        for name, tensor in dense_tensors(names, path).items()
        if name not in ignored
    }
    if _is_tied(tensors):
        tensors.pop("output.weight", None)
    ignored += sorted(f"model_args.{key}" for key in set(args) - KNOWN_ARGS)
    lazy_tensors = {name: lazy(tensor) for name, tensor in tensors.items()}
    with naming(path):
        config = config_from_args(args, tensors)
        check_extent(config, lazy_tensors)
    add_zero_biases(config, lazy_tensors)
    vocabulary = partial(find_vocabulary, path.parent)
    return Checkpoint(
        *(path, "llama2.c .pt", config, lazy_tensors, vocabulary, tuple(ignored)), ends_at_bos=True
    )


def config_from_args(args: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LlamaConfig:
    """A LlamaConfig from `model_args` and, for missing values, from the tensors.

    Raises:
        MinllamaError: an argument is missing, or they contradict one another.
    """
    given = {key: value for key, value in args.items() if value is not None}
    if missing := [key for key in ("dim", "n_layers", "n_heads") if key not in given]:
        raise CheckpointError(
            f"model_args lacks {', '.join(missing)}; it is not a llama2.c checkpoint"
        )
    if given.get("rope_scaling"):
        raise CheckpointError("model_args has rope_scaling, which llama2.c does not compute")

    if type(dropout := given.get("dropout", 0.0)) not in (int, float):
        raise CheckpointError(f"dropout must be a number, not {dropout!r}")

    def rows(name: str) -> int | None:
        return tensors[name].shape[0] if name in tensors and tensors[name].dim() == 2 else None

    config = LlamaConfig(
        dim=given["dim"],
        n_layers=given["n_layers"],
        n_heads=given["n_heads"],
        vocab_size=given.get("vocab_size") or rows("tok_embeddings.weight"),  # type: ignore[arg-type]
        hidden_dim=rows("layers.0.feed_forward.w1.weight"),  # type: ignore[arg-type]
        max_seq_len=given.get("max_seq_len", given.get("max_position_embeddings", 2048)),
        norm_eps=given.get("norm_eps", given.get("layer_norm_eps", 1e-5)),
        rope_theta=given.get("rope_theta", 10000.0),
        tie_embeddings="output.weight" not in tensors,
        attention_bias=has_bias(tensors, ".attention."),
        ffn_bias=has_bias(tensors, ".feed_forward."),
        dropout=dropout,
    )
    key_rows = rows("layers.0.attention.compute_key.weight") or config.dim
    return config.replace(n_kv_heads=given.get("n_kv_heads", key_rows // config.head_dim))


def _is_tied(tensors: Mapping[str, Tensor]) -> bool:
    embedding, output = tensors.get("tok_embeddings.weight"), tensors.get("output.weight")
    if embedding is None or output is None:
        return output is None
    return embedding.data_ptr() == output.data_ptr() or torch.equal(embedding, output)


@dataclass(frozen=True)
class BinLayout:
    """The layout of a `.bin` file.

    Attributes:
        version: 0 for the legacy export, 1, or 2.
        config: from its header.
        header_bytes: offset of the weights.
        group_size: values that share a scale (version 2); 0 for float32.
    """

    version: int
    config: LlamaConfig
    header_bytes: int
    group_size: int = 0

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape in the file's order, the legacy rope tables included."""
        shapes = tensor_shapes(self.config)
        for part in VERSIONED_ORDER if self.version else LEGACY_ORDER:
            if part == ROPE_TABLE:
                yield part, (self.config.max_seq_len, self.config.head_dim // 2)
            elif f"layers.0.{part}.weight" in shapes:
                for layer in range(self.config.n_layers):
                    name = f"layers.{layer}.{part}.weight"
                    yield name, shapes[name]
            elif f"{part}.weight" in shapes:
                yield f"{part}.weight", shapes[f"{part}.weight"]

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """The size in bytes of a tensor of that shape."""
        numel = math.prod(shape)
        if self.group_size and len(shape) == 2:
            return numel + 4 * (numel // self.group_size)
        return 4 * numel

    def file_bytes(self) -> int:
        """The size of the whole file, in constant time: a header may claim a billion layers."""

        def total(config: LlamaConfig) -> int:
            layout = BinLayout(self.version, config, self.header_bytes, self.group_size)
            return self.header_bytes + sum(layout.n_bytes(shape) for _, shape in layout.tensors())

        one_layer, two_layers = (total(self.config.replace(n_layers=n)) for n in (1, 2))
        return one_layer + (self.config.n_layers - 1) * (two_layers - one_layer)


def is_llama2c_bin(path: Path) -> bool:
    """Whether `path` starts like a `.bin` of llama2.c.

    The legacy export has no magic number: seven consistent integers must suffice, so check all
    other formats first.
    """
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(INTS.size)
    if head.startswith(MAGIC):
        return True
    if len(head) < INTS.size:
        return False
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = INTS.unpack(head)
    return bool(
        0 < n_kv_heads <= n_heads <= dim <= 2**17
        and dim % (2 * n_heads) == 0
        and n_heads % n_kv_heads == 0
        and 0 < hidden_dim <= 2**20
        and 0 < n_layers <= 2**12
        and 0 < abs(vocab_size) <= 2**24
        and 0 < max_seq_len <= 2**24
    )


def read_llama2c_bin(path: Path) -> Checkpoint:
    """Open a `.bin` of llama2.c's: legacy, version 1 (float32) or version 2 (int8 in groups).

    Raises:
        CheckpointError: the header is invalid, or does not match the file's size.
    """
    with naming(path):
        layout = _bin_layout(path)
        size, expected = path.stat().st_size, layout.file_bytes()
        if size != expected:
            raise CheckpointError(
                f"the file has {size} bytes, but its header implies {expected}; it is truncated, "
                "or not llama2.c's"
            )
    # A private mapping: torch has tensors writable, and writing to these would not reach the file.
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    tensors: dict[str, LazyTensor] = {}
    offset = layout.header_bytes
    for name, shape in layout.tensors():
        n_bytes = layout.n_bytes(shape)
        if name != ROPE_TABLE:
            raw = data[offset : offset + n_bytes]
            quantized = layout.group_size > 0 and len(shape) == 2
            load = partial(_dequantized, raw, shape, layout.group_size if quantized else 0)
            stored_as = f"int8 / {layout.group_size}" if quantized else "float32"
            tensors[name] = LazyTensor(shape, stored_as, n_bytes, load)
        offset += n_bytes
    with naming(path):
        check_extent(layout.config, tensors)
    kind = f"version {layout.version}" if layout.version else "legacy"
    vocabulary = partial(_vocabulary_in_folder, path, layout.config.vocab_size)
    name = f"llama2.c .bin ({kind})"
    return Checkpoint(path, name, layout.config, tensors, vocabulary, ends_at_bos=True)


def _vocabulary_in_folder(path: Path, vocab_size: int) -> Vocabulary | None:
    """The tokenizer in the file's folder, if its size matches the model.

    llama2.c keeps models with vocabularies of their own in one folder.
    """
    from minllama.tokenizer.codecs import open_codec
    from minllama.tokenizer.load import find_vocabulary

    vocabulary = find_vocabulary(path.parent)
    if vocabulary is not None and (n_tokens := len(open_codec(vocabulary).tokens)) > vocab_size:
        warn_caller(
            f"{path}: the tokenizer beside it has {n_tokens} tokens, but the model has "
            f"{vocab_size}, so it is ignored; name the right one with --tokenizer",
            CheckpointWarning,
        )
        return None
    return vocabulary


def write_llama2c_bin(
    path: str | PathLike[str], config: LlamaConfig, tensors: Mapping[str, Tensor]
) -> None:
    """Write the legacy `.bin`, float32, which llama2.c's run.c runs, atomically.

    Args:
        path: the file.
        config: of the model.
        tensors: in minllama's naming and layout; each is read once, in order.

    Raises:
        MinllamaError: run.c would compute something else than this model, a tensor disagrees with
            the config, or the file cannot be written.
    """
    _check_runnable(config)
    check_writable(config, tensors)
    layout = BinLayout(0, config, INTS.size)
    vocab_size = config.vocab_size if config.tie_embeddings else -config.vocab_size
    sizes = (config.dim, config.hidden_dim, config.n_layers, config.n_heads, config.n_kv_heads)
    if (largest := max(*sizes, config.vocab_size, config.max_seq_len)) >= 2**31:
        raise MinllamaError(
            f"the config has {largest}, which does not fit into the 32 bits of llama2.c's .bin"
        )
    tables = iter(_rope_tables(config))
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(INTS.pack(*sizes, vocab_size, config.max_seq_len))
        for name, _ in layout.tensors():
            tensor = next(tables) if name == ROPE_TABLE else tensors[name]
            file.write(tensor.detach().cpu().float().contiguous().numpy().data)


def _check_runnable(config: LlamaConfig) -> None:
    fixed = FIXED | {"head_dim": config.dim // config.n_heads}
    for name, value in fixed.items():
        ours = getattr(config, name)
        same = math.isclose(ours, value, rel_tol=1e-6) if type(value) is float else ours == value
        if not same:
            shown = ours.kind if name == "rope_scaling" else ours
            raise MinllamaError(
                f"llama2.c's .bin has no field for {name}: run.c computes with {value}, and this "
                f"model has {shown}; convert to hf or gguf instead"
            )


def _rope_tables(config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, (context, C / 2) each; newer run.c skips them."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    angles = torch.outer(torch.arange(config.max_seq_len).float(), 1 / config.rope_theta**exponents)
    return angles.cos(), angles.sin()


def _bin_layout(path: Path) -> BinLayout:
    with path.open("rb") as file:
        head = file.read(VERSIONED.size)
    if head.startswith(MAGIC):
        if len(head) < VERSIONED.size:
            raise CheckpointError("the file is truncated in its header")
        _, version, *ints, shared, group_size = VERSIONED.unpack(head)
        if version not in (1, 2):
            raise CheckpointError(f"version {version} is not supported; versions 1 and 2 are")
        config = _bin_config(ints, tied=bool(shared))
        if version == 1:
            return BinLayout(1, config, VERSIONED_HEADER_BYTES)
        shapes = tensor_shapes(config.replace(n_layers=1)).values()
        if group_size < 1 or any(len(s) == 2 and math.prod(s) % group_size for s in shapes):
            raise CheckpointError(f"its matrices cannot be split into groups of {group_size}")
        return BinLayout(2, config, VERSIONED_HEADER_BYTES, group_size)
    if len(head) < INTS.size:
        raise CheckpointError("the file is truncated in its header")
    ints = list(INTS.unpack_from(head))
    tied, ints[5] = ints[5] > 0, abs(ints[5])  # a negative vocab_size means that it is not tied
    return BinLayout(0, _bin_config(ints, tied), INTS.size)


def _bin_config(ints: list[int], tied: bool) -> LlamaConfig:
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = ints
    return LlamaConfig(
        dim=dim,
        hidden_dim=hidden_dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        tie_embeddings=tied,
    )


def _dequantized(raw: Tensor, shape: tuple[int, ...], group_size: int) -> Tensor:
    """float32 values, or dequantized groups: all int8 quants, then a float32 scale for each."""
    if not group_size:
        return view_as(raw, torch.float32).view(shape)
    numel = math.prod(shape)
    quants = raw[:numel].view(torch.int8).view(-1, group_size)
    scales = view_as(raw[numel:], torch.float32).view(-1, 1)
    return (quants * scales).view(shape)
