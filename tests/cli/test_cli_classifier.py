"""The commands train, evaluate, classify and merge: what they print, and what they refuse."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minllama import cli
from minllama.classification import load_classifier
from tests.experiment_cases import examples, names_in, write_labelled


class Result:
    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def run(capfd, monkeypatch):
    """Call the command line in this process."""

    def call(*args, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as ended:
            cli.main([str(arg) for arg in args])
        captured = capfd.readouterr()
        return Result(ended.value.code, captured.out, captured.err)

    return call


def refused(result, *parts):
    """The last line on stderr says why, nothing is on stdout, status 2, no traceback."""
    assert result.status == 2, result.err
    assert result.out == ""
    assert result.err.count("minllama: ") == 1
    line = result.err.splitlines()[-1]
    assert line.startswith("minllama: ")
    for part in parts:
        assert part in line
    return True


@pytest.fixture(scope="module")
def trained(base, labelled_files, tmp_path_factory):
    """A classifier with an adapter, and one of label words."""
    folder = tmp_path_factory.mktemp("classifiers")
    sources = ("--train", labelled_files / "train.txt", "--dev", labelled_files / "dev.txt")
    common = (*sources, "-m", base, "--device", "cpu", "--dtype", "float32")
    for name, options in {
        "lora": ("--method", "lora", "--epochs", 1),
        "words": ("--method", "zero-shot", "--score", "pmi"),
    }.items():
        with pytest.raises(SystemExit) as ended:
            cli.main([str(arg) for arg in ("train", *common, *options, "-o", folder / name)])
        assert ended.value.code == 0
    return folder


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("".join(f"{text}\n" for _, text in examples(9, seed=4)))
    return path


def test_train_prints_a_summary_and_says_what_it_does(run, base, labelled_files, tmp_path):
    test = write_labelled(tmp_path / "test.txt", [("bad", text) for _, text in examples(4, 7)])
    result = run(
        "train", "--train", labelled_files / "train.txt", "--test", test, "-m", base,
        "--method", "frozen", "--device", "cpu", "-o", tmp_path / "run",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert result.out.startswith("dev: Right on ")
    assert "TF-IDF + logistic regression" in result.out
    assert "test" not in result.out  # all its labels are one: an accuracy would say nothing
    assert "no --dev: 2 of 24 rows of" in result.err
    assert "is it a placeholder?" in result.err
    assert re.search(r"(layer \d [a-z-]+|TF-IDF) x [\d.e-]+.*: accuracy", result.err)
    assert result.err.endswith(
        f"wrote {tmp_path / 'run'}: the classifier, report.html, metrics.json, predictions.jsonl\n"
    )
    assert "\x1b" not in result.out + result.err
    assert all(len(line) <= 80 for line in result.out.splitlines())


WRONG = {
    "layer": (("--method", "frozen", "--layer", "abc"), "layer must be an integer, all or auto"),
    "no such layer": (("--method", "frozen", "--layer", "999"), "layer must be 1 to 2"),
    "shots": (("--method", "zero-shot", "--shots", "99"), "99 examples were requested, but"),
    "prompt": (("--method", "zero-shot", "--prompt", "none"), "{text} exactly once"),
    "max-len": (("--method", "zero-shot", "--max-len", "4"), "tokens without any text"),
    "words": (("--method", "zero-shot", "--label-words", "a"), "1 words (a) for 2 labels"),
    "device": (
        ("--method", "frozen", "--device", "foo"),
        "device 'foo' is not usable on this machine",
    ),
    "model": (("--method", "frozen", "-m", "./nowhere"), "no such file or folder"),
    "output": (("--method", "frozen", "-o", ""), "--output is empty"),
    "resume": (("--resume",), "no checkpoint to resume from"),
    "both": (("--resume", "--force"), "give one of them"),
    "idle": (
        ("--train", "is never read", "--method", "frozen", "--label-words", "a,b", "--r", "8"),
        "--method frozen does not use --label-words (for --method zero-shot or",
    ),
    "one class": (
        ("--train", "one.txt", "--dev", "one.txt"),
        "a classifier needs examples of at least two classes",
    ),
    "no rows": (("--train", "empty.txt"), ": no rows"),
    "no text": (("--train", "blank.txt"), "line 1: the text is empty"),
    "two files": (
        ("--train", "a.txt", "--train", "b.txt"),
        "--train takes one source, but is given 2 times; put the rows into one file",
    ),
    "full in halves": (
        ("--method", "full", "--dtype", "bfloat16"),
        "full training takes steps too small for bfloat16; omit --dtype",
    ),
    "numbers in dev": (("--dev", "numbers.txt"), "--label-names FILE sets the names"),
}


@pytest.mark.parametrize("case", WRONG)
def test_train_refuses_what_cannot_work(run, base, labelled_files, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    write_labelled(tmp_path / "one.txt", [("a", "x"), ("a", "y")])
    write_labelled(tmp_path / "blank.txt", [("a", ""), ("b", "y")])
    write_labelled(tmp_path / "numbers.txt", [(7, "x"), (8, "y")])
    (tmp_path / "empty.txt").touch()
    train, dev = labelled_files / "train.txt", labelled_files / "dev.txt"
    options, message = WRONG[case]
    given = {"--train": train, "--dev": dev, "-m": base, "-o": "run"}
    usual = [word for pair in given.items() if pair[0] not in options for word in pair]
    assert refused(run("train", *usual, *options), message)
    assert not (tmp_path / "run").exists()


def test_evaluate_prints_and_writes_a_report(run, trained, labelled_files, tmp_path):
    dev, folder = labelled_files / "dev.txt", tmp_path / "report"
    result = run("evaluate", trained / "words", "--data", dev, "-o", folder)
    assert result.status == 0, result.err
    assert "[label words, score pmi, " in result.err
    assert names_in(folder) == {"report.html", "metrics.json", "predictions.jsonl"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert "score pmi" in metrics["settings"]["run"]["computed by"]
    for written in (folder, trained / "words"):
        lines = (written / "predictions.jsonl").read_text().splitlines()
        assert {json.loads(line)["score"] for line in lines} == {"pmi"}
    assert '"score"' not in (trained / "lora" / "predictions.jsonl").read_text()
    again = json.loads((trained / "words" / "metrics.json").read_text())["splits"]["dev"]
    assert metrics["splits"]["data"]["evaluation"] == again["evaluation"]
    assert refused(
        run("evaluate", trained / "words", "--data", dev, "-o", folder), "--force replaces them"
    )
    assert run("evaluate", trained / "words", "--data", dev, "-o", folder, "--force").status == 0


def test_evaluate_finds_out_before_the_work_what_it_could_not_write(run, labelled_files, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/below"):
        result = run("evaluate", "is never read", "--data", "nor this", "-o", tmp_path / place)
        assert refused(result, "cannot write")
    assert names_in(tmp_path) == {"file"}


def test_merge_leaves_the_base_alone(run, base, trained, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    before = names_in(tmp_path / "base")
    result = run(
        *("merge", trained / "lora", tmp_path / "base"),
        *("--base", tmp_path / "base", "--force"),
    )
    assert refused(result, "contains the base model")
    assert names_in(tmp_path / "base") == before


@pytest.mark.parametrize("command", ["train", "evaluate", "merge"])
def test_the_folder_that_one_stands_in_is_refused_before_the_work(
    run, tmp_path, monkeypatch, command
):
    here = tmp_path / "here" / "below"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    arguments = {
        "train": ("--train", "is never read", "--output"),
        "evaluate": ("is never read", "--data", "is never read", "--output"),
        "merge": ("is never read",),
    }[command]
    for folder in (".", "..", here):
        result = run(command, *arguments, folder, "--force")
        assert refused(result, f"cannot write the folder {folder}: ", "is the current directory")
    assert Path.cwd() == here


def test_evaluate_reads_numbers_and_names_those_that_it_cannot(run, trained, tmp_path, monkeypatch):
    def tables(result):
        assert result.status == 0, result.err
        return result.out.partition("\n")[2]

    monkeypatch.chdir(tmp_path)
    numbers = [(int(label == "good"), text) for label, text in examples(6, seed=3)]
    named = write_labelled(Path("named.txt"), examples(6, seed=3))
    as_numbers = write_labelled(Path("numbers.txt"), numbers)
    first = run("evaluate", trained / "lora", "--data", named)
    second = run("evaluate", trained / "lora", "--data", as_numbers)
    assert tables(first) == tables(second)
    ones = write_labelled(Path("ones.txt"), [(number + 1, text) for number, text in numbers])
    result = run("evaluate", trained / "lora", "--data", ones)
    assert refused(result, "label '2' is not one of 'bad', 'good'", "--label-names FILE")
    (tmp_path / "other.json").write_text('["bad", "good"]')
    result = run(
        "evaluate", trained / "lora", "--data", ones, "--label-names", tmp_path / "other.json"
    )
    assert refused(result, "label '2' is not one of 'bad', 'good'")
    assert "--label-names" not in result.err  # it is given
    (tmp_path / "names.json").write_text('{"bad": 1, "good": 2}')
    third = run(
        "evaluate", trained / "lora", "--data", ones, "--label-names", tmp_path / "names.json"
    )
    assert tables(third) == tables(first)
    assert refused(run("evaluate", trained / "lora", "--data", tmp_path / "no"), "no such file")
    seed = run("evaluate", trained / "lora", "--data", named, "--seed", "-1")
    assert refused(seed, "--seed")


def test_evaluate_says_that_labels_may_be_placeholders(run, trained, tmp_path):
    data = write_labelled(tmp_path / "data.txt", [("bad", text) for _, text in examples(4, seed=3)])
    result = run("evaluate", trained / "lora", "--data", data, "-o", tmp_path / "report")
    assert result.status == 0, result.err
    notice = f"{data}: every row has the label 'bad'; is it a placeholder? accuracy"
    assert notice in result.err
    (note,) = json.loads((tmp_path / "report" / "metrics.json").read_text())["notes"]
    assert note.startswith(notice)
    write_labelled(data, [(-1, text) for _, text in examples(4, seed=3)])
    assert refused(run("evaluate", trained / "lora", "--data", data), "label -1 means no label")


def test_classify_prints_labels_of_texts(run, trained):
    result = run("classify", trained / "lora", "--text", "a fine film")
    assert result.status == 0, result.err
    p = load_classifier(trained / "lora", device="cpu").predict_proba(["a fine film"])[0]
    expected = sorted(zip(("bad ", "good"), p, strict=True), key=lambda pair: -pair[1])
    assert result.out == "".join(f"{label}  {value:.3f}\n" for label, value in expected)
    assert result.err.startswith("[head on layer ")
    both = run("classify", trained / "lora", "--text", "a fine film", "--text", "no", "--json")
    records = [json.loads(line) for line in both.out.splitlines()]
    assert [record["text"] for record in records] == ["a fine film", "no"]
    assert records[0]["probabilities"]["bad"] == pytest.approx(p[0], abs=1e-4)


def test_classify_by_words_alone_names_its_score(run, base, rows, tmp_path):
    words = ("--labels", "bad, so so,good", "-m", base, "--device", "cpu")
    result = run("classify", *words, "--text", "fine", "--score", "token-mean")
    assert result.status == 0, result.err
    assert sum(float(line.split()[-1]) for line in result.out.splitlines()) == pytest.approx(1)
    assert "score token-mean" in result.err
    assert (
        '"Is {text} it?"' in run("classify", *words, "--text", "a", "--prompt", "Is {text} it?").err
    )
    options = ("--label-words", "poor,medium,great", "--score", "batch", "-i", rows)
    result = run("classify", *words, *options)
    records = [json.loads(line) for line in result.out.splitlines()]
    assert len(records) == 9
    assert {record["score"] for record in records} == {"batch"}
    assert list(records[0]["probabilities"]) == ["bad", "so so", "good"]
    result = run("classify", *words, *options, "--output-format", "labelled")
    assert result.err.endswith("classified 9 texts, score batch\n")


CONTRADICTIONS = {
    "nothing": ((), "give either texts with --text or a file"),
    "texts and file": (("--text", "a", "-i", "rows.txt"), "either texts with --text"),
    "no classifier": (("--text", "a"), "give either a CLASSIFIER or --labels"),
    "one label": (("--labels", "a", "--text", "a"), "only one label"),
    "the same label": (("--labels", "a, a", "--text", "a"), "is given twice"),
    "empty label": (("--labels", "a,,b", "--text", "a"), "must not be blank"),
    "a quote": (("--labels", 'a,"b', "--text", "a"), "a quote is not closed"),
    "labels twice": (
        ("--labels", "a,b", "--labels-file", "x", "--text", "a"),
        "exclude each other; give one",
    ),
    "no labels file": (("--labels-file", "nowhere", "--text", "a"), "No such file"),
    "base": (("--labels", "a,b", "--base", "x", "--text", "a"), "--labels, use --model"),
    "batch": (
        ("--labels", "a,b", "--score", "batch", "-i", "-"),
        "estimates the prior from the texts of a file",
    ),
    "output": (("--labels", "a,b", "--text", "a", "-o", "x"), "--output is for --input"),
    "blank": (("--labels", "a,b", "--text", " "), "--text: the text is empty"),
    "one of them blank": (("--labels", "a,b", "--text", "a", "--text", ""), "--text number 2: the"),
    "half a character": (("--labels", "a,b", "--text", "a\udce9"), "a lone surrogate"),
    "resume to a terminal": (
        ("--labels", "a,b", "-i", "rows.txt", "--resume"),
        "--output file in JSON",
    ),
    "resume labelled": (
        ("--labels", "a,b", "-i", "r", "-o", "x.txt", "--resume"),
        "file in JSON Lines",
    ),
    "both": (("--labels", "a,b", "-i", "r", "-o", "x", "--resume", "--force"), "give one of them"),
    "a folder": (("--labels", "a,b", "-i", "rows.txt", "-o", "."), "labeled with a CLASSIFIER"),
    "rows without a file": (
        ("--labels", "a,b", "--text", "a", "--text-column", "b", "--force"),
        "--force, --text-column: only for the rows of --input",
    ),
    "resume of a text": (
        ("--labels", "a,b", "--text", "a", "--resume"),
        "--resume: only for the rows",
    ),
    "json of rows": (("--labels", "a,b", "-i", "rows.txt", "--json"), "--json: only for --text"),
    "a correction of nothing": (
        ("--labels", "a,b", "--text", "a", "--prior-strength", "0.5"),
        "--prior-strength: only for --score pmi, contextual, batch",
    ),
    "there already": (("--labels", "a,b", "-i", "rows.txt", "-o", "old"), "old exists"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_classify_refuses_what_contradicts_itself(run, base, rows, monkeypatch, case):
    monkeypatch.chdir(rows.parent)
    (rows.parent / "old").touch()
    options, message = CONTRADICTIONS[case]
    assert refused(run("classify", "-m", base, *options), message)
    assert rows.read_text().count("\n") == 9


def test_a_classifier_has_its_own_model_and_prompt(run, trained, base):
    for options in (("--prompt", "{text}!"), ("--score", "pmi"), ("-m", base), ("--chat",)):
        assert refused(
            run("classify", trained / "lora", "--text", "a", *options),
            "determined by the CLASSIFIER",
            options[0][:2],
        )


def test_labelled_output_is_read_back_as_data(run, trained, rows, tmp_path):
    output = tmp_path / "out" / "labels.txt"
    assert run("classify", trained / "lora", "-i", rows, "-o", output).status == 0
    result = run("evaluate", trained / "lora", "--data", output)
    assert "Right on 9 of 9 texts." in " ".join(result.out.split())


def test_bad_rows_are_refused_before_the_output_is_touched(run, trained, tmp_path):
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"text": "fine"}\n{"text": ""}\n{"text": "dull"}\nnonsense\n')
    output.write_text("mine")
    common = ("classify", trained / "lora", "-i", rows, "-o", output, "--force")
    assert refused(run(*common), "2 bad rows", "line 2", "--skip-bad-rows")
    assert output.read_text() == "mine"
    result = run(*common, "--skip-bad-rows")
    assert [json.loads(line)["index"] for line in output.read_text().splitlines()] == [0, 2]
    assert "bad rows skipped: 2 (line 2: the text is empty; line 4: " in result.err
    assert result.err.endswith("classified 2 texts\n")


@pytest.mark.parametrize("name", ["itself", "symbolic link", "hard link"])
@pytest.mark.parametrize("option", ["--force", "--resume"])
def test_the_input_is_not_written_over(run, base, rows, monkeypatch, name, option):
    monkeypatch.chdir(rows.parent)
    before, output = rows.read_bytes(), rows.parent / name
    if name == "itself":
        output = "./rows.txt"
    elif name == "symbolic link":
        output.symlink_to(rows)
    else:
        output.hardlink_to(rows)
    to = ("-o", output, option, "--output-format", "jsonl")
    result = run("classify", "-m", base, "--labels", "a,b", "-i", "rows.txt", *to)
    assert refused(result, f"{output} is also the --input; name another file for --output")
    assert rows.read_bytes() == before


def test_the_file_behind_a_standard_stream_is_not_written_over(base, rows):
    before = rows.read_bytes()
    start = [sys.executable, "-m", "minllama", "classify", "-m", str(base), "--labels", "a,b"]
    for arguments in (["-i", "-", "-o", str(rows), "--force"], ["-i", str(rows)]):
        with rows.open("rb") as read, rows.open("ab") as appended:
            done = subprocess.run(
                [*start, *arguments], stdin=read, stdout=appended, stderr=subprocess.PIPE, text=True
            )
        assert done.returncode == 2
        assert "is also the --input" in done.stderr
    assert rows.read_bytes() == before


@pytest.mark.parametrize("kept", ["all", "id", "id, when", "nosuch"])
def test_columns_are_carried_along_where_they_are_wanted(run, trained, tmp_path, kept):
    path = tmp_path / "rows.csv"
    path.write_text("id,text,when\nA17,a fine film,2020\nB9,a dull one,\n")
    given = ("classify", trained / "lora", "-i", path, "--keep-columns", kept)
    result = run(*given)
    if kept == "nosuch":
        assert refused(result, "rows.csv: no column 'nosuch' to keep; there are 'id', 'text'")
        return
    assert result.status == 0, result.err
    found = [json.loads(line)["columns"] for line in result.out.splitlines()]
    names = ("id", "when") if kept != "id" else ("id",)
    assert [row["id"] for row in found] == ["A17", "B9"]
    assert all(tuple(row) == names for row in found)
    plain = run(*given[:-2])
    assert all("columns" not in json.loads(line) for line in plain.out.splitlines())
    assert refused(run(*given, "--output-format", "labelled"), "needs column names or all")


@pytest.mark.parametrize("method", ["frozen", "lora"])
def test_texts_that_are_read_in_part_are_told_of(run, base, labelled_files, tmp_path, method):
    rows = [
        (label, text + " and so on" * (20 if number < 3 else 0))
        for number, (label, text) in enumerate(examples(24, seed=0))
    ]
    train, folder = write_labelled(tmp_path / "train.txt", rows), tmp_path / "run"
    sources = ("--train", train, "--dev", labelled_files / "dev.txt")
    options = ("--method", method, "--max-len", 40, "--device", "cpu", "-o", folder)
    result = run("train", *sources, "-m", base, *options)
    assert result.status == 0, result.err
    said = "3 different texts did not fit into 40 tokens with the prompt, and were read without"
    assert f"{train}: {said} their end\n" in result.err
    notes = json.loads((folder / "metrics.json").read_text())["notes"]
    assert f"{train}: {said} their end" in notes
    long = "it went on " * 30
    for given in (("--text", long), ("-i", "-")):
        result = run("classify", folder, *given, stdin=f"{long}\nshort\n".encode())
        assert "1 different text did not fit into 40 tokens" in result.err
    assert "did not fit" not in run("classify", folder, "--text", "short").err
    assert said in run("evaluate", folder, "--data", train).err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--score", "pmi", "--prompt", "{text}", "--text", "x"), "not '{text}'"),
        (
            ("--score", "contextual", "--prompt", "{text}", "--text", "x"),
            "needs a prompt with words around the text",
        ),
        (("--score", "batch", "-i", "empty.txt"), "empty.txt: no rows; give a file"),
    ],
)
def test_scores_that_cannot_be_had_say_why(run, base, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    assert refused(run("classify", "-m", base, "--labels", "a,b", *options), message)


def test_labels_may_hold_commas_and_come_from_a_file(run, base, tmp_path):
    (tmp_path / "names.txt").write_text("very good\nbad, awful\n")
    words = ("-m", base, "--device", "cpu", "--text", "ab", "--json")
    said = [
        json.loads(run("classify", *words, *labels).out)["probabilities"]
        for labels in (
            ("--labels", 'very good,"bad, awful"'),
            ("--labels", '["very good", "bad, awful"]'),
            ("--labels-file", str(tmp_path / "names.txt")),
            ("--labels", "x,y", "--label-words", '{"y": "bad, awful", "x": "very good"}'),
        )
    ]
    assert [list(p) for p in said] == [["very good", "bad, awful"]] * 3 + [["x", "y"]]
    assert all(list(p.values()) == list(said[0].values()) for p in said)
    (tmp_path / "names.txt").write_text("déçu\nravi\n", encoding="cp1252")
    result = run(
        "classify", *words, "--labels-file", tmp_path / "names.txt", "--encoding", "cp1252"
    )
    assert list(json.loads(result.out)["probabilities"]) == ["déçu", "ravi"]
    result = run("classify", *words, "--labels", "good,Good")
    assert "'good', 'Good' are different labels that differ only in case" in result.err


def test_a_column_for_each_label_trains_and_measures(run, base, tmp_path):
    rows = "".join(f"{'ab'[i % 2]}{'cd'[i // 2 % 2]} {i},{i % 2},{i // 2 % 2}\n" for i in range(24))
    data = tmp_path / "x.csv"
    data.write_text('text,"b, B",d\n' + rows)
    out = str(tmp_path / "out")
    columns = ("--label-columns", 'd,"b, B"')
    train = ("--train", str(data), "-o", out, "-m", base, "--device", "cpu", "--method", "frozen")
    assert run("train", *train, *columns).status == 0
    assert json.loads((tmp_path / "out" / "classifier.json").read_text())["labels"] == ["d", "b, B"]
    assert run("evaluate", out, "--data", str(data), *columns).status == 0
    assert refused(run("evaluate", out, "--data", str(data)), "with --label-columns")


def test_a_prompt_of_a_head_may_name_the_labels(run, base, labelled_files, tmp_path):
    options = ("--method", "frozen", "--prompt", "{text} ({labels}?)", "--device", "cpu")
    train = ("--train", labelled_files / "train.txt", "--dev", labelled_files / "dev.txt")
    result = run("train", *train, "-m", base, *options, "-o", tmp_path / "run")
    assert result.status == 0, result.err
    loaded = load_classifier(tmp_path / "run", device="cpu")
    assert loaded.tokenizer.decode(loaded.encode("x").ids).endswith("x (bad, good?)")


def test_the_report_says_what_was_chosen(run, base, labelled_files, tmp_path):
    train = ("--train", labelled_files / "train.txt", "--dev", labelled_files / "dev.txt")
    options = ("--method", "frozen", "--class-weights", "balanced", "--device", "cpu")
    result = run("train", *train, "-m", base, *options, "-o", tmp_path / "run")
    assert result.status == 0, result.err
    settings = json.loads((tmp_path / "run" / "metrics.json").read_text())["settings"]
    loaded = load_classifier(tmp_path / "run", device="cpu")
    chosen = settings["chosen"]
    assert (chosen["layers"], chosen["TF-IDF"]) == (loaded.n_layers, loaded.tfidf is not None)
    assert chosen["heads"] == [f"layer {layer} {pooling}" for layer, pooling in loaded.choices]
    assert chosen["temperature"] == pytest.approx(loaded.temperature, rel=1e-3)
    assert settings["training"] == {"seed": 0, "class_weights": "balanced"}


@pytest.mark.parametrize("source", ["file", "-"])
def test_resume_goes_on_behind_a_cut_line(run, trained, rows, tmp_path, source):
    uncut, output = tmp_path / "uncut.jsonl", tmp_path / "out.jsonl"
    text = rows.read_bytes()
    from_source = ("-i", rows if source == "file" else "-")
    common = ("classify", trained / "lora", *from_source)
    assert run(*common, "-o", uncut, stdin=text).status == 0
    whole = uncut.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1, len(whole)):
        output.write_bytes(whole[:cut])
        result = run(*common, "-o", output, "--resume", stdin=text)
        assert result.status == 0, result.err
        assert output.read_bytes() == whole, cut
    assert result.err.endswith("classified 0 texts\n")
    output.write_bytes(whole[: len(whole) // 2])
    other = "".join(f"{text}\n" for _, text in examples(9, seed=5))
    rows.write_text(other)
    result = run(*common, "-o", output, "--resume", stdin=other.encode())
    assert refused(result, "no such row with that text")
    assert output.read_bytes() == whole[: len(whole) // 2]


def test_resume_refuses_another_classifier(run, trained, rows, tmp_path):
    output = tmp_path / "out.jsonl"
    assert run("classify", trained / "lora", "-i", rows, "-o", output).status == 0
    before = output.read_bytes()
    # Its labels are the same, and its probabilities not far off.
    result = run("classify", trained / "words", "-i", rows, "-o", output, "--resume")
    assert refused(result, "give the run's original classifier")
    assert output.read_bytes() == before


def test_labels_of_any_kind_are_printed_on_one_line_each(run, base, tmp_path):
    labels = ("a,b", "c | d", "e\nf", "שלום", "😀👍🏽", "\x1b[31mred", "x\u202ey", "-")
    with (tmp_path / "train.jsonl").open("w") as file:
        for i in range(3 * len(labels)):
            row = {"label": labels[i % len(labels)], "text": f"k{i % len(labels)} {i}"}
            print(json.dumps(row), file=file)
    options = ("-m", base, "--method", "frozen", "--device", "cpu", "-o", tmp_path / "run")
    result = run("train", "--train", tmp_path / "train.jsonl", *options)
    assert result.status == 0, result.err
    result = run("classify", tmp_path / "run", "--text", "k1")
    assert len(result.out.splitlines()) == len(labels)
    assert "\x1b" not in result.out
    assert "\u202e" not in result.out
    result = run("classify", tmp_path / "run", "-i", tmp_path / "train.jsonl", "--output-format",
                 "labelled")  # fmt: skip
    assert refused(result, r"the label 'e\nf' cannot be written in lines")
    result = run("evaluate", tmp_path / "run", "--data", tmp_path / "train.jsonl")
    assert result.status == 0, result.err


def test_merge_writes_a_folder_that_needs_no_base(run, trained, rows, tmp_path):
    result = run("merge", trained / "lora", tmp_path / "merged")
    assert result.status == 0, result.err
    drift = re.search(r"the largest drift of a logit is ([\d.e-]+)\n", result.err)
    assert 0 <= float(drift[1]) < 1e-3
    assert "model.safetensors" in names_in(tmp_path / "merged")
    assert not any("adapter" in name for name in names_in(tmp_path / "merged"))
    content = json.loads((tmp_path / "merged" / "classifier.json").read_text())
    assert content["base"]["model"] is None
    assert content["training"]["merged from"] == str(trained / "lora")
    assert content["training"]["classifier"]["method"] == "lora"
    assert content["training"]["largest drift of a logit"] == float(drift[1])
    for name in ("metrics.json", "report.html", "predictions.jsonl", "metrics.jsonl"):
        assert (tmp_path / "merged" / name).read_bytes() == (trained / "lora" / name).read_bytes()
    card = (tmp_path / "merged" / "README.md").read_text()
    measured = (trained / "lora" / "README.md").read_text().partition("## Evaluation")[2]
    assert measured.partition("##")[0] in card
    texts = rows.read_text().splitlines()
    one, other = (load_classifier(f, device="cpu") for f in (trained / "lora", tmp_path / "merged"))
    assert one.predict(texts) == other.predict(texts)
    np.testing.assert_allclose(one.predict_proba(texts), other.predict_proba(texts), atol=1e-4)
    assert refused(run("merge", trained / "lora", tmp_path / "merged"), "--force replaces it")
    measured = run("evaluate", tmp_path / "merged", "--data", rows, "--base", "nowhere")
    assert refused(measured, "needs no base; omit --base nowhere")
    assert run("merge", trained / "lora", tmp_path / "merged", "--force").status == 0
    unmeasured = tmp_path / "unmeasured"
    load_classifier(trained / "lora", device="cpu").save_pretrained(unmeasured)
    assert run("merge", unmeasured, tmp_path / "merged", "--force").status == 0
    assert not names_in(tmp_path / "merged") & {"metrics.json", "report.html", "metrics.jsonl"}
    (unmeasured / "metrics.json").write_text('{"splits": 1}')
    assert refused(run("merge", unmeasured, tmp_path / "x"), "metrics.json: damaged")
    assert refused(run("merge", trained / "words", tmp_path / "x"), "no adapter to merge")
    assert refused(run("merge", trained / "lora", ""), "DST is empty")
    assert not (tmp_path / "x").exists()
