"""Train a classifier on labeled texts, in steps that can be interrupted and resumed.

`fit` trains whichever parameters of a classifier require gradients.
"""

import contextlib
import dataclasses
import itertools
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from minllama.atomic import only_run
from minllama.data import Dataset
from minllama.distributed.ranks import ALONE, current
from minllama.distributed.sharded_llama import samples_of
from minllama.distributed.sharding import check_parallel
from minllama.errors import MinllamaError, OptionError, optional_import
from minllama.model.llama import Llama
from minllama.model.mode import mode_restored
from minllama.options import TrainingOptions
from minllama.training.losses import check_ordinal
from minllama.training.malloc import give_back_freed_memory
from minllama.training.objective import Trainable, check_kind, check_metric
from minllama.training.progress import Progress
from minllama.training.run import TrainingRun
from minllama.training.run_checkpoint import (
    METRICS,
    CheckpointFolder,
    Fingerprint,
    MetricsFile,
    Row,
    differences,
    digest,
    read_metrics,
)

__all__ = ["Trainable", "TrainingResult", "fit"]


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training.

    Attributes:
        history: one row per step, as in `metrics.jsonl`: `step`, `epoch` (a fraction), `loss`,
            `lr`, `grad_norm` (before clipping), `examples_per_second`, `tokens_per_second`,
            `seconds` (since the start), and after an evaluation `dev_loss`, `dev_accuracy`,
            `dev_macro_f1` (and `dev_micro_f1` for multi-label texts); for regression `dev_rmse`,
            `dev_mae`, `dev_r2`, `dev_pearson`, `dev_spearman`.
        steps: done in all.
        metric: the metric that selected the best weights.
        best_step, best_metric: of the best evaluation, whose weights the classifier now has unless
            `keep` is `last`; None without a dev split.
        stopped_early: evaluations brought no gain any more.
        resumed_from: steps that were done before this call; 0 for a new run.
        seconds: of the whole run, evaluations included.
        examples_per_second, tokens_per_second: of its steps, without evaluations.
    """

    history: tuple[Row, ...]
    steps: int
    metric: str
    best_step: int | None
    best_metric: float | None
    stopped_early: bool
    resumed_from: int
    seconds: float
    examples_per_second: float
    tokens_per_second: float


def fit(
    classifier: Trainable,
    train: Dataset,
    dev: Dataset | None,
    options: TrainingOptions,
    *,
    folder: Path | None = None,
    resume: bool = False,
    head_parameters: Sequence[nn.Parameter] = (),
    progress: Progress | None = None,
    settings: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Train the parameters of a classifier that require gradients.

    On a CPU the same call gives the same weights bit for bit, also after an interruption and
    resume. The caller's random state is not changed.

    Args:
        classifier: trained in place; at the end it has the weights that `keep` selects.
        train: labeled texts, of the classifier's labels.
        dev: texts to evaluate on; None for no evaluations.
        options: `lr` must be set.
        folder: keeps `metrics.jsonl` and a `checkpoint`, every `save_every` steps, at the end, and
            at a KeyboardInterrupt. `minllama.training.run_checkpoint.remove_checkpoint` deletes it.
        resume: continue from the checkpoint, or start if there is none.
        head_parameters: those that learn at `head_lr`.
        progress: receives each step.
        settings: other settings of the run (the model, the prompt) as plain values; a run can only
            be resumed with the same.

    Raises:
        OptionError: options that contradict one another, or no `lr`.
        DataError: labels cannot be used; see the message.
        CheckpointError: the checkpoint is damaged, of another run, or of one that is not finished
            and not to be resumed.
        MinllamaError: the loss is NaN or infinite (the last checkpoint stays); a text cannot be
            encoded; the folder cannot be written, or another run is writing there.
        KeyboardInterrupt: after saving a checkpoint in `folder`.
    """
    _check(classifier, train, dev, options, folder, resume)
    with contextlib.ExitStack() as stack:
        if folder is not None:
            current().first(lambda: stack.enter_context(only_run(folder)))
        return _fit(
            classifier, train, dev, options, folder, resume, head_parameters, progress, settings
        )


