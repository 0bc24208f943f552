"""Claims about texts that callers hand over: what is no text is told by its place, in one line."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from minllama.classification import base
from minllama.classification.features import extract_features
from minllama.data.task import Task
from minllama.data.texts import checked_texts
from minllama.errors import DataError
from minllama.evaluation.baselines import fit_baselines
from tests.classifier_cases import TEXTS, embedding, zero_shot
from tests.tiny_classifier import make_dataset

pd = pytest.importorskip("pandas")

WRONG = {
    "None": (None, "None (missing)"),
    "NaN": (float("nan"), "NaN (missing)"),
    "a missing value of pandas": (pd.NA, "<NA> (missing)"),
    "no time": (pd.NaT, "NaT (missing)"),
    "bytes": (b"x", "the bytes b'x'"),
    "a number": (7, "the number 7"),
    "a number of NumPy": (np.int64(7), "a int64"),
    "a truth value": (True, "True"),
    "a list": (["a"], "a list"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("make", [zero_shot, embedding])
def test_what_is_no_text_is_told_by_its_place(make, name):
    value, said = WRONG[name]
    classifier = make()
    for call in (classifier.predict, classifier.predict_proba, classifier.predict_logits):
        with pytest.raises(DataError) as caught:
            call([TEXTS[0], value])
        assert str(caught.value) == (
            f"texts[1] is {said}: not a string; give a text instead, or omit it"
        )
    with pytest.raises(DataError, match=r"is .*: not a string"):
        classifier.encode(value)


@pytest.mark.parametrize("make", [zero_shot, embedding])
def test_texts_may_come_in_anything_that_has_an_order(make):
    classifier = make()
    expected = classifier.predict(TEXTS)
    shuffled = pd.Series(TEXTS, index=[*range(len(TEXTS))][::-1])
    for texts in (tuple(TEXTS), np.array(TEXTS), shuffled, iter(TEXTS), pd.array(TEXTS)):
        assert classifier.predict(texts) == expected
    assert classifier.predict([]) == []


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("abc", "texts must be a list of strings, not the string 'abc'"),
        (b"abc", "texts must be a list of strings, not the bytes b'abc'"),
        (None, "texts must be a list of strings, not None"),
        (7, "texts must be a list of strings, not 7"),
        ({"a": "b"}, "texts must be a list of strings, not a dict"),
        ({"a"}, "texts must be a list of strings, not a set"),
        (pd.DataFrame({"a": ["b"]}), "not a table; give one of its columns"),
        (np.array([["a"]]), "texts[0] is a ndarray: not a string"),
        (np.array([b"a"]), "texts[0] is the bytes b'a': not a string"),
        (pd.Series(["a", None, "b", None]), "texts[1] is "),
        (["a", *[None] * 12], "texts[10] is None (missing) and 2 more: not a string"),
    ],
)
def test_what_is_no_list_of_texts_is_one_line(texts, message):
    with pytest.raises(DataError) as caught:
        checked_texts(texts)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_texts_that_are_encoded_in_parts_have_the_logits_of_all(monkeypatch):
    texts, done = [*TEXTS, *TEXTS[::-1]], []
    whole = embedding().predict_logits(texts)
    monkeypatch.setattr(base, "ENCODED", 4)
    found = embedding().predict_logits(texts, progress=done.append)
    assert np.allclose(found, whole, atol=1e-5)
    assert sum(done) == len(texts)
    assert len(done) >= len(texts) / 4
    assert embedding().predict_logits([]).shape == (0, whole.shape[1])


@pytest.mark.parametrize(("n_texts", "n_parts"), [(9, 2), (8, 1), (1, 1), (0, 1)])
def test_processes_with_unlike_shares_encode_as_many_parts(monkeypatch, n_texts, n_parts):
    """Of nine texts one process has five and the other four, and none may wait in a part alone."""

    class Share:
        size = 2

        def __init__(self, rank):
            self.rank = rank

        def part_of_texts(self, texts):
            return texts[self.rank :: 2]

        def advanced(self, progress, total):
            return progress

        def joined_rows(self, rows, total):
            return rows

    class Together:
        def __init__(self):
            self.sizes = []

        def evaluated(self, classifier, prompts, compute, *, progress=None):
            self.sizes.append(len(prompts))
            yield list(range(len(prompts))), torch.zeros(len(prompts), 3)

    monkeypatch.setattr(base, "ENCODED", 4)
    texts = [f"text {i}" for i in range(n_texts)]
    for rank in (0, 1):
        monkeypatch.setattr(base, "current", lambda rank=rank: Share(rank))
        classifier = embedding()
        classifier.evaluator = together = Together()
        monkeypatch.setattr(classifier, "note_shortened", lambda texts: None)
        classifier.predict_logits(texts)
        assert len(together.sizes) == n_parts
        assert sum(together.sizes) == len(texts[rank::2])


def test_every_way_in_looks_at_its_texts():
    with pytest.raises(DataError, match=r"texts\[1\] is None"):
        extract_features(embedding(), ["a", None], [(1, "last")])
    with pytest.raises(DataError, match=r"texts\[1\] is None"):
        zero_shot(score="batch").fit_prior(["a", None])
    with pytest.raises(DataError, match=r"texts\[1\] is None"):
        fit_baselines(["a", None], [0, 1], Task(2))
    data = make_dataset()
    with pytest.raises(DataError, match=rf"{data.source}: texts\[21\] is None"):
        replace(data, texts=[*data.texts[:-1], None])
