"""Heads that read a model with its adapters, and others that read it without."""

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from minllama.classification import LlamaExpertsClassifier, load_classifier
from minllama.classification.beside_base import BesideBaseRequest
from minllama.classification.storage.manifest import read_description, write_description
from minllama.classification.storage.save_load import merge_classifier
from minllama.engine import scheduler as scheduler_module
from minllama.engine.choose import engine_for
from minllama.engine.scheduler import Scheduler
from minllama.engine.states import StatesRequest
from minllama.errors import CheckpointError, MinllamaError
from minllama.lora import adapters_disabled, add_lora_wrapper, merge_lora
from tests.server.heads import experts
from tests.tiny import our_model

TEXTS = ["a fine film", "dull", "it drags on, and on", "", "what a mess! " * 60]
OF_BASE = ((1, "mean"), (2, "last"))
OWN = ((2, "last"), (2, "mean"))


def adapted(llama: torch.nn.Module, layers: Sequence[int] | None = None) -> None:
    torch.manual_seed(2)
    add_lora_wrapper(llama, r=4, layers_to_transform=layers)
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    llama.requires_grad_(False)


def make(base: Path, layers: Sequence[int] | None = None) -> LlamaExpertsClassifier:
    """Experts on the base and on adapters, with weights by chance."""
    plain = experts(base)
    adapted(plain.llama, layers)
    classifier = LlamaExpertsClassifier(
        *(plain.llama, plain.tokenizer, plain.labels, OWN),
        base_choices=OF_BASE,
        tfidf=plain.tfidf,
        prompt=plain.prompt,
    )
    classifier.score.weight.data.normal_(generator=torch.Generator().manual_seed(7))
    return classifier.eval()


@pytest.mark.parametrize("layers", [None, [1]])
def test_logits_are_those_of_heads_on_two_models(base: Path, layers: list[int] | None) -> None:
    classifier = make(base, layers)
    width = len(OF_BASE) * classifier.llama.config.dim
    # One model without adapters, and one in which they are merged.
    lower, upper = experts(base), experts(base)
    adapted(upper.llama, layers)
    merge_lora(upper.llama)
    expected = np.zeros((len(TEXTS), 3))
    weight = classifier.score.weight.detach()
    for model, choices, part in (
        (lower, OF_BASE, weight[:, :width]),
        (upper, OWN, weight[:, width:]),
    ):
        alone = LlamaExpertsClassifier(
            *(model.llama, model.tokenizer, model.labels, choices), prompt=model.prompt
        ).eval()
        alone.score.weight.data.copy_(part)
        expected += alone.predict_logits(TEXTS)
    assert classifier.tfidf is not None
    shown = [classifier.encode(text).text or "" for text in TEXTS]
    expected += classifier.tfidf.logits(shown)
    np.testing.assert_allclose(classifier.predict_logits(TEXTS), expected, atol=2e-3)
    with torch.no_grad():
        found = classifier.compute_logits([classifier.encode(text) for text in TEXTS])
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3)
    without = classifier.predict_logits(TEXTS[:1])
    with adapters_disabled(classifier.llama):
        assert np.abs(classifier.predict_logits(TEXTS[:1]) - without).max() > 0.1


def test_layers_below_the_adapters_run_once(base: Path) -> None:
    classifier, runs = make(base, [1]), [0, 0]
    for number, layer in enumerate(classifier.llama.layers):

        def count(*arguments: object, number: int = number) -> None:
            runs[number] += 1

        layer.register_forward_hook(count)
    classifier.predict_logits(TEXTS[:1])
    assert runs == [1, 2]


def test_it_is_read_back_and_says_what_it_reads(base: Path, tmp_path: Path) -> None:
    classifier = make(base)
    classifier.save_pretrained(tmp_path)
    content = read_description(tmp_path / "classifier.json")
    assert (content["version"], content["weights"]) == (4, "adapter")
    assert content["base_choices"] == [list(choice) for choice in OF_BASE]
    loaded = load_classifier(tmp_path, device="cpu")
    np.testing.assert_array_equal(loaded.predict_logits(TEXTS), classifier.predict_logits(TEXTS))
    assert "layer 1 mean of the base" in (tmp_path / "README.md").read_text()
    again = copy.deepcopy(loaded)
    np.testing.assert_array_equal(again.predict_logits(TEXTS), classifier.predict_logits(TEXTS))


def test_an_adapter_that_is_read_beside_its_base_cannot_be_merged(base: Path) -> None:
    with pytest.raises(MinllamaError, match="reads its base with and without the adapter"):
        merge_classifier(make(base))


def test_a_manifest_of_heads_on_the_base_needs_an_adapter(base: Path, tmp_path: Path) -> None:
    experts(base).save_pretrained(tmp_path)
    path = tmp_path / "classifier.json"
    content = read_description(path)
    for value, said in (
        ([[1, "mean"]], "base_choices are for heads beside an adapter"),
        ([[1, "sum"]], "base_choices must be a list of pairs"),
        (7, "base_choices must be a list of pairs"),
    ):
        changed = {**content, "base_choices": value}
        changed["sha256"] = {n: d for n, d in content["sha256"].items() if n != path.name}
        write_description(path, changed)
        with pytest.raises(CheckpointError, match=said):
            load_classifier(tmp_path, device="cpu")
    plain = experts(base)
    with pytest.raises(MinllamaError, match="give choices"):
        LlamaExpertsClassifier(
            *(plain.llama, plain.tokenizer, plain.labels, []), base_choices=OF_BASE
        )


def test_chunks_and_company_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "EVALUATION_TOKENS", 0)
    llama = our_model()
    alone = [
        StatesRequest(ids=ids, choices=OF_BASE) for ids in (tuple(range(1, 40)), (5, 6), (9,) * 17)
    ]
    scheduler = Scheduler(engine_for(llama))
    of_base = [scheduler.evaluate(request) for request in alone]
    while scheduler.is_busy:
        scheduler.step()
    adapted(llama)
    engine = engine_for(llama)
    whole = Scheduler(engine)
    own = [whole.evaluate(StatesRequest(ids=request.ids, choices=OWN)) for request in alone]
    while whole.is_busy:
        whole.step()
    chunked = Scheduler(engine, token_budget=7)
    both = [
        chunked.evaluate(BesideBaseRequest(ids=r.ids, choices=OWN, base_choices=OF_BASE))
        for r in alone
    ]
    # Between the chunks of one, another with adapters alone.
    other = chunked.evaluate(StatesRequest(ids=alone[2].ids, choices=OWN))
    while chunked.is_busy:
        chunked.step()
    for evaluation, base, upper in zip(both, of_base, own, strict=True):
        expected = torch.stack([*base.result, *upper.result])
        torch.testing.assert_close(torch.stack(evaluation.result), expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(
        torch.stack(other.result), torch.stack(own[2].result), atol=2e-4, rtol=0
    )


def test_adapters_are_active_again_after_an_error() -> None:
    llama = our_model()
    ids = torch.tensor([[3, 4, 5]])
    plain = llama(ids).logits
    adapted(llama)
    with torch.no_grad():
        before = llama(ids).logits
        with contextlib.suppress(KeyError), adapters_disabled(llama):
            torch.testing.assert_close(llama(ids).logits, plain)
            raise KeyError
        torch.testing.assert_close(llama(ids).logits, before)
    assert not torch.allclose(before, plain, atol=0.1)
    merge_lora(llama)
    with pytest.raises(MinllamaError, match="merged"), adapters_disabled(llama):
        pass
