"""`minllama train`: from a file of labelled texts to an evaluated classifier in a folder."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minllama.cli.open import (
    INTERRUPTED,
    Command,
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
from minllama.errors import MinllamaError
from minllama.options import (
    ClassifierOptions,
    DataOptions,
    LoRAOptions,
    PromptOptions,
    TrainingOptions,
)
from minllama.options.evaluation import ReportOptions, ThresholdOptions
from minllama.text import one_line

if TYPE_CHECKING:
    from minllama.experiment import Experiment
    from minllama.experiment.train import Outcome


# The option dataclasses of an experiment, by the names that it has for them.
GROUPS: dict[str, type] = {
    "classifier": ClassifierOptions,
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


@click.command("train")
@source_option(
    "--train",
    required=True,
    help="Labelled texts: a file, - or a data set on the Hugging Face hub.",
)
@source_option(
    "--dev",
    help="Labelled texts to choose and calibrate on; without it a part of the training file.",
)
@source_option(
    "--test",
    help="Texts that are only predicted at the end, and evaluated if they are labelled.",
)
@click.option(
    "-o", "--output", required=True, metavar="DIR", help="Folder of the classifier and its report."
)
@click.option("--resume", is_flag=True, help="Go on with the run that was cut in DIR.")
@click.option("--force", is_flag=True, help="Replace an earlier run in DIR.")
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
    """Train a classifier, calibrate it, evaluate it beside baselines, and write a report."""
    given = given_options(values)
    groups = {name: pick(options, values) for name, options in GROUPS.items()}
    if not output:
        raise MinllamaError("the name of --output is empty; name a folder")
    with ended_by_interrupts():
        from minllama.evaluation.report import print_summary
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
    for split in outcome.report.splits:
        if split.evaluation is not None:
            print_summary(split.name, split.evaluation, split.others, headline=split.headline)
    done = f"wrote {output}: the classifier, report.html, metrics.json, predictions.jsonl"
    click.echo(one_line(done), err=True)


def _run(experiment: "Experiment", *, resume: bool, force: bool) -> "Outcome":
    """Run it, and say how to go on with it where it is interrupted."""
    from minllama.cli.waiting import ConsoleSay
    from minllama.experiment import run_experiment

    say = ConsoleSay()
    try:
        with _terminated_as_interrupted():
            return run_experiment(experiment, resume=resume, force=force, say=say)
    except (KeyboardInterrupt, _Terminated):
        say.close()
        if (experiment.output / "checkpoint").exists():
            click.echo(one_line(INTERRUPTED.format(experiment.output)), err=True)
        raise
    finally:
        say.close()


def _with_template(experiment: "Experiment") -> "Experiment":
    """The experiment, with a chat template that was named by its file in its own words."""
    from minllama.checkpoints.open import open_checkpoint
    from minllama.tokenizer.tokenizer import Tokenizer

    def words() -> Tokenizer:
        checkpoint = open_checkpoint(experiment.model, tokenizer=experiment.tokenizer)
        return Tokenizer.from_checkpoint(checkpoint)

    return dataclasses.replace(experiment, prompt=with_template(experiment.prompt, words))


class _Terminated(SystemExit):
    """SIGTERM came."""


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM, as schedulers send it, leave a checkpoint like Ctrl-C; the status is then 143.

    It is turned into the other signal, since there are instants at which that one has to wait.
    """
    is_usual = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if not is_usual:
        yield
        return
    came: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if came:
            raise _Terminated(128 + signal.SIGTERM) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
