"""Turn an open text stream into a table, by its format.

The start of the stream is checked against the format before anything is read.
"""

import codecs
import io
import json
import re
from collections.abc import Collection

from minllama.data.columns import TEXT_NAMES
from minllama.data.delimited import cells_of, delimited_table, excel_separator, is_known_name
from minllama.data.encoding import advice_for, as_utf8, encoding_of, guessed_encoding
from minllama.data.json_list import json_list_table
from minllama.data.lines import SEPARATOR, Lines, jsonl_table, labelled_table, reading, text_table
from minllama.data.other_forms import (
    LOOKED_AT,
    as_python_wrote,
    is_fasttext,
    quoted,
    refuse_binary,
    refuse_other_json,
    refuse_other_labels,
    shown_line,
)
from minllama.data.records import Table
from minllama.data.unpacking import HEAD_BYTES, Beginning
from minllama.errors import DataError, OptionError
from minllama.options import DataOptions

# Ambiguous as the only cell of a first line: the name of a column, or the first text.
_LONE_NAMES = ("text", "sentence")


def table_of(
    beginning: Beginning, kind: str | None, options: DataOptions, *, labelled: bool
) -> Table:
    """The rows of a stream.

    Args:
        beginning: its first bytes.
        kind: one of `DATA_FORMATS`, or `lines` for text with or without labels; None to detect it
            from the first lines.
        options: encoding, separator, columns.
        labelled: lines must have labels.

    Raises:
        DataError: it is in another format; the message says what to do.
    """
    name = beginning.name
    refuse_binary(beginning.head, name)
    encoding = encoding_of(beginning.head, options.encoding, name)
    stream = as_utf8(beginning.stream, encoding, name)
    with reading(f"{name}, line 1"):  # not all decoder errors are UnicodeDecodeErrors
        text, advice = _shown_text(beginning.head, encoding, options)
    if kind != "json":
        _check_line_ends(text, name)
    kind = _kind_of(text, kind, options, name, labelled=labelled)
    first = _first_lines(text)
    if kind not in ("labelled", "text") and is_fasttext(first):
        refuse_other_labels(first, name, advice, compressed=beginning.is_compressed)
    if kind in ("json", "jsonl"):
        return _json_table(stream, kind, text, beginning, encoding)
    lines = Lines(stream, name, encoding)
    if kind in ("csv", "tsv"):
        return delimited_table(
            lines,
            usual="," if kind == "csv" else "\t",
            separator=options.separator,
            columns=options.columns,
            has_header=not options.no_header,
            requested=_requested_columns(options),
        )
    if kind == "text":
        return text_table(lines)
    is_whole = "\n" in text or len(beginning.head) < HEAD_BYTES
    if first and is_whole and not any(SEPARATOR in line for line in first):
        refuse_other_labels(first, name, advice, compressed=beginning.is_compressed)
    return labelled_table(lines)


def _shown_text(head: bytes, encoding: str, options: DataOptions) -> tuple[str, str]:
    """Decode the beginning to detect its format, with advice if it is not in the encoding."""
    advice = ""
    try:  # the last character may be incomplete
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeError:
        if options.encoding is None:
            encoding, advice = guessed_encoding(head) or encoding, advice_for(head)
        text = codecs.getincrementaldecoder(encoding)("replace").decode(head)
    return text.removeprefix("\ufeff"), advice


def _requested_columns(options: DataOptions) -> Collection[str]:
    return {name for name in (options.text_column, options.label_column) if name is not None}


def _check_line_ends(text: str, name: str) -> None:
    if "\n" not in text and "\r" in text.rstrip("\r"):
        raise DataError(
            f"{name}: lines end with a carriage return only, as on old Macs; convert it with: tr "
            f"'\\r' '\\n' < {quoted(name)} > new.txt"
        )


def _first_lines(text: str) -> list[str]:
    """The first non-blank lines; the last may be incomplete."""
    lines = text.split("\n")
    whole = [line for line in lines[:-1] if line.strip()]
    # One line is little evidence: the next may be the last, without a line end.
    return whole[:LOOKED_AT] if len(whole) > 1 else [*whole, *filter(str.strip, lines[-1:])]


def _kind_of(
    text: str, kind: str | None, options: DataOptions, name: str, *, labelled: bool
) -> str:
    """Choose between the line formats by `lines` alone."""
    has_columns = options.no_header or bool(options.columns or options.separator)
    if kind in ("labelled", "text", "json", "jsonl") and has_columns:
        raise OptionError(
            f"{name}: --no-header, --columns and --separator are for csv and tsv, but the format "
            f"is {kind}; set --data-format"
        )
    lines = _first_lines(text)
    first = lines[0] if lines else ""
    if kind not in (None, "lines"):
        assert kind is not None
        _check_kind(kind, lines, options, name)
        return kind
    if has_columns:
        return "tsv" if options.separator is None and "\t" in first else "csv"
    if recognized := _recognized(lines, options, name):
        if kind is None:
            return recognized
        raise DataError(_other_format_message(recognized, first, name, labelled=labelled))
    if SEPARATOR in first:
        return "labelled"
    if labelled:
        return "labelled"
    _check_no_labels(lines, kind, name)
    return "text"


