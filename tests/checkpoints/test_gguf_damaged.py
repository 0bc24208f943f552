"""GGUF files that are cut off, damaged or hostile: one line, never memory, time or a traceback."""

import random
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from minllama.checkpoints.gguf import read_gguf
from minllama.checkpoints.gguf_header import read_header
from minllama.errors import CheckpointError, MinllamaError
from tests.gguf_file import (
    ARRAY,
    BOOL,
    F32,
    FIELDS,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Field,
    random_tensors,
    stored_f32,
    string,
    with_field,
    with_rope_freqs,
    write_file,
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file from fields and tensors; what is not given is a tiny Llama."""
    return partial(write_file, tmp_path / "no-telling-name")


def assert_one_line(error: BaseException, path: Path) -> None:
    assert "\n" not in str(error)
    assert str(path) in str(error)


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
        (("llama.block_count", U32, 10**9), "1000000000 layers, but there are tensors of 2"),
        (("llama.block_count", STRING, "2"), "must be an integer, not '2'"),
        (("llama.block_count", BOOL, True), "must be an integer, not True"),
        (("llama.attention.head_count", U32, 0), "must be above 0"),
        (("llama.attention.head_count", ARRAY, (I32, [4, 2])), "differs between layers"),
        (("llama.attention.head_count_kv", U32, 3), r"divisible by n_kv_heads \(3\)"),
        (("llama.attention.value_length", U32, 16), "value_length is 16 but heads are 8 wide"),
        (("llama.rope.dimension_count", U32, 4), "dimension_count is 4 but heads are 8 wide"),
        (("llama.embedding_length", U64, 2**62), "exceeds the limit of 9007199254740992"),
        (("llama.feed_forward_length", U64, 2**63), "exceeds the limit of 9007199254740992"),
        (("llama.context_length", U64, 2**63), "exceed(s)? the limit"),
        (("llama.attention.layer_norm_rms_epsilon", F32, float("nan")), "norm_eps"),
        (("llama.rope.freq_base", F32, float("inf")), "rope_theta"),
        (("llama.rope.scaling.type", STRING, "longrope"), "'longrope'"),
        (("llama.rope.scaling.factor", F32, -1.0), "factor"),
        (("llama.rope.scaling.yarn_beta_fast", F32, 8.0), "yarn_beta_fast"),
        (("split.count", U16, 4), "one of 4 parts of a model; rename them to"),
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
    with pytest.raises(CheckpointError, match="has 3 divisors for 4 frequencies"):
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
        (b"GGUF", "truncated in its header"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4"),
        (HEAD + struct.pack("<QQ", 2**63, 0) + bytes(64), "announces 9223372036854775808 tensors"),
        (HEAD + struct.pack("<QQ", 0, 2**40) + bytes(64), "announces 1099511627776 key/value"),
        (HEAD + struct.pack("<QQQ", 0, 1, 2**62) + bytes(64), "truncated in its header"),
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
        (
            HEAD + struct.pack("<QQ", 0, 2) + (string("k") + struct.pack("<IB", U8, 1)) * 2,
            "duplicate key",
        ),
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
        ([2**60, 2**60], 0, 0, "is truncated: the tensor 'x' ends at byte"),
        ([32], 0, 2**62, "is truncated"),
        ([32], 0, 4, "off its alignment of 32"),
        ([32], 999, 0, "type 999"),
        ([33], 2, 0, "rows of 33, which Q4_0 does not allow"),
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
    with pytest.raises(CheckpointError, match=r"duplicate tensor 'token_embd\.weight'"):
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
