"""A stream of texts -> lines that say their labels, of any length in constant memory.

A line is JSON, or `label ||| text`. A run that was cut goes on where its output ends, and its
output is then that of one that was not. Knows nothing of evaluation.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from minllama.classifier import LlamaZeroShotClassifier
from minllama.classifier.base import Classifier
from minllama.data import BadRows, Row, stream_rows
from minllama.data.lines import SEPARATOR
from minllama.data.source import Source
from minllama.errors import DataError, OptionError
from minllama.evaluation import predictions
from minllama.options import DataOptions

CHUNK = 512  # rows that are sorted by length and computed together
SAME_PROBABILITY = 0.05  # what rounding in bfloat16 may change when a chunk is computed again


def predict_stream(
    classifier: Classifier,
    source: Source,
    data: DataOptions,
    *,
    output_format: str = "jsonl",
    last: Mapping[str, Any] | None = None,
    bad_rows: BadRows | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[list[str]]:
    """Classify the rows of a source: for each few hundred of them their lines, in their order.

    Args:
        classifier: of either kind.
        source: as for `stream_rows`.
        data: format, columns, what to do with bad rows.
        output_format: `jsonl` or `labelled`.
        last: the last record of an output to go on with. Its chunk is computed again, since
            rounding depends on the company that a text is in; only what is behind it is given.
        bad_rows: counts those that are left out.
        progress: is told how many more texts are done.

    Raises:
        DataError: the source cannot be read, a bad row that is not to be skipped, or `last` is not
            what this classifier says of this source.
        OptionError: labels cannot be told from the text in lines of `label ||| text`.
    """
    check_format(classifier, output_format)
    rows = stream_rows(source, data, start=first_row(last), bad_rows=bad_rows)
    with classifier.steady():
        for _, group in groupby(rows, key=lambda row: row.index // CHUNK):
            chunk = list(group)
            p = classifier.predict_proba([row.text for row in chunk], progress=progress)
            done = 0
            if last is not None:
                done, last = _rows_done(classifier, last, chunk, p, source), None
            yield list(prediction_lines(classifier, chunk[done:], p[done:], output_format))
    if last is not None:
        raise _other_input(last, source)


def first_row(last: Mapping[str, Any] | None) -> int:
    """The index of the row at which a run that goes on behind `last` begins to read."""
    return 0 if last is None else int(last["index"]) // CHUNK * CHUNK


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
    classifier: Classifier, rows: Iterable[Row], probabilities: Any, output_format: str
) -> Iterator[str]:
    """One line for each row of (N, C) probabilities."""
    chosen = predictions(probabilities, multi_label=classifier.multi_label)
    for row, p, of_row in zip(rows, probabilities, chosen, strict=True):
        names = [classifier.labels[i] for i in np.flatnonzero(of_row)]
        if output_format == "labelled":
            yield f"{', '.join(names)} {SEPARATOR} {' '.join(row.text.split())}\n"
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


def last_record(output: Path) -> tuple[Mapping[str, Any] | None, int]:
    """The last whole record of a file of JSON lines, and where it ends, in bytes.

    None and 0 where the file is not there, or holds no whole line.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    last, end, number = None, 0, 0
    try:
        with output.open("rb") as file:
            for line in file:
                number += 1
                if not line.endswith(b"\n"):
                    break
                found = json.loads(line)
                is_whole = isinstance(found["probabilities"], dict) and type(found["text"]) is str
                if type(found["index"]) is not int or not is_whole:
                    raise ValueError("index, text or probabilities are of another type")
                last, end = found, end + len(line)
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
    return last, end


def _rows_done(
    classifier: Classifier,
    last: Mapping[str, Any],
    chunk: list[Row],
    probabilities: Any,
    source: Source,
) -> int:
    """How many rows of a chunk are in an output that ends with the record `last`."""
    place = next((i for i, row in enumerate(chunk) if row.index == last["index"]), None)
    if place is None or chunk[place].text != last["text"]:
        raise _other_input(last, source)
    was, now = (
        last["probabilities"],
        dict(zip(classifier.labels, probabilities[place], strict=True)),
    )
    is_alike = was.keys() == now.keys() and last.get("score") == score_of(classifier)
    if not is_alike or any(
        not isinstance(p, int | float) or abs(p - now[name]) > SAME_PROBABILITY
        for name, p in was.items()
    ):
        raise DataError(
            f"the output ends with row {last['index']}, and of that row this classifier says "
            "something else; give the one that the run began with, or another --output"
        )
    return place + 1


def _other_input(last: Mapping[str, Any], source: Source) -> DataError:
    return DataError(
        f"the output ends with row {last['index']}, and {source} has no such row with that text; "
        "give the input that the run began with, or another --output"
    )
