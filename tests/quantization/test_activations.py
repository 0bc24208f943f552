"""Activations of 8 bits beside quantized weights: exact integers, and only where they are named."""

import pytest
import torch
from click.testing import CliRunner

from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.weight_format import resolve_weight_format
from minllama.cli import cli
from minllama.engine import cpu as native_step
from minllama.engine.choose import engine_for
from minllama.errors import OptionError
from minllama.kernels.cpu import library as cpu_library
from minllama.kernels.cpu import ops
from minllama.model.llama import load_pretrained
from minllama.options.loading import LoadOptions
from minllama.quantization.modules import QuantizedWeight, quantize, set_activations
from tests.tiny import our_model, random_ids

pytestmark = pytest.mark.skipif(
    cpu_library.library() is None, reason="minllama was installed without a C++ compiler"
)
KINDS = ("int4", "int4 without mins", "int8", "int8 with mins")


@pytest.fixture(params=range(cpu_library.best_level() + 1))
def at_level(request, monkeypatch):
    """Operations use the instructions of this level."""
    monkeypatch.setattr("minllama.kernels.cpu.library.best_level", lambda: request.param)
    return request.param


@pytest.fixture
def folder(tmp_path):
    our_model(dim=64, hidden_dim=96, vocab_size=61).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def weight_of(kind, rows=40, columns=13 * 32):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(rows, columns, generator=generator)
    parts = quantize(dense, 8 if kind.startswith("int8") else 4)
    if kind == "int4 without mins":
        parts = parts._replace(mins=None)
    elif kind == "int8 with mins":
        parts = parts._replace(mins=-100 * parts.scales)
    weight = QuantizedWeight(*parts)
    set_activations(weight, "int8")
    return weight


def rounded(x):
    """Activations as integers of 8 bits times a scale for each 32, in float64."""
    blocks = x.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    integers = (blocks * torch.full_like(largest, 127).div(largest)).round()
    return (integers.double() * (largest / 127).double()).flatten(-2)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_rounded_activations(kind, at_level):
    weight = weight_of(kind)
    x = torch.randn(133, 13 * 32, generator=torch.Generator().manual_seed(1))
    exact = rounded(x) @ weight.dequantize(torch.float64).T
    y = ops.quantized_matmul(weight, x)
    assert torch.allclose(y.double(), exact, rtol=1e-5, atol=1e-3)
    for n in (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 47):
        few = ops.quantized_matmul(weight, x[:n])
        assert torch.equal(few, y[:n]) if at_level else torch.allclose(few, y[:n], atol=1e-3), n


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(kind, sign, at_level):
    weight = weight_of(kind)
    weight.quants.fill_(255)
    x = torch.full((5, 13 * 32), 3.0 * sign)
    y = ops.quantized_matmul(weight, x)
    assert torch.allclose(y.double(), x.double() @ weight.dequantize(torch.float64).T, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_what_is_no_number_stays_none(kind, value, at_level):
    weight = weight_of(kind)
    x = torch.randn(9, 13 * 32, generator=torch.Generator().manual_seed(1))
    x[4, 70] = value
    y = ops.quantized_matmul(weight, x)
    finite = torch.arange(9) != 4
    assert y[finite].isfinite().all()
    assert not y[4].isfinite().any()


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_an_engine_computes_what_the_modules_do(weights, folder, at_level, monkeypatch):
    model = load_pretrained(folder, quantize=weights, activations="int8", device="cpu")
    assert model.activations == "int8"
    assert model.dtype == torch.float32
    ids = random_ids(2, 12)
    with torch.inference_mode():
        engine = engine_for(model, "cpu")
        cache = engine.new_cache(2, 12)
        cache.keys = [keys.float() for keys in cache.keys]
        cache.values = [values.float() for values in cache.values]
        fast = engine.forward(ids, cache, logits="all").logits
        by_modules = model(ids).logits
        exact = load_pretrained(folder, quantize=weights, dtype="float32", device="cpu")(ids).logits
    # Near ties of rounding fall to either side where a sum is in another order.
    assert (fast - by_modules).abs().mean() < 0.2 * (exact - by_modules).abs().mean()
    assert 1e-4 < (exact - by_modules).abs().mean() < 0.03 * exact.abs().mean()


def test_a_model_of_two_kinds_is_left_to_the_modules(folder):
    model = load_pretrained(folder, quantize="int8", dtype="float32", device="cpu")
    assert native_step.can_run(model)
    set_activations(model.layers[0], "int8")
    assert not native_step.can_run(model)


def test_only_who_names_them_gets_them(folder):
    for quantized in ("int8", "int4"):
        model = load_pretrained(folder, quantize=quantized, device="cpu")
        bits = {m.activation_bits for m in model.modules() if isinstance(m, QuantizedWeight)}
        assert bits == {16}
        assert model.activations == "int16"


def test_blocks_are_used_for_every_purpose(default_model):
    checkpoint = open_checkpoint(default_model)
    for purpose in ("generate", "read"):
        for quantize_as in (None, "auto", "stored"):
            options = LoadOptions(device="cpu", quantize=quantize_as, activations="int8")
            found = resolve_weight_format(checkpoint, options, purpose)
            assert (found.quantize, found.dtype, found.activations) == (
                *("stored", torch.float32),
                "int8",
            )
    # A classifier that was trained on dense weights can be read on blocks.
    options = LoadOptions(device="cpu", activations="int8")
    found = resolve_weight_format(checkpoint, options, "read", trained_on=("bfloat16", None))
    assert (found.quantize, found.dtype) == ("stored", torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "need quantized weights"),
        ({"quantize": "auto"}, "need quantized weights"),
        ({"quantize": "stored"}, "need quantized weights"),
        ({"quantize": "none"}, "need quantized weights"),
        ({"quantize": "int8", "dtype": "bfloat16"}, "compute in float32"),
        ({"quantize": "int7"}, "quantize must be one of"),
    ],
)
def test_what_would_have_none_is_refused(options, message, folder):
    with pytest.raises(OptionError, match=message):
        resolve_weight_format(
            open_checkpoint(folder), LoadOptions(device="cpu", activations="int8", **options)
        )


def test_an_unknown_form_is_refused(folder):
    with pytest.raises(OptionError, match="activations must be one of int16, int8, not 'int4'"):
        load_pretrained(folder, quantize="int8", activations="int4")


def test_other_machines_refuse_them(folder, monkeypatch):
    monkeypatch.setattr("minllama.checkpoints.weight_format.library", lambda: None)
    with pytest.raises(OptionError, match="without a C\\+\\+ compiler; use int16"):
        load_pretrained(folder, quantize="int8", activations="int8", device="cpu")


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "bench", "classify", "evaluate"])
def test_commands_have_the_option(command):
    result = CliRunner().invoke(cli, [command, "--help"])
    assert "--activations" in result.output or "--help-all" in result.output
