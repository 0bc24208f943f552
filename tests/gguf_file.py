"""GGUF files made byte by byte, as the format's description says, around a tiny Llama."""

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minllama.checkpoints.types import Checkpoint
from minllama.model.config import LlamaConfig

CONFIG = LlamaConfig(
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    hidden_dim=64,
    vocab_size=40,
    max_seq_len=128,
    norm_eps=1e-6,
    rope_theta=5000.0,
)

# What the format's description says, spelled out once more: value types by number.
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?"}
CODES |= {U64: "Q", I64: "q", F64: "d"}

Field = tuple[str, int, Any]
Stored = tuple[str, tuple[int, ...], int, bytes]


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value(kind: int, content: Any) -> bytes:
    if kind == STRING:
        return string(content)
    if kind == ARRAY:
        item_kind, items = content
        head = struct.pack("<IQ", item_kind, len(items))
        return head + b"".join(value(item_kind, item) for item in items)
    return struct.pack("<" + CODES[kind], content)


def gguf_bytes(
    fields: list[Field], tensors: list[Stored], *, version: int = 3, alignment: int = 32
) -> bytes:
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields))
    for key, kind, content in fields:
        out += string(key) + struct.pack("<I", kind) + value(kind, content)
    data = b""
    for name, shape, type_id, content in tensors:
        out += string(name) + struct.pack("<I", len(shape))
        out += b"".join(struct.pack("<Q", size) for size in reversed(shape))
        out += struct.pack("<IQ", type_id, len(data))
        data += content + bytes(-len(content) % alignment)
    return out + bytes(-len(out) % alignment) + data


FIELDS: list[Field] = [
    ("general.architecture", STRING, "llama"),
    ("llama.block_count", U32, 2),
    ("llama.context_length", U32, 128),
    ("llama.embedding_length", U32, 32),
    ("llama.feed_forward_length", U32, 64),
    ("llama.attention.head_count", U32, 4),
    ("llama.attention.head_count_kv", U32, 2),
    ("llama.attention.layer_norm_rms_epsilon", F32, 1e-6),
    ("llama.rope.freq_base", F32, 5000.0),
]
SHAPES = {
    "token_embd.weight": (40, 32),
    "output_norm.weight": (32,),
    "output.weight": (40, 32),
    **{
        f"blk.{i}.{name}.weight": shape
        for i in range(2)
        for name, shape in {
            "attn_norm": (32,),
            "attn_q": (32, 32),
            "attn_k": (16, 32),
            "attn_v": (16, 32),
            "attn_output": (32, 32),
            "ffn_norm": (32,),
            "ffn_gate": (64, 32),
            "ffn_down": (32, 64),
            "ffn_up": (64, 32),
        }.items()
    },
}
OURS = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_norm": "attention_norm",
    "attn_q": "attention.compute_query",
    "attn_k": "attention.compute_key",
    "attn_v": "attention.compute_value",
    "attn_output": "attention.compute_output",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}


def our_name(theirs: str) -> str:
    *blk, module, kind = theirs.split(".")
    layer = f"layers.{blk[1]}." if blk else ""
    return f"{layer}{OURS[module]}.{kind}"


def random_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def stored_f32(tensors: dict[str, Tensor]) -> list[Stored]:
    return [(name, tuple(t.shape), 0, t.numpy().tobytes()) for name, t in tensors.items()]


def write_file(
    path: Path,
    fields: list[Field] | None = None,
    tensors: list[Stored] | None = None,
    **options: int,
) -> Path:
    """Write a file from fields and tensors; what is not given is the tiny Llama above."""
    content = gguf_bytes(
        FIELDS if fields is None else fields,
        stored_f32(random_tensors()) if tensors is None else tensors,
        **options,
    )
    path.write_bytes(content)
    return path


def with_field(key: str, kind: int, content: Any) -> list[Field]:
    return [field for field in FIELDS if field[0] != key] + [(key, kind, content)]


def loaded(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: tensor.load() for name, tensor in checkpoint.tensors.items()}


def with_rope_freqs(divisors: list[float]) -> list[Stored]:
    content = struct.pack(f"<{len(divisors)}f", *divisors)
    return [*stored_f32(random_tensors()), ("rope_freqs.weight", (len(divisors),), 0, content)]
