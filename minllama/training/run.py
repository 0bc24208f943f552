"""One training run, step by step: gradients, update, evaluation, checkpoint.

Its state after any step is plain values and named tensors, and can be restored.
`minllama.training.trainer` sets it up.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from minllama.data import Dataset
from minllama.distributed.gradients import Rows
from minllama.distributed.ranks import ALONE, current
from minllama.distributed.sharded_llama import shards_in
from minllama.distributed.sharding import gradients_of
from minllama.errors import MinllamaError
from minllama.evaluation.metrics import Evaluation
from minllama.evaluation.registry import METRICS
from minllama.evaluation.regression import RegressionEvaluation
from minllama.kernels.hardware import fast_bfloat16
from minllama.options import TrainingOptions
from minllama.training.encoded_texts import EncodedTexts
from minllama.training.malloc import give_back_freed_memory
from minllama.training.objective import Trainable, objective_of
from minllama.training.optimizer import AdamW
from minllama.training.progress import Progress
from minllama.training.run_checkpoint import (
    CheckpointFolder,
    Fingerprint,
    InBackground,
    MetricsFile,
    Row,
    RunState,
    RunTensors,
)
from minllama.training.schedule import Schedule, derived_seed

# Padded tokens that are computed at once. More are slower on a CPU, whose caches they leave, and
# take memory in proportion; the gradients of a step are the same. Where many weights are trained,
# each pass adds to gradients of their size, and fewer passes take less time.
MAX_TOKENS = {"cpu": 768}
MAX_TOKENS_IF_MUCH_IS_TRAINED = {"cpu": 2048}
MOMENT_NAMES = ("exp_avg", "exp_avg_sq")


class TrainingRun:
    """The run of one classifier on one data set.

    Args:
        classifier, train, dev, options, head_parameters: those of `minllama.training.trainer.fit`.

    Attributes:
        parameters: what this process updates, by name: those that are trained, or rows of them.
        shapes: of those that are trained, by name.
        rows: which rows of them this process has; None if it has all.
        prompts: the N training texts, encoded when they are needed.
        schedule: of texts, learning rates and evaluations.
        state: the run's current state.
        history: one row per completed step.
        checkpoint, fingerprint, metrics, board: of the run's folder; None without a folder.
    """

    def __init__(
        self,
        classifier: Trainable,
        train: Dataset,
        dev: Dataset | None,
        options: TrainingOptions,
        head_parameters: Sequence[nn.Parameter],
    ) -> None:
        self._classifier, self._dev, self._options = classifier, dev, options
        trained = {n: p for n, p in classifier.named_parameters() if p.requires_grad}
        self._device = next(iter(trained.values())).device
        self._ranks = current()
        self.prompts = EncodedTexts(train.texts, classifier.encode)
        if self._ranks.size > 1:
            classifier.note_shortened(train.texts)
        lengths = self.prompts.lengths
        self._shortest = int(np.argmin(lengths))
        max_tokens = _max_tokens(classifier, self._device)
        self.schedule = Schedule(lengths, options, max_tokens)
        self._objective = objective_of(train, classifier)
        self._loss = self._objective.loss(train, options, self._device)
        self._texts = train.texts
        self._autocast = _uses_autocast(classifier, options, self._device)
        in_head = {id(parameter) for parameter in head_parameters}
        head = {name for name, parameter in trained.items() if id(parameter) in in_head}
        self._gradients = gradients_of(
            classifier,
            trained,
            self._ranks,
            parallel=options.parallel,
            most_texts=options.batch_size,
            max_tokens=max_tokens,
        )
        self.parameters, of_process = self._gradients.parameters, self._gradients.rows
        self.shapes = {name: list(rows.shape) for name, rows in of_process.items()}
        self.rows: dict[str, Rows] | None = of_process if self._gradients.is_sharded else None
        self._give_back_freed_memory()
        self._optimizer = AdamW(_groups(self.parameters, options, head))
        self.state, self.history = RunState(), list[Row]()
        self._best: dict[str, Tensor] = {}
        self._prior: Tensor | None = None  # (N, C), the classifier's initial predictions
        self.checkpoint: CheckpointFolder | None = None
        self._saving = InBackground()
        self._savers = self._ranks.aside() if self._gradients.is_sharded else ALONE
        self.fingerprint: Fingerprint = {}
        self.metrics: MetricsFile | None = None
        self.board: Any = None

    def train(self, progress: Progress | None) -> None:
        """Run the remaining steps; raises what `fit` raises."""
        self._started = time.perf_counter() - self.state.seconds
        state = self.state
        self._remember_beginning()
        try:
            with self._ranks.interrupts_noted() as is_interrupted:
                while not self._is_done():
                    if state.row is None:
                        self._take_step()
                    row = self._conclude_step()
                    if progress is not None:
                        progress.advance(row)
                    if self._ranks.any(is_interrupted()):
                        raise KeyboardInterrupt
                    if state.step % self._options.save_every == 0 and not self._is_done():
                        self._save()
                if not state.finished:
                    state.finished = True
                    self._save()
                self._saving.wait()
        except KeyboardInterrupt:
            with interrupts_deferred():  # a second Ctrl-C must not interrupt this
                self._save()
                self._saving.wait()
                self._gradients.release()
            raise
        except MinllamaError:
            with contextlib.suppress(MinllamaError):  # the first one is the reason
                self._saving.wait()
            raise

    def load(self, state: RunState, tensors: RunTensors) -> None:
        """Restore a checkpoint's state, in the first process; or in each, its rows."""
        self.state, self._best, self._prior = state, tensors.best, tensors.prior
        self._copy(tensors.weights)
        for name, parameter in self.parameters.items():
            if name in tensors.updates:
                moments = {m: tensors.moments[f"{m}.{name}"] for m in MOMENT_NAMES}
                self._optimizer.state[parameter] = {
                    "step": tensors.updates[name],
                    **{m: tensor.to(self._device) for m, tensor in moments.items()},
                }

    def share_loaded(self) -> None:
        """Send what the first process has loaded to the others."""
        ranks, of_optimizer = self._ranks, self._optimizer.state
        if ranks.size == 1 or self._gradients.is_sharded:
            return

        def loaded() -> tuple[RunState, Tensor | None, dict[str, int]]:
            known = {n: of_optimizer[p] for n, p in self.parameters.items() if p in of_optimizer}
            return self.state, self._prior, {n: state["step"] for n, state in known.items()}

        self.state, self._prior, updates = ranks.first(loaded)
        for name, step in updates.items():
            parameter = self.parameters[name]
            if not ranks.is_first:
                moments = {m: torch.empty_like(parameter) for m in MOMENT_NAMES}
                of_optimizer[parameter] = {"step": step, **moments}
            ranks.send(of_optimizer[parameter][m] for m in MOMENT_NAMES)
        with torch.no_grad():
            ranks.send(self.parameters.values())

    def restore_best(self) -> None:
        """Load the weights of the best evaluation, if they were kept, into the classifier."""
        if self._best:
            self._copy(self._best)
        self._best = {}
        if not self._gradients.is_sharded:
            with torch.no_grad():
                self._ranks.send(self.parameters.values())  # only the first keeps them
        self._optimizer.state.clear()
        self._gradients.release()
        self._give_back_freed_memory()

    def _give_back_freed_memory(self) -> None:
        """Where layers come and go."""
        if self._gradients.is_sharded and self._device.type == "cpu":
            give_back_freed_memory()

    def close(self) -> None:
        """Free the gradients and close files."""
        self._gradients.clear()
        if self.metrics is not None:
            self.metrics.close()
        if self.board is not None:
            self.board.close()

    def _remember_beginning(self) -> None:
        """Mix the untrained classifier's predictions into the targets.

        A resumed run reads them from its checkpoint, since its classifier may already be trained.
        """
        share = self._options.self_distillation
        if not share:
            return
        if self._prior is None:
            assert self.state.step == 0
            self._prior = torch.from_numpy(self._objective.answers(self._texts))
        self._loss.share_with(self._prior, share)

    def _is_done(self) -> bool:
        state = self.state
        last = state.stopped_early or state.step == self.schedule.total_steps
        return last and state.row is None

    def _take_step(self) -> None:
        """Compute one step's gradients and update the weights; `state.row` has the results.

        Raises:
            MinllamaError: loss or gradients are NaN or infinite; the weights are unchanged.
        """
        began = time.perf_counter()
        step, ranks = self.state.step + 1, self._ranks
        texts = self.schedule.texts(step)  # of all processes
        # Dropout's random numbers follow from the step, so no other state needs saving.
        purpose = f"dropout {ranks.rank}" if ranks.rank else "dropout"
        torch.manual_seed(derived_seed(self._options.seed, purpose, step))
        self._gradients.begin()
        batches = self.schedule.shares(step, ranks.size)[ranks.rank]
        (loss,) = ranks.summed([self._backward(batches, self._loss.normalizer(texts))])
        norm = self._gradients.clip(self._options.clip or math.inf)
        self._check_finite(step, loss, norm)
        tokens = sum(self.prompts.lengths[i] for i in texts)
        # An interrupt between two updates would leave an inconsistent state.
        with interrupts_deferred():
            lr = self._set_lr(step)
            self._optimizer.step()
            seconds = time.perf_counter() - began
            self.state.step = step
            self.state.examples += len(texts)
            self.state.tokens += tokens
            self.state.step_seconds += seconds
            self.state.row = {
                "step": step,
                "epoch": round(step / self.schedule.steps_per_epoch, 4),
                "loss": loss,
                "lr": lr,
                "grad_norm": norm,
                "examples_per_second": len(texts) / seconds,
                "tokens_per_second": tokens / seconds,
            }

    def _backward(self, batches: Sequence[list[int]], normalizer: float) -> float:
        """Compute the gradients of this process's batches; returns their part of the step's loss.

        An empty batch takes part in the forward and backward passes of the other processes, with a
        text that does not count.

        Args:
            batches: texts.
            normalizer: the divisor of the losses of all processes.
        """
        total = torch.zeros((), device=self._device)
        for number, batch in enumerate(batches, start=1):
            with self._gradients.accumulating(is_last=number == len(batches)):
                texts, factor = (batch, 1.0) if batch else ([self._shortest], 0.0)
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
                    logits = self._gradients.logits([self.prompts[i] for i in texts])
                loss = self._loss.summed(logits, texts) * factor / normalizer
                loss.backward()
            total += loss.detach()
        return float(total)

    def _conclude_step(self) -> Row:
        """Evaluate if it is due, and write the step's row."""
        state = self.state
        assert state.row is not None
        row, evaluation = state.row, None
        if self._dev is not None and self.schedule.evaluates_after(state.step):
            evaluation = self._objective.evaluate(self._dev)
            row = {**row, **self._objective.dev_row(evaluation)}
        row = {**row, "seconds": time.perf_counter() - self._started}
        with interrupts_deferred():
            if evaluation is not None:
                self._judge(evaluation)
            if self.metrics is not None:
                self.metrics.append(row)
            self.history.append(row)
            state.row = None
        if self.board is not None:
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(name, value, state.step)
        return row

    def _judge(self, evaluation: Evaluation | RegressionEvaluation) -> None:
        """Keep the weights if they are the best so far; else count toward `patience`."""
        state, options = self.state, self._options
        # By the first process's arithmetic, so that all stop at the same step.
        value = self._ranks.first(lambda: self._objective.merit(evaluation, options.metric))
        known = {metric.name: metric for metric in METRICS}
        sign = -1 if known[options.metric].less_is_better else 1
        if state.best_metric is None or sign * value > sign * state.best_metric:
            state.best_step, state.best_metric, state.without_gain = state.step, value, 0
            if options.keep == "best" and (self._ranks.is_first or self._gradients.is_sharded):
                self._best = {
                    name: parameter.detach().to("cpu", copy=True)
                    for name, parameter in self.parameters.items()
                }
        else:
            state.without_gain += 1
            state.stopped_early = 0 < options.patience <= state.without_gain

    def _set_lr(self, step: int) -> float:
        """Set each group's learning rate for this step; return that of all but the head."""
        factor = self.schedule.lr_factor(step)
        for group in self._optimizer.param_groups:
            group["lr"] = group["highest_lr"] * factor
        assert self._options.lr is not None
        return self._options.lr * factor

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = "the loss" if not math.isfinite(loss) else "a gradient"
        lr, hint = self._options.lr, ""
        if self.checkpoint is not None and self.checkpoint.path.exists():
            hint = f"; {self.checkpoint.path} has the state before it"
        raise MinllamaError(
            f"training has diverged: {what} is not a finite number at step {step} of "
            f"{self.schedule.total_steps}; use a learning rate (--lr) below {lr:g}, or float32 "
            f"without autocast{hint}"
        )

    def _copy(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])

    def _save(self) -> None:
        """Write a checkpoint; where weights are divided, in the background."""
        self.state.seconds = time.perf_counter() - self._started
        if self.checkpoint is None:
            return
        if self.metrics is not None:
            self.metrics.sync()
        if not self._gradients.is_sharded:
            self.checkpoint.save(self.state, self._tensors(), self.fingerprint)
            return
        self._saving.wait()  # one copy of the tensors at a time
        checkpoint, state, fingerprint = (self.checkpoint, replace(self.state), self.fingerprint)
        tensors = self._tensors().copied()
        self._saving.begin(lambda: checkpoint.save(state, tensors, fingerprint, self._savers))

    def _tensors(self) -> RunTensors:
        tensors = RunTensors({name: p.detach() for name, p in self.parameters.items()})
        for name, parameter in self.parameters.items():
            if of_optimizer := self._optimizer.state.get(parameter):
                tensors.updates[name] = of_optimizer["step"]
                for moment in MOMENT_NAMES:
                    tensors.moments[f"{moment}.{name}"] = of_optimizer[moment]
        tensors.best, tensors.prior, tensors.rows = self._best, self._prior, self.rows
        return tensors


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # another thread, or another handler: no KeyboardInterrupt arrives here
        return
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if received:
        raise KeyboardInterrupt


