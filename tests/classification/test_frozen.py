"""Claims about products of experts: heads, weights, and what a folder keeps of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from minllama.classification import LlamaExpertsClassifier, load_classifier, save_classifier
from minllama.classification.discriminant import Discriminant, HeadKind, out_of_fold_logits
from minllama.classification.explain import explain
from minllama.classification.features import extract_features
from minllama.classification.frozen import Expert, FrozenFit, candidates, fit_frozen
from minllama.classification.label_words import label_head, label_rows, words_of_labels
from minllama.classification.products import (
    Product,
    choose_experts,
    even_product,
    log_softmax,
    weighted_product,
)
from minllama.data.task import Task
from minllama.errors import CheckpointError, MinllamaError
from minllama.evaluation.tfidf import fit_tfidf
from minllama.model.llama import load_pretrained
from minllama.tokenizer.tokenizer import Tokenizer
from tests.classifier_cases import Characters, tiny_llama, zero_shot

WORDS = {"good": ("great", "lovely", "fine"), "bad": ("awful", "poor", "broken")}
TEXTS = [f"a {w} thing {i}" for i in range(6) for words in WORDS.values() for w in words]
GOLD = [0 if any(word in text for word in WORDS["good"]) else 1 for text in TEXTS]


def gold_of(classes: np.ndarray, n: int) -> np.ndarray:
    return np.eye(n, dtype=np.bool_)[classes]


def test_discriminant_is_that_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    classes = random.integers(0, 3, 60)
    x = (random.normal(size=(60, 5)) + classes[:, None]).astype(np.float32)
    x = (x - x.mean(0)) / x.std(0)
    weight, bias = Discriminant(x, gold_of(classes, 3), Task(3)).head(HeadKind(0.0))
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(x, classes).predict_proba(x)
    ours = np.exp(log_softmax((x @ weight.T + bias).astype(np.float64)))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_an_ordinal_head_is_scikit_learn_s_discriminant_along_the_order_of_the_classes() -> None:
    random = np.random.default_rng(4)
    classes = random.integers(0, 4, 80)
    mixing = random.normal(size=(5, 5))
    x = random.normal(size=(80, 5)) @ mixing + np.outer(classes, [1, -1, 0.5, 0, 2])
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    within = x - np.stack([x[classes == c].mean(0) for c in range(4)])[classes]
    direction = np.linalg.solve(within.T @ within, x.T @ (classes - classes.mean()))
    along = x @ direction[:, None]
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(along, classes).predict_proba(along)
    fitted_head = Discriminant(x, gold_of(classes, 4), Task(4))
    weight, bias = fitted_head.head(HeadKind(0.0, is_ordinal=True))
    assert np.linalg.matrix_rank(weight, tol=1e-4) == 1
    ours = np.exp(log_softmax((x @ weight.T + bias).astype(np.float64)))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_two_classes_are_always_on_one_line() -> None:
    random = np.random.default_rng(5)
    classes = random.integers(0, 2, 50)
    x = (random.normal(size=(50, 6)) + classes[:, None]).astype(np.float32)
    found = Discriminant(x, gold_of(classes, 2), Task(2))
    plain, ordinal = (found.head(HeadKind(0.3, is_ordinal=o)) for o in (False, True))
    one, other = (log_softmax((x @ w.T + b).astype(np.float64)) for w, b in (plain, ordinal))
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_left_out_rows_are_predicted_by_other_rows() -> None:
    random = np.random.default_rng(1)
    classes, x = random.integers(0, 2, 30), random.normal(size=(30, 4)).astype(np.float32)
    gold = gold_of(classes, 2)
    folds = [np.arange(0, 30, 2), np.arange(1, 30, 2)]
    logits = out_of_fold_logits(x, gold, Task(2), folds, [HeadKind(0.4)])[HeadKind(0.4)]
    weight, bias = Discriminant(x[folds[1]], gold[folds[1]], Task(2)).head(HeadKind(0.4))
    np.testing.assert_allclose(logits[folds[0]], x[folds[0]] @ weight.T + bias, rtol=1e-5)


def test_weights_calibrate_an_overconfident_expert() -> None:
    random = np.random.default_rng(2)
    gold = random.integers(0, 2, 4000)
    logits = np.zeros((4000, 2))
    logits[np.arange(4000), np.where(random.random(4000) < 0.8, gold, 1 - gold)] = 50.0
    product = choose_experts({"sure": logits}, gold)
    assert np.exp(product.log_probs).max() == pytest.approx(0.8, abs=0.02)
    assert 50 * product.weights["sure"] == pytest.approx(np.log(4), abs=0.2)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e4])
def test_few_rows_that_are_all_told_apart_are_no_certainty(spread: float) -> None:
    gold = np.arange(36) % 2
    logits = spread * np.eye(2)[gold]
    product = choose_experts({"sure": logits, "surer": 3 * logits}, gold)
    # 1 - 2 / 38, as if two more rows were wrong, whatever the scale of the logits.
    np.testing.assert_allclose(np.exp(product.log_probs).max(1), 36 / 38, atol=1e-3)
    many = np.arange(3600) % 3
    sure = choose_experts({"sure": spread * np.eye(3)[many]}, many)
    np.testing.assert_allclose(np.exp(sure.log_probs).max(1), 3600 / 3602, atol=1e-4)


def test_an_expert_that_says_nothing_stays_small() -> None:
    product = choose_experts({"nothing": np.ones((40, 3))}, np.arange(40) % 3)
    assert product.weights == {"nothing": 1.0}
    np.testing.assert_allclose(np.exp(product.log_probs), 1 / 3)


def test_noise_is_not_chosen_beside_what_knows() -> None:
    random = np.random.default_rng(3)
    gold = random.integers(0, 3, 500)
    knows = 2 * np.eye(3)[gold] + random.normal(size=(500, 3))
    product = choose_experts({"noise": random.normal(size=(500, 3)), "knows": knows}, gold)
    assert set(product.weights) == {"knows"}
    both = weighted_product({"knows": knows, "again": knows.copy()}, gold)
    assert both.loss == pytest.approx(product.loss, abs=1e-4)


def fitted(base: Path | None = None) -> tuple[LlamaExpertsClassifier, FrozenFit]:
    """A classifier of the texts above, over a base in a folder or in memory."""
    llama: Any = tiny_llama() if base is None else load_pretrained(base, device="cpu")
    tokenizer: Any = Characters() if base is None else Tokenizer.from_pretrained(base)
    reader = LlamaExpertsClassifier(llama, tokenizer, ["good", "bad"], ())
    found = fit_frozen(reader, TEXTS, GOLD, Task(2))
    return found.classifier, found


def test_words_decide_where_layers_say_nothing() -> None:
    classifier, found = fitted()
    assert found.accuracy >= found.tfidf_accuracy - 0.05
    assert found.log_probs.shape == (len(TEXTS), 2)
    np.testing.assert_allclose(np.exp(found.log_probs).sum(1), 1, atol=1e-9)
    assert sum(found.experts.values()) == pytest.approx(1)
    # 36 rows that are told apart: 1 - 1 / 38 at most, though heads were fitted to these rows.
    assert np.exp(found.log_probs).max() < 0.9737
    assert classifier.predict_proba(TEXTS).max() < 0.9737
    assert np.mean(np.array(classifier.predict(TEXTS)) == np.where(GOLD, "bad", "good")) > 0.9


def test_few_rows_have_all_heads_alike_and_label_words_beside() -> None:
    llama, tokenizer = tiny_llama(), Characters()
    prompt = "Text: {text}\nis "
    reader = LlamaExpertsClassifier(llama, tokenizer, ["good", "bad"], (), prompt=prompt)
    found = fit_frozen(reader, TEXTS, GOLD, Task(2), label_words=["great", "poor"])
    choices = candidates(llama.config.n_layers)
    heads = [e for e in found.experts if e.choice is not None and not e.is_label_words]
    assert len({e.strength for e in heads}) <= 1
    assert not heads or {e.choice for e in heads} == set(choices)
    # The classifier is the sum of what each expert alone says, by its share.
    features, gold = extract_features(reader, TEXTS, choices), gold_of(np.array(GOLD), 2)
    rows = label_rows(reader, ["great", "poor"])
    assert rows is not None
    total = np.zeros((len(TEXTS), 2))
    for expert, share in found.experts.items():
        if expert.choice is None:
            logits = fit_tfidf(TEXTS, gold, Task(2), expert.strength).logits(TEXTS)
        else:
            x = features[expert.choice]
            head = Discriminant(x, gold, Task(2)).head(HeadKind(expert.strength))
            weight, bias = label_head(x, rows) if expert.is_label_words else head
            logits = x @ weight.T + bias
        total += share * logits
    np.testing.assert_allclose(found.classifier.predict_logits(TEXTS), total, rtol=1e-2, atol=1e-2)


def test_ordinal_heads_are_tried_where_classes_may_be_ordered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the classifier has what each expert says, by its share."""
    texts = [f"{'no ' * (i % 3)}more of thing {i}" for i in range(180)]
    gold, labels = np.arange(180) % 3, ["1", "2", "3"]
    tried: list[Expert] = []

    def chosen(experts: Any, rows: Any) -> Product[Expert]:
        tried.extend(experts)
        ordinal = next(e for e in experts if e.is_ordinal)
        weights = {ordinal: 0.5, next(iter(experts)): 0.25}
        log_probs = log_softmax(sum(w * experts[e] for e, w in weights.items()))
        return Product(weights, log_probs, -log_probs[np.arange(len(rows)), rows])

    monkeypatch.setattr("minllama.classification.frozen.choose_experts", chosen)
    reader = LlamaExpertsClassifier(tiny_llama(), Characters(), labels, ())
    found = fit_frozen(reader, texts, gold.tolist(), Task(3))
    choices = candidates(reader.llama.config.n_layers)
    assert {e.choice for e in tried if e.is_ordinal} == set(choices)
    assert any(e.is_ordinal and str(e).endswith(" ordinal") for e in found.experts)
    features = extract_features(reader, texts, choices)
    total = np.zeros((180, 3))
    for expert, share in found.experts.items():
        assert expert.choice is not None
        kind = HeadKind(expert.strength, expert.is_ordinal)
        x = features[expert.choice]
        weight, bias = Discriminant(x, gold_of(gold, 3), Task(3)).head(kind)
        total += share * (x @ weight.T + bias)
    np.testing.assert_allclose(found.classifier.predict_logits(texts), total, rtol=1e-2, atol=1e-2)
    tried.clear()
    with pytest.raises(StopIteration):  # there is none to choose
        fit_frozen(reader, texts[:120], gold[:120].tolist(), Task(3))
    assert tried
    assert not any(e.is_ordinal for e in tried), "of few rows"


