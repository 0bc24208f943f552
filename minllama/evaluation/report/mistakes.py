"""The most confident mistakes, which help most to understand a classifier."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minllama.evaluation.report.content import Report, ReportedSplit

MAX_MISTAKES = 20
EXCERPT = 320  # characters of a text that are shown before it is expanded
MAX_TEXT = 5000  # characters of a text that are in the page at all


@dataclass(frozen=True)
class Mistake:
    """One misclassified text."""

    row: int  # counted from 1
    gold: list[str]
    predicted: list[str]
    reason: str  # how sure the classifier was
    excerpt: str  # the beginning; the whole where `text` is empty
    text: str
    omitted: int  # characters of the text that are not in `text`


def worst_mistakes(report: Report, split: ReportedSplit) -> tuple[list[Mistake], int]:
    """The mistakes with the largest error in a probability, and how many there are in all."""
    predicted = report.predicted(split)  # (N, C)
    gold = np.zeros_like(predicted)
    labelled = np.zeros(len(predicted), dtype=np.bool_)
    for i in range(len(predicted)):
        classes = split.gold(i)
        if classes is not None:
            gold[i, list(classes)] = True
            labelled[i] = True
    wrong = np.flatnonzero(labelled & (gold != predicted).any(1))
    # Of one label a row, the classes to blame are those predicted; of several, any.
    errors = np.where(gold != predicted, np.abs(split.probabilities - gold), 0.0)
    blamed = errors if report.multi_label else np.where(predicted, errors, 0.0)
    order = wrong[np.argsort(-blamed[wrong].max(1, initial=0.0), kind="stable")]
    names = report.label_names
    mistakes = []
    for i in order[:MAX_MISTAKES].tolist():
        excerpt, text, omitted = folded(split.texts[i])
        mistakes.append(
            Mistake(
                row=i + 1,
                gold=[names[c] for c in np.flatnonzero(gold[i]).tolist()],
                predicted=[names[c] for c in np.flatnonzero(predicted[i]).tolist()],
                reason=_reason(report, split, i, int(blamed[i].argmax()), gold[i]),
                excerpt=excerpt,
                text=text,
                omitted=omitted,
            )
        )
    return mistakes, len(wrong)


def _reason(
    report: Report, split: ReportedSplit, row: int, blamed: int, gold: NDArray[np.bool_]
) -> str:
    probabilities = split.probabilities[row]
    if not report.multi_label:
        of_predicted, of_gold = (
            roughly(probabilities[blamed]),
            roughly(probabilities[gold.argmax()]),
        )
        return f"{of_predicted} confidence, {of_gold} for the gold label"
    truth = "a gold label" if gold[blamed] else "no gold label"
    return f"{roughly(probabilities[blamed])} for {report.label_names[blamed]}, {truth}"


def roughly(probability: float) -> str:
    """0.4857 -> 49%; never 0% or 100% unless exact."""
    if 0 < probability < 0.005:
        return "under 1%"
    if 0.995 <= probability < 1:
        return "over 99%"
    return f"{probability:.0%}"


def folded(text: str) -> tuple[str, str, int]:
    """The excerpt, the full text if longer, and the omitted length."""
    if len(text) <= EXCERPT * 1.2:  # no use in folding away a few words
        return text, "", 0
    excerpt = text[:EXCERPT]
    words = excerpt.rsplit(None, 1)
    if len(words) == 2 and len(words[0]) > EXCERPT / 2:  # not every script has spaces
        excerpt = words[0]
    return excerpt + "…", text[:MAX_TEXT], max(0, len(text) - MAX_TEXT)
