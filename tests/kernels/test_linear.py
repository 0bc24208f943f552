"""Products on a CPU: torch's results, in half precision from few numbers of rows."""

import pytest
import torch
import torch.nn.functional as F

from minllama.kernels.cpu import linear
from minllama.kernels.cpu.library import best_level
from minllama.kernels.cpu.linear import CHUNK, STEP, matmul
from minllama.kernels.hardware import AVX2, Choice
from minllama.model.llama import Linear
from tests.tiny import our_model, random_ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 40])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_in_chunks_is_torchs(dtype, rows, bias):
    torch.manual_seed(0)
    layer = Linear(48, 24, bias=bias).to(dtype).requires_grad_(False)
    x = torch.randn(rows, 48).to(dtype)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    y = layer(x)
    assert y.dtype == dtype
    assert (y - exact).abs().max() < 2 * torch.finfo(dtype).eps * exact.abs().max()


def test_batches_of_any_number_of_rows_are_few_shapes_to_torch(monkeypatch):
    """Each shape that oneDNN meets costs it a compiled primitive and scratch memory, for good."""
    shapes, mm = set(), torch.mm

    def counted(x, *arguments, **options):
        shapes.add(tuple(x.shape))
        return mm(x, *arguments, **options)

    monkeypatch.setattr(linear.torch, "mm", counted)
    matrix = torch.randn(8, 8).bfloat16()
    for rows in range(1, 1500, 7):
        assert matmul(torch.randn(rows, 8).bfloat16(), matrix).shape == (rows, 8)
    assert {rows for rows, _ in shapes} == {1, *range(STEP, CHUNK + 1, STEP)}


def test_gradients_pass_through_to_what_is_multiplied():
    torch.manual_seed(0)
    layer = Linear(16, 8).bfloat16().requires_grad_(False)
    x = torch.randn(3, 600, 16).bfloat16().requires_grad_()
    layer(x).sum().backward()
    right = layer.weight.float().sum(0).expand(3, 600, 16)
    assert torch.allclose(x.grad.float(), right, atol=0.02)


def test_a_weight_that_is_trained_gets_its_gradient():
    layer = Linear(16, 8).bfloat16()
    layer(torch.ones(5, 16).bfloat16()).sum().backward()
    assert torch.equal(layer.weight.grad.float(), torch.full((8, 16), 5.0))


def test_other_dtypes_are_torchs_own(monkeypatch):
    monkeypatch.setattr(linear, "matmul", lambda *_: pytest.fail("in chunks"))
    layer, x = Linear(16, 8).double(), torch.randn(700, 16).double()
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_models_passes_in_bfloat16_go_in_chunks(monkeypatch):
    model, seen = our_model(max_seq_len=1024).bfloat16(), set()
    whole = linear.matmul

    def watched(x, matrix):
        seen.add(x.shape[:-1].numel())
        return whole(x, matrix)

    monkeypatch.setattr(linear, "matmul", watched)
    with torch.inference_mode():
        model(random_ids(3, 250))
    assert seen == {750}


@pytest.fixture
def compiled(monkeypatch):
    """How many rows each float32 product of compiled code has had."""
    rows, own = [], linear.ops.dense_matmul

    def counted(weight, x):
        rows.append(x.numel() // x.shape[-1])
        return own(weight, x)

    monkeypatch.setattr(linear.ops, "dense_matmul", counted)
    return rows


needs_vectors = pytest.mark.skipif(best_level() < AVX2, reason="needs compiled code with vectors")


@needs_vectors
@pytest.mark.parametrize("bias", [False, True])
def test_float32_of_many_rows_is_multiplied_in_compiled_code(bias, compiled):
    torch.manual_seed(0)
    layer, x = Linear(50, 23, bias=bias), torch.randn(3, 300, 50)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with torch.no_grad():
        for rows in (x, x[:, ::2], x.transpose(1, 2).contiguous().transpose(1, 2)):
            assert layer(rows).shape == (*rows.shape[:-1], 23)
        assert (layer(x) - exact).abs().max() < 2e-6 * exact.abs().max()
    assert compiled == [900, 450, 900, 900]


@needs_vectors
def test_what_torch_multiplies_in_float32(compiled):
    layer, x = Linear(16, 8), torch.randn(700, 16)
    layer(x).sum().backward()  # gradients
    with torch.no_grad():
        layer(x[:3])  # few rows
        layer.to("meta")(x.to("meta"))
    frozen = Linear(16, 8).requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert frozen(x).dtype == torch.bfloat16
    frozen(x.requires_grad_()).sum().backward()
    assert torch.allclose(x.grad, frozen.weight.sum(0).expand(700, -1), atol=1e-6)
    frozen.bias.requires_grad_()
    assert frozen(x.detach()).requires_grad
    assert compiled == []


@needs_vectors
def test_a_stated_limit_leaves_more_rows_to_torch(compiled, monkeypatch):
    monkeypatch.setattr(linear, "choice", lambda name, level: Choice(64, "rows", "a test"))
    layer = Linear(16, 8).requires_grad_(False)
    for rows in (linear.ops.FEW_ROWS, linear.ops.FEW_ROWS + 1, 64, 65):
        layer(torch.randn(rows, 16))
    assert compiled == [linear.ops.FEW_ROWS + 1, 64]
