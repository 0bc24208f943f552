"""Claims about TF-IDF: terms and values are scikit-learn's, and models predict unseen folds."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from minllama.data.task import Task
from minllama.evaluation import tfidf
from minllama.evaluation.tfidf import Vocabulary, counted, fit_tfidf, out_of_fold_logits

TEXTS = ["Hello there, ab a c-d", "the cat sat on the mat mat", "hello cat 12 été naïve I"]


def test_terms_and_values_are_those_of_scikit_learn() -> None:
    counts = counted(TEXTS)
    vocabulary = Vocabulary.of(counts)
    ours = vocabulary.matrix(counts).toarray()
    theirs = {
        "": TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        "#": TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2),
    }
    n_terms = 0
    for mark, vectorizer in theirs.items():
        expected = vectorizer.fit_transform(TEXTS).toarray()
        names = [mark + name for name in vectorizer.get_feature_names_out()]
        n_terms += len(names)
        columns = [vocabulary.index[name] for name in names]
        np.testing.assert_allclose(ours[:, columns], expected, atol=1e-6)
    assert n_terms == len(vocabulary.index)


def test_logits_of_a_text_are_those_of_the_matrix() -> None:
    gold = np.eye(3, dtype=np.bool_)
    model = fit_tfidf(TEXTS, gold, Task(3), 10.0)
    expected = model.vocabulary.matrix(counted(TEXTS)) @ model.weight + model.bias
    np.testing.assert_allclose(model.logits(TEXTS), expected, atol=1e-5)
    assert (model.logits(TEXTS).argmax(1) == [0, 1, 2]).all()
    np.testing.assert_allclose(model.logits(["", "zzz"]), [model.bias, model.bias])


def test_a_fold_is_predicted_by_what_was_not_fitted_to_it() -> None:
    texts = ["red apple", "red pear", "blue sea", "blue sky", "purple"] * 4
    gold = np.array([[i % 5 < 2, i % 5 >= 2] for i in range(20)])
    folds = [np.arange(start, 20, 5) for start in range(5)]
    logits = out_of_fold_logits(texts, gold, Task(2), folds, (10.0,))[10.0]
    train = np.setdiff1d(np.arange(20), folds[4])
    alone = fit_tfidf([texts[i] for i in train], gold[train], Task(2), 10.0)
    np.testing.assert_allclose(logits[folds[4]], alone.logits(["purple"] * 4), atol=1e-2)


def test_many_texts_are_counted_again_in_each_pass_and_fitted_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [f"{'a fine' if i % 2 else 'one dull'} film, number {i % 7}" for i in range(60)]
    gold = np.eye(2, dtype=np.bool_)[np.arange(60) % 2]
    kept = fit_tfidf(texts, gold, Task(2), 3.0)
    monkeypatch.setattr(tfidf, "KEPT_COUNTS", 10)
    assert not isinstance(counted(texts), list)
    again = fit_tfidf(texts, gold, Task(2), 3.0)
    assert again.vocabulary.index == kept.vocabulary.index
    np.testing.assert_array_equal(again.weight, kept.weight)
    np.testing.assert_array_equal(again.logits(texts), kept.logits(texts))


def test_of_too_many_texts_some_are_drawn() -> None:
    texts = [f"word{i} again" for i in range(50)]
    gold = np.eye(2, dtype=np.bool_)[np.arange(50) % 2]

    def words(seed: int) -> set[str]:
        model = fit_tfidf(texts, gold, Task(2, seed=seed), 3.0, most=20)
        return {term for term in model.vocabulary.index if term[0] == "w" and " " not in term}

    assert len(words(0)) == 20
    assert words(0) == words(0) != words(1)
