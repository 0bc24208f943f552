"""Read CSV and TSV as tables: detect separator, header and quoting."""

import csv
import itertools
import re
from collections.abc import Collection, Iterator

from minllama.data.columns import LABEL_NAMES, TEXT_NAMES, is_known
from minllama.data.lines import MAX_LINE_BYTES, Lines
from minllama.data.records import RawRow, Table, numbered
from minllama.errors import DataError
from minllama.options.text_files import column_names
from minllama.text import printable

SEPARATORS = (",", ";", "\t", "|")
MAX_QUOTED_LINES = 1000  # of one TSV cell: after a literal quote, the next quote may be far away

LOOKED_AT = 2**16  # characters of the header line, to detect its separator

Rows = Iterator[tuple[int, list[str] | str]]


def delimited_table(
    lines: Lines,
    *,
    usual: str,
    separator: str | None = None,
    columns: str | None = None,
    has_header: bool = True,
    requested: Collection[str] = (),
) -> Table:
    """Values with a character between them, below a line of column names.

    Args:
        lines: of the file.
        usual: the usual separator of files with this name: a comma or a tab.
        separator: as given; None to detect it from the header.
        columns: their names, separated by commas, if there is no header.
        has_header: whether the first line has column names.
        requested: column names that must exist.
    """
    stated = excel_separator(lines.peek())
    if stated is not None:
        next(lines)
    separator = separator or stated or separator_of(lines.peek(), usual, requested)
    rows = _tsv_rows(lines, columns) if separator == "\t" else _csv_rows(lines, separator)
    if columns is None and has_header:
        return _table_with_header(lines, rows)
    return _table_without(lines, rows, columns)


def excel_separator(line: str) -> str | None:
    """The separator in a line such as `sep=;`, which Excel reads and hides."""
    match = re.fullmatch(r'\ufeff?"?sep=([^"\r\n])"?[,;\t|]*\r?\n?', line, re.IGNORECASE)
    return match[1] if match else None


def separator_of(line: str, usual: str, requested: Collection[str] = ()) -> str:
    """Detect the separator of column names in the first line of a file.

    The one that yields most known names; else the usual one if it occurs, or a semicolon, as
    spreadsheets write in countries with a decimal comma, or a tab.
    """

    def n_known_names(separator: str) -> int:
        return sum(is_known_name(cell, requested) for cell in cells_of(line, separator))

    line = line[:LOOKED_AT]
    order = (usual, *(other for other in SEPARATORS if other != usual))
    best = max(order, key=n_known_names)
    if n_known_names(best):
        return best if best in line else usual
    # Names never contain tabs, but may contain bars.
    return next((separator for separator in ("\t", *order[:-1]) if separator in line), usual)


def cells_of(line: str, separator: str) -> list[str]:
    """The stripped cells of one line; none if quotes are misplaced."""
    if separator == "\t":
        return [cell.strip().strip('"') for cell in line.strip("\r\n\ufeff").split("\t")]
    try:
        (cells,) = csv.reader([line.strip("\r\n\ufeff")], delimiter=separator, strict=True)
    except (ValueError, csv.Error):
        return []
    return [cell.strip() for cell in cells]


def is_known_name(cell: str, requested: Collection[str] = ()) -> bool:
    """Whether a cell is a usual name of a text or label column."""
    return is_known(cell) or cell in requested


def _csv_rows(lines: Lines, separator: str) -> Rows:
    # The limit is the csv module's own global; it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    taken: list[str] = []  # the lines of this row

    def recorded() -> Iterator[str]:
        for line in lines:
            # Concatenated files have a byte order mark here.
            taken.append(line if taken else line.removeprefix("\ufeff"))
            yield taken[-1]

    reader = None
    while True:
        # Strict: otherwise a misplaced quote silently joins cells, or rows.
        reader = reader or csv.reader(recorded(), delimiter=separator, strict=True)
        taken.clear()
        lines.mark()
        start = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            offset, reason, n_lost = _not_csv(str(error), taken, separator)
            lines.take_problem()
            lines.rewind(n_lost)
            reader = None
            yield start + offset, reason
            continue
        if problem := lines.take_problem():
            yield problem
        elif "".join(cells).strip() or len(cells) > 1:
            yield start, cells


