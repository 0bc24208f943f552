"""A stream of texts -> lines that say their labels, of any length in constant memory.

A line is JSON, or `label ||| text`. A run that was cut goes on where its output ends, and its
output is then that of one that was not. Knows nothing of evaluation.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from minllama.classifier import LlamaZeroShotClassifier
from minllama.classifier.base import MOST_NOTED, Classifier
from minllama.classifier.identity import comparable_config
from minllama.data import BadRows, Row, stream_rows
from minllama.data.lines import SEPARATOR
from minllama.data.records import listed
from minllama.data.source import Source
from minllama.errors import DataError, OptionError
from minllama.evaluation import predictions
from minllama.options import DataOptions

CHUNK = 512  # rows that are sorted by length and computed together
SAME_PROBABILITY = 0.05  # what rounding in halves may change, here or on another machine
DIGITS = 16  # of a classifier's digest in each record
ALL_COLUMNS = "all"
RECORD_BEGINS = b'{"index": '


@dataclass(frozen=True)
class Done:
    """What an output holds already, of a run that was cut.

    Attributes:
        records: those of its last chunk, in order; empty where it holds none.
        n_before: how many come before them.
        end: where the last whole record ends, in bytes.
    """

    records: tuple[Mapping[str, Any], ...] = ()
    n_before: int = 0
    end: int = 0

    @property
    def start(self) -> int:
        """The index of the row at which a run that goes on begins to compute."""
        return _chunk_of(self.records[-1]["index"]) * CHUNK if self.records else 0


def predict_stream(
    classifier: Classifier,
    source: Source,
    data: DataOptions,
    *,
    output_format: str = "jsonl",
    columns: Sequence[str] = (),
    done: Done | None = None,
    bad_rows: BadRows | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[list[str]]:
    """Classify the rows of a source: for each few hundred of them their lines, in their order.

    Args:
        classifier: of either kind.
        source: as for `stream_rows`.
        data: format, columns, what to do with bad rows.
        output_format: `jsonl` or `labelled`.
        columns: those of the source that its records carry along; ALL_COLUMNS for all.
        done: what the output holds that is gone on with. Its last chunk is computed again, since
            rounding depends on the company that a text is in; only what is behind it is given.
        bad_rows: counts those that are left out.
        progress: is told how many more texts are done.

    Raises:
        DataError: the source cannot be read or has no such column, a bad row that is not to be
            skipped, or `done` is not what this classifier says of this source.
        OptionError: labels cannot be told from the text in lines of `label ||| text`.
    """
    check_format(classifier, output_format)
    done = done or Done()
    rows = _rows_from(stream_rows(source, data, bad_rows=bad_rows), done, source)
    records, is_first = done.records, True
    with classifier.steady():
        for _, group in groupby(rows, key=lambda row: _chunk_of(row.index)):
            chunk = list(group)
            if is_first:
                _check_columns(columns, chunk, source)
            p = classifier.predict_proba([row.text for row in chunk], progress=progress)
            lines = list(prediction_lines(classifier, chunk, p, output_format, columns))
            if records:
                _check_same(classifier, records, lines, source)
            yield lines[len(records) :]
            records, is_first = (), False
    if records:
        raise _other_input(records[-1], source)


def _chunk_of(index: int) -> int:
    return index // CHUNK


def _rows_from(rows: Iterator[Row], done: Done, source: Source) -> Iterator[Row]:
    """The rows that are still to be computed, once those before them are found to be done.

    Raises:
        DataError: the output has not as many records of these.
    """
    n_before = 0
    for row in rows:
        if row.index >= done.start:
            rows = chain([row], rows)
            break
        n_before += 1
    if n_before != done.n_before:
        raise DataError(
            f"the output has {done.n_before:,} records of the rows before number {done.start:,}, "
            f"and {source} has {n_before:,} there; give the input and options that the run began "
            "with, or another --output"
        )
    return rows


def check_format(classifier: Classifier, output_format: str) -> None:
    """Whether lines of this format can be read back.

    Raises:
        OptionError: a label holds what would end it in a line of `label ||| text`.
    """
    if output_format != "labelled":
        return
    for label in classifier.labels:
        is_listed = classifier.multi_label and "," in label
        if SEPARATOR in label or len(label.splitlines()) > 1 or is_listed:
            raise OptionError(
                f"the label {label!r} cannot stand in a line of 'label {SEPARATOR} text'; "
                "use --output-format jsonl"
            )


def prediction_lines(
    classifier: Classifier,
    rows: Iterable[Row],
    probabilities: Any,
    output_format: str,
    columns: Sequence[str] = (),
) -> Iterator[str]:
    """One line for each row of (N, C) probabilities."""
    digest = digest_of(classifier)
    chosen = predictions(probabilities, multi_label=classifier.multi_label)
    for row, p, of_row in zip(rows, probabilities, chosen, strict=True):
        names = [classifier.labels[i] for i in np.flatnonzero(of_row)]
        if output_format == "labelled":
            yield f"{', '.join(names)} {SEPARATOR} {' '.join(row.text.split())}\n"
        else:
            said = record(classifier, row, p, names) | {"classifier": digest}
            if columns:
                said["columns"] = _carried(row, columns)
            yield json.dumps(said, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _check_columns(columns: Sequence[str], rows: Sequence[Row], source: Source) -> None:
    """Refuse, before anything is computed, names of columns that none of the first rows has."""
    known = {name: None for row in rows for name in row.record}
    if missing := [name for name in columns if name not in (*known, ALL_COLUMNS)]:
        raise DataError(
            f"{source}: there is no column {listed(missing)} to keep; there are {listed(known)}"
        )


def _carried(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    """What a row says beside its text, by column; null where it lacks one."""
    if ALL_COLUMNS in columns:
        return {name: _plain(row.record[name]) for name in row.record if name != row.column}
    return {name: _plain(row.record.get(name)) for name in columns}


def _plain(value: Any) -> Any:
    """A value of a cell as JSON has it, which knows neither NaN nor infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _plain(element) for name, element in value.items()}
    return [_plain(element) for element in value] if isinstance(value, list | tuple) else value


