"""Recognize files in unsupported formats, and suggest the option or command that helps.

Formats are recognized by content. Commands are for a POSIX shell with Python, and write a file that
minllama reads.
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence

from minllama.data.columns import LABEL_NAMES, TEXT_NAMES
from minllama.data.delimited import cells_of
from minllama.errors import DataError
from minllama.text import cut, printable

LOOKED_AT = 20  # lines that are examined to recognize a format
PARQUET = b"PAR1"
GZIP = b"\x1f\x8b"
_EXCEL = (
    "python -c 'import pandas, sys; "
    "pandas.read_excel(sys.argv[1]).to_csv(sys.argv[2], index=False)'"
)
_FEATHER = (
    "python -c 'import pyarrow.feather as f, pyarrow.parquet as p, sys; "
    "p.write_table(f.read_table(sys.argv[1]), sys.argv[2])'"
)
_SPREADSHEET = f"save it as CSV UTF-8 there, or convert it with: {_EXCEL} {{}} new.csv"
_UNPACK = "unpack it, and name a data file in it"
# First bytes, their meaning, and the remedy, in which {} is the file's name.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"\xd0\xcf\x11\xe0", "an old Office document (.xls, .doc)", _SPREADSHEET),
    (b"ARROW1", "an Arrow or Feather file", f"convert it with: {_FEATHER} {{}} new.parquet"),
    (b"FEA1", "a Feather file", f"convert it with: {_FEATHER} {{}} new.parquet"),
    (b"BZh", "compressed with bzip2", "unpack it with: bzip2 -dk {}"),
    (b"\xfd7zXZ", "compressed with xz", "unpack it with: xz -dk {}"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it with: zstd -d {}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"%PDF", "a PDF document", "convert it to CSV or JSONL"),
    (b"{\\rtf", "an RTF document", "save it as plain text"),
    (b"SQLite format 3\0", "an SQLite database", "export a table: sqlite3 -csv -header"),
    (b"\x93NUMPY", "a NumPy array", "convert it to CSV or JSONL"),
    (b"\x89PNG", "an image", "convert it to CSV or JSONL"),
    (b"\xff\xd8\xff", "an image", "convert it to CSV or JSONL"),
    (b"GGUF", "a GGUF model", "name a data file here, and the model with --model"),
    (b"\x7fELF", "a program", "name a data file"),
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file",
        "download it with: git lfs pull",
    ),
)


def refuse_binary(head: bytes, name: str) -> None:
    """Refuse content that starts like another kind of file.

    Raises:
        DataError: names the kind of file and the remedy.
    """
    for signature, what, remedy in _SIGNATURES:
        if head.startswith(signature):
            raise DataError(f"{name}: is {what}; {remedy.format(quoted(name))}")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        raise _zip(head, name)
    if head[257:262] == b"ustar":
        raise DataError(f"{name}: is a tar archive; {_UNPACK}")
    start = head[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<script")):
        raise DataError(
            f"{name}: is a web page (HTML), perhaps an error or login page; download the file "
            "itself"
        )
    if start.startswith(b"<?xml"):
        raise DataError(f"{name}: is XML; convert it to CSV or JSONL")


def _zip(head: bytes, name: str) -> DataError:
    if b"opendocument.spreadsheet" in head[:200]:
        return DataError(f"{name}: is a spreadsheet (.ods); {_SPREADSHEET.format(quoted(name))}")
    if any(part in head for part in (b"xl/", b"[Content_Types].xml", b"_rels/.rels", b"docProps/")):
        what = "Word document (.docx)" if b"word/" in head else "spreadsheet (.xlsx)"
        return DataError(f"{name}: is a {what}; {_SPREADSHEET.format(quoted(name))}")
    if b"data.pkl" in head[:200]:
        return DataError(f"{name}: is a PyTorch file; name a data file")
    return DataError(f"{name}: is a zip archive; {_UNPACK}: unzip {quoted(name)}")


def quoted(name: str) -> str:
    """A file's name quoted for a shell; FILE if it cannot be shown on one line."""
    return shlex.quote(name) if name.isprintable() and name != "standard input" else "FILE"


