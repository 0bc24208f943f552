"""Claims about files in other forms: the refusal shows the first line and a way on that works."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from minllama.data import load_dataset, stream_rows
from minllama.errors import DataError
from minllama.options import DataOptions

ROWS = [("pos", "I like it: yes"), ("neg", "no, not at all"), ("pos", "fine")]


def refusal(path: Path, options: DataOptions | None = None, *, labelled: bool = True) -> str:
    with pytest.raises(DataError) as caught:
        load_dataset(path, options) if labelled else list(stream_rows(path, options))
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 700
    return message


def run_command(message: str, folder: Path) -> None:
    """Run what the message advises, as somebody would who copies it."""
    found = re.search(r"(?:convert|unpack) it with: (.*?)(, and read it with .*)?$", message)
    assert found is not None, message
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}  # `python` is the one that runs the tests
    subprocess.run(["bash", "-c", found[1]], check=True, cwd=folder, timeout=60, env=environment)


def pairs(path: Path, options: DataOptions | None = None) -> list[tuple[str, str]]:
    data = load_dataset(path, options)
    return [
        (",".join(data.label_names[c] for c in data.classes_of(i)), data.texts[i])
        for i in range(len(data))
    ]


def lines(form: str, rows: list[tuple[str, str]] = ROWS, end: str = "\n") -> str:
    return "".join(form.format(label, text) + end for label, text in rows)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("__label__{} {}", "fastText"),
        ("__label__{}\t{}", "fastText"),
        ("{}: {}", "end with a colon"),
        ("a b-{}: {}", "end with a colon"),
        ("{}:sub {}", "contain colons:"),
        ("{} {}", "first words"),
        ("{} || {}", "|| follows"),
        ("{}::{}", ":: follows"),
    ],
)
def test_labels_in_other_forms_are_converted_by_the_command_that_is_told(
    tmp_path: Path, form: str, words: str, compressed: bool
) -> None:
    path = tmp_path / ("it's a.txt.gz" if compressed else "it's a.txt")
    content = lines(form).encode()
    path.write_bytes(gzip.compress(content) if compressed else content)
    message = refusal(path)
    first = form.format(*ROWS[0]).replace("\t", "<tab>")
    assert f"the first line is '{first}', but lines of 'label ||| sentence' are expected" in message
    assert words in message
    run_command(message, tmp_path)
    label = form.partition("{}")[0].removeprefix("__label__") + "{}"
    label += ":sub" if ":sub" in form else ""
    expected = [(label.format(name), text) for name, text in ROWS]
    assert pairs(tmp_path / "new.txt") == expected


@pytest.mark.parametrize("end", ["csv", "tsv", "jsonl", "json"])
def test_fasttext_is_told_by_any_name(tmp_path: Path, end: str) -> None:
    path = tmp_path / f"x.{end}"
    path.write_text("__label__pos I like it, really\n__label__neg no\n")
    run_command(refusal(path), tmp_path)
    assert pairs(tmp_path / "new.txt") == [("pos", "I like it, really"), ("neg", "no")]


def test_several_labels_of_fasttext_are_converted(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("__label__a __label__b __label__c some __label__ text\n__label__b more\n")
    message = refusal(path)
    assert message.endswith("and read it with --multi-label")
    run_command(message, tmp_path)
    expected = [("a,b,c", "some __label__ text"), ("b", "more")]
    assert pairs(tmp_path / "new.txt", DataOptions(multi_label=True)) == expected


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("{}\t{}", "x.txt"),
        ("{1}\t{0}", "x.txt"),
        ("{}|{}", "x.txt"),
        ("{};{}", "x"),
        ("{1}|{0}", "x.txt.gz"),
        ('{},"{}"', "x.txt"),
        ("{}\t{}", "x.tsv"),
        ("{}\tyes, {}", "x.csv"),
        ("{}|{}", "x.csv"),
        ("{1}|{0}", "x.tsv"),
        ("{1}\t{0}", "x.tsv"),
        ('{},"{}"', "x.csv"),
        ('"{1}",{0}', "x.csv"),
    ],
)
def test_cells_without_names_are_read_with_the_options_that_are_told(
    tmp_path: Path, form: str, name: str
) -> None:
    content = lines(form).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    message = refusal(tmp_path / name)
    told = dict(re.findall(r"--(data-format|separator|columns) ('.'|[\w,]+)", message))
    options = {key.replace("-", "_"): value.strip("'") for key, value in told.items()}
    yes = "yes, " if "yes" in form else ""
    assert pairs(tmp_path / name, DataOptions(**options)) == [(a, yes + b) for a, b in ROWS]


def test_names_of_columns_in_text_files_are_told(tmp_path: Path) -> None:
    for separator, kind in ((",", "csv"), ("\t", "tsv"), (";", "csv")):
        path = tmp_path / "x.txt"
        path.write_text(f"text{separator}label\nfine{separator}a\n")
        for labelled in (True, False):
            message = refusal(path, labelled=labelled)
            assert f"a header; read it with --data-format {kind}" in message
        assert pairs(path, DataOptions(data_format=kind)) == [("a", "fine")]
    path.write_text("Text, and more\nsentence, label and so on\n")
    assert len(list(stream_rows(path))) == 2


def test_what_has_no_form_is_shown_once(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("\x1b[31mone" + "x" * 100 + "\ntwo three\n" * 30)
    message = refusal(path)
    assert message.count("expected") == 1
    assert "'\N{REPLACEMENT CHARACTER}[31monexxx" in message
    assert "\x1b" not in message
    path.write_text("title\na ||| one\nb ||| two\n")
    assert "line 1: no ||| between label and text" in refusal(path)


def test_texts_behind_labels_of_fasttext_are_not_taken_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("__label__a __label__b one\n__label__b two\n")
    message = refusal(path, labelled=False)
    sed = re.search(r"with: (sed -E '.*?')", message)
    assert sed is not None
    command = f"{sed[1]} {shlex.quote(str(path))}"
    out = subprocess.run(["bash", "-c", command], capture_output=True, check=True, text=True)
    assert out.stdout == "one\ntwo\n"
    assert len(list(stream_rows(path, DataOptions(data_format="text")))) == 2


OBJECTS = [{"text": text, "label": label} for label, text in ROWS]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.json.gz"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(OBJECTS),
        json.dumps(OBJECTS, indent=2),
        "[\n" + ",\n".join(map(json.dumps, OBJECTS)) + "\n]\n",
        "\n".join(json.dumps(row, indent=2) for row in OBJECTS),
        "\n".join(json.dumps(row, indent=0) for row in OBJECTS),
        "\n".join(map(json.dumps, OBJECTS)),
        "\n".join(json.dumps(row).replace(', "', ',\n "') for row in OBJECTS),
    ],
)
def test_objects_are_read_as_they_are_written(tmp_path: Path, name: str, content: str) -> None:
    data = b"\xef\xbb\xbf" + content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert pairs(tmp_path / name) == ROWS


@pytest.mark.parametrize("name", ["it's.json", "x.jsonl", "x.json.gz"])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "content",
    [
        {"data": OBJECTS},
        {"version": "1.0", "rows": OBJECTS},
        {"rows": OBJECTS, "count": 3},
        {key: [row[key] for row in OBJECTS] for key in ("text", "label")},
        {key: {str(i): row[key] for i, row in enumerate(OBJECTS)} for key in ("text", "label")},
    ],
)
def test_objects_that_hold_all_rows_are_converted(
    tmp_path: Path, name: str, indent: int | None, content: object
) -> None:
    data = json.dumps(content, indent=indent).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    message = refusal(tmp_path / name)
    assert "one object per row is expected" in message
    run_command(message, tmp_path)
    assert pairs(tmp_path / "new.jsonl") == ROWS


def test_rows_with_lists_before_their_texts_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"tokens": ["a", "b"], "text": "a b", "label": "x"}\n')
    assert pairs(path) == [("x", "a b")]


def test_dictionaries_of_python_are_converted(tmp_path: Path) -> None:
    for name in ("it's.jsonl", "x.json.gz"):
        data = "".join(f"{row}\n" for row in OBJECTS).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        run_command(refusal(tmp_path / name), tmp_path)
        assert pairs(tmp_path / "new.jsonl") == ROWS


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("text,label\na,b\n", "csv"),
        ("text\tlabel\na\tb\n", "tsv"),
        ("b ||| a\n", "labelled"),
        ('{"text": "a", "label": "b"}\n', "jsonl"),
        ('[{"text": "a", "label": "b"}]', "json"),
    ],
)
def test_a_format_by_the_name_of_another_is_told(tmp_path: Path, content: str, kind: str) -> None:
    alike = {"csv": ("csv", "tsv"), "tsv": ("csv", "tsv"), "labelled": ("txt",)}
    for end in ("csv", "tsv", "jsonl", "json", "txt"):
        path = tmp_path / f"x.{end}"
        path.write_text(content)
        if end in alike.get(kind, ("json", "jsonl")):
            assert pairs(path) == [("b", "a")]
        else:
            assert f"--data-format {kind}" in refusal(path)
            assert pairs(path, DataOptions(data_format=kind)) == [("b", "a")]


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
            "is an old Office document (.xls, .doc); save it",
        ),
        (b"%PDF-1.7", "is a PDF document"),
        (b"<!DOCTYPE html>\n<html>", "is a web page (HTML)"),
        (b"  <HTML><head>", "is a web page (HTML)"),
        (b'<?xml version="1.0"?>', "is XML"),
        (b"SQLite format 3\0", "is an SQLite database"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        (b"ARROW1\0\0", "is an Arrow or Feather file; convert it with: python -c"),
        (b"\x28\xb5\x2f\xfd\0", "is compressed with zstd"),
        (b"{\\rtf1\\ansi", "is an RTF document"),
        (b"GGUF\3\0\0\0", "is a GGUF model"),
        (b"a".ljust(257, b"\0") + b"ustar\0", "is a tar archive"),
    ],
)
@pytest.mark.parametrize("name", ["x.csv", "x.txt", "x.jsonl", "x.json", "x.tsv", "x.xls", "x"])
def test_other_kinds_of_files_are_told_by_their_content(
    tmp_path: Path, start: bytes, words: str, name: str
) -> None:
    (tmp_path / name).write_bytes(start + b" and so on\n" * 3)
    for labelled in (True, False):
        assert f"{name}: {words}" in refusal(tmp_path / name, labelled=labelled)


@pytest.mark.parametrize(("compress", "end"), [(bz2.compress, ".bz2"), (lzma.compress, ".xz")])
def test_other_compressions_are_unpacked_by_the_command(
    tmp_path: Path, compress: "type[bz2.compress]", end: str
) -> None:
    path = tmp_path / f"x.csv{end}"
    path.write_bytes(compress(b"text,label\na,b\n"))
    run_command(refusal(path), tmp_path)
    assert pairs(tmp_path / "x.csv") == [("b", "a")]


def test_spreadsheets_and_archives_are_told_apart(tmp_path: Path) -> None:
    for entry, words in (
        (
            "xl/workbook.xml",
            "is a spreadsheet (.xlsx); save it as CSV UTF-8 there, or conv",
        ),
        ("word/document.xml", "is a Word document (.docx)"),
        ("reviews.csv", "is a zip archive; unpack it, and name a data file in it"),
    ):
        for name in ("x.csv", "x.xlsx", "x.zip"):
            with zipfile.ZipFile(tmp_path / name, "w") as file:
                if not entry.endswith(".csv"):
                    file.writestr("[Content_Types].xml", "<Types/>")
                file.writestr(entry, "a")
            assert f"{name}: {words}" in refusal(tmp_path / name)


def test_a_real_spreadsheet_is_converted(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    pd = pytest.importorskip("pandas")
    pd.DataFrame(ROWS, columns=["label", "text"]).to_excel(tmp_path / "x.xlsx", index=False)
    run_command(refusal(tmp_path / "x.xlsx").replace("new.csv", "new.csv "), tmp_path)
    assert pairs(tmp_path / "new.csv") == ROWS


def test_feather_is_converted(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import feather

    feather.write_feather(pa.table({"text": ["a"], "label": ["b"]}), tmp_path / "x.arrow")
    run_command(refusal(tmp_path / "x.arrow"), tmp_path)
    assert pairs(tmp_path / "new.parquet") == [("b", "a")]


def test_parquet_is_read_by_any_name(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name in ("x.csv", "x.dat", "x"):
        parquet.write_table(pa.table({"text": ["a"], "label": ["b"]}), tmp_path / name)
        assert pairs(tmp_path / name) == [("b", "a")]


def test_lines_that_end_with_carriage_returns_alone_are_converted(tmp_path: Path) -> None:
    for name in ("x.csv", "x.txt"):
        content = lines("{},{}", [("label", "text"), ("b", "a")], "\r")
        if name == "x.txt":
            content = lines("{} ||| {}", [("b", "a")] * 2, "\r")
        (tmp_path / name).write_text(content, newline="")
        run_command(refusal(tmp_path / name), tmp_path)
        (tmp_path / "new.txt").replace(tmp_path / f"new{name}")
        assert pairs(tmp_path / f"new{name}")[0] == ("b", "a")


def test_excels_unicode_text_is_read_as_tsv(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes('text\tlabel\r\n"two\nlines"\ta\r\nß\tb\r\n'.encode("utf-16"))
    assert "read it with --data-format tsv" in refusal(path)
    assert pairs(path, DataOptions(data_format="tsv")) == [("a", "two\nlines"), ("b", "ß")]


def piped(content: str, monkeypatch: pytest.MonkeyPatch, **options: object) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    return [row.text for row in stream_rows("-", DataOptions(**options))]


def as_csv(separator: str) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=separator).writerows([("id", "text"), (1, "a\nb"), (2, "c, d")])
    return out.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        as_csv(","),
        as_csv(";"),
        as_csv("\t"),
        as_csv("|"),
        f"\n\n{as_csv(',')}",
        f"sep=;\n{as_csv(';')}",
        '{"text": "a\\nb"}\n{"text": "c, d"}\n',
        '[{"text": "a\\nb"}, {"text": "c, d"}]',
        '[\n {\n  "text": "a\\nb"\n },\n {"text": "c, d"}]',
    ],
)
def test_what_is_piped_in_is_read_as_what_it_is(
    content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert piped(content, monkeypatch) == ["a\nb", "c, d"]


def test_piped_texts_stay_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    for texts in (
        ["Hello, world", "more"],
        ["text, he said, is what counts", "a, b, c"],
        ["{not json}", "[nor this]"],
        ["one\ttab", "x"],
        ["review", "good"],
        ["a; b", "c"],
    ):
        assert piped("\n".join(texts), monkeypatch) == texts
    assert piped("x ||| a, b\ny ||| c\n", monkeypatch) == ["a, b", "c"]
    assert piped("text,label\nx,a\n", monkeypatch, data_format="text") == ["text,label", "x,a"]
    assert piped("body,id\nx,a\n", monkeypatch, text_column="body") == ["x"]
    assert piped("a,b\nx,y\n", monkeypatch, columns="text,id") == ["a", "x"]


def test_where_a_piped_line_may_be_two_things_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="give --data-format csv if it is a header, or"):
        piped("text\nfine\n", monkeypatch)
    assert piped("text\nfine\n", monkeypatch, data_format="csv") == ["fine"]
    with pytest.raises(DataError, match="'id,text'; give --data-format csv if it is a header"):
        piped("id,text\n1,fine, or not\n", monkeypatch)
    with pytest.raises(DataError, match="line 2: columns: 3 here, 2 in the first line"):
        piped("text,label\nfine, or not,a\n", monkeypatch)
    with pytest.raises(DataError, match="fastText"):
        piped("__label__a x\n", monkeypatch)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"PAR1....")))
    with pytest.raises(DataError, match="Parquet cannot be read from standard input; name a file"):
        list(stream_rows("-"))


def test_a_piped_line_is_answered_before_the_next_one_comes() -> None:
    code = "import sys; from minllama.data import stream_rows\nfor row in stream_rows('-'):\n"
    code += "    print(row.text, flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for text in ("one", "two"):
            process.stdin.write(f"{text}\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{text}\n"
        process.stdin.close()
