"""One experiment, from its files to a classifier and its report in a folder.

Knows nothing of arguments, and prints nothing: what a person should hear, `Say` is told.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from minllama.baselines import fit_baselines
from minllama.checkpoints import open_checkpoint
from minllama.classifier import save_classifier
from minllama.classifier.base import Classifier
from minllama.classifier.calibration import fit_temperature
from minllama.errors import MinllamaError
from minllama.evaluation import Evaluation
from minllama.experiment.fitting import (
    LAYER_FILE,
    make_head,
    make_trainable,
    make_zero_shot,
    training_options,
    weights_dtype,
)
from minllama.experiment.measuring import (
    evaluate_classifier,
    headlines,
    settings_of,
    versions,
)
from minllama.experiment.splits import Splits, load_splits
from minllama.llama import Llama
from minllama.loading import default_device
from minllama.options import (
    ClassifierOptions,
    DataOptions,
    LoRAOptions,
    PromptOptions,
    TrainingOptions,
)
from minllama.progress import Progress
from minllama.report import Report, write_report
from minllama.tokenizer import Tokenizer
from minllama.training import TrainingResult, fit
from minllama.training_state import CHECKPOINT, METRICS, remove_checkpoint


class Say:
    """What a run tells the person who waits for it; here: nothing."""

    def say(self, line: str) -> None:
        """Something to know."""

    def advance(self, title: str, total: int) -> Callable[[int], None]:
        """A part of the work begins; what is returned hears of each few of its `total` texts."""
        return lambda done: None

    def progress(self) -> Progress | None:
        """What hears of each training step."""
        return None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that an experiment is made from.

    Attributes:
        train, dev, test: sources of labelled texts.
        output: the folder of the classifier and its report.
        model, tokenizer: sources of the base model; None for the default.
        dtype, device: None for what suits the method and the machine.
        data, prompt, classifier, lora, training: options.
        llama_changes: fields of LlamaConfig, such as `dropout`.
    """

    train: str
    output: Path
    dev: str | None = None
    test: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    dtype: str | None = None
    device: str | None = None
    data: DataOptions = field(default_factory=DataOptions)
    prompt: PromptOptions = field(default_factory=PromptOptions)
    classifier: ClassifierOptions = field(default_factory=ClassifierOptions)
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    llama_changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of an experiment.

    Attributes:
        classifier: trained and calibrated.
        splits: the data.
        report: as it was written.
        training: None where no gradient was followed.
    """

    classifier: Classifier
    splits: Splits
    report: Report
    training: TrainingResult | None


def run_experiment(
    experiment: Experiment, *, resume: bool = False, force: bool = False, say: Say | None = None
) -> Outcome:
    """Read, train, calibrate, evaluate, and write classifier and report.

    Args:
        experiment: what to do.
        resume: go on with the run that was cut in the output folder.
        force: replace what an earlier run left there.
        say: what the person hears.

    Raises:
        MinllamaError: anything that the user can mend; the output folder then holds no classifier,
            or the old one.
    """
    say = say or Say()
    began, started = datetime.now(UTC).astimezone(), time.perf_counter()
    options, training = experiment.classifier, experiment.training
    _prepare(experiment.output, resume=resume, force=force)
    splits = load_splits(
        experiment.train,
        experiment.dev,
        experiment.test,
        experiment.data,
        dev_fraction=options.dev_fraction,
        seed=training.seed,
    )
    for notice in splits.notices:
        say.say(notice)
    llama, tokenizer = _open(experiment)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        classifier, beside, result = _train(experiment, splits, llama, tokenizer, resume, say)
    if not options.no_calibration:
        report_progress = say.advance("calibrating", len(splits.dev))
        logits = classifier.predict_logits(splits.dev.texts, progress=report_progress)
        assert splits.dev.labels is not None
        classifier.temperature = fit_temperature(
            logits, splits.dev.labels, multi_label=splits.dev.multi_label
        )
        say.say(f"temperature {classifier.temperature:.3g}, fitted on {splits.dev.source}")
    report = _measured(experiment, splits, classifier, beside, result, say)
    report = dataclasses.replace(report, created=began, seconds=time.perf_counter() - started)
    _write(experiment, classifier, report)
    return Outcome(classifier, splits, report, result)


def _prepare(output: Path, *, resume: bool, force: bool) -> None:
    has_old = any((output / name).exists() for name in (CHECKPOINT, METRICS, "classifier.json"))
    if resume:
        if not (output / CHECKPOINT).exists():
            raise MinllamaError(
                f"{output}: there is no checkpoint to go on from; leave --resume away"
            )
        return
    if has_old and not force:
        what = "--resume goes on with it, " if (output / CHECKPOINT).exists() else ""
        raise MinllamaError(f"{output}: an earlier run is there; {what}--force replaces it")
    for name in (LAYER_FILE, METRICS):
        (output / name).unlink(missing_ok=True)
    remove_checkpoint(output)


def _open(experiment: Experiment) -> tuple[Llama, Tokenizer]:
    checkpoint = open_checkpoint(experiment.model, tokenizer=experiment.tokenizer)
    if checkpoint.vocabulary is None:
        raise MinllamaError(
            f"{checkpoint.path}: no tokenizer in or beside the model; "
            "name its file or folder with --tokenizer"
        )
    tokenizer = Tokenizer(checkpoint.vocabulary)
    options = experiment.classifier
    device = torch.device(experiment.device) if experiment.device else default_device()
    llama = Llama.from_checkpoint(
        checkpoint,
        dtype=experiment.dtype or weights_dtype(options.method, device),
        device=device,
        **{**experiment.llama_changes, **({"causal": False} if options.bidirectional else {})},
    )
    return llama.requires_grad_(False), tokenizer


def _train(
    experiment: Experiment,
    splits: Splits,
    llama: Llama,
    tokenizer: Tokenizer,
    resume: bool,
    say: Say,
) -> tuple[Classifier, dict[str, Evaluation], TrainingResult | None]:
    """The classifier, what it was before its training, and how that went."""
    options = experiment.classifier
    training = experiment.training
    beside: dict[str, Evaluation] = {}
    classifier: Classifier
    if options.method == "zero-shot" or options.objective == "label-words":
        if splits.train.multi_label:
            raise MinllamaError(
                "label words choose one label; for texts with several use --objective head"
            )
        classifier = make_zero_shot(
            llama,
            tokenizer,
            splits.train.label_names,
            experiment.prompt,
            options,
            train=splits.train,
            seed=training.seed,
        )
        if options.method == "zero-shot":
            return classifier, beside, None
        progress = say.advance("zero-shot, before training", len(splits.dev))
        before = evaluate_classifier(classifier, splits.dev, "dev", progress=progress)
        assert before.evaluation is not None
        beside["zero-shot (before training)"] = before.evaluation
        say.say(f"zero-shot, before training: dev accuracy {before.evaluation.accuracy:.3f}")
    else:
        classifier = make_head(
            llama,
            tokenizer,
            splits.train,
            experiment.prompt,
            options,
            balanced=training.class_weights == "balanced",
            seed=training.seed,
            say=say.say,
            advance=say.advance,
            folder=None if options.method == "frozen" else experiment.output,
        )
        if options.method == "frozen":
            return classifier, beside, None
    make_trainable(classifier, options.method, experiment.lora)
    head = getattr(classifier, "score", None)
    result = fit(
        classifier,
        splits.train,
        splits.dev,
        training_options(training, options.method),
        folder=experiment.output,
        resume=resume,
        head_parameters=list(head.parameters()) if isinstance(head, torch.nn.Module) else [],
        progress=say.progress(),
        settings=_settings(experiment),
    )
    return classifier, beside, result


def _settings(experiment: Experiment) -> dict[str, Any]:
    options = experiment.classifier
    groups: dict[str, Any] = {
        "files": {
            "train": experiment.train,
            "dev": experiment.dev or "set aside from train",
            "test": experiment.test,
        },
        "model": {
            "model": experiment.model or "default",
            "tokenizer": experiment.tokenizer,
            "dtype": experiment.dtype or "by method and machine",
        },
        "classifier": options,
        "prompt": experiment.prompt,
    }
    if options.method == "lora":
        groups["lora"] = experiment.lora
    if options.method in ("lora", "full"):
        groups["training"] = training_options(experiment.training, options.method)
    else:
        groups["training"] = {"seed": experiment.training.seed}
    return settings_of(**groups)


def _measured(
    experiment: Experiment,
    splits: Splits,
    classifier: Classifier,
    beside: Mapping[str, Evaluation],
    result: TrainingResult | None,
    say: Say,
) -> Report:
    train = splits.train
    assert train.labels is not None
    baselines = fit_baselines(
        train.texts,
        train.labels,
        len(train.label_names),
        multi_label=train.multi_label,
        seed=experiment.training.seed,
    )
    reported = []
    for name, split in (("dev", splits.dev), ("test", splits.test)):
        if split is None:
            continue
        reported.append(
            evaluate_classifier(
                classifier,
                split,
                name,
                others=beside if name == "dev" else {},
                baselines=baselines,
                progress=say.advance(f"evaluating {name}", len(split)),
            )
        )
    notes = [*splits.notices]
    if not experiment.classifier.no_calibration:
        notes.append("the temperature was fitted on dev, so dev's own calibration flatters it")
    if result is not None:
        notes.append(
            "the best weights by dev were kept, so dev's own numbers flatter them a little"
        )
    return Report(
        title=f"{experiment.output.name}: {experiment.classifier.method}",
        label_names=classifier.labels,
        splits=reported,
        multi_label=classifier.multi_label,
        history=() if result is None else result.history,
        settings=_settings(experiment),
        versions=versions(),
        notes=notes,
    )


def _write(experiment: Experiment, classifier: Classifier, report: Report) -> None:
    output = experiment.output
    metrics = {split.name: headlines(split) for split in report.splits if split.evaluation}
    save_classifier(
        classifier,
        output,
        tokenizer=experiment.tokenizer,
        training=_settings(experiment),
        metrics=metrics,
    )
    write_report(output, report)
    remove_checkpoint(output)
    (output / LAYER_FILE).unlink(missing_ok=True)
