"""Claims about data that cannot be used: one line says what, where and the remedy."""

import gzip
import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minllama.data import Dataset, count_rows, load_dataset, stream_rows
from minllama.data.lines import MAX_LINE_BYTES
from minllama.errors import DataError
from minllama.options import DataOptions

MEND = "; fix it, or skip it with --skip-bad-rows"
MEND_ALL = "; fix them, or skip them with --skip-bad-rows"
CP1252 = "read it with --encoding cp1252, or convert it with: iconv -f cp1252 -t utf-8"
HEADER = "; if the first line is an example, not a header, add --no-header --columns "
NO_ROWS = ": no rows; give a file with one example per line"


def refusal(path: Path, options: DataOptions | None = None) -> str:
    """The error of loading `path`, after the folder's name."""
    with pytest.raises(DataError) as caught:
        load_dataset(path, options)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{path.parent}{os.sep}").replace(f" {path} ", f" {path.name} ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", NO_ROWS),
        ("mark.csv", b"\xef\xbb\xbf", NO_ROWS),
        ("header.csv", b"text,label\n", NO_ROWS),
        ("empty.tsv", b"", NO_ROWS),
        ("blank.jsonl", b"\n\n", NO_ROWS),
        ("empty.json", b" [ ] ", NO_ROWS),
        ("x.txt", b"1 ||| a\nb\n", f", line 2: no ||| between label and text{MEND}"),
        ("x.txt", b"1 ||| a\n1 |||  \n", f", line 2: the text is empty{MEND}"),
        ("x.txt", b"1 ||| a\n ||| b\n", f", line 2: no label{MEND}"),
        ("x.csv", b"text,label\n \t,1\n", f", line 2: the text is empty{MEND}"),
        (
            "x.txt",
            b"1 ||| a\n1 ||| b\0\n",
            ", line 2: the text contains a NUL character (is the file UTF-16, or not a text "
            f"file?){MEND}",
        ),
        (
            "x.txt",
            b"1 ||| a\n-1 ||| b\n",
            ", line 2: label -1 means no label (if it is a class, name it in a file for "
            f"--label-names){MEND}",
        ),
        ("x.csv", b"text,label\na,b,c\n", f", line 2: columns: 3 here, 2 in the first line{MEND}"),
        ("x.csv", b"text,label\na,b\nc\n", f", line 3: columns: 1 here, 2 in the first line{MEND}"),
        (
            "x.csv",
            b'text,label\n"a,b\nc,d\n',
            f", line 2: a quote is not closed{MEND}",
        ),
        ("x.csv", b'text,label\n"a"b,c\n', f", line 2: not CSV (',' expected after '\"'){MEND}"),
        (
            "x.csv",
            b"text,label\na\rb,c\n",
            f", line 2: a carriage return outside quotes (lines must end with LF or CRLF){MEND}",
        ),
        (
            "x.csv",
            b"text,label\ra,b\r",
            ": lines end with a carriage return only, as on old Macs; convert it with: tr '\\r' "
            "'\\n' < x.csv > new.txt",
        ),
        ("x.csv", b"text,text,label\na,b,c\n", ": has several columns named 'text'; rename them"),
        (
            "x.csv",
            b"a,b,c\na,b,c\n",
            ": which column holds the text? there are 'a', 'b', 'c'; name one with "
            f"--text-column{HEADER}text,label,... (one name per column)",
        ),
        (
            "x.csv",
            b"a,b,text\na,b,c\n",
            ": which column holds the label? there are 'a', 'b', 'text'; name one with "
            "--label-column, or the columns of 0 and 1 with --label-columns",
        ),
        (
            "x.csv",
            b"text,class,topic\na,b,c\n",
            ": which column holds the label? there are 'class', "
            "'topic'; name one with --label-column",
        ),
        (
            "x.jsonl",
            b'{"text": "a"\n',
            ", line 1: not JSON (Expecting ',' delimiter at character 13)" + MEND,
        ),
        ("x.jsonl", b'["a"]\n', f", line 1: ['a'] is not a JSON object{MEND}"),
        (
            "x.jsonl",
            b"{'text': 'a'}\n",
            ", line 1: not JSON (Expecting property name enclosed in double quotes at character "
            f"2){MEND}; Python dictionary syntax: convert it with: cat x.jsonl | python -c "
            "'import ast, json, sys; [print(json.dumps(ast.literal_eval(r))) for r in "
            "sys.stdin]' > new.jsonl",
        ),
        ("x.jsonl", b'{"a":' * 99_999, f", line 1: JSON that is nested too deeply{MEND}"),
        (
            "x.jsonl",
            b'{"text": ' + b"1" * 5000 + b"}",
            f", line 1: JSON with a number of too many digits{MEND}",
        ),
        ("x.jsonl", b'{"text": 3, "label": 1}', f", line 1: 'text' holds int, no text{MEND}"),
        ("x.jsonl", b'{"text": null, "label": 1}', f", line 1: no 'text'{MEND}"),
        (
            "x.jsonl",
            b'{"text": "\\ud83d", "label": 1}',
            f", line 1: the text contains half of a character (a lone surrogate){MEND}",
        ),
        (
            "x.jsonl",
            b'{"text": "a", "label": {"b": 1}}',
            f", line 1: label {{'b': 1}} is neither a name nor a number{MEND}",
        ),
        (
            "x.jsonl",
            b'{"text": "a", "label": ["b", null]}',
            f", line 1: ['b', None] contains an empty label{MEND}",
        ),
        (
            "x.jsonl",
            b'{"text": "a", "label": ["b", "b"]}',
            f", line 1: ['b', 'b'] contains a label twice; give each name or number once{MEND}",
        ),
        (
            "x.json",
            b'[{"text": "a", "label": 1},\n\n{"text":]',
            ", line 3: not JSON (Expecting value at character 9)",
        ),
        (
            "x.json",
            b'[{"text": "a", "label": 1}\n{}]',
            ", line 1: no comma or ] after this object",
        ),
        (
            "x.json",
            b'[{"text": "a", "label": 1}',
            ", line 1: no comma or ] after this object",
        ),
        (
            "x.json",
            b'[{"text": "a", "label": 1},]',
            ", line 1: not JSON (Expecting value at character 28)",
        ),
        ("x.json", b'[{"text": "a", "label": 1}] []', ": extra data after the end of the list"),
        ("x.json", b'[\n{"text": "a", "label": 1}, 3]', f", line 2: 3 is not a JSON object{MEND}"),
        ("x.json", b"[" * 99_999, ", line 1: JSON that is nested too deeply"),
        (
            "x.txt",
            b"a" * MAX_LINE_BYTES + b"a",
            ", line 1: longer than 16,777,216 bytes; is this a text file?",
        ),
        (
            "x.dat",
            b"1 ||| a",
            ": unknown extension .dat; give the format with --data-format (labelled, text, csv, "
            "tsv, jsonl, json, parquet)",
        ),
    ],
)
def test_what_cannot_be_used_is_one_literal_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name) == name + message


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("x.txt", b"1 ||| a\n0 ||| caf\xe9\n", "line 2: byte 10 (0xe9)"),
        ("x.csv", b'text,label\n"two\nl\xe9nes",a\n', "line 3: byte 2 (0xe9)"),
        ("x.csv", b'text,label\n"two\xe8\nl\xe9nes",a\n', "line 2: byte 5 (0xe8)"),
        ("x.tsv", b"text\tlabel\na\t\xff\n", "line 2: byte 3 (0xff)"),
        ("x.jsonl", b'{"text":"\xc3"}\n', "line 1: byte 10 (0xc3)"),
        ("x.json", b'[\n\n{"text":"ab\xff"}]', "line 3: byte 12 (0xff)"),
        ("head.csv", b"text,\xe9tat\na,b\n", "line 1: byte 6 (0xe9)"),
    ],
)
def test_a_wrong_encoding_is_told_with_line_and_byte(
    tmp_path: Path, name: str, content: bytes, where: str
) -> None:
    (tmp_path / name).write_bytes(content)
    bad_row = "" if name in ("x.json", "head.csv") else MEND
    assert refusal(tmp_path / name) == f"{name}, {where} is not UTF-8{bad_row}; {CP1252}"