def _not_csv(message: str, taken: list[str], separator: str) -> tuple[int, str, int]:
    """For an unreadable row: the line of the error, its description, and the lines to skip.

    An unclosed quote would consume everything up to the next one: lines after its own are read
    again.
    """
    whole = len(taken)
    if message.startswith("new-line character"):
        return 0, "a carriage return outside quotes (lines must end with LF or CRLF)", whole
    opened, is_another = _unclosed_quote(taken, separator)
    unclosed = "a quote is not closed"
    if message.startswith("field larger"):
        unclosed = f"a cell of more than {MAX_LINE_BYTES:,} characters; is a closing quote missing?"
    elif not message.startswith("unexpected end") and not (is_another and opened < whole - 1):
        return 0, f"not CSV ({printable(message)})", whole
    return opened, unclosed, opened + 1


def _unclosed_quote(taken: list[str], separator: str) -> tuple[int, bool]:
    """The line of a row's unclosed quote.

    The other value: whether a cell's first quote was read as the end of it.
    """
    opened, inside = 0, False
    for number, line in enumerate(taken):
        at = line.find('"')
        while at >= 0:
            before, after = line[at - 1] if at else "\n", line[at + 1 : at + 2]
            step = 1
            if not inside:
                inside = before in (separator, "\n")
                opened = number if inside else opened
            elif after == '"':
                step = 2
            elif after in (separator, "\r", "\n", ""):
                inside = False
            else:
                return opened, before in (separator, "\n")
            at = line.find('"', at + step)
    return opened, False


def _tsv_rows(lines: Lines, columns: str | None) -> Rows:
    """One row per line, except for line breaks and tabs in fully quoted cells.

    Spreadsheets and pandas write such cells, but in most published datasets a quote is an ordinary
    character. A quote at the start of a cell counts as quoting if another closes it, all between
    them are doubled, and the row has as many cells as the first.
    """
    reader = _QuotedCells(lines, None if columns is None else len(column_names(columns)))
    for line in lines:
        start = lines.number
        line = line.removeprefix("\ufeff")
        cells = reader.cells(line) if '"' in line else _without_end(line).split("\t")
        if problem := lines.take_problem():
            yield problem
        elif line.strip():
            reader.width = reader.width or len(cells)
            yield start, cells


# A quoted cell up to its end, with all inner quotes doubled.
_INSIDE = re.compile(r'[^"]*(?:""[^"]*)*')
_CELL_END = re.compile(r"\t|\r?\n?\Z")


class _QuotedCells:
    """Reads the rows of a TSV file that have quotes in them.

    Attributes:
        width: number of cells per row, once known.
    """

    def __init__(self, lines: Lines, width: int | None) -> None:
        self.width = width
        self._lines = lines
        self._is_quoting = False  # whether the file's writer quotes cells

    def cells(self, line: str) -> list[str]:
        """The lines of a row that starts with this line."""
        plain = [_unquoted(cell) for cell in _without_end(line).split("\t")]
        cells, is_open, is_written = _cells_in(line)
        if is_open and (joined := self._over_lines(line, len(plain))):
            return joined
        if len(plain) == self.width != len(cells):
            return plain
        # Column names are quoted only if everything is.
        self._is_quoting = self._is_quoting or is_written or (self.width is None and not is_open)
        return cells

    def _over_lines(self, line: str, n_plain: int) -> list[str] | None:
        """The cells, if the quotes that this line opens are closed in a following line."""
        whole, each_is_a_row = line, n_plain == self.width != 1
        for n_more in range(1, MAX_QUOTED_LINES):
            following = self._lines.peek_ahead(n_more)
            if not following or len(whole) + len(following) > MAX_LINE_BYTES:
                return None
            whole += following
            each_is_a_row = each_is_a_row and following.count("\t") + 1 == self.width
            end = _end_of_inside(following, 0)
            if end == len(following):
                continue
            if not _CELL_END.match(following, end + 1):
                return None
            cells, is_open, _ = _cells_in(whole)
            if is_open:
                continue
            # If each line is a complete row, quotes that happen to match are literal.
            is_quoting = self._is_quoting or any('"' in cell and "\n" in cell for cell in cells)
            if len(cells) != (self.width or len(cells)) or (each_is_a_row and not is_quoting):
                return None
            self._is_quoting = True
            for _ in range(n_more):
                next(self._lines)
            return cells
        return None


