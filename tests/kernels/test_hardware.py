"""What is decided by looking at the processor, on any processor: MINLLAMA_CPU states it."""

import os
import subprocess
import sys
import types
from math import inf

import pytest
import torch

from minllama import load_pretrained
from minllama.checkpoints.gguf import write_gguf
from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.weight_format import WeightFormat, resolve_weight_format
from minllama.cli.open import warn_of_slow_dtype
from minllama.engine.choose import engine_for
from minllama.engine.packing import forward, layer_states
from minllama.errors import OptionError
from minllama.kernels import hardware
from minllama.kernels.cpu.library import best_level, library
from minllama.kernels.cpu.ops import most_rows
from minllama.options.loading import LoadOptions
from minllama.quantization.modules import QuantizedLinear
from tests.conftest import OF_THE_PROCESSOR, ROOT
from tests.tiny import our_model, random_ids

needs_library = pytest.mark.skipif(library() is None, reason="needs the compiled code")


def unstated(monkeypatch):
    """The processor is asked, whatever the environment states."""
    monkeypatch.setattr(hardware, "stated", lambda: None)


@pytest.mark.parametrize(
    ("known", "fast"),
    [
        ({"get_capabilities": lambda: {"avx512_bf16": True, "amx_bf16": False}}, True),
        ({"get_capabilities": lambda: {"avx512_bf16": False, "amx_bf16": True}}, True),
        ({"get_capabilities": lambda: {"avx512_bf16": False, "avx2": True}}, False),
        ({"get_capabilities": dict}, False),
        ({"_is_avx512_bf16_supported": lambda: True}, True),
        ({"_is_avx512_bf16_supported": lambda: False, "_is_amx_tile_supported": bool}, False),
        ({}, False),
    ],
)
def test_fast_bfloat16_asks_the_cpu_in_each_versions_way(monkeypatch, known, fast):
    unstated(monkeypatch)
    monkeypatch.setattr(hardware.torch, "cpu", types.SimpleNamespace(**known))
    assert hardware.fast_bfloat16("cpu") is fast


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_fast_bfloat16_asks_the_gpu(monkeypatch, capability, fast):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert hardware.fast_bfloat16("cuda") is fast
    assert hardware.default_dtype("cuda") is (torch.bfloat16 if fast else torch.float16)
    assert not hardware.fast_bfloat16("mps")


@pytest.mark.parametrize(
    ("dtype", "can", "says"),
    [
        ("bfloat16", {"avx2": True}, "this CPU only emulates bfloat16; float32 is faster"),
        ("bfloat16", {"avx512_bf16": True}, None),
        ("float16", {"avx512_bf16": True}, "this CPU only emulates float16"),
        ("float16", {"amx_fp16": True}, None),
        ("float32", {"avx2": True}, None),
        (None, {"avx2": True}, None),
    ],
)
def test_a_slow_half_precision_is_said_to_be_slow(monkeypatch, capsys, dtype, can, says):
    unstated(monkeypatch)
    cpu = types.SimpleNamespace(get_capabilities=lambda: can)
    monkeypatch.setattr(hardware.torch, "cpu", cpu)
    warn_of_slow_dtype(dtype, "cpu")
    printed = capsys.readouterr().err
    if says is None:
        assert not printed
    else:
        assert printed.startswith(f"--dtype {dtype}: {says}")
        warn_of_slow_dtype(dtype, "cpu", option="--autocast on")
        assert capsys.readouterr().err.startswith(f"--autocast on: {says}")


@pytest.mark.parametrize(
    ("text", "level", "features"),
    [
        ("portable", 0, set()),
        ("avx2", 1, set()),
        (" AVX512 , BF16 ", 2, {"avx512_bf16"}),
        ("avx2,bf16,fp16", 1, {"avx512_bf16", "avx512_fp16"}),
        ("avx512,amx", 2, {"avx512_bf16", "amx_bf16"}),
    ],
)
def test_the_variable_states_a_level_and_features(monkeypatch, text, level, features):
    monkeypatch.setenv("MINLLAMA_CPU", text)
    stated = hardware.stated.__wrapped__()
    assert (stated.level, stated.features) == (level, frozenset(features))


def test_nothing_is_stated_by_an_empty_variable(monkeypatch):
    monkeypatch.setenv("MINLLAMA_CPU", " ")
    assert hardware.stated.__wrapped__() is None


@pytest.mark.parametrize("text", ["avx3", "bf16", "avx2 bf16", "avx2,", "avx2,vnni", ","])
def test_other_words_are_refused_with_those_there_are(monkeypatch, text):
    monkeypatch.setenv("MINLLAMA_CPU", text)
    with pytest.raises(OptionError, match=r"one of portable, avx2, avx512, then any of bf16"):
        hardware.stated.__wrapped__()


def test_a_level_that_the_processor_lacks_is_refused(monkeypatch):
    stated = hardware.Capabilities(2, frozenset())
    monkeypatch.setattr(hardware, "stated", lambda: stated)
    assert hardware.level_of(2) == 2
    with pytest.raises(OptionError, match=r"states avx512, which .* support; use at most avx2"):
        hardware.level_of(1)


