"""Fit the chosen classifier to the held-out rows, too, once they have been used to measure it.

A tenth of a few rows is worth more to the classifier than to its figures, and what was measured
without them still says how good it is, if a little too low.
"""

from dataclasses import replace
from pathlib import Path

from minllama.classification.base import Classifier
from minllama.experiment.ladder.candidate import save_candidate
from minllama.experiment.ladder.contrastive import ContrastiveRung
from minllama.experiment.ladder.frozen import FrozenRung
from minllama.experiment.ladder.lora import LabelWordsRung, LoRARung, restore_base
from minllama.experiment.ladder.product import ProductRung
from minllama.experiment.ladder.rung import Context
from minllama.experiment.ladder.scoring import scoring_of
from minllama.experiment.ladder.state import RungFolder
from minllama.experiment.ladder.tfidf import TfidfRung

FOLDER = "whole"  # of the classifiers that are fitted to all rows
# Those that train adapters for some epochs, and the rung whose training that is.
TRAINED = {
    LabelWordsRung.name: LabelWordsRung,
    LoRARung.name: LoRARung,
    ProductRung.name: LoRARung,
}


def can_refit(context: Context, chosen: str) -> bool:
    """Whether the classifier of a rung can be fitted to the held-out rows in the time left."""
    if context.splits.whole is None:
        return False
    # Otherwise a class has a second row only among those that are held out.
    if _of_all_rows(context).reads_experts != context.reads_experts:
        return False
    if context.results[chosen].seconds_to_refit is not None:  # for which time was put aside
        return context.budget.left >= 0
    return chosen in TRAINED and context.budget.allows(_seconds_to_train(context, chosen))


def _seconds_to_train(context: Context, chosen: str) -> float:
    """Of one training, of those that a rung has done."""
    name = TRAINED[chosen].name
    plan = RungFolder(context.folder / name).plan() or {"folds": 0}
    return context.results[name].seconds / (plan["folds"] + 1)


def refitted(context: Context, chosen: str) -> Classifier:
    """The classifier of a rung, fitted to all rows.

    Args:
        context: of the ladder; adapters on its model are removed.
        chosen: one for which `can_refit` is true.
    """
    restore_base(context.llama)
    of_all = _of_all_rows(context)
    of_all.seconds_per_token = context.seconds_per_token
    if chosen == LabelWordsRung.name:
        return LabelWordsRung(of_all).refitted(LabelWordsRung(context))
    words = TfidfRung(of_all)
    if words.obstacle() is None:
        of_all.results[words.name] = words.run()
    if chosen == TfidfRung.name:
        return _kept(of_all, chosen)
    of_all.results[FrozenRung.name] = FrozenRung(of_all).run()
    if chosen == FrozenRung.name:
        return _kept(of_all, chosen)
    if chosen == ContrastiveRung.name:
        _save(of_all, FrozenRung.name)
        return ContrastiveRung(of_all).refitted(ContrastiveRung(context))
    trained = LoRARung(of_all).refitted(LoRARung(context))
    if chosen == LoRARung.name:
        return trained
    save_candidate(trained, _folder(of_all, LoRARung.name), context.experiment.tokenizer)
    restore_base(context.llama)
    _save(of_all, TfidfRung.name)  # which may be what it is multiplied by
    return ProductRung(of_all).refitted(ProductRung(context))


def _kept(context: Context, name: str) -> Classifier:
    classifier = context.results[name].classifier
    assert classifier is not None
    return classifier


def _folder(context: Context, name: str) -> Path:
    return RungFolder(context.folder / name).classifier


def _save(context: Context, name: str) -> None:
    """Save the classifier of a rung, for another one that opens it."""
    if name in context.results:
        save_candidate(_kept(context, name), _folder(context, name), context.experiment.tokenizer)
        context.results[name].size = 0  # there is one


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
