"""No field of a config is ignored by what computes a model without its modules."""

import dataclasses
from typing import Any

import pytest
import torch

from minllama.engine import cpu, cuda_graph, packing
from minllama.engine.choose import engine_for
from minllama.engine.packing import forward
from minllama.kernels.cpu import ops
from minllama.kernels.cpu.library import library
from minllama.model.config import LlamaConfig
from minllama.model.llama import Llama
from tests.tiny import CHANGED_FIELDS, random_ids

SHAPE = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "hidden_dim": 96,
    "vocab_size": 61,
    "tie_embeddings": False,
}
LENGTHS = (9, 5, 1)


def model_of(config: LlamaConfig) -> Llama:
    """Random weights, norms and biases too."""
    torch.manual_seed(0)
    model = Llama(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = name.endswith("norm.weight")
            parameter.normal_(mean=1.0 if is_norm else 0.0, std=0.2)
    return model


@torch.inference_mode()
def prefilled_and_decoded(model: Llama, backend: str | None = None) -> list[torch.Tensor]:
    """Logits of padded texts, of the same texts into a cache, and of what continues them."""
    engine, ids = engine_for(model, backend), random_ids(len(LENGTHS), max(LENGTHS), seed=3)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(-1)
    found = [forward(model, ids, attention_mask=mask).logits[mask]]
    if not model.config.causal:
        return found
    cache = model.new_cache(len(LENGTHS), 32)
    found.append(engine.forward(ids, cache, attention_mask=mask).logits)
    for number, length in enumerate((1, 1, 3, 1)):
        new = random_ids(len(LENGTHS), length, seed=number)
        found.append(engine.forward(new, cache, logits="all").logits)
    return found


@dataclasses.dataclass(frozen=True)
class Windowed(LlamaConfig):
    """A config of somebody who adds a field and forgets what computes without the modules."""

    sliding_window: int | None = None


def test_a_changed_value_of_every_field_is_tried() -> None:
    config = LlamaConfig(**SHAPE)
    assert set(CHANGED_FIELDS) == {field.name for field in dataclasses.fields(LlamaConfig)}
    for name, changes in CHANGED_FIELDS.items():
        changed = LlamaConfig(**{**SHAPE, **changes})
        assert getattr(changed, name) != getattr(config, name), name


@pytest.mark.cpu
@pytest.mark.skipif(library() is None, reason="minllama was installed without a C++ compiler")
@pytest.mark.parametrize("name", CHANGED_FIELDS)
def test_a_changed_field_counts_in_compiled_code_or_is_left_to_the_modules(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig(**{**SHAPE, **CHANGED_FIELDS[name]})
    model = model_of(config)
    assert cpu.can_run(model) == (name in cpu.IMPLEMENTED)
    found = prefilled_and_decoded(model)
    usual = prefilled_and_decoded(model_of(LlamaConfig(**SHAPE)))
    monkeypatch.setattr(ops, "serves", lambda x: False)
    wanted = prefilled_and_decoded(model, "eager")
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    if name not in ("max_seq_len", "dropout"):  # which change no number of these passes
        assert found[0].shape != usual[0].shape or not torch.allclose(found[0], usual[0], atol=1e-2)


@pytest.mark.parametrize("name", CHANGED_FIELDS)
def test_a_changed_field_is_known_to_the_kernels_for_gpus_or_refused(name: str) -> None:
    model = model_of(LlamaConfig(**{**SHAPE, **CHANGED_FIELDS[name]}))
    assert cuda_graph.computes(model) == (name in cuda_graph.IMPLEMENTED)


@pytest.mark.parametrize("window", [None, 4])
def test_a_field_that_nobody_implements_is_left_to_the_modules(window: int | None) -> None:
    changes: dict[str, Any] = {**SHAPE, "sliding_window": window}
    model = model_of(Windowed(**changes))
    is_usual = window is None
    assert cuda_graph.computes(model) == is_usual
    assert cpu.can_run(model) == (is_usual and library() is not None)
    ids, mask = random_ids(3, 9), torch.arange(9) < torch.tensor([[9], [5], [2]])
    is_packed = packing._layout_of(model, ids, mask, None, None)[0] is not None
    assert is_packed == (is_usual and ops.serves(model.norm.weight))
    assert model.config.has_defaults_beyond(packing.IMPLEMENTED) == is_usual