def _cells_in(text: str) -> tuple[list[str], bool, bool]:
    """The cells of a row; whether one starts with a quote that may be closed later, and whether one
    shows that the writer quotes.
    """
    text = _without_end(text)
    cells, at, is_open, is_written = [], 0, False, False
    while True:
        end = _end_of_inside(text, at + 1) if text.startswith('"', at) else -1
        if 0 <= end < len(text) and text[end + 1 : end + 2] in ("\t", ""):
            cells.append(text[at + 1 : end].replace('""', '"'))
            is_written = is_written or any(char in cells[-1] for char in '"\t\n')
            at = end + 1
        else:
            is_open = is_open or end == len(text)
            end = text.find("\t", at)
            cells.append(text[at : end if end >= 0 else len(text)])
            at += len(cells[-1])
        if at >= len(text):
            return cells, is_open, is_written
        at += 1  # the tab


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _end_of_inside(text: str, start: int) -> int:
    match = _INSIDE.match(text, start)
    assert match is not None
    return match.end()


def _unquoted(cell: str) -> str:
    inside = cell[1:-1]
    is_quoted = len(cell) > 1 and cell[0] == cell[-1] == '"'
    if is_quoted and '"' not in inside.replace('""', ""):
        return inside.replace('""', '"')
    return cell


def _table_with_header(lines: Lines, rows: Rows) -> Table:
    number, header = next(rows, (1, []))
    if isinstance(header, str):
        raise DataError("; ".join([f"{lines.name}, line {number}: {header}", *lines.remedies]))
    columns = [name.strip() for name in header]
    if any("\0" in name for name in columns):
        raise DataError(f"{lines.name}: contains NUL characters; is it UTF-16, or not a text file?")
    records = _records(lines.name, rows, columns, "the first line")
    names = "text,label,... (one name per column)"
    cells, option = columns, ""
    if len(columns) == 1 and "|" in columns[0]:
        cells, option = columns[0].split("|"), "--separator '|' "
    if len(cells) == 1:
        names = "text"
    elif len(cells) == 2:
        text_first = len(cells[0].split()) > len(cells[1].split())
        names = "text,label" if text_first else "label,text"
    options = f"{option}--no-header --columns {names}"
    header = f"if the first line is an example, not a header, add {options}"
    return Table(lines.name, columns, numbered(records), header=header, remedies=lines.remedies)


def _table_without(lines: Lines, rows: Rows, given: str | None) -> Table:
    first = next(rows, None)
    rows = itertools.chain([] if first is None else [first], rows)
    where, header = "--columns", ""
    if given is not None:
        columns = column_names(given)
    else:
        where = "the first line"
        header = "name them all, in order, with --columns, such as --columns label,text"
        width = len(first[1]) if first is not None and isinstance(first[1], list) else 1
        columns = ["text"] if width == 1 else [str(i + 1) for i in range(width)]
    records = _records(lines.name, rows, columns, where, has_header=False)
    return Table(lines.name, columns, numbered(records), header=header, remedies=lines.remedies)


def _records(
    name: str, rows: Rows, columns: list[str], where: str, *, has_header: bool = True
) -> Iterator[RawRow]:
    """The rows by column, skipping repeated headers of concatenated files."""
    header = [column.lower() for column in columns]
    for number, cells in rows:
        if isinstance(cells, str):
            yield number, cells
        elif len(cells) != len(columns):
            yield number, f"columns: {len(cells)} here, {len(columns)} in {where}"
        elif _is_header(cells, header, columns):
            names = [cell.strip().lower() for cell in cells]
            if has_header and names != header and set(names) == set(header):
                raise DataError(
                    f"{name}, line {number}: has the column names in a different order than the "
                    "first line; concatenate files by column, or read them separately"
                )
            remedy = (
                "" if has_header else " (if it is the first line, omit --columns and --no-header)"
            )
            yield number, f"a line of column names, not an example{remedy}"
        else:
            yield number, dict(zip(columns, cells, strict=True))


def _is_header(cells: list[str], header: list[str], columns: list[str]) -> bool:
    """Whether a row repeats the header, or consists of usual column names."""
    if len(cells) == 1:  # a text may be one word
        return cells == columns and cells[0].lower() in TEXT_NAMES
    # Most rows differ in their first cell.
    first = cells[0].strip().lower()
    if first not in header and not is_known_name(first):
        return False
    names = [cell.strip().lower() for cell in cells]
    if names == header or (len(set(names)) == len(header) and set(names) == set(header)):
        return True
    kinds = (TEXT_NAMES, LABEL_NAMES)
    return (
        len(set(names)) == len(names)
        and all(
            any(name in kind for name in names) and any(name in kind for name in header)
            for kind in kinds
        )
        and all(map(is_known_name, names))
    )
