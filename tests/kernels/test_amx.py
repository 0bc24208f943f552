"""Products of bfloat16 by matrix instructions (AMX), or by their emulation where there are none."""

import pytest
import torch
from torch import nn

from minllama import load_pretrained
from minllama.engine import cpu as native_step
from minllama.engine.choose import engine_for
from minllama.engine.cpu import NativeStep
from minllama.errors import MinllamaError
from minllama.kernels import hardware
from minllama.kernels.cpu import linear, ops
from minllama.kernels.cpu.library import best_level
from minllama.model.kv_cache import KVCache
from minllama.quantization.modules import QuantizedWeight, dense_state, quantize
from tests.tiny import our_model, random_ids

pytestmark = pytest.mark.skipif(best_level() < 2, reason="these products need AVX-512")

EPS = torch.finfo(torch.bfloat16).eps
WIDTHS = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 96, "head_dim": 32}


@pytest.fixture(autouse=True)
def amx(as_cpu):
    """AMX is stated; compiled code emulates it where the processor has none."""
    as_cpu("amx")


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 31, 32, 33, 100, 511, 513, 1060])
@pytest.mark.parametrize(("out", "n"), [(16, 32), (7, 64), (33, 96), (64, 1536), (40, 3136)])
def test_products_are_those_of_the_rounded_values(rows, out, n):
    """Whole pairs of tiles and others, blocks of tokens, and columns in one part and in several."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, n).bfloat16(), torch.randn(out, n).bfloat16()
    exact = x.double() @ weight.double().T
    y = ops.half_matmul(weight, x)
    assert y.dtype == torch.bfloat16
    # One rounding of the result, and sums of float32.
    assert ((y.double() - exact).abs() <= EPS / 2 * exact.abs() + 1e-5 * n**0.5).all()
    assert torch.equal(ops.half_matmul(weight.T.contiguous(), x, transposed=True), y)
    for kind in (torch.float16, torch.float32):
        assert torch.equal(ops.half_matmul(weight.to(kind), x), y)
        assert torch.equal(ops.half_matmul(weight.to(kind).T.contiguous(), x, transposed=True), y)


def test_a_rows_bits_depend_neither_on_its_company_nor_on_threads():
    torch.manual_seed(0)
    x, weight = torch.randn(600, 96).bfloat16(), torch.randn(50, 96).bfloat16()
    y, before = ops.half_matmul(weight, x), torch.get_num_threads()
    try:
        for threads, rows in ((1, 600), (3, 600), (2, 17), (2, 1)):
            torch.set_num_threads(threads)
            assert torch.equal(ops.half_matmul(weight, x[:rows]), y[:rows])
            assert torch.equal(ops.half_matmul(weight, x[-rows:]), y[-rows:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("has_mins", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_are_rounded_to_bfloat16(bits, has_mins):
    torch.manual_seed(0)
    x = torch.randn(70, 5 * 32).bfloat16()
    quants, scales, mins = quantize(torch.randn(40, 5 * 32), bits)[:3]
    quants[0, :2], quants[1, 1:] = 255, 0
    mins = (-7 * scales if mins is None else mins) if has_mins else None
    weight = QuantizedWeight(quants, scales, mins, 40)
    exact = x.double() @ weight.dequantize(torch.bfloat16).double().T
    found = ops.half_matmul(weight, x)
    assert ((found.double() - exact).abs() <= EPS / 2 * exact.abs() + 1e-4).all()
    # A layer takes them from 33 rows on: fewer are multiplied exactly.
    layer_y = weight.matmul(x)
    assert torch.equal(layer_y, found)
    few = weight.matmul(x[:32]).double()
    sharp = x[:32].double() @ weight.dequantize().double().T
    assert ((few - sharp).abs() <= EPS / 2 * sharp.abs() + 0.02).all()
    assert not torch.equal(few.bfloat16(), found[:32])


def test_infinities_and_nan_stay_where_they_are():
    x, weight = torch.ones(40, 64).bfloat16(), torch.ones(33, 64)
    x[3, 5], x[20, 7] = float("inf"), float("nan")
    weight[2, 9] = float("nan")
    y = ops.half_matmul(weight, x).float()
    assert y[20].isnan().all()
    assert y[:, 2].isnan().all()
    others = torch.ones(33).bool()
    others[2] = False
    assert (y[3, others] == float("inf")).all()
    finite = torch.ones(40).bool()
    finite[3] = finite[20] = False
    assert (y[finite][:, others] == 64).all()


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(4, 32).bfloat16(), torch.ones(8, 64)),
        (torch.ones(4, 40).bfloat16(), torch.ones(8, 40)),
        (torch.ones(4, 32), torch.ones(8, 32)),
    ],
)
def test_what_does_not_fit_is_refused(x, weight):
    with pytest.raises(MinllamaError, match=r"a weight of \d+ columns times"):
        ops.half_matmul(weight, x)


def test_layers_of_bfloat16_use_them_both_ways(monkeypatch):
    monkeypatch.setattr(linear.torch, "mm", lambda *_, **__: pytest.fail("torch's"))
    torch.manual_seed(0)
    layer = our_model(**WIDTHS).layers[0].feed_forward.w1.bfloat16().requires_grad_(False)
    x = torch.randn(3, 20, 64).bfloat16().requires_grad_()
    y = layer(x)
    given = torch.randn_like(y)
    y.backward(given)
    exact = x.detach().double() @ layer.weight.double().T
    assert ((y.double() - exact).abs() <= EPS / 2 * exact.abs() + 1e-5).all()
    gradient = given.double() @ layer.weight.double()
    assert ((x.grad.double() - gradient).abs() <= EPS / 2 * gradient.abs() + 1e-5).all()


def test_odd_widths_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(ops, "half_matmul", lambda *_, **__: pytest.fail("of 40 columns"))
    x, weight = torch.randn(60, 40).bfloat16(), torch.randn(8, 40).bfloat16()
    assert torch.allclose(linear.matmul(x, weight.T), x @ weight.T)
    model = our_model(hidden_dim=40, dim=64).bfloat16()
    assert native_step.most_tokens(model, of_one_each=False) == 32


# ------------------------------------------------------------------ whole passes


def in_files_format(kind, tmp_path, **changes):
    """A tiny model, quantized with long passes in bfloat16, or bfloat16 altogether."""
    model = our_model(**{**WIDTHS, "max_seq_len": 700, **changes})
    for bias in (p for name, p in model.named_parameters() if name.endswith("bias")):
        nn.init.normal_(bias)
    if kind == "bfloat16":
        return model.bfloat16()
    model.save_pretrained(tmp_path / "model")
    model = load_pretrained(tmp_path / "model", quantize=kind, dtype="float32")
    model.long_dtype = torch.bfloat16  # as `quantize="auto"` sets it for blocks of a file
    return model


@pytest.mark.parametrize("kind", ["int4", "int8", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True, "ffn_bias": True, "tie_embeddings": False},
        {"head_dim": 24, "n_heads": 4},  # whose attention is of float32
        {"n_kv_heads": 1, "head_dim": 64, "hidden_dim": 1600},
    ],
)
def test_passes_in_bfloat16_are_near_those_of_float64(kind, changes, tmp_path):
    """Rows of several lengths, more tokens than a chunk of a cache, and what follows them."""
    model = in_files_format(kind, tmp_path, **changes)
    exact = our_model(**{**WIDTHS, "max_seq_len": 700, **changes})
    exact.load_state_dict(dense_state(model))
    exact = exact.double()
    ids, more = random_ids(2, 200), random_ids(2, 45, seed=1)
    mask = torch.ones(2, 200).bool()
    mask[1, 131:] = False
    engine = engine_for(model, "cpu")
    with torch.inference_mode():
        cache = engine.new_cache(2, 300)
        first = engine.forward(ids, cache, attention_mask=mask, logits="all").logits
        then = engine.forward(more, cache).logits
        right_cache = KVCache(exact.config, 2, 300, dtype=torch.float64)
        right = exact(ids, attention_mask=mask, cache=right_cache).logits
        right_then = exact(more, cache=right_cache).logits[:, -1]
        rounded = model(ids, attention_mask=mask).logits
    size = float(right[mask].std())
    assert (first[mask] - right[mask]).abs().mean() < 0.02 * size
    assert (then - right_then).abs().mean() < 0.02 * size
    if kind == "bfloat16":  # no farther than torch's modules, which round more
        off, theirs = (first - right)[mask].abs().mean(), (rounded - right)[mask].abs().mean()
        assert off < theirs


@pytest.mark.parametrize("kind", ["int4", "bfloat16"])
def test_few_tokens_are_computed_as_without_amx(kind, tmp_path, as_cpu):
    """Decoding and short prompts: exact integers beside quantized weights."""
    ids = random_ids(1, 32 if kind == "int4" else 8)
    found = []
    for features in (["amx"], []):
        as_cpu(*features)
        engine = engine_for(in_files_format(kind, tmp_path), "cpu")
        with torch.inference_mode():
            cache = engine.new_cache(1, 60)
            first = engine.forward(ids, cache, logits="all").logits
            found.append((first, engine.forward(ids[:, :1], cache).logits))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_pass_is_the_same_on_any_number_of_threads_and_with_any_company(tmp_path, monkeypatch):
    model = in_files_format("int4", tmp_path)
    positions, ids = torch.arange(300).unsqueeze(0), random_ids(1, 300)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            monkeypatch.setattr(native_step, "_TEAM", native_step.Team())
            cache = KVCache(model.config, 1, 300, dtype=torch.float16)
            every = torch.arange(300)
            step = NativeStep(model)
            found.append(step(ids, positions, model.rope(positions), cache, every)[1])
            few = KVCache(model.config, 1, 300, dtype=torch.float16)
            some = step(
                ids[:, :100], positions[:, :100], model.rope(positions[:, :100]), few, every[:100]
            )
            found.append(some[1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert torch.allclose(found[0][:100], found[1], atol=0.05)


def test_slots_behind_a_text_are_not_read(tmp_path):
    """Of a cache whose memory held other values, even none that are numbers."""
    model = in_files_format("int8", tmp_path)
    engine = engine_for(model, "cpu")
    ids = random_ids(1, 141)
    found = []
    for left in (0.0, float("nan")):
        cache = engine.new_cache(1, 150)
        for values in (*cache.keys, *cache.values):
            values.fill_(left)
        with torch.inference_mode():
            found.append(engine.forward(ids, cache, logits="all").logits)
    assert found[0].isfinite().all()
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("level", "features", "expected"),
    [
        ("avx512", ["amx"], (hardware.AMX_FROM, hardware.AMX_FROM_QUANTIZED)),
        ("avx512", ["bf16"], (0, 0)),
        ("avx2", ["amx"], (0, 0)),
        ("portable", ["amx"], (0, 0)),
    ],
)
def test_who_has_matrix_instructions(as_cpu, level, features, expected):
    as_cpu(*features, level=level)
    found = (hardware.amx_from(best_level(), is_quantized=q) for q in (False, True))
    assert tuple(found) == expected
