"""Stream predictions for texts, in constant memory.

Lines are JSON, rows of CSV or TSV, or `label ||| text`. `minllama classify` and `minllama train`
call it.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minllama.classification import LlamaZeroShotClassifier
from minllama.classification.base import MOST_NOTED, Classifier
from minllama.classification.storage.fingerprint import comparable_config
from minllama.data import BadRows, Row, stream_rows
from minllama.data.lines import SEPARATOR
from minllama.data.source import Source
from minllama.errors import DataError, OptionError
from minllama.evaluation.metrics import predictions
from minllama.evaluation.report.values import rounded
from minllama.evaluation.thresholds import one_line
from minllama.experiment.resume import Done, check_same, chunk_of, other_input, rows_still_to_do
from minllama.experiment.table_output import ALL_COLUMNS, TableOutput
from minllama.options import DataOptions
from minllama.text import listed

DIGITS = 16  # of a classifier's digest in each record


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
    notices: list[str] | None = None,
) -> Iterator[list[str]]:
    """Classify the rows of a source; yields their lines in order, a few hundred at a time.

    For Parquet, JSON lines are returned as well. The first line of a new CSV or TSV file includes
    the header.

    Args:
        classifier: of either kind.
        source: as for `stream_rows`.
        data: format, columns, handling of bad rows.
        output_format: one of OUTPUT_FORMATS.
        columns: those of the source that its records carry along; ALL_COLUMNS for all.
        done: the rows already in a resumed output. Its last chunk is computed again, since rounding
            depends on a text's batch; only later lines are returned.
        bad_rows: counts those that are left out.
        progress: receives the number of texts just completed.
        notices: receives notes about the output.

    Raises:
        DataError: the source cannot be read or lacks a column, a bad row may not be skipped, or
            `done` does not match this classifier and source.
        OptionError: labels cannot be written in lines of `label ||| text`.
    """
    check_format(classifier, output_format)
    done = done or Done()
    rows = rows_still_to_do(stream_rows(source, data, bad_rows=bad_rows), done, source)
    table = TableOutput(output_format, source, data, columns)
    records, is_first, digest = done.records, True, digest_of(classifier)
    form = "labelled" if output_format == "labelled" else "jsonl"
    with classifier.steady():
        for _, group in groupby(rows, key=lambda row: chunk_of(row.index)):
            chunk = list(group)
            if is_first:
                _check_columns(columns, chunk, source)
                columns = table.columns(chunk[0])
            p = answers(classifier, [row.text for row in chunk], progress=progress)
            lines = list(prediction_lines(classifier, digest, chunk, p, form, columns))
            if is_first:
                records = table.begin(lines[0], chunk, done, notices)
            if records:
                scale = classifier.scale
                check_same(records, lines, source, 1.0 if scale is None else scale.std)
            yield table.rows(lines[len(records) :])
            records, is_first = (), False
    if records:
        raise other_input(records[-1], source)


def answers(
    classifier: Classifier,
    texts: Sequence[str],
    *,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.floating[Any]]:
    """A classifier's predictions: (N, C) probabilities, or (N,) numbers."""
    if classifier.scale is not None:
        return classifier.predict_values(texts, progress=progress)
    return classifier.predict_proba(texts, progress=progress)


def check_format(classifier: Classifier, output_format: str) -> None:
    """Whether lines of this format can be read back.

    Raises:
        OptionError: a label cannot be written in a line of `label ||| text`.
    """
    if output_format != "labelled" or classifier.scale is not None:
        return
    for label in classifier.labels:
        is_listed = classifier.multi_label and "," in label
        if SEPARATOR in label or len(label.splitlines()) > 1 or is_listed:
            raise OptionError(
                f"the label {label!r} cannot be written in lines of 'label {SEPARATOR} text'; "
                "use --output-format jsonl"
            )


def prediction_lines(
    classifier: Classifier,
    digest: str,
    rows: Iterable[Row],
    probabilities: Any,
    output_format: str,
    columns: Sequence[str] = (),
) -> Iterator[str]:
    """One line per row of `answers`; `digest` is `digest_of` the classifier."""
    if classifier.scale is not None:
        for row, value in zip(rows, probabilities.tolist(), strict=True):
            if output_format == "labelled":
                yield f"{rounded(value)!r} {SEPARATOR} {' '.join(row.text.split())}\n"
            else:
                said = {"index": row.index, "text": row.text, "value": rounded(value)}
                yield _json_line(said, digest, row, columns)
        return
    chosen = predictions(
        probabilities, multi_label=classifier.multi_label, thresholds=classifier.decision
    )
    for row, p, of_row in zip(rows, probabilities, chosen, strict=True):
        names = [classifier.labels[i] for i in np.flatnonzero(of_row)]
        if output_format == "labelled":
            yield f"{', '.join(names)} {SEPARATOR} {' '.join(row.text.split())}\n"
        else:
            yield _json_line(record(classifier, row, p, names), digest, row, columns)


def _json_line(said: dict[str, Any], digest: str, row: Row, columns: Sequence[str]) -> str:
    said = said | {"classifier": digest}
    if columns:
        said["columns"] = _carried(row, columns)
    return json.dumps(said, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _check_columns(columns: Sequence[str], rows: Sequence[Row], source: Source) -> None:
    """Refuse column names that none of the first rows has, before anything is computed."""
    known = {name: None for row in rows for name in row.record}
    if missing := [name for name in columns if name not in (*known, ALL_COLUMNS)]:
        raise DataError(f"{source}: no column {listed(missing)} to keep; there are {listed(known)}")


def _carried(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    """The kept columns of a row; null for missing ones."""
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
    """A digest of a classifier without its base's weights, equal on all machines."""
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
    if classifier.decision is not None:
        said += [classifier.positive, classifier.thresholds]
    if isinstance(classifier, LlamaZeroShotClassifier):
        said += [classifier.label_words, classifier.score_name, classifier.shots]
    else:
        said.append(getattr(classifier, "pooling", None))
    if classifier.scale is not None:
        said.append(dataclasses.asdict(classifier.scale))
    found.update(json.dumps(said, default=str).encode("utf-8", "backslashreplace"))
    for name, parameter in classifier.named_parameters():
        if not name.startswith("llama.") or ".adapters." in name:
            found.update(parameter.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()[:DIGITS]


def record(
    classifier: Classifier, row: Row, probabilities: Any, names: list[str]
) -> dict[str, Any]:
    """The record of one text: its row, label and probabilities, and the score of a zero-shot
    classifier.
    """
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
    """A one-line description of a classifier, for display."""
    temperature = f"temperature {classifier.temperature:.3g}"
    if classifier.decision is not None:
        temperature += f", {one_line(classifier.decision, classifier.labels)}"
    if isinstance(classifier, LlamaZeroShotClassifier):
        prompt = json.dumps(classifier.prompt.prompt, ensure_ascii=False)
        asked = "in a chat" if classifier.prompt.chat else "prompt"
        return f"[label words, score {score_of(classifier)}, {temperature}, {asked} {prompt}]"
    n_layers = classifier.llama.config.n_layers
    if classifier.scale is not None:
        return f"[regression head on layer {classifier.n_layers} of {n_layers}]"
    return f"[head on layer {classifier.n_layers} of {n_layers}, {temperature}]"


def shortened_texts(
    classifier: Classifier, texts: Iterable[str] | None = None, source: Source | None = None
) -> str | None:
    """A message about the number of truncated texts; None without any.

    Args:
        classifier: has read them.
        texts: to report on; None for all.
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
