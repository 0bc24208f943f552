"""A classifier as a function of batches, which other programs can send to their workers.

It holds the classifier's name and options, not its weights: those are loaded at the first batch,
once in each process. So it can be pickled, and serves Ray Data, Spark, `datasets` and pandas.
"""

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from minllama.data import check_text
from minllama.errors import MinllamaError, OptionError
from minllama.options.evaluation import ThresholdOptions
from minllama.options.loading import LoadOptions
from minllama.text import listed

Batch = TypeVar("Batch")
PROBABILITY = "probability_"  # the columns of `minllama classify` have these names, too
LABEL, VALUE, ERROR = "label", "value", "error"
ROWS_AT_ONCE = 512  # that are sorted by length and computed together

_loaded: dict[tuple[str, LoadOptions, ThresholdOptions], Any] = {}
_loading = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What a classifier says about texts: columns of equal length.

    Attributes:
        columns: `label` (a list of them where there may be several), then `probability_NAME` of
            each class; or `value` of a regression. None where there is an error.
        errors: why a text could not be labeled; None where it was.
    """

    columns: dict[str, list[Any]]
    errors: list[str | None]


class Labeler:
    """Label batches with a trained classifier: a callable that can be pickled.

    A batch gets the columns `label` and `probability_NAME` of each class, or `value` of a
    regression, and `error`: the reason why a row has none of them, None for all others. A row with
    an error does not stop the batch.

        labeler = Labeler("runs/sst")
        frame = labeler(frame)                                     # pandas
        rows = rows.map(labeler, batched=True)                     # Hugging Face datasets
        rows = rows.mapInPandas(labeler.frames, labeler.spark_schema(rows.schema))  # Spark

    Args:
        classifier: the folder, or the Hugging Face id, of a classifier. Workers on other machines
            open it under the same name.
        text_column: of the batches.
        prefix: of the names of new columns, for batches that have a `label` already.
        loading: dtype, device, weight format and base, as for `load_classifier`.
        threshold: at which probability a label is given; by default the classifier's own.
    """

    def __init__(
        self,
        classifier: str | os.PathLike[str],
        *,
        text_column: str = "text",
        prefix: str = "",
        loading: LoadOptions | None = None,
        threshold: ThresholdOptions | None = None,
    ) -> None:
        self.classifier_name = os.fspath(classifier)
        self.text_column, self.prefix = text_column, prefix
        self.loading, self.threshold = loading or LoadOptions(), threshold or ThresholdOptions()

    def __call__(self, batch: Batch) -> Batch:
        """The batch with further columns.

        Args:
            batch: a pandas DataFrame, an Arrow table or record batch, or a mapping of columns to
                lists or arrays. It is not changed.

        Returns:
            The same kind.

        Raises:
            OptionError: it has no such text column, or already one of the new columns.
            MinllamaError: the classifier cannot be opened.
        """
        names = _names_of(batch)
        if self.text_column not in names:
            raise OptionError(
                f"the batch has no column {self.text_column!r}, but {listed(names)}; name another "
                "with text_column"
            )
        new_names = [self.prefix + name for name in (*self.label_columns, ERROR)]
        if taken := [name for name in new_names if name in names]:
            raise OptionError(
                f"the batch has columns named {listed(taken)} already; give a prefix for new ones"
            )
        labels = self.label(_values_of(batch, self.text_column))
        columns = (*labels.columns.values(), labels.errors)
        new: dict[str, list[Any]] = dict(zip(new_names, columns, strict=True))
        labeled: Batch = self._with_columns(batch, new)
        return labeled

    def frames(self, frames: Iterable[Any]) -> Iterator[Any]:
        """Label pandas DataFrames one by one: the function of Spark's `mapInPandas`."""
        for frame in frames:
            yield self(frame)

    def spark_schema(self, schema: Any) -> str:
        """The schema of the result of `frames` in Spark's language, for `mapInPandas`.

        Args:
            schema: of the input, a `pyspark.sql.types.StructType`.
        """
        kept = [f"`{_quoted(field.name)}` {field.dataType.simpleString()}" for field in schema]
        kinds = {LABEL: "array<string>" if self.classifier.multi_label else "string"}
        kinds[ERROR] = "string"
        names = (*self.label_columns, ERROR)
        new = [f"`{_quoted(self.prefix + name)}` {kinds.get(name, 'double')}" for name in names]
        return ", ".join(kept + new)

    def label(self, texts: Sequence[Any]) -> Labels:
        """Label texts; anything that is no text gets an error."""
        errors = [_why_bad(text) for text in texts]
        columns: dict[str, list[Any]] = {name: [None] * len(texts) for name in self.label_columns}
        good = [row for row, error in enumerate(errors) if error is None]
        for start in range(0, len(good), ROWS_AT_ONCE):
            rows = good[start : start + ROWS_AT_ONCE]
            for row, values in zip(rows, self._answers([texts[i] for i in rows]), strict=True):
                if isinstance(values, str):
                    errors[row] = values
                    continue
                for name, value in values.items():
                    columns[name][row] = value
        return Labels(columns=columns, errors=errors)

    @property
    def classifier(self) -> Any:
        """The classifier, loaded once in each process.

        Raises:
            MinllamaError: it cannot be opened.
        """
        key = self.classifier_name, self.loading, self.threshold
        with _loading:
            if key not in _loaded:
                _loaded[key] = self._load()
            return _loaded[key]

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The names of the classifier's columns, without prefix and `error`."""
        classifier = self.classifier
        if classifier.scale is not None:
            return (VALUE,)
        return (LABEL, *(PROBABILITY + name for name in classifier.labels))

    def arrow_type(self, name: str) -> Any:
        """The Arrow type of a new column, by its name without prefix."""
        import pyarrow as pa

        if name == LABEL and self.classifier.multi_label:
            return pa.list_(pa.string())
        return pa.string() if name in (LABEL, ERROR) else pa.float64()

    def _load(self) -> Any:
        from minllama.classification.storage.save_load import load_classifier_with
        from minllama.evaluation.thresholds import fixed_thresholds

        classifier = load_classifier_with(self.classifier_name, self.loading)
        if self.threshold != ThresholdOptions():
            if classifier.scale is not None:
                raise OptionError(
                    "the threshold is for classes, and this classifier predicts numbers; omit it"
                )
            decision = fixed_thresholds(
                self.threshold,
                classifier.labels,
                multi_label=classifier.multi_label,
                own=classifier.decision,
            )
            classifier.decide_by(decision)
        return classifier

    def _answers(self, texts: list[str]) -> list[dict[str, Any] | str]:
        """The columns of each text, or its error."""
        try:
            return list(self._together(texts))
        except MinllamaError as error:
            if len(texts) == 1:
                return [str(error)]
        # One of them cannot be encoded: each alone tells which.
        return [answer for text in texts for answer in self._answers([text])]

    def _together(self, texts: list[str]) -> Iterator[dict[str, Any]]:
        from minllama.evaluation.metrics import predictions
        from minllama.evaluation.report.values import rounded
        from minllama.experiment.predict import answers

        classifier = self.classifier
        p = answers(classifier, texts)
        if classifier.scale is not None:
            yield from ({VALUE: rounded(float(value))} for value in p)
            return
        several = classifier.multi_label
        chosen = predictions(p, multi_label=several, thresholds=classifier.decision)
        for row, is_chosen in zip(p.tolist(), chosen, strict=True):
            pairs = zip(classifier.labels, is_chosen, strict=True)
            names = [name for name, is_one in pairs if is_one]
            values = zip(classifier.labels, row, strict=True)
            yield {LABEL: names if several else names[0]} | {
                PROBABILITY + name: float(f"{value:.6g}") for name, value in values
            }

    def _with_columns(self, batch: Any, new: Mapping[str, list[Any]]) -> Any:
        if isinstance(batch, Mapping):
            return {**batch, **new}
        kinds = {name: self.arrow_type(name.removeprefix(self.prefix)) for name in new}
        if hasattr(batch, "assign"):  # pandas
            import pandas as pd
            import pyarrow as pa

            is_number = {name: kind == pa.float64() for name, kind in kinds.items()}
            columns = {
                name: pd.Series(
                    column, index=batch.index, dtype="float64" if is_number[name] else "object"
                )
                for name, column in new.items()
            }
            return batch.assign(**columns)
        import pyarrow as pa

        for name, column in new.items():
            batch = batch.append_column(name, pa.array(column, kinds[name]))
        return batch


def _why_bad(text: Any) -> str | None:
    """Why something cannot be labeled; None if it can."""
    if not isinstance(text, str):
        is_missing = text is None or text != text  # pandas has NaN for missing texts
        return "no text" if is_missing else f"{type(text).__name__} instead of a text"
    try:
        check_text(text)
    except ValueError as error:
        return str(error)
    return None


def _names_of(batch: Any) -> list[str]:
    if isinstance(batch, Mapping):
        return [*batch]
    if hasattr(batch, "assign"):  # pandas
        return list(batch.columns)
    schema = getattr(batch, "schema", None)  # Arrow
    if schema is None:
        raise OptionError(
            "a batch must be a pandas DataFrame, an Arrow table or a mapping of columns, not "
            f"{type(batch).__name__}"
        )
    return list(schema.names)


def _values_of(batch: Any, column: str) -> list[Any]:
    values = batch[column]
    if hasattr(values, "to_pylist"):  # Arrow
        return list(values.to_pylist())
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _quoted(name: str) -> str:
    return name.replace("`", "``")
