"""The layer search: which layers remain, and that it changes no feature."""

import numpy as np
import pytest

from minllama.classification import layer_search
from minllama.classification.features import extract_features, right_in_cross_validation
from minllama.classification.layer_search import remaining_layers, searched_features
from minllama.data.task import Task
from tests.classification.test_features import blobs
from tests.classifier_cases import TEXTS, embedding


def layers_with(*spreads):
    """Features of layers 2, 4, 6 and so on, which tell the classes the worse the wider they are."""
    features = {}
    for place, spread in enumerate(spreads):
        points, labels = blobs(400, spread=spread)
        features[2 * place + 2, "mean"] = points
        features[2 * place + 2, "last"] = np.random.default_rng(place).normal(size=points.shape)
    return features, labels


@pytest.mark.parametrize(
    ("spreads", "good", "remaining"),
    [
        ((9.0, 1.0, 1.0, 1.0, 1.0, 1.0), 4, [2, 4, 6]),  # as good from the second on
        ((9.0, 9.0, 1.0, 9.0, 9.0, 9.0), 6, [4, 6, 8]),
        ((9.0, 9.0, 9.0, 9.0, 9.0, 1.0), 12, [10, 12]),
        ((1.0, 1.0, 1.0), 2, [2, 4]),
    ],
)
def test_the_shallowest_of_the_good_layers_and_its_neighbors_remain(spreads, good, remaining):
    features, labels = layers_with(*spreads)
    assert remaining_layers(features, labels, Task(3)) == (good, remaining)


@pytest.mark.parametrize(
    ("lost", "won", "good"),
    [
        (0, 0, 2),
        # Of 400 texts, a mean of 1/400 with a standard error of sqrt(3/400 - (1/400)^2) / 20: 0.58
        (2, 1, 2),
        (4, 1, 4),  # 3/400 and sqrt(5/400 - (3/400)^2) / 20: 1.35 of them
        (1, 2, 2),  # the shallow one is the best itself
    ],
)
def test_a_layer_is_as_good_up_to_one_standard_error_of_the_difference(
    lost, won, good, monkeypatch
):
    best, shallow = np.arange(400) < 200, np.arange(400) < 200
    shallow[:lost] = False
    shallow[300 : 300 + won] = True
    rights = {(2, "mean"): shallow, (4, "mean"): best}
    monkeypatch.setattr(layer_search, "right_in_cross_validation", lambda *args, **kind: rights)
    assert remaining_layers({}, [], Task(2))[0] == good


def test_right_answers_are_those_of_texts_that_the_head_has_not_seen():
    random = np.random.default_rng(0)
    noise = random.normal(size=(200, 150)).astype(np.float32)
    labels = random.integers(2, size=200).tolist()
    (right,) = right_in_cross_validation({(1, "mean"): noise}, labels, Task(2)).values()
    assert right.shape == (120,)  # three of five folds
    assert 0.35 < right.mean() < 0.65


def test_searched_features_are_those_of_the_remaining_layers(monkeypatch):
    monkeypatch.setattr(layer_search, "SEARCH_TEXTS", 3)
    monkeypatch.setattr(layer_search, "remaining_layers", lambda *args, **kind: (1, [1]))
    choices = [(0, "mean"), (1, "last"), (1, "mean"), (2, "mean")]
    texts, labels = [*TEXTS, *(text[::-1] for text in TEXTS)], [0, 1] * len(TEXTS)
    said, done = [], []
    features = searched_features(
        embedding(), texts, labels, choices, Task(2), progress=done.append, report=said.append
    )
    expected = extract_features(embedding(), texts, choices)
    assert set(features) == {(1, "last"), (1, "mean")}
    for choice, rows in features.items():
        np.testing.assert_allclose(rows, expected[choice], atol=1e-5)
    assert sum(done) == len(texts)
    assert said == [
        "after 3 texts no layer was clearly better than layer 1: continuing with layers 1"
    ]


@pytest.mark.parametrize(
    ("rows", "choices", "kind"),
    [
        (1000, [(1, "mean"), (2, "mean")], {}),
        (1, [(2, "mean")], {}),
        (1, [(1, "mean"), (2, "mean")], {"multi_label": True}),
        (1, [(1, "mean"), (2, "mean")], {"balanced": True}),
    ],
    ids=["few texts", "one layer", "several labels", "balanced"],
)
def test_when_layers_are_not_searched(rows, choices, kind, monkeypatch):
    monkeypatch.setattr(layer_search, "SEARCH_TEXTS", rows)
    monkeypatch.setattr(layer_search, "remaining_layers", None)
    features = searched_features(embedding(), TEXTS, [0] * len(TEXTS), choices, Task(2, **kind))
    assert set(features) == set(choices)