def digest_of(classifier: Classifier) -> str:
    """What tells a classifier from others, but for its base's weights: the same on any machine."""
    if classifier.digest is not None:
        return classifier.digest[:DIGITS]
    found = hashlib.sha256()
    said = [
        type(classifier).__name__,
        classifier.labels,
        dataclasses.asdict(classifier.prompt),
        classifier.temperature,
        classifier.n_layers,
        comparable_config(classifier.llama.config),
    ]
    if isinstance(classifier, LlamaZeroShotClassifier):
        said += [classifier.label_words, classifier.score_name, classifier.shots]
    else:
        said.append(getattr(classifier, "pooling", None))
    found.update(json.dumps(said, default=str).encode("utf-8", "backslashreplace"))
    for name, parameter in classifier.named_parameters():
        if not name.startswith("llama.") or ".adapters." in name:
            found.update(parameter.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()[:DIGITS]


def record(
    classifier: Classifier, row: Row, probabilities: Any, names: list[str]
) -> dict[str, Any]:
    """What is said of one text: its row, label and probabilities, and how a zero-shot scored."""
    said: dict[str, Any] = {
        "index": row.index,
        "text": row.text,
        "label": names if classifier.multi_label else names[0],
        "probabilities": {
            name: float(f"{value:.6g}")
            for name, value in zip(classifier.labels, probabilities.tolist(), strict=True)
        },
    }
    if score := score_of(classifier):
        said["score"] = score
    return said


def score_of(classifier: Classifier) -> str | None:
    """How label words are scored; None for a head."""
    return classifier.score_name if isinstance(classifier, LlamaZeroShotClassifier) else None


def described(classifier: Classifier) -> str:
    """How a classifier's probabilities come about, in one line."""
    temperature = f"temperature {classifier.temperature:.3g}"
    if isinstance(classifier, LlamaZeroShotClassifier):
        prompt = json.dumps(classifier.prompt.prompt, ensure_ascii=False)
        asked = "asked in a chat" if classifier.prompt.chat else "prompt"
        return f"[label words, score {score_of(classifier)}, {temperature}, {asked} {prompt}]"
    n_layers = classifier.llama.config.n_layers
    return f"[head on layer {classifier.n_layers} of {n_layers}, {temperature}]"


def shortened_texts(
    classifier: Classifier, texts: Iterable[str] | None = None, source: Source | None = None
) -> str | None:
    """How many texts the classifier has read in part, for people; None where it read all of each.

    Args:
        classifier: has read them.
        texts: of which to say it; None for all that it has read.
        source: of the texts.
    """
    seen = classifier.shortened
    n = len(seen) if texts is None else len({hash(text) for text in texts} & seen)
    if not n:
        return None
    most, lost = classifier.template.max_len, "beginning" if classifier.prompt.keep_end else "end"
    more = " or more" if n >= MOST_NOTED else ""
    where = "" if source is None else f"{source}: "
    return (
        f"{where}{n:,}{more} different text{'s' * (n > 1)} did not fit into {most:,} tokens with "
        f"the prompt, and {'were' if n > 1 else 'was'} read without {'their' if n > 1 else 'its'} "
        f"{lost}"
    )


def read_done(output: Path) -> Done:
    """What a file of JSON lines holds of a run that is to go on: nothing if it is not there.

    Raises:
        DataError: it cannot be read, or holds something else, or records out of order.
    """
    records: list[Mapping[str, Any]] = []
    n_before, end, number = 0, 0, 0
    try:
        with output.open("rb") as file:
            for line in file:
                number += 1
                if not line.endswith(b"\n"):
                    if line[: len(RECORD_BEGINS)] != RECORD_BEGINS[: len(line)]:
                        raise ValueError("nor the beginning of one")
                    break
                found = _record_of(line)
                if records and found["index"] <= records[-1]["index"]:
                    raise ValueError(f"row {found['index']} behind row {records[-1]['index']}")
                if records and _chunk_of(found["index"]) != _chunk_of(records[-1]["index"]):
                    n_before += len(records)
                    records.clear()
                records.append(found)
                end += len(line)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DataError(f"{output}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{output}, line {number}: not a prediction of `minllama classify` ({what}); "
            "name another file"
        ) from error
    return Done(tuple(records), n_before, end)


def _record_of(line: bytes) -> Mapping[str, Any]:
    found = json.loads(line)
    is_whole = isinstance(found["probabilities"], dict) and type(found["text"]) is str
    if type(found["index"]) is not int or not is_whole:
        raise ValueError("index, text or probabilities are of another type")
    record: Mapping[str, Any] = found
    return record


def _check_same(
    classifier: Classifier,
    records: Iterable[Mapping[str, Any]],
    lines: Sequence[str],
    source: Source,
) -> None:
    """Refuse records that are not what is said now of the first rows of their chunk."""
    for number, record in enumerate(records):
        now = json.loads(lines[number]) if number < len(lines) else {}
        if (now.get("index"), now.get("text")) != (record["index"], record["text"]):
            raise _other_input(record, source)
        if not _is_alike(record, now):
            raise DataError(
                f"the output holds row {record['index']}, and of that row this classifier says "
                "something else; give the one that the run began with, or another --output"
            )
        if record.get("columns") != now.get("columns"):
            raise DataError(
                f"the output holds row {record['index']} with other columns; give the "
                "--keep-columns that the run began with, or another --output"
            )


def _is_alike(record: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two records of a row are by one classifier, but for rounding."""
    was, is_now = record["probabilities"], now["probabilities"]
    return (
        record.get("classifier") == now["classifier"]
        and record.get("score") == now.get("score")
        and was.keys() == is_now.keys()
        and all(
            isinstance(p, int | float) and abs(p - is_now[name]) <= SAME_PROBABILITY
            for name, p in was.items()
        )
    )


def _other_input(record: Mapping[str, Any], source: Source) -> DataError:
    return DataError(
        f"the output holds row {record['index']} where {source} has no such row with that text; "
        "give the input that the run began with, or another --output"
    )
