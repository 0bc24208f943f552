"""Read Parquet files and Hugging Face datasets as tables, through Arrow record batches.

Dataset scripts are never executed (`datasets` 4 and later cannot). Cells of text, numbers, booleans
or lists of these are passed on; columns of images, bytes or structures are dropped.
`minllama.data.source` calls it.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minllama.data.records import RawRow, Table, numbered
from minllama.errors import DataError, optional_import
from minllama.text import first_line, listed

ROWS_AT_ONCE = 1000
BYTES_AT_ONCE = 2**24  # of cells that are converted to Python objects at a time
EXAMPLE_ID = "stanfordnlp/imdb:train"


@dataclass(frozen=True)
class HubDataset:
    """A split of a data set on the hub: `owner/name[/config][@revision][:split]`."""

    repo: str
    config: str | None
    revision: str | None
    split: str | None

    def with_split(self, split: str) -> str:
        """The id of that split."""
        config = "" if self.config is None else f"/{self.config}"
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repo}{config}{revision}:{split}"


def parse_hub_id(name: str) -> HubDataset | None:
    """`name` as a Hugging Face dataset; None if it does not have that form."""
    match = re.fullmatch(
        r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(/(?P<config>[\w.-]+))?"
        r"(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.-]+))?",
        name,
        re.ASCII,
    )
    if match is None:
        return None
    return HubDataset(match["repo"], match["config"], match["revision"], match["split"])


def parquet_table(path: Path, name: str) -> Table:
    """The rows of a Parquet file, with one batch in memory at a time."""
    optional_import("pyarrow", f"{name}: Parquet needs", kind=DataError)
    import pyarrow as pa
    from pyarrow import parquet

    def refusal(error: Exception) -> DataError:
        return DataError(f"{name}: damaged, or not a Parquet file ({first_line(error)})")

    def batches() -> Iterator[Any]:
        try:
            yield from file.iter_batches(batch_size=_rows_at_once(file), columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise refusal(error) from error

    try:
        schema = parquet.read_schema(path)
        # With dictionary encoding, a text that occurs a million times is in memory once.
        file = parquet.ParquetFile(path, read_dictionary=_texts(schema))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise refusal(error) from error
    columns, no_text, no_label = _columns(schema)
    return Table(
        name,
        columns,
        numbered(_rows(batches()), "row"),
        _class_names(schema),
        no_text=no_text,
        no_label=no_label,
    )


def _texts(schema: Any) -> list[str]:
    """The paths of columns of strings, in lists too."""
    from pyarrow import types

    paths = []
    for field in schema:
        path, kind = field.name, field.type
        while types.is_list(kind) or types.is_large_list(kind):
            path, kind = f"{path}.list.{kind.value_field.name}", kind.value_type
        if _is_text(kind):
            paths.append(path)
    return paths


def _rows_at_once(file: Any) -> int:
    """The number of rows in a few megabytes of the file's values, limited to all rows."""
    rows: int = file.metadata.num_rows
    groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
    size: int = sum(group.total_byte_size for group in groups)
    return max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE * max(rows, 1) // max(size, 1)))


def hub_table(hub_dataset: HubDataset, name: str) -> Table:
    """The rows of a Hugging Face dataset, downloaded once into the cache of `datasets`."""
    needs = f"{name}: no such file, and Hugging Face datasets need"
    datasets = optional_import("datasets", needs, kind=DataError)
    quiet = not sys.stderr.isatty() and not datasets.utils.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        loaded = _load_split(hub_dataset, name)
    except DataError:
        raise
    # Errors here come from four libraries, which share no base class.
    except Exception as error:
        raise DataError(f"{name}: {_reason(hub_dataset, error)}") from error
    finally:
        if quiet:
            datasets.enable_progress_bars()
    schema = loaded.features.arrow_schema
    columns, no_text, no_label = _columns(schema)
    batches = loaded.select_columns(columns).with_format("arrow").iter(batch_size=ROWS_AT_ONCE)
    return Table(
        name,
        columns,
        numbered(_rows(batches), "row"),
        _class_names(schema),
        no_text=no_text,
        no_label=no_label,
    )


def _load_split(hub_dataset: HubDataset, name: str) -> Any:
    import datasets

    repo, config, revision = hub_dataset.repo, hub_dataset.config, hub_dataset.revision
    split = hub_dataset.split
    if split is None:
        # No guess: training on a test split by mistake would go unnoticed.
        splits = datasets.get_dataset_split_names(repo, config, revision=revision)
        if len(splits) != 1:
            raise DataError(
                f"{name}: has the splits {listed(splits)}; choose one, such as "
                f"{hub_dataset.with_split(splits[0] if splits else 'train')}"
            )
        split = splits[0]
    return datasets.load_dataset(repo, config, revision=revision, split=split)


def _reason(hub_dataset: HubDataset, error: Exception) -> str:
    """The reason why a data set cannot be loaded, and the remedy, in one line."""
    import datasets

    line = first_line(error)
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return (
            f"no such file, and no accessible dataset of that name on Hugging Face ({line}); "
            "check the name, and for a private or gated one set HF_TOKEN"
        )
    if "scripts are no longer supported" in line:
        return (
            "the dataset needs a script, which is not supported; try its conversion "
            f"{hub_dataset.repo}@refs/convert/parquet, or another copy"
        )
    if isinstance(error, ValueError):  # no such split or config; the library lists those that exist
        text = " ".join(str(error).split())[:300].rstrip(".")
        return f"{text}; an id has the form owner/name/config:split, such as {EXAMPLE_ID}"
    return (
        f"no such file, and it cannot be downloaded from Hugging Face ({line}); check the name "
        "and the connection"
    )