def _max_tokens(classifier: Trainable, device: torch.device) -> float:
    """The maximum number of padded tokens per forward pass in training."""
    shards = shards_in(cast(nn.Module, classifier))
    sizes = [
        (p.requires_grad, math.prod(shards[name].rows.shape) if name in shards else p.numel())
        for name, p in classifier.named_parameters()
    ]
    sizes += [(False, buffer.numel()) for buffer in classifier.buffers()]  # quantized weights
    trained, frozen = (
        sum(n for grad, n in sizes if grad == is_trained) for is_trained in (True, False)
    )
    limits = MAX_TOKENS_IF_MUCH_IS_TRAINED if 5 * trained > frozen else MAX_TOKENS
    return limits.get(device.type, math.inf)


def _groups(
    parameters: dict[str, nn.Parameter], options: TrainingOptions, head: Collection[str]
) -> list[dict[str, Any]]:
    """Parameters by learning rate and weight decay, which vectors (norms, biases) do not get."""
    assert options.lr is not None
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        lr = options.lr
        if name in head and options.head_lr is not None:
            lr = options.head_lr
        decay = options.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    return [
        {"params": chosen, "lr": lr, "highest_lr": lr, "weight_decay": decay}
        for (lr, decay), chosen in groups.items()
    ]


def _uses_autocast(classifier: Trainable, options: TrainingOptions, device: torch.device) -> bool:
    if options.autocast != "auto":
        return options.autocast == "on"
    weights = [p for p in classifier.parameters() if p.is_floating_point()]
    return all(p.dtype == torch.float32 for p in weights) and fast_bfloat16(device)
