"""`minllama evaluate`: measure a classifier on labeled texts, or compare it with another one."""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minllama.atomic import check_folder_writable
from minllama.cli.deciding import decide
from minllama.cli.grouped import GroupedCommand, option
from minllama.cli.open import (
    activations_option,
    classifier_options,
    dataclass_options,
    debug_option,
    ended_by_interrupts,
    pick,
    quantize_option_of_classifier,
    source_option,
    warn_of_slow_dtype,
)
from minllama.errors import CheckpointError, MinllamaError, OptionError
from minllama.options import DataOptions
from minllama.options.evaluation import ReportOptions, ThresholdOptions
from minllama.options.loading import LoadOptions
from minllama.text import one_line

if TYPE_CHECKING:
    from minllama.classification import Classifier
    from minllama.cli.waiting import ConsoleReporter
    from minllama.data import Dataset
    from minllama.evaluation.report import ReportedSplit, ReportedValues
    from minllama.experiment.compare import ComparedSystem


@click.command("evaluate", cls=GroupedCommand)
@click.argument("classifier")
@source_option(
    "--data",
    "source",
    required=True,
    group="Data",
    common=True,
    help="Labeled texts: a file, - for standard input, or a Hugging Face dataset.",
)
@option(
    "--against",
    metavar="OTHER",
    group="Evaluation",
    common=True,
    help="Compare with another classifier, or with predictions on the same texts that evaluate "
    "or classify wrote as JSON Lines.",
)
@option(
    "--against-base", metavar="PATH|ID", group="Model", help="Base model of OTHER, if it has moved."
)
@option(
    "-o",
    "--output",
    metavar="DIR",
    group="Output",
    common=True,
    help="Folder for report.html, metrics.json and predictions.jsonl.",
)
@option("--force", is_flag=True, group="Output", help="Replace an earlier report in DIR.")
@option(
    "--seed",
    type=click.IntRange(0),
    metavar="[INTEGER >= 0]",
    default=0,
    group="Evaluation",
    help="Seed of the bootstrap for the confidence intervals (default 0).",
)
@classifier_options
@quantize_option_of_classifier
@activations_option
@dataclass_options(ThresholdOptions)
@dataclass_options(ReportOptions)
@dataclass_options(DataOptions)
@debug_option
def command(
    classifier: str,
    source: str,
    against: str | None,
    against_base: str | None,
    output: str | None,
    force: bool,
    seed: int,
    **values: Any,
) -> None:
    """Evaluate CLASSIFIER, a folder that `minllama train` wrote, on labeled texts."""
    data, loading = pick(DataOptions, values), pick(LoadOptions, values)
    _check(against, against_base, output, force=force)
    with ended_by_interrupts():
        from minllama.distributed.ranks import joined
        from minllama.experiment import check_libraries

        if output is not None:
            check_libraries()
    with joined(device=loading.device) as ranks:
        if ranks.size > 1 and source == "-":
            raise OptionError(f"{ranks.size} processes cannot all read standard input; name a file")
        _evaluate(classifier, source, against, against_base, output, seed, data, loading, values)


def _evaluate(
    classifier: str,
    source: str,
    against: str | None,
    against_base: str | None,
    output: str | None,
    seed: int,
    data: DataOptions,
    loading: LoadOptions,
    values: dict[str, Any],
) -> None:
    """Evaluate, in all processes; the first one prints and writes."""
    with ended_by_interrupts():
        from minllama.classification.storage.save_load import load_classifier_with
        from minllama.cli.waiting import ConsoleReporter
        from minllama.distributed.ranks import current
        from minllama.experiment.predict import described, shortened_texts

    began, is_first = datetime.now(UTC).astimezone(), current().is_first
    warn_of_slow_dtype(loading.dtype, loading.device)
    loaded = load_classifier_with(classifier, loading)
    decide(loaded, pick(ThresholdOptions, values), more_of_classes=("against", "against_base"))
    split, notes = _read(source, data, loaded, classifier)
    reporter = ConsoleReporter(quiet=not is_first)
    for line in (described(loaded), *notes):
        reporter.message(line)
    other = (
        None
        if against is None
        else _open(against, split, dataclasses.replace(loading, base=against_base, tokenizer=None))
    )
    headline = pick(ReportOptions, values).headline or "accuracy"
    try:
        reported = _measured(loaded, split, other, headline, seed, reporter)
    finally:
        reporter.close()
    if message := shortened_texts(loaded):
        reporter.message(message)
        notes.append(message)
    if not is_first:
        return
    _print(classifier, split, reported, headline)
    if output is not None:
        run = {"classifier": classifier, "data": source, "against": against, "seed": seed}
        run["computed by"] = described(loaded)
        if against is None:
            del run["against"]
        _write(output, loaded, reported, notes, began, run=run, data=data)
        click.echo(
            one_line(f"wrote {output}: report.html, metrics.json, predictions.jsonl"), err=True
        )


