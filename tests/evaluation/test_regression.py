"""Numbers as targets: read, split, learned, measured against scikit-learn and scipy, and stored."""

import dataclasses
import json
import math
import random

import numpy as np
import pandas
import pytest
import scipy.stats
import sklearn.linear_model
import sklearn.metrics
import torch

from minllama import load_classifier
from minllama.classification import LlamaEmbeddingClassifier
from minllama.classification.ridge import PENALTIES, fit_value_head, select_value_features
from minllama.data import load_dataset, random_split
from minllama.data.number_splits import check_number_splits
from minllama.errors import DataError, MinllamaError, OptionError
from minllama.evaluation.regression import (
    MeanBaseline,
    RidgeBaseline,
    TargetScale,
    evaluate_regression,
    ranks,
)
from minllama.evaluation.report import Report, ReportedValues
from minllama.evaluation.report.value_comparison import in_unit, verdict
from minllama.experiment import run_experiment
from minllama.options import ClassifierOptions, DataOptions, TrainingOptions
from minllama.training.losses import SquaredError
from minllama.training.trainer import fit
from tests.classification.test_transformers_folder import minllama  # noqa: F401  (a fixture)
from tests.classifier_cases import TEXTS, embedding
from tests.experiment_cases import REPORT, WORDS, names_in

# Metrics.


def noisy(n=60, seed=0):
    draw = np.random.default_rng(seed)
    targets = draw.normal(5, 2, n).round(1)  # ties, too
    return targets + draw.normal(0, 1, n).round(1), targets


def test_metrics_are_those_of_scikit_learn_and_scipy():
    p, y = noisy()
    found = evaluate_regression(p, y)
    assert found.mae == pytest.approx(sklearn.metrics.mean_absolute_error(y, p))
    assert found.rmse == pytest.approx(sklearn.metrics.root_mean_squared_error(y, p))
    assert found.r2 == pytest.approx(sklearn.metrics.r2_score(y, p))
    assert found.pearson == pytest.approx(scipy.stats.pearsonr(y, p).statistic)
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(y, p).statistic)
    np.testing.assert_array_equal(ranks(p), scipy.stats.rankdata(p))


def test_metrics_by_hand():
    found = evaluate_regression([1.0, 2.0, 4.0], [1.0, 3.0, 2.0], bootstrap=0)
    assert found.mae == pytest.approx(1.0)  # (0 + 1 + 2) / 3
    assert found.rmse == pytest.approx(math.sqrt(5 / 3))
    assert found.r2 == pytest.approx(1 - 5 / 2)
    assert found.spearman == pytest.approx(0.5)
    assert found.intervals == {}


def test_intervals_are_those_of_a_bootstrap_of_scipy():
    p, y = noisy()
    found = evaluate_regression(p, y, bootstrap=4000).intervals
    functions = {
        "mae": sklearn.metrics.mean_absolute_error,
        "rmse": sklearn.metrics.root_mean_squared_error,
        "r2": sklearn.metrics.r2_score,
        "pearson": lambda y, p: scipy.stats.pearsonr(y, p).statistic,
        "spearman": lambda y, p: scipy.stats.spearmanr(y, p).statistic,
    }
    for name, function in functions.items():
        theirs = scipy.stats.bootstrap(
            *((y, p), function),
            paired=True,
            vectorized=False,
            n_resamples=1000,
            method="percentile",
            rng=np.random.default_rng(1),
        ).confidence_interval
        width = theirs.high - theirs.low
        assert found[name] == pytest.approx((theirs.low, theirs.high), abs=0.15 * width)


