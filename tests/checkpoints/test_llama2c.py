"""llama2.c's and the course's checkpoints, from bytes and dicts that the tests put together."""

import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minllama.checkpoints.llama2c import (
    is_llama2c_bin,
    is_torch_checkpoint,
    read_llama2c_bin,
    read_torch_checkpoint,
    write_llama2c_bin,
)
from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.types import Checkpoint
from minllama.errors import CheckpointError, MinllamaError
from minllama.model.config import LlamaConfig, RopeScaling
from minllama.model.llama import Llama
from minllama.tokenizer.tokenizer import Tokenizer

CONFIG = LlamaConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=40, max_seq_len=16
)
TIED = CONFIG.replace(tie_embeddings=True)
LLAMA2C = {
    "compute_query": "wq",
    "compute_key": "wk",
    "compute_value": "wv",
    "compute_output": "wo",
}
# Names as run.c's memory_map_weights has them, and our part of the name.
ATTENTION = [f"attention.compute_{part}" for part in ("query", "key", "value", "output")]
FEED_FORWARD = [f"feed_forward.w{i}" for i in (1, 2, 3)]


def state_of(config: LlamaConfig, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state = Llama(config).state_dict()
    return {name: torch.randn_like(tensor) for name, tensor in state.items()}


def their_name(ours: str) -> str:
    return ".".join(LLAMA2C.get(part, part) for part in ours.split("."))


def assert_read(checkpoint: Checkpoint, state: dict[str, Tensor]) -> None:
    assert checkpoint.tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert torch.equal(checkpoint.tensors[name].load(), tensor), name


def assert_one_line(error: BaseException, path: Path) -> None:
    assert "\n" not in str(error)
    assert str(path) in str(error)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "no-telling-name"


# --- .pt ---------------------------------------------------------------------------------------

ARGS: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 40,
    "multiple_of": 16,
    "max_seq_len": 16,
    "dropout": 0.0,
}


def save_pt(
    path: Path, state: dict[str, Tensor], args: dict[str, Any] | None = None, prefix: str = ""
) -> Path:
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}},
        "model_args": ARGS if args is None else args,
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out"},
    }
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_llama2c_s_training_checkpoint_is_read(path: Path, prefix: str) -> None:
    state = state_of(CONFIG)
    theirs = {their_name(name): tensor for name, tensor in state.items()}
    theirs |= {"freqs_cos": torch.ones(16, 4), "freqs_sin": torch.ones(16, 4)}
    checkpoint = open_checkpoint(save_pt(path, theirs, prefix=prefix))
    assert_read(checkpoint, state)
    assert checkpoint.config == CONFIG
    assert checkpoint.format == "llama2.c .pt"
    assert checkpoint.ignored == ("freqs_cos", "freqs_sin")


@pytest.mark.parametrize("shared", [True, False], ids=["one storage", "equal numbers"])
def test_an_output_that_is_the_embedding_is_tied(path: Path, shared: bool) -> None:
    state = state_of(TIED)
    theirs = {their_name(name): tensor for name, tensor in state.items()}
    embedding = theirs["tok_embeddings.weight"]
    theirs["output.weight"] = embedding if shared else embedding.clone()
    checkpoint = read_torch_checkpoint(save_pt(path, theirs))
    assert checkpoint.config == TIED
    assert_read(checkpoint, state)


def test_the_course_s_checkpoint_is_read(path: Path) -> None:
    state = state_of(CONFIG)
    args = ARGS | {
        "layer_norm_eps": 1e-6,
        "dropout": 0.1,
        "position_embedding_type": "rotary",
        "use_cache": True,
        "hidden_dim": None,
    }
    checkpoint = open_checkpoint(save_pt(path, state, args))
    assert_read(checkpoint, state)
    assert checkpoint.config == CONFIG.replace(norm_eps=1e-6, dropout=0.1)
    assert checkpoint.ignored == ("model_args.position_embedding_type", "model_args.use_cache")


def test_what_the_arguments_leave_open_the_tensors_tell(path: Path) -> None:
    args = {key: ARGS[key] for key in ("dim", "n_layers", "n_heads")}
    config = read_torch_checkpoint(save_pt(path, state_of(CONFIG), args)).config
    assert config == CONFIG.replace(max_seq_len=2048)
    stated = args | {"norm_eps": 1e-3, "rope_theta": 5e5, "max_position_embeddings": 9}
    config = read_torch_checkpoint(save_pt(path, state_of(CONFIG), stated)).config
    assert config == CONFIG.replace(norm_eps=1e-3, rope_theta=5e5, max_seq_len=9)


