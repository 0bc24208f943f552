"""Claims about one linear layer with adapters: the formulas, precision, gradients, what is kept."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minllama.errors import MinllamaError, OptionError
from minllama.kernels.cpu import ops
from minllama.kernels.cpu.library import library
from minllama.kernels.cpu.lora import low_rank_product
from minllama.lora import LoRALayer
from minllama.options import LoRAOptions


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    matrix = torch.tensor(weight, dtype=torch.float32)
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None)
    layer.weight.data = matrix
    if bias is not None:
        layer.bias.data = torch.tensor(bias)
    return layer


def set_matrices(layer: LoRALayer, a: list[list[float]], b: list[list[float]]) -> None:
    adapter = layer.adapter("default")
    adapter.lora_A.data = torch.tensor(a)
    adapter.lora_B.data = torch.tensor(b)


def random_layer(
    in_features: int = 12,
    out_features: int = 10,
    r: int = 3,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
) -> LoRALayer:
    """A layer whose adapter is not zero, in evaluation mode."""
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    layer = LoRALayer(base, r, 6.0, lora_dropout, use_dora=use_dora).eval()
    for parameter in layer.adapters.parameters():
        parameter.data += 0.2 * torch.rand_like(parameter)
    return layer


def adapted_weight(layer: LoRALayer) -> Tensor:
    """W' by the papers' formulas, from the parameters."""
    adapter = layer.adapter("default")
    weight = layer.base.weight.float() + adapter.scaling * adapter.lora_B @ adapter.lora_A
    if adapter.lora_magnitude_vector is None:
        return weight
    lengths = weight.pow(2).sum(1).sqrt()
    return (adapter.lora_magnitude_vector / lengths.detach())[:, None] * weight


def test_the_low_rank_product_is_added_to_what_the_base_gives() -> None:
    layer = LoRALayer(linear([[1, 2], [3, 4]], [0.5, 0.0]), 1, 3)
    set_matrices(layer, [[1.0, -1.0]], [[2.0], [1.0]])
    # W x + bias = (7.5, 15); A x = -2; alpha / r = 3; 3 B A x = (-12, -6).
    assert layer(torch.tensor([[1.0, 3.0]])).tolist() == [[-4.5, 9.0]]
    assert layer.delta_weight().tolist() == [[6.0, -6.0], [3.0, -3.0]]


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 1.5), (True, 3.0)])
def test_rslora_divides_by_the_root_of_the_rank(use_rslora: bool, scaling: float) -> None:
    layer = LoRALayer(linear([[0.0, 0.0]]), 4, 6, use_rslora=use_rslora)
    set_matrices(layer, [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0, 0.0, 0.0]])
    assert layer.delta_weight().tolist() == [[scaling, 2 * scaling]]
    assert layer(torch.tensor([1.0, 1.0])).tolist() == [3 * scaling]


def test_dora_gives_each_row_its_magnitude() -> None:
    layer = LoRALayer(linear([[3, 4], [0, 2]], [1.0, -1.0]), 1, 1, use_dora=True)
    magnitude = layer.adapter("default").lora_magnitude_vector
    assert magnitude is not None
    assert magnitude.tolist() == [5.0, 2.0]  # the rows' lengths: the base is not changed yet
    magnitude.data = torch.tensor([10.0, 6.0])
    set_matrices(layer, [[1.5, 0.0]], [[0.0], [1.0]])
    # W + delta W = ((3, 4), (1.5, 2)), of lengths (5, 2.5); times (10 / 5, 6 / 2.5).
    torch.testing.assert_close(
        layer(torch.tensor([1.0, 1.0])), torch.tensor([2 * 7 + 1, 2.4 * 3.5 - 1])
    )
    torch.testing.assert_close(
        layer.delta_weight(), torch.tensor([[6.0, 8.0], [3.6, 4.8]]) - layer.base.weight
    )


def test_the_length_of_a_row_is_a_constant_to_the_gradient() -> None:
    layer = LoRALayer(linear([[3.0, 4.0]]), 1, 1, use_dora=True)
    set_matrices(layer, [[1.0, 0.0]], [[1.0]])
    layer(torch.tensor([2.0, 1.0])).sum().backward()
    adapter = layer.adapter("default")
    length = math.hypot(4, 4)  # of W + delta W = (4, 4)
    assert adapter.lora_magnitude_vector is not None
    assert adapter.lora_magnitude_vector.grad is not None
    assert adapter.lora_B.grad is not None
    assert adapter.lora_A.grad is not None
    assert adapter.lora_magnitude_vector.grad.item() == pytest.approx((4 * 2 + 4 * 1) / length)
    assert adapter.lora_B.grad.item() == pytest.approx(5 / length * 2)
    assert adapter.lora_A.grad[0].tolist() == pytest.approx([5 / length * 2, 5 / length * 1])


def test_dora_takes_rows_of_zeros() -> None:
    layer = LoRALayer(linear([[0.0, 0.0], [1.0, 0.0]]), 2, use_dora=True)
    y = layer(torch.ones(2))
    y.sum().backward()
    assert y.tolist() == [0.0, 1.0]
    for parameter in layer.adapters.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_fresh_adapter_changes_nothing(use_dora: bool) -> None:
    base = nn.Linear(12, 10)
    x = torch.randn(5, 12)
    expected = base(x)
    torch.testing.assert_close(LoRALayer(base, 4, use_dora=use_dora)(x), expected)


def test_a_starts_kaiming_uniform_and_b_at_zero() -> None:
    torch.manual_seed(3)
    adapter = LoRALayer(nn.Linear(400, 10, device="meta").to_empty(device="cpu"), 50).adapter(
        "default"
    )
    torch.manual_seed(3)
    expected = nn.init.kaiming_uniform_(torch.empty(50, 400), a=math.sqrt(5))
    assert torch.equal(adapter.lora_A, expected)
    assert 0.0499 < adapter.lora_A.abs().max() <= 1 / math.sqrt(400)
    assert torch.equal(adapter.lora_B, torch.zeros(10, 50))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_with_the_adapted_weight(bias: bool, use_dora: bool) -> None:
    layer = random_layer(bias=bias, use_dora=use_dora)
    x = torch.randn(2, 5, 12)
    expected = F.linear(x, adapted_weight(layer), layer.base.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.base.weight + layer.delta_weight(), adapted_weight(layer))
    assert (layer(x) - layer.base(x)).abs().max() > 0.1


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("shape", [(4, 12), (2, 5, 12)])
@pytest.mark.parametrize("out_features", [10, 12])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_adapted_weight(
    use_dora: bool, shape: tuple[int, ...], out_features: int, bias: bool
) -> None:
    layer = random_layer(out_features=out_features, bias=bias, use_dora=use_dora)
    x = torch.randn(*shape, requires_grad=True)
    upstream = torch.randn(*shape[:-1], out_features)
    parameters = [x, *layer.adapters.parameters()]
    expected = torch.autograd.grad(
        F.linear(x, adapted_weight(layer), layer.base.bias), parameters, upstream
    )
    for found, wanted in zip(
        torch.autograd.grad(layer(x), parameters, upstream), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_the_base_gets_no_gradient() -> None:
    layer = random_layer()
    layer(torch.randn(4, 12)).sum().backward()
    assert layer.base.weight.grad is None
    assert layer.base.bias.grad is None
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {
        "adapters.default.lora_A",
        "adapters.default.lora_B",
    }


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapters_are_float32_whatever_the_base_is(dtype: torch.dtype, use_dora: bool) -> None:
    layer = random_layer(dtype=dtype, use_dora=use_dora)
    x = torch.randn(6, 12, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype
    exact = F.linear(x.float(), adapted_weight(layer), layer.base.bias.float())
    tolerance = 4e-2 if dtype == torch.bfloat16 else 5e-3
    torch.testing.assert_close(y.float(), exact, atol=tolerance, rtol=tolerance)
    upstream = torch.randn(6, 10)
    names = [name for name, _ in layer.adapters.named_parameters()]
    parameters = list(layer.adapters.parameters())
    wanted = torch.autograd.grad(exact, parameters, upstream)
    y.backward(upstream.to(dtype))
    for name, parameter, gradient in zip(names, parameters, wanted, strict=True):
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32, name
        assert (parameter.grad - gradient).norm() / gradient.norm() < tolerance, name
    assert layer.delta_weight().dtype == torch.float32


def test_a_float32_base_works_under_autocast() -> None:
    layer = random_layer()
    x = torch.randn(6, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=3e-2, rtol=3e-2)
    y.sum().backward()
    assert all(p.grad is not None for p in layer.adapters.parameters())


@pytest.mark.skipif(library() is None, reason="minllama was installed without a C++ compiler")
def test_dropout_is_on_the_adapters_input_and_in_training_only() -> None:
    layer = random_layer(lora_dropout=0.5)
    adapter = layer.adapter("default")
    x = torch.randn(50, 12)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    torch.manual_seed(7)
    y = layer(x)
    assert not torch.allclose(y, layer(x))
    torch.manual_seed(7)
    assert torch.equal(y, layer(x))
    torch.manual_seed(7)
    dropped = low_rank_product(x, torch.eye(12), torch.eye(12), 1.0, dropout=0.5)
    is_zero = dropped == 0
    assert torch.equal(dropped[~is_zero], 2 * x[~is_zero])
    assert 0.4 < is_zero.float().mean() < 0.6
    expected = layer.base(x) + adapter.scaling * dropped @ adapter.lora_A.T @ adapter.lora_B.T
    torch.testing.assert_close(y, expected)


def test_dropout_without_compiled_code_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "serves", lambda x: False)
    layer = random_layer(lora_dropout=0.5).train()
    adapter = layer.adapter("default")
    x = torch.randn(50, 12)
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    low_rank = F.dropout(x, 0.5) @ adapter.lora_A.T @ adapter.lora_B.T
    torch.testing.assert_close(y, layer.base(x) + adapter.scaling * low_rank)


def test_who_hooks_into_the_gradient_of_the_base_is_told_of_it() -> None:
    layer, seen = random_layer(), []
    layer.base.register_full_backward_hook(lambda module, of_x, of_y: seen.append(of_y[0]))
    x, upstream = torch.randn(5, 12, requires_grad=True), torch.randn(5, 10)
    (given,) = torch.autograd.grad(layer(x), x, upstream)
    torch.testing.assert_close(given, upstream @ adapted_weight(layer))
    assert torch.equal(seen[0], upstream)


def test_what_the_base_gave_stays_for_who_reads_it_again() -> None:
    layer = random_layer()
    seen: list[Tensor] = []
    layer.base.register_forward_hook(lambda module, args, y: seen.append(y))
    x = torch.randn(5, 12)
    y = layer(x)
    assert torch.equal(seen[0], F.linear(x, layer.base.weight, layer.base.bias))
    assert not torch.allclose(y, seen[0])
    layer.add_adapter("dora", LoRAOptions(r=3, use_dora=True))
    layer.active = {"default": 1.0, "dora": 1.0}
    together = layer(x)
    layer.active = {"dora": 1.0, "default": 1.0}
    torch.testing.assert_close(layer(x), together)


def test_with_dora_dropout_spares_the_base() -> None:
    layer = random_layer(lora_dropout=0.5, use_dora=True).train()
    adapter = layer.adapter("default")
    adapter.lora_B.data.zero_()
    assert torch.equal(layer(torch.ones(3, 12)), layer(torch.ones(3, 12)))


@pytest.mark.parametrize("training", [True, False])
def test_a_new_layer_is_in_the_mode_of_its_base(training: bool) -> None:
    layer = LoRALayer(nn.Linear(4, 4).train(training), lora_dropout=0.5)
    layer.add_adapter("b", LoRAOptions(lora_dropout=0.5))
    assert {module.training for module in layer.modules()} == {training}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_read_the_same_keep_it_once(dtype: torch.dtype) -> None:
    layers = [random_layer(64, 64, dtype=dtype) for _ in range(3)]
    x = torch.randn(32, 64, dtype=dtype, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    hidden = x * 1
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [layer(hidden) for layer in layers]
    assert outputs[0].requires_grad
    assert [size for size in kept.values() if size == hidden.numel()] == [hidden.numel()]


@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_rounds_once(use_dora: bool) -> None:
    layer = random_layer(dtype=torch.bfloat16, use_dora=use_dora)
    expected = adapted_weight(layer).to(torch.bfloat16)
    before = layer.base.weight.data.clone()
    layer.merge()
    # A number between two of bfloat16's may fall to either side.
    torch.testing.assert_close(layer.base.weight, expected, atol=0, rtol=2**-8)
    x = torch.randn(5, 12, dtype=torch.bfloat16)
    assert torch.equal(layer(x), layer.base(x))
    layer.unmerge()
    assert torch.equal(layer.base.weight, before)


def test_a_merged_layer_can_move_before_it_is_unmerged() -> None:
    layer = random_layer()
    before = layer.base.weight.data.clone()
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert torch.equal(layer.base.weight, before.to(torch.bfloat16))


def test_the_weight_that_is_merged_into_is_not_written_to() -> None:
    layer = random_layer()
    mapped = layer.base.weight.data  # as it might be a read-only file
    before = mapped.clone()
    layer.merge()
    assert torch.equal(mapped, before)
    assert not torch.equal(layer.base.weight, before)


def test_a_weight_that_float16_cannot_hold_is_refused() -> None:
    layer = random_layer(dtype=torch.float16)
    layer.adapter("default").lora_B.data.fill_(1e6)
    with pytest.raises(MinllamaError, match="NaN or infinite values in float16"):
        layer.merge()
    assert not layer.is_merged


def test_the_keys_of_a_state_dict_name_the_adapter() -> None:
    layer = LoRALayer(nn.Linear(4, 4), use_dora=True, adapter_name="movie-reviews")
    layer.add_adapter("b", LoRAOptions(r=2))
    assert list(layer.state_dict()) == [
        "base.weight",
        "base.bias",
        "adapters.movie-reviews.lora_A",
        "adapters.movie-reviews.lora_B",
        "adapters.movie-reviews.lora_magnitude_vector",
        "adapters.b.lora_A",
        "adapters.b.lora_B",
    ]


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "a b", "x/y"])
def test_names_that_no_state_dict_could_hold_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="adapter_name must be letters"):
        LoRALayer(nn.Linear(4, 4), adapter_name=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be >= 1, not 0"),
        ({"lora_alpha": 0}, "lora_alpha must be > 0"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a finite number"),
        ({"lora_dropout": 1.1}, "lora_dropout must be in"),
    ],
)
def test_options_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        LoRALayer(nn.Linear(4, 4), **options)  # type: ignore[arg-type]


def test_no_target_is_no_option() -> None:
    with pytest.raises(OptionError, match="target_modules is empty"):
        LoRAOptions(target_modules=())
    assert dataclasses.asdict(LoRAOptions(target_modules="w1")) == {  # type: ignore[arg-type]
        "target_modules": ("w1",),
        "r": 8,
        "lora_alpha": 16.0,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
    }