def test_what_is_not_defined_is_none():
    constant = evaluate_regression([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])
    assert (constant.r2, constant.pearson, constant.spearman) == (None, None, None)
    assert set(constant.intervals) == {"mae", "rmse"}
    same = evaluate_regression([2.0, 2.0, 2.0], [1.0, 2.0, 3.0])
    assert (same.r2, same.pearson) == (0.0, None)
    assert evaluate_regression([3.0], [1.0]).mae == 2.0
    json.dumps(constant.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("p", "y", "message"),
    [
        ([], [], "no rows"),
        ([1.0], [1.0, 2.0], "do not fit"),
        ([math.nan, 1.0], [1.0, 2.0], "row 1 has a prediction"),
        ([1.0, 1.0], [1.0, math.inf], "row 2 has a target"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(p, y, message):
    with pytest.raises(MinllamaError, match=message):
        evaluate_regression(p, y)


def test_two_systems_are_compared_row_by_row():
    p, y = noisy(80)
    own = y + (p - y) * 0.9 + 0.05
    found = evaluate_regression(p, y, own=own, bootstrap=4000)
    gains = np.abs(p - y) - np.abs(own - y)
    theirs = scipy.stats.bootstrap(
        (gains,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    less, low, high = found.difference
    width = theirs.high - theirs.low
    assert less == pytest.approx(gains.mean())
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.1 * width)
    # The two intervals overlap by far, and the difference is sure all the same.
    ours = evaluate_regression(own, y)
    assert ours.intervals["mae"][1] > found.intervals["mae"][0]
    assert low > 0
    assert "less (95% interval, row by row:" in verdict(ours, {"the other": found})
    same = evaluate_regression(y + (y - p), y, own=p)
    assert "may be chance" in verdict(evaluate_regression(p, y), {"the other": same})
    worse = evaluate_regression(own, y, own=p)
    assert " more (95% interval" in verdict(evaluate_regression(p, y), {"the other": worse})


def test_a_scale_of_large_and_small_numbers_keeps_them():
    for targets in ([1.6e9, 1.6e9 + 10, 1.6e9 + 20], [1e-30, 3e-30], [-1e99, 1e99, 5e98]):
        scale = TargetScale.of(targets)
        z = scale.standardized(targets)
        assert z.mean() == pytest.approx(0, abs=1e-6)
        assert z.std() == pytest.approx(1)
        np.testing.assert_allclose(scale.values(z), targets, rtol=1e-12)
    assert TargetScale.of([3.0, 3.0]) == TargetScale(3.0, 1.0)


def test_baselines_are_the_mean_and_scikit_learns_ridge():
    texts = ["good film", "bad film", "so so", "good good", "bad"]
    targets = [5.0, 1.0, 3.0, 4.5, 1.5]
    np.testing.assert_allclose(MeanBaseline(targets).predict_values(["x", "y"]), [3.0, 3.0])
    ridge = RidgeBaseline(texts, targets)
    found = ridge.predict_values(["good", "bad", "unknown"])
    assert found[0] > found[2] > found[1]
    assert found[2] == pytest.approx(3.0, abs=0.5)
    assert RidgeBaseline(["!", "?"], [1.0, 3.0]).predict_values(["a"]).tolist() == [2.0]
    assert ridge.predict_values([]).tolist() == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00123456, "0.001235"), (3.14159, "3.142"), (123456.7, "123457"), (0.0, "0")],
)
def test_numbers_are_written_with_four_digits_that_count(value, text):
    assert in_unit(value) == text
    assert in_unit(-value) == (f"-{text}" if value else "-0")


def test_labels_that_may_be_numbers_are_mentioned(make_experiment, tmp_path):
    from tests.experiment_cases import Heard

    heard, train = Heard(), tmp_path / "a.jsonl"
    lines = [{"text": f"film {i}", "label": i % 12} for i in range(36)]
    train.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_experiment(make_experiment("frozen", train=train, dev=""), reporter=heard)
    assert any("--objective regression" in line for line in heard.lines)


# A head in closed form.


@pytest.mark.parametrize("shape", [(50, 8), (20, 40)])
def test_the_head_is_scikit_learns_ridge_chosen_by_leaving_one_out(shape):
    draw = np.random.default_rng(2)
    x = (draw.normal(size=shape) * draw.uniform(0.5, 20, shape[1]) + 3).astype(np.float32)
    y = x @ draw.normal(size=shape[1]) / 10 + draw.normal(size=shape[0]) * 2
    z = ((x - x.mean(0)) / x.std(0)).astype(np.float64)
    n = len(y)
    reference = sklearn.linear_model.RidgeCV(
        alphas=[penalty * n for penalty in PENALTIES], scoring="neg_mean_squared_error"
    ).fit(z, y)
    noise = draw.normal(size=shape).astype(np.float32)
    found = select_value_features({(1, "last"): noise, (2, "mean"): x}, y)
    assert found.choice == (2, "mean")
    assert found.penalty * n == pytest.approx(reference.alpha_)
    assert found.r2 == pytest.approx(1 + reference.best_score_ / y.var(), abs=1e-4)
    weight, bias = fit_value_head(x, y, found.penalty)
    np.testing.assert_allclose(x @ weight + bias, reference.predict(z), rtol=1e-3, atol=1e-3)


# Reading.


def rows(path, *cells):
    path.write_text("text,stars\n" + "".join(f"text {i},{c}\n" for i, c in enumerate(cells)))
    return path


def test_numbers_are_read_as_they_are_written(tmp_path):
    path = rows(tmp_path / "a.csv", "3", "-1", "4.50", " +2 ", "1e3", ".5", "007")
    data = load_dataset(path, DataOptions(label_column="stars"), numbers=True)
    assert data.targets == [3.0, -1.0, 4.5, 2.0, 1000.0, 0.5, 7.0]
    assert data.has_numbers
    assert data.label_names == []
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "a", "label": 2}\n{"text": "b", "label": 2.5}\n')
    assert load_dataset(lines, numbers=True).targets == [2.0, 2.5]
    labelled = tmp_path / "a.txt"
    labelled.write_text("-1.5 ||| a\n2 ||| b\n")
    assert load_dataset(labelled, numbers=True).targets == [-1.5, 2.0]


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("good", "is not a number"),
        ("nan", "is not a number"),
        ("inf", "is not a number"),
        ("1e999", "is not a finite number"),
        ("-1e101", "is larger than 1e"),
        ('"3,5"', "write a decimal point"),
        ('"1,000.5"', "is not a number"),
        ("1_000", "is not a number"),
        ("true", "is not a number"),
        ("12%", "is not a number"),
        ("٣", "is not a number"),
        ("", "no label"),
        ("   ", "no label"),
    ],
)
def test_what_is_no_finite_number_is_a_bad_row_with_its_place(tmp_path, cell, reason):
    path = rows(tmp_path / "a.csv", "1", cell, "3")
    options = DataOptions(label_column="stars")
    with pytest.raises(DataError, match=reason) as caught:
        load_dataset(path, options, numbers=True)
    assert "line 3" in str(caught.value)
    assert "\n" not in str(caught.value)
    skipping = dataclasses.replace(options, skip_bad_rows=True)
    assert load_dataset(path, skipping, numbers=True).targets == [1.0, 3.0]