def _check(
    against: str | None, against_base: str | None, output: str | None, *, force: bool
) -> None:
    """Refuse what cannot be opened or written before any work."""
    if output == "":
        raise MinllamaError("--output is empty; name a folder")
    if output is not None:
        check_folder_writable(output)
    with ended_by_interrupts():
        from minllama.evaluation.report.files import REPORT_FILES

    there = [name for name in REPORT_FILES if output is not None and (Path(output) / name).exists()]
    if there and not force:
        raise MinllamaError(f"{output}: already contains {', '.join(there)}; --force replaces them")
    if against_base is not None and (against is None or not Path(against).is_dir()):
        raise OptionError("--against-base needs a classifier's folder; name it with --against")
    if against is not None and not (against and Path(against).exists()):
        raise MinllamaError(
            f"--against {against!r}: no such file or folder; name a classifier's folder, or "
            "predictions that evaluate or classify wrote as JSON Lines"
        )


def _read(
    source: str, data: DataOptions, classifier: "Classifier", name: str
) -> tuple["Dataset", list[str]]:
    """The rows, with labels of the classifier's kind, and notes on them for the user."""
    from minllama.data import load_dataset, one_class, one_number

    if classifier.scale is not None:
        split = load_dataset(source, data, numbers=True)
        return split, [str(notice) for notice in (*split.notices, *one_number(split))]
    many = data.has_several_labels or classifier.multi_label
    data = dataclasses.replace(data, multi_label=many)
    split = load_dataset(source, data, label_names=classifier.labels)
    if split.multi_label != classifier.multi_label:
        raise MinllamaError(
            f"{split.source}: rows have several labels, but {name} predicts one per text; use "
            "a multi-label classifier"
        )
    return split, [str(notice) for notice in (*split.notices, *one_class(split))]


def _open(against: str, split: "Dataset", loading: LoadOptions) -> "ComparedSystem":
    from minllama.experiment.compare import open_compared

    try:
        return open_compared(against, split, loading=loading)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("--base", "--against-base")) from error


def _measured(
    classifier: "Classifier",
    split: "Dataset",
    other: "ComparedSystem | None",
    headline: str,
    seed: int,
    reporter: "ConsoleReporter",
) -> Any:
    """Evaluate the classifier, and the other system on the same rows.

    Returns:
        A ReportedSplit; ReportedValues for regression.
    """
    from minllama.experiment import evaluate_classifier
    from minllama.experiment.evaluate_values import evaluate_values

    settings: dict[str, Any] = {
        "seed": seed,
        "progress": reporter.advance("evaluating", len(split)),
    }
    if split.has_numbers:
        return evaluate_values(classifier, split, "data", **settings)
    reported = evaluate_classifier(classifier, split, "data", headline=headline, **settings)
    if other is None:
        return reported
    assert reported.evaluation is not None
    progress = reporter.advance(f"evaluating {other.name}", len(split))
    measured = other.evaluate(split, reported.evaluation, seed=seed, progress=progress)
    return dataclasses.replace(reported, others={other.name: measured})


def _print(classifier: str, split: "Dataset", reported: Any, headline: str) -> None:
    """Print the results, and those of the comparison if there is one."""
    from minllama.evaluation.report import print_summary
    from minllama.evaluation.report.terminal import print_paired

    assert reported.evaluation is not None
    print_summary(split.source, reported.evaluation, headline=headline)
    for name, other in getattr(reported, "others", {}).items():
        print_paired(
            (classifier, name),
            reported.evaluation,
            other,
            reported.paired[name],
            headline=reported.headline,
        )


def _write(
    output: str,
    classifier: "Classifier",
    reported: "ReportedSplit | ReportedValues",
    notes: list[str],
    began: datetime,
    *,
    run: dict[str, Any],
    data: DataOptions,
) -> None:
    from minllama.evaluation.report import Report, write_report
    from minllama.experiment.evaluate import settings_of, versions
    from minllama.experiment.predict import score_of

    report = Report(
        title=f"{run['classifier']} on {run['data']}",
        label_names=classifier.labels,
        splits=[reported],  # type: ignore[arg-type]
        multi_label=classifier.multi_label,
        settings=settings_of(run=run, data=data),
        versions=versions(),
        notes=notes,
        created=began,
        score=score_of(classifier),
        thresholds=classifier.decision,
    )
    write_report(output, report)
