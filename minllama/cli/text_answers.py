"""Classify the texts of `--text`, and print their labels, numbers and explanations.

`minllama classify` calls it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from minllama.errors import DataError
from minllama.options import ExplainOptions
from minllama.text import printable

if TYPE_CHECKING:
    from minllama.classification import Classifier


def check_texts(texts: tuple[str, ...]) -> None:
    """Refuse texts that would be bad rows in a file."""
    from minllama.data import check_text

    for number, text in enumerate(texts, start=1):
        try:
            check_text(text)
        except ValueError as error:
            where = "--text" if len(texts) == 1 else f"--text number {number}"
            raise DataError(f"{where}: {error}; give another text, or omit it") from error


def classify_texts(
    classifier: "Classifier",
    texts: tuple[str, ...],
    explaining: ExplainOptions,
    *,
    as_json: bool,
) -> None:
    """Print the answers to texts, as JSON lines or for people."""
    from minllama.data import Row
    from minllama.evaluation.report.value_comparison import in_unit
    from minllama.experiment.predict import (
        answers,
        described,
        digest_of,
        explanations,
        prediction_lines,
        shortened_texts,
    )

    probabilities = answers(classifier, texts)
    if as_json:
        given = [Row(i, f"text {i + 1}", text, {}) for i, text in enumerate(texts)]
        digest = digest_of(classifier)
        why = explanations(classifier, given, probabilities, explaining)
        for line in prediction_lines(
            *(classifier, digest, given, probabilities, "jsonl"), explained=why
        ):
            click.echo(line, nl=False)
        return
    decision = classifier.decision
    chosen = None if decision is None else decision.predictions(probabilities)
    for row, (text, p) in enumerate(zip(texts, probabilities, strict=True)):
        if len(texts) > 1:
            click.secho(printable(text), dim=True)
        if classifier.scale is not None:
            click.echo(in_unit(float(p)))
        else:
            _print_probabilities(classifier.labels, p, None if chosen is None else chosen[row])
        if explaining.explain:
            _explain_text(classifier, text, p, explaining.max_words)
    click.echo(described(classifier), err=True)
    if said := shortened_texts(classifier):
        click.echo(said, err=True)


def _print_probabilities(labels: Sequence[str], p: Any, chosen: Any) -> None:
    """The labels of one text, the most probable first; `chosen` by thresholds, or None."""
    names = [printable(label) for label in labels]
    width = max(map(len, names))
    for i in (-p).argsort(kind="stable"):
        # With thresholds, the most probable label is not always the predicted one.
        mark = "" if chosen is None or not chosen[i] else "  predicted"
        click.echo(f"{names[i]:<{width}}  {p[i]:.3f}{mark}")


def _explain_text(classifier: "Classifier", text: str, p: Any, max_words: int) -> None:
    from minllama.classification.explain import explain
    from minllama.cli.explained import grouped_notice, print_explanation
    from minllama.evaluation.metrics import predictions
    from minllama.experiment.predict import predicted_label

    target = predicted_label(classifier, p)
    explanation = explain(classifier, text, target=target, max_words=max_words)
    predicted = []
    if classifier.multi_label:
        (row,) = predictions(p[None], multi_label=True, thresholds=classifier.decision)
        predicted = [classifier.labels[i] for i in row.nonzero()[0]]
    print_explanation(explanation, predicted)
    if notice := grouped_notice(explanation):
        click.echo(notice, err=True)
