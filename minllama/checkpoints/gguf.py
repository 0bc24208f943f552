"""Read and write GGUF files: a Llama's config, tensors and vocabulary in llama.cpp's format.

Reading maps the file into memory and dequantizes a tensor when it is requested. Rows of q and k are
interleaved as in minllama. Writing streams one tensor at a time. `minllama.checkpoints.open` and
`minllama convert` call it; `minllama.tokenizer.gguf` converts the vocabulary.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from minllama.atomic import atomic_file
from minllama.checkpoints.gguf_config import (
    ARCHITECTURE,
    Keys,
    check_architecture,
    check_has_weights,
    config_from_keys,
    keys_from_config,
)
from minllama.checkpoints.gguf_header import GGUFHeader, GGUFTensor, is_gguf, read_header
from minllama.checkpoints.resolve import PART
from minllama.checkpoints.state_dict import (
    add_zero_biases,
    check_extent,
    check_writable,
    has_bias,
    tensor_shapes,
    translate,
)
from minllama.checkpoints.types import Checkpoint, LazyTensor
from minllama.errors import CheckpointError, MinllamaError, OptionError, naming
from minllama.model.config import LlamaConfig
from minllama.quantization.gguf_blocks import (
    BF16,
    DTYPES,
    F16,
    F32,
    Q8_0,
    GGMLType,
    can_dequantize,
    dequantize,
    quantize_q8_0,
)
from minllama.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["GGUFFile", "is_gguf", "open_gguf", "read_gguf", "write_gguf"]

THEIR_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "layers.{i}.attention_norm": "blk.{i}.attn_norm",
    "layers.{i}.attention.compute_query": "blk.{i}.attn_q",
    "layers.{i}.attention.compute_key": "blk.{i}.attn_k",
    "layers.{i}.attention.compute_value": "blk.{i}.attn_v",
    "layers.{i}.attention.compute_output": "blk.{i}.attn_output",
    "layers.{i}.ffn_norm": "blk.{i}.ffn_norm",
    "layers.{i}.feed_forward.w1": "blk.{i}.ffn_gate",
    "layers.{i}.feed_forward.w2": "blk.{i}.ffn_down",
    "layers.{i}.feed_forward.w3": "blk.{i}.ffn_up",
}
OUR_NAMES = {theirs: ours for ours, theirs in THEIR_NAMES.items()}
ROPE_FREQS = "rope_freqs.weight"
# Angles that old converters stored; they follow from the config and are ignored.
UNUSED = "attn_rot_embd.weight"

StoredAs = Literal["f32", "f16", "bf16", "q8_0"]
TYPES: dict[StoredAs, GGMLType] = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0}
# Numbers of llama.cpp's enum llama_ftype: "all" or "mostly" of that type.
FILE_TYPES: dict[StoredAs, int] = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
MAX_F16 = torch.finfo(torch.float16).max
NO_VOCABULARY = "none"
SPLIT_COUNT, SPLIT_NUMBER, SPLIT_TENSORS = "split.count", "split.no", "split.tensors.count"
MAX_PARTS = 99_999  # that such a name can state
# The longest rope_freqs.weight that is accepted: twice the widest known head.
MAX_ROPE_FREQS = 1024


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file mapped into memory.

    Attributes:
        path: of the file.
        header: its keys and tensors.
        data: all of its bytes, uint8.
    """

    path: Path
    header: GGUFHeader
    data: Tensor

    def raw(self, tensor: GGUFTensor) -> Tensor:
        """The bytes of one tensor, (n_bytes,) uint8, as in the file."""
        return self.data[tensor.offset : tensor.offset + tensor.n_bytes]

    def lazy(self, tensor: GGUFTensor) -> LazyTensor:
        """A `LazyTensor` of one tensor in the file."""
        blocks = None if tensor.type in DTYPES else lambda: (tensor.type, self.raw(tensor))
        load = partial(self.load, tensor)
        # Rows of a matrix are whole blocks; a vector's elements are, where they are no blocks.
        has_rows = len(tensor.shape) > 1 or tensor.type in DTYPES
        load_rows = partial(self.load_rows, tensor) if has_rows else None
        return LazyTensor(tensor.shape, tensor.type.words, tensor.n_bytes, load, blocks, load_rows)

    def load(self, tensor: GGUFTensor) -> Tensor:
        """The values of one tensor: float32 if quantized, else a view in the stored dtype."""
        return dequantize(self.raw(tensor), tensor.type, tensor.shape)

    def load_rows(self, tensor: GGUFTensor, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of `load`."""
        n_bytes = tensor.n_bytes // tensor.shape[0]
        raw = self.raw(tensor)[start * n_bytes : stop * n_bytes]
        return dequantize(raw, tensor.type, (stop - start, *tensor.shape[1:]))


def open_gguf(path: Path) -> GGUFFile:
    """Parse the header of a GGUF file and map the rest.

    Raises:
        CheckpointError: the file cannot be read, is truncated or damaged.
    """
    header = read_header(path)
    # A private mapping: torch has tensors writable, and writing to these would not reach the file.
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    return GGUFFile(path, header, data)


def read_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file; nothing but its header is read.

    A tensor with an unknown name keeps it, so that the loader refuses it. A missing bias beside
    others is zero.

    Raises:
        CheckpointError: the file is truncated or damaged, or its model is not a Llama.
    """
    from minllama.tokenizer.gguf import from_gguf

    parts = _open_parts(path)
    fields = parts[0].header.fields
    with naming(path):
        check_has_weights(fields, sum(len(part.header.tensors) for part in parts))
        check_architecture(fields)
        rope_freqs, ignored = None, []
        tensors: dict[str, LazyTensor] = {}
        for file, name, tensor in _tensors_of(parts):
            if not can_dequantize(tensor.type):
                raise CheckpointError(
                    f"{name} is stored as {tensor.type.name}, which is not a weight type that "
                    "minllama reads"
                )
            if name == ROPE_FREQS:
                if math.prod(tensor.shape) > MAX_ROPE_FREQS:
                    raise CheckpointError(f"{ROPE_FREQS} has shape {tensor.shape}; it is damaged")
                rope_freqs = file.load(tensor).flatten().tolist()
            elif name.endswith(UNUSED):
                ignored.append(name)
            else:
                tensors[translate(name, OUR_NAMES) or name] = file.lazy(tensor)
        if not tensors and "tokenizer.ggml.model" in fields:
            raise CheckpointError("it contains a tokenizer but no model; pass it with --tokenizer")
        if "tok_embeddings.weight" not in tensors:
            raise CheckpointError(
                "the tensor token_embd.weight is missing; the model is incomplete"
            )
        keys = Keys(fields)
        config = config_from_keys(
            keys,
            vocab_size=tensors["tok_embeddings.weight"].shape[0],
            rope_freqs=rope_freqs,
            tie_embeddings="output.weight" not in tensors,
            attention_bias=has_bias(tensors, ".attention."),
            ffn_bias=has_bias(tensors, ".feed_forward."),
        )
        check_extent(config, tensors)
    add_zero_biases(config, tensors)
    ignored += keys.unread()
    vocabulary = partial(from_gguf, fields, path)
    return Checkpoint(path, "GGUF", config, tensors, vocabulary, tuple(ignored))


def read_gguf_vocabulary(path: Path) -> Vocabulary | None:
    """The tokenizer in a GGUF file, which may contain nothing else; None without one.

    Raises:
        CheckpointError: the file is truncated or damaged.
        TokenizerError: its tokenizer is damaged, or of a kind that is not known.
    """
    from minllama.tokenizer.gguf import from_gguf

    vocabulary, part = from_gguf(read_header(path).fields, path), PART.fullmatch(path.name)
    if vocabulary is None and part is not None:  # the first part holds what all parts share
        number = "1".zfill(len(part["number"]))
        first = path.with_name(f"{part['name']}-{number}-of-{part['count']}.gguf")
        if first != path and is_gguf(first):
            return from_gguf(read_header(first).fields, first)
    return vocabulary


def gguf_models(folder: Path) -> list[Path]:
    """The GGUF files in a folder by name; of a split model the first existing part."""
    models: dict[str, Path] = {}
    for path in sorted(folder.glob("*.gguf")):
        if is_gguf(path):
            part = PART.fullmatch(path.name)
            models.setdefault(f"{part['name']}/{part['count']}" if part else path.name, path)
    return list(models.values())


def _open_parts(path: Path) -> list[GGUFFile]:
    """The file at `path`, or all parts of its split model in order.

    Raises:
        CheckpointError: a part is missing, or is of another model; the message names it.
    """
    file = open_gguf(path)
    count = file.header.fields.get(SPLIT_COUNT, 1)
    if type(count) is not int or not 0 <= count <= MAX_PARTS:
        raise CheckpointError(f"{path}: {SPLIT_COUNT} is {count!r}; the file is damaged")
    if count < 2:
        return [file]
    match = PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count or not 1 <= int(match["number"]) <= count:
        raise CheckpointError(
            f"{path}: it is one of {count} parts of a model; rename them to "
            f"(NAME-00001-of-{count:05d}.gguf), or join them (llama-gguf-split --merge)"
        )
    parts = []
    for number in range(count):
        part = path.with_name(f"{match['name']}-{number + 1:05d}-of-{count:05d}.gguf")
        if not part.is_file():
            raise CheckpointError(
                f"{part} is missing (one of the {count} parts of the model); download it again"
            )
        opened = file if part == path else open_gguf(part)
        stated = tuple(opened.header.fields.get(key) for key in (SPLIT_NUMBER, SPLIT_COUNT))
        if stated != (number, count):
            raise CheckpointError(
                f"{part}: it says that it is part {stated[0]} (from 0) of {stated[1]}; its name "
                "is another's; download it again"
            )
        parts.append(opened)
    expected = parts[0].header.fields.get(SPLIT_TENSORS)
    n_tensors = sum(len(part.header.tensors) for part in parts)
    if expected is not None and expected != n_tensors:
        raise CheckpointError(
            f"{path}: its {count} parts contain {n_tensors} tensors instead of {expected}, so they "
            "are from several models; download them again"
        )
    return parts


def _tensors_of(parts: list[GGUFFile]) -> Iterator[tuple[GGUFFile, str, GGUFTensor]]:
    names: set[str] = set()
    for part in parts:
        for name, tensor in part.header.tensors.items():
            if name in names:
                raise CheckpointError(f"the tensor {name!r} is in two parts; download them again")
            names.add(name)
            yield part, name, tensor


def write_gguf(
    path: str | PathLike[str],
    config: LlamaConfig,
    tensors: Mapping[str, Tensor],
    vocabulary: Vocabulary | None,
    dtype: StoredAs = "f16",
    *,
    further: Mapping[str, Any] | None = None,
) -> None:
    """Write a GGUF file that llama.cpp loads, tensor by tensor, and atomically.

    Args:
        path: the file.
        config: of the model.
        tensors: in minllama's naming and layout; each is read once, in order.
        vocabulary: of the tokenizer; `None` writes a file without one.
        dtype: of the matrices. Norms and biases are always float32, and a matrix whose rows are not
            a multiple of 32 is float16 instead of Q8_0.
        further: additional fields, such as `general.sampling.temp`.

    Raises:
        MinllamaError: GGUF cannot represent this config, a tensor contradicts the config or
            overflows `dtype`, or the file cannot be written.
    """
    import numpy
    from gguf import GGMLQuantizationType

    if dtype not in TYPES:
        raise OptionError(f"dtype must be one of {', '.join(TYPES)}, not {dtype!r}")
    check_writable(config, tensors)
    fields, rope_freqs = keys_from_config(config)
    fields |= _file_type_fields(dtype) | _vocabulary_fields(vocabulary, config)
    fields |= further or {}
    shapes = tensor_shapes(config)
    extra = {} if rope_freqs is None else {ROPE_FREQS: torch.tensor(rope_freqs)}
    shapes |= {name: tuple(tensor.shape) for name, tensor in extra.items()}
    types = {name: _type_for(shape, TYPES[dtype]) for name, shape in shapes.items()}
    with atomic_file(path) as temporary:
        writer = _new_writer(temporary)
        try:
            for key, value in fields.items():
                _add_field(writer, key, value)
            for name, shape in shapes.items():
                writer.add_tensor_info(
                    translate(name, THEIR_NAMES) or name,
                    shape,
                    numpy.dtype(numpy.float32),  # has no effect if raw_dtype is set
                    types[name].n_bytes(shape),
                    raw_dtype=GGMLQuantizationType(types[name].id),
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name in shapes:
                tensor = extra[name] if name in extra else tensors[name]
                writer.write_tensor_data(_encoded(name, tensor, types[name]).numpy())
        finally:
            writer.close()


def _type_for(shape: tuple[int, ...], preferred: GGMLType) -> GGMLType:
    if len(shape) == 1:  # llama.cpp has norms and biases in float32 only
        return F32
    return F16 if shape[-1] % preferred.block_len else preferred


def _encoded(name: str, tensor: Tensor, stored: GGMLType) -> Tensor:
    """The bytes of a tensor in the format `stored`, uint8."""
    tensor = tensor.detach().cpu()
    largest = MAX_F16 * (127 if stored == Q8_0 else 1)  # Q8_0 keeps largest / 127 as float16
    if stored in (F16, Q8_0) and tensor.abs().amax() > largest:
        raise MinllamaError(
            f"{name} has values above {largest:g}, which {stored.name} cannot represent; write "
            "bf16 or f32 instead"
        )
    if stored == Q8_0:
        return quantize_q8_0(tensor.float())
    return tensor.to(DTYPES[stored]).contiguous().view(torch.uint8)


def _file_type_fields(dtype: StoredAs) -> dict[str, Any]:
    return {"general.file_type": FILE_TYPES[dtype], "general.quantization_version": 2}


def _vocabulary_fields(vocabulary: Vocabulary | None, config: LlamaConfig) -> dict[str, Any]:
    if vocabulary is None:
        return {"tokenizer.ggml.model": NO_VOCABULARY}
    from minllama.tokenizer.gguf import to_gguf

    return to_gguf(vocabulary, config.vocab_size)


def _new_writer(path: str | PathLike[str]) -> "GGUFWriter":
    """The package's writer, which omits empty lists, although llama.cpp needs merges."""
    from gguf import GGUFValueType, GGUFWriter

    class Writer(GGUFWriter):
        def add_array(self, key: str, val: Any) -> None:
            self.add_key_value(key, val, GGUFValueType.ARRAY)

        def _pack_val(self, val: Any, vtype: Any, *args: Any, **kwargs: Any) -> bytes:
            if vtype == GGUFValueType.ARRAY and len(val) == 0:
                return struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, 0)
            return super()._pack_val(val, vtype, *args, **kwargs)

    return Writer(path, ARCHITECTURE)


def _add_field(writer: "GGUFWriter", key: str, value: Any) -> None:
    """Add a key with the type that llama.cpp expects for its value."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int() if value < 0 or key.startswith("general.sampling."):
            writer.add_int32(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