def shown_line(line: str) -> str:
    """The first line of a file for a message: quoted, printable and shortened."""
    line = re.sub(r"\s*\n\s*", " ", line.strip("\r\n\ufeff")).replace("\t", "<tab>")
    return f"'{cut(printable(line))}'"


def piped(program: str, name: str, new: str, *, compressed: bool) -> str:
    """The command that converts the file's lines with a program."""
    if name == "standard input":
        return f"pipe it through: {program}"
    if compressed:
        return f"convert it with: gzip -dc {quoted(name)} | {program} > {new}"
    return f"convert it with: {program} {quoted(name)} > {new}"


def refuse_other_labels(
    lines: Sequence[str], name: str, advice: str = "", *, compressed: bool
) -> None:
    """Refuse lines of text that should be `label ||| sentence`, if none of them is.

    Args:
        lines: the first non-blank ones.
        advice: of their encoding.

    Raises:
        DataError: the message shows the first line, and how to read or convert the file.
    """
    remedy = _remedy_for_labels(lines, name, compressed=compressed)
    remedy += f"; {advice}" if advice else ""
    raise DataError(
        f"{name}: the first line is {shown_line(lines[0])}, but lines of 'label ||| sentence' are "
        f"expected; {remedy}"
    )


def is_fasttext(lines: Sequence[str]) -> bool:
    """Whether each line starts with fastText labels."""
    return bool(lines) and all(line.startswith("__label__") for line in lines)


def _remedy_for_labels(lines: Sequence[str], name: str, *, compressed: bool) -> str:
    def sed(*scripts: str) -> str:
        arguments = " ".join(f"-e {shlex.quote(script)}" for script in scripts)
        return piped(f"sed -E {arguments}", name, "new.txt", compressed=compressed)

    if is_fasttext(lines):
        several = any(re.match(r"__label__\S+\s+__label__", line) for line in lines)
        if not several:
            return "it is fastText's; " + sed(r"s/^__label__([^ \t]+)[ \t]+/\1 ||| /")
        join = r"s/^(([^ \t]+,)?[^ \t,]+)[ \t]+__label__/\1,/"
        return "it is fastText's; " + (
            sed("s/^__label__//", ":a", join, "ta", r"s/^([^ \t]+)[ \t]+/\1 ||| /")
            + ", and read it with --multi-label"
        )
    for separator, option in (("\t", "--data-format tsv"), (",", "--data-format csv")):
        header = [cell.strip().strip('"').lower() for cell in lines[0].split(separator)]
        if len(header) > 1 and any(cell in TEXT_NAMES + LABEL_NAMES for cell in header):
            return f"read it with {option}"
    if (columns := _columns_of(lines, "\t")) is not None:
        return f"it is separated by tabs: read it with --data-format tsv --columns {columns}"
    for mark in ("||", "::", "##"):
        if all(re.match(rf"[^\s|:#]+\s*{re.escape(mark)}[^|:#]", line) for line in lines):
            escaped = mark.replace("|", "\\|")
            return f"{mark} follows its labels: " + sed(rf"s/[ \t]*{escaped}[ \t]*/ ||| /")
    if _few_labels(re.match(r"[^\s:]+:[^\s:]+(?=\s)", line) for line in lines):
        return "its labels contain colons: " + sed(r"s/^([^ \t]+)[ \t]+/\1 ||| /")
    if _few_labels(re.match(r"[^\s:][^:]{0,30}:(?=\s)", line) for line in lines):
        return "its labels end with a colon: " + sed(r"s/^([^:]+):[ \t]*/\1 ||| /")
    for separator, called in (("|", "'|'"), (";", "semicolon")):
        if (columns := _columns_of(lines, separator)) is not None:
            return f"read it with --data-format csv --separator {called} --columns {columns}"
    if _few_labels(re.match(r"\S+(?=\s)", line) for line in lines):
        return "its labels are the first words: " + sed(r"s/^([^ \t]+)[ \t]+/\1 ||| /")
    if (columns := _columns_of(lines, ",")) is not None:
        return f"read it with --data-format csv --columns {columns}"
    return "write such lines, or give a CSV or JSONL file with columns text and label"


