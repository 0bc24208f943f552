"""A classifier of few rows is fitted to the held-out ones, too, once they have measured it."""

import dataclasses
import json

import numpy as np
import pytest

from minllama.classification import load_classifier
from minllama.errors import MinllamaError
from minllama.experiment import run_experiment
from minllama.experiment.ladder import climb as climb_module
from minllama.experiment.ladder import contrastive as contrastive_module
from minllama.experiment.ladder import lora as lora_module
from minllama.experiment.ladder.choice import Choice
from minllama.experiment.ladder.lora import LoRARung
from minllama.experiment.ladder.partner import Multiplied
from minllama.experiment.ladder.product import ProductRung
from minllama.experiment.splits import load_splits
from minllama.options import DataOptions
from tests.experiment_cases import Heard, examples, write_labelled

TEXTS = ["a fine film", "dull", "great music and a slow plot"]
BEFORE = ("TF-IDF", "frozen heads")
SAYS = "in the end the classifier was fitted to all 24 rows; what is measured on the 4 held-out"


@pytest.fixture
def few(tmp_path):
    """A file of 24 rows, of which four are held out."""
    return write_labelled(tmp_path / "few.txt", examples(24))


@pytest.fixture
def choose(monkeypatch):
    """Let auto choose a rung by its title."""

    def call(title):
        fixed = lambda context, results: Choice(title, title, dict.fromkeys(results, "-"))  # noqa: E731
        monkeypatch.setattr(climb_module, "_choice", fixed)
        monkeypatch.setattr(LoRARung, "_is_worse", lambda *arguments: False)
        needed = (*BEFORE, title, *([LoRARung.title] if title == ProductRung.title else []))
        kept = [rung for rung in climb_module.RUNGS if rung.title in needed]
        monkeypatch.setattr(climb_module, "RUNGS", kept)

    return call


def sizes_given(monkeypatch, module, name):
    """The lengths of what a function gets after the model, call by call."""
    sizes, function = [], getattr(module, name)

    def noted(model, texts, *rest, **options):
        sizes.append(len(texts))
        return function(model, texts, *rest, **options)

    monkeypatch.setattr(module, name, noted)
    return sizes


@pytest.mark.parametrize(
    ("method", "title"),
    [
        ("frozen", None),
        *(("auto", title) for title in (*BEFORE, "LoRA with a head", "LoRA with label words")),
    ],
)
def test_it_is_what_all_rows_give_where_none_is_held_out(
    make_experiment, labelled_files, few, choose, method, title
):
    if title:
        choose(title)
    options = {"train": few, "ladder": {"minutes": 30} if title else {}}
    is_trained = title is not None and title not in BEFORE
    if is_trained:
        options |= {"no_calibration": True, "training": {"epochs": 2}}
    held_out, given = (
        make_experiment(method, output=output, dev=dev, dev_fraction=fraction, **options)
        for output, dev, fraction in (("a", "", 0.15), ("b", labelled_files / "dev.txt", None))
    )
    heard = Heard()
    made, reference = (
        run_experiment(held_out, reporter=heard),
        run_experiment(given, reporter=(told := Heard())),
    )
    for each in (made.classifier, load_classifier(held_out.output, device="cpu")):
        np.testing.assert_allclose(
            each.predict_proba(TEXTS), reference.classifier.predict_proba(TEXTS), atol=1e-6
        )
    assert any(line.startswith(SAYS) for line in heard.lines)
    assert not any(line.startswith("in the end") for line in told.lines)
    report = json.loads((held_out.output / "metrics.json").read_text())
    assert any(note.startswith(SAYS) for note in report["notes"])
    assert len(made.splits.dev) == 4


def test_a_product_is_made_of_what_is_fitted_to_all_rows(make_experiment, few, choose, monkeypatch):
    choose("LoRA and frozen heads")
    weighted = lambda context, scores: Multiplied(scores.copy(), 0.6, 0.4)  # noqa: E731
    monkeypatch.setattr("minllama.experiment.ladder.product.multiplied", weighted)
    trained = sizes_given(monkeypatch, lora_module, "fit")
    options = {"train": few, "dev": "", "dev_fraction": 0.15, "ladder": {"minutes": 30}}
    experiment = make_experiment("auto", **options)
    heard = Heard()
    made = run_experiment(experiment, reporter=heard).classifier
    assert trained[-6:] == [16] * 4 + [20, 24]
    assert any(line.startswith(SAYS) for line in heard.lines)
    after = load_classifier(experiment.output, device="cpu")
    np.testing.assert_array_equal(after.predict_proba(TEXTS), made.predict_proba(TEXTS))


def test_contrastive_tuning_is_done_once_more_on_all_rows(
    make_experiment, few, choose, monkeypatch
):
    choose("contrastive LoRA")
    monkeypatch.setattr(contrastive_module, "STEPS", 2)
    tuned = sizes_given(monkeypatch, contrastive_module, "tune")
    options = {"train": few, "dev": "", "dev_fraction": 0.15, "ladder": {"minutes": 30}}
    experiment = make_experiment("auto", **options)
    made = run_experiment(experiment).classifier
    assert tuned == [16] * 5 + [20, 24]
    after = load_classifier(experiment.output, device="cpu")
    np.testing.assert_array_equal(after.predict_proba(TEXTS), made.predict_proba(TEXTS))
    assert made.base_choices