@pytest.mark.parametrize("value", ["true", "[1]", '{"a": 1}', "1e999", "1" + "0" * 400, "NaN"])
def test_json_values_that_are_no_finite_numbers_are_bad_rows(tmp_path, value):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": ' + value + "}\n")
    with pytest.raises(DataError, match="line 2"):
        load_dataset(path, numbers=True)


@pytest.mark.parametrize(
    "option",
    [
        {"multi_label": True},
        {"label_names": "x.json"},
        {"label_columns": "a,b"},
        {"label_lists": "multi-hot"},
    ],
)
def test_options_of_classes_are_refused_where_labels_are_numbers(tmp_path, option):
    with pytest.raises(OptionError, match=next(iter(option)).replace("_", "-")):
        load_dataset(rows(tmp_path / "a.csv", "1", "2"), DataOptions(**option), numbers=True)


def test_a_part_is_set_aside_without_regard_to_numbers_and_no_text_is_on_both_sides(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"t{i % 20}", "label": i / 7}) + "\n" for i in range(40))
    )
    data = load_dataset(path, numbers=True)
    train, dev = random_split(data, 0.25, seed=3)
    assert len(set(dev.texts)) == 5
    assert not set(dev.texts) & set(train.texts)
    assert sorted([*train.targets, *dev.targets]) == sorted(data.targets)
    assert random_split(data, 0.25, seed=3)[1].texts == dev.texts
    said = [str(notice) for notice in check_number_splits(data, dev)]
    assert "conflicting numbers: 20" in said[0]
    assert "10 of 10 rows have a text" in said[1]
    with pytest.raises(DataError, match="every row has the number"):
        check_number_splits(data.select([0, 0]))


# Training.