def _columns(schema: Any) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """The columns that are read; the types of those without text, and of dropped ones."""
    from pyarrow import types

    text = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    plain = (*text, types.is_boolean, types.is_integer, types.is_floating, types.is_decimal)
    # A day or a time is one text in every format; a timestamp is not.
    days = (types.is_date, _is_short_time)
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)

    def is_one_of(tests: tuple[Any, ...], kind: Any) -> bool:
        while types.is_dictionary(kind):
            kind = kind.value_type
        return any(test(kind) for test in tests)

    def is_plain(kind: Any) -> bool:
        if is_one_of(days, kind):
            return True
        while is_one_of(lists, kind):
            kind = kind.value_type
        return is_one_of(plain, kind)

    columns = [field.name for field in schema if is_plain(field.type)]
    no_text = {f.name: str(f.type) for f in schema if not is_one_of(text, f.type)}
    no_label = {name: kind for name, kind in no_text.items() if name not in columns}
    return columns, {name: no_text[name] for name in no_text if name in columns}, no_label


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Class names of numeric columns, which `datasets` stores in the schema's metadata."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        found = {}
        for column, feature in features.items():
            # A column of lists holds the feature of its elements.
            names = feature.get("feature", feature).get("names")
            if isinstance(names, list) and all(isinstance(name, str) for name in names):
                found[column] = [name.strip() for name in names]
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}
    return found


def _rows(batches: Iterator[Any]) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for part in _parts(batch):
            for values in _values(part):
                number += 1
                yield number, values


def _parts(batch: Any) -> Iterator[Any]:
    """The rows of a batch, converted to Python objects in slices of a few megabytes."""
    start = total = 0
    for row, size in enumerate(_sizes(batch)):
        if total and total + size > BYTES_AT_ONCE:
            yield _decoded(batch.slice(start, row - start))
            start, total = row, 0
        total += size
    yield _decoded(batch.slice(start))


def _decoded(batch: Any) -> Any:
    """The same rows without dictionary encoding, which is slow to read row by row."""
    from pyarrow import types

    for index, field in enumerate(batch.schema):
        if types.is_dictionary(field.type) and hasattr(batch.column(index), "dictionary_decode"):
            batch = batch.set_column(index, field.name, batch.column(index).dictionary_decode())
    return batch


def _sizes(batch: Any) -> list[int]:
    """Bytes of text per row, including lists; None if all are small."""
    lengths = [found for column in batch.columns if (found := _lengths(column)) is not None]
    if sum(len(some) * _largest(some) for _, some in lengths) <= BYTES_AT_ONCE:
        return []
    total = [0] * batch.num_rows
    for rows, some in lengths:
        for row, length in zip(rows, some.to_pylist(), strict=True):
            total[row] += length or 0
    return total


def _largest(lengths: Any) -> int:
    from pyarrow import compute

    largest: int | None = compute.max(lengths).as_py()
    return largest or 0


def _lengths(column: Any) -> tuple[Sequence[int], Any] | None:
    """The rows of a column's texts, and their sizes in bytes; None without texts."""
    from pyarrow import compute, types

    if hasattr(column, "chunks"):  # of a table
        column = column.combine_chunks()
    rows: Sequence[int] = range(len(column))
    while types.is_list(column.type) or types.is_large_list(column.type):
        rows = [rows[parent] for parent in compute.list_parent_indices(column).to_pylist()]
        column = column.flatten()
    if types.is_dictionary(column.type) and _is_text(column.type.value_type):
        return rows, compute.binary_length(column.dictionary).take(column.indices)
    return (rows, compute.binary_length(column)) if _is_text(column.type) else None


def _is_short_time(kind: Any) -> bool:
    """Whether a type is a time of day that Python supports: without nanoseconds."""
    from pyarrow import types

    return bool(types.is_time(kind) and kind.unit != "ns")


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind))


def _values(batch: Any) -> list[dict[str, Any] | str]:
    batch = _with_short_numbers(batch)
    try:
        values: list[dict[str, Any] | str] = _with_written_days(batch)
    except (UnicodeDecodeError, ValueError, OverflowError) as error:  # somewhere in these rows
        if batch.num_rows == 1:
            is_text = isinstance(error, UnicodeDecodeError)
            return ["text that is not UTF-8" if is_text else "a date after the year 9999"]
        return [value for i in range(batch.num_rows) for value in _values(batch.slice(i, 1))]
    return values


def _with_written_days(batch: Any) -> list[Any]:
    """The rows, with dates and times as text, as in other formats."""
    from pyarrow import types

    rows: list[dict[str, Any]] = batch.to_pylist()
    for field in batch.schema:
        if types.is_date(field.type) or types.is_time(field.type):
            for row in rows:
                value = row[field.name]
                row[field.name] = None if value is None else str(value)
    return rows


def _with_short_numbers(batch: Any) -> Any:
    """32-bit numbers as the shortest decimals that represent them, as in other formats."""
    import pyarrow as pa

    for i, field in enumerate(batch.schema):
        if pa.types.is_float32(field.type):
            exact = batch.column(i).cast(pa.string()).cast(pa.float64())
            batch = batch.set_column(i, pa.field(field.name, pa.float64()), exact)
    return batch
