"""GGUF files against bytes written by hand, the gguf package and llama.cpp."""

import ctypes
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from minllama.checkpoints import Checkpoint, open_checkpoint
from minllama.checkpoints.gguf import is_gguf, open_gguf, read_gguf, write_gguf
from minllama.checkpoints.gguf_blocks import decode_blocks, ggml_type, quantize_q8_0
from minllama.checkpoints.gguf_header import read_header
from minllama.config import LlamaConfig, RopeScaling
from minllama.errors import CheckpointError, MinllamaError
from minllama.llama import Llama

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


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file from fields and tensors; what is not given is the tiny Llama above."""

    def written(
        fields: list[Field] | None = None, tensors: list[Stored] | None = None, **options: int
    ) -> Path:
        path = tmp_path / "no-telling-name"
        content = gguf_bytes(
            FIELDS if fields is None else fields,
            stored_f32(random_tensors()) if tensors is None else tensors,
            **options,
        )
        path.write_bytes(content)
        return path

    return written


def with_field(key: str, kind: int, content: Any) -> list[Field]:
    return [field for field in FIELDS if field[0] != key] + [(key, kind, content)]


def loaded(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: tensor.load() for name, tensor in checkpoint.tensors.items()}


def assert_one_line(error: BaseException, path: Path) -> None:
    assert "\n" not in str(error)
    assert str(path) in str(error)


# --- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
def test_a_file_written_by_hand_is_read_in_full(write: Callable[..., Path], version: int) -> None:
    tensors = random_tensors()
    checkpoint = read_gguf(write(version=version))
    assert checkpoint.format == "GGUF"
    assert checkpoint.config == CONFIG
    assert checkpoint.vocabulary is None
    assert checkpoint.ignored == ()
    found = loaded(checkpoint)
    assert found.keys() == {our_name(name) for name in tensors}
    for name, tensor in tensors.items():
        assert torch.equal(found[our_name(name)], tensor), name
    lazy = checkpoint.tensors["layers.1.feed_forward.w2.weight"]
    assert (lazy.shape, lazy.stored_as, lazy.stored_bytes) == ((32, 64), "float32", 32 * 64 * 4)


def test_the_model_of_a_file_computes_what_the_model_of_its_tensors_does(
    write: Callable[..., Path],
) -> None:
    model = Llama(CONFIG).eval()
    model.load_state_dict({our_name(name): t for name, t in random_tensors().items()})
    ids = torch.arange(30).view(1, 30)
    read = Llama.from_checkpoint(read_gguf(write()), device="cpu")
    assert torch.equal(read(ids).logits, model(ids).logits)


def test_half_precision_tensors_are_views_of_the_file_in_their_own_dtype(
    write: Callable[..., Path],
) -> None:
    tensors = random_tensors()
    stored: list[Stored] = []
    for i, (name, tensor) in enumerate(tensors.items()):
        dtype, type_id = [(torch.float16, 1), (torch.bfloat16, 30)][i % 2]
        tensors[name] = tensor.to(dtype)
        content = tensors[name].view(torch.uint8).numpy().tobytes()
        stored.append((name, tuple(tensor.shape), type_id, content))
    found = loaded(read_gguf(write(tensors=stored)))
    for name, tensor in tensors.items():
        assert found[our_name(name)].dtype == tensor.dtype
        assert torch.equal(found[our_name(name)], tensor), name
    storages = {tensor.untyped_storage().data_ptr() for tensor in found.values()}
    assert len(storages) == 1


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(write: Callable[..., Path]) -> None:
    path = write()
    before = path.read_bytes()
    read_gguf(path).tensors["norm.weight"].load().zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "stored_type",
    [stored for stored in Type if stored not in (Type.F32, Type.F16, Type.BF16, Type.F64)],
    ids=lambda stored: stored.name,
)
def test_every_type_that_gguf_dequantises_is_read_bit_for_bit(
    write: Callable[..., Path], stored_type: Type
) -> None:
    block_len, block_bytes = gguf.GGML_QUANT_SIZES[stored_type]
    n_columns = max(block_len, 32)
    raw = np.random.default_rng(0).integers(0, 256, (40, n_columns // block_len * block_bytes))
    raw = raw.astype(np.uint8)
    fields = with_field("llama.embedding_length", U32, n_columns)
    content = ("token_embd.weight", (40, n_columns), int(stored_type), raw.tobytes())
    others = [stored for stored in stored_f32(random_tensors()) if stored[0] != content[0]]
    path = write(fields, [*others, content])
    try:
        with np.errstate(all="ignore"):  # random bytes make infinite scales
            expected = gguf.quants.dequantize(raw, stored_type)
    except NotImplementedError:
        with pytest.raises(
            CheckpointError, match=f"token_embd.weight is stored as {stored_type.name}"
        ):
            read_gguf(path)
        return
    with np.errstate(all="ignore"):
        file = open_gguf(path)
        found = file.load(file.header.tensors["token_embd.weight"])
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize(
    "stored_type", [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.TQ1_0, Type.TQ2_0]
)
def test_quantised_numbers_are_read_bit_for_bit(
    write: Callable[..., Path], stored_type: Type
) -> None:
    values = random_tensors()["blk.0.ffn_gate.weight"].repeat(1, 8)  # rows of 256
    raw = gguf.quants.quantize(values.numpy(), stored_type)
    path = write(tensors=[("matrix", (64, 256), int(stored_type), raw.tobytes())])
    file = open_gguf(path)
    found = file.load(file.header.tensors["matrix"])
    assert found.dtype == torch.float32
    expected = torch.from_numpy(gguf.quants.dequantize(raw, stored_type))
    assert torch.equal(found, expected)
    # ... and it is the numbers that were quantised, to the type's precision.
    if stored_type not in (Type.TQ1_0, Type.TQ2_0):
        torch.testing.assert_close(found, values, atol=0.5, rtol=0)


def test_blocks_are_taken_apart_into_quants_scales_and_mins() -> None:
    nibbles = bytes(low | (15 - low) << 4 for low in range(16))
    quants = torch.tensor([*range(16), *range(15, -1, -1)])
    halves = struct.pack("<e", 0.5), struct.pack("<e", -3.0)

    def decoded(raw: bytes, type_id: int) -> Any:
        stored = ggml_type(type_id)
        assert stored is not None
        return decode_blocks(
            torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(1, -1), stored
        )

    q4_0 = decoded(halves[0] + nibbles, 2)
    assert torch.equal(q4_0.quants, (quants - 8).to(torch.int8).view(1, 32))
    assert q4_0.scales.tolist() == [[0.5]]
    assert q4_0.mins is None
    q4_1 = decoded(halves[0] + halves[1] + nibbles, 3)
    assert torch.equal(q4_1.quants, quants.to(torch.uint8).view(1, 32))
    assert (q4_1.scales.tolist(), q4_1.mins.tolist()) == ([[0.5]], [[-3.0]])
    q8_0 = decoded(halves[1] + struct.pack("<32b", *range(-16, 16)), 8)
    assert torch.equal(q8_0.quants, torch.arange(-16, 16, dtype=torch.int8).view(1, 32))
    assert (q8_0.scales.tolist(), q8_0.mins) == ([[-3.0]], None)


def test_every_value_type_is_read(write: Callable[..., Path]) -> None:
    fields: list[Field] = [
        ("u8", U8, 250),
        ("i8", I8, -5),
        ("u16", U16, 65000),
        ("i16", I16, -300),
        ("u32", U32, 4_000_000_000),
        ("i32", I32, -70000),
        ("f32", F32, 0.5),
        ("bool", BOOL, True),
        ("string", STRING, "naïve 🦙"),
        ("u64", U64, 2**63),
        ("i64", I64, -(2**62)),
        ("f64", F64, 0.1),
        ("empty", ARRAY, (U32, [])),
        ("ints", ARRAY, (I32, [3, -4])),
        ("bools", ARRAY, (BOOL, [True, False])),
        ("strings", ARRAY, (STRING, ["", "a", "b c"])),
        ("nested", ARRAY, (ARRAY, [(U8, [1, 2]), (STRING, ["x"])])),
    ]
    found = read_header(write(fields, [])).fields
    assert found == {
        **{key: content for key, kind, content in fields if kind != ARRAY},
        "empty": [],
        "ints": [3, -4],
        "bools": [True, False],
        "strings": ["", "a", "b c"],
        "nested": [[1, 2], ["x"]],
    }
    assert found["bool"] is True


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_the_alignment_of_the_file_is_respected(write: Callable[..., Path], alignment: int) -> None:
    fields = [*FIELDS, ("general.alignment", U32, alignment)]
    checkpoint = read_gguf(write(fields, alignment=alignment))
    for name, tensor in random_tensors().items():
        assert torch.equal(checkpoint.tensors[our_name(name)].load(), tensor), name


def test_a_format_is_sniffed_from_content(write: Callable[..., Path], tmp_path: Path) -> None:
    assert is_gguf(write())
    (tmp_path / "model.gguf").write_bytes(b"GGML and no more")
    assert not is_gguf(tmp_path / "model.gguf")
    assert not is_gguf(tmp_path)


# --- config ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        (("llama.attention.causal", BOOL, False), {"causal": False}),
        (("llama.attention.layer_norm_rms_epsilon", F32, 1e-5), {"norm_eps": 1e-5}),
        (("llama.rope.freq_base", F32, 500000.0), {"rope_theta": 500000.0}),
        (("llama.vocab_size", U32, 40), {}),
        (("llama.rope.dimension_count", U32, 8), {}),
        (("llama.attention.head_count_kv", ARRAY, (I32, [2, 2])), {}),
        (("llama.expert_count", U32, 0), {}),
        (
            ("llama.rope.scaling.factor", F32, 4.0),
            {"rope_scaling": RopeScaling("linear", factor=4.0)},
        ),
        (
            ("llama.rope.scale_linear", F32, 2.5),
            {"rope_scaling": RopeScaling("linear", factor=2.5)},
        ),
    ],
)
def test_a_key_reaches_the_config(
    write: Callable[..., Path], field: Field, changes: dict[str, Any]
) -> None:
    assert read_gguf(write(with_field(*field))).config == CONFIG.replace(**changes)


def test_heads_may_be_wider_or_narrower_than_dim_over_heads(write: Callable[..., Path]) -> None:
    fields = [
        *FIELDS,
        ("llama.attention.key_length", U32, 4),
        ("llama.attention.value_length", U32, 4),
    ]
    assert read_gguf(write(fields)).config.head_dim == 4


@pytest.mark.parametrize("kind", ["none", "linear", "yarn"])
def test_rope_scaling_keys_are_read_as_llama_cpp_reads_them(
    write: Callable[..., Path], kind: str
) -> None:
    fields = [
        *FIELDS,
        ("llama.rope.scaling.type", STRING, kind),
        ("llama.rope.scaling.factor", F32, 4.0),
        ("llama.rope.scaling.original_context_length", U32, 32),
    ]
    expected = {
        "none": None,
        "linear": RopeScaling("linear", factor=4.0),
        "yarn": RopeScaling("yarn", factor=4.0, original_max_seq_len=32),
    }
    assert read_gguf(write(fields)).config.rope_scaling == expected[kind]
    if kind == "yarn":
        sharper = [*fields, ("llama.rope.scaling.attn_factor", F32, 2.0)]
        scaling = read_gguf(write(sharper)).config.rope_scaling
        assert scaling is not None
        assert scaling.attention_factor == pytest.approx(2 * (0.1 * np.log(4) + 1), rel=1e-6)


def with_rope_freqs(divisors: list[float]) -> list[Stored]:
    content = struct.pack(f"<{len(divisors)}f", *divisors)
    return [*stored_f32(random_tensors()), ("rope_freqs.weight", (len(divisors),), 0, content)]


def test_llama_3_1_s_divisors_are_recognised(write: Callable[..., Path]) -> None:
    # theta 5000, heads of 8: wavelengths 6.28, 52.8, 444 and 3736, against 8192 / 4 and 8192 / 1.
    # Only the last lies between; (8192 / 3736.2 - 1) / 3 of the way.
    kept = (8192 / (2 * np.pi * 5000**0.75) - 1) / 3
    partly = 1 / ((1 - kept) / 8 + kept)
    scaling = read_gguf(write(tensors=with_rope_freqs([1, 1, 1, partly]))).config.rope_scaling
    assert scaling is not None
    assert scaling.kind == "factors"  # the full factor is not to be seen in these
    fields = with_field("llama.rope.freq_base", F32, 500000.0)
    # theta 5e5: wavelengths 6.28, 167, 4443, 118142.
    kept = (8192 / (2 * np.pi * 500000**0.5) - 1) / 3
    divisors = [1, 1, 1 / ((1 - kept) / 8 + kept), 8]
    scaling = read_gguf(write(fields, with_rope_freqs(divisors))).config.rope_scaling
    assert scaling == RopeScaling("llama3", factor=8.0, original_max_seq_len=8192)


def test_other_divisors_are_kept_one_by_one(write: Callable[..., Path]) -> None:
    path = write(tensors=with_rope_freqs([1.0, 1.25, 3.0, 7.0]))
    assert read_gguf(path).config.rope_scaling == RopeScaling(
        "factors", factors=(1.0, 1.25, 3.0, 7.0)
    )
    linear = [*FIELDS, ("llama.rope.scaling.factor", F32, 2.0)]
    assert read_gguf(write(linear, with_rope_freqs([1, 1.25, 3, 7]))).config.rope_scaling == (
        RopeScaling("factors", factors=(2.0, 2.5, 6.0, 14.0))
    )
    assert read_gguf(write(tensors=with_rope_freqs([1, 1, 1, 1]))).config.rope_scaling is None


def test_a_file_without_an_output_matrix_is_tied(write: Callable[..., Path]) -> None:
    tensors = [stored for stored in stored_f32(random_tensors()) if stored[0] != "output.weight"]
    checkpoint = read_gguf(write(tensors=tensors))
    assert checkpoint.config == CONFIG.replace(tie_embeddings=True)
    assert "output.weight" not in checkpoint.tensors


def test_biases_are_read_and_those_that_are_absent_beside_others_are_zero(
    write: Callable[..., Path],
) -> None:
    bias = torch.arange(16.0)
    extra = ("blk.1.attn_k.bias", (16,), 0, bias.numpy().tobytes())
    checkpoint = read_gguf(write(tensors=[*stored_f32(random_tensors()), extra]))
    assert checkpoint.config == CONFIG.replace(attention_bias=True)
    found = loaded(checkpoint)
    assert torch.equal(found["layers.1.attention.compute_key.bias"], bias)
    assert torch.equal(found["layers.0.attention.compute_query.bias"], torch.zeros(32))
    assert torch.equal(found["layers.1.attention.compute_output.bias"], torch.zeros(32))
    Llama.from_checkpoint(checkpoint, device="cpu")
    extra = ("blk.0.ffn_up.bias", (64,), 0, torch.ones(64).numpy().tobytes())
    checkpoint = read_gguf(write(tensors=[*stored_f32(random_tensors()), extra]))
    assert checkpoint.config == CONFIG.replace(ffn_bias=True)
    assert torch.equal(checkpoint.tensors["layers.0.feed_forward.w3.bias"].load(), torch.ones(64))
    assert torch.equal(checkpoint.tensors["layers.0.feed_forward.w2.bias"].load(), torch.zeros(32))


def test_unknown_tensors_are_for_the_loader_to_refuse(write: Callable[..., Path]) -> None:
    extra = ("blk.0.attn_q_norm.weight", (8,), 0, bytes(32))
    checkpoint = read_gguf(write(tensors=[*stored_f32(random_tensors()), extra]))
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q_norm\.weight is unexpected"):
        Llama.from_checkpoint(checkpoint)


def test_keys_and_tables_that_are_not_read_are_listed(write: Callable[..., Path]) -> None:
    table = ("blk.0.attn_rot_embd.weight", (4,), 0, bytes(16))
    fields = [*FIELDS, ("llama.something.new", U32, 1), ("general.name", STRING, "x")]
    checkpoint = read_gguf(write(fields, [*stored_f32(random_tensors()), table]))
    assert checkpoint.ignored == ("blk.0.attn_rot_embd.weight", "llama.something.new")


# --- bad input -------------------------------------------------------------------------------

OPTIONAL_KEYS = ("llama.attention.head_count_kv", "llama.rope.freq_base")


@pytest.mark.parametrize("key", [field[0] for field in FIELDS if field[0] not in OPTIONAL_KEYS])
def test_a_missing_key_is_named(write: Callable[..., Path], key: str) -> None:
    path = write([field for field in FIELDS if field[0] != key])
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")) as caught:
        read_gguf(path)
    assert_one_line(caught.value, path)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (("general.architecture", STRING, "gemma3"), "'gemma3'"),
        (("llama.expert_count", U32, 8), "mixture of 8 experts"),
        (("llama.block_count", U32, 10**9), "1000000000 layers, the tensors are of 2"),
        (("llama.block_count", STRING, "2"), "must be a whole number, not '2'"),
        (("llama.block_count", BOOL, True), "must be a whole number, not True"),
        (("llama.attention.head_count", U32, 0), "must be above 0"),
        (("llama.attention.head_count", ARRAY, (I32, [4, 2])), "differs from layer to layer"),
        (("llama.attention.head_count_kv", U32, 3), r"divisible by n_kv_heads \(3\)"),
        (("llama.attention.value_length", U32, 16), "value_length is 16 where heads are 8 wide"),
        (("llama.rope.dimension_count", U32, 4), "dimension_count is 4 where heads are 8 wide"),
        (("llama.embedding_length", U64, 2**62), "no tensor is wider than 64"),
        (("llama.feed_forward_length", U64, 2**63), "no tensor is wider than 64"),
        (("llama.context_length", U64, 2**63), "above the limit"),
        (("llama.attention.layer_norm_rms_epsilon", F32, float("nan")), "norm_eps"),
        (("llama.rope.freq_base", F32, float("inf")), "rope_theta"),
        (("llama.rope.scaling.type", STRING, "longrope"), "'longrope'"),
        (("llama.rope.scaling.factor", F32, -1.0), "factor"),
        (("llama.rope.scaling.yarn_beta_fast", F32, 8.0), "yarn_beta_fast"),
        (("split.count", U16, 4), "one of 4 parts"),
    ],
)
def test_a_key_that_cannot_be_is_refused(
    write: Callable[..., Path], field: Field, message: str
) -> None:
    path = write(with_field(*field))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf(path)
    assert_one_line(caught.value, path)


def test_divisors_of_another_model_are_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="holds 3 divisors for 4 frequencies"):
        read_gguf(write(tensors=with_rope_freqs([1, 2, 3])))
    with pytest.raises(CheckpointError, match="each of factors"):
        read_gguf(write(tensors=with_rope_freqs([1, 2, float("nan"), 3])))
    with pytest.raises(CheckpointError, match="each of factors"):
        read_gguf(write(tensors=with_rope_freqs([1, 2, 3, float("inf")])))


def test_a_file_cut_anywhere_is_one_line(write: Callable[..., Path]) -> None:
    path = write([*FIELDS, ("tokens", ARRAY, (STRING, ["a", "bc", "def"]))])
    content = path.read_bytes()
    end_of_last = max(t.offset + t.n_bytes for t in read_header(path).tensors.values())
    n_header = min(t.offset for t in read_header(path).tensors.values())
    for length in [*range(n_header), *range(n_header, end_of_last, 997), end_of_last - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError) as caught:
            read_gguf(path)
        assert_one_line(caught.value, path)


def test_a_damaged_header_is_one_line_or_another_model(write: Callable[..., Path]) -> None:
    path = write([*FIELDS, ("tokens", ARRAY, (STRING, ["a", "bc", "def"]))])
    content = path.read_bytes()
    n_header = min(t.offset for t in read_header(path).tensors.values())
    rng = random.Random(0)
    refused = 0
    for _ in range(1500):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 1, 8])):
            damaged[rng.randrange(n_header)] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
        path.write_bytes(damaged)
        try:
            read_gguf(path)
        except MinllamaError as error:
            assert_one_line(error, path)
            refused += 1
    assert refused > 500


HEAD = b"GGUF" + struct.pack("<I", 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGML" + bytes(100), "is not a GGUF file"),
        (b"GGUF", "cut off inside its header"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4"),
        (HEAD + struct.pack("<QQ", 2**63, 0) + bytes(64), "announces 9223372036854775808 tensors"),
        (HEAD + struct.pack("<QQ", 0, 2**40) + bytes(64), "announces 1099511627776 key/value"),
        (HEAD + struct.pack("<QQQ", 0, 1, 2**62) + bytes(64), "cut off inside its header"),
        (
            HEAD + struct.pack("<QQ", 0, 1) + string("k") + struct.pack("<IIQ", ARRAY, U8, 2**50),
            "array items",
        ),
        (
            HEAD + struct.pack("<QQ", 0, 1) + string("k") + struct.pack("<IIQ", ARRAY, 8, 2**61),
            "array items",
        ),
        (HEAD + struct.pack("<QQ", 0, 1) + string("k") + struct.pack("<II", 77, 0), "type 77"),
        (
            HEAD
            + struct.pack("<QQ", 0, 1)
            + string("k")
            + struct.pack("<I", ARRAY)
            + struct.pack("<IQ", ARRAY, 1) * 9
            + bytes(99),
            "type 9",
        ),
        (HEAD + struct.pack("<QQQ", 0, 1, 2) + b"\xff\xfe" + bytes(9), "not UTF-8"),
        (HEAD + struct.pack("<QQ", 0, 2) + (string("k") + struct.pack("<IB", U8, 1)) * 2, "twice"),
    ],
)
def test_a_hostile_header_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf(path)
    assert_one_line(caught.value, path)


@pytest.mark.parametrize(
    ("dims", "type_id", "offset", "message"),
    [
        ([2**60, 2**60], 0, 0, "is cut off: the tensor 'x' ends at byte"),
        ([32], 0, 2**62, "is cut off"),
        ([32], 0, 4, "off its alignment of 32"),
        ([32], 999, 0, "type 999"),
        ([33], 2, 0, "rows of 33; Q4_0 cannot hold them"),
        ([0], 0, 0, "rows of 0"),
        ([], 0, 0, "0 dimensions"),
        ([1] * 5, 0, 0, "5 dimensions"),
    ],
)
def test_a_hostile_tensor_entry_is_one_line(
    tmp_path: Path, dims: list[int], type_id: int, offset: int, message: str
) -> None:
    entry = string("x") + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
    path = tmp_path / "hostile"
    path.write_bytes(
        HEAD + struct.pack("<QQ", 1, 0) + entry + struct.pack("<IQ", type_id, offset) + bytes(512)
    )
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf(path)
    assert_one_line(caught.value, path)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (struct.pack("<IIQ", ARRAY, U8, 2**24 + 1), "an array of 16777217 items"),
        (struct.pack("<IQ", STRING, 2**24 + 1), "a string of 16777217 bytes"),
    ],
    ids=["array", "string"],
)
def test_a_value_far_above_any_real_one_is_one_line_though_the_file_holds_it(
    tmp_path: Path, head: bytes, message: str
) -> None:
    path = tmp_path / "hostile"
    with path.open("wb") as file:
        file.write(HEAD + struct.pack("<QQ", 0, 1) + string("k") + head)
        file.truncate(2**25)  # sparse: it takes no room on the disk
    with pytest.raises(CheckpointError, match=message):
        read_gguf(path)


def test_a_tensor_that_is_there_twice_is_one_line(write: Callable[..., Path]) -> None:
    tensors = stored_f32(random_tensors())
    with pytest.raises(CheckpointError, match=r"the tensor 'token_embd\.weight' twice"):
        read_gguf(write(tensors=[*tensors, tensors[0]]))


@pytest.mark.parametrize("alignment", [(U32, 0), (U32, 3), (STRING, "x"), (I32, -32)])
def test_an_alignment_that_is_no_power_of_two_is_one_line(
    write: Callable[..., Path], alignment: tuple[int, Any]
) -> None:
    with pytest.raises(CheckpointError, match="power of two"):
        read_gguf(write([*FIELDS, ("general.alignment", *alignment)]))


def test_a_file_without_an_embedding_is_one_line(write: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"token_embd\.weight is missing"):
        read_gguf(write(tensors=[]))
    with pytest.raises(CheckpointError, match="cannot read"):
        read_gguf(write().with_name("absent"))


# --- writing ---------------------------------------------------------------------------------


def tiny_model(**changes: Any) -> Llama:
    torch.manual_seed(0)
    model = Llama(CONFIG.replace(**changes)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


SCALINGS = [
    None,
    RopeScaling("linear", factor=4.0),
    RopeScaling("yarn", factor=4.0, original_max_seq_len=32),
    RopeScaling("yarn", factor=4.0, original_max_seq_len=32, attention_factor=1.5),
    RopeScaling("llama3", factor=8.0, original_max_seq_len=32),
    RopeScaling("factors", factors=(1.0, 1.5, 2.5, 7.0)),
]
CONFIGS = [
    *({"rope_scaling": scaling} for scaling in SCALINGS),
    {"tie_embeddings": True},
    {"head_dim": 16, "n_kv_heads": 1},
    {"attention_bias": True, "ffn_bias": True},
    {"causal": False},
]


def config_id(changes: dict[str, Any]) -> str:
    scaling = changes.get("rope_scaling")
    return scaling.kind if scaling else ",".join(changes)


@pytest.mark.parametrize("changes", CONFIGS, ids=config_id)
def test_written_and_read_again_a_model_is_the_same(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = tiny_model(**changes)
    write_gguf(tmp_path / "model", model.config, model.state_dict(), None, "f32")
    checkpoint = read_gguf(tmp_path / "model")
    assert checkpoint.config == model.config
    assert checkpoint.ignored == ()
    found = loaded(checkpoint)
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("dtype", "file_type"), [("f32", 0), ("f16", 1), ("bf16", 32), ("q8_0", 7)]
)
def test_the_gguf_package_reads_what_is_written(tmp_path: Path, dtype: Any, file_type: int) -> None:
    model = tiny_model(attention_bias=True)
    write_gguf(tmp_path / "model", model.config, model.state_dict(), None, dtype)
    reader = gguf.GGUFReader(tmp_path / "model")
    assert reader.fields["general.file_type"].contents() == file_type
    assert reader.fields["general.architecture"].contents() == "llama"
    state = model.state_dict()
    assert {our_name(tensor.name) for tensor in reader.tensors} == state.keys()
    for tensor in reader.tensors:
        values = state[our_name(tensor.name)]
        wanted = Type.F32 if values.dim() == 1 else Type[dtype.upper()]
        assert tensor.tensor_type == wanted, tensor.name
        assert tuple(reversed(tensor.shape.tolist())) == tuple(values.shape)
        expected = gguf.quants.quantize(values.numpy(), wanted)
        assert tensor.data.tobytes() == expected.tobytes(), tensor.name


def test_rows_that_q8_0_cannot_hold_are_float16(tmp_path: Path) -> None:
    model = tiny_model(hidden_dim=48)
    write_gguf(tmp_path / "model", model.config, model.state_dict(), None, "q8_0")
    tensors = read_gguf(tmp_path / "model").tensors
    assert tensors["layers.0.feed_forward.w2.weight"].stored_as == "float16"
    assert tensors["layers.0.feed_forward.w1.weight"].stored_as == "Q8_0"
    expected = model.state_dict()["layers.0.feed_forward.w2.weight"].half()
    assert torch.equal(tensors["layers.0.feed_forward.w2.weight"].load(), expected)


def test_q8_0_is_quantised_bit_for_bit_as_the_gguf_package_does() -> None:
    values = torch.randn(70, 96)
    values[0] = 0
    values[1] = torch.arange(96) / 2  # halves, which round away from zero
    values[2] = -values[1]
    values[3] *= 1e-7
    values[4] = torch.arange(96) % 32 - 15.5  # halves still, once they are over their scale of 1
    values[4, ::32] = 127
    expected = gguf.quants.quantize(values.numpy(), Type.Q8_0)
    np.testing.assert_array_equal(quantize_q8_0(values).numpy(), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": RopeScaling("dynamic", factor=2.0)}, "'dynamic'"),
        ({"max_seq_len": 2**32}, "context_length is 4294967296, which is more"),
        ({"rope_theta": 1e39}, r"rope\.freq_base is 1e\+39, which is more"),
        (
            {"rope_scaling": RopeScaling("yarn", factor=2.0, original_max_seq_len=9, beta_fast=8)},
            "beta_fast",
        ),
        (
            {
                "rope_scaling": RopeScaling(
                    "yarn", factor=2.0, original_max_seq_len=9, truncate=False
                )
            },
            "truncate",
        ),
    ],
)
def test_what_the_format_has_no_words_for_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    state = tiny_model().state_dict()
    with pytest.raises(MinllamaError, match=message):
        write_gguf(tmp_path / "model", CONFIG.replace(**changes), state, None)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"old")
    model = tiny_model()
    state = model.state_dict()
    state["layers.1.feed_forward.w1.weight"] = state["layers.1.feed_forward.w1.weight"] * 1e6
    for dtype in ("f16", "q8_0"):
        if dtype == "q8_0":
            state["layers.1.feed_forward.w1.weight"] *= 1e6
        with pytest.raises(
            MinllamaError, match=r"layers\.1\.feed_forward\.w1\.weight holds numbers"
        ):
            write_gguf(path, model.config, state, None, dtype)  # type: ignore[arg-type]
    state["norm.weight"] = torch.ones(31)
    with pytest.raises(MinllamaError, match=r"norm\.weight has shape \(31,\)"):
        write_gguf(path, model.config, state, None, "bf16")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# --- against llama.cpp and on the default model ----------------------------------------------


@pytest.fixture(scope="session")
def llama_cpp() -> Iterator[Any]:
    """llama-cpp-python, whose import leaves two files open."""
    module = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    yield module
    module._utils.outnull_file.close()
    module._utils.errnull_file.close()


def llama_cpp_model(llama_cpp: Any, path: Path, **options: Any) -> Any:
    # Its caches default to float16, which is all that its logits would then be good for.
    f32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(
        str(path), verbose=False, n_threads=2, type_k=f32, type_v=f32, flash_attn=False, **options
    )


@pytest.mark.parametrize("changes", CONFIGS, ids=config_id)
def test_llama_cpp_computes_the_same_logits(
    tmp_path: Path, llama_cpp: Any, changes: dict[str, Any]
) -> None:
    model = tiny_model(**changes)
    write_gguf(tmp_path / "model", model.config, model.state_dict(), None, "f32")
    ids = torch.randint(0, 40, (1, 100), generator=torch.Generator().manual_seed(1))
    theirs = llama_cpp_model(llama_cpp, tmp_path / "model", n_ctx=128, n_batch=128, logits_all=True)
    theirs.eval(ids[0].tolist())
    logits = torch.from_numpy(np.array(theirs.scores[:100]))
    torch.testing.assert_close(model(ids).logits[0], logits, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_the_default_model_is_read_bit_for_bit(default_model: Path) -> None:
    checkpoint = read_gguf(default_model)
    header = read_header(default_model)
    reader = gguf.GGUFReader(default_model)
    assert len(reader.tensors) == len(checkpoint.tensors) == 272
    for tensor in reader.tensors:
        found = checkpoint.tensors[our_name(tensor.name)].load()
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert torch.equal(found, torch.from_numpy(np.array(expected))), tensor.name
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert header.fields[key] == field.contents(), key


PROMPTS = ("Once upon a time", "The capital of France is", "def fibonacci(n):", "1, 2, 3, 4,")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_llama_cpp_continues_texts_as_we_do(
    tmp_path: Path, llama_cpp: Any, default_model: Path, dtype: Any
) -> None:
    original = read_gguf(default_model)
    path = tmp_path / "model"
    write_gguf(path, original.config, loaded(original), original.vocabulary, dtype)
    checkpoint = read_gguf(path)
    assert checkpoint.config == original.config
    assert checkpoint.vocabulary == original.vocabulary
    ours = Llama.from_checkpoint(checkpoint, device="cpu")
    theirs = llama_cpp_model(llama_cpp, path, n_ctx=128)
    before = llama_cpp_model(llama_cpp, default_model, n_ctx=128, vocab_only=True)
    for prompt in PROMPTS:
        ids = theirs.tokenize(prompt.encode(), add_bos=False)
        assert ids == before.tokenize(prompt.encode(), add_bos=False)
        theirs.reset()
        stream = theirs.generate(ids, temp=0.0, repeat_penalty=1.0)
        continued = [next(stream) for _ in range(32)]
        text = torch.tensor([[*ids, *continued]])
        logits = ours(text).logits[0, len(ids) - 1 : -1]
        chosen = logits.gather(-1, text[0, len(ids) :, None])
        # With Q8_0 weights llama.cpp rounds activations to 8 bits too, so near-ties may fall
        # the other way.
        tolerance = 0.5 if dtype == "q8_0" else 0.0
        assert (logits.amax(-1, keepdim=True) - chosen).max() <= tolerance, prompt


@pytest.mark.slow
def test_q8_0_files_are_the_ones_that_llama_cpp_makes(
    llama_cpp: Any, default_model: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(default_model)
    model = Llama.from_checkpoint(checkpoint, device="cpu")
    for dtype in ("f32", "q8_0"):
        write_gguf(tmp_path / dtype, model.config, model.state_dict(), checkpoint.vocabulary, dtype)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    source, target = (os.fsencode(tmp_path / name) for name in ("f32", "theirs"))
    assert llama_cpp.llama_model_quantize(source, target, ctypes.byref(settings)) == 0
    ours, theirs = (open_gguf(tmp_path / name) for name in ("q8_0", "theirs"))
    assert ours.header.tensors.keys() == theirs.header.tensors.keys()
    for name, tensor in ours.header.tensors.items():
        other = theirs.header.tensors[name]
        assert tensor.type == other.type, name
        assert np.array_equal(ours.raw(tensor), theirs.raw(other)), name
