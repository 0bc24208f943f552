"""Claims about names of classes: as the file says, the same in every format; and from people."""

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from minllama.data import load_dataset, read_labels_file
from minllama.data.class_names import class_names, class_text
from minllama.data.label_lists import joined_names, split_names
from minllama.data.label_names import names_of_option
from minllama.errors import DataError, MinllamaError, OptionError
from minllama.experiment.build import label_words_of
from minllama.options import DataOptions

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

FORMATS = ("csv", "tsv", "jsonl", "json", "parquet")


def written(folder: Path, labels: Any) -> list[Path]:
    """The same table in all formats, by pandas."""
    table = pd.DataFrame({"text": [f"text {i}" for i in range(len(labels))], "label": labels})
    paths = [folder / f"x.{ending}" for ending in FORMATS]
    table.to_csv(paths[0], index=False)
    table.to_csv(paths[1], index=False, sep="\t")
    table.to_json(paths[2], orient="records", lines=True)
    table.to_json(paths[3], orient="records")
    table.to_parquet(paths[4])
    return paths


@pytest.mark.parametrize(
    ("labels", "names", "classes"),
    [
        (["b", "a", "b"], ["a", "b"], [1, 0, 1]),
        ([True, False, True], ["false", "true"], [1, 0, 1]),
        ([4.5, 4.0, 10.0], ["4.0", "4.5", "10.0"], [1, 0, 2]),
        ([1.0, None, 0.0], ["0", "1"], [1, None, 0]),
        ([1, 0, 12], ["0", "1", "12"], [1, 0, 2]),
        ([-1.5, 0.25, -1.5], ["-1.5", "0.25"], [0, 1, 0]),
        ([-2, 3, -10], ["-10", "-2", "3"], [1, 2, 0]),
        ([0.0, -0.0, 1.0], ["0", "1"], [0, 0, 1]),
        ([2**53 + 1, 2**53, 1], ["1", str(2**53), str(2**53 + 1)], [2, 1, 0]),
        ([2**63 - 1, -(2**63), 5], [str(-(2**63)), "5", str(2**63 - 1)], [2, 0, 1]),
        (["007", "07", "7"], ["007", "07", "7"], [0, 1, 2]),
        (["1e3", "+1", "1.10"], ["+1", "1.10", "1e3"], [2, 0, 1]),
        (["true", None, "maybe"], ["maybe", "true"], [1, None, 0]),
        (["NA", "None", "nan"], ["NA", "None", "nan"], [0, 1, 2]),
        (["true", "False", "x"], ["False", "true", "x"], [1, 0, 2]),
        (pd.Series(["x", "y", "x"], dtype="category"), ["x", "y"], [0, 1, 0]),
        (pd.Series([3, 1, 3], dtype="category"), ["1", "3"], [1, 0, 1]),
        (pd.Series([True, None, False], dtype="boolean"), ["false", "true"], [1, None, 0]),
        (pd.Series([2, None, 10], dtype="Int64"), ["2", "10"], [0, None, 1]),
    ],
)
def test_the_same_table_has_the_same_labels_in_every_format(
    tmp_path: Path, labels: Any, names: list[str], classes: list[int | None]
) -> None:
    paths = written(tmp_path, labels)
    expected = [c for c in classes if c is not None]
    for path in paths:
        found = load_dataset(path, DataOptions(skip_bad_rows=True))
        assert (found.label_names, found.labels) == (names, expected), path.suffix
        # What was learned from one is known in the others, in whatever order a classifier has it.
        for other in paths:
            known = load_dataset(
                other, DataOptions(skip_bad_rows=True), label_names=[*reversed(names), "more"]
            )
            assert known.labels == [len(names) - 1 - c for c in expected], (path, other)


def test_numbers_of_32_bits_have_the_names_that_csv_has(tmp_path: Path) -> None:
    # pandas writes 0.1000000015 into JSON, which is another number.
    csv, _, _, _, parquet = written(tmp_path, pd.Series([0.1, 2.0, 0.1], dtype="float32"))
    for path in (csv, parquet):
        found = load_dataset(path)
        assert (found.label_names, found.labels) == (["0.1", "2.0"], [0, 1, 0])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("007", "007"),
        (" a ", "a"),
        ("", None),
        (None, None),
        (float("nan"), None),
        (True, "true"),
        (1.0, "1.0"),
        (4.5, "4.5"),
        (1e300, "1e+300"),
        (2**70, "1180591620717411303424"),
        (Decimal("4.50"), "4.50"),
        (datetime.date(2024, 1, 2), "2024-01-02"),
        (datetime.datetime(2024, 1, 2), "2024-01-02"),
        (datetime.datetime(2024, 1, 2, 3, 4), "2024-01-02 03:04:00"),
    ],
)
def test_a_value_is_the_text_that_csv_has_for_it(value: Any, text: str | None) -> None:
    assert class_text(value) == text


