"""A stream of texts -> a stream of labels, of any length in constant memory.

What is written is JSON, a line for each text, or `label ||| text`. A run that was cut goes on where
its output ends. Knows nothing of evaluation.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from minllama.classifier import LlamaZeroShotClassifier
from minllama.classifier.base import Classifier
from minllama.data import BadRows, Row, stream_rows
from minllama.data.source import Source
from minllama.errors import DataError
from minllama.evaluation import predictions
from minllama.options import DataOptions

CHUNK = 512  # texts that are sorted by length and computed together
FORMATS = ("jsonl", "labelled")


def predict_stream(
    classifier: Classifier,
    source: Source,
    stream: TextIO,
    data: DataOptions,
    *,
    output_format: str = "jsonl",
    start: int = 0,
    bad_rows: BadRows | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Classify the rows of a source and write a line for each, in their order.

    Args:
        classifier: of either kind.
        source: as for `stream_rows`.
        stream: where to; flushed after every chunk.
        data: format, columns, what to do with bad rows.
        output_format: `jsonl` or `labelled`.
        start: the index of the first row.
        bad_rows: counts those that are left out.
        progress: is told how many more texts are done.

    Returns:
        How many texts were classified.

    Raises:
        DataError: the source cannot be read, or a bad row that is not to be skipped.
    """
    rows = stream_rows(source, data, start=start, bad_rows=bad_rows)
    count = 0
    while chunk := list(islice(rows, CHUNK)):
        texts = [row.text for row in chunk]
        p = classifier.predict_proba(texts, progress=progress)
        lines = prediction_lines(classifier, chunk, p, output_format)
        stream.writelines(lines)
        stream.flush()
        count += len(chunk)
    return count


def prediction_lines(
    classifier: Classifier, rows: Iterable[Row], probabilities: Any, output_format: str
) -> Iterator[str]:
    """One line for each row of (N, C) probabilities."""
    chosen = predictions(probabilities, multi_label=classifier.multi_label)
    for row, p, of_row in zip(rows, probabilities, chosen, strict=True):
        names = [classifier.labels[i] for i in np.flatnonzero(of_row)]
        if output_format == "labelled":
            yield f"{', '.join(names)} ||| {' '.join(row.text.split())}\n"
        else:
            yield json.dumps(record(classifier, row, p, names), ensure_ascii=False) + "\n"


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
    if isinstance(classifier, LlamaZeroShotClassifier):
        said["score"] = classifier.score
    return said


def resume_at(output: Path, source: Source, data: DataOptions) -> int:
    """Where a cut run goes on: cuts a half-written last line off, and gives the next row's index.

    Raises:
        DataError: the file holds something else than predictions of this source.
    """
    last, end = _last_record(output)
    os.truncate(output, end)
    if last is None:
        return 0
    first = next(iter(stream_rows(source, data, start=last["index"])), None)
    if first is None or (first.index, first.text) != (last["index"], last["text"]):
        raise DataError(
            f"{output}: its last line is of row {last['index']}, and that row of {source} has "
            "another text; give the input that the run began with, or another --output"
        )
    return int(last["index"]) + 1


def _last_record(output: Path) -> tuple[Mapping[str, Any] | None, int]:
    """The last whole record of a file, and where it ends."""
    last, end, number = None, 0, 0
    try:
        with output.open("rb") as file:
            for line in file:
                number += 1
                if not line.endswith(b"\n"):
                    break
                found = json.loads(line)
                if not isinstance(found.get("index"), int) or not isinstance(found["text"], str):
                    raise ValueError("no index and text")
                last, end = found, end + len(line)
    except FileNotFoundError:
        output.touch()
    except OSError as error:
        raise DataError(f"{output}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{output}, line {number}: not a prediction of `minllama classify` ({error}); "
            "name another file"
        ) from error
    return last, end
