"""`minllama classify --explain`: for people, in JSON lines and in tables, resumed as others are."""

import csv
import io
import json

import pandas as pd
import pytest
from rich.console import Console

from minllama.classification.explain import Explanation, TargetEffects
from minllama.cli.explained import grouped_notice, print_explanation
from tests.experiment_cases import examples

TEXT = "the film was good"


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows([i, text] for i, (_, text) in enumerate(examples(9, seed=4)))
    return path


def probability(classify, text, label):
    status, out, err = classify("--text", text, "--json")
    assert status == 0, err
    return json.loads(out)["probabilities"][label]


def test_json_has_the_effect_of_each_word(classify):
    status, out, err = classify("--text", TEXT, "--json", "--explain")
    assert status == 0, err
    record = json.loads(out)
    explanation = record["explanation"]
    assert list(record) == [
        *("index", "text", "label", "probabilities", "score", "explanation", "classifier")
    ]
    assert [word["text"] for word in explanation["words"]] == TEXT.split()
    (target,) = explanation["targets"]
    assert target["label"] == record["label"]
    assert target["probability"] == pytest.approx(
        record["probabilities"][record["label"]], abs=1e-5
    )
    for effect, rest in zip(
        target["effects"],
        ["film was good", "the was good", "the film good", "the film was"],
        strict=True,
    ):
        q = probability(classify, rest, record["label"])
        assert effect == pytest.approx(record["probabilities"][record["label"]] - q, abs=1e-5)


def test_people_get_the_strongest_words_with_signs(classify):
    status, out, err = classify("--text", TEXT, "--explain")
    assert status == 0, err
    _, plain, _ = classify("--text", TEXT)
    assert out.startswith(plain)
    title, *lines = out.removeprefix(plain).splitlines()
    label = plain.split()[0]
    assert title == f"p({label}) minus that without each word:"
    assert sorted(line.split()[1] for line in lines) == sorted(TEXT.split())
    assert all(line.split()[0][0] in "+-" for line in lines)
    sizes = [abs(float(line.split()[0])) for line in lines]
    assert sizes == sorted(sizes, reverse=True)
    assert "\x1b" not in out


def shown(explanation, predicted=(), **options):
    stream = io.StringIO()
    console = Console(file=stream, width=80, highlight=False, **options)
    print_explanation(explanation, list(predicted), console=console)
    return stream.getvalue()


def made(*targets, text="not a\x1bgood one", unit="probability", **fields):
    spans = ((0, 3), (4, 5), (6, 10), (11, 14))
    fields = {"n_words": 4, "n_unread": 0, "max_words": 100, **fields}
    return Explanation(text, spans, targets, unit, **fields)


def test_a_terminal_shows_the_text_in_colors():
    explanation = made(TargetEffects("bad\n", 0.7, (0.5, 0.0, -0.25, None)))
    out = shown(explanation, force_terminal=True, color_system="truecolor")
    title, text, *lines = out.splitlines()
    assert title == "\x1b[2mp(bad ) minus that without each word:\x1b[0m"
    assert text == (
        "\x1b[30;48;2;74;147;240mnot\x1b[0m a\N{REPLACEMENT CHARACTER}"
        "\x1b[30;48;2;255;186;107mgood\x1b[0m one"
    )
    assert lines == ["  +0.500  not", "  -0.250  good"]
    text = shown(explanation, force_terminal=True, color_system="standard").splitlines()[1]
    assert text.startswith("\x1b[30;106mnot\x1b[0m")
    assert "\x1b[30;103mgood\x1b[0m" in text
    for plain in ({}, {"force_terminal": True, "color_system": "truecolor", "no_color": True}):
        assert "good one" not in shown(explanation, **plain)


def test_markup_in_a_text_is_text():
    explanation = made(TargetEffects("[red]", 0.7, (0.1, 0, 0, 0)), text="[b] [/] [x] [y]"[:14])
    assert shown(explanation).splitlines() == [
        "p([red]) minus that without each word:",
        "  +0.100  [b]",
    ]


