"""Contrastive tuning against the paper's formula written as loops, and against one whole batch."""

import math

import numpy as np
import pytest
import torch

from minllama.engine import frozen_states
from minllama.lora import add_lora_wrapper
from minllama.training import contrastive
from minllama.training.contrastive import contrastive_loss, tune
from tests.tiny import our_model

CLASSES = np.array([0, 1, 0, 2, 1, 0, 2, 1, 3])


def texts(n: int = len(CLASSES)) -> list[tuple[int, ...]]:
    random = np.random.default_rng(0)
    return [tuple(random.integers(1, 60, size=3 + 2 * i).tolist()) for i in range(n)]


def adapted(layers=None):
    llama = our_model()
    torch.manual_seed(0)
    add_lora_wrapper(llama, r=4, layers_to_transform=layers)
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return llama


def gradients(llama, classes=CLASSES, pooling="mean") -> dict[str, torch.Tensor]:
    llama.zero_grad()
    rows = np.arange(len(classes))[::-1]
    prompts = contrastive._Texts(llama, texts(len(classes)))
    contrastive._backward(prompts, rows, classes[::-1], (2, pooling))
    return {n: p.grad.clone() for n, p in llama.named_parameters() if p.grad is not None}


def test_the_loss_is_that_of_the_papers_second_equation() -> None:
    vectors = torch.randn(len(CLASSES), 5, generator=torch.Generator().manual_seed(0)).double()
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    losses = []
    for i, own in enumerate(CLASSES):
        others = [k for k in range(len(CLASSES)) if k != i]
        same = [k for k in others if CLASSES[k] == own]
        total = sum(math.exp(float(unit[i] @ unit[k]) / 0.2) for k in others)
        logs = [math.log(math.exp(float(unit[i] @ unit[k]) / 0.2) / total) for k in same]
        losses.append(-sum(logs) / len(same) if same else 0.0)
    found = contrastive_loss(vectors, torch.from_numpy(CLASSES), 0.2)
    assert found.item() == pytest.approx(np.mean(losses), rel=1e-12)


def test_two_classes_of_opposite_directions_have_the_loss_of_their_size() -> None:
    # Two texts in each: its like has the cosine 1, the two others -1.
    vectors = torch.tensor([[1.0, 0], [2, 0], [-1, 0], [-5, 0]])
    found = contrastive_loss(vectors, torch.tensor([0, 0, 1, 1]), 1.0)
    assert found.item() == pytest.approx(math.log(1 + 2 * math.exp(-2)))


def test_gradients_in_parts_are_those_of_the_whole_batch(monkeypatch) -> None:
    llama = adapted()
    monkeypatch.setattr(contrastive, "MAX_TOKENS", {})
    whole = gradients(llama)
    assert any(float(g.abs().max()) > 1e-3 for g in whole.values())
    monkeypatch.setattr(contrastive, "MAX_TOKENS", {"cpu": 30})
    rows = range(len(CLASSES))
    assert len(contrastive._Texts(llama, texts()).parts(rows)) > 3
    parts = gradients(llama)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_layers_below_the_first_trained_one_run_once(monkeypatch, pooling) -> None:
    """And gradients are those of whole passes, in one part or several."""
    llama = adapted([1])
    runs = []
    llama.layers[0].register_forward_hook(lambda *arguments: runs.append(1))
    kept = gradients(llama, pooling=pooling)
    assert len(runs) == 1
    monkeypatch.setattr(contrastive, "MAX_TOKENS", {"cpu": 30})
    in_parts = gradients(llama, pooling=pooling)
    assert len(runs) == 2
    monkeypatch.setattr(frozen_states, "MOST_BYTES", 0)
    runs.clear()
    whole = gradients(llama, pooling=pooling)
    assert len(runs) > 6
    assert whole
    assert whole.keys() == kept.keys() == in_parts.keys()
    assert all(".layers.1." in f".{name}" for name in whole)
    for name, gradient in whole.items():
        assert float(gradient.abs().max()) > 1e-4
        torch.testing.assert_close(kept[name], gradient, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(in_parts[name], gradient, rtol=1e-4, atol=1e-6)


def test_every_text_is_in_one_part_and_a_part_has_few_padded_tokens() -> None:
    prompts = [(1,) * (4 + i) for i in range(60)]
    most = contrastive.MAX_TOKENS["cpu"]
    for layers, allowed in ((None, most), ([1], 2 * most)):  # of two layers
        rows = list(range(59, 9, -1))
        parts = contrastive._Texts(adapted(layers), prompts).parts(rows)
        assert len(parts) > 1
        assert [i for part in parts for i in part] == sorted(rows)
        sizes = [len(part) * max(len(prompts[i]) for i in part) for part in parts]
        assert max(sizes) <= allowed
        assert max(sizes) > allowed / 2


def test_a_batch_of_many_rows_has_as_many_texts_of_some_classes_each() -> None:
    random = np.random.default_rng(0)
    few = np.arange(60) % 7
    assert np.array_equal(contrastive._batch(few, random), np.arange(60))
    many = np.arange(300) % 30
    rows = contrastive._batch(many, random)
    assert len(rows) == 64
    assert sorted(np.unique(many[rows], return_counts=True)[1]) == [4] * 16


def test_tuning_draws_classes_together_and_trains_only_adapters() -> None:
    llama = adapted()
    before = {n: p.detach().clone() for n, p in llama.named_parameters()}
    ids, classes = texts(8), np.arange(8) % 2

    def loss() -> float:
        with torch.no_grad():
            vectors = [
                contrastive.pooled_states(llama, torch.tensor([t]), None, 2, "last")[0] for t in ids
            ]
        return contrastive_loss(torch.stack(vectors), torch.from_numpy(classes)).item()

    first, steps = loss(), []
    torch.manual_seed(1)
    was_training = llama.training
    tune(llama, ids, classes, (2, "last"), seed=0, progress=steps.append)
    assert loss() < 0.5 * first
    assert steps == list(range(1, contrastive.STEPS + 1))
    assert llama.training == was_training
    changed = {n for n, p in llama.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".adapters." in n}
