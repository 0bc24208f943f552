"""Claims about labels: which class a cell means, and that no class is guessed."""

import json
from pathlib import Path
from typing import Any

import pytest

from minllama.data import Dataset, load_dataset, read_label_names
from minllama.errors import DataError
from minllama.options import DataOptions


def load(
    path: Path, *labels: Any, known: list[str] | None = None, **options: Any
) -> tuple[Any, list[str]]:
    """Classes and class names of a JSONL file with these labels."""
    rows = (json.dumps({"text": f"text {i}", "label": label}) for i, label in enumerate(labels))
    (path / "x.jsonl").write_text("\n".join(rows))
    dataset = load_dataset(path / "x.jsonl", DataOptions(**options), label_names=known)
    return dataset.labels, dataset.label_names


def names_file(path: Path, content: Any) -> str:
    file = path / "names.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


@pytest.mark.parametrize(("cells", "known"), [(["a", "x", "b"], "only 2"), (["x"], "none")])
def test_a_label_for_whose_sake_none_is_used_is_named(
    tmp_path: Path, cells: list[str], known: str
) -> None:
    rows = [json.dumps({"text": f"text {i}", "label": cell}) for i, cell in enumerate(cells)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(rows))
    dataset = load_dataset(path, label_names=["a", "b"], needs_labels=False)
    assert dataset.labels is None
    (notice,) = dataset.notices
    line = cells.index("x") + 1
    assert str(notice) == (
        f"{path}: {known} of {len(cells)} rows have a known label (line {line}: label 'x' is not "
        "one of 'a', 'b'); these labels are ignored"
        + ("; --skip-bad-rows skips them" if known != "none" else "")
    )


@pytest.mark.parametrize(
    ("cells", "labels", "names"),
    [
        (["b", "a", "b"], [1, 0, 1], ["a", "b"]),
        (["10", "9", "10"], [1, 0, 1], ["9", "10"]),
        ([10, 9, "9"], [1, 0, 0], ["9", "10"]),
        ([2.0, 1.0], [1, 0], ["1", "2"]),
        (["2.0", "1.0"], [1, 0], ["1", "2"]),  # what pandas makes of integers and a gap
        (["4.5", "4.0"], [1, 0], ["4.0", "4.5"]),
        (["10", "9", "none"], [0, 1, 2], ["10", "9", "none"]),
        ([-2, 3], [0, 1], ["-2", "3"]),
        ([True, False], [1, 0], ["false", "true"]),
        ([" a ", "a", "b c"], [0, 0, 1], ["a", "b c"]),
        (["Good", "good"], [0, 1], ["Good", "good"]),
        (["é", "z"], [1, 0], ["z", "é"]),
    ],
)
def test_names_are_sorted_and_integers_by_value(
    tmp_path: Path, cells: list[Any], labels: list[int], names: list[str]
) -> None:
    assert load(tmp_path, *cells) == (labels, names)


@pytest.mark.parametrize(
    "content",
    [
        ["bad", "so-so", "good"],
        {"bad": 0, "good": 2, "so-so": 1},
        {"0": "bad", "2": "good", "1": "so-so"},
        '\ufeff[" bad ", "so-so", "good"]',
    ],
)
def test_a_file_of_names_has_one_of_three_forms(tmp_path: Path, content: Any) -> None:
    path = names_file(tmp_path, content)
    assert list(read_label_names(path).items()) == [(0, "bad"), (1, "so-so"), (2, "good")]
    # Classes come in the file's order, whether the rows hold names or numbers, or lack a class.
    expected = [2, 0, 0], ["bad", "so-so", "good"]
    assert load(tmp_path, "good", "bad", 0, label_names=path) == expected
    assert load(tmp_path, "2", "0.0", 0, label_names=path) == expected


def test_numbers_of_a_file_need_not_start_at_0(tmp_path: Path) -> None:
    path = names_file(tmp_path, {"negative": -1, "neutral": 0, "positive": 1})
    expected = [0, 1, 2], ["negative", "neutral", "positive"]
    assert load(tmp_path, -1, 0, "1", label_names=path) == expected
    # The classes of a classifier may stand in another order: the file says what is meant.
    known = ["positive", "neutral", "negative"]
    assert load(tmp_path, -1, 0, "1", label_names=path, known=known) == ([2, 1, 0], known)


def test_classes_that_are_known_keep_their_order(tmp_path: Path) -> None:
    assert load(tmp_path, "a", "b", known=["b", "c", "a"]) == ([2, 0], ["b", "c", "a"])
    assert load(tmp_path, 0, "1", known=["b", "c", "a"]) == ([0, 1], ["b", "c", "a"])