def _check_kind(kind: str, lines: list[str], options: DataOptions, name: str) -> None:
    """Refuse content that is clearly in another format than the file name says.

    Raises:
        DataError: the message names the format.
    """
    objects, tables = ("json", "jsonl"), ("csv", "tsv")
    # For tables, the header line is enough.
    is_object = bool(lines) and lines[0].lstrip().startswith(("{", "["))
    recognized = _recognized(lines, options, name) if is_object or kind in objects else None
    if recognized is None and lines and SEPARATOR in lines[0] and not is_object:
        recognized = "labelled"
    if recognized is not None and (
        (kind in objects and recognized not in objects)
        or (kind in tables and recognized in objects)
        or (kind in tables and recognized == "labelled" and options.columns is None)
    ):
        raise DataError(
            f"{name}: the first line is {shown_line(lines[0])}, which is not {kind.upper()}; read "
            f"it with --data-format {recognized}"
        )


def _other_format_message(recognized: str, first: str, name: str, *, labelled: bool) -> str:
    if recognized in ("json", "jsonl"):
        what = "lines are JSON objects" if recognized == "jsonl" else "content is a JSON list"
    else:
        what = f"first line is {shown_line(first)}, a header"
    or_texts = "" if labelled else ", or as texts with --data-format text"
    return f"{name}: the {what}; read it with --data-format {recognized}{or_texts}"


def _check_no_labels(lines: list[str], kind: str | None, name: str) -> None:
    """Refuse content that may not be plain texts, unless an option declares it as such."""
    if is_fasttext(lines):
        raise DataError(
            f"{name}: the first line is {shown_line(lines[0])}, with fastText labels before the "
            "text; remove them with: sed -E 's/^(__label__[^ ]+[ ]+)+//', or give "
            "--data-format text"
        )
    if kind is None and len(lines) > 1 and lines[0].strip().strip('"') in _LONE_NAMES:
        raise _unclear(lines[0], name)


def _unclear(line: str, name: str) -> DataError:
    return DataError(
        f"{name}: the first line is {shown_line(line)}; give --data-format csv if it is a header, "
        "or --data-format text if it is a text"
    )


def _recognized(lines: list[str], options: DataOptions, name: str) -> str | None:
    """The format that the lines are clearly in; None for lines of text.

    Raises:
        DataError: they may be in one.
    """
    if not lines:
        return None
    first = lines[0].strip()
    if first.startswith("{") and _is_json_object(first):
        return "jsonl"
    if first == "[" or first.startswith("[{"):
        rest = "".join(line.strip() for line in lines).removeprefix("[").lstrip()
        if rest.startswith('{"') or rest == "{":
            return "json"
    if excel_separator(lines[0]):
        return "csv"
    for kind, separators in (("tsv", "\t"), ("csv", ",;|")):
        if any(_has_header(lines, separator, options, name) for separator in separators):
            return kind
    return None


def _has_header(lines: list[str], separator: str, options: DataOptions, name: str) -> bool:
    """Whether the first line is a header with usual names of text or label columns.

    Raises:
        DataError: it may, and the second line has not as many cells.
    """
    names = cells_of(lines[0], separator)
    if len(names) < 2 or len(set(names)) < len(names):
        return False
    if not all(re.fullmatch(r"[\w.#-]*( [\w.#-]+)?", name) for name in names):
        return False
    known = [name for name in names if is_known_name(name, _requested_columns(options))]
    if f"{separator} " in lines[0] and len(known) < len(names):  # as in a sentence
        return False
    if (
        not any(n.lower() in TEXT_NAMES or n in _requested_columns(options) for n in known)
        and len(known) < 2
    ):
        return False
    # Sentences contain commas, too. A quote may continue on the next line.
    second = lines[1] if len(lines) > 1 and len(known) < len(names) else ""
    if second and '"' not in second and len(cells_of(second, separator)) != len(names):
        raise _unclear(lines[0], name)
    return True


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_table(
    stream: io.BufferedReader, kind: str, text: str, beginning: Beginning, encoding: str
) -> Table:
    """Choose between a JSON list, multi-line objects and JSON Lines, by content.

    In line-based files a list may be a (bad) row, like everything that is not an object.
    """
    lines = _first_lines(text)
    first = lines[0].strip() if lines else ""
    is_list = first.startswith("[") and (
        kind == "json" or first == "[" or first[1:].lstrip().startswith("{")
    )
    if is_list:
        return json_list_table(stream, beginning.name, encoding)
    refuse_other_json(text, beginning.name, compressed=beginning.is_compressed)
    # An object that continues on the next line.
    if first.startswith("{") and not _is_json_object(first) and len(lines) > 1:
        continues = first == "{" or (
            first.endswith((",", "{", "[", ":")) and lines[1][:1] in ' \t"}'
        )
        if continues:
            return json_list_table(stream, beginning.name, encoding)
    rows = Lines(stream, beginning.name, encoding)
    if first.startswith("{'"):
        rows.remedies.append(as_python_wrote(beginning.name, compressed=beginning.is_compressed))
    return jsonl_table(rows)