def _fit(
    classifier: Trainable,
    train: Dataset,
    dev: Dataset | None,
    options: TrainingOptions,
    folder: Path | None,
    resume: bool,
    head_parameters: Sequence[nn.Parameter],
    progress: Progress | None,
    settings: Mapping[str, Any] | None,
) -> TrainingResult:
    """Like `fit`, in a folder without another run."""
    with _prepared(classifier, options):
        run = TrainingRun(classifier, train, dev, options, head_parameters)
        fingerprint = _fingerprint(run, classifier, train, dev, options, settings or {})
        try:
            if folder is not None:
                _open_folder(run, folder, fingerprint, resume)
            resumed_from = run.state.step
            if options.tensorboard and current().is_first:
                assert folder is not None
                run.board = _open_board(folder, resumed_from)
            if progress is not None:
                progress.begin(resumed_from, run.schedule.total_steps)
            run.train(progress)
        finally:
            run.close()
            if progress is not None:
                progress.end()
        run.restore_best()
    state = run.state
    per_second = 1 / state.step_seconds if state.step_seconds else 0.0
    return TrainingResult(
        history=tuple(run.history),
        steps=state.step,
        metric=options.metric,
        best_step=state.best_step,
        best_metric=state.best_metric,
        stopped_early=state.stopped_early,
        resumed_from=resumed_from,
        seconds=state.seconds,
        examples_per_second=state.examples * per_second,
        tokens_per_second=state.tokens * per_second,
    )


def _check(
    classifier: Trainable,
    train: Dataset,
    dev: Dataset | None,
    options: TrainingOptions,
    folder: Path | None,
    resume: bool,
) -> None:
    """Refuse invalid arguments before any text is encoded."""
    if options.lr is None:
        raise OptionError(
            "lr is not set; try 3e-4 for LoRA, 2e-5 for all weights, or 1e-3 for a head alone"
        )
    if dev is None and options.patience:
        raise OptionError("patience needs a dev split to evaluate on")
    if folder is None and (resume or options.tensorboard):
        what = "resume" if resume else "tensorboard"
        raise OptionError(f"{what} needs a run folder")
    if options.tensorboard:
        summary_writer()
    check_parallel(options.parallel, current().size)
    check_ordinal(options.ordinal, multi_label=classifier.multi_label)
    check_metric(options.metric, regression=train.has_numbers)
    for name, dataset in (("training", train), ("dev", dev)):
        if dataset is None:
            continue
        if dataset.labels is None or not len(dataset):
            raise MinllamaError(f"{dataset.source}: the {name} texts must have labels")
        check_kind(dataset, classifier)
        if dataset.has_numbers:
            continue
        if list(dataset.label_names) != list(classifier.labels):
            raise MinllamaError(
                f"{dataset.source}: its labels ({', '.join(dataset.label_names)}) differ from "
                f"the classifier's ({', '.join(classifier.labels)})"
            )
        if dataset.multi_label != classifier.multi_label:
            several, one = ("texts", "classifier")[:: 1 if dataset.multi_label else -1]
            raise MinllamaError(
                f"{dataset.source}: the {several} may have several labels each, the {one} one; "
                "make both multi-label, or neither"
            )
    if not any(parameter.requires_grad for parameter in classifier.parameters()):
        raise MinllamaError("nothing to train: no parameter of the classifier requires a gradient")


@contextlib.contextmanager
def _prepared(classifier: Trainable, options: TrainingOptions) -> Iterator[None]:
    """Enable training mode, gradient checkpointing and a separate random state within the block."""
    llamas = [module for module in classifier.modules() if isinstance(module, Llama)]
    flags = [llama.gradient_checkpointing for llama in llamas]
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=gpus), mode_restored(classifier):
        try:
            for llama in llamas:
                llama.gradient_checkpointing |= options.gradient_checkpointing
                if llama.gradient_checkpointing:
                    give_back_freed_memory()
            yield
        finally:
            for llama, flag in zip(llamas, flags, strict=True):
                llama.gradient_checkpointing = flag


