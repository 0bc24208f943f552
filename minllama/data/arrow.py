"""Parquet files and data sets of the Hugging Face hub -> tables, by way of Arrow's batches.

Programs that come with a data set are never run: `datasets` 4 and later cannot. Cells are handed
on where they are text, numbers, truth values or lists of these; columns of images, bytes or
structures are left out. Knows nothing of which column holds what.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minllama.data.records import RawRow, Table, listed, numbered
from minllama.errors import DataError

ROWS_AT_ONCE = 1000
EXAMPLE_ID = "stanfordnlp/imdb:train"
INSTALL = "pip install 'minllama[train]'"


@dataclass(frozen=True)
class HubDataset:
    """A split of a data set on the hub: `owner/name[/config][@revision][:split]`."""

    repo: str
    config: str | None
    revision: str | None
    split: str | None

    def with_split(self, split: str) -> str:
        """How to ask for that split."""
        config = "" if self.config is None else f"/{self.config}"
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repo}{config}{revision}:{split}"


def parse_hub_id(name: str) -> HubDataset | None:
    """`name` as a data set on the hub; None where it has not that form."""
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
    """The rows of a Parquet file, a batch in memory at a time."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{name}: Parquet needs pyarrow; bring it with: {INSTALL}") from error

    def refusal(error: Exception) -> DataError:
        return DataError(f"{name}: damaged, or no Parquet file ({_first_line(error)})")

    def batches() -> Iterator[Any]:
        try:
            yield from file.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise refusal(error) from error

    try:
        file = parquet.ParquetFile(path)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:
        raise refusal(error) from error
    columns = _plain_columns(schema)
    return Table(name, columns, numbered(_rows(batches()), "row"), _class_names(schema))


def hub_table(hub_dataset: HubDataset, name: str) -> Table:
    """The rows of a data set on the hub, downloaded once into the cache of `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name}: no such file here, and data sets of the Hugging Face hub need datasets; "
            f"bring it with: {INSTALL}"
        ) from error
    quiet = not sys.stderr.isatty() and not datasets.utils.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        loaded = _load_split(hub_dataset, name)
    except DataError:
        raise
    # What goes wrong here comes from four libraries, which share no base class.
    except Exception as error:
        raise DataError(f"{name}: {_reason(hub_dataset, error)}") from error
    finally:
        if quiet:
            datasets.enable_progress_bars()
    schema = loaded.features.arrow_schema
    columns = _plain_columns(schema)
    batches = loaded.select_columns(columns).with_format("arrow").iter(batch_size=ROWS_AT_ONCE)
    return Table(name, columns, numbered(_rows(batches), "row"), _class_names(schema))


def _load_split(hub_dataset: HubDataset, name: str) -> Any:
    import datasets

    repo, config, revision = hub_dataset.repo, hub_dataset.config, hub_dataset.revision
    split = hub_dataset.split
    if split is None:
        # No guess: a test split taken for training is a mistake that nothing shows.
        splits = datasets.get_dataset_split_names(repo, config, revision=revision)
        if len(splits) != 1:
            raise DataError(
                f"{name}: has the splits {listed(splits)}; name one, as in "
                f"{hub_dataset.with_split(splits[0] if splits else 'train')}"
            )
        split = splits[0]
    return datasets.load_dataset(repo, config, revision=revision, split=split)


def _reason(hub_dataset: HubDataset, error: Exception) -> str:
    """Why a data set cannot be had, and the remedy, in one line."""
    import datasets

    line = _first_line(error)
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return (
            f"no such file here, and no such data set on the hub that you may read ({line}); check "
            "the name, and for a private or gated one set HF_TOKEN"
        )
    if "scripts are no longer supported" in line:
        return (
            "the data set is a program, which is not run; try its conversion "
            f"{hub_dataset.repo}@refs/convert/parquet, or another copy"
        )
    if isinstance(error, ValueError):  # no such split or config; the library lists what there is
        text = " ".join(str(error).split())[:300].rstrip(".")
        return f"{text}; an id has the form owner/name/config:split, such as {EXAMPLE_ID}"
    return (
        f"no such file here, and it cannot be had from the hub ({line}); check the name and the "
        "connection"
    )


def _plain_columns(schema: Any) -> list[str]:
    from pyarrow import types

    def is_plain(kind: Any) -> bool:
        if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
            return is_plain(kind.value_type)
        tests = (
            types.is_string,
            types.is_large_string,
            types.is_string_view,
            types.is_boolean,
            types.is_integer,
            types.is_floating,
            types.is_decimal,
            types.is_null,
        )
        return any(test(kind) for test in tests)

    return [field.name for field in schema if is_plain(field.type)]


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Names of the classes that columns number, as `datasets` keeps them beside the schema."""
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
        for values in _values(batch):
            number += 1
            yield number, values


def _values(batch: Any) -> list[dict[str, Any] | str]:
    batch = _with_short_numbers(batch)
    try:
        values: list[dict[str, Any] | str] = batch.to_pylist()
    except UnicodeDecodeError:  # somewhere in these rows
        if batch.num_rows == 1:
            return ["text that is not UTF-8"]
        return [value for i in range(batch.num_rows) for value in _values(batch.slice(i, 1))]
    return values


def _with_short_numbers(batch: Any) -> Any:
    """Numbers of 32 bits as the shortest decimals that mean them, as other formats write them."""
    import pyarrow as pa

    for i, field in enumerate(batch.schema):
        if pa.types.is_float32(field.type):
            exact = batch.column(i).cast(pa.string()).cast(pa.float64())
            batch = batch.set_column(i, pa.field(field.name, pa.float64()), exact)
    return batch


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".") or type(error).__name__