def test_label_words_are_those_of_the_zero_shot_classifier() -> None:
    llama, prompt = tiny_llama(), "Text: {text}\nis "
    theirs = zero_shot(llama=llama, labels=("g", "b", "d"), prompt=prompt, score="batch")
    theirs.fit_prior(TEXTS)
    reader = LlamaExpertsClassifier(llama, Characters(), ["x", "y", "z"], (), prompt=prompt)
    rows = label_rows(reader, ["g", "b", "d"])
    assert rows is not None
    top = llama.config.n_layers, "last"
    features = extract_features(reader, TEXTS, [top])[top]
    weight, bias = label_head(features, rows)
    np.testing.assert_allclose(
        log_softmax((features @ weight.T + bias).astype(np.float64)),
        log_softmax(theirs.predict_logits(TEXTS).astype(np.float64)),
        atol=1e-4,
    )


def test_label_words_that_begin_alike_are_no_head() -> None:
    prompt = "Text: {text}\nis "
    reader = LlamaExpertsClassifier(tiny_llama(), Characters(), ["x", "y"], (), prompt=prompt)
    assert label_rows(reader, ["good", "grim"]) is None
    assert label_rows(reader, ["good", "good"]) is None
    spaced = LlamaExpertsClassifier(tiny_llama(), Characters(), ["x", "y"], (), prompt="{text}")
    assert label_rows(spaced, ["good", "bad"]) is None  # each begins with a space
    both_ways = tiny_llama(causal=False)
    reader = LlamaExpertsClassifier(both_ways, Characters(), ["x", "y"], (), prompt=prompt)
    assert label_rows(reader, ["good", "bad"]) is None