def test_spellings_of_a_number_are_one_class_where_all_are_whole() -> None:
    assert class_names(["1", "1.0", "-0", "0"])[0] == ["0", "1"]
    assert class_names(["1", "1.0", "x"]) == (["1", "x"], {"1": 0, "1.0": 0, "x": 1})
    assert class_names(["TRUE", "true", "False"])[0] == ["false", "true"]
    assert class_names(["007", "7"])[0] == ["007", "7"]


def rows(path: Path, *labels: Any) -> Path:
    lines = (json.dumps({"text": f"text {i}", "label": label}) for i, label in enumerate(labels))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_number_is_no_code_and_a_code_is_no_place(tmp_path: Path) -> None:
    path = rows(tmp_path / "x.jsonl", 1)
    with pytest.raises(DataError, match=r"label 1 is not one of '007', '08'"):
        load_dataset(path, label_names=["007", "08"])
    with pytest.raises(DataError, match=r"'7' \(1 row\), '007' are .* how a number is written"):
        load_dataset(rows(path, 7), label_names=["007", "08"])
    with pytest.raises(DataError, match="label '01' is not one of 'bad', 'good'"):
        load_dataset(rows(path, "01"), label_names=["bad", "good"])
    assert load_dataset(rows(path, "1", 0), label_names=["bad", "good"]).labels == [1, 0]


def test_a_file_may_name_codes_with_leading_zeros(tmp_path: Path) -> None:
    names = tmp_path / "names.json"
    names.write_text('{"01": "early", "02": "late"}')
    path = rows(tmp_path / "x.jsonl", "01", "02", "late", 1)
    assert load_dataset(path, DataOptions(label_names=str(names))).labels == [0, 1, 1, 0]
    with pytest.raises(DataError, match="label '002' is not one of"):
        load_dataset(rows(path, "01", "002"), DataOptions(label_names=str(names)))


