"""`minllama train`: train and evaluate a classifier from a file of labeled texts."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minllama.cli.grouped import Command, GroupedCommand, option
from minllama.cli.limits import give_cores_back
from minllama.cli.open import (
    INTERRUPTED,
    dataclass_options,
    debug_option,
    ended_by_interrupts,
    given_options,
    model_options,
    pick,
    quantize_option,
    source_option,
    warn_of_slow_dtype,
    with_template,
)
from minllama.distributed.launcher import launch
from minllama.errors import MinllamaError
from minllama.options import (
    ClassifierOptions,
    DataOptions,
    LoRAOptions,
    PromptOptions,
    TrainingOptions,
)
from minllama.options.evaluation import ReportOptions, ThresholdOptions
from minllama.options.ladder import LadderOptions
from minllama.text import one_line

if TYPE_CHECKING:
    from minllama.experiment import Experiment
    from minllama.experiment.train import Outcome


# The option dataclasses of an experiment, by its field names.
GROUPS: dict[str, type] = {
    "classifier": ClassifierOptions,
    "ladder": LadderOptions,
    "prompt": PromptOptions,
    "training": TrainingOptions,
    "lora": LoRAOptions,
    "threshold": ThresholdOptions,
    "report": ReportOptions,
    "data": DataOptions,
}


def _option_groups(command: Command) -> Command:
    for options in reversed(GROUPS.values()):
        command = dataclass_options(options)(command)
    return command


@click.command("train", cls=GroupedCommand)
@source_option(
    "--train",
    required=True,
    group="Data",
    common=True,
    help="Labeled texts: a file, - for standard input, or a Hugging Face dataset.",
)
@source_option(
    "--dev",
    group="Data",
    common=True,
    help="Labeled texts to select and calibrate on (default: a part of the training file).",
)
@source_option(
    "--test",
    group="Data",
    common=True,
    help="Texts to predict after training, and to evaluate on if they are labeled.",
)
@option(
    "-o",
    "--output",
    required=True,
    metavar="DIR",
    group="Output",
    common=True,
    help="Folder for the classifier and its report.",
)
@option("--resume", is_flag=True, group="Output", help="Resume the interrupted run in DIR.")
@option("--force", is_flag=True, group="Output", help="Replace an earlier run in DIR.")
@model_options
@quantize_option
@_option_groups
@debug_option
def command(
    train: str,
    dev: str | None,
    test: str | None,
    output: str,
    resume: bool,
    force: bool,
    source: str | None,
    tokenizer: str | None,
    dtype: str | None,
    device: str | None,
    quantize: str,
    **values: Any,
) -> None:
    """Train a classifier, calibrate it, compare it with baselines, and write a report."""
    give_cores_back()
    given = given_options(values)
    groups = {name: pick(options, values) for name, options in GROUPS.items()}
    if not output:
        raise MinllamaError("--output is empty; name a folder")
    with ended_by_interrupts():
        from minllama.evaluation.report import print_summary
        from minllama.evaluation.report.ladder import print_ladder
        from minllama.experiment import Experiment, check_uses
    experiment = Experiment(
        train=train,
        dev=dev,
        test=test,
        output=Path(output),
        model=source,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        quantize=None if quantize == "none" else quantize,
        **groups,
    )
    check_uses(experiment, given)
    experiment = _with_template(experiment)
    warn_of_slow_dtype(dtype, device)
    if experiment.training.autocast == "on":
        warn_of_slow_dtype("bfloat16", device, option="--autocast on")
    outcome = _run(experiment, resume=resume, force=force)
    if not launch().is_first:  # several processes have done this together
        return
    if outcome.report.ladder is not None:
        print_ladder(outcome.report.ladder)
    for split in outcome.report.splits:
        if split.evaluation is not None:
            print_summary(split.name, split.evaluation, split.others, headline=split.headline)
    done = f"wrote {output}: the classifier, report.html, metrics.json, predictions.jsonl"
    click.echo(one_line(done), err=True)


def _run(experiment: "Experiment", *, resume: bool, force: bool) -> "Outcome":
    """Run the experiment; print how to resume it if it is interrupted."""
    from minllama.cli.waiting import ConsoleReporter
    from minllama.experiment import run_experiment

    is_first, reporter = launch().is_first, ConsoleReporter()
    try:
        with _terminated_as_interrupted():
            return run_experiment(experiment, resume=resume, force=force, reporter=reporter)
    except (KeyboardInterrupt, _Terminated):
        reporter.close()
        if is_first and any(
            (experiment.output / name).exists() for name in ("checkpoint", "ladder")
        ):
            click.echo(one_line(INTERRUPTED.format(experiment.output)), err=True)
        raise
    finally:
        reporter.close()


def _with_template(experiment: "Experiment") -> "Experiment":
    """The experiment, with a chat template file replaced by its content."""
    from minllama.checkpoints.open import open_checkpoint
    from minllama.tokenizer.tokenizer import Tokenizer

    def words() -> Tokenizer:
        checkpoint = open_checkpoint(experiment.model, tokenizer=experiment.tokenizer)
        return Tokenizer.from_checkpoint(checkpoint)

    return dataclasses.replace(experiment, prompt=with_template(experiment.prompt, words))


class _Terminated(SystemExit):
    """SIGTERM was received."""


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Make SIGTERM, which schedulers send, save a checkpoint like Ctrl-C; the exit status is 143.

    It is converted to SIGINT, which is deferred in critical sections.
    """
    is_usual = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if not is_usual:
        yield
        return
    received: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        received.append(number)
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if received:
            raise _Terminated(128 + signal.SIGTERM) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
