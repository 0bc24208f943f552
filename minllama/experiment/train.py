"""Run one experiment: from its files to a classifier and its report in a folder.

`minllama train` calls it; messages go to a `Reporter`.
"""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from minllama.atomic import only_run
from minllama.checkpoints.load import load_with
from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.weight_format import Purpose, resolve_weight_format
from minllama.classification import (
    LlamaEmbeddingClassifier,
    save_classifier,
)
from minllama.classification.base import Classifier
from minllama.classification.storage.fingerprint import comparable_config
from minllama.distributed.launcher import launch
from minllama.distributed.ranks import current, joined
from minllama.distributed.sharded_llama import load_sharded, samples_of
from minllama.distributed.sharding import is_read_by_rows
from minllama.errors import MinllamaError, optional_import
from minllama.evaluation.metrics import Evaluation
from minllama.evaluation.report import Report
from minllama.evaluation.report.files import write_files
from minllama.evaluation.report.ladder import Ladder
from minllama.evaluation.thresholds import check_thresholds, fixed_thresholds
from minllama.experiment.build import (
    AUTO,
    LAYER_FILE,
    TRAINED,
    make_head,
    make_trainable,
    make_zero_shot,
    most_layers,
    training_options,
    without_shots,
)
from minllama.experiment.calibrate import calibrate, fit_to_all_rows
from minllama.experiment.evaluate import evaluate_classifier, headlines
from minllama.experiment.experiment import Experiment
from minllama.experiment.frozen import make_experts, reads_experts
from minllama.experiment.ladder import run_ladder
from minllama.experiment.ladder.budget import Budget
from minllama.experiment.ladder.state import LADDER
from minllama.experiment.option_rules import check_processes, check_uses
from minllama.experiment.output_folder import (
    check_not_base,
    check_output,
    is_begun,
    remove_earlier_run,
    writable,
)
from minllama.experiment.reporter import Reporter
from minllama.experiment.reporting import measure, settings_for_people, settings_of_run
from minllama.experiment.splits import Splits, load_splits
from minllama.lora.targets import matching_modules
from minllama.model.llama import Llama
from minllama.tokenizer.size import check_fits
from minllama.tokenizer.tokenizer import Tokenizer
from minllama.training.losses import check_ordinal
from minllama.training.malloc import give_back_freed_memory
from minllama.training.run_checkpoint import CHECKPOINT, METRICS, Row, digest, read_metrics
from minllama.training.trainer import TrainingResult, fit, summary_writer


@dataclass(frozen=True)
class Outcome:
    """The result of an experiment.

    Attributes:
        classifier: trained and calibrated.
        splits: the data.
        report: as it was written.
        training: None without gradient steps.
    """

    classifier: Classifier
    splits: Splits
    report: Report
    training: TrainingResult | None


