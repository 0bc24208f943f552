"""Claims about encodings: what is said is read, what is not UTF-8 gets the advice that is right."""

import gzip
import io
import json
import random
import re
import shutil
import subprocess
import sys
from encodings.aliases import aliases
from pathlib import Path

import pytest

from minllama.data import load_dataset, stream_rows
from minllama.data.encoding import guessed_encoding
from minllama.errors import DataError, OptionError
from minllama.options import DataOptions

WESTERN = ["café is déjà vu", "Straße über Ärger", "5€ “ok” – it’s…"]
TEXTS = {
    "cp1252": WESTERN,
    "latin-1": ["café is déjà vu", "Straße"],
    "mac-roman": ["café is déjà vu", "“ok” she’s"],
    "cp850": ["café déjà vu"],
    "cp1250": ["Zażółć gęślą jaźń"],
    "cp1251": ["Привет, мир"],
    "koi8-r": ["Привет, мир"],
    "cp1253": ["καλημέρα κόσμε"],
    "shift_jis": ["これは日本語です。"],
    "euc-jp": ["これは日本語です。"],
    "gb18030": ["这是一个很好的电影，我喜欢", "𠀀"],
    "euc-kr": ["이것은 좋은 영화"],
    "big5": ["這是一個很好的電影"],
}
WIDE = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "utf-7", "cp500", "iso2022_jp"]


def write(path: Path, texts: list[str], encoding: str) -> Path:
    """The texts as a file of the format that the name says, with two labels."""
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)]
    match path.name.removesuffix(".gz").rpartition(".")[2]:
        case "csv":
            lines = ["text;label", *(f'"{row["text"]}";{row["label"]}' for row in rows)]
        case "tsv":
            lines = ["text\tlabel", *(f"{row['text']}\t{row['label']}" for row in rows)]
        case "txt":
            lines = [f"{row['label']} ||| {row['text']}" for row in rows]
        case "jsonl":
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        case _:
            lines = [json.dumps(rows, ensure_ascii=False, indent=1)]
    data = "".join(f"{line}\n" for line in lines).encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.txt", "x.jsonl", "x.json", "x.csv.gz"])
@pytest.mark.parametrize("encoding", [*TEXTS, *WIDE])
def test_text_of_any_encoding_is_read_from_each_format(
    tmp_path: Path, name: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = TEXTS.get(encoding, ["これは日本語です。"] if encoding == "iso2022_jp" else WESTERN)
    texts = [t for t in texts if encoding != "cp500" or not re.search("[€“”’–…]", t)]
    path = write(tmp_path / name, texts, encoding)
    options = DataOptions(encoding=encoding)
    assert load_dataset(path, options).texts == texts
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    assert [row.text for row in stream_rows("-", options)] == texts


@pytest.mark.parametrize("encoding", TEXTS)
def test_the_advice_is_right_for_the_bytes(tmp_path: Path, encoding: str) -> None:
    for text in TEXTS[encoding]:
        if text == "𠀀":
            continue
        guess = guessed_encoding(text.encode(encoding))
        assert guess is not None
        assert text.encode(encoding).decode(guess) == text
    path = write(tmp_path / "x.csv", TEXTS[encoding][:2], encoding)
    for load in (load_dataset, lambda source: list(stream_rows(source))):
        with pytest.raises(DataError) as caught:
            load(path)
        advised = re.search(r"--encoding (\S+), or .*: iconv -f (\S+) -t", str(caught.value))
        assert advised is not None
        assert "\n" not in str(caught.value)
        assert load_dataset(path, DataOptions(encoding=advised[1])).texts == TEXTS[encoding][:2]
    if shutil.which("iconv"):
        command = ["iconv", "-f", advised[2], "-t", "utf-8", str(path)]
        converted = subprocess.run(command, capture_output=True, check=True).stdout
        (tmp_path / "y.csv").write_bytes(converted)
        assert load_dataset(tmp_path / "y.csv").texts == TEXTS[encoding][:2]


def test_it_is_advised_once_and_not_where_other_lines_are_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("a ||| café\n".encode("cp1252") * 12)
    with pytest.raises(DataError) as caught:
        load_dataset(path)
    assert str(caught.value).count("--encoding") == 1
    assert "lines 1, 2, 3, 4, 5, 6, 7, 8, 9 and 10: byte 10 (0xe9) is not" in str(caught.value)
    path.write_bytes("a ||| café\n".encode() + "b ||| café\n".encode("cp1252"))
    with pytest.raises(
        DataError, match=r"line 2: .*; the lines before it are UTF-8, so the file mixes"
    ):
        load_dataset(path)


@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.jsonl"])
def test_a_mark_says_more_than_the_option(tmp_path: Path, name: str) -> None:
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        path = write(tmp_path / name, WESTERN, encoding)
        assert load_dataset(path).texts == WESTERN
        assert load_dataset(path, DataOptions(encoding="cp1252")).texts == WESTERN


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_told(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path / "x.csv", WESTERN, encoding)
    with pytest.raises(
        DataError, match=f"without a byte order mark; read it with --encoding {encoding}$"
    ):
        load_dataset(path)
    assert load_dataset(path, DataOptions(encoding="utf-16")).texts == WESTERN


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.json"])
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "mac-roman", "gb18030", "big5hkscs"])
def test_utf_8_is_not_taken_for_another_encoding(tmp_path: Path, name: str, encoding: str) -> None:
    # Also where the beginning is ASCII, which both are.
    for texts in (["café", "日本語" * 9], ["plain " * 20_000, "é日本語本語日本"]):
        path = write(tmp_path / name, texts, "utf-8")
        with pytest.raises(DataError, match=r"is valid UTF-8|is not (gb1803|big5hk)"):
            load_dataset(path, DataOptions(encoding=encoding, skip_bad_rows=True))
    path = write(tmp_path / name, ["plain", "text"], "utf-8")
    assert load_dataset(path, DataOptions(encoding=encoding)).texts == ["plain", "text"]