def test_numbers_that_are_names_are_never_positions(tmp_path: Path) -> None:
    assert load(tmp_path, 1, "2", 5.0, known=["1", "2", "5"]) == ([0, 1, 2], ["1", "2", "5"])
    with pytest.raises(DataError, match=r"label 0 is not one of '1', '2', '5';"):
        load(tmp_path, 0, known=["1", "2", "5"])


def test_names_may_be_numbers_where_they_are_their_own(tmp_path: Path) -> None:
    path = names_file(tmp_path, {"1": "1", "2": "2", "0": "none"})
    assert load(tmp_path, "1", 2, 0, label_names=path) == ([1, 2, 0], ["none", "1", "2"])
    path = names_file(tmp_path, ["007", "006"])
    assert load(tmp_path, "006", "007", 0, label_names=path) == ([1, 0, 0], ["007", "006"])


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("c", "label 'c' is not one of 'a', 'b'"),
        ("A", "label 'A' is not one of 'a', 'b'"),
        (2, "label 2 is not one of 'a', 'b'"),
        (-1, "label -1 means no label (if it is a class, name it in a file for --label-names)"),
        (-2, "label -2 is not one of 'a', 'b'"),
        (0.5, "label 0.5 is not one of 'a', 'b'"),
        (None, "no label"),
        ("", "no label"),
        ("  ", "no label"),
    ],
)
def test_labels_that_are_not_known_make_bad_rows(tmp_path: Path, cell: Any, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, "a", cell, known=["a", "b"])
    assert f"x.jsonl, line 2: {reason}; fix it" in str(caught.value)


def test_a_number_whose_name_is_not_known_is_told_with_its_name(tmp_path: Path) -> None:
    path = names_file(tmp_path, ["a", "z"])
    with pytest.raises(DataError, match=r"label 1 \('z'\) is not one of 'a', 'b'"):
        load(tmp_path, 0, 1, label_names=path, known=["a", "b"])


def test_of_many_known_names_ten_are_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not one of 'n0', .*'n9' and 67 more;"):
        load(tmp_path, "x", known=[f"n{i}" for i in range(77)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON (Expecting value: line 1 column 1 (char 0))"),
        ("[", "not JSON (Expecting value: line 1 column 2 (char 1))"),
        (3, "no class names; write FORM"),
        ({"a": "b"}, "no class names; write FORM"),
        ({"a": 0.5}, "no class names; write FORM"),
        ([], "no class names; write FORM"),
        ({}, "no class names; write FORM"),
        (["a", 1], "1 is not a name; write FORM"),
        (["a", " "], "' ' is not a name; write FORM"),
        ({"1": None}, "None is not a name; write FORM"),
        (["a", "a "], "contains a name or a number twice"),
        ({"a": 1, "b": 1}, "contains a name or a number twice"),
        ({"1": "a", "01": "b"}, "contains a name or a number twice"),
        (["1", "2"], "class 0 is named '1', which is the number of another class; rename it"),
        ("[" * 99_999, "JSON that is nested too deeply"),
    ],
)
def test_files_of_names_with_mistakes_are_one_line(
    tmp_path: Path, content: Any, message: str
) -> None:
    form = 'a list such as ["bad", "good"], or an object such as {"bad": 0, "good": 1}'
    with pytest.raises(DataError) as caught:
        read_label_names(names_file(tmp_path, content))
    line = str(caught.value).replace(f"{tmp_path}/", "")
    assert line.startswith(f"names.json: {message.replace('FORM', form)}")
    assert "\n" not in line


@pytest.mark.parametrize("path", ["no such file", ".", "a\0b", "~no one/x", "x" * 5000])
def test_files_of_names_that_cannot_be_read_are_one_line(path: str) -> None:
    with pytest.raises(DataError) as caught:
        read_label_names(path)
    assert "\n" not in str(caught.value)


def test_lists_make_a_data_set_of_several_labels_a_row(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "label": ["late", "broken"]},
        {"text": "b", "label": []},
        {"text": "c", "label": ["late"]},
        {"text": "d", "label": "kind"},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    dataset = load_dataset(path)
    assert dataset == Dataset(
        ["a", "b", "c", "d"],
        [(0, 2), (), (2,), (1,)],
        ["broken", "kind", "late"],
        str(path),
        multi_label=True,
    )
    assert dataset.class_counts() == [1, 1, 2]
    assert dataset.classes_of(0) == (0, 2)


def test_a_list_behind_single_labels_is_a_bad_row(tmp_path: Path) -> None:
    rows = [
        {"text": text, "label": label} for text, label in zip("abc", ("x", ["y"], "y"), strict=True)
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="line 2: a list of labels, but earlier rows have one"):
        load_dataset(path)
    kept = load_dataset(path, DataOptions(skip_bad_rows=True))
    assert (kept.texts, kept.labels, kept.multi_label) == (["a", "c"], [0, 1], False)
    whole = load_dataset(path, DataOptions(multi_label=True))
    assert whole.labels == [(0,), (1,), (1,)]


