"""GGUF: models, in floating point and in blocks of each type, and vocabularies."""

import random
import struct
from pathlib import Path

from minllama.tokenizer.tokenizer import Tokenizer
from tests import gguf_file
from tests.faults.mutations import gguf
from tests.faults.read_models import run_model
from tests.faults.read_tokenizers import use_tokenizer
from tests.faults.reader import Reader, reader, writing
from tests.tokenizer_cases import byte_json


@reader("gguf", "gguf quantized", "gguf vocabulary")
def gguf_model(folder: Path, name: str) -> Reader:
    path = folder / "model.gguf"
    fields = [
        *gguf_file.FIELDS,
        ("llama.rope.scaling.type", gguf_file.STRING, "linear"),
        ("llama.rope.scaling.factor", gguf_file.F32, 2.0),
        ("general.sampling.temp", gguf_file.F32, 0.5),
    ]
    if name == "gguf vocabulary":
        seeds = [gguf_file.gguf_bytes([*gguf_file.FIELDS, *some], []) for some in VOCABULARIES]
        return Reader(
            seeds, writing(path, lambda: use_tokenizer(Tokenizer.from_pretrained(path))), gguf
        )
    seeds = [gguf_file.gguf_bytes(fields, gguf_file.stored_f32(gguf_file.random_tensors()))]
    if name == "gguf quantized":
        seeds = [gguf_file.gguf_bytes(wide_fields(), quantized_tensors(i)) for i in BLOCK_TYPES]
    return Reader(seeds, writing(path, lambda: run_model(path)), gguf)


# Type: values and bytes of a block, from ggml's ggml-common.h.
BLOCK_TYPES = {
    2: (32, 18),
    3: (32, 20),
    6: (32, 22),
    7: (32, 24),
    8: (32, 34),
    10: (256, 84),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
    20: (32, 18),
    23: (256, 136),
}


def wide_fields() -> list[gguf_file.Field]:
    """The fields of a model whose rows are whole blocks of 256."""
    changed = {"llama.embedding_length": 256, "llama.feed_forward_length": 256}
    changed |= {"llama.block_count": 1, "llama.attention.head_count": 8}
    return [(key, kind, changed.get(key, content)) for key, kind, content in gguf_file.FIELDS]


def quantized_tensors(type_id: int) -> list[gguf_file.Stored]:
    length, n_bytes = BLOCK_TYPES[type_id]
    draw = random.Random(type_id)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (40, 256), "output_norm": (256,)}
    shapes |= {f"blk.0.{name}": (256,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.attn_{name}": (64, 256) for name in ("k", "v")}
    shapes |= {f"blk.0.{name}": (256, 256) for name in ("attn_q", "attn_output", "ffn_gate")}
    shapes |= {f"blk.0.{name}": (256, 256) for name in ("ffn_down", "ffn_up")}
    tensors: list[gguf_file.Stored] = []
    for name, shape in shapes.items():
        if len(shape) == 1:
            tensors.append((f"{name}.weight", shape, 0, struct.pack("<256f", *[1.0] * 256)))
        else:
            # Wherever a block has its scales, they are small numbers in half precision.
            block = bytes(draw.randrange(0x30) for _ in range(n_bytes))
            content = block * (shape[0] * shape[1] // length)
            tensors.append((f"{name}.weight", shape, type_id, content))
    return tensors


def _byte_level_fields() -> list[gguf_file.Field]:
    raw = byte_json()
    tokens = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].__getitem__)
    tokens = [*[token["content"] for token in raw["added_tokens"]], *tokens]
    tokens = list(dict.fromkeys(tokens))
    return [
        ("tokenizer.ggml.model", gguf_file.STRING, "gpt2"),
        ("tokenizer.ggml.pre", gguf_file.STRING, "gpt-2"),
        ("tokenizer.ggml.tokens", gguf_file.ARRAY, (gguf_file.STRING, [*tokens, "ab"])),
        (
            "tokenizer.ggml.token_type",
            gguf_file.ARRAY,
            (gguf_file.I32, [3, 3, 3, *[1] * (len(tokens) - 2)]),
        ),
        ("tokenizer.ggml.merges", gguf_file.ARRAY, (gguf_file.STRING, ["a b"])),
        ("tokenizer.ggml.bos_token_id", gguf_file.U32, 0),
        ("tokenizer.ggml.eos_token_id", gguf_file.U32, 1),
        ("tokenizer.ggml.add_bos_token", gguf_file.BOOL, True),
    ]


def _sentencepiece_fields() -> list[gguf_file.Field]:
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_pieces, "\u2581", "a", "b", "ab", "\u2581ab"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 5]
    scores = [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -5.0]
    return [
        ("tokenizer.ggml.model", gguf_file.STRING, "llama"),
        ("tokenizer.ggml.tokens", gguf_file.ARRAY, (gguf_file.STRING, tokens)),
        ("tokenizer.ggml.scores", gguf_file.ARRAY, (gguf_file.F32, scores)),
        ("tokenizer.ggml.token_type", gguf_file.ARRAY, (gguf_file.I32, kinds)),
        ("tokenizer.ggml.unknown_token_id", gguf_file.U32, 0),
        ("tokenizer.ggml.add_space_prefix", gguf_file.BOOL, True),
        ("tokenizer.chat_template", gguf_file.STRING, "{{ messages[0].content }}"),
    ]


VOCABULARIES = (_byte_level_fields(), _sentencepiece_fields())
