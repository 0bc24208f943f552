"""Claims about data files: each format gives the same examples, and texts stay as they are."""

import csv
import gzip
import io
import json
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minllama.data import Dataset, count_rows, load_dataset, stream_rows
from minllama.errors import DataError, OptionError
from minllama.options import DataOptions

TEXTS = ["A warm , funny film .", 'He said "no" ||| twice', "  two\tspaces; é, 好 and 😀  "]
LABELS = ["good", "bad", "good"]


def write_labelled(path: Path) -> None:
    rows = zip(LABELS, TEXTS, strict=True)
    path.write_text("".join(f"{label} ||| {text}\n" for label, text in rows), encoding="utf-8")


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("label", "text"), *zip(LABELS, TEXTS, strict=True)])


def write_tsv(path: Path) -> None:
    texts = [text.replace("\t", " ") for text in TEXTS]
    rows = zip(LABELS, texts, strict=True)
    lines = "".join(f"{label}\t{text}\n" for label, text in [("label", "text"), *rows])
    path.write_text(lines, encoding="utf-8")


def records() -> list[dict[str, Any]]:
    return [{"label": a, "text": b} for a, b in zip(LABELS, TEXTS, strict=True)]


def write_jsonl(path: Path) -> None:
    lines = (json.dumps(record) + "\n" for record in records())
    path.write_text("".join(lines), encoding="utf-8")


def write_json(path: Path) -> None:
    path.write_text(json.dumps(records(), indent=1), encoding="utf-8")