def test_the_command_line_refuses_a_wrong_statement_in_one_line():
    finished = subprocess.run(
        [sys.executable, "-m", "minllama", "generate", "a", "--max-new-tokens", "1"],
        env={**os.environ, "MINLLAMA_CPU": "sse9"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 2
    assert len(finished.stderr.splitlines()) == 1
    assert "MINLLAMA_CPU must be one of portable, avx2, avx512" in finished.stderr


@pytest.mark.parametrize(
    ("name", "least"), [("AMD EPYC", 32), ("Intel(R) Xeon(R)", 0), ("x86_64", 0)]
)
def test_products_are_winograds_where_additions_have_pipes_of_their_own(monkeypatch, name, least):
    unstated(monkeypatch)
    monkeypatch.setattr(hardware, "processor", lambda: name)
    found = [hardware.sums_from.__wrapped__(level) for level in range(len(hardware.LEVELS))]
    assert found == [0, 0, least]


@pytest.mark.parametrize(("features", "least"), [((), 0), (("bf16",), 32), (("amx",), 0)])
def test_a_stated_zen_takes_winograds_products(as_cpu, features, least):
    as_cpu(*features)
    assert hardware.sums_from(hardware.AVX512) == least


def test_a_stated_processor_is_believed(as_cpu):
    as_cpu("bf16", level="portable")
    assert best_level() == 0
    assert hardware.fast_bfloat16("cpu")
    assert not hardware.has_amx(torch.bfloat16)
    as_cpu("amx", level="portable")
    assert hardware.has_amx(torch.bfloat16)
    assert hardware.fast_bfloat16("cpu")
    as_cpu("fp16", level="portable")
    assert hardware.fast_float16_on_cpu()
    assert not hardware.fast_bfloat16("cpu")


@needs_library
@pytest.mark.parametrize(
    ("level", "features", "of_bfloat16", "of_float32"),
    [
        ("portable", [], 32, 32),
        ("avx2", [], inf, inf),
        ("avx512", [], inf, inf),
        ("avx512", ["bf16"], 192, inf),
        ("avx512", ["amx"], 32, inf),
    ],
)
def test_rows_up_to_which_quantized_products_are_in_integers(
    as_cpu, level, features, of_bfloat16, of_float32
):
    as_cpu(*features, level=level)
    assert most_rows(torch.bfloat16) == of_bfloat16
    assert most_rows(torch.float32) == of_float32


def q8_0_file(path):
    """A GGUF file whose matrices are Q8_0 blocks."""
    model = our_model(dim=64, hidden_dim=96, vocab_size=61, max_seq_len=512)
    write_gguf(path, model.config, model.state_dict(), None, dtype="q8_0")
    return path


@needs_library
@pytest.mark.parametrize("how", ["stored", "int8", "int4"])
@pytest.mark.parametrize("features", [[], ["bf16"], ["amx"]])
def test_beside_quantized_weights_a_cpu_computes_in_float32(tmp_path, as_cpu, features, how):
    """As `load_pretrained` documents it, on every processor alike."""
    as_cpu(*features)
    model = load_pretrained(q8_0_file(tmp_path / "m.gguf"), quantize=how)
    assert model.dtype == torch.float32
    assert model.long_dtype is None
    assert isinstance(model.layers[0].feed_forward.w1, QuantizedLinear)


@needs_library
@pytest.mark.parametrize("features", [[], ["bf16"], ["amx"]])
def test_auto_computes_long_passes_in_bfloat16_where_that_is_fast(tmp_path, as_cpu, features):
    path = q8_0_file(tmp_path / "m.gguf")
    as_cpu(*features)
    chosen = resolve_weight_format(
        open_checkpoint(path), LoadOptions(device="cpu", quantize="auto")
    )
    assert (chosen.dtype, chosen.quantize) == (torch.float32, "stored")
    auto, exact = load_pretrained(path, quantize="auto"), load_pretrained(path, quantize="stored")
    assert auto.dtype == torch.float32
    assert auto.long_dtype is (torch.bfloat16 if features else None)
    few, many = random_ids(1, 20), random_ids(4, 100)
    with torch.inference_mode():
        engines = [engine_for(model) for model in (auto, exact)]
        short = [e.forward(few, e.new_cache(1, 200), logits="all").logits for e in engines]
        assert torch.equal(*short)  # a short pass is the same code
        near, right = forward(auto, many).logits, forward(exact, many).logits
        rounded = forward(load_pretrained(path, dtype="bfloat16"), many).logits
    assert near.dtype == torch.float32
    off, most = (near - right).abs().mean(), (rounded - right).abs().mean()
    assert off < 1.1 * most  # as far as a model that is bfloat16 altogether, which also rounds ends
    assert (off > 0.1 * most) == bool(features)
    states = list(layer_states(auto, many))
    assert {state.dtype for state in states} == {torch.float32}


@needs_library
def test_gradients_are_computed_in_the_models_own_dtype(tmp_path, as_cpu):
    as_cpu("bf16")
    path = q8_0_file(tmp_path / "m.gguf")
    auto, exact = load_pretrained(path, quantize="auto"), load_pretrained(path, quantize="stored")
    ids = random_ids(4, 100)
    assert torch.equal(forward(auto, ids).logits, forward(exact, ids).logits)


@needs_library
def test_a_given_dtype_is_for_all_passes(tmp_path, as_cpu):
    as_cpu("bf16")
    path = q8_0_file(tmp_path / "m.gguf")
    for dtype in (torch.float32, torch.bfloat16):
        model = load_pretrained(path, quantize="auto", dtype=dtype)
        assert (model.dtype, model.long_dtype) == (dtype, None)


def test_texts_are_read_in_bfloat16_where_that_is_fast(tmp_path, as_cpu):
    path = q8_0_file(tmp_path / "m.gguf")
    as_cpu("bf16")
    options = LoadOptions(device="cpu", quantize="auto")
    read = resolve_weight_format(open_checkpoint(path), options, "read")
    assert read == WeightFormat(torch.device("cpu"), torch.bfloat16)


def test_the_files_of_tests_that_depend_on_the_processor_are_there() -> None:
    """One that was renamed would no longer run as if on other processors."""
    assert {path.name for path in (ROOT / "tests").rglob("test_*.py")} >= OF_THE_PROCESSOR