def test_the_loss_is_the_mean_squared_error_of_standardized_targets(tmp_path):
    data = load_dataset(rows(tmp_path / "a.csv", "1", "2", "6"), numbers=True)
    loss = SquaredError(data, TargetScale.of(data.targets), device=torch.device("cpu"))
    # Mean 3, variance (4 + 1 + 9) / 3: targets are -2, -1, 3 over the root of 14 / 3.
    outputs = torch.tensor([[0.5], [0.0]], requires_grad=True)
    std = math.sqrt(14 / 3)
    expected = (0.5 - 3 / std) ** 2 + (-1 / std) ** 2
    total = loss.summed(outputs, [2, 1])
    assert float(total.detach()) == pytest.approx(expected, rel=1e-6)
    assert loss.normalizer([2, 1]) == 2.0
    total.backward()
    np.testing.assert_allclose(outputs.grad[:, 0], [2 * (0.5 - 3 / std), 2 / std], rtol=1e-6)
    assert float(loss.summed(torch.zeros(3, 1), [0, 1, 2])) == pytest.approx(3.0)
    half = loss.summed(torch.zeros(3, 1, dtype=torch.bfloat16), [0, 1, 2])
    assert half.dtype == torch.float32


def test_a_step_is_that_of_torch(tmp_path):
    data = load_dataset(rows(tmp_path / "a.csv", "10", "30", "20", "80"), numbers=True)
    scale = TargetScale.of(data.targets)
    ours = embedding(labels=["stars"], scale=scale, bias=True, pooling="mean")
    ours.llama.requires_grad_(False)
    weight, bias = ours.score.weight.detach().clone(), ours.score.bias.detach().clone()
    ids = [torch.tensor([ours.encode(text).ids]) for text in data.texts]
    x = torch.cat([ours.compute_embeddings(row) for row in ids])
    reference = torch.nn.Linear(x.shape[1], 1)
    reference.weight.data.copy_(weight)
    reference.bias.data.copy_(bias)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.0)
    targets = torch.tensor(scale.standardized(data.targets), dtype=torch.float32)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(reference(x.detach())[:, 0], targets)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    options = TrainingOptions(
        epochs=5,
        batch_size=4,
        lr=0.01,
        schedule="constant",
        warmup=0,
        clip=0,
        metric="rmse",
        autocast="off",
    )
    result = fit(ours, data, data, options)
    assert [row["loss"] for row in result.history] == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(ours.score.weight, reference.weight, rtol=1e-3, atol=1e-5)
    last = result.history[-1]
    found = evaluate_regression(ours.predict_values(data.texts), data.targets)
    assert last["dev_rmse"] == pytest.approx(found.rmse)
    assert last["dev_r2"] == pytest.approx(found.r2)
    assert last["dev_loss"] == pytest.approx((found.rmse / scale.std) ** 2)
    assert result.best_metric == pytest.approx(min(row["dev_rmse"] for row in result.history))


def test_kinds_are_not_mixed(tmp_path):
    numbers = load_dataset(rows(tmp_path / "a.csv", "1", "2"), numbers=True)
    classes = load_dataset(rows(tmp_path / "a.csv", "1", "2"))
    options = TrainingOptions(lr=0.1)
    with pytest.raises(MinllamaError, match="with --objective regression"):
        fit(embedding(labels=["1", "2"]), numbers, None, dataclasses.replace(options, metric="mae"))
    with pytest.raises(MinllamaError, match="without --objective regression"):
        fit(embedding(labels=["1"], scale=TargetScale()), classes, None, options)
    with pytest.raises(OptionError, match="metric accuracy is not for numbers"):
        fit(embedding(labels=["x"], scale=TargetScale()), numbers, None, options)
    with pytest.raises(MinllamaError, match="one output"):
        embedding(labels=["a", "b"], scale=TargetScale())
    with pytest.raises(MinllamaError, match="predicts classes, not numbers"):
        embedding().predict_values(TEXTS)


def rated(path, n, seed=0):
    """Texts whose words tell a number from 1 to 9."""
    draw, lines = random.Random(seed), []
    for i in range(n):
        good = draw.randint(0, 4)
        told = ["fine"] * good + ["awful"] * (4 - good)
        words = [*draw.sample(WORDS, 2), *told, f"{seed}x{i}"]
        draw.shuffle(words)
        lines.append({"text": " ".join(words), "rating": 1 + 2 * good})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("method", ["frozen", "lora", "full"])
