"""`minllama evaluate`: a classifier on labelled texts."""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from minllama.atomic import check_folder_writable
from minllama.cli.common import (
    classifier_options,
    dataclass_options,
    debug_option,
    ended_by_interrupts,
    pick,
    quantize_option_of_classifier,
    source_option,
    warn_of_slow_dtype,
)
from minllama.errors import MinllamaError
from minllama.options import DataOptions
from minllama.text import one_line


@click.command("evaluate")
@click.argument("classifier")
@source_option(
    "--data",
    "source",
    required=True,
    help="Labelled texts: a file, - or a data set on the Hugging Face hub.",
)
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    help="Write report.html, metrics.json and predictions.jsonl there.",
)
@click.option("--force", is_flag=True, help="Replace an earlier report in DIR.")
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    help="Of the draws for the intervals (default 0).",
)
@classifier_options
@quantize_option_of_classifier
@dataclass_options(DataOptions)
@debug_option
def command(
    classifier: str,
    source: str,
    output: str | None,
    force: bool,
    seed: int,
    base: str | None,
    tokenizer: str | None,
    dtype: str | None,
    device: str | None,
    quantize: str | None,
    **values: Any,
) -> None:
    """Measure CLASSIFIER, a folder that `minllama train` wrote, on labelled texts."""
    data = pick(DataOptions, values)
    if output == "":
        raise MinllamaError("the name of --output is empty; name a folder")
    if output is not None:
        check_folder_writable(output)
    with ended_by_interrupts():
        from minllama.report.files import REPORT_FILES

    there = [name for name in REPORT_FILES if output is not None and (Path(output) / name).exists()]
    if there and not force:
        raise MinllamaError(f"{output}: {', '.join(there)} are there; --force replaces them")
    with ended_by_interrupts():
        from minllama.classifier import load_classifier
        from minllama.cli.waiting import ConsoleSay
        from minllama.data import load_dataset, one_class
        from minllama.experiment import check_libraries, evaluate_classifier
        from minllama.experiment.measuring import settings_of, versions
        from minllama.experiment.predicting import described, score_of, shortened_texts
        from minllama.report import Report, print_summary, write_report

        if output is not None:
            check_libraries()

    began = datetime.now(UTC).astimezone()
    warn_of_slow_dtype(dtype, device)
    loaded = load_classifier(
        classifier,
        model=base,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        quantize=quantize,
    )
    data = dataclasses.replace(data, multi_label=data.multi_label or loaded.multi_label)
    split = load_dataset(source, data, label_names=loaded.labels)
    if split.multi_label != loaded.multi_label:
        raise MinllamaError(
            f"{split.source}: its rows have several labels, and {classifier} gives one to each text"
        )
    notes = [str(notice) for notice in (*split.notices, *one_class(split))]
    say = ConsoleSay()
    for line in (described(loaded), *notes):
        say.say(line)
    progress = say.advance("evaluating", len(split))
    try:
        reported = evaluate_classifier(loaded, split, "data", seed=seed, progress=progress)
    finally:
        say.close()
    if said := shortened_texts(loaded):
        say.say(said)
        notes.append(said)
    assert reported.evaluation is not None
    print_summary(split.source, reported.evaluation)
    if output is not None:
        report = Report(
            title=f"{classifier} on {split.source}",
            label_names=loaded.labels,
            splits=[reported],
            multi_label=loaded.multi_label,
            settings=settings_of(
                run={
                    "classifier": classifier,
                    "data": source,
                    "seed": seed,
                    "computed by": described(loaded),
                },
                data=data,
            ),
            versions=versions(),
            notes=notes,
            created=began,
            score=score_of(loaded),
        )
        write_report(output, report)
        click.echo(
            one_line(f"wrote {output}: report.html, metrics.json, predictions.jsonl"), err=True
        )
