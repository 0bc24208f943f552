"""Stream predictions for texts, in constant memory.

Lines are JSON, rows of CSV or TSV, or `label ||| text`. `minllama classify` and `minllama train`
call it.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, groupby, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minllama.classification import LlamaExpertsClassifier, LlamaZeroShotClassifier
from minllama.classification.base import MOST_NOTED, Classifier
from minllama.classification.explain import explain
from minllama.classification.storage.fingerprint import comparable_config
from minllama.data import BadRows, Row, stream_rows
from minllama.data.lines import SEPARATOR
from minllama.data.source import Source
from minllama.errors import DataError, OptionError
from minllama.evaluation.metrics import predictions
from minllama.evaluation.report.values import rounded
from minllama.evaluation.thresholds import one_line
from minllama.experiment.resume import (
    CHUNK,
    Done,
    check_same,
    chunk_of,
    other_input,
    rows_still_to_do,
)
from minllama.experiment.table_output import ALL_COLUMNS, TableOutput
from minllama.experiment.tables import EXPLANATION
from minllama.options import DataOptions, ExplainOptions
from minllama.text import listed

DIGITS = 16  # of a classifier's digest in each record
EXPLAINED = 16  # rows whose lines are returned together if each is explained, since that is slow


def predict_stream(
    classifier: Classifier,
    source: Source,
    data: DataOptions,
    *,
    output_format: str = "jsonl",
    columns: Sequence[str] = (),
    explaining: ExplainOptions | None = None,
    done: Done | None = None,
    bad_rows: BadRows | None = None,
    progress: Callable[[int], None] | None = None,
    notices: list[str] | None = None,
) -> Iterator[list[str]]:
    """Classify the rows of a source; yields their lines in order, a few hundred at a time.

    For Parquet, they are JSON. The first line of a new CSV or TSV file includes the header.

    Args:
        classifier: of either kind.
        source: as for `stream_rows`.
        data: format, columns, handling of bad rows.
        output_format: one of OUTPUT_FORMATS.
        columns: those of the source that its records carry along; ALL_COLUMNS for all.
        explaining: whether and how finely predictions are explained; None for not.
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
    explaining, done = explaining or ExplainOptions(), done or Done()
    check_format(classifier, output_format, explains=explaining.explain)
    rows = rows_still_to_do(stream_rows(source, data, bad_rows=bad_rows), done, source)
    table = TableOutput(output_format, source, data, columns)
    records, is_first = done.records, True
    unit = 1.0 if classifier.scale is None else classifier.scale.std
    digest = digest_of(classifier)
    lines_of = partial(_lines_of, classifier, digest, output_format, explaining, progress)
    with classifier.steady():
        for _, group in groupby(rows, key=lambda row: chunk_of(row.index)):
            chunk = list(group)
            if is_first:
                _check_columns(columns, chunk, source)
                columns = table.columns(chunk[0])
            lines = lines_of(chunk, columns, len(records))
            first = list(islice(lines, max(1, len(records))))
            if is_first:
                records = table.begin(first[0], chunk, done, notices)
            check_same(records, first, source, unit)
            lines = chain(first[len(records) :], lines)
            while some := list(islice(lines, EXPLAINED if explaining.explain else CHUNK)):
                yield table.rows(some)
            records, is_first = (), False
    if records:
        raise other_input(records[-1], source)


def _lines_of(
    classifier: Classifier,
    digest: str,
    output_format: str,
    explaining: ExplainOptions,
    progress: Callable[[int], None] | None,
    chunk: Sequence[Row],
    columns: Sequence[str],
    n_done: int,
) -> Iterator[str]:
    """The lines of one chunk: its predictions at once, its explanations one by one."""
    by_chunk, by_row = (None, progress) if explaining.explain else (progress, None)
    p = answers(classifier, [row.text for row in chunk], progress=by_chunk)
    why = explanations(classifier, chunk, p, explaining, n_done=n_done, progress=by_row)
    return prediction_lines(classifier, digest, chunk, p, output_format, columns, why)


