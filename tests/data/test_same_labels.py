"""Claim: a table that pandas writes in five formats has the same texts and labels in each."""

import datetime
import decimal
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minllama.data import load_dataset, read_label_names, read_labels_file
from minllama.data.class_names import same_classes
from minllama.errors import DataError
from minllama.experiment.compare import open_compared
from minllama.options import DataOptions
from minllama.options.loading import LoadOptions

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

FORMATS = ("csv", "tsv", "jsonl", "json", "parquet")
TEXTS = ["first text", "second text", "third text"]
MULTI = DataOptions(multi_label=True)


def write(folder: Path, ending: str, labels: Any) -> Path:
    frame = pd.DataFrame({"text": TEXTS, "label": labels})
    path = folder / f"x.{ending}"
    match ending:
        case "csv" | "tsv":
            frame.to_csv(path, index=False, sep="," if ending == "csv" else "\t")
        case "jsonl" | "json":
            frame.to_json(path, orient="records", lines=ending == "jsonl")
        case _:
            frame.to_parquet(path, index=False)
    return path


def names(path: Path, options: DataOptions | None = None) -> list[tuple[str, ...]]:
    dataset = load_dataset(path, options)
    assert len(dataset.texts) == len(dataset.labels or ())
    return [
        tuple(dataset.label_names[c] for c in dataset.classes_of(i)) for i in range(len(dataset))
    ]


DAY, NIGHT = datetime.time(10), datetime.time(22, 30, 0, 5000)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["007", "7", "07"], ["007", "7", "07"]),
        (["NA", "nan", "None"], ["NA", "nan", "None"]),
        ([True, False, True], ["true", "false", "true"]),
        ([1, 2, 10], ["1", "2", "10"]),
        ([1.0, 2.0, 10.0], ["1", "2", "10"]),
        ([4.5, 3.0, 0.1], ["4.5", "3.0", "0.1"]),
        ([2**63 - 1, 2**53 + 1, 5], ["9223372036854775807", "9007199254740993", "5"]),
        (np.array([2**64 - 1, 2**63, 1], "uint64"), [str(2**64 - 1), str(2**63), "1"]),
        (pd.Categorical(["x", "y", "x"]), ["x", "y", "x"]),
        (pd.Categorical([1, 2, 1]), ["1", "2", "1"]),
        (pd.Categorical([True, False, True]), ["true", "false", "true"]),
        (list(map(decimal.Decimal, ("4.50", "1.00", "2.25"))), ["4.50", "1.00", "2.25"]),
        ([DAY, NIGHT, DAY], ["10:00:00", "22:30:00.005000", "10:00:00"]),
    ],
)
def test_one_label_a_row_is_the_same_in_all_formats(
    tmp_path: Path, ending: str, labels: Any, expected: list[str]
) -> None:
    path = write(tmp_path, ending, labels)
    assert load_dataset(path).texts == TEXTS
    assert names(path) == [(name,) for name in expected]
    assert names(path, MULTI) == [(name,) for name in expected]


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])  # JSON by pandas has milliseconds
def test_a_day_is_a_label(tmp_path: Path, ending: str) -> None:
    days = [datetime.date(2024, 1, 2), datetime.date(1969, 7, 20), None]
    path = write(tmp_path, ending, days)
    assert names(path, DataOptions(skip_bad_rows=True)) == [("2024-01-02",), ("1969-07-20",)]