def test_an_experiment_from_a_file_to_a_classifier_and_its_report(
    make_experiment, tmp_path, method
):
    train, test = rated(tmp_path / "a.jsonl", 60), rated(tmp_path / "b.jsonl", 12, seed=1)
    outcome = run_experiment(
        make_experiment(
            method, train=train, dev="", test=str(test), objective="regression", layer="2"
        )
    )
    folder = tmp_path / "run"
    assert names_in(folder) >= REPORT | {"classifier.json", "head.safetensors"}
    dev, tested = outcome.report.splits
    assert isinstance(tested, ReportedValues)
    assert (len(dev.texts), len(tested.texts)) == (6, 12)
    assert set(tested.others) == {"mean of the training rows", "TF-IDF + ridge"}
    found = json.loads((folder / "metrics.json").read_text())
    assert found["objective"] == "regression"
    evaluation = found["splits"]["test"]["evaluation"]
    assert {"mae", "rmse", "r2", "pearson", "spearman"} <= set(evaluation["intervals"])
    read = load_classifier(folder)
    assert isinstance(read, LlamaEmbeddingClassifier)
    splits = outcome.splits
    # A frozen head of few rows is fitted to the held-out ones, too.
    learned = splits.whole if method == "frozen" else splits.train
    assert read.scale == TargetScale.of(learned.targets)
    again = evaluate_regression(np.array(read.predict(tested.texts)), tested.targets)
    assert evaluation["rmse"] == pytest.approx(again.rmse, rel=1e-4)
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    of_test = [line for line in lines if line["split"] == "test"]
    assert [line["label"] for line in of_test] == tested.targets
    assert [line["predicted"] for line in of_test] == pytest.approx(tested.values.tolist())
    page = (folder / "report.html").read_text()
    for word in ("Regression report", "Spearman", "Largest errors", "<svg"):
        assert word in page
    if method != "frozen":
        assert {"dev_rmse", "dev_r2"} <= outcome.training.history[-1].keys()
        assert outcome.training.metric == "rmse"


def test_a_run_that_was_cut_goes_on_to_the_same_numbers(make_experiment, tmp_path):
    from tests.experiment_cases import Heard

    train = rated(tmp_path / "a.jsonl", 40)
    options = {"train": train, "dev": "", "objective": "regression", "layer": "2"}
    whole = run_experiment(make_experiment(output="whole", **options))
    with pytest.raises(KeyboardInterrupt):
        run_experiment(make_experiment(**options), reporter=Heard(interrupt_after=3))
    cut = run_experiment(make_experiment(**options), resume=True)
    assert cut.training.resumed_from == 3
    texts = whole.splits.dev.texts
    assert cut.classifier.predict(texts) == whole.classifier.predict(texts)


