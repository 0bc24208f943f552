"""Thresholds and comparisons on the command line: chosen, kept, said, overridden, compared."""

import json
import random
import shutil

import numpy as np
import pytest
import sklearn.metrics

from minllama import cli
from minllama.classification import load_classifier
from minllama.data import load_dataset
from tests.cli.test_cli_classifier import refused, run  # noqa: F401  (a fixture)
from tests.experiment_cases import examples, write_labelled

KINDS = ("late", "broken", "rude")


def several(n, seed):
    """Rows of texts with any number of labels."""
    draw, rows = random.Random(seed), []
    for i in range(n):
        labels = [kind for kind in KINDS if draw.random() < 0.4]
        text = " ".join([*labels, draw.choice(["box", "lamp", "chair"]), f"{seed}x{i}"])
        rows.append(json.dumps({"text": text, "label": labels}))
    return "\n".join(rows) + "\n"


def train(base, output, *options):
    common = ("-m", base, "--method", "frozen", "--device", "cpu", "--dtype", "float32")
    with pytest.raises(SystemExit) as ended:
        cli.main([str(arg) for arg in ("train", *common, *options, "-o", output)])
    assert ended.value.code == 0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of two classes and of several labels."""
    folder = tmp_path_factory.mktemp("data")
    write_labelled(folder / "train.txt", examples(40))
    write_labelled(folder / "dev.txt", examples(30, seed=1))
    (folder / "train.jsonl").write_text(several(40, 0))
    (folder / "dev.jsonl").write_text(several(40, 1))
    return folder


@pytest.fixture(scope="module")
def made(base, data, tmp_path_factory):
    """Classifiers: by a chosen threshold, by none, of label words, and of several labels."""
    folder = tmp_path_factory.mktemp("made")
    two = ("--train", data / "train.txt", "--dev", data / "dev.txt")
    train(base, folder / "f1", *two, "--threshold", "f1", "--positive", "bad")
    train(base, folder / "plain", *two, "--layer", 1, "--pooling", "last")
    many = ("--train", data / "train.jsonl", "--dev", data / "dev.jsonl", "--multi-label")
    train(base, folder / "many", *many, "--threshold", "f1", "--threshold", "late=0.25")
    return folder


def test_the_threshold_that_is_best_on_dev_is_kept_and_used(made, data):
    classifier = load_classifier(made / "f1")
    dev = load_dataset(data / "dev.txt", label_names=classifier.labels)
    gold = np.array(dev.labels) == classifier.labels.index("bad")
    p = classifier.predict_proba(dev.texts)[:, classifier.labels.index("bad")]
    assert classifier.positive == "bad"
    assert classifier.thresholds == {"bad": classifier.threshold}
    predicted = np.array(classifier.predict(dev.texts)) == "bad"
    np.testing.assert_array_equal(predicted, p >= np.float32(classifier.threshold))
    best = max(sklearn.metrics.f1_score(gold, p >= cut) for cut in p)
    assert sklearn.metrics.f1_score(gold, predicted) == pytest.approx(best)
    metrics = json.loads((made / "f1" / "metrics.json").read_text())
    evaluation = metrics["splits"]["dev"]["evaluation"]
    bad = evaluation["per_class"][classifier.labels.index("bad")]
    assert bad["f1"] == pytest.approx(best)
    assert bad["threshold"] == classifier.threshold
    assert evaluation["positive"] == "bad"
    assert evaluation["roc_auc"] == pytest.approx(sklearn.metrics.roc_auc_score(gold, p))
    assert sum(map(sum, evaluation["confusion"])) == 30
    assert metrics["thresholds"]["values"] == {"bad": classifier.threshold}
    assert metrics["thresholds"]["how"] == f"f1 on {data / 'dev.txt'}"
    assert any("thresholds were chosen on dev (f1)" in note for note in metrics["notes"])
    lines = (made / "f1" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["predicted"] == "bad" for line in lines] == predicted.tolist()
    said = f"threshold {classifier.threshold:g} for 'bad' (f1 on {data / 'dev.txt'})"
    assert said in (made / "f1" / "README.md").read_text()
    assert "ROC AUC" in (made / "f1" / "report.html").read_text()


def test_a_verdict_is_written_everywhere(made):
    metrics = json.loads((made / "plain" / "metrics.json").read_text())["splits"]["dev"]
    assert metrics["verdict"].startswith("Right on ")
    assert "paired 95% interval" in metrics["verdict"]
    assert set(metrics["paired"]) == {"majority class", "TF-IDF + logistic regression"}
    for name, paired in metrics["paired"].items():
        own, other = metrics["evaluation"]["accuracy"], metrics["others"][name]["accuracy"]
        assert paired["differences"]["accuracy"]["difference"] == pytest.approx(own - other)
        assert paired["only_first_right"] - paired["only_second_right"] == round(30 * (own - other))
    assert metrics["verdict"] in (made / "plain" / "README.md").read_text()


def test_without_a_threshold_nothing_changes(made, data):
    content = json.loads((made / "plain" / "classifier.json").read_text())
    assert content["version"] == 1
    assert "thresholds" not in content
    classifier = load_classifier(made / "plain")
    assert (classifier.positive, classifier.thresholds) == ("good", {"good": 0.5})
    texts = load_dataset(data / "dev.txt").texts
    p = classifier.predict_proba(texts)
    assert classifier.predict(texts) == [classifier.labels[i] for i in p.argmax(1)]


def test_python_may_set_a_threshold(made, data):
    classifier = load_classifier(made / "plain")
    texts = load_dataset(data / "dev.txt").texts
    before, digest = classifier.predict_proba(texts), classifier.digest
    cut = float(np.sort(before[:, 1])[20])
    expected = ["good" if p >= np.float32(cut) else "bad" for p in before[:, 1]]
    assert classifier.predict(texts, threshold=cut) == expected
    assert classifier.predict(texts, threshold={"good": cut}) == expected
    assert classifier.predict(texts) != expected or expected.count("good") == 10
    classifier.threshold = cut
    assert classifier.predict(texts) == expected
    np.testing.assert_array_equal(classifier.predict_proba(texts), before)
    assert classifier.digest != digest  # what it says is another's now


def test_several_labels_have_thresholds_of_their_own(made, data):
    classifier = load_classifier(made / "many")
    assert classifier.thresholds["late"] == 0.25
    assert set(classifier.thresholds) == set(KINDS)
    assert classifier.positive is None
    texts = load_dataset(data / "dev.jsonl").texts
    p = classifier.predict_proba(texts)
    ends = np.float32([classifier.thresholds[name] for name in classifier.labels])
    expected = [tuple(np.array(classifier.labels)[row >= ends]) for row in p]
    assert classifier.predict(texts) == expected
    metrics = json.loads((made / "many" / "metrics.json").read_text())
    per_class = metrics["splits"]["dev"]["evaluation"]["per_class"]
    assert {row["name"]: row["threshold"] for row in per_class} == classifier.thresholds


def test_classify_and_evaluate_go_by_the_threshold_and_an_option_overrides_it(
    run,  # noqa: F811
    made,
    data,
    tmp_path,
):
    classifier = load_classifier(made / "f1")
    dev = load_dataset(data / "dev.txt")
    (tmp_path / "texts.txt").write_text("\n".join(dev.texts) + "\n")
    p = classifier.predict_proba(dev.texts)
    outputs = {}
    for threshold in (None, "0.001", "good=0.001"):
        option = () if threshold is None else ("--threshold", threshold)
        output = tmp_path / f"{threshold}.jsonl"
        result = run("classify", made / "f1", "-i", tmp_path / "texts.txt", "-o", output, *option)
        assert result.status == 0, result.err
        outputs[threshold] = [json.loads(line) for line in output.read_text().splitlines()]
        result = run("evaluate", made / "f1", "--data", data / "dev.txt", "-o", tmp_path, *option)
        assert result.status == 0, result.err
        (tmp_path / "report.html").unlink()
        (tmp_path / "metrics.json").unlink()
        lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
        (tmp_path / "predictions.jsonl").unlink()
        said = [json.loads(line)["predicted"] for line in lines]
        assert said == [row["label"] for row in outputs[threshold]]
    assert [row["label"] for row in outputs[None]] == classifier.predict(dev.texts)
    bad = p[:, classifier.labels.index("bad")]
    assert [row["label"] == "bad" for row in outputs["0.001"]] == (bad >= 0.001).tolist()
    assert [row["label"] == "good" for row in outputs["good=0.001"]] == (bad <= 0.999).tolist()
    assert len({rows[0]["classifier"] for rows in outputs.values()}) == 3
    # What another threshold said is not gone on with.
    again = run(
        "classify", made / "f1", "-i", tmp_path / "texts.txt", "-o", tmp_path / "0.001.jsonl",
        "--resume",
    )  # fmt: skip
    assert refused(again, "this classifier predicts something else")
    text = run("classify", made / "f1", "--text", dev.texts[0], "--threshold", "0.001")
    assert text.out.count("predicted") == 1
    assert "threshold 0.001 for 'bad'" in text.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threshold", "f1"), "f1 is chosen on the dev split in training, not on"),
        (("--threshold", "2"), "threshold must be in [0, 1], not 2"),
        (("--threshold", "ugly=0.2"), "no such label or rule"),
        (("--positive", "ugly"), "'ugly' is not one of the classes"),
        (("--against", "nowhere"), "no such file or folder"),
        (("--against-base", "x"), "name it with --against"),
    ],
)
def test_evaluate_refuses_thresholds_that_cannot_be(run, made, data, options, message):  # noqa: F811
    assert refused(run("evaluate", made / "f1", "--data", data / "dev.txt", *options), message)


def test_train_refuses_thresholds_before_it_reads_a_model(run, data, tmp_path):  # noqa: F811
    three = write_labelled(tmp_path / "three.txt", [("abc"[i % 3], f"x{i}") for i in range(12)])
    result = run(
        "train", "--train", three, "-m", "nowhere", "--threshold", "f1", "-o", tmp_path / "run"
    )
    assert refused(result, "not for 3 classes")
    assert not (tmp_path / "run").exists()


def test_a_precision_out_of_reach_is_said(run, base, data, tmp_path):  # noqa: F811
    same = [("bad", f"the same {i % 3}") for i in range(30)]
    rows = [(("bad", "good")[i % 2], text) for i, (_, text) in enumerate(same)]
    dev = write_labelled(tmp_path / "dev.txt", rows)
    result = run(
        "train", "--train", data / "train.txt", "--dev", dev, "-m", base, "--method", "frozen",
        "--device", "cpu", "--threshold", "precision=0.99", "-o", tmp_path / "run",
    )  # fmt: skip
    assert result.status == 0, result.err
    (line,) = [line for line in result.err.splitlines() if "not reached" in line]
    assert "threshold of 'good': precision 0.99 is not reached on" in line
    assert "the best is 0.5" in line
    notes = json.loads((tmp_path / "run" / "metrics.json").read_text())["notes"]
    assert line in notes


def test_info_says_what_a_classifier_is(run, made):  # noqa: F811
    threshold = load_classifier(made / "f1").threshold
    result = run("info", made / "f1")
    assert result.status == 0, result.err
    assert f"threshold {threshold:g} for 'bad' (f1 on " in result.out
    assert "bad, good" in result.out
    assert "threshold 0.5 for 'good'" in run("info", made / "plain").out
    assert "any number of 3 labels" in run("info", made / "many").out


def test_merging_keeps_the_threshold_and_the_verdict(run, base, data, tmp_path):  # noqa: F811
    result = run(
        "train", "--train", data / "train.txt", "--dev", data / "dev.txt", "-m", base, "--method",
        "lora", "--epochs", 1, "--threshold", "0.375", "--metric", "macro_f1", "--device", "cpu",
        "--dtype", "float32", "-o", tmp_path / "lora",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert result.out.startswith("dev: Macro F1 ")
    assert run("merge", tmp_path / "lora", tmp_path / "merged").status == 0
    assert load_classifier(tmp_path / "merged").thresholds == {"good": 0.375}
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "threshold 0.375 for 'good'" in card
    assert "Macro F1" in card
    info = run("info", tmp_path / "merged").out
    assert "threshold 0.375 for 'good'" in info
    assert "parameters" in info  # it is a model, too


def compared(result):
    """The table of a comparison: title -> (this, other, difference)."""
    lines = result.out.split("row by row")[1].split("Of ")[0].splitlines()[1:]
    cells = [line.replace("Macro F1", "Macro-F1").replace("ROC AUC", "ROC-AUC") for line in lines]
    return {row.split()[0]: row.split()[1:4] for row in cells if row.strip()}


def test_evaluate_against_another_classifier(run, made, data, tmp_path):  # noqa: F811
    arguments = ("evaluate", made / "f1", "--data", data / "dev.txt")
    result = run(*arguments, "--against", made / "plain", "-o", tmp_path / "report")
    assert result.status == 0, result.err
    assert max(map(len, result.out.splitlines())) <= 80
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())["splits"]["data"]
    name = str(made / "plain")
    own, other = metrics["evaluation"], metrics["others"][name]
    dev = load_dataset(data / "dev.txt")
    right = []
    for folder in ("f1", "plain"):
        said = load_classifier(made / folder).predict(dev.texts)
        right.append(np.array([dev.label_names[i] for i in dev.labels]) == said)
    assert own["accuracy"] == pytest.approx(right[0].mean())
    assert other["accuracy"] == pytest.approx(right[1].mean())
    paired = metrics["paired"][name]
    assert paired["only_first_right"] == (right[0] & ~right[1]).sum()
    assert paired["only_second_right"] == (right[1] & ~right[0]).sum()
    assert other["positive"] == own["positive"] == "bad"  # whatever its own is
    table = compared(result)
    assert table["Accuracy"][:2] == [f"{own['accuracy']:.1%}", f"{other['accuracy']:.1%}"]
    assert table["AP"][:2] == [
        f"{own['average_precision']:.3f}",
        f"{other['average_precision']:.3f}",
    ]
    low, high = paired["differences"]["accuracy"]["interval"]
    assert ("chance" in result.out) == (low <= 0 <= high)
    assert "Only this" in (tmp_path / "report" / "report.html").read_text()
    assert run(*arguments, "--against", made / "plain").out == result.out


def test_evaluate_against_predictions_is_evaluate_against_their_classifier(
    run,  # noqa: F811
    made,
    data,
    tmp_path,
):
    arguments = ("evaluate", made / "plain", "--data", data / "dev.txt", "--against")
    folder = run(*arguments, made / "f1")
    (tmp_path / "texts.txt").write_text("\n".join(load_dataset(data / "dev.txt").texts) + "\n")
    run("classify", made / "f1", "-i", tmp_path / "texts.txt", "-o", tmp_path / "said.jsonl")
    run("evaluate", made / "f1", "--data", data / "dev.txt", "-o", tmp_path / "report")
    for file in (made / "f1" / "predictions.jsonl", tmp_path / "said.jsonl", tmp_path / "report"):
        result = run(*arguments, file)
        assert result.status == 0, result.err
        table = compared(result)
        assert table == compared(folder)
        assert result.out.split("\nOf ")[1] == folder.out.split("\nOf ")[1]


def test_a_base_that_has_moved_is_named(run, base, made, data, tmp_path):  # noqa: F811
    shutil.copytree(base, tmp_path / "base")
    two = ("--train", data / "train.txt", "--dev", data / "dev.txt", "--layer", 1)
    common = ("-m", tmp_path / "base", "--method", "frozen", "--device", "cpu")
    assert run("train", *common, *two, "-o", tmp_path / "other").status == 0
    (tmp_path / "base").rename(tmp_path / "moved")
    arguments = ("evaluate", made / "f1", "--data", data / "dev.txt", "--against")
    assert refused(run(*arguments, tmp_path / "other"), "name it with --against-base")
    result = run(*arguments, tmp_path / "other", "--against-base", tmp_path / "moved")
    assert result.status == 0, result.err


def test_several_labels_are_compared_by_whole_sets(run, made, data, tmp_path):  # noqa: F811
    arguments = ("evaluate", made / "many", "--data", data / "dev.jsonl")
    assert run(*arguments, "--threshold", "0.5", "-o", tmp_path / "half").status == 0
    result = run(*arguments, "--against", tmp_path / "half", "-o", tmp_path / "both")
    assert result.status == 0, result.err
    metrics = json.loads((tmp_path / "both" / "metrics.json").read_text())["splits"]["data"]
    lines = [
        (tmp_path / name / "predictions.jsonl").read_text().splitlines()
        for name in ("both", "half")
    ]
    right = [[row["label"] == row["predicted"] for row in map(json.loads, of)] for of in lines]
    only = sum(a and not b for a, b in zip(*right, strict=True))
    (paired,) = metrics["paired"].values()
    assert paired["only_first_right"] == only
    assert set(paired["differences"]) >= {"accuracy", "micro_f1", "macro_f1", "roc_auc"}
    assert paired["differences"]["roc_auc"]["difference"] == pytest.approx(0, abs=1e-5)
    assert compared(result).keys() >= {"Accuracy", "Micro", "Macro-F1", "ROC-AUC", "AP"}


def test_classes_are_matched_by_name(run, base, made, data, tmp_path):  # noqa: F811
    """The same file with its classes the other way round."""
    names = tmp_path / "names.json"
    names.write_text('["good", "bad"]')
    two = ("--train", data / "train.txt", "--dev", data / "dev.txt", "--label-names", names)
    train(base, tmp_path / "turned", *two, "--layer", 1, "--pooling", "last")
    assert load_classifier(tmp_path / "turned").labels == ("good", "bad")
    result = run(
        "evaluate", made / "plain", "--data", data / "dev.txt", "--against", tmp_path / "turned"
    )
    assert result.status == 0, result.err
    assert compared(result)["Accuracy"][2] == "0.0"


def test_what_cannot_be_compared_is_refused_in_a_line(run, made, data, tmp_path):  # noqa: F811
    arguments = ("evaluate", made / "plain", "--data", data / "dev.txt", "--against")
    assert refused(run(*arguments, made / "many"), "predicts any number of labels per text")
    lines = (made / "plain" / "predictions.jsonl").read_text().splitlines()

    def against(name, changed):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in changed))
        return run(*arguments, tmp_path / name)

    assert refused(against("short", lines[:-1]), "has predictions of 29 texts", "has 30")
    assert refused(against("order", lines[::-1]), "texts differ from those of", "from row 1 on")
    renamed = [line.replace('"good"', '"Good"') for line in lines]
    assert refused(against("names", renamed), "lacks 'good' and has 'Good'", "different classes")
    later = [*lines[:-1], lines[-1].replace('"good": 0', '"Good": 0')]
    assert refused(against("later", later), "row 30 has different classes")
    assert refused(against("text", ["no JSON"]), "line 1 is not a prediction")
    assert refused(against("none", []), "predictions of 0 texts")
    assert refused(against("null", ["null"]), "line 1 is not a prediction")
    broken = [
        json.dumps(json.loads(line) | {"probabilities": {"bad": 9, "good": 9}}) for line in lines
    ]
    assert refused(against("sums", broken), "30 of 30 rows")


def test_a_damaged_threshold_is_refused(run, made, tmp_path):  # noqa: F811
    shutil.copytree(made / "f1", tmp_path / "f1")
    path = tmp_path / "f1" / "classifier.json"
    content = json.loads(path.read_text())
    assert content["version"] == 3
    for values in ({"bad": 2}, {"ugly": 0.5}, [1], {"bad": 0.123}):
        content["thresholds"]["values"] = values
        path.write_text(json.dumps(content))
        assert refused(run("classify", tmp_path / "f1", "--text", "x"), "classifier.json")
