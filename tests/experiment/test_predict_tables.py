"""Predictions as tables: read back by pandas, pyarrow and csv, interrupted anywhere and resumed."""

import csv
import io
import itertools
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from minllama.cli.output_file import OutputFile
from minllama.data import load_dataset
from minllama.errors import DataError
from minllama.experiment import parquet_output
from minllama.experiment import resume as resuming
from minllama.experiment.predict import predict_stream
from minllama.experiment.resume import Done, read_done
from minllama.experiment.tables import cell_of, cells_of, layout_of, record_of, row_of, rows_in
from minllama.options import DataOptions
from tests.classifier_cases import embedding, zero_shot

DELIMITERS = {"csv": ",", "tsv": "\t"}
# Each class name would break a careless table.
LABELS = ("good, or so", 'b"ad', "two\nlines")
TEXTS = [
    'It broke, "again"',
    "two\nlines, and a ,\tthird",
    "a\r\nb",
    "a lone \r return",
    '"',
    " padded ",
    "=1+1",
    "'quoted'",
    '""',
    "plain",
    "x" * 90,
]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(resuming, "CHUNK", 4)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    made = [{"id": f"00{i}", "text": text, "n": i} for i, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def lines_of(classifier, source, **options):
    data = options.pop("data", DataOptions())
    return list(itertools.chain.from_iterable(predict_stream(classifier, source, data, **options)))


def records_of(classifier, source, **options):
    return [json.loads(line) for line in lines_of(classifier, source, **options)]


def written(classifier, source, output, **options):
    """The bytes of a whole run into `output`, resuming what is there."""
    data = options.pop("data", DataOptions())
    output_format = options.pop("output_format")
    file = OutputFile(str(output), output_format)
    done = file.done()
    chunks = predict_stream(
        classifier, source, data, output_format=output_format, done=done, **options
    )
    first = next(chunks, [])
    with file.opened(done) as stream:
        for lines in itertools.chain([first], chunks):
            stream.writelines(lines)
    file.finish()
    return output.read_bytes()


@pytest.mark.parametrize("output_format", ["csv", "tsv"])
@pytest.mark.parametrize("kind", [embedding, zero_shot])
def test_a_table_says_what_lines_of_json_say(rows, tmp_path, output_format, kind):
    classifier = kind(labels=LABELS)
    records = records_of(classifier, rows)
    output = tmp_path / f"out.{output_format}"
    output.write_bytes("".join(lines_of(classifier, rows, output_format=output_format)).encode())
    columns = [f"probability_{label}" for label in LABELS]
    extra = ["score"] if kind is zero_shot else []
    names = ["index", "text", "label", *columns, *extra, "classifier"]
    with output.open(encoding="utf-8", newline="") as file:
        header, *cells = csv.reader(file, delimiter=DELIMITERS[output_format], strict=True)
    assert header == names
    assert [row[1] for row in cells] == TEXTS
    assert [row[2] for row in cells] == [record["label"] for record in records]
    table = pd.read_csv(output, sep=DELIMITERS[output_format], keep_default_na=False)
    assert list(table.columns) == names
    assert list(table["text"]) == TEXTS
    assert table["index"].tolist() == list(range(len(TEXTS)))
    expected = [list(record["probabilities"].values()) for record in records]
    np.testing.assert_allclose(table[columns].to_numpy(), expected, rtol=1e-15)
    assert [list(map(float, row[3:6])) for row in cells] == expected


def test_rows_end_as_unix_files_do_and_have_no_mark(rows):
    text = "".join(lines_of(embedding(), rows, output_format="csv"))
    assert text.startswith("index,text,")
    assert text.replace("a\r\nb", "").count("\r\n") == 0
    assert text.endswith("\n")


@pytest.mark.parametrize("output_format", ["csv", "tsv", "parquet"])
def test_kept_columns_are_in_front_and_identifiers_stay_text(rows, tmp_path, output_format):
    output = tmp_path / f"out.{output_format}"
    written(embedding(), rows, output, output_format=output_format, columns=["n", "id"])
    if output_format == "parquet":
        table = parquet.read_table(output)
        assert table.column_names[:5] == ["n", "id", "index", "text", "label"]
        assert table.schema.field("id").type == pa.string()
        assert table.schema.field("n").type == pa.int64()
        assert table["id"].to_pylist()[7] == "007"
    else:
        table = pd.read_csv(output, sep=DELIMITERS[output_format], dtype=str)
        assert list(table.columns[:5]) == ["n", "id", "index", "text", "label"]
        assert table["id"][7] == "007"


@pytest.mark.parametrize("output_format", ["csv", "parquet"])
def test_kept_columns_that_are_called_as_ours_get_names_of_their_own(
    tmp_path, output_format, monkeypatch
):
    rows, output = tmp_path / "rows.jsonl", tmp_path / f"out.{output_format}"
    row = {"text": "a", "label": "gold", "input_label": "?", "index": 7, "probability_bad": "p"}
    rows.write_text(json.dumps(row) + "\n")
    notices = []
    keep = {"columns": ["all"], "notices": notices}
    written(embedding(), rows, output, output_format=output_format, **keep)
    table = pd.read_csv(output) if output_format == "csv" else pd.read_parquet(output)
    names = ["input_input_label", "input_label", "input_index", "input_probability_bad"]
    assert list(table.columns[:5]) == [*names, "index"]
    assert table.iloc[0, :4].tolist() == ["gold", "?", 7, "p"]
    assert table["index"][0] == 0
    if output_format == "csv":
        (notice,) = notices
        assert "'label' is named 'input_input_label' in the table, 'index' is named" in notice
    # Resumed, the names are the same.
    before = output.read_bytes()
    assert written(embedding(), rows, output, output_format=output_format, **keep) == before


def test_the_text_is_there_once_though_it_is_asked_for(rows):
    for columns in (["id", "text"], ["all"]):
        line = lines_of(embedding(), rows, output_format="csv", columns=columns)[0]
        names = line.partition("\n")[0].split(",")
        assert names.count("text") == 1
        assert names[0] == "id"


def test_cells_that_are_no_text_are_written_as_json(tmp_path):
    rows = tmp_path / "rows.jsonl"
    values = [None, True, 1.5, 10**20, ["a", "é"], {"x": None}, "", "null", float("nan"), "\ud800"]
    rows.write_text("".join(json.dumps({"text": "a", "v": value}) + "\n" for value in values))
    text = "".join(lines_of(embedding(), rows, output_format="csv", columns=["v"]))
    cells = [row[0] for row in csv.reader(io.StringIO(text))][1:]
    assert cells == [
        *("", "true", "1.5", "1" + "0" * 20, '["a", "é"]', '{"x": null}', "", "null", "", r"\ud800")
    ]


@pytest.mark.parametrize("output_format", ["csv", "tsv"])
def test_several_labels_are_a_json_list_in_one_cell(rows, output_format):
    classifier = embedding(labels=LABELS, multi_label=True)
    expected = [record["label"] for record in records_of(classifier, rows)]
    text = "".join(lines_of(classifier, rows, output_format=output_format))
    table = pd.read_csv(io.StringIO(text), sep=DELIMITERS[output_format])
    assert [json.loads(cell) for cell in table["label"]] == expected
    assert len({len(labels) for labels in expected}) > 1


def test_several_labels_are_lists_in_parquet(rows, tmp_path):
    classifier, output = embedding(labels=LABELS, multi_label=True), tmp_path / "out.parquet"
    expected = [record["label"] for record in records_of(classifier, rows)]
    written(classifier, rows, output, output_format="parquet")
    table = parquet.read_table(output)
    assert table["label"].to_pylist() == expected
    assert table.schema.field("label").type == pa.list_(pa.string())


def test_no_label_in_any_row_is_a_column_of_empty_lists(tmp_path):
    lines, output = tmp_path / "lines.jsonl", tmp_path / "out.parquet"
    lines.write_text('{"index": 0, "text": "a", "label": [], "probabilities": {"x": 0.1}}\n')
    parquet_output.write_parquet(lines, output)
    table = parquet.read_table(output)
    assert table.schema.field("label").type == pa.list_(pa.string())
    assert table["label"].to_pylist() == [[]]


def test_parquet_holds_what_lines_of_json_hold(rows, tmp_path):
    classifier, output = zero_shot(labels=LABELS), tmp_path / "out.parquet"
    records = records_of(classifier, rows)
    written(classifier, rows, output, output_format="parquet")
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "out.parquet"}
    table = parquet.read_table(output)
    assert table["text"].to_pylist() == TEXTS
    assert table["label"].to_pylist() == [record["label"] for record in records]
    for label in LABELS:
        column = table[f"probability_{label}"]
        assert column.type == pa.float64()
        assert column.to_pylist() == [record["probabilities"][label] for record in records]
    pd.testing.assert_frame_equal(
        pd.read_parquet(output)[["index", "text"]],
        pd.DataFrame({"index": range(len(TEXTS)), "text": TEXTS}),
        check_dtype=False,
    )