def test_the_commands_give_numbers(make_experiment, minllama, tmp_path):  # noqa: F811
    train = rated(tmp_path / "a.jsonl", 40)
    made = run_experiment(
        make_experiment("frozen", train=train, dev="", objective="regression")
    ).classifier
    folder, text = tmp_path / "run", "a fine fine film"
    (value,) = made.predict([text])
    assert type(value) is float
    found = json.loads(minllama("classify", folder, "--json", "--text", text).stdout)
    assert found["value"] == pytest.approx(value, rel=1e-3)
    assert "probabilities" not in found
    shown = minllama("classify", folder, "--text", text).stdout
    assert float(shown) == pytest.approx(value, abs=0.01)
    out = tmp_path / "out.jsonl"
    minllama("classify", folder, "-i", train, "-o", out)
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])
    minllama("classify", folder, "-i", train, "-o", out, "--resume")
    assert out.read_bytes() == whole
    minllama("classify", folder, "-i", train, "-o", tmp_path / "out.txt")
    again = load_dataset(tmp_path / "out.txt", numbers=True)
    assert again.targets == [json.loads(line)["value"] for line in whole.splitlines()]
    summary = minllama("evaluate", folder, "--data", train, "-o", tmp_path / "ev").stdout
    assert "RMSE" in summary
    assert names_in(tmp_path / "ev") == REPORT
    card = (folder / "README.md").read_text()
    assert "`rating`" in card
    assert "spearman" in card
    for ending in ("csv", "tsv"):
        table = tmp_path / f"out.{ending}"
        minllama("classify", folder, "-i", train, "-o", table)
        read = pandas.read_csv(table, sep="," if ending == "csv" else "\t")
        assert read["value"].tolist() == again.targets
        rows_of_table = table.read_bytes()
        table.write_bytes(rows_of_table[: len(rows_of_table) // 2])
        minllama("classify", folder, "-i", train, "-o", table, "--resume")
        assert table.read_bytes() == rows_of_table
    told = minllama("info", folder).stdout
    assert "a number per text" in told
    assert "threshold" not in told
    for options in (("--threshold", "0.3"), ("--positive", "good")):
        for of_command in (
            ("classify", folder, "--text", text),
            ("evaluate", folder, "--data", train),
        ):
            refused = minllama(*of_command, *options, status=2).stderr
            assert (
                f"{options[0]}: only for classes, and this classifier predicts numbers" in refused
            )
    for options in (("--headline", "brier"), ("--against", folder)):
        refused = minllama("evaluate", folder, "--data", train, *options, status=2).stderr
        assert f"{options[0]}: only for classes" in refused
    with pytest.raises(MinllamaError, match="predicts numbers; thresholds need class"):
        made.threshold = 0.3
    bad = rows(tmp_path / "bad.csv", "1", "good")
    assert "is not a number" in minllama("evaluate", folder, "--data", bad, status=2).stderr


def test_texts_without_targets_are_only_predicted(make_experiment, tmp_path):
    train = rated(tmp_path / "a.jsonl", 30)
    test = tmp_path / "test.jsonl"
    test.write_text('{"text": "fine film"}\n{"text": "awful plot"}\n')
    outcome = run_experiment(
        make_experiment("frozen", train=train, dev="", test=str(test), objective="regression")
    )
    assert outcome.report.splits[1].evaluation is None
    assert "These texts have no targets" in (tmp_path / "run" / "report.html").read_text()
    last = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["label"] is None


def test_the_page_is_whole_and_texts_are_data_in_it():
    from minllama.evaluation.report.page import render_page
    from tests.evaluation.test_report import Page

    p, y = noisy(30)
    texts = ["<script>alert(1)</script>", "word " * 2000, *(f"text {i}" for i in range(28))]
    evaluation = evaluate_regression(p, y, bootstrap=20)
    other = evaluate_regression(np.full(30, y.mean()), y, own=p, bootstrap=20)
    splits = [
        ReportedValues("dev", texts, p, y.tolist(), evaluation, {"<b>mean</b>": other}),
        ReportedValues("test", texts, p),
        ReportedValues("one", ["a"], p[:1], [2.0], evaluate_regression(p[:1], [2.0])),
    ]
    page = Page(render_page(Report(title="<i>", label_names=["stars"], splits=splits)))
    assert "script" not in page.tags
    assert "<b>mean</b>" in page.text
    assert "a number per text" in page.text
    assert "Spearman" in page.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "zero-shot", "objective": "regression"}, "needs a head"),
        ({"objective": "regression", "training": {"metric": "accuracy"}}, None),
        ({"objective": "regression", "training": {"metric": "macro_f1"}}, "not for numbers"),
        ({"objective": "head", "training": {"metric": "rmse"}}, "not for classes"),
    ],
)
def test_options_that_do_not_go_together_are_refused(make_experiment, options, message):
    if message is None:  # the default stands for that of numbers
        make_experiment(**options)
        return
    with pytest.raises(OptionError, match=message):
        make_experiment(**options)


def test_a_classifier_of_numbers_is_not_read_by_what_would_take_them_for_classes(
    make_experiment, tmp_path
):
    train = rated(tmp_path / "a.jsonl", 30)
    run_experiment(make_experiment("frozen", train=train, dev="", objective="regression"))
    path = tmp_path / "run" / "classifier.json"
    content = json.loads(path.read_text())
    assert content["version"] == 2
    for scale in ({"mean": 1.0, "std": 0.0}, {"mean": 1.0}, [1, 2], {"mean": "a", "std": 1}):
        path.write_text(json.dumps(content | {"scale": scale}))
        with pytest.raises(MinllamaError, match=r"classifier\.json"):
            load_classifier(tmp_path / "run")
    assert ClassifierOptions(objective="regression").method == "auto"