def test_all_bad_rows_are_counted_and_the_first_ten_shown(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label\n" + "good,1\n,2\n" * 12)
    lines = "lines 3, 5, 7, 9, 11, 13, 15, 17, 19 and 21: the text is empty"
    assert refusal(path) == f"x.csv: 12 bad rows: {lines}; and 2 more{MEND_ALL}"
    with pytest.raises(DataError) as caught:
        count_rows(path)
    assert str(caught.value) == f"{path}: 12 bad rows: {lines}; and 2 more{MEND_ALL}"


def test_bad_rows_of_every_kind_can_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(
        b'text,label\n"unclos\xe9d"x,1\na,1\nl\xe9,1\n,1\none\nb,\nc,-1\nd,1\n'
        b'"never closed,2\ne,2\n'
    )
    dataset = load_dataset(path, DataOptions(skip_bad_rows=True))
    assert dataset.texts == ["a", "d", "e"]  # a quote that is open to the end costs its line
    (notice,) = dataset.notices
    assert (notice.kind, notice.count) == ("skipped", 7)
    assert str(notice).startswith(f"{path}: bad rows skipped: 7 of 10 (line 2: not CSV (")
    places = re.findall(r"line \d+", str(notice))
    assert places == [f"line {n}" for n in (2, 4, 5, 6, 7, 8, 10)]


def test_a_file_of_bad_rows_alone_is_refused_even_so(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("1\n2\n")
    message = "x.jsonl: all 2 rows are bad: line 1: 1 is not a JSON object; line 2: 2 is not a JSON"
    assert refusal(path, DataOptions(skip_bad_rows=True)) == f"{message} object"


def test_a_stream_stops_at_a_bad_row_with_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"first\nsecond \xff\nthird\n")
    rows = stream_rows(path)
    assert next(rows).text == "first"
    with pytest.raises(DataError, match=r"x\.txt, line 2: byte 8 \(0xff\) is not UTF-8"):
        next(rows)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing.csv", "'nothing.csv': no such file"),
        ("data/train.jsonl.gz", "'data/train.jsonl.gz': no such file"),
        ("nothing", "'nothing': no such file"),
        (Path("owner/name"), "'owner/name': no such file"),
        ("a/b/c/d", "'a/b/c/d': no such file"),
        ("a\nb", r"'a\nb': no such file"),
        ("a\0b", r"'a\x00b': no such file"),
        ("~no one/x", "'~no one/x': "),
        (
            "x" * 5000,
            "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...: is not a path (",
        ),
        ("", "an empty name: not a file; name a file, or - for standard input"),
        (".", ".: not a file; name a file, or - for standard input"),
        ("/dev/zero", "/dev/zero: not a file; name a file, or - for standard input"),
    ],
)
def test_what_is_no_file_is_one_line(source: str | Path, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(source)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_damaged_compressed_files_are_one_line(tmp_path: Path) -> None:
    whole = gzip.compress(b"text,label\n" + b"".join(b"%d,b\n" % (i**5) for i in range(2000)))
    path = tmp_path / "x.csv.gz"
    cut, wrong_sum = whole[:-2000], whole[:-8] + b"12345678"
    for damaged in (cut, wrong_sum, whole[:3000] + b"damage" + whole[3006:]):
        path.write_bytes(damaged)
        assert re.fullmatch(r"x\.csv\.gz, line \d+: cannot be read \(.+\)", refusal(path))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.text('text,label\t\n\r";|{}[]:1a\0\ufeff ', max_size=60).map(str.encode),
    ),
    kind=st.sampled_from(["labelled", "text", "csv", "tsv", "jsonl", "json", "parquet"]),
    compress=st.booleans(),
    skip=st.booleans(),
)
def test_any_bytes_are_examples_or_one_line(
    tmp_path: Path, content: bytes, kind: str, compress: bool, skip: bool
) -> None:
    path = tmp_path / "x"
    path.write_bytes(gzip.compress(content) if compress else content)
    options = DataOptions(data_format=kind, skip_bad_rows=skip)
    outcome: Dataset | DataError
    try:
        outcome = load_dataset(path, options)
    except DataError as error:
        outcome = error
    if isinstance(outcome, DataError):
        assert "\n" not in str(outcome)
    else:
        assert len(outcome) == len(outcome.labels or ()) > 0
        assert all(outcome.texts)


def test_columns_of_one_label_each_are_asked_about(tmp_path):
    (tmp_path / "x.csv").write_text("text,late,broken\nwell,1,0\n")
    with pytest.raises(DataError, match="the columns of 0 and 1 with --label-columns"):
        load_dataset(tmp_path / "x.csv")
