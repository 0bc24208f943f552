"""Features of a frozen Llama, the choice among them, heads and temperatures."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from minllama.classification.calibration import fit_temperature
from minllama.classification.features import (
    candidate_choices,
    extract_features,
    fit_head,
    select_features,
)
from minllama.data.task import Task
from tests.classifier_cases import TEXTS, embedding


def blobs(n=300, classes=3, dim=8, spread=1.0, seed=0):
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=n)
    centers = random.normal(size=(classes, dim)) * 3
    points = centers[labels] + spread * random.normal(size=(n, dim))
    return points.astype(np.float32), labels.tolist()


@pytest.mark.parametrize("limit", [1024, 60])
def test_one_pass_gives_what_the_classifier_computes_for_every_choice(limit, monkeypatch):
    monkeypatch.setattr("minllama.engine.evaluations.BATCH_TOKENS", {"cpu": limit})
    choices = [(1, "last"), (1, "mean"), (2, "mean"), (2, "weighted-mean")]
    features = extract_features(embedding(), TEXTS, choices)
    for layer, pooling in choices:
        classifier = embedding(layer=layer, pooling=pooling).eval()
        for row, text in enumerate(TEXTS):
            ids = torch.tensor([classifier.encode(text).ids])
            expected = classifier.compute_embeddings(ids)[0].detach().numpy()
            np.testing.assert_allclose(features[layer, pooling][row], expected, atol=1e-5)


def test_every_second_layer_from_a_third_on_is_a_candidate():
    assert candidate_choices(8, "mean") == [(2, "mean"), (4, "mean"), (6, "mean"), (8, "mean")]
    assert {pooling for _, pooling in candidate_choices(1)} == {"last", "mean", "weighted-mean"}


def test_the_choice_that_tells_the_classes_apart_is_found():
    good, labels = blobs()
    noise = np.random.default_rng(1).normal(size=good.shape).astype(np.float32)
    selection = select_features(
        {(2, "mean"): noise, (4, "mean"): good, (6, "last"): noise}, labels, Task(3)
    )
    assert selection.choice == (4, "mean")
    assert selection.accuracy > 0.95


def test_cross_validation_is_not_flattered_by_many_features():
    random = np.random.default_rng(0)
    noise = random.normal(size=(200, 150)).astype(np.float32)
    labels = random.integers(2, size=200).tolist()
    assert select_features({(1, "mean"): noise}, labels, Task(2)).accuracy < 0.62


@pytest.mark.parametrize("classes", [2, 3])
def test_a_head_is_the_regression_on_standardised_features(classes):
    points, labels = blobs(classes=classes, spread=4.0)
    points = points * 7 + 3
    weight, bias = fit_head(points, labels, Task(classes), penalty=0.05)
    scaler = StandardScaler()
    reference = LogisticRegression(C=1 / (0.05 * len(points)), tol=1e-8, max_iter=1000)
    reference.fit(scaler.fit_transform(points), labels)
    expected = reference.predict_proba(scaler.transform(points))
    logits = torch.from_numpy(points @ weight.T + bias)
    np.testing.assert_allclose(logits.softmax(-1), expected, atol=5e-3)


def test_a_class_without_examples_is_never_said():
    points, labels = blobs(classes=2)
    weight, bias = fit_head(points, labels, Task(4))
    assert weight.shape == (4, 8)
    assert set((points @ weight.T + bias).argmax(1)) == {0, 1}


@pytest.mark.parametrize("sets", [False, True])
def test_a_head_without_a_bias_says_the_same(sets):
    points, labels = blobs(classes=3, spread=2.0)
    points = np.concatenate([points + 3, np.full((len(points), 1), 20, dtype=np.float32)], axis=1)
    points[:, -1] += np.random.default_rng(0).normal(size=len(points))
    if sets:  # 4 has every text, 3 has none
        labels = [(label, 4) if label else (4,) for label in labels]
    task = Task(5, multi_label=sets)
    weight, bias = fit_head(points, labels, task)
    alone, none = fit_head(points, labels, task, bias=False)
    assert bias.any()
    assert not none.any()
    expected, found = points @ weight.T + bias, points @ alone.T
    if sets:
        assert ((found >= 0) == (expected >= 0)).all(1).mean() > 0.98
    else:
        assert (found.argmax(1) == expected.argmax(1)).mean() > 0.98
    assert (found[:, 3] < -10).all()  # of which there are no examples


def test_several_labels_have_a_regression_each():
    points, labels = blobs(classes=3)
    sets = [(label, 3) if label else () for label in labels]  # 0 never, 3 with 1 and with 2
    weight, bias = fit_head(points, sets, Task(5, multi_label=True))
    chosen = points @ weight.T + bias >= 0
    expected = np.array([[c in labels_ for c in range(5)] for labels_ in sets])
    assert (chosen == expected).all(1).mean() > 0.95


def test_balanced_classes_weigh_alike():
    points, labels = blobs(n=400, classes=2, spread=6.0)
    keep = [i for i, label in enumerate(labels) if label == 0 or i % 12 == 0]
    points, labels = points[keep], [labels[i] for i in keep]
    shares = []
    for balanced in (False, True):
        weight, bias = fit_head(points, labels, Task(2, balanced=balanced))
        shares.append(((points @ weight.T + bias).argmax(1) == 1).mean())
    assert shares[1] > shares[0] * 1.5


def test_the_temperature_undoes_a_known_sharpening():
    random = np.random.default_rng(0)
    logits = random.normal(size=(20_000, 4)) * 2
    p = torch.from_numpy(logits).softmax(-1).numpy()
    labels = [int(random.choice(4, p=row)) for row in p]
    found = fit_temperature((logits * 3).astype(np.float32), labels)
    assert found == pytest.approx(3, rel=0.05)


def test_the_temperature_of_several_labels():
    random = np.random.default_rng(0)
    logits = random.normal(size=(20_000, 3)) * 2
    drawn = random.random(logits.shape) < 1 / (1 + np.exp(-logits))
    labels = [tuple(np.flatnonzero(row)) for row in drawn]
    found = fit_temperature((logits * 0.25).astype(np.float32), labels, multi_label=True)
    assert found == pytest.approx(0.25, rel=0.05)


def test_a_handful_of_right_rows_is_no_certainty():
    logits = np.eye(4, dtype=np.float32) * 3
    found = fit_temperature(logits, [0, 1, 2, 3])
    assert 0.4 < found < 0.95
    assert fit_temperature(np.tile(logits, (250, 1)), [0, 1, 2, 3] * 250) < found / 1.5


def test_an_only_row_is_compared_with_nothing():
    features = {(1, "mean"): np.ones((1, 4), dtype=np.float32)}
    selection = select_features(features, [(0,)], Task(2, multi_label=True))
    assert selection.choice == (1, "mean")