def run_experiment(
    experiment: Experiment,
    *,
    resume: bool = False,
    force: bool = False,
    reporter: Reporter | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Read, train, calibrate, evaluate, and write classifier and report.

    Processes that a launcher has started, `torchrun` for one, do it together; the first one writes
    and reports.

    Args:
        experiment: its options.
        resume: continue the interrupted run in the output folder from its checkpoint, or from the
            beginning if there is none.
        force: replace an earlier run in it.
        reporter: receives messages.
        clock: returns seconds, by which the method auto keeps to its time.

    Raises:
        MinllamaError: anything that the user can fix, including another run in the output folder,
            which then contains no classifier, or the old one.
        KeyboardInterrupt: training can be resumed afterwards.
    """
    with joined(device=experiment.device) as ranks, contextlib.ExitStack() as stack:
        check_uses(experiment)
        check_processes(experiment, ranks.size)
        check_not_base(experiment.output, experiment.model)
        ranks.first(lambda: stack.enter_context(only_run(experiment.output)))
        return _run(
            experiment,
            Budget(experiment.ladder.minutes, clock=clock),
            resume=resume,
            force=force,
            reporter=reporter if reporter is not None and ranks.is_first else Reporter(),
        )


def _run(
    experiment: Experiment, budget: Budget, *, resume: bool, force: bool, reporter: Reporter
) -> Outcome:
    """Like `run_experiment`, in a folder without another run."""
    began, training = datetime.now(UTC).astimezone(), experiment.training
    ranks = current()
    resume = _resumes(experiment, resume, force, reporter)
    check_libraries()
    if training.tensorboard:
        summary_writer()
    _check_labels(experiment, multi_label=experiment.data.has_several_labels)
    splits = _splits(experiment, reporter)
    _check_labels(experiment, multi_label=splits.train.multi_label)
    check_thresholds(
        experiment.threshold,
        splits.train.label_names,
        multi_label=splits.train.multi_label,
        can_choose=True,
    )
    llama, tokenizer = _open(experiment)
    with contextlib.ExitStack() as stack:
        ranks.first(lambda: stack.enter_context(writable(experiment.output)))
        if not resume:
            ranks.first(lambda: remove_earlier_run(experiment.output))
        with _seeded(training.seed):
            trained = _trained(experiment, splits, llama, tokenizer, budget, resume, reporter)
        classifier = trained.classifier
        logits, notes = calibrate(classifier, splits, experiment, reporter)
        if trained.refit is not None:
            with _seeded(training.seed):
                classifier, logits, note = fit_to_all_rows(
                    classifier, trained.refit, logits, splits, experiment
                )
            reporter.message(note)
            notes.append(note)
            trained = trained._replace(classifier=classifier)
        test_logits = _read_test(classifier, splits, reporter)

        def finished() -> Report:
            report = measure(
                experiment,
                splits,
                classifier,
                logits,
                test_logits,
                trained.other_systems,
                trained.history,
                [*trained.notes, *notes],
                reporter,
                trained.ladder,
                fitted_to=splits.train if trained.refit is None else splits.whole,
            )
            report = dataclasses.replace(report, created=began, seconds=budget.spent)
            _write(experiment, trained, report)
            return report

        shards = classifier.llama.shards
        report = (ranks if shards is None else shards).first(finished)
    return Outcome(classifier, splits, report, trained.training)


def _resumes(experiment: Experiment, resume: bool, force: bool, reporter: Reporter) -> bool:
    """Whether the run continues from a checkpoint; refuses to overwrite an earlier one."""
    output, method, ranks = experiment.output, experiment.classifier.method, current()
    if launch().restarts:  # by the launcher, which gives the same options again
        is_to_resume = ranks.first(lambda: resume or is_begun(output, method))
    else:
        is_to_resume = resume
    is_to_replace = force and (resume or not is_to_resume)
    resumes = ranks.first(
        lambda: check_output(output, method, resume=is_to_resume, force=is_to_replace)
    )
    if is_to_resume and not resumes:
        reporter.message(
            f"{output}: the run was interrupted before its first checkpoint; starting from the "
            "beginning"
        )
    return resumes


def _splits(experiment: Experiment, reporter: Reporter) -> Splits:
    splits = load_splits(
        experiment.train,
        experiment.dev,
        experiment.test,
        experiment.data,
        dev_fraction=experiment.classifier.dev_fraction,
        per_class=experiment.classifier.per_class,
        numbers=experiment.regression,
        seed=experiment.training.seed,
    )
    for notice in splits.notices:
        reporter.message(notice)
    return splits


def check_libraries() -> None:
    """Check, before hours of work, for libraries that the report needs.

    Raises:
        MinllamaError: a library is not installed.
    """
    for module in ("sklearn", "matplotlib"):
        optional_import(module, "training and reports need")


def _check_labels(experiment: Experiment, *, multi_label: bool) -> None:
    """Refuse options that need one label per text, as soon as the labels are known."""
    options = experiment.classifier
    if multi_label and (options.method == "zero-shot" or options.objective == "label-words"):
        raise MinllamaError(
            "label words predict one label per text; for several use --method frozen, or lora "
            "or full with --objective head"
        )
    check_ordinal(experiment.training.ordinal, multi_label=multi_label)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers from a seed, and leave its generators as they were."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    with torch.random.fork_rng(devices=range(n_gpus)):
        torch.manual_seed(seed)
        yield


def _open(experiment: Experiment) -> tuple[Llama, Tokenizer]:
    checkpoint = open_checkpoint(experiment.model, tokenizer=experiment.tokenizer)
    if experiment.has_head:
        checkpoint = checkpoint.without_head()  # a new one is trained in its place
    checkpoint.check_language_model()
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    options = experiment.classifier
    if options.method == "full":  # it is written with its tokenizer, at the end
        where = str(experiment.tokenizer or checkpoint.path)
        check_fits(tokenizer.vocab_size, checkpoint.config.vocab_size, where)
    purpose: Purpose = "train" if options.method == "full" else "read"
    weights = resolve_weight_format(checkpoint, experiment.loading, purpose)
    changes = {**experiment.llama_changes, **({"causal": False} if options.bidirectional else {})}
    ranks, parallel = current(), experiment.training.parallel
    if options.method == "full" and is_read_by_rows(
        checkpoint.config, weights.dtype, weights.device, ranks, parallel
    ):
        if weights.device.type == "cpu":  # tensors and layers come and go
            give_back_freed_memory()
        llama = load_sharded(checkpoint, weights, ranks, **changes)
    else:
        llama = load_with(Llama, checkpoint, weights, **changes)
    if options.method in ("lora", AUTO):  # names that are not there are found before texts are read
        matching_modules(llama, experiment.lora.target_modules, range(most_layers(llama, options)))
    return llama.requires_grad_(False), tokenizer


class _Trained(NamedTuple):
    """A classifier and what its report tells of its training.

    Attributes:
        classifier: not calibrated.
        other_systems: evaluated on dev, such as the classifier before training.
        training: None without gradient steps, and where auto has trained several.
        ladder: of the method auto.
        metrics: the file of its training's metrics, if that is not in the output folder.
        notes: for the report.
        refit: fits such a classifier to the held-out rows, too; None where that is not done.
    """

    classifier: Classifier
    other_systems: dict[str, Evaluation]
    training: TrainingResult | None
    ladder: Ladder | None = None
    metrics: Path | None = None
    notes: Sequence[str] = ()
    refit: Callable[[], Classifier] | None = None

    @property
    def history(self) -> Sequence[Row]:
        """The steps of its training."""
        if self.metrics is not None:
            return read_metrics(self.metrics.parent)
        return () if self.training is None else self.training.history


def _trained(
    experiment: Experiment,
    splits: Splits,
    llama: Llama,
    tokenizer: Tokenizer,
    budget: Budget,
    resume: bool,
    reporter: Reporter,
) -> _Trained:
    """Train by the method of the experiment."""
    if experiment.classifier.method != AUTO:
        train = partial(_train, experiment)
        trained = _Trained(*train(splits, llama, tokenizer, resume, reporter))
        if experiment.classifier.method != "frozen" or splits.whole is None:
            return trained
        whole = dataclasses.replace(splits, train=splits.whole)
        return trained._replace(refit=lambda: train(whole, llama, tokenizer, resume, Reporter())[0])
    climbed = run_ladder(
        experiment,
        splits,
        llama,
        tokenizer,
        settings=_settings_to_resume_with(experiment, llama),
        budget=budget,
        resume=resume,
        reporter=reporter,
    )
    ladder = climbed.ladder
    return _Trained(
        climbed.classifier, {}, None, ladder, climbed.metrics, climbed.notes, climbed.refit
    )


def _train(
    experiment: Experiment,
    splits: Splits,
    llama: Llama,
    tokenizer: Tokenizer,
    resume: bool,
    reporter: Reporter,
) -> tuple[Classifier, dict[str, Evaluation], TrainingResult | None]:
    """The classifier, its evaluation before training, and the training's result."""
    options = experiment.classifier
    training, train = experiment.training, splits.train
    settings = _settings_to_resume_with(experiment, llama)
    other_systems: dict[str, Evaluation] = {}
    classifier: Classifier
    if options.method == "zero-shot" or options.objective == "label-words":
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
            return classifier, other_systems, None
        other_systems["zero-shot (before training)"] = _before(
            experiment, splits, classifier, reporter
        )
        train = without_shots(splits.train, classifier.shots)
    elif reads_experts(splits.train, options):
        return make_experts(experiment, splits, llama, tokenizer, reporter), other_systems, None
    else:
        classifier = make_head(
            llama,
            tokenizer,
            splits.train,
            experiment.prompt,
            options,
            balanced=training.class_weights == "balanced",
            seed=training.seed,
            reporter=reporter,
            folder=experiment.output if options.method in TRAINED else None,
        )
        if options.method == "frozen":
            return classifier, other_systems, None
    make_trainable(classifier, options.method, experiment.lora)
    head = classifier.score if isinstance(classifier, LlamaEmbeddingClassifier) else None
    result = fit(
        classifier,
        train,
        splits.dev,
        training_options(training, options.method, regression=experiment.regression),
        folder=experiment.output,
        resume=resume,
        head_parameters=[] if head is None else list(head.parameters()),
        progress=reporter.progress(),
        settings=settings,
    )
    return classifier, other_systems, result


def _before(
    experiment: Experiment, splits: Splits, classifier: Classifier, reporter: Reporter
) -> Evaluation:
    """Evaluate zero-shot label words on dev."""
    # Thresholds are chosen after the training; which class is the positive one is known.
    at_first = dataclasses.replace(experiment.threshold, threshold=())
    classifier.decide_by(fixed_thresholds(at_first, classifier.labels, multi_label=False))
    progress = reporter.advance("zero-shot, before training", len(splits.dev))
    before = evaluate_classifier(classifier, splits.dev, "dev", progress=progress).evaluation
    assert before is not None
    reporter.message(f"zero-shot, before training: dev accuracy {before.accuracy:.3f}")
    return before


def _read_test(
    classifier: Classifier, splits: Splits, reporter: Reporter
) -> NDArray[np.float32] | None:
    """Logits of the test texts, (N, C); None without any."""
    if (test := splits.test) is None:
        return None
    progress = reporter.advance("reading test", len(test))
    return classifier.predict_logits(test.texts, progress=progress)


def _settings_to_resume_with(experiment: Experiment, llama: Llama) -> dict[str, Any]:
    """Settings that must be equal to resume: of the base its fingerprint, not its name.

    Args:
        llama: the base, before anything is done to it. Of its tokenizer the tokens of the training
            texts are compared.
    """
    settings = settings_of_run(experiment)
    for name in ("model", "tokenizer"):
        del settings["model"][name]
    weights = digest(samples_of(llama))
    return {**settings, "base": {"config": comparable_config(llama.config), "its weights": weights}}


def _write(experiment: Experiment, trained: _Trained, report: Report) -> None:
    """Write classifier and report and remove the checkpoint, in one step."""

    def also(folder: Path) -> None:
        write_files(folder, report)
        if trained.metrics is not None:
            shutil.copyfile(trained.metrics, folder / METRICS)

    save_classifier(
        trained.classifier,
        experiment.output,
        tokenizer=experiment.tokenizer,
        training=settings_for_people(experiment),
        metrics={split.name: headlines(split) for split in report.splits if split.evaluation},
        verdicts={split.name: split.verdict for split in report.splits if split.evaluation},
        also=also,
        removes=(CHECKPOINT, LAYER_FILE, LADDER),
    )