def test_numbers_that_are_taken_for_names_by_position_are_said(tmp_path: Path) -> None:
    path, names = tmp_path / "x.txt", tmp_path / "names.json"
    path.write_text("1 ||| a\n0 ||| b\nbad ||| c\n")
    dataset = load_dataset(path, label_names=["bad", "good"])
    assert dataset.labels == [1, 0, 0]
    (notice,) = dataset.notices
    assert (notice.kind, notice.count) == ("numbers", 2)
    assert "in numeric order: 0 = bad, 1 = good; --label-names FILE" in notice.message
    path.write_text("good ||| a\nbad ||| c\n")
    assert not load_dataset(path, label_names=["bad", "good"]).notices
    path.write_text("1 ||| a\n0 ||| b\n")
    names.write_text('{"good": 0, "bad": 1}')
    dataset = load_dataset(path, DataOptions(label_names=str(names)), label_names=["bad", "good"])
    assert (dataset.labels, dataset.notices) == ([0, 1], ())
    assert not load_dataset(path, label_names=["0", "1"]).notices


def test_rows_with_unknown_labels_can_be_left_out_of_what_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label\na,good\nb,odd\nd,bad\n")
    known: Any = {"label_names": ["bad", "good"], "needs_labels": False}
    skipping = DataOptions(skip_bad_rows=True)
    dataset = load_dataset(path, **known)
    assert (dataset.labels, len(dataset)) == (None, 3)
    assert "these labels are ignored; --skip-bad-rows skips them" in str(*dataset.notices)
    dataset = load_dataset(path, skipping, **known)
    assert (dataset.texts, dataset.labels) == (["a", "d"], [1, 0])
    (notice,) = dataset.notices
    assert (notice.kind, notice.count) == ("skipped", 1)
    assert "skipped: 1 of 3 (line 3: label 'odd' is not one of 'bad', 'good')" in notice.message
    # Rows without any label are no bad rows: they are predicted.
    path.write_text("text,label\na,good\nb,odd\nc,\nd,bad\n")
    dataset = load_dataset(path, skipping, **known)
    assert (dataset.texts, dataset.labels) == (["a", "c", "d"], None)
    assert [notice.kind for notice in dataset.notices] == ["skipped", "unlabelled"]
    path.write_text("text,label\na,-1\nb,odd\n")
    assert load_dataset(path, skipping, **known).texts == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "separator"),
    [
        ("x.csv", 'text,label\na,"late, broken"\nb,\nc,late\n', ","),
        ("x.csv", "text,label\na,late|broken\nb,|\nc,late|\n", "|"),
        ("x.txt", "late, broken ||| a\n||| b\nlate ||| c\n", ","),
    ],
)
def test_one_cell_may_hold_several_labels(
    tmp_path: Path, name: str, content: str, separator: str
) -> None:
    (tmp_path / name).write_text(content)
    options = DataOptions(multi_label=True, label_separator=separator)
    dataset = load_dataset(tmp_path / name, options)
    assert dataset.labels == [(0, 1), (), (1,)]
    assert dataset.label_names == ["broken", "late"]
    assert dataset.multi_label


def test_a_number_and_its_text_are_one_label(tmp_path: Path) -> None:
    assert load(tmp_path, [1, "1", 2], ["2"]) == ([(0, 1), (1,)], ["1", "2"])


def test_numbers_in_lists_get_their_names(tmp_path: Path) -> None:
    path = names_file(tmp_path, ["late", "broken", "kind"])
    expected = [(0, 2), (1,)], ["late", "broken", "kind"]
    assert load(tmp_path, [2, "late"], [1], label_names=path) == expected
    options = {"label_names": path, "multi_label": True}
    assert load(tmp_path, "2, 0", "broken", **options) == expected


@pytest.mark.parametrize("none", ["-1", "-1.0", -1, -1.0])
def test_a_minus_1_in_any_spelling_stands_for_none(tmp_path: Path, none: Any) -> None:
    path = tmp_path / "x.jsonl"
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(["0", "1.0", none])]
    path.write_text("\n".join(map(json.dumps, rows)))
    dataset = load_dataset(path, needs_labels=False)
    assert (dataset.labels, dataset.label_names) == (None, ["0", "1"])
    with pytest.raises(DataError, match="line 3: label -1 means no label"):
        load_dataset(path)
    known = load_dataset(path, needs_labels=False, label_names=["0", "1", "-1"])
    assert known.labels == [0, 1, 2]


def test_the_minus_1_of_several_labels_stands_for_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: label -1 means no label"):
        load(tmp_path, ["a"], [-1])
    with pytest.raises(DataError, match="line 2: label -1 means no label"):
        load(tmp_path, "a", "-1", multi_label=True)