def _open_folder(run: TrainingRun, folder: Path, fingerprint: Fingerprint, resume: bool) -> None:
    """Attach the run to `folder`, and resume it if there is a checkpoint.

    Of several processes, only the first one reads and writes there, unless each has its own rows
    of the weights.
    """
    ranks = current()
    ranks.check_equal(fingerprint, lambda first, other: "; ".join(differences(first, other)))

    run.fingerprint, checkpoint = fingerprint, CheckpointFolder(folder)
    if run.rows is not None:
        _check_shared(folder)

    def load() -> None:
        together = ALONE if run.rows is None else ranks
        if loaded := checkpoint.load(fingerprint, run.rows, together):
            run.load(*loaded)

    def start_again() -> None:
        found = checkpoint.state()
        if found is not None and not found.finished:
            raise MinllamaError(
                f"{checkpoint.path} is of a run that was interrupted after {found.step} "
                "steps: resume it, or delete that folder to start again"
            )
        checkpoint.remove()

    def opened() -> None:
        if resume:
            done = run.state.step - (run.state.row is not None)
            run.history = read_metrics(folder, done) if run.state.step else []
        run.metrics = MetricsFile(folder, run.history)

    if resume and run.rows is not None:
        load()
    else:
        ranks.first(load if resume else start_again)
    if ranks.is_first or run.rows is not None:
        run.checkpoint = checkpoint
    ranks.first(opened)
    run.share_loaded()


def _check_shared(folder: Path) -> None:
    """Check that all processes see the first one's folder; they call it together.

    Raises:
        MinllamaError: one does not, or the folder cannot be written.
    """
    # What a kill leaves of it is removed like any begun file.
    probe = folder / f".{METRICS}.{secrets.token_hex(4)}.tmp"

    def write() -> Path:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
        except OSError as error:
            raise MinllamaError(f"cannot write {folder}: {error.strerror or error}") from error
        return probe

    def look(written: Path) -> None:
        if not written.exists():
            raise MinllamaError(
                f"{folder}: process {ranks.rank} of {ranks.size} does not see what the first one "
                "writes there; with --parallel fsdp each writes its part of a checkpoint, so name "
                "an output that all hosts share"
            )

    ranks = current()
    written = ranks.first(write)
    try:
        ranks.each(lambda: look(written))
    finally:
        if ranks.is_first:
            written.unlink(missing_ok=True)


def summary_writer() -> Any:
    """TensorBoard's writer, a class.

    Raises:
        MinllamaError: the library is missing.
    """
    module = "torch.utils.tensorboard"
    return optional_import(module, "tensorboard needs", extra="tensorboard").SummaryWriter


def _open_board(folder: Path, step: int) -> Any:
    # Hides later steps that an interrupted run has written.
    return summary_writer()(str(folder / "tensorboard"), purge_step=step + 1)


def _fingerprint(
    run: TrainingRun,
    classifier: Trainable,
    train: Dataset,
    dev: Dataset | None,
    options: TrainingOptions,
    settings: Mapping[str, Any],
) -> Fingerprint:
    """Values that must be unchanged to resume a run, by their names in error messages."""
    shapes = {n: [run.shapes[n], str(p.dtype)] for n, p in run.parameters.items()}
    frozen = samples_of(cast(nn.Module, classifier), lambda p: not p.requires_grad)
    parts: dict[str, Any] = {
        "options": dataclasses.asdict(options),
        # Values that JSON cannot represent are compared as text.
        "settings": json.loads(json.dumps(settings, default=str)),
        "labels": list(classifier.labels),
        "training texts, their tokens or labels": _digest(
            itertools.chain([run.prompts.digest], _labels(train))
        ),
        "dev texts or labels": (
            None if dev is None else _digest(zip(dev.texts, _labels(dev), strict=True))
        ),
        "trained parameters": digest([json.dumps(shapes).encode()]),
        "weights of the frozen base": digest(frozen),
    }
    return parts


def _labels(dataset: Dataset) -> Iterator[object]:
    """The target of each text, or its classes."""
    if dataset.has_numbers:
        return iter(dataset.targets)
    return map(dataset.classes_of, range(len(dataset)))


def _digest(values: Iterable[object]) -> str:
    return digest(repr(value).encode("utf-8", "backslashreplace") for value in values)
