"""Claims about the adapters of a whole Llama: which layers, what is frozen, combining, merging."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minllama.errors import MinllamaError, OptionError
from minllama.lora import (
    LoRALayer,
    adapter_names,
    add_lora_wrapper,
    lora_layers,
    lora_parameters,
    merge_lora,
    remove_lora_wrapper,
    set_adapters,
    unmerge_lora,
)
from minllama.model.llama import Llama, load_pretrained
from minllama.options import LoRAOptions
from tests.tiny import our_model, random_ids

IDS = random_ids(3, 9)
PARTS = (
    "attention.compute_query",
    "attention.compute_key",
    "attention.compute_value",
    "attention.compute_output",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)


class Classifier(nn.Module):
    """What a classifier is to LoRA: a Llama, and a head that is not a Llama's."""

    def __init__(self, llama: Llama) -> None:
        super().__init__()
        self.llama = llama
        self.score = nn.Linear(llama.config.dim, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.score(self.llama(ids, logits=None).hidden[:, -1])
        return logits


def randomise(model: nn.Module, adapter_name: str, seed: int = 5) -> None:
    """Make an adapter do something: B starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(model, adapter_name):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def adapted(*, dtype: torch.dtype = torch.float32, **options: Any) -> Llama:
    model = our_model().to(dtype)
    add_lora_wrapper(model, **options)
    randomise(model, options.get("adapter_name", "default"))
    return model


def logits(model: Llama) -> Tensor:
    with torch.no_grad():
        found = model(IDS).logits
    assert found is not None
    return found


def with_deltas(**shares: float) -> Callable[[Llama], Llama]:
    """A plain Llama whose weights are W + share * delta W, from one with adapters."""

    def build(model: Llama) -> Llama:
        plain = our_model()
        for name, layer in lora_layers(model).items():
            weight = plain.get_submodule(name).weight
            assert isinstance(weight, nn.Parameter)
            for adapter, share in shares.items():
                if adapter in layer.adapters:
                    weight.data += share * layer.delta_weight(adapter).detach()
        return plain

    return build


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("all-linear", PARTS),
        ("compute_query", PARTS[:1]),
        (["compute_query", "compute_value"], [PARTS[0], PARTS[2]]),
        (["q_proj", "k_proj", "v_proj", "o_proj"], PARTS[:4]),
        (["gate_proj", "down_proj", "up_proj"], PARTS[4:]),
        (["w1", "mlp.up_proj"], [PARTS[4], PARTS[6]]),
        (r".*attention\.compute_(query|value)", [PARTS[0], PARTS[2]]),
        (r"model\.layers\.\d+\.mlp\..*", PARTS[4:]),
        (["compute_output", r".*\.w[13]"], [PARTS[3], PARTS[4], PARTS[6]]),
    ],
)
def test_targets_are_names_of_ours_or_theirs_or_patterns(
    target: str | list[str], expected: list[str]
) -> None:
    model = our_model()
    wanted = [f"layers.{layer}.{part}" for layer in (0, 1) for part in expected]
    assert add_lora_wrapper(model, target) == wanted
    assert list(lora_layers(model)) == wanted


def test_a_whole_name_is_one_layer() -> None:
    assert add_lora_wrapper(our_model(), "layers.1.feed_forward.w2") == ["layers.1.feed_forward.w2"]
    assert add_lora_wrapper(our_model(), "model.layers.0.self_attn.k_proj") == [
        "layers.0.attention.compute_key"
    ]


@pytest.mark.parametrize("layers", [1, [1], range(1, 2), {1}])
def test_layers_can_be_chosen(layers: Any) -> None:
    model = our_model()
    names = add_lora_wrapper(model, ["w1", "w2"], layers_to_transform=layers)
    assert names == ["layers.1.feed_forward.w1", "layers.1.feed_forward.w2"]


def test_a_classifier_is_adapted_inside_its_llama() -> None:
    model = Classifier(our_model())
    assert len(add_lora_wrapper(model)) == 14
    assert type(model.score) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.score.parameters())
    assert lora_layers(model).keys() == lora_layers(model.llama).keys()


def test_all_but_the_adapter_is_frozen() -> None:
    model = our_model()
    assert model.output is not None
    add_lora_wrapper(model, "w1", use_dora=True)
    adapters = {
        f"layers.{layer}.feed_forward.w1.adapters.default.{part}"
        for layer in (0, 1)
        for part in ("lora_A", "lora_B", "lora_magnitude_vector")
    }
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapters
    assert lora_parameters(model) == [p for p in model.parameters() if p.requires_grad]
    model(IDS).logits.logsumexp(-1).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == adapters


def test_the_defaults_are_those_of_the_options() -> None:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(add_lora_wrapper).parameters.items()
    }
    options = LoRAOptions()
    assert options.target_modules == (defaults["target_modules"],)
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"):
        assert getattr(options, name) == defaults[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"target_modules": "query"},
            r"no linear layer is named 'query'; there are compute_query \(q_proj\), compute_key "
            r"\(k_proj\), compute_value \(v_proj\), compute_output \(o_proj\), w1 \(gate_proj\), "
            r"w2 \(down_proj\), w3 \(up_proj\), full names such as "
            r"layers.0.attention.compute_query, and all-linear",
        ),
        ({"target_modules": ["w1", "lm_head"]}, "no linear layer is named 'lm_head'"),
        ({"target_modules": "output"}, "no linear layer is named 'output'"),
        ({"target_modules": "tok_embeddings"}, "no linear layer is named 'tok_embeddings'"),
        ({"target_modules": "w(1"}, "neither a name nor a regular expression"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"layers_to_transform": 2}, "layers_to_transform must be from 0 to 1, not 2"),
        ({"layers_to_transform": [0, -1]}, "must be from 0 to 1, not -1"),
        (
            {"target_modules": "layers.0.feed_forward.w1", "layers_to_transform": 1},
            "matches nothing in the selected layers",
        ),
        ({"layers_to_transform": []}, "matches nothing in the selected layers"),
        ({"r": 0}, "r must be >= 1"),
        ({"adapter_name": "a.b"}, "adapter_name must be letters"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_anything_changes(
    arguments: dict[str, Any], message: str
) -> None:
    model = our_model()
    with pytest.raises(OptionError, match=message) as error:
        add_lora_wrapper(model, **arguments)
    assert "\n" not in str(error.value)
    assert lora_layers(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_module_without_a_llama_is_refused() -> None:
    with pytest.raises(
        MinllamaError, match="a Linear contains no Llama; give a Llama or a classifie"
    ):
        add_lora_wrapper(nn.Linear(2, 2))


def test_a_fresh_adapter_leaves_the_logits() -> None:
    model = our_model()
    before = logits(model)
    add_lora_wrapper(model, lora_dropout=0.5)
    torch.testing.assert_close(logits(model), before)


def test_a_seed_means_the_same_adapter() -> None:
    first, second = our_model(), our_model()
    for model in (first, second):
        torch.manual_seed(11)
        add_lora_wrapper(model)
    assert all(map(torch.equal, lora_parameters(first), lora_parameters(second)))


@pytest.mark.parametrize("use_dora", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_dora: bool) -> None:
    model = adapted(use_dora=use_dora, lora_dropout=0.3).train()
    gradients = []
    for model.gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        gradients.append(
            torch.autograd.grad(model(IDS).logits.logsumexp(-1).sum(), lora_parameters(model))
        )
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize(
    ("chosen", "shares"),
    [
        ("a", {"a": 1.0}),
        ("b", {"b": 1.0}),
        (["a", "b"], {"a": 1.0, "b": 1.0}),
        ({"a": 1.0, "b": 0.5}, {"a": 1.0, "b": 0.5}),
        ({"a": -1.5}, {"a": -1.5}),
        ([], {}),
    ],
)
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_are_switched_and_combined(
    chosen: Any, shares: dict[str, float], use_dora: bool
) -> None:
    model = adapted(adapter_name="a", target_modules=["w1", "compute_query"], use_dora=use_dora)
    add_lora_wrapper(model, ["w1", "w2"], r=3, adapter_name="b", use_rslora=True)
    randomise(model, "b", seed=6)
    assert adapter_names(model) == ["a", "b"]
    set_adapters(model, chosen)
    torch.testing.assert_close(
        logits(model), logits(with_deltas(**shares)(model)), atol=1e-5, rtol=1e-5
    )


def test_the_newest_adapter_is_active_and_the_only_one_trained() -> None:
    model = adapted(adapter_name="a")
    add_lora_wrapper(model, "w1", adapter_name="b")
    torch.testing.assert_close(logits(model), logits(our_model()))  # b is fresh, and a is off
    assert [p for p in model.parameters() if p.requires_grad] == lora_parameters(model, "b")
    assert len(lora_parameters(model)) == 2 * 14 + 2 * 2


def test_adapters_that_are_not_there_are_refused() -> None:
    model = adapted(adapter_name="a")
    before = logits(model)
    with pytest.raises(MinllamaError, match="there is no adapter 'b'; there are a"):
        set_adapters(model, {"a": 0.0, "b": 1.0})
    with pytest.raises(MinllamaError, match="the weight of adapter 'a' must be finite, not nan"):
        set_adapters(model, {"a": float("nan")})
    with pytest.raises(MinllamaError, match="already an adapter 'a'"):
        add_lora_wrapper(model, adapter_name="a")
    assert torch.equal(logits(model), before)
    for use in (set_adapters, merge_lora, remove_lora_wrapper):
        with pytest.raises(
            MinllamaError, match=r"has no adapters; add one with add_lora_wrapper\(\)"
        ):
            use(our_model(), *(["a"] if use is set_adapters else []))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_then_unmerge_restores_the_base(dtype: torch.dtype, use_dora: bool) -> None:
    model = adapted(dtype=dtype, use_dora=use_dora)
    add_lora_wrapper(model, "w2", adapter_name="b")
    randomise(model, "b")
    set_adapters(model, {"default": 1.0, "b": 0.3})
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    drift = merge_lora(model, IDS)
    after = logits(model)
    assert drift == (after.float() - before.float()).abs().max()
    assert 0 < drift < (1e-5 if dtype == torch.float32 else 0.5)
    assert all(layer.is_merged for layer in lora_layers(model).values())
    unmerge_lora(model)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), before)


def test_a_merged_model_is_the_plain_model_with_the_sum_of_weights() -> None:
    model = adapted()
    plain = with_deltas(default=1.0)(model)
    assert merge_lora(model) is None
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=1e-5)


def test_the_drift_is_measured_on_any_logits_and_without_dropout() -> None:
    model = Classifier(adapted(dtype=torch.bfloat16, lora_dropout=0.5)).bfloat16().train()
    modes = {name: module.training for name, module in model.named_modules()}
    modes["llama.norm"] = model.llama.norm.training = False
    drift = merge_lora(model, lambda: model(IDS))
    assert drift is not None
    merged = model.eval()(IDS)
    unmerge_lora(model)
    assert drift == (merged.float() - model(IDS).float()).abs().max()
    model.train()
    model.llama.norm.training = False
    merge_lora(model, lambda: model(IDS))
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_merging_is_all_or_nothing() -> None:
    model = adapted()
    lora_layers(model)["layers.1.feed_forward.w2"].adapter("default").lora_B.data[0, 0] = torch.nan
    weights = copy.deepcopy(model.state_dict())
    for undo in (merge_lora, remove_lora_wrapper):
        with pytest.raises(
            MinllamaError, match=r"layers.1.feed_forward.w2: the merged weight has NaN"
        ):
            undo(model)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.nan_to_num(), weights[name].nan_to_num())
    assert len(lora_layers(model)) == 14


def test_what_is_merged_cannot_be_changed() -> None:
    model = adapted()
    with pytest.raises(MinllamaError, match="are not merged, so there is nothing to undo"):
        unmerge_lora(model)
    merge_lora(model)
    changes: list[Callable[[], Any]] = [
        lambda: merge_lora(model),
        lambda: set_adapters(model, "default"),
        lambda: add_lora_wrapper(model, adapter_name="b"),
    ]
    for change in changes:
        with pytest.raises(MinllamaError, match=r"unmerge_lora\(\)"):
            change()


@pytest.mark.parametrize("merged_before", [False, True])
def test_removed_wrappers_leave_a_plain_llama(tmp_path: Path, merged_before: bool) -> None:
    model = adapted()
    expected = logits(model)
    if merged_before:
        merge_lora(model)
    remove_lora_wrapper(model)
    assert not any(isinstance(module, LoRALayer) for module in model.modules())
    assert list(model.state_dict()) == list(our_model().state_dict())
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_pretrained(tmp_path, device="cpu")), logits(model))


@pytest.mark.parametrize("merged_before", [False, True])
def test_adapters_can_be_dropped(merged_before: bool) -> None:
    model = adapted()
    if merged_before:
        merge_lora(model)
    remove_lora_wrapper(model, merge=False)
    assert torch.equal(logits(model), logits(our_model()))


def test_a_model_with_adapters_generates_what_the_merged_one_does() -> None:
    model = adapted()
    ids = model.generate(IDS[:1], 12, temperature=0.0)
    assert not torch.equal(ids, our_model().generate(IDS[:1], 12, temperature=0.0))
    merge_lora(model)
    assert torch.equal(model.generate(IDS[:1], 12, temperature=0.0), ids)


def test_a_wrapped_model_takes_back_its_state_dict() -> None:
    model = adapted(use_dora=True)
    other = our_model(seed=9)
    add_lora_wrapper(other, use_dora=True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    assert "layers.0.feed_forward.w1.adapters.default.lora_A" in model.state_dict()
    assert "layers.0.feed_forward.w1.base.weight" in model.state_dict()


def test_a_few_steps_learn_what_the_base_does_not_know() -> None:
    model = our_model().train()
    add_lora_wrapper(model, r=4)
    optimizer = torch.optim.Adam(lora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(30):
        found = model(IDS[:, :-1]).logits
        loss = nn.functional.cross_entropy(found.flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