def test_days_that_python_has_not_are_bad_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    days = pa.array([0, 10_000_000, 1], pa.date32())
    parquet.write_table(pa.table({"text": TEXTS, "label": days}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="row 2: a date after the year 9999"):
        load_dataset(tmp_path / "x.parquet")


MISSING = [
    ["a", None, "b"],
    ["a", np.nan, "b"],
    ["a", "", "b"],
    pd.array(["a", None, "b"], dtype="string"),
    pd.Categorical(["a", None, "b"]),
]


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("labels", MISSING, ids=range(len(MISSING)))
def test_a_missing_label_is_the_same_in_all_formats(
    tmp_path: Path, ending: str, labels: Any
) -> None:
    path = write(tmp_path, ending, labels)
    with pytest.raises(DataError, match="no label"):
        load_dataset(path)
    assert names(path, DataOptions(skip_bad_rows=True)) == [("a",), ("b",)]
    assert names(path, MULTI) == [("a",), (), ("b",)]
    (notice,) = load_dataset(path, MULTI).notices
    assert (notice.kind, notice.count) == ("no-labels", 1)
    assert str(notice).endswith(
        "1 of 3 rows have an empty or null label cell, and are used as rows without labels"
    )


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pd.array([1, None, 2], dtype="Int64"), ["1", "2"]),
        ([1, np.nan, 2], ["1", "2"]),
        ([4.5, np.nan, 2], ["4.5", "2.0"]),
        (pd.array([True, None, False], dtype="boolean"), ["true", "false"]),
        ([True, None, False], ["true", "false"]),
    ],
)
def test_labels_of_a_column_with_gaps_keep_their_names(
    tmp_path: Path, ending: str, labels: Any, expected: list[str]
) -> None:
    path = write(tmp_path, ending, labels)
    with pytest.raises(DataError, match="no label"):
        load_dataset(path)
    first, last = expected
    assert names(path, DataOptions(skip_bad_rows=True)) == [(first,), (last,)]
    assert names(path, MULTI) == [(first,), (), (last,)]


@pytest.mark.parametrize("ending", FORMATS)
def test_an_empty_list_is_a_row_without_labels_and_no_word_is_said(
    tmp_path: Path, ending: str
) -> None:
    path = write(tmp_path, ending, [["a", "b"], [], ["b"]])
    assert names(path, MULTI) == [("a", "b"), (), ("b",)]
    assert load_dataset(path, MULTI).notices == ()
    path = write(tmp_path, ending, [["a", "b"], None, ["b"]])
    assert names(path, MULTI) == [("a", "b"), (), ("b",)]
    assert [notice.count for notice in load_dataset(path, MULTI).notices] == [1]


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_whose_labels_are_all_missing_has_none(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path, ending, [None] * 3)
    for options in (None, MULTI):
        dataset = load_dataset(path, options, label_names=["a", "b"], needs_labels=False)
        assert dataset.labels is None


