"""Reading GGUF files: against bytes written by hand and the gguf package."""

import gc
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from minllama.checkpoints.gguf import is_gguf, open_gguf, read_gguf
from minllama.checkpoints.gguf_header import read_header
from minllama.checkpoints.open import open_checkpoint
from minllama.errors import CheckpointError, TokenizerError
from minllama.model.config import RopeScaling
from minllama.model.llama import Llama
from minllama.quantization.gguf_blocks import decode_blocks, ggml_type
from minllama.tokenizer.tokenizer import Tokenizer
from tests.gguf_file import (
    ARRAY,
    BOOL,
    CONFIG,
    F32,
    F64,
    FIELDS,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Field,
    Stored,
    loaded,
    our_name,
    random_tensors,
    stored_f32,
    with_field,
    with_rope_freqs,
    write_file,
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file from fields and tensors; what is not given is a tiny Llama."""
    return partial(write_file, tmp_path / "no-telling-name")


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


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
@pytest.mark.parametrize("quantize", [None, "stored"])
def test_a_file_of_which_all_is_converted_is_let_go_of(
    write: Callable[..., Path], quantize: str | None
) -> None:
    kept, stored = random_tensors(), []
    for name, tensor in kept.items():
        kind = Type.F32 if tensor.dim() == 1 else Type.Q8_0
        content = gguf.quantize(tensor.numpy(), kind).tobytes()
        stored.append((name, tuple(tensor.shape), int(kind), content))
    path = write(tensors=stored)
    checkpoint = read_gguf(path)
    model = Llama.from_checkpoint(checkpoint, device="cpu", quantize=quantize)
    assert str(path) in Path("/proc/self/maps").read_text()
    del checkpoint
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert torch.equal(model.norm.weight, kept["output_norm.weight"])


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
def test_every_type_that_gguf_dequantizes_is_read_bit_for_bit(
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
def test_quantized_numbers_are_read_bit_for_bit(
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
    # ... and it is the numbers that were quantized, to the type's precision.
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


def test_a_model_opens_without_its_vocabulary_and_another_one_can_stand_in(
    write: Callable[..., Path], default_model: Path, tmp_path: Path
) -> None:
    path = write([*FIELDS, ("tokenizer.ggml.model", STRING, "unheard-of")])
    checkpoint = open_checkpoint(path)
    assert Llama.from_checkpoint(checkpoint).config == checkpoint.config
    with pytest.raises(TokenizerError, match="unknown tokenizer 'unheard-of'"):
        _ = checkpoint.vocabulary
    with pytest.raises(TokenizerError, match=r"'unheard-of'.*; or name another one with --token"):
        Tokenizer.from_checkpoint(checkpoint)
    words = Tokenizer.from_pretrained(default_model)
    words.save_pretrained(tmp_path / "words")
    checkpoint = open_checkpoint(path, tokenizer=tmp_path / "words")
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    assert tokenizer.encode("A good film.") == words.encode("A good film.")
    with pytest.raises(TokenizerError, match="nowhere"):
        open_checkpoint(path, tokenizer=tmp_path / "nowhere")


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


def test_llama_3_1_s_divisors_are_recognized(write: Callable[..., Path]) -> None:
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