def _few_labels(matches: Iterable[re.Match[str] | None]) -> bool:
    """Whether each line has a possible label, and some share one."""
    prefixes = ["" if match is None else match[0] for match in matches]
    if len(prefixes) < 2 or "" in prefixes:
        return False
    labels = Counter(prefixes)
    are_numbers = all(re.fullmatch(r"[+-]?\d+:?", label) for label in labels)
    are_capitals = all(re.fullmatch(r"[A-Z_]+:?\S*", label) for label in labels)
    return are_numbers or are_capitals or len(labels) <= max(2, len(prefixes) // 2)


def _columns_of(lines: Sequence[str], separator: str) -> str | None:
    """Column names for lines with a text and a label; None for other lines."""
    rows = [cells_of(line, separator) for line in lines]
    width = len(rows[0])
    if width < 2 or any(len(row) != width for row in rows):
        return None
    lengths = [sum(len(row[i]) for row in rows) for i in range(width)]
    n_words = [sum(len(row[i].split()) for row in rows) for i in range(width)]
    text = max(range(width), key=lambda i: (n_words[i], lengths[i]))
    label = min((i for i in range(width) if i != text), key=lambda i: len({r[i] for r in rows}))
    names = {text: "text", label: "label"}
    return ",".join(names.get(i, f"column{i + 1}") for i in range(width))


def refuse_other_json(line: str, name: str, *, compressed: bool) -> None:
    """Refuse one JSON object that contains all rows.

    Args:
        line: the beginning of a file; its first value is checked.

    Raises:
        DataError: the message shows its beginning, and how to convert the file.
    """
    keys = _keys_of_tables(line)
    if not keys:
        return
    opener = 'gzip.open(sys.argv[1], "rt",' if compressed else "open(sys.argv[1],"
    open_it = f'json.load({opener} encoding="utf-8-sig"))'
    key, kind = keys
    rows = {
        "rows": f"d[{json.dumps(key)}]",
        "lists": "(dict(zip(d, r)) for r in zip(*d.values()))",
        "objects": "(dict(zip(d, r)) for r in zip(*(c.values() for c in d.values())))",
    }[kind]
    where = {"rows": f"its rows are in {key!r}"}.get(kind, "each value is a column")
    program = f"import gzip, json, sys; d = {open_it}; [print(json.dumps(r)) for r in {rows}]"
    raise DataError(
        f"{name}: begins with {shown_line(line.lstrip()[:80])}, but one object per row is "
        f"expected; {where}: convert it with: python -c {shlex.quote(program)} "
        f"{quoted(name)} > new.jsonl"
    )


def as_python_wrote(name: str, *, compressed: bool) -> str:
    """Advice on how to convert lines of dictionaries as Python prints them."""
    program = "import ast, json, sys; [print(json.dumps(ast.literal_eval(r))) for r in sys.stdin]"
    command = f"python -c {shlex.quote(program)}"
    if name != "standard input":
        command = f"{'gzip -dc' if compressed else 'cat'} {quoted(name)} | {command}"
    return f"Python dictionary syntax: convert it with: {command} > new.jsonl"


def _keys_of_tables(line: str) -> tuple[str, str] | None:
    """The first key whose value is a list or object, and how it contains the rows."""
    text = line.removeprefix("\ufeff").lstrip()
    first = re.match(r'\{\s*"((?:[^"\\]|\\.)*)"\s*:\s*(?:([\[{])\s*([^\s]?))?', text)
    if first is None:
        return None
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except RecursionError:
        return None
    except ValueError:  # truncated, or not JSON
        value, end = {}, 0
    # A row contains its text as a string; an object of tables contains no string.
    if any(not isinstance(part, list | dict) for part in value.values()):
        return _rows_among_other_values(value) if not text[end:].strip() else None
    if first[2] is None:
        return None
    key = json.loads(f'"{first[1]}"', strict=False)
    if first[2] == "[":
        return (key, "rows") if first[3] == "{" else (key, "lists")
    return key, "objects"


def _rows_among_other_values(value: dict[str, object]) -> tuple[str, str] | None:
    if "text" in value or "sentence" in value:
        return None
    for key, part in value.items():
        if isinstance(part, list) and part and all(isinstance(row, dict) for row in part):
            return key, "rows"
    return None