def test_a_pt_computes_what_its_tensors_do(path: Path) -> None:
    state = state_of(CONFIG)
    model = Llama(CONFIG).eval()
    model.load_state_dict(state)
    ids = torch.arange(10).view(1, 10)
    read = Llama.from_pretrained(save_pt(path, state), device="cpu")
    assert torch.equal(read(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": None}, "model_args lacks dim"),
        ({"n_layers": "2"}, "n_layers must be an integer"),
        ({"n_layers": 10**9}, "1000000000 layers, but there are tensors of 2"),
        ({"dropout": "x"}, "dropout must be a number, not 'x'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling, which llama2.c does not compute"),
        ({"n_kv_heads": 3}, r"divisible by n_kv_heads \(3\)"),
        ({"max_seq_len": 2**50}, "exceeds the limit"),
    ],
)
def test_arguments_that_cannot_be_are_one_line(
    path: Path, changes: dict[str, Any], message: str
) -> None:
    save_pt(path, state_of(CONFIG), ARGS | changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch_checkpoint(path)
    assert_one_line(caught.value, path)


def test_a_file_without_model_args_is_one_line(path: Path) -> None:
    torch.save({"weights": torch.ones(2)}, path)
    assert is_torch_checkpoint(path)
    with pytest.raises(CheckpointError, match="has no model_args and model") as caught:
        read_torch_checkpoint(path)
    assert_one_line(caught.value, path)
    save_pt(path, {"tok_embeddings.weight": 3})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match=r"'tok_embeddings\.weight' is of type int"):
        read_torch_checkpoint(path)
    save_pt(path, {})
    with pytest.raises(CheckpointError, match=r"2 layers, but there are tensors of 0"):
        read_torch_checkpoint(path)


def test_unknown_tensors_are_for_the_loader_to_refuse(path: Path) -> None:
    save_pt(path, state_of(CONFIG) | {"classifier.weight": torch.ones(2, 32)})
    with pytest.raises(CheckpointError, match=r"classifier\.weight is unexpected"):
        Llama.from_checkpoint(read_torch_checkpoint(path))