def test_label_names_are_words_or_not() -> None:
    assert words_of_labels(["not_spam", "spam"]) == {"not_spam": "not spam", "spam": "spam"}
    assert words_of_labels(["très bien", "c'est-mal"]) is not None
    assert words_of_labels(["1", "2"]) is None
    assert words_of_labels(["good", "B2"]) is None
    assert words_of_labels(["a_b", "a"]) is None
    assert words_of_labels(["very good", "very_good"]) is None  # they would be the same


def test_an_even_product_averages_heads_and_takes_the_better_alternative() -> None:
    random = np.random.default_rng(4)
    gold = random.integers(0, 3, 60)
    right = 2 * np.eye(3)[gold]
    heads = {i: (right + 2 * random.normal(size=(60, 3))) * 10.0**i for i in range(-3, 3)}
    noise = {i: random.normal(size=(60, 3)) for i in (10, 11)}
    product = even_product(heads | noise, [[list(noise), list(heads)]], gold)
    assert set(product.weights) == set(heads)
    spreads = {i: (z - z.mean(1, keepdims=True)).std() for i, z in heads.items()}
    alike = [weight * spreads[i] for i, weight in product.weights.items()]
    np.testing.assert_allclose(alike, alike[0])
    mean = sum(z / spreads[i] for i, z in heads.items())
    assert product.loss == pytest.approx(weighted_product({"": mean}, gold).loss, abs=1e-4)