ONE_HOT = [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("kind", [int, float, bool])
def test_vectors_are_read_without_a_word_as_with_one(
    tmp_path: Path, ending: str, kind: Any
) -> None:
    path = write(tmp_path, ending, [[kind(bit) for bit in row] for row in ONE_HOT])
    for options in (None, MULTI, DataOptions(label_lists="multi-hot")):
        assert names(path, options) == [("1",), ("0",), ("2",)]
        assert load_dataset(path, options).multi_label
        said = [] if options is not None and options.label_lists else ["multi-hot"]
        assert [notice.kind for notice in load_dataset(path, options).notices] == said
    with_gap = write(tmp_path, ending, [ONE_HOT[0], None, ONE_HOT[2]])
    assert names(with_gap, MULTI) == [("1",), (), ("2",)]
    with pytest.raises(DataError, match="no label"):
        load_dataset(with_gap)
    unclear = write(tmp_path, ending, [[0, 1], [1, 0], [0, 1]])
    with pytest.raises(DataError, match="are ambiguous"):
        load_dataset(unclear)


def test_a_list_of_zeros_and_ones_among_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    for cells in (("a", "[0, 1, 0]"), ("[0, 1, 0]", "a"), ("[0, 1, 0]", "[1, 0]")):
        path.write_text("text,label\n" + "".join(f'some text,"{cell}"\n' for cell in cells))
        with pytest.raises(
            DataError, match=r"a list of 3 labels, .*\[0, 1, 0\]; use --multi-label"
        ):
            load_dataset(path)


NAMES = ["très bien", "déçu"]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-8-sig", "shift_jis"])
def test_files_of_names_are_in_the_encoding_of_the_rows(tmp_path: Path, encoding: str) -> None:
    wanted = ["良い", "悪い"] if encoding == "shift_jis" else NAMES
    path, listed, rows = (tmp_path / name for name in ("names.json", "names.txt", "x.csv"))
    path.write_text(json.dumps(wanted, ensure_ascii=False), encoding=encoding)
    listed.write_text("\n".join(wanted), encoding=encoding)
    asked = "utf-8" if encoding == "utf-8-sig" else encoding
    assert list(read_label_names(path, asked).values()) == wanted
    assert read_labels_file(listed, asked) == wanted
    rows.write_text(
        "text,label\nun café,1\n" if wanted is NAMES else "text,label\n猫,1\n", encoding=encoding
    )
    options = DataOptions(encoding=asked, label_names=str(path))
    assert load_dataset(rows, options).label_names == wanted
    path.write_text(json.dumps(wanted, ensure_ascii=False), encoding="utf-8")  # it may be that
    assert load_dataset(rows, options).label_names == wanted


def test_a_file_of_names_that_is_not_utf_8_says_the_option(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text(json.dumps(NAMES, ensure_ascii=False), encoding="cp1252")
    with pytest.raises(DataError, match=r"not UTF-8; read it with --encoding cp1252, or convert"):
        read_label_names(path)
    with pytest.raises(DataError, match=r"not UTF-8 or ascii; give its encoding with --encoding"):
        read_label_names(path, "ascii")
    # Beside columns with types it is the encoding of the names alone.
    rows = write(tmp_path, "parquet", [0, 1, 0])
    options = DataOptions(label_names=str(path), encoding="cp1252")
    assert load_dataset(rows, options).label_names == NAMES


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (["false", "true"], ["True", "False"], {"false": "False", "true": "True"}),
        (["1", "2"], ["2.0", "1.0"], {"1": "1.0", "2": "2.0"}),
        (["False", "maybe"], ["maybe", "false"], {"False": "false", "maybe": "maybe"}),
        (["007", "7"], ["7", "007"], {"007": "007", "7": "7"}),
        (["good", "bad"], ["Good", "bad"], None),
        (["7", "8"], ["007", "8"], None),
        (["true", "True"], ["true", "false"], None),
        (["a"], ["a", "b"], None),
    ],
)
def test_classes_are_the_same_in_other_spellings_of_a_value(
    ours: list[str], theirs: list[str], expected: dict[str, str] | None
) -> None:
    assert same_classes(ours, theirs) == expected


def test_another_system_may_spell_truth_values_otherwise(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path, "jsonl", [True, False, True]))
    rows = [
        {"text": text, "label": label, "probabilities": {"True": p, "False": 1 - p}}
        for text, label, p in zip(TEXTS, ("True", "False", "False"), (0.75, 0.25, 0.5), strict=True)
    ]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    p, predicted = open_compared(
        str(tmp_path / "said.jsonl"), dataset, loading=LoadOptions()
    ).predict(None)
    assert dataset.label_names == ["false", "true"]
    assert p.tolist() == [[0.25, 0.75], [0.75, 0.25], [0.5, 0.5]]
    assert predicted.tolist() == [[False, True], [True, False], [True, False]]


def test_a_file_in_one_format_is_read_with_the_classes_of_another(tmp_path: Path) -> None:
    for labels in ([True, False, True], [1.0, 2.0, 1.0], [4.5, 3.0, 4.5]):
        paths = [write(tmp_path, ending, labels) for ending in FORMATS]
        for one, other in itertools.permutations(paths, 2):
            known = load_dataset(one)
            assert load_dataset(other, label_names=known.label_names).labels == known.labels
