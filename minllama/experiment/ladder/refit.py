"""Fit the chosen classifier to the held-out rows, too, once they have been used to measure it.

A tenth of a few rows is worth more to the classifier than to its figures, and what was measured
without them still says how good it is, if a little too low.
"""

from dataclasses import replace

from minllama.classification.base import Classifier
from minllama.experiment.ladder.candidate import save_candidate
from minllama.experiment.ladder.contrastive import ContrastiveRung
from minllama.experiment.ladder.frozen import FrozenRung
from minllama.experiment.ladder.lora import restore_base
from minllama.experiment.ladder.rung import Context
from minllama.experiment.ladder.scoring import scoring_of
from minllama.experiment.ladder.state import RungFolder
from minllama.experiment.ladder.tfidf import TfidfRung

FOLDER = "whole"  # of the classifiers that are fitted to all rows


def can_refit(context: Context, chosen: str) -> bool:
    """Whether the classifier of a rung can be fitted to the held-out rows in the time left."""
    if context.splits.whole is None or context.results[chosen].seconds_to_refit is None:
        return False
    # Otherwise a class has a second row only among those that are held out.
    reads_the_same = _of_all_rows(context).reads_experts == context.reads_experts
    return reads_the_same and context.budget.left >= 0  # for which time was reserved


def refitted(context: Context, chosen: str) -> Classifier:
    """The classifier of a rung, fitted to all rows.

    Args:
        context: of the ladder; adapters on its model are removed.
        chosen: one for which `can_refit` is true.
    """
    restore_base(context.llama)
    of_all = _of_all_rows(context)
    of_all.seconds_per_token = context.seconds_per_token
    words = TfidfRung(of_all)
    if words.obstacle() is None:
        fitted = words.run().classifier
    if chosen != TfidfRung.name:
        fitted = FrozenRung(of_all).run().classifier
    assert fitted is not None
    if chosen != ContrastiveRung.name:
        return fitted
    folder = RungFolder(of_all.folder / FrozenRung.name).classifier
    save_candidate(fitted, folder, context.experiment.tokenizer)
    return ContrastiveRung(of_all).refitted(ContrastiveRung(context))


def _of_all_rows(context: Context) -> Context:
    """A ladder that holds out no rows."""
    whole = context.splits.whole
    assert whole is not None
    none = whole.select([])
    return replace(
        context,
        splits=replace(context.splits, train=whole, dev=none, whole=None),
        folder=context.folder / FOLDER,
        scoring=scoring_of([whole, none], context.scoring.metric),
        starting=None,
        features={},
        feature_rows=(),
        words=None,
        results={},
    )