def test_scheduled_logits_are_the_differentiable_ones() -> None:
    llama, tokenizer = tiny_llama(), Characters()
    n = llama.config.n_layers
    classifier = LlamaExpertsClassifier(
        llama, tokenizer, ["a", "b"], [(1, "mean"), (n, "last"), (n, "weighted-mean")]
    )
    torch.nn.init.normal_(classifier.score.weight)
    expected = classifier.compute_logits([classifier.encode(text) for text in TEXTS[:5]])
    found = classifier.predict_logits(TEXTS[:5])
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-4)


def test_a_folder_gives_the_same_logits(base: Path, tmp_path: Path) -> None:
    classifier, _ = fitted(base)
    save_classifier(classifier, tmp_path / "c")
    loaded = load_classifier(tmp_path / "c", device="cpu")
    assert isinstance(loaded, LlamaExpertsClassifier)
    assert loaded.choices == classifier.choices
    np.testing.assert_allclose(
        loaded.predict_logits(TEXTS), classifier.predict_logits(TEXTS), atol=1e-5
    )
    assert not list((tmp_path / "c").glob("*.pkl"))
    if classifier.tfidf is not None:
        (tmp_path / "c" / "vocabulary.json").write_text("[]")
        with pytest.raises(CheckpointError, match="SHA-256 differs"):
            load_classifier(tmp_path / "c")


def test_explained_words_are_those_of_the_vocabulary() -> None:
    model = fit_tfidf(TEXTS, gold_of(np.array(GOLD), 2), Task(2), 1.0)
    llama: Any = tiny_llama()
    tokenizer: Any = Characters()
    classifier = LlamaExpertsClassifier(llama, tokenizer, ["good", "bad"], (), tfidf=model)
    np.testing.assert_allclose(classifier.predict_logits(TEXTS), model.logits(TEXTS), atol=1e-5)
    text = "a great thing"
    effects = explain(classifier, text).targets[0].effects
    assert int(np.argmax(np.abs([effect or 0 for effect in effects]))) == 1


def test_a_choice_is_given_once() -> None:
    with pytest.raises(MinllamaError, match="given twice"):
        LlamaExpertsClassifier(tiny_llama(), Characters(), ["a", "b"], [(1, "mean"), (1, "mean")])
    assert candidates(2) == [
        (1, "mean"), (1, "weighted-mean"), (2, "mean"), (2, "weighted-mean"), (2, "last"),
    ]  # fmt: skip