def explanations(
    classifier: Classifier,
    rows: Sequence[Row],
    predicted: Any,
    options: ExplainOptions,
    *,
    n_done: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Iterator[dict[str, Any] | None]:
    """The explanation of each row's prediction for its record; None if there are to be none.

    Args:
        classifier: of any kind.
        rows: the texts.
        predicted: their `answers`.
        options: whether and how finely to explain.
        n_done: so many rows have explanations in the output already, and get only what
            `resume.check_same` compares.
        progress: receives the number of texts just completed.
    """
    for number, (row, p) in enumerate(zip(rows, predicted, strict=True)):
        if not options.explain:
            yield None
            continue
        if number < n_done:
            yield {"max_words": options.max_words}
        else:
            target = predicted_label(classifier, p)
            explanation = explain(classifier, row.text, target=target, max_words=options.max_words)
            yield _short_numbers(explanation.to_dict())
        if progress is not None:
            progress(1)


def predicted_label(classifier: Classifier, probabilities: Any) -> str | None:
    """The label of one row of `answers`; None for numbers and for several labels."""
    if classifier.scale is not None or classifier.multi_label:
        return None
    (chosen,) = predictions(probabilities[None], thresholds=classifier.decision)
    return classifier.labels[int(chosen.argmax())]


def _short_numbers(value: Any) -> Any:
    """A structure of JSON with its floats rounded to six digits, as probabilities are."""
    match value:
        case float():
            return float(f"{value:.6g}")
        case dict():
            return {name: _short_numbers(element) for name, element in value.items()}
        case list():
            return [_short_numbers(element) for element in value]
    return value


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


def check_format(classifier: Classifier, output_format: str, *, explains: bool = False) -> None:
    """Whether lines of this format can be read back.

    Raises:
        OptionError: a label, or an explanation, cannot be written in a line of `label ||| text`.
    """
    if output_format == "labelled" and explains:
        raise OptionError(
            f"--explain: lines of 'label {SEPARATOR} text' have no place for explanations; use "
            "--output-format jsonl, csv, tsv or parquet"
        )
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
    rows: Sequence[Row],
    probabilities: Any,
    output_format: str,
    columns: Sequence[str] = (),
    explained: Iterable[Mapping[str, Any] | None] | None = None,
) -> Iterator[str]:
    """One line per row of `answers`.

    Args:
        classifier: has computed them.
        digest: `digest_of` the classifier.
        rows: the texts.
        probabilities: the `answers`.
        output_format: `labelled`; JSON Lines for any other.
        columns: as for `predict_stream`.
        explained: `explanations` of the rows, taken one by one; None for none.
    """
    is_number = classifier.scale is not None
    chosen = (
        [None] * len(rows)
        if is_number
        else predictions(
            probabilities, multi_label=classifier.multi_label, thresholds=classifier.decision
        )
    )
    why = iter([None] * len(rows) if explained is None else explained)
    for row, p, of_row in zip(rows, probabilities, chosen, strict=True):
        names = [] if of_row is None else [classifier.labels[i] for i in np.flatnonzero(of_row)]
        if output_format == "labelled":
            label = repr(rounded(float(p))) if is_number else ", ".join(names)
            yield f"{label} {SEPARATOR} {' '.join(row.text.split())}\n"
            continue
        if is_number:
            fields = {"index": row.index, "text": row.text, "value": rounded(float(p))}
        else:
            fields = record(classifier, row, p, names)
        if (explanation := next(why)) is not None:
            fields[EXPLANATION] = explanation
        yield _json_line(fields, digest, row, columns)


def _json_line(fields: dict[str, Any], digest: str, row: Row, columns: Sequence[str]) -> str:
    fields = fields | {"classifier": digest}
    if columns:
        fields["columns"] = _carried(row, columns)
    return json.dumps(fields, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _check_columns(columns: Sequence[str], rows: Sequence[Row], source: Source) -> None:
    """Refuse column names that all of the first rows lack, before any computation."""
    known = {name: None for row in rows for name in row.record}
    if missing := [name for name in columns if name not in (*known, ALL_COLUMNS)]:
        raise DataError(f"{source}: no column {listed(missing)} to keep; there are {listed(known)}")


def _carried(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    """The requested input columns of a row; null for missing ones."""
    if ALL_COLUMNS in columns:
        return {name: _plain(row.record[name]) for name in row.record if name != row.column}
    return {name: _plain(row.record.get(name)) for name in columns}


def _plain(value: Any) -> Any:
    """A cell's value for JSON, which has neither NaN nor infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _plain(element) for name, element in value.items()}
    return [_plain(element) for element in value] if isinstance(value, list | tuple) else value


def digest_of(classifier: Classifier) -> str:
    """A digest of a classifier without its base's weights, equal on all machines."""
    if classifier.digest is not None:
        return classifier.digest[:DIGITS]
    digest = hashlib.sha256()
    fields = [
        type(classifier).__name__,
        classifier.labels,
        dataclasses.asdict(classifier.prompt),
        classifier.temperature,
        classifier.n_layers,
        comparable_config(classifier.llama.config),
    ]
    if classifier.decision is not None:
        fields += [classifier.positive, classifier.thresholds]
    if isinstance(classifier, LlamaZeroShotClassifier):
        fields += [classifier.label_words, classifier.score_name, classifier.shots]
    else:
        fields.append(getattr(classifier, "pooling", None))
    if classifier.scale is not None:
        fields.append(dataclasses.asdict(classifier.scale))
    digest.update(json.dumps(fields, default=str).encode("utf-8", "backslashreplace"))
    for name, parameter in classifier.named_parameters():
        if not name.startswith("llama.") or ".adapters." in name:
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:DIGITS]


def record(
    classifier: Classifier, row: Row, probabilities: Any, names: list[str]
) -> dict[str, Any]:
    """The record of one text: its row, label and probabilities, and the score of a zero-shot
    classifier.
    """
    fields: dict[str, Any] = {
        "index": row.index,
        "text": row.text,
        "label": names if classifier.multi_label else names[0],
        "probabilities": {
            name: float(f"{value:.6g}")
            for name, value in zip(classifier.labels, probabilities.tolist(), strict=True)
        },
    }
    if score := score_of(classifier):
        fields["score"] = score
    return fields


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
        template = "in a chat" if classifier.prompt.chat else "prompt"
        return f"[label words, score {score_of(classifier)}, {temperature}, {template} {prompt}]"
    n_layers = classifier.llama.config.n_layers
    if classifier.scale is not None:
        return f"[regression head on layer {classifier.n_layers} of {n_layers}]"
    if isinstance(classifier, LlamaExpertsClassifier):
        n = len(classifier.choices) + len(classifier.base_choices)
        noun = "head" if n == 1 else "heads"
        heads = f"{n} {noun} on up to layer {classifier.n_layers} of {n_layers}"
        return f"[{heads}{' and TF-IDF' if classifier.tfidf else ''}, {temperature}]"
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
    shortened = classifier.shortened
    found = shortened if texts is None else {h for h in map(hash, texts) if h in shortened}
    n = len(found)
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