COLUMNS = {
    "text": (["007", "a", None], pa.string(), None),
    "whole numbers": ([1, -2, None], pa.int64(), None),
    "large whole numbers": ([1, 2**63 - 1], pa.int64(), None),
    "beyond 64 bits": ([1, 2**63], pa.string(), ["1", "9223372036854775808"]),
    "numbers": ([1, 2.5], pa.float64(), None),
    "numbers that no float is": ([2**53 + 1, 2.5], pa.string(), ["9007199254740993", "2.5"]),
    "truth values": ([True, None], pa.bool_(), None),
    "truth values and numbers": ([True, 1], pa.string(), ["true", "1"]),
    "text and numbers": (["7", 7, 7.5], pa.string(), ["7", "7", "7.5"]),
    "nothing": ([None, None], pa.string(), None),
    "lists": ([["a"], [], None, ["b", None]], pa.list_(pa.string()), None),
    "lists of numbers": ([[1], [2.5]], pa.list_(pa.float64()), None),
    "lists of several kinds": ([[1], ["x"]], pa.string(), ["[1]", '["x"]']),
    "lists and text": ([["a"], "b"], pa.string(), ['["a"]', "b"]),
    "structures": ([{"a": "é"}, None], pa.string(), ['{"a": "é"}', None]),
    "half a character": (["\ud800"], pa.string(), [r"\ud800"]),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_of_parquet_have_the_type_of_all_their_values(tmp_path, case):
    values, expected_type, expected = COLUMNS[case]
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.parquet"
    rows.write_text("".join(json.dumps({"text": "a", "v": value}) + "\n" for value in values))
    for _ in range(2):  # the second run resumes the first
        written(embedding(), rows, output, output_format="parquet", columns=["all"])
        table = parquet.read_table(output)
        assert table.schema.field("v").type == expected_type
        assert table["v"].to_pylist() == (values if expected is None else expected)


def test_row_groups_are_bounded(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_output, "MOST_ROWS", 3)
    written(embedding(), rows, tmp_path / "out.parquet", output_format="parquet")
    groups = parquet.ParquetFile(tmp_path / "out.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [3, 3, 3, 2]
    monkeypatch.setattr(parquet_output, "MOST_BYTES", 1)
    written(embedding(), rows, tmp_path / "two.parquet", output_format="parquet")
    assert parquet.ParquetFile(tmp_path / "two.parquet").metadata.num_row_groups == 11


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("output_format", ["csv", "tsv"])
def test_a_table_that_was_cut_at_any_byte_is_gone_on_with_to_the_same_file(
    tmp_path, output_format, mark
):
    rows, output = tmp_path / "rows.jsonl", tmp_path / f"out.{output_format}"
    texts = ['é "so"\n\n,"', "ü\r\n", "\U0001f600\t", '"', "a,b", 'x"\n"y']
    made = [{"é\n,": text, "text": f"{i} lines", "n": i} for i, text in enumerate(texts)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    classifier, kept = embedding(labels=LABELS), {"columns": ["all"]}
    given = {"output_format": output_format, **kept}
    uncut = (mark + "".join(lines_of(classifier, rows, **given))).encode()
    monkey = classifier.predict_proba
    known: dict = {}

    def remembered(texts, progress=None):  # the same numbers for each of some hundred runs
        key = tuple(texts)
        if key not in known:
            known[key] = monkey(texts)
        return known[key]

    classifier.predict_proba = remembered
    file = OutputFile(str(output), output_format, bool(mark))
    for place in range(len(uncut) + 1):
        output.write_bytes(uncut[:place])
        done = file.done()
        with file.opened(done) as stream:
            stream.writelines(lines_of(classifier, rows, done=done, **given))
        assert output.read_bytes() == uncut, place


@pytest.mark.parametrize("columns", [[], ["all"], ["id", "n"]])
def test_parquet_that_was_cut_is_gone_on_with_in_the_lines_beside_it(rows, tmp_path, columns):
    classifier, output = embedding(), tmp_path / "out.parquet"
    uncut = written(classifier, rows, output, output_format="parquet", columns=columns)
    output.unlink()
    lines = "".join(lines_of(classifier, rows, columns=columns)).encode()
    beside = tmp_path / "out.parquet.partial.jsonl"
    for place in (0, 1, 100, len(lines) // 2, len(lines) - 1, len(lines)):
        beside.write_bytes(lines[:place])
        file = OutputFile(str(output), "parquet")
        assert file.existing == beside
        again = written(classifier, rows, output, output_format="parquet", columns=columns)
        assert again == uncut
        assert not beside.exists()
        output.unlink()


def test_a_whole_parquet_file_is_gone_on_with_where_its_input_has_grown(tmp_path):
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.parquet"
    made = [{"text": text, "label": i, "x": {"y": i}, "n": 1} for i, text in enumerate(TEXTS)]
    made[-1]["n"] = 2.5
    lines = [json.dumps(row) + "\n" for row in made]
    rows.write_text("".join(lines))
    given = {"output_format": "parquet", "columns": ["all"]}
    uncut = written(embedding(), rows, tmp_path / "uncut.parquet", **given)
    rows.write_text("".join(lines[:6]))
    written(embedding(), rows, output, **given)
    rows.write_text("".join(lines))
    assert written(embedding(), rows, output, **given) == uncut
    assert not OutputFile(str(output), "parquet").written.exists()


@pytest.mark.parametrize("output_format", ["csv", "tsv", "parquet"])
def test_other_runs_are_refused_and_the_output_is_kept(rows, tmp_path, output_format):
    output = tmp_path / f"out.{output_format}"
    given = {"output_format": output_format}
    before = written(embedding(), rows, output, columns=["id"], **given)
    nearly = embedding()
    nearly.score.weight.data[0, 0] += 1e-6
    others = {
        "classifier": (nearly, rows, ["id"]),
        "other classifier|something else": (embedding(labels=("a", "b", "c")), rows, ["id"]),
        "score|classifier": (zero_shot(), rows, ["id"]),
        "the run's original --keep-columns": (embedding(), rows, ["n"]),
        "give the run's original --keep-columns": (embedding(), rows, []),
        "run's original --keep-columns": (embedding(), rows, ["all"]),
        "no such row with that text": (embedding(), tmp_path / "other.jsonl", ["id"]),
    }
    lines = rows.read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join([*lines[:-1], '{"text": "new", "id": "1"}\n']))
    for message, (classifier, source, columns) in others.items():
        with pytest.raises(DataError, match=message):
            written(classifier, source, output, columns=columns, **given)
        assert output.read_bytes() == before
        assert not (tmp_path / "out.parquet.partial.jsonl").exists()


NO_TABLES = {
    "another table": b"id,text\n1,a\n",
    "lines of JSON": b'{"index": 0, "text": "a", "probabilities": {}}\n',
    "no UTF-8": b"index,text,label,\xff\n",
    "names twice": b"index,text,label,label,classifier\n",
    "notes": b"my only notes\n",
    "an index that is none": b"index,text,label,probability_a,classifier\nx,a,a,1.0,d\n",
    "a probability that is none": b"index,text,label,probability_a,classifier\n0,a,a,x,d\n",
    "too few cells": b"index,text,label,probability_a,classifier\n0,a\n",
    "a quote in a cell": b'index,text,label,probability_a,classifier\n0,"a"b"",a,1,d\n',
    "out of order": b"index,text,label,probability_a,classifier\n1,a,a,1,d\n1,b,a,1,d\n",
}


@pytest.mark.parametrize("case", NO_TABLES)
def test_a_file_of_something_else_is_refused(tmp_path, case):
    output = tmp_path / "out.csv"
    output.write_bytes(NO_TABLES[case])
    with pytest.raises(DataError, match=r"line \d: not a prediction of") as caught:
        read_done(output, "csv")
    assert "\n" not in str(caught.value)
    assert output.read_bytes() == NO_TABLES[case]


@pytest.mark.parametrize(
    "content", [b"my only notes", b"index,tex,", b"\xef\xbb", b"\xef\xbb\xbfi"]
)
def test_notes_without_an_end_of_line_are_no_header_that_was_cut(rows, tmp_path, content):
    output = tmp_path / "out.csv"
    output.write_bytes(content)
    if content.startswith(b"\xef\xbb"):
        assert lines_of(embedding(), rows, output_format="csv", done=read_done(output, "csv"))
        return
    with pytest.raises(DataError, match="not a table that `minllama classify` started"):
        written(embedding(), rows, output, output_format="csv")
    assert output.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"PAR1", b"notes", "cut", "another"])
def test_parquet_without_its_end_is_refused(rows, tmp_path, content):
    output = tmp_path / "out.parquet"
    if content == "another":
        parquet.write_table(pa.table({"a": [1]}), output)
    else:
        whole = written(embedding(), rows, output, output_format="parquet")
        output.write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    before = output.read_bytes()
    with pytest.raises(DataError, match=r"out.parquet: .* or replace it with --force") as caught:
        written(embedding(), rows, output, output_format="parquet")
    assert "\n" not in str(caught.value)
    assert output.read_bytes() == before


def test_no_file_and_no_whole_row_are_a_start(tmp_path):
    assert read_done(tmp_path / "none.csv", "csv") == Done()
    (tmp_path / "half.csv").write_bytes(b"")
    assert read_done(tmp_path / "half.csv", "csv") == Done()


def test_rows_of_json_may_have_keys_that_the_first_ones_lack(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "a", "x": 1}] * 9 + [{"text": "b", "y": 2}, {"text": ""}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataOptions(skip_bad_rows=True)
    text = "".join(lines_of(embedding(), path, output_format="csv", columns=["all"], data=data))
    table = pd.read_csv(io.StringIO(text))
    assert list(table.columns[:3]) == ["x", "y", "index"]
    assert table["y"].isna().tolist() == [True] * 9 + [False]


def test_keys_that_come_late_in_standard_input_are_refused(tmp_path, monkeypatch):
    from minllama.experiment import predict as predicting

    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "x": 1}\n' * 5 + '{"text": "b", "y": 2}\n')
    stream = predicting.stream_rows

    monkeypatch.setattr(predicting, "stream_rows", lambda source, *a, **k: stream(path, *a, **k))
    given = {"output_format": "csv", "columns": ["all"]}
    with pytest.raises(DataError, match="-: row 5 has the column 'y', which the first rows lack"):
        lines_of(embedding(), "-", **given)
    path.write_text('{"text": "a", "label": 1}\n' * 5 + '{"text": "b"}\n')
    uncut = "".join(lines_of(embedding(), "-", **given)).encode()
    output = tmp_path / "out.csv"
    output.write_bytes(uncut[:-9])
    assert written(embedding(), "-", output, **given) == uncut