def write_parquet(path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(records()), path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "labelled.txt": write_labelled,
    "comma.csv": write_csv,
    "tab.tsv": write_tsv,
    "lines.jsonl": write_jsonl,
    "lines.ndjson": write_jsonl,
    "LINES.JSON": write_jsonl,
    "list.json": write_json,
    "table.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_format_gives_the_same_examples(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    dataset = load_dataset(tmp_path / name)
    expected = list(TEXTS)
    if name.endswith(".txt"):
        expected[2] = expected[2].lstrip(" ")  # they belong to the separator
    if name.endswith(".tsv"):
        expected[2] = expected[2].replace("\t", " ")
    assert dataset.texts == expected
    assert dataset.labels == [1, 0, 1]
    assert dataset.label_names == ["bad", "good"]
    assert dataset.source == str(tmp_path / name)
    assert dataset.multi_label is False
    assert dataset.notices == ()
    assert dataset.class_counts() == [1, 2]
    assert [row.text for row in stream_rows(tmp_path / name)] == expected


@pytest.mark.parametrize("name", [name for name in WRITERS if not name.endswith("parquet")])
def test_compressed_files_are_read_like_others(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    compressed = tmp_path / f"{name}.gz"
    compressed.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert load_dataset(compressed).texts == load_dataset(tmp_path / name).texts


@pytest.mark.parametrize("name", [name for name in WRITERS if not name.endswith("parquet")])
def test_a_byte_order_mark_crlf_and_a_missing_last_newline_change_nothing(
    tmp_path: Path, name: str
) -> None:
    WRITERS[name](tmp_path / name)
    expected = load_dataset(tmp_path / name)
    content = (tmp_path / name).read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    for changed in (content, content.removesuffix(b"\r\n"), b"\xef\xbb\xbf" + content):
        (tmp_path / name).write_bytes(changed)
        assert load_dataset(tmp_path / name) == expected


@pytest.mark.parametrize("name", [name for name in WRITERS if not name.endswith("parquet")])
def test_blank_lines_are_no_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    expected = load_dataset(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(b"\n \n" + content.replace(b"\n", b"\n\n") + b"\n  \n")
    assert load_dataset(tmp_path / name) == expected


def test_only_the_first_separator_counts_and_only_line_feeds_end_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(
        b"0|||a|||b\n1  |||\ttabs \xe2\x80\xa8 and \x0b \x0c \xc2\x85 \r stay \n0 ||| c\n"
    )
    dataset = load_dataset(path)
    assert dataset.texts == ["a|||b", "tabs \u2028 and \x0b \x0c \x85 \r stay ", "c"]
    assert dataset.labels == [0, 1, 0]


@pytest.mark.parametrize(
    ("stem", "n_rows", "counts"),
    [
        ("sst-train", 8544, [1092, 2218, 1624, 2322, 1288]),
        ("sst-dev", 1101, [139, 289, 229, 279, 165]),
        ("cfimdb-train", 1707, [856, 851]),
        ("cfimdb-dev", 245, [123, 122]),
        ("cfimdb-test", 488, [488, 0]),  # placeholders, all of them
    ],
)
def test_the_shared_files_load(
    shared_data: Path, stem: str, n_rows: int, counts: list[int]
) -> None:
    names = shared_data / f"{stem.split('-')[0]}-label-mapping.json"
    dataset = load_dataset(shared_data / f"{stem}.txt", DataOptions(label_names=str(names)))
    assert len(dataset) == len(dataset.texts) == n_rows
    assert dataset.class_counts() == counts
    assert dataset.label_names == json.loads(names.read_text())
    lines = (shared_data / f"{stem}.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert dataset.labels == [int(line.split(" ||| ")[0]) for line in lines]
    assert dataset.texts == [line.split(" ||| ")[1] for line in lines]


any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")).filter(
    lambda text: text.strip()
)
any_rows = st.lists(st.tuples(st.sampled_from(["a", "b c", "7", "é"]), any_text), min_size=1)
hypothesis = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read_back(path: Path) -> list[tuple[str, str]]:
    dataset = load_dataset(path)
    assert dataset.labels is not None
    names = [dataset.label_names[dataset.classes_of(i)[0]] for i in range(len(dataset))]
    return list(zip(names, dataset.texts, strict=True))


@hypothesis
@given(rows=any_rows, quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_any_text_survives_csv(tmp_path: Path, rows: list[tuple[str, str]], quoting: int) -> None:
    # Where the writer ends lines with LF alone, it leaves a CR unquoted.
    line_end = "\r\n" if quoting == csv.QUOTE_MINIMAL else "\n"
    with (tmp_path / "x.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=quoting, lineterminator=line_end)
        writer.writerows([("label", "text"), *rows])
    assert read_back(tmp_path / "x.csv") == rows


@hypothesis
@given(rows=any_rows, ascii_only=st.booleans())
def test_any_text_survives_jsonl(
    tmp_path: Path, rows: list[tuple[str, str]], ascii_only: bool
) -> None:
    objects = ({"label": label, "text": text} for label, text in rows)
    lines = (json.dumps(o, ensure_ascii=ascii_only) + "\n" for o in objects)
    (tmp_path / "x.jsonl").write_text("".join(lines), encoding="utf-8", newline="")
    assert read_back(tmp_path / "x.jsonl") == rows


@hypothesis
@given(rows=any_rows, indent=st.sampled_from([None, 0, 2]))
def test_any_text_survives_a_json_list(
    tmp_path: Path, rows: list[tuple[str, str]], indent: int | None
) -> None:
    objects = [{"label": label, "text": text} for label, text in rows]
    (tmp_path / "x.json").write_text(json.dumps(objects, indent=indent), encoding="utf-8")
    assert read_back(tmp_path / "x.json") == rows


def test_csv_cells_may_span_lines_and_hold_quotes(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b'id,text,label\n1,"two\r\nlines, ""quoted""",a\n2,plain "quotes" inside,b\n')
    assert load_dataset(path).texts == ['two\r\nlines, "quoted"', 'plain "quotes" inside']
    assert [row.place for row in stream_rows(path)] == ["line 2", "line 4"]
    path.write_bytes(b"\n\n" + path.read_bytes())
    assert [row.place for row in stream_rows(path)] == ["line 4", "line 6"]


def test_semicolons_separate_where_the_first_line_has_no_comma(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('text;label\n"1,5 liters; no more";a\nb;b\n')
    assert load_dataset(path).texts == ["1,5 liters; no more", "b"]


def test_quotes_in_tsv_are_text_unless_the_cell_is_quoted_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text('text\tlabel\n"Great" film\ta\n"He said ""hi"""\tb\n"\tb\n"a" and "b"\ta\n')
    assert load_dataset(path).texts == ['"Great" film', 'He said "hi"', '"', '"a" and "b"']


def test_very_long_lines_and_cells_are_read(tmp_path: Path) -> None:
    text = "word " * 400_000  # two megabytes, above the csv module's own limit
    for name, content in (
        ("x.txt", f"a ||| {text}\n"),
        ("x.csv", f"label,text\na,{text}\n"),
        ("x.jsonl", json.dumps({"label": "a", "text": text})),
    ):
        (tmp_path / name).write_text(content)
        assert load_dataset(tmp_path / name).texts == [text]


@pytest.mark.parametrize(
    ("header", "text", "label"),
    [
        ("text,label", 0, 1),
        ("Label,Sentence", 1, 0),
        ("id,review,sentiment", 1, 2),
        ("text,label,label_text", 0, 1),
        ("sentence,text,label", 1, 2),  # `text` is the text where there is one
        ("label,category,tweet", 2, 0),
        ("label,words", 1, 0),  # what is left
        ("utterance,kind", 0, 1),
        (",text,label", 1, 2),  # the index that pandas writes
        (",words,label", 1, 2),
        ("x,y,z", None, None),
        ("id,text,mark", 1, None),
        ("review,comment,label", None, 2),
        ("text,stars,rating", 0, None),
        ("text", 0, None),
    ],
)
def test_columns_are_guessed_or_asked_for(
    tmp_path: Path, header: str, text: int | None, label: int | None
) -> None:
    path = tmp_path / "x.csv"
    path.write_text(header + "\n" + ",".join(f"cell {i}" for i in range(header.count(",") + 1)))
    if text is None or label is None:
        with pytest.raises(DataError, match=r"which column holds the (text|label)\?.*--\w+-column"):
            load_dataset(path)
        return
    dataset = load_dataset(path)
    assert (dataset.texts, dataset.label_names) == ([f"cell {text}"], [f"cell {label}"])


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,body,label,kind\na,b,c,d\n")
    dataset = load_dataset(path, DataOptions(text_column="body", label_column="kind"))
    assert (dataset.texts, dataset.label_names) == (["b"], ["d"])


def test_a_label_column_need_not_be_there_where_no_label_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("id,text\n1,a\n")
    options = DataOptions(label_column="kind")
    assert load_dataset(path, options, needs_labels=False).labels is None
    assert [row.text for row in stream_rows(path, options)] == ["a"]
    with pytest.raises(DataError, match="no column 'kind'; set --label-column to one of 'id', "):
        load_dataset(path, options)


def test_json_objects_need_not_have_the_same_keys(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"label": 1, "text": "b"}\n')
    dataset = load_dataset(path, needs_labels=False)
    assert dataset.texts == ["a", "b"]
    assert dataset.labels is None
    assert [(notice.kind, notice.count) for notice in dataset.notices] == [("unlabelled", 1)]
    with pytest.raises(DataError, match="line 1: no label;"):
        load_dataset(path)


@pytest.mark.parametrize(
    "content",
    [
        "-1 ||| a\n-1 ||| b\n",
        "||| a\n ||| b\n",
        "a\nb\n",
    ],
)
def test_unlabelled_lines_are_read_where_no_label_is_needed(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.txt"
    path.write_text(content)
    assert load_dataset(path, needs_labels=False) == Dataset(["a", "b"], None, [], str(path))
    with pytest.raises(DataError, match=r"2 bad rows|'a', but lines of 'label \|\|\| sen"):
        load_dataset(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", "text,label\na,\nb,-1\n"),
        ("x.csv", "id,text\n1,a\n2,b\n"),
        ("x.csv", "words\na\nb\n"),
        ("x.jsonl", '{"text": "a", "label": null}\n{"text": "b", "label": NaN}'),
        ("x.jsonl", '{"text": "a", "label": "unheard of"}\n{"text": "b"}'),
        ("x.jsonl", '{"text": "a", "label": {}}\n{"text": "b"}'),
    ],
)
def test_unlabelled_rows_are_read_where_no_label_is_needed(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    dataset = load_dataset(tmp_path / name, needs_labels=False, label_names=["good"])
    assert (dataset.texts, dataset.labels) == (["a", "b"], None)
    assert dataset.label_names == ["good"]


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_options_without_sense_are_refused() -> None:
    with pytest.raises(OptionError, match=r"^data_format must be one of labelled, text, csv, tsv"):
        DataOptions(data_format="xml")
    for name in ("text_column", "label_column", "label_names", "label_separator"):
        with pytest.raises(OptionError, match=f"^{name} must not be empty"):
            DataOptions(**{name: ""})


def test_standard_input_is_lines_of_text_or_what_the_option_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stdin(monkeypatch, b"first\n\n second \n")
    assert [(row.index, row.place, row.text) for row in stream_rows("-")] == [
        (0, "line 1", "first"),
        (1, "line 3", " second "),
    ]
    stdin(monkeypatch, b"1 ||| first\n-1 ||| second\n")
    assert [row.text for row in stream_rows("-")] == ["first", "second"]
    stdin(monkeypatch, b'{"id": 7, "text": "first"}\n')
    (row,) = stream_rows("-", DataOptions(data_format="jsonl"))
    assert row.record == {"id": 7, "text": "first"}
    stdin(monkeypatch, gzip.compress(b"text,id\nfirst,7\n"))
    (row,) = stream_rows("-", DataOptions(data_format="csv"))
    assert (row.text, row.record) == ("first", {"id": "7", "text": "first"})
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match=r"^standard input is closed; name a file$"):
        next(stream_rows("-"))


def test_a_stream_goes_on_from_any_row(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label\na,1\n,2\n" + '"c\nc",3\nd,4\n')
    options = DataOptions(skip_bad_rows=True)
    whole = list(stream_rows(path, options))
    assert [(row.index, row.text) for row in whole] == [(0, "a"), (2, "c\nc"), (3, "d")]
    for start in range(6):
        assert list(stream_rows(path, options, start=start)) == [
            row for row in whole if row.index >= start
        ]
    # What lies before the start has been dealt with.
    assert [row.index for row in stream_rows(path, start=2)] == [2, 3]


def test_rows_are_counted_before_they_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label\na,1\n,2\nc,3\n")
    count, bad_rows = count_rows(path, DataOptions(skip_bad_rows=True))
    assert (count, bad_rows.count, bad_rows.summary()) == (2, 1, "line 3: the text is empty")
    with pytest.raises(DataError, match="line 3: the text is empty; fix it"):
        count_rows(path)


def test_streams_take_constant_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    with path.open("w") as file:
        file.write("text,label\n")
        for i in range(30_000):
            file.write(f'"{"word " * 100}{i}",a\n')
    tracemalloc.start()
    n_rows = sum(1 for _ in stream_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_rows == 30_000
    assert peak < 2**20 < path.stat().st_size / 10


def test_the_text_of_a_stream_of_objects_is_found_by_its_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a1"}\n{"id": "a2", "text": "great"}\n')
    options = DataOptions(skip_bad_rows=True)
    for chosen in (options, replace(options, text_column="text")):
        assert [row.text for row in stream_rows(path, chosen)] == ["great"]
    with pytest.raises(DataError, match="line 1: no 'text'"):
        list(stream_rows(path))


def test_labels_that_nobody_asks_for_may_be_any_column(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,topic,rating\nfine,a,5\n")
    assert [row.text for row in stream_rows(path)] == ["fine"]
    with pytest.raises(DataError, match="which column holds the label"):
        load_dataset(path)


def test_objects_are_not_taken_for_lines_of_text(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text('{"text": "fine"}\n')
    with pytest.raises(DataError, match="JSON objects; read it with --data-format jsonl"):
        list(stream_rows(path))
    assert [row.text for row in stream_rows(path, DataOptions(data_format="jsonl"))] == ["fine"]
    assert len(list(stream_rows(path, DataOptions(data_format="text")))) == 1
    path.write_text("{text}\n")
    assert [row.text for row in stream_rows(path)] == ["{text}"]