def test_of_several_labels_the_predicted_ones_are_shown_or_the_likeliest():
    targets = [TargetEffects(name, p, (p, 0, 0, 0)) for name, p in (("a", 0.2), ("b", 0.4))]
    explanation = made(*targets)
    assert shown(explanation).startswith("p(b) minus")
    assert shown(explanation, ["a", "b"]).count("minus that") == 2
    assert shown(explanation, ["a"]).startswith("p(a) minus")


def test_numbers_and_words_without_effect():
    explanation = made(TargetEffects("stars", 3.0, (123456.7, -0.00001234, 0, 0)), unit="value")
    assert shown(explanation).splitlines() == [
        "the value minus that without each word:",
        "  +1.235e+05  not",
        "  -1.234e-05  a",
    ]
    explanation = made(TargetEffects("stars", 3.0, (0.0, 0, 0, None)), unit="value")
    assert shown(explanation).splitlines()[1:] == ["  no word changes it"]


def test_grouped_words_are_reported(classify):
    assert grouped_notice(made(n_words=4)) is None
    status, out, err = classify("--text", TEXT, "--explain", "--max-words", 2)
    assert status == 0, err
    assert "explanation: 4 words in 2 groups; --max-words changes that\n" in err
    assert "the film" in out


def records_of(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    reader = {
        ".csv": pd.read_csv,
        ".tsv": lambda name: pd.read_csv(name, sep="\t"),
        ".parquet": pd.read_parquet,
    }[path.suffix]
    records = reader(path).to_dict("records")
    return [record | {"explanation": json.loads(record["explanation"])} for record in records]


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.tsv", "out.parquet"])
def test_files_have_an_explanation_of_each_row_and_can_be_resumed(classify, rows, tmp_path, name):
    status, _, err = classify("-i", rows, "-o", name, "--explain", "--keep-columns", "id")
    assert status == 0, err
    records = records_of(tmp_path / name)
    assert len(records) == 9
    for record in records:
        words = [word["text"] for word in record["explanation"]["words"]]
        assert words == record["text"].split()
        assert len(record["explanation"]["targets"][0]["effects"]) == len(words)
    whole = (tmp_path / name).read_bytes()
    if name != "out.parquet":
        cut = whole[: whole.index(records[6]["text"].encode()) + 3]
        (tmp_path / name).write_bytes(cut)
    again = ("-i", rows, "-o", name, "--keep-columns", "id", "--resume")
    for options in ((), ("--explain", "--max-words", 50)):
        status, _, err = classify(*again, *options)
        assert status == 2
        assert "give the run's original --explain and --max-words" in err
    status, _, err = classify(*again, "--explain")
    assert status == 0, err
    assert records_of(tmp_path / name) == records


def test_a_file_without_explanations_is_not_continued_with_them(classify, rows, tmp_path):
    for name in ("out.jsonl", "out.csv"):
        assert classify("-i", rows, "-o", name)[0] == 0
        status, _, err = classify("-i", rows, "-o", name, "--resume", "--explain")
        assert status == 2
        assert "give the run's original --explain and --max-words" in err


def test_piped_texts_are_explained(classify):
    status, out, err = classify("-i", "-", "--explain", stdin=b"good film\nbad\n")
    assert status == 0, err
    records = [json.loads(line) for line in out.splitlines()]
    assert [len(r["explanation"]["words"]) for r in records] == [2, 1]


def test_options_that_cannot_apply_are_refused(classify, rows):
    for options, said in (
        (("-i", rows, "--explain", "--output-format", "labelled"), "--explain: lines of"),
        (("-i", rows, "-o", "x.txt", "--explain"), "--explain: lines of"),
        (("--text", "a", "--max-words", 5), "--max-words: only with --explain"),
        (("--text", "a", "--explain", "--max-words", 0), "max_words must be"),
    ):
        status, out, err = classify(*options)
        assert (status, out) == (2, "")
        assert said in err.splitlines()[-1]