def test_what_is_written_is_training_data(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    classifier = embedding()
    expected = [record["label"] for record in records_of(classifier, rows)]
    for output_format in ("csv", "parquet"):
        output = tmp_path / f"out.{output_format}"
        written(classifier, rows, output, output_format=output_format)
        dataset = load_dataset(output)
        assert list(dataset.texts) == TEXTS
        assert [dataset.label_names[i] for i in dataset.labels] == expected


@pytest.mark.parametrize("output_format", ["csv", "tsv", "parquet"])
def test_several_labels_are_training_data(rows, tmp_path, output_format):
    labels = ('good, "or so"', "[bad]", "it's, é")
    classifier, output = (
        embedding(labels=labels, multi_label=True),
        tmp_path / f"out.{output_format}",
    )
    classifier.score.weight.data *= 3
    expected = [record["label"] for record in records_of(classifier, rows)]
    assert len(set(map(len, expected))) > 2  # none, one and several
    written(classifier, rows, output, output_format=output_format)
    dataset = load_dataset(output, DataOptions(multi_label=True), label_names=labels)
    assert list(dataset.texts) == TEXTS
    assert [[labels[i] for i in row] for row in dataset.labels] == expected


def test_any_field_of_a_record_is_a_column():
    record = {
        "index": 3,
        "text": "a",
        "value": 2.5,
        "thresholds": {"a": 0.5},
        "classifier": "d",
        "columns": {"value": "mine"},
    }
    layout = layout_of(record, ["value"])
    assert layout.names == ("input_value", "index", "text", "value", "thresholds_a", "classifier")
    row = row_of(layout.values(record), ",")
    assert row == "mine,3,a,2.5,0.5,d\n"
    read = record_of(layout.names, cells_of(row.encode(), ","))
    assert (read["index"], read["value"], read["classifier"]) == (3, 2.5, "d")
    assert read["columns"] == {"input_value": "mine"}


def test_single_precision_reads_back_equal():
    values = np.random.default_rng(0).random(200, dtype=np.float32).tolist()
    assert [float(cell_of(value)) for value in values] == values


def test_rows_are_found_as_the_csv_module_finds_them():
    texts = ["", '"', '""', "\n", '"\n', '\n"', "\r", ",", 'a"\n"b', "é\n\né", "\r\n"]
    table = [list(pair) for pair in itertools.product(texts, repeat=2)]
    data = "".join(row_of(row, ",") for row in table).encode()
    found = [list(cells_of(row, ",")) for _, row in rows_in(io.BytesIO(data))]
    assert found == table == list(csv.reader(io.StringIO(data.decode(), newline=""), strict=True))