@pytest.mark.parametrize("kind", ["classes", "one head", "numbers", "several labels"])
def test_dev_is_measured_with_the_classifier_before(
    make_experiment, few, tmp_path, kind, monkeypatch
):
    """Its figures are those of a run that ends there; test's baselines learn what it learns."""
    options = {"train": few, "dev": "", "dev_fraction": 0.15, "test": few}
    if kind == "one head":
        options["layer"] = "2"
    if kind == "numbers":
        rows = [(len(text) / 3, text) for _, text in examples(24)]
        rated = write_labelled(tmp_path / "numbers.txt", rows)
        options |= {"train": rated, "test": rated, "objective": "regression"}
    if kind == "several labels":
        path = tmp_path / "several.jsonl"
        lines = [{"text": text, "label": [label, "any"][: 1 + i % 2]}
                 for i, (label, text) in enumerate(examples(24))]  # fmt: skip
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        options |= {"train": path, "test": path, "data": {"multi_label": True}}

    def reported(output):
        run_experiment(make_experiment("frozen", output=output, **options))
        found = json.loads((tmp_path / output / "metrics.json").read_text())["splits"]
        return {
            (split, name): value
            for split in ("dev", "test")
            for name, value in found[split]["evaluation"].items()
            if isinstance(value, float)
        }

    refitted = reported("refitted")
    monkeypatch.setattr("minllama.experiment.splits.FEW", 0)
    before = reported("before")
    assert refitted.keys() == before.keys()
    for (split, name), value in before.items():
        if split == "dev":
            assert refitted[split, name] == pytest.approx(value, abs=1e-5), name
    assert refitted != pytest.approx(before, abs=1e-5), "test is of the other one"


def test_a_threshold_and_no_calibration_are_kept(make_experiment, few):
    options = {"train": few, "dev": "", "no_calibration": True, "pooling": "mean"}
    experiment = make_experiment("frozen", **options)
    threshold = dataclasses.replace(experiment.threshold, positive="good", threshold=("0.3",))
    experiment = dataclasses.replace(experiment, threshold=threshold)
    heard = Heard()
    made = run_experiment(experiment, reporter=heard).classifier
    assert any(line.startswith("in the end") for line in heard.lines)
    assert made.temperature == 1.0
    assert made.positive == "good"
    assert made.thresholds == {"good": 0.3}


def test_it_is_not_done_where_dev_is_given_or_rows_are_many_or_fixed(few, tmp_path, monkeypatch):
    def whole(**options):
        options = {"dev": None, **options}
        return load_splits(str(few), test=None, options=DataOptions(), seed=0, **options).whole

    assert len(whole()) == 24
    assert whole(dev=str(write_labelled(tmp_path / "dev.txt", examples(6, 1)))) is None
    assert whole(per_class=4) is None, "so many rows were asked for"
    monkeypatch.setattr("minllama.experiment.splits.FEW", 23)
    assert whole() is None


def test_it_is_not_done_when_the_time_is_up(make_experiment, few):
    experiment = make_experiment("auto", train=few, dev="", ladder={"minutes": 0.001})
    heard = Heard()
    run_experiment(experiment, reporter=heard)
    assert not any(line.startswith("in the end") for line in heard.lines)


def test_time_for_it_is_kept(make_experiment, few, monkeypatch):
    """A rung that may take all time that is left leaves so much."""
    reserved = []
    try_rung = climb_module._try

    def noted(context, rung, *rest):
        try_rung(context, rung, *rest)
        reserved.append((rung.name, context.budget.reserve, dict(context.results)))

    monkeypatch.setattr(climb_module, "_try", noted)
    run_experiment(make_experiment("auto", train=few, dev="", training={"epochs": 1}))
    before = 0.0
    for name, reserve, results in reserved:
        if name in results and (seconds := results[name].seconds_to_refit) is not None:
            assert reserve - before == pytest.approx(seconds) or not before
        before = reserve
    assert [name for name, *_ in reserved if name in ("tfidf", "frozen", "contrastive")]


def test_an_interrupted_fit_to_all_rows_is_done_when_the_run_is_resumed(
    make_experiment, few, choose, monkeypatch
):
    choose("frozen heads")
    experiment = make_experiment("auto", train=few, dev="", ladder={"minutes": 30})
    with monkeypatch.context() as patch:

        def interrupted(*arguments):
            raise KeyboardInterrupt

        patch.setattr(climb_module, "refitted", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(experiment)
    with pytest.raises(MinllamaError, match="--resume continues it"):
        run_experiment(experiment)
    heard = Heard()
    run_experiment(experiment, reporter=heard, resume=True)
    assert any(line.startswith("in the end") for line in heard.lines)