def test_a_cut_pt_is_one_line_and_a_bare_state_dict_is_not_taken_for_one(path: Path) -> None:
    content = save_pt(path, state_of(CONFIG)).read_bytes()
    assert is_torch_checkpoint(path)
    path.write_bytes(content[: len(content) // 2])
    assert is_torch_checkpoint(path)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_checkpoint(path)
    torch.save(state_of(CONFIG), path)
    assert not is_torch_checkpoint(path)
    torch.save(state_of(CONFIG), path, _use_new_zipfile_serialization=False)
    assert not is_torch_checkpoint(path)
    assert not is_torch_checkpoint(path.parent)


def test_a_damaged_pt_is_one_line_or_other_numbers(path: Path) -> None:
    content = save_pt(path, state_of(CONFIG)).read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        # The pickle lies at the beginning, the archive's directory at the end.
        at = rng.choice([rng.randrange(6000), len(content) - 1 - rng.randrange(3000)])
        damaged[at] = rng.randrange(256)
        path.write_bytes(damaged)
        if not is_torch_checkpoint(path):
            continue
        try:
            read_torch_checkpoint(path)
        except CheckpointError as error:
            assert_one_line(error, path)
            refused += 1
    assert refused > 100


# --- .bin --------------------------------------------------------------------------------------


def floats(tensor: Tensor) -> bytes:
    return struct.pack(f"<{tensor.numel()}f", *tensor.flatten().tolist())


def layers(state: dict[str, Tensor], part: str) -> list[Tensor]:
    return [state[f"layers.{i}.{part}.weight"] for i in range(CONFIG.n_layers)]


def legacy_bytes(state: dict[str, Tensor], *, tied: bool) -> bytes:
    """The layout of llama2.c's legacy export, in the order in which run.c maps it."""
    tensors = [state["tok_embeddings.weight"]]
    for part in ["attention_norm", *ATTENTION, "ffn_norm", *FEED_FORWARD]:
        tensors += layers(state, part)
    tensors.append(state["norm.weight"])
    angle = torch.outer(torch.arange(16.0), 10000.0 ** -(torch.arange(0, 8, 2) / 8))
    tensors += [angle.cos(), angle.sin()]
    if not tied:
        tensors.append(state["output.weight"])
    header = struct.pack("<7i", 32, 48, 2, 4, 2, 40 if tied else -40, 16)
    return header + b"".join(floats(tensor) for tensor in tensors)


def versioned_tensors(state: dict[str, Tensor], *, tied: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Norms, then matrices, in the order of versions 1 and 2."""
    norms = [*layers(state, "attention_norm"), *layers(state, "ffn_norm"), state["norm.weight"]]
    matrices = [state["tok_embeddings.weight"]]
    for part in ATTENTION + FEED_FORWARD:
        matrices += layers(state, part)
    if not tied:
        matrices.append(state["output.weight"])
    return norms, matrices


def versioned_header(version: int, *, tied: bool, group_size: int = 0) -> bytes:
    header = b"24ka" + struct.pack("<i7i", version, 32, 48, 2, 4, 2, 40, 16)
    header += bytes([tied]) + struct.pack("<i", group_size)
    return header + bytes(256 - len(header))


def version1_bytes(state: dict[str, Tensor], *, tied: bool) -> bytes:
    norms, matrices = versioned_tensors(state, tied=tied)
    body = b"".join(floats(tensor) for tensor in norms + matrices)
    return versioned_header(1, tied=tied) + body


def version2_bytes(
    quants: dict[str, Tensor], scales: dict[str, Tensor], *, tied: bool, group_size: int
) -> bytes:
    norms, matrices = versioned_tensors(quants, tied=tied)
    _, groups = versioned_tensors(scales, tied=tied)
    body = b"".join(floats(norm) for norm in norms)
    for matrix, scale in zip(matrices, groups, strict=True):
        body += struct.pack(f"<{matrix.numel()}b", *matrix.flatten().int().tolist())
        body += floats(scale)
    return versioned_header(2, tied=tied, group_size=group_size) + body


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_legacy_export_is_read(path: Path, tied: bool) -> None:
    config = TIED if tied else CONFIG
    state = state_of(config)
    path.write_bytes(legacy_bytes(state, tied=tied))
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == config
    assert checkpoint.format == "llama2.c .bin (legacy)"
    assert_read(checkpoint, state)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_version_1_is_read(path: Path, tied: bool) -> None:
    config = TIED if tied else CONFIG
    state = state_of(config)
    path.write_bytes(version1_bytes(state, tied=tied))
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == config
    assert checkpoint.format == "llama2.c .bin (version 1)"
    assert_read(checkpoint, state)


@pytest.mark.parametrize("group_size", [32, 4])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_version_2_is_quants_times_the_scale_of_their_group(
    path: Path, tied: bool, group_size: int
) -> None:
    config = TIED if tied else CONFIG
    rng = np.random.default_rng(0)
    quants, scales, expected = {}, {}, {}
    for name, tensor in state_of(config).items():
        if tensor.dim() == 1:
            quants[name] = scales[name] = expected[name] = tensor
            continue
        quants[name] = torch.from_numpy(rng.integers(-127, 128, tuple(tensor.shape)))
        scales[name] = torch.from_numpy(rng.random(tensor.numel() // group_size).astype(np.float32))
        by_group = quants[name].float().view(-1, group_size) * scales[name].view(-1, 1)
        expected[name] = by_group.view(tensor.shape)
    path.write_bytes(version2_bytes(quants, scales, tied=tied, group_size=group_size))
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == config
    assert_read(checkpoint, expected)
    stored = checkpoint.tensors["layers.0.feed_forward.w1.weight"]
    assert stored.stored_as == f"int8 / {group_size}"
    assert stored.stored_bytes == 48 * 32 + 48 * 32 // group_size * 4


def test_a_bin_is_not_changed_by_writing_to_its_tensors(path: Path) -> None:
    content = legacy_bytes(state_of(TIED), tied=True)
    path.write_bytes(content)
    read_llama2c_bin(path).tensors["norm.weight"].load().zero_()
    assert path.read_bytes() == content


@pytest.mark.parametrize("make", [legacy_bytes, version1_bytes])
def test_a_bin_of_another_length_than_its_header_says_is_one_line(path: Path, make: Any) -> None:
    content = make(state_of(CONFIG), tied=False)
    for changed in [*(content[:n] for n in range(1, len(content), 499)), content + b"\0"]:
        path.write_bytes(changed)
        with pytest.raises(CheckpointError) as caught:
            read_llama2c_bin(path)
        assert_one_line(caught.value, path)
        if len(changed) >= 28:
            assert is_llama2c_bin(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (struct.pack("<7i", 32, 48, 2**31 - 1, 4, 2, 40, 16), "the file has 156 bytes"),
        (struct.pack("<7i", 2**30, 2**30, 2**30, 4, 2, 2**30, 2**30), "the file has 156 bytes"),
        (struct.pack("<7i", -32, 48, 2, 4, 2, 40, 16), "dim must be an integer above 0"),
        (struct.pack("<7i", 32, 48, 2, 0, 2, 40, 16), "n_heads must be an integer above 0"),
        (struct.pack("<7i", 32, 48, 2, 4, 2, 0, 16), "vocab_size must be an integer above 0"),
        (b"24ka" + struct.pack("<i", 3), "version 3"),
        (versioned_header(2, tied=True, group_size=0), "groups of 0"),
        (versioned_header(2, tied=True, group_size=-4), "groups of -4"),
        (versioned_header(2, tied=True, group_size=7), "groups of 7"),
        (versioned_header(2, tied=True, group_size=32), "the file has 384 bytes"),
    ],
)
def test_a_hostile_header_is_one_line(path: Path, header: bytes, message: str) -> None:
    path.write_bytes(header + bytes(128))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_llama2c_bin(path)
    assert_one_line(caught.value, path)


@pytest.mark.parametrize(
    "content",
    [b"", b"short", b"a text of more than twenty-eight bytes, and of no meaning", bytes(64)],
)
def test_what_is_no_bin_is_not_taken_for_one(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert not is_llama2c_bin(path)
    assert not is_llama2c_bin(path.parent)


# --- writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_legacy_export_is_written_byte_for_byte(path: Path, tied: bool) -> None:
    config = TIED if tied else CONFIG
    state = state_of(config)
    write_llama2c_bin(path, config, state)
    written, expected = path.read_bytes(), legacy_bytes(state, tied=tied)
    # The rope tables are computed, and sines may differ in the last bit.
    tables = 2 * 16 * 4 * 4
    start = len(expected) - tables - (0 if tied else 40 * 32 * 4)
    assert written[:start] == expected[:start]
    assert written[start + tables :] == expected[start + tables :]
    np.testing.assert_allclose(
        np.frombuffer(written[start : start + tables], np.float32),
        np.frombuffer(expected[start : start + tables], np.float32),
        atol=1e-6,
    )
    assert_read(open_checkpoint(path), state)


def test_half_precision_is_written_as_float32(path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in state_of(TIED).items()}
    write_llama2c_bin(path, TIED, state)
    assert_read(read_llama2c_bin(path), {name: tensor.float() for name, tensor in state.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 500000.0}, "no field for rope_theta: run.c computes with 10000.0"),
        ({"norm_eps": 1e-6}, "no field for norm_eps"),
        ({"rope_scaling": RopeScaling("linear", factor=2.0)}, "no field for rope_scaling.*linear"),
        ({"attention_bias": True}, "no field for attention_bias"),
        ({"ffn_bias": True}, "no field for ffn_bias"),
        ({"head_dim": 16}, "no field for head_dim: run.c computes with 8"),
        ({"causal": False}, "no field for causal"),
        ({"max_seq_len": 2**31}, "the config has 2147483648"),
    ],
)
def test_a_model_that_run_c_would_compute_otherwise_is_refused(
    path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(MinllamaError, match=message) as caught:
        write_llama2c_bin(path, TIED.replace(**changes), state_of(TIED))
    assert "\n" not in str(caught.value)
    assert not path.exists()


def test_a_width_that_looks_like_a_pickle_is_none(path: Path) -> None:
    """640 is 80 02 00 00, as protocol 2 begins."""
    config = CONFIG.replace(dim=640, n_layers=1, n_heads=10, n_kv_heads=10, head_dim=64)
    state = state_of(config)
    write_llama2c_bin(path, config, state)
    assert path.read_bytes()[:4] == b"\x80\x02\0\0"
    assert_read(open_checkpoint(path), state)


def test_a_text_ends_where_the_next_begins(path: Path, shared_data: Path) -> None:
    config = CONFIG.replace(vocab_size=32000)
    write_llama2c_bin(path, config, state_of(config))
    checkpoint = open_checkpoint(path, tokenizer=shared_data / "tokenizer.model")
    assert Tokenizer.from_checkpoint(checkpoint).stop_ids == {1, 2}


def test_a_failed_write_leaves_the_old_file(path: Path) -> None:
    path.write_bytes(b"old")
    state = state_of(CONFIG) | {"output.weight": torch.ones(39, 32)}
    with pytest.raises(MinllamaError, match=r"output\.weight has shape \(39, 32\)"):
        write_llama2c_bin(path, CONFIG, state)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
