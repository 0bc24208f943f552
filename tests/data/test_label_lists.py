"""Claims about several labels a row: lists in cells, vectors of zeros and ones, columns of them."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from minllama.data import Dataset, load_dataset
from minllama.data.label_lists import read_list
from minllama.errors import DataError, OptionError
from minllama.options import DataOptions

MULTI = DataOptions(multi_label=True)


def table(path: Path, *cells: str) -> Path:
    """A CSV file with these label cells."""
    quoted = ('"' + cell.replace('"', '""') + '"' for cell in cells)
    path.write_text("text,label\n" + "".join(f"row {i},{c}\n" for i, c in enumerate(quoted)))
    return path


def rows(path: Path, *labels: Any) -> Path:
    lines = (json.dumps({"text": f"text {i}", "label": label}) for i, label in enumerate(labels))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def sets(dataset: Dataset) -> list[set[str]]:
    return [{dataset.label_names[c] for c in dataset.classes_of(i)} for i in range(len(dataset))]


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ("['a', 'b']", {"a", "b"}),
        ('["a", "b"]', {"a", "b"}),
        (" [ 'a' , \"b\" ] ", {"a", "b"}),
        ("['a' 'b']", {"a", "b"}),
        ("['a'\n 'b']", {"a", "b"}),
        ("{'a', 'b'}", {"a", "b"}),
        ("('a', 'b')", {"a", "b"}),
        ("('a',)", {"a"}),
        ("[a, b]", {"a", "b"}),
        ("array(['a', 'b'], dtype=object)", {"a", "b"}),
        ("[np.str_('a'), np.str_('b')]", {"a", "b"}),
        ("[0, 2]", {"0", "2"}),
        ("[0 2]", {"0", "2"}),
        ("['007', '7']", {"007", "7"}),
        ("[]", set()),
        ("set()", set()),
        ("['late, broken', 'kind']", {"late, broken", "kind"}),
        ('["it\'s", \'so "so"\']', {"it's", 'so "so"'}),
        ("['it\\'s', 'caf\\u00e9']", {"it's", "café"}),
        ('["\\ud83d\\ude00"]', {"😀"}),
        ('"late, broken", kind', {"late, broken", "kind"}),
        ('5" disk, 7" disk', {'5" disk', '7" disk'}),
        ("[URGENT], [SPAM]", {"[URGENT]", "[SPAM]"}),
        ("late, broken", {"late", "broken"}),
    ],
)
def test_a_list_in_a_cell_is_the_list_that_it_is(
    tmp_path: Path, cell: str, labels: set[str]
) -> None:
    dataset = load_dataset(table(tmp_path / "x.csv", cell, "z", "[9]"), MULTI)
    assert sets(dataset) == [labels, {"z"}, {"9"}]
    # A string of JSON lines is read alike.
    assert sets(load_dataset(rows(tmp_path / "x.jsonl", cell, "z", "[9]"), MULTI))[0] == labels


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("['a', 'b'", "begins like a list of labels, but does not end like one"),
        ("['a', ['b']]", "is not a list of labels"),
        ("['a', {'b': 1}]", "is not a list of labels"),
        ("{'a': 1}", "is not a list of labels"),
        ("[0 1 ... 0 1]", "is not a list of labels"),
        ("['a', '']", "contains an empty label"),
        ("['a', None]", "contains an empty label"),
        ("['a', 'a']", "contains a label twice"),
    ],
)
def test_what_only_looks_like_a_list_is_a_bad_row(tmp_path: Path, cell: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(table(tmp_path / "x.csv", "z", cell), MULTI)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_in_lists_are_named_as_others(tmp_path: Path) -> None:
    path = table(tmp_path / "x.csv", "[1.0, 2.0]", "[1]", "[3. 2.]")
    assert sets(load_dataset(path, MULTI)) == [{"1", "2"}, {"1"}, {"2", "3"}]


def test_where_a_row_has_one_label_a_list_of_one_is_it_and_of_several_is_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.csv"
    dataset = load_dataset(table(path, "['a']", '["b"]', "[7]", "a"))
    assert (dataset.labels, dataset.label_names) == ([1, 2, 0, 1], ["7", "a", "b"])
    assert not dataset.multi_label
    with pytest.raises(DataError, match=r"line 3: a list of 2 labels, .* use --multi-label"):
        load_dataset(table(path, "['a']", "['a', 'b']"))
    with pytest.raises(
        DataError, match=r"line 3: an empty list of labels, \[\]; use --multi-label"
    ):
        load_dataset(table(path, "['a']", "[]"))


@pytest.mark.parametrize("name", ["[URGENT]", "(none)", "(0, 10]", "{x}", "(a) b", "[a, b]"])
def test_names_in_brackets_stay_names_of_single_labels(tmp_path: Path, name: str) -> None:
    assert load_dataset(table(tmp_path / "x.csv", name, "z")).label_names == sorted([name, "z"])


def test_a_list_that_is_a_known_name_stays_it(tmp_path: Path) -> None:
    path = table(tmp_path / "x.csv", "['a', 'b']", "['a']")
    assert load_dataset(path, label_names=["['a']", "['a', 'b']"]).labels == [1, 0]


def test_long_and_deep_cells_are_read_in_no_time() -> None:
    began = time.perf_counter()
    for text in ("[" * 99_999, "['" + "a', '" * 99_999, "[" + "'a' " * 99_999 + "]", "[1" * 99_999):
        for bare_words in (False, True):
            try:
                read_list(text, bare_words=bare_words)
            except ValueError:
                continue
    assert read_list("__import__('os').system('x')", bare_words=True) is None
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("one", [1, 1.0, True])
def test_lists_that_can_only_be_vectors_are_read_as_vectors(tmp_path: Path, one: Any) -> None:
    zero = type(one)(0)
    path = rows(tmp_path / "x.jsonl", [one, zero, zero], [zero, one, one], [zero] * 3, None)
    for dataset in (
        load_dataset(path, DataOptions(skip_bad_rows=True)),
        load_dataset(path, DataOptions(skip_bad_rows=True, multi_label=True)),
        load_dataset(path, DataOptions(skip_bad_rows=True, label_lists="multi-hot")),
    ):
        # Nothing is no vector; where a row may have any number of labels it has none of them.
        last = [()] if "no-labels" in [notice.kind for notice in dataset.notices] else []
        assert dataset.labels == [(0,), (1, 2), (), *last]
        assert dataset.label_names == ["0", "1", "2"]
        assert dataset.multi_label
    (notice,) = load_dataset(rows(tmp_path / "x.jsonl", [1, 1], [1, 0])).notices
    assert notice.kind == "multi-hot"
    assert "multi-hot vectors of 2 zeros and ones, one per label: 0 = 0, 1 = 1" in str(notice)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_vectors_get_names_from_a_file_or_a_classifier(tmp_path: Path, ending: str) -> None:
    pd = pytest.importorskip("pandas")
    path = tmp_path / f"x.{ending}"
    frame = pd.DataFrame({"text": ["a", "b"], "label": [[1, 0, 1], [0, 1, 0]]})
    if ending == "csv":
        frame.to_csv(path, index=False)
    elif ending == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        pytest.importorskip("pyarrow")
        frame.to_parquet(path)
    names = tmp_path / "names.json"
    names.write_text('["late", "broken", "kind"]')
    named = load_dataset(path, DataOptions(multi_label=True, label_names=str(names)))
    assert (named.labels, named.label_names) == ([(0, 2), (1,)], ["late", "broken", "kind"])
    known = load_dataset(path, MULTI, label_names=["x", "y", "z"])
    assert (known.labels, known.label_names) == ([(0, 2), (1,)], ["x", "y", "z"])
    assert "0 = x, 1 = y, 2 = z" in str(known.notices[0])
    both = load_dataset(
        path,
        DataOptions(multi_label=True, label_names=str(names)),
        label_names=["kind", "late", "broken"],
    )
    assert both.labels == [(0, 1), (2,)]


@pytest.mark.parametrize(
    "cells", [([1, 0], [0, 1]), ([0, 1],), ("[1, 0]", "[0 1]"), ("1,0", "0,1")]
)
def test_where_two_readings_are_possible_both_are_named(tmp_path: Path, cells: Any) -> None:
    path = rows(tmp_path / "x.jsonl", *cells)
    with pytest.raises(DataError) as caught:
        load_dataset(path, MULTI)
    message = str(caught.value)
    assert "are ambiguous" in message
    assert "multi-hot vector" in message
    assert "--label-lists labels, or --label-lists multi-hot" in message
    hot = load_dataset(path, DataOptions(label_lists="multi-hot"))
    assert all(len(hot.classes_of(i)) == 1 for i in range(len(hot)))
    plain = load_dataset(path, DataOptions(label_lists="labels"))
    assert all(plain.classes_of(i) == (0, 1) for i in range(len(plain)))


def test_a_list_of_another_kind_or_length_says_that_none_is_a_vector(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert load_dataset(rows(path, [1, 0], [1])).labels == [(0, 1), (1,)]
    assert load_dataset(rows(path, [1, 0], [], [2, 0])).labels == [(0, 1), (), (0, 2)]
    assert load_dataset(rows(path, ["1", "0"])).labels == [(0, 1)]
    # Three classes have no vectors of two places.
    assert load_dataset(rows(path, [1, 0]), label_names=["a", "b", "c"]).labels == [(0, 1)]
    with pytest.raises(
        DataError, match=r"line 1: \[1, 0, 0\] contains a label twice; .* multi-hot"
    ):
        load_dataset(rows(path, [1, 0, 0], [0, 2]))
    empty = table(tmp_path / "x.csv", "", " ")
    options = DataOptions(label_lists="multi-hot")
    assert load_dataset(empty, options, needs_labels=False).labels is None
    with pytest.raises(DataError, match=r"line 2: \[0, 2\] is not a multi-hot vector of 3 zeros"):
        load_dataset(rows(path, [1, 0, 0], [0, 2]), DataOptions(label_lists="multi-hot"))


def columns(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_column_for_each_label_is_read_by_its_name(tmp_path: Path) -> None:
    path = columns(
        tmp_path / "x.csv",
        'id,comment,toxic,"rude, crude",ok',
        "1,a,1,0,0",
        "2,b,0,0,0",
        "3,c,1.0,True,1",
    )
    options = DataOptions(label_columns='toxic,"rude, crude",ok', text_column="comment")
    dataset = load_dataset(path, options)
    assert dataset.label_names == ["toxic", "rude, crude", "ok"]
    assert dataset.labels == [(0,), (), (0, 1, 2)]
    assert (dataset.multi_label, dataset.label_column, dataset.notices) == (True, None, ())
    # A classifier's labels may stand in another order, and must be the same.
    known = load_dataset(path, options, label_names=["ok", "toxic", "rude, crude"])
    assert known.labels == [(1,), (), (0, 1, 2)]
    with pytest.raises(DataError, match="but the labels are 'ok', 'toxic'; name exactly"):
        load_dataset(path, options, label_names=["ok", "toxic"])
    # Where they are not asked for, the question says that they can be.
    with pytest.raises(DataError, match=r'with --label-columns .*toxic,"rude, crude",ok'):
        load_dataset(
            path,
            DataOptions(multi_label=True, text_column="comment"),
            label_names=dataset.label_names,
        )


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ("2,0", "column 'a' contains '2', not 0 or 1"),
        ("0,", "column 'b' contains nothing, not 0 or 1"),
        (",", "no label"),
        ("-1,-1", "no label"),
        ("1,yes", "column 'b' contains 'yes', not 0 or 1"),
    ],
)
def test_cells_of_label_columns_are_0_or_1(tmp_path: Path, cells: str, reason: str) -> None:
    path = columns(tmp_path / "x.csv", "text,a,b", f"x,{cells}", "y,1,0")
    with pytest.raises(DataError, match=f"line 2: {reason}; fix it"):
        load_dataset(path, DataOptions(label_columns="a,b"))
    dataset = load_dataset(path, DataOptions(label_columns="a,b", skip_bad_rows=True))
    assert (dataset.texts, dataset.labels) == (["y"], [(0,)])


def test_label_columns_that_cannot_be_are_refused(tmp_path: Path) -> None:
    path = columns(tmp_path / "x.csv", "text,a,b", "x,1,0")
    with pytest.raises(DataError, match="no column 'c'; choose --label-columns from 'text'"):
        load_dataset(path, DataOptions(label_columns="a,c"))
    with pytest.raises(OptionError, match="not closed"):
        load_dataset(path, DataOptions(label_columns='a,"b'))
    with pytest.raises(OptionError, match="omit --label-column, --label-lists"):
        DataOptions(label_columns="a,b", label_column="a", label_lists="labels")
    kept_back = columns(tmp_path / "y.csv", "text,id", "x,1")
    options = DataOptions(label_columns="a,b", text_column="text")
    assert load_dataset(kept_back, options, needs_labels=False).labels is None
