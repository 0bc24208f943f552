"""Try one rung after the other, cheapest first, in the time that there is, and choose one."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from minllama.classification.base import Classifier
from minllama.classification.frozen import FEW_ROWS
from minllama.data import Dataset
from minllama.evaluation.report.ladder import Ladder, LadderRow
from minllama.experiment.heads import Selected
from minllama.experiment.ladder.candidate import load_candidate, save_candidate, size_on_disk
from minllama.experiment.ladder.choice import Choice, Gain, choose, choose_for_few
from minllama.experiment.ladder.contrastive import ContrastiveRung
from minllama.experiment.ladder.frozen import FrozenRung
from minllama.experiment.ladder.lora import LabelWordsRung, LoRARung, restore_base
from minllama.experiment.ladder.product import ProductRung
from minllama.experiment.ladder.refit import can_refit, refitted
from minllama.experiment.ladder.rung import Context, Measured, NotThisTime, Rung
from minllama.experiment.ladder.scoring import OF_FRACTIONS
from minllama.experiment.ladder.state import LadderState, RungFolder
from minllama.experiment.ladder.tfidf import TfidfRung
from minllama.experiment.ladder.zero_shot import ZeroShotRung
from minllama.text import duration
from minllama.training.run_checkpoint import digest

RUNGS: tuple[Callable[[Context], Rung], ...] = (
    TfidfRung,
    ZeroShotRung,
    FrozenRung,
    ContrastiveRung,
    LabelWordsRung,
    LoRARung,
    ProductRung,
)


@dataclasses.dataclass(frozen=True)
class Climbed:
    """The result of the ladder.

    Attributes:
        classifier: the chosen one.
        chosen: the name of its rung.
        ladder: for the report.
        metrics: the file of its training's steps; None without gradient steps.
        notes: for the report.
        refit: fits a classifier like it to all rows, held-out ones included, in place of the
            adapters of this one; None where there are none, or there is no time.
    """

    classifier: Classifier
    chosen: str
    ladder: Ladder
    metrics: Path | None
    notes: list[str]
    refit: Callable[[], Classifier] | None


def climb(context: Context, *, resume: bool, rungs: Sequence[Rung] | None = None) -> Climbed:
    """Try the rungs and choose a classifier.

    Args:
        context: what they share.
        resume: rungs that an interrupted run has done are not done again.
        rungs: cheapest first; None for all.

    Raises:
        MinllamaError: the state of the interrupted run is damaged, or of another run.
        KeyboardInterrupt: the run can be resumed.
    """
    rungs = [make(context) for make in RUNGS] if rungs is None else rungs
    state = LadderState(context.folder, _fingerprint(context), resume=resume)
    context.budget.add(state.spent)
    if state.starting is not None:
        layer, pooling = state.starting["choice"]
        context.starting = Selected((int(layer), pooling), float(state.starting["penalty"]), "")
    try:
        context.keep_time_for_report()
        reasons = _plan(context, rungs, state)
        for rung in rungs:
            if rung.name in state.rungs:
                _recall(context, rung, state, reasons)
            elif rung.name not in reasons:
                _try(context, rung, state, reasons)
    except KeyboardInterrupt:
        state.save(context.budget.spent)
        raise
    return _chosen(context, rungs, reasons)


def _fingerprint(context: Context) -> dict[str, Any]:
    """What must be unchanged to resume."""
    splits = context.splits
    return {
        "settings": context.settings,
        "training texts or labels": _rows_digest(splits.train),
        "dev texts or labels": _rows_digest(splits.dev),
    }


def _rows_digest(split: Dataset) -> str:
    rows = zip(split.texts, split.labels or (), strict=True)
    return digest(repr(row).encode("utf-8", "backslashreplace") for row in rows)


def _plan(context: Context, rungs: Sequence[Rung], state: LadderState) -> dict[str, str]:
    """Report what will be tried; returns why some rungs cannot be, by name."""
    tell, reasons = context.reporter.message, dict[str, str]()
    tell(
        f"auto: at most {context.experiment.ladder.minutes:g} minutes in all; to be tried, "
        "cheapest first, with times measured on first batches:"
    )
    for rung in rungs:
        if rung.name in state.rungs:
            tell(f"- {rung.title}: done before the interruption")
        elif obstacle := rung.obstacle():
            reasons[rung.name] = f"not for these data: {obstacle}"
            tell(f"- {rung.title}: not for these data ({obstacle})")
        else:
            tell(f"- {rung.title}: {rung.plan()}")
    return reasons


def _recall(context: Context, rung: Rung, state: LadderState, reasons: dict[str, str]) -> None:
    """Read the result of a rung that is done."""
    known = dict(state.rungs[rung.name])
    if "reason" in known:
        reasons[rung.name] = known["reason"]
        return
    scores = RungFolder(context.folder / rung.name).scores(context.empty_scores())
    context.results[rung.name] = Measured(scores=scores, classifier=None, **known)
    context.keep_time_for_report()


def _try(context: Context, rung: Rung, state: LadderState, reasons: dict[str, str]) -> None:
    """Run a rung if there is time, and keep its result."""
    budget, folder = context.budget, RungFolder(context.folder / rung.name)
    try:
        _check_time(context, rung)
        measured = rung.run()
    except NotThisTime as reason:
        restore_base(context.llama)
        reasons[rung.name] = f"{'given up' if reason.was_begun else 'skipped'}: {reason}"
        state.rungs[rung.name] = {"reason": reasons[rung.name]}
        context.reporter.message(f"{rung.title}: {reasons[rung.name]}")
    else:
        if measured.classifier is not None:
            save_candidate(measured.classifier, folder.classifier, context.experiment.tokenizer)
            measured.size = size_on_disk(folder.classifier)
            measured.classifier = None  # its adapters are taken off the model
        restore_base(context.llama)
        folder.save_scores(measured.scores)
        context.results[rung.name] = measured
        context.keep_time_for_report()
        names = (field.name for field in dataclasses.fields(Measured))
        kept = {name: getattr(measured, name) for name in names}
        state.rungs[rung.name] = {
            name: value for name, value in kept.items() if name not in ("scores", "classifier")
        }
        _report(context, rung, measured)
    if (found := context.starting) is not None:
        state.starting = {"choice": list(found.choice), "penalty": found.penalty}
    state.save(budget.spent)


def _check_time(context: Context, rung: Rung) -> None:
    """Raise NotThisTime if a rung takes more time than there is, and there is a classifier."""
    budget, needed = context.budget, rung.estimate()
    is_only_one = rung.name == FrozenRung.name and not any(
        result.size is not None for result in context.results.values()
    )
    if not (budget.allows(needed) or is_only_one):
        raise NotThisTime(
            f"it takes about {duration(needed)}, and {budget.left_in_words}; "
            f"--minutes {budget.minutes_for(needed)} would do"
        )


def _report(context: Context, rung: Rung, measured: Measured) -> None:
    result = context.scoring.result(measured.scores)
    context.reporter.message(
        f"{rung.title}: {context.scoring.metric} {result.value:.3f} on {result.rows:,} texts "
        f"({measured.how}), in {duration(measured.seconds)}"
    )
    for note in measured.notes:
        context.reporter.message(f"{rung.title}: {note}")


def _chosen(context: Context, rungs: Sequence[Rung], reasons: dict[str, str]) -> Climbed:
    options, results = context.experiment.ladder, context.results
    titles = {rung.name: rung.title for rung in rungs}
    names = [rung.name for rung in rungs if rung.name in results]
    can_be_saved = [name for name in names if results[name].size is not None]
    choice = _choice(context, {titles[name]: results[name] for name in can_be_saved})
    (chosen,) = (name for name in can_be_saved if titles[name] == choice.chosen)
    rows = tuple(_row(context, rung, choice, reasons) for rung in rungs)
    ladder = Ladder(rows, context.scoring.metric, options.minutes, options.prefer)
    context.reporter.message(f"chosen: {choice.chosen}, {choice.reasons[choice.chosen]}")
    folder = RungFolder(context.folder / chosen)
    classifier = load_candidate(folder.classifier, context.llama, context.tokenizer)
    notes = [
        f"{titles[name]}: {note}"
        for name in names
        for note in results[name].notes
        if results[name].size is not None
    ]
    trained = LoRARung.name if chosen == ProductRung.name else chosen
    metrics = RungFolder(context.folder / trained).metrics
    refit = partial(refitted, context, chosen) if can_refit(context, chosen) else None
    return Climbed(classifier, chosen, ladder, metrics, notes, refit)


def _choice(context: Context, results: Mapping[str, Measured]) -> Choice:
    """Choose among rungs, by their titles, whose classifiers can be saved."""
    points = context.scoring.metric in OF_FRACTIONS

    def compare(one: str, other: str) -> Gain:
        return context.scoring.gain(results[one].scores, results[other].scores)

    is_few = FrozenRung.title in results and len(context.train) < FEW_ROWS
    if is_few and context.reads_experts:
        combines = next(t for t in (ContrastiveRung.title, FrozenRung.title) if t in results)
        return choose_for_few(list(results), compare, combines, points=points)
    speeds = {title: found.texts_per_second or 0.0 for title, found in results.items()}
    by_speed = context.experiment.ladder.prefer == "speed"

    def compare_losses(one: str, other: str) -> Gain:
        return context.scoring.loss_gain(results[one].scores, results[other].scores)

    return choose(
        list(results),
        compare,
        speeds=speeds if by_speed else None,
        losses=compare_losses,
        points=points,
    )


def _row(context: Context, rung: Rung, choice: Choice, reasons: dict[str, str]) -> LadderRow:
    measured = context.results.get(rung.name)
    if measured is None:
        return LadderRow(rung.title, reasons[rung.name])
    result = context.scoring.result(measured.scores)
    reason = choice.reasons.get(rung.title)
    if reason is None:  # there is no classifier to choose
        reason = "; ".join(measured.notes)
    return LadderRow(
        rung.title,
        reason,
        value=result.value,
        interval=result.interval,
        rows=result.rows,
        how=measured.how,
        seconds=measured.seconds,
        texts_per_second=measured.texts_per_second,
        size=measured.size,
        chosen=rung.title == choice.chosen,
    )
