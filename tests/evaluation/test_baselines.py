"""Baselines: known scores on real data, literal shares, and data that leaves little to learn."""

import sys

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline, make_union

from minllama.data.task import Task
from minllama.errors import MinllamaError
from minllama.evaluation.baselines import fit_baselines

TEXTS = ["a good film", "very good", "a bad film", "so bad", "bad bad thing", "good thing"]
LABELS = [2, 2, 0, 0, 0, 2]  # class 1 has no text
WORDS = (
    ("bad", "awful", "poor", "film", "the"),
    ("film", "the", "a", "thing", "plot", "so", "seen", "actor", "good", "bad"),
    ("good", "great", "fine", "film", "the"),
)
# A seed, and the C that scikit-learn chooses for its texts.
NOISY = ((0, 1.0), (2, 3.0), (3, 10.0), (6, 30.0))


def read(path):
    """Texts and labels of a file of `label ||| text` lines."""
    rows = [line.split(" ||| ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    return [text for _, text in rows], [int(label) for label, _ in rows]


def accuracy(baseline, texts, labels):
    return (baseline.predict_proba(texts).argmax(1) == labels).mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "classes", "majority", "least"),
    [("sst", 5, 279 / 1101, 0.395), ("cfimdb", 2, 123 / 245, 0.925)],
)
def test_real_data_gives_the_known_accuracies(shared_data, name, classes, majority, least):
    texts, labels = read(shared_data / f"{name}-dev.txt")
    first, second = fit_baselines(*read(shared_data / f"{name}-train.txt"), Task(classes))
    assert accuracy(first, texts, labels) == pytest.approx(majority)
    assert least <= accuracy(second, texts, labels) <= least + 0.03


def test_the_majority_class_is_predicted_with_its_share():
    majority, _ = fit_baselines(TEXTS, [0, 1, 1, 1, 1, 2], Task(4))
    probabilities = majority.predict_proba(["anything", ""])
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, [[1 / 6, 4 / 6, 1 / 6, 0]] * 2, rtol=1e-6)


def reference(inverse_penalty=3.0):
    """The baseline as a pipeline of scikit-learn."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    characters = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2
    )
    regression = LogisticRegression(C=inverse_penalty, tol=1e-8, max_iter=1000)
    return make_pipeline(make_union(words, characters), regression)


def test_regression_on_few_rows_finds_the_optimum():
    _, tfidf = fit_baselines(TEXTS, LABELS, Task(3))
    unseen = ["good and bad", "no word of these", *TEXTS]
    probabilities = tfidf.predict_proba(unseen)
    assert probabilities.dtype == np.float32
    expected = reference().fit(TEXTS, LABELS).predict_proba(unseen)
    np.testing.assert_allclose(probabilities[:, [0, 2]], expected, atol=5e-3)
    assert not probabilities[:, 1].any()


@pytest.mark.parametrize(("seed", "chosen"), NOISY)
def test_many_rows_choose_the_penalty_by_cross_validation(seed, chosen):
    random = np.random.default_rng(seed)
    labels = [int(label) for label in 2 * random.integers(0, 2, 240)]
    texts = [
        " ".join(random.choice(WORDS[label if random.random() > 0.8 else 1], 6)) for label in labels
    ]
    parts = np.empty(240, dtype=int)
    parts[np.random.default_rng(0).permutation(240)] = np.arange(240) % 3  # the task's seed
    penalties = {"logisticregression__C": [1.0, 3.0, 10.0, 30.0]}
    search = GridSearchCV(reference(), penalties, cv=PredefinedSplit(parts)).fit(texts, labels)
    assert search.best_params_ == {"logisticregression__C": chosen}
    _, tfidf = fit_baselines(texts, labels, Task(3))
    unseen = ["good and bad", "no word of these", *texts]
    probabilities = tfidf.predict_proba(unseen)
    np.testing.assert_allclose(probabilities[:, [0, 2]], search.predict_proba(unseen), atol=2e-2)
    assert not probabilities[:, 1].any()


def test_each_label_has_a_regression_of_its_own():
    # `good`, `film` and `text` (always there), and one that never is.
    labels = [(0, 1, 2), (0, 2), (1, 2), (2,), (2,), (0, 2)]
    majority, tfidf = fit_baselines(TEXTS, labels, Task(4, multi_label=True))
    np.testing.assert_allclose(majority.predict_proba([""]), [[0.5, 1 / 3, 1, 0]], rtol=1e-6)
    probabilities = tfidf.predict_proba(TEXTS)
    assert (probabilities[:, 2] == 1).all()
    assert not probabilities[:, 3].any()
    for i in range(2):
        gold = [i in row for row in labels]
        assert ((probabilities[:, i] > probabilities[:, i].mean()) == gold).all()


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("times", [1, 300])
@pytest.mark.parametrize(
    "texts",
    [
        pytest.param(["", "!!", "🦙 🦙", "…"], id="no words"),
        pytest.param(["word"] * 4, id="one word"),
        pytest.param(["\ud800", "\x00", "مرحبا بالعالم", "你好 世界"], id="odd scripts"),
    ],
)
def test_texts_that_tell_nothing_still_give_probabilities(texts, times, multi_label):
    labels = [(0,), (1,), (), (1, 0)] if multi_label else [0, 1, 1, 1]
    for baseline in fit_baselines(texts * times, labels * times, Task(2, multi_label)):
        probabilities = baseline.predict_proba(["new text", *texts])
        assert probabilities.shape == (5, 2)
        if not multi_label:
            np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize(("texts", "labels"), [(["one text"], [1]), (TEXTS, [1] * 6)])
def test_of_one_class_only_that_class_is_predicted(texts, labels):
    for baseline in fit_baselines(texts, labels, Task(3)):
        assert baseline.predict_proba(["some text"]).tolist() == [[0, 1, 0]]


def test_no_texts_give_no_probabilities_and_cannot_be_fitted():
    for baseline in fit_baselines(TEXTS, LABELS, Task(3)):
        assert baseline.predict_proba([]).shape == (0, 3)
    with pytest.raises(MinllamaError, match="there are no training texts"):
        fit_baselines([], [], Task(3))


def test_a_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MinllamaError, match=r"minllama\[train\]"):
        fit_baselines(TEXTS, LABELS, Task(3))


def test_the_same_seed_gives_the_same_numbers():
    first, again = (fit_baselines(TEXTS, LABELS, Task(3, seed=5))[1] for _ in range(2))
    np.testing.assert_array_equal(first.predict_proba(TEXTS), again.predict_proba(TEXTS))