def test_a_typed_number_is_known_by_its_value_and_a_text_by_its_spelling(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert load_dataset(rows(path, 4.5, 1000), label_names=["4.50", "1e3"]).labels == [0, 1]
    with pytest.raises(DataError, match=r"label '1\.10' is not one of '1\.1', '1\.2'"):
        load_dataset(rows(path, "1.10"), label_names=["1.1", "1.2"])
    # Two names of one value: neither is guessed.
    with pytest.raises(DataError, match="label 4 is not one of"):
        load_dataset(rows(path, 4), label_names=["4.00", "4.0"])


@pytest.mark.parametrize("cell", [True, "True", "TRUE", "true"])
def test_truth_values_are_known_in_any_spelling(tmp_path: Path, cell: Any) -> None:
    for known in (["true", "false"], ["True", "False"], ["TRUE", "maybe"]):
        assert load_dataset(rows(tmp_path / "x.jsonl", cell), label_names=known).labels == [0]


@pytest.mark.parametrize(
    ("one", "other", "shown", "difference"),
    [
        ("good", "Good", ("'good'", "'Good'"), "case"),
        ("good", "go\u200bod", ("'good'", "'go\\u200bod'"), "invisible characters"),
        ("good", "\ufeffgood", ("'good'", "'\\ufeffgood'"), "invisible characters"),
        ("good", "go\u00adod", ("'good'", "'go\\xadod'"), "invisible characters"),
        ("so so", "so\u00a0so", ("'so so'", "'so\\xa0so'"), "white space"),
        ("so so", "so  so", ("'so so'", "'so  so'"), "white space"),
        ("caf\u00e9", "cafe\u0301", ("'caf\\xe9'", "'cafe\\u0301'"), "Unicode normalization"),
        ("\uff21", "A", ("'\\uff21'", "'A'"), "Unicode normalization"),
        ("007", "7", ("'007'", "'7'"), "how a number is written"),
        ("\u00c9t\u00e9", "\u00e9t\u00e9", ("'Été'", "'été'"), "case"),
    ],
)
def test_labels_that_look_alike_are_told_apart_with_their_counts(
    tmp_path: Path, one: str, other: str, shown: tuple[str, str], difference: str
) -> None:
    path = rows(tmp_path / "x.jsonl", one, other, one, "else")
    dataset = load_dataset(path)
    assert len(dataset.label_names) == 3
    (notice,) = dataset.notices
    counts = {shown[0]: "2 rows", shown[1]: "1 row"}
    for name, count in counts.items():
        assert f"{name} ({count})" in notice.message
    assert difference in notice.message
    assert notice.message.isprintable()
    # Beside labels that are known, of a training file or a classifier, it is a reason to refuse.
    with pytest.raises(DataError) as caught:
        load_dataset(rows(path, other, other), label_names=[one, "else"])
    assert f"{shown[1]} (2 rows), {shown[0]} are different labels" in str(caught.value)
    left = load_dataset(
        rows(path, one, other), DataOptions(skip_bad_rows=True), label_names=[one, "else"]
    )
    assert any(shown[1] in str(n) and n.kind == "look-alikes" for n in left.notices)


def test_white_space_around_a_label_that_is_left_out_is_said(tmp_path: Path) -> None:
    path = rows(tmp_path / "x.jsonl", "good", "good\u00a0", "bad", "good")
    dataset = load_dataset(path)
    assert dataset.label_names == ["bad", "good"]
    (notice,) = dataset.notices
    assert "'good' (2 rows), 'good\\xa0' (1 row) are the same label" in notice.message
    assert not load_dataset(rows(path, " good", " bad")).notices


def test_labels_that_nobody_can_see_or_write_are_told(tmp_path: Path) -> None:
    (notice,) = load_dataset(rows(tmp_path / "x.jsonl", "\u200b", "x")).notices
    assert "the label '\\u200b' has no visible character" in notice.message
    with pytest.raises(DataError, match=r"label 'x\\ud800' contains half of a character"):
        load_dataset(rows(tmp_path / "x.jsonl", "x\ud800", "y"))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("good,bad", ["good", "bad"]),
        (" good , bad ", ["good", "bad"]),
        ('very good,"bad, awful"', ["very good", "bad, awful"]),
        ('"bad, awful" , good', ["bad, awful", "good"]),
        ('"say ""no"", never",yes', ['say "no", never', "yes"]),
        ("'bad, awful',good", ["bad, awful", "good"]),
        ("'tis,don't", ["'tis", "don't"]),
        ('5" disk,7" disk', ['5" disk', '7" disk']),
        ("\u201cbad, awful\u201d,good", ["bad, awful", "good"]),
        ('["bad, awful", "good"]', ["bad, awful", "good"]),
        ('["007", 8, true]', ["007", "8", "true"]),
        ("[URGENT],[SPAM]", ["[URGENT]", "[SPAM]"]),
    ],
)
def test_names_with_commas_are_quoted_as_in_csv_or_listed_as_json(
    text: str, names: list[str]
) -> None:
    assert names_of_option(text, "--labels") == names
    assert list(label_words_of(text, [str(i) for i in range(len(names))])) == names
    assert split_names(joined_names(names)) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('good,"bad, awful', "a quote is not closed"),
        ('"good"bad,x', "after the closing quote"),
        ("good,,bad", "must not be blank"),
        ("good,bad,", "must not be blank"),
        ('good,""', "must not be blank"),
        ("", "must not be blank"),
        ("[]", "must not be blank"),
        ("good,bad,good", "'good' is given twice"),
        ('["a", ["b"]]', "is not a list of labels"),
        ('["a", "b"', "does not end like one"),
    ],
)
def test_names_that_cannot_be_told_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        names_of_option(text, "--labels")
    assert message in str(caught.value)
    assert "--labels" in str(caught.value)
    assert str(caught.value).isprintable()


def test_label_words_may_be_given_by_label() -> None:
    words = '{"neg": "bad, awful", "pos": "great"}'
    assert label_words_of(words, ["pos", "neg"]) == ("great", "bad, awful")
    with pytest.raises(OptionError, match="has words for 'neg', 'pos', but the labels are 'pos'"):
        label_words_of(words, ["pos", "other"])
    with pytest.raises(OptionError, match="'x' is given twice"):
        label_words_of('{"a": "x", "b": "x"}', ["a", "b"])


@pytest.mark.parametrize(
    "content",
    [
        "very good\nbad, awful\n",
        "\ufeffvery good\r\n\r\n bad, awful",
        '["very good", "bad, awful"]',
        '{"bad, awful": 1, "very good": 0}',
        '{"0": "very good", "1": "bad, awful"}',
    ],
)
def test_a_file_of_labels_has_lines_or_json(tmp_path: Path, content: str) -> None:
    path = tmp_path / "labels"
    path.write_bytes(content.encode())
    assert read_labels_file(path) == ["very good", "bad, awful"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no class names"),
        (b" \n", "no class names"),
        (b"a\nb\na\n", "'a' is given twice"),
        (b"caf\xe9\n", "not UTF-8"),
        (b'["a", 3]', "3 is not a name"),
        (b'["a", ', "not JSON"),
    ],
)
def test_files_of_labels_with_mistakes_are_one_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(MinllamaError) as caught:
        read_labels_file(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_in_brackets_on_lines_are_no_json(tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("[URGENT]\n[SPAM]\n")
    assert read_labels_file(tmp_path / "labels") == ["[URGENT]", "[SPAM]"]