@pytest.mark.parametrize(
    ("name", "content", "encoding", "where"),
    [
        ("x.csv", b"text,label\nab\x81c,a\n", "cp1252", "line 2: character 3 (byte 0x81) is not"),
        ("x.txt", b"a ||| \xe9\x81\n", "cp1252", "line 1: character 8 (byte 0x81) is not cp1252"),
        (
            "x.jsonl",
            b'{"text":"\x81"}\n',
            "windows-1252",
            "line 1: character 10 (byte 0x81) is",
        ),
        ("x.json", b'[\n{"text":"a\x81"}]\n', "cp1252", "line 2: character 11 (byte 0x81) is not"),
        ("x.txt", b"a ||| \x82\xb1\xff\n", "shift_jis", "line 1: character 8 (byte 0xff) is not"),
        ("x.txt", b"a ||| \xff\n", "ascii", "line 1: character 7 (byte 0xff) is not ascii"),
        ("x.txt", b"a\0 \0|\0|\0|\0 \0b\0\xd8\0\xd8", "utf-16-le", "line 1: character"),
    ],
)
def test_bytes_that_the_encoding_does_not_have_are_told(
    tmp_path: Path, name: str, content: bytes, encoding: str, where: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_dataset(tmp_path / name, DataOptions(encoding=encoding))
    assert where in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cp1252x", "did you mean cp1252 or "),
        ("windows1252", "windows-1252"),
        ("ANSI", "did you mean cp1252?"),
        ("utf-61", "utf-16"),
        ("rot13", "is not a text encoding"),
        ("base64", "is not a text encoding"),
        ("idna", "is not a text encoding"),
        ("unicode_escape", "is not a text encoding"),
        ("undefined", "is not a text encoding"),
        ("", "is not a text encoding"),
        ("a\0b", "is not a text encoding"),
        ("x" * 10_000, "is not a text encoding"),
    ],
)
def test_names_of_no_encoding_are_one_line_with_near_ones(name: str, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        DataOptions(encoding=name)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("encoding", sorted(set(aliases.values()) - {"mbcs", "oem"}))
def test_any_bytes_in_any_encoding_are_rows_or_one_line(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "x.csv"
    draw = random.Random(encoding)
    try:
        options = DataOptions(encoding=encoding)
    except OptionError:
        return
    messages = []
    for size in (1, 7, 40, 200):
        path.write_bytes(b"text,label\n\x1b$A" + draw.randbytes(size))
        try:
            load_dataset(path, options)
        except DataError as error:
            messages.append(str(error))
    assert not any("\n" in message for message in messages)


def test_encodings_are_for_text(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["a"], "label": ["b"]}), tmp_path / "x.parquet")
    with pytest.raises(
        OptionError, match="--encoding: only for text files, and this file has typed columns"
    ):
        load_dataset(tmp_path / "x.parquet", DataOptions(encoding="cp1252"))
