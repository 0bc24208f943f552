"""Save and restore a training run: a checkpoint to resume from, and one line of metrics per step.

A checkpoint is a folder of safetensors and JSON, written atomically; nothing in it is executed.
Where weights are divided among processes, each has files of its own there, and one manifest says
which belong together.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from minllama.atomic import (
    atomic_file,
    atomic_folder,
    is_being_written,
    remove,
    sha256_of,
    temporaries,
)
from minllama.distributed.gradients import Rows
from minllama.distributed.ranks import ALONE, Ranks
from minllama.errors import CheckpointError, MinllamaError
from minllama.text import cut
from minllama.training.tensor_files import file_name, files_of, read_tensors, write_tensors

CHECKPOINT, METRICS = "checkpoint", "metrics.jsonl"
STATE, WEIGHTS, MOMENTS, PRIOR = "state.json", "weights", "optimizer", "prior"
FORMAT = 2  # the second has a digest of the state itself
# These may change when a run is resumed: they do not affect its results.
NEUTRAL_OPTIONS = ("no_calibration", "parallel", "save_every", "tensorboard")

Fingerprint: TypeAlias = Mapping[str, Any]
Row: TypeAlias = dict[str, Any]


@dataclass
class RunState:
    """The state of a run, without its tensors.

    Order, learning rate and dropout follow from the step alone; see `minllama.training.schedule`.

    Attributes:
        step: how many are done.
        row: the last step's metrics while its evaluation is pending; else None.
        best_step, best_metric: of the best evaluation so far; None before the first one.
        without_gain: evaluations since.
        stopped_early: they were too many.
        finished: no step is left to do.
        examples, tokens: seen so far.
        step_seconds: spent in steps.
        seconds: spent in all, evaluations included.
    """

    step: int = 0
    row: Row | None = None
    best_step: int | None = None
    best_metric: float | None = None
    without_gain: int = 0
    stopped_early: bool = False
    finished: bool = False
    examples: int = 0
    tokens: int = 0
    step_seconds: float = 0.0
    seconds: float = 0.0


@dataclass
class RunTensors:
    """The tensors of a run, each kind by the parameter's name; or one process's rows of them.

    Attributes:
        weights: the parameters that are trained.
        moments: of the optimizer: `exp_avg.` or `exp_avg_sq.` and the parameter's name.
        updates: how often the optimizer has updated each.
        best: the weights of the best evaluation; empty before the first.
        prior: (N, C) probabilities of the training texts before the first step; None if targets do
            not use them.
        rows: which rows of each parameter these are; None if all are whole.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor] = field(default_factory=dict)
    updates: dict[str, int] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    prior: Tensor | None = None
    rows: Mapping[str, Rows] | None = None

    def copied(self) -> "RunTensors":
        """The same in memory of its own on the CPU, but for the best weights, which are."""

        def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

        return dataclasses.replace(self, weights=copies(self.weights), moments=copies(self.moments))


class CheckpointFolder:
    """The checkpoint of the run in `folder`.

    A SIGKILL during a save leaves either the previous checkpoint or the new one. The best weights
    so far, if unchanged, are hard-linked instead of written again.

    Processes that have rows of the weights save and load together, each its own.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / CHECKPOINT
        self._written: dict[str, dict[str, Any]] = {}  # size and hash of files that may be reused

    def save(
        self,
        state: RunState,
        tensors: RunTensors,
        fingerprint: Fingerprint,
        ranks: Ranks = ALONE,
    ) -> None:
        """Replace the checkpoint.

        Args:
            state, tensors, fingerprint: of the run.
            ranks: the processes that call this together, each with its rows.

        Raises:
            MinllamaError: it cannot be written; the previous one is untouched.
        """
        lasting = {} if not tensors.best else {f"best-{state.best_step}": tensors.best}
        if tensors.prior is not None:
            lasting[PRIOR] = {"prior": tensors.prior}
        contents = {WEIGHTS: tensors.weights, MOMENTS: tensors.moments, **lasting}
        names = {kind: _file_of(kind, tensors, ranks) for kind in contents}
        with ExitStack() as stack:
            staging, unchanged = ranks.first(lambda: self._begin(stack, lasting, names))
            new = {names[k]: c for k, c in contents.items() if files_of(k, unchanged) == []}
            if not ranks.is_first:
                new.pop(names.get(PRIOR, ""), None)
            written = ranks.each(lambda: _write(staging, new, tensors))
            files = {name: self._written[name] for name in unchanged}
            for of_process in ranks.collected(written):
                files |= of_process

            def finish() -> None:
                raw = {
                    "format": FORMAT,
                    "state": dataclasses.asdict(state),
                    "updates": tensors.updates,
                    "files": files,
                    "fingerprint": fingerprint,
                }
                text = json.dumps(sealed(raw), indent=1, allow_nan=False)
                (staging / STATE).write_text(text + "\n", encoding="utf-8")
                for name in files.keys() - unchanged:  # only their owner can read them
                    shutil.copymode(staging / STATE, staging / name)
                stack.close()

            ranks.first(finish)
        self._written = files

    def _begin(
        self, stack: ExitStack, lasting: Iterable[str], names: Mapping[str, str]
    ) -> tuple[Path, set[str]]:
        """Open the folder of a save; returns it, and the files of the last one that stay."""
        unchanged: set[str] = set()
        for kind in lasting:
            parts = files_of(kind, self._written)
            if names[kind] in parts and all((self.path / name).is_file() for name in parts):
                unchanged |= set(parts)
        folder = atomic_folder(self.path, replaces=lambda name: name not in unchanged)
        return stack.enter_context(folder), unchanged

    def load(
        self,
        fingerprint: Fingerprint,
        rows: Mapping[str, Rows] | None = None,
        ranks: Ranks = ALONE,
    ) -> tuple[RunState, RunTensors] | None:
        """Load the saved run; None without a checkpoint.

        Args:
            fingerprint: of the run.
            rows: those of each parameter to read, by any number of processes; None for all.
            ranks: the processes that call this together, each for its rows.

        Raises:
            CheckpointError: the checkpoint is damaged, or from a run with other options or data;
                the message lists the differences.
        """
        raw = ranks.first(lambda: self._of_run(fingerprint))
        if raw is None:
            return None
        ranks.each(lambda: self._check_files(raw, ranks))
        found = ranks.each(lambda: self._content(raw, rows))
        self._written = dict(raw["files"])
        return found

    def _of_run(self, fingerprint: Fingerprint) -> dict[str, Any] | None:
        """The manifest, if it is of this run."""
        self.recover()
        if not self.path.exists():
            return None
        raw = self._raw()
        if changes := differences(raw["fingerprint"], fingerprint):
            raise CheckpointError(
                f"{self.path}: cannot resume: {'; '.join(changes)}; resume with the settings of "
                "the run, or start again in another folder"
            )
        return raw

    def state(self) -> RunState | None:
        """The state of the saved run, without its tensors; None without a checkpoint.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        self.recover()
        if not self.path.exists():
            return None
        raw = self._raw()
        with self._damage():
            return _run_state(raw)

    def recover(self) -> None:
        """Remove files of killed saves, but not those of running processes.

        On a system that cannot swap two names, the checkpoint has a temporary name for an instant
        of a save; a complete one gets its name back.
        """
        parent = Path(os.path.realpath(self.path)).parent
        if not parent.is_dir():
            return
        begun = [*temporaries(parent / CHECKPOINT), *temporaries(parent / METRICS)]
        stale = [path for path in begun if not is_being_written(path)]
        if not self.path.exists():
            whole = [(step, path) for path in stale if (step := _whole_step(path)) is not None]
            if whole:
                _, newest = max(whole)
                newest.rename(self.path)
                stale.remove(newest)
        for path in stale:
            remove(path)

    def remove(self) -> None:
        """Delete the checkpoint, if there is one."""
        self.recover()
        shutil.rmtree(self.path, ignore_errors=True)
        self._written = {}

    def _raw(self) -> dict[str, Any]:
        with self._damage():
            raw = json.loads((self.path / STATE).read_text(encoding="utf-8"))
            if raw["format"] != FORMAT:
                raise CheckpointError(
                    f"{self.path}: written by another version of minllama; delete it to start again"
                )
            parts = ("state", "updates", "files", "fingerprint")
            if not all(isinstance(raw[part], dict) for part in parts):
                raise ValueError(f"{STATE} differs from what was written")
            if raw["sha256"] != sealed(raw)["sha256"]:
                raise ValueError(f"{STATE} differs from what was written (its SHA-256)")
            return dict(raw)

    def _check_files(self, raw: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
        """Compare files with the manifest, each as a whole by one of the processes."""
        with self._damage():
            parts = _parts(raw)
            for kind in (WEIGHTS, MOMENTS):
                if not parts[kind]:
                    raise KeyError(file_name(kind))
            for name in ranks.part([name for names in parts.values() for name in names]):
                if _description(self.path / name) != raw["files"][name]:
                    raise ValueError(f"{name} differs from what was written")

    def _content(
        self, raw: Mapping[str, Any], rows: Mapping[str, Rows] | None = None
    ) -> tuple[RunState, RunTensors]:
        """The state and the tensors of files that were checked."""
        with self._damage():
            read = {
                kind: read_tensors(
                    [self.path / name for name in names], lambda name: rows_of(rows, name)
                )
                for kind, names in _parts(raw).items()
            }
            updates = {str(name): int(count) for name, count in raw["updates"].items()}
            weights, moments, best, prior = read.values()
            tensors = RunTensors(weights, moments, updates, best, prior.get("prior"), rows)
            return _run_state(raw), tensors

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Report errors as missing or changed files."""
        from safetensors import SafetensorError

        try:
            yield
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        except KeyError as error:
            reason = f"{error} is missing"
        except (ValueError, TypeError, OverflowError, RecursionError, SafetensorError) as error:
            reason = str(error)
        else:
            return
        raise CheckpointError(
            f"{self.path}: the checkpoint is damaged ({reason}); delete it to start again"
        )


class MetricsFile:
    """`metrics.jsonl` of a run: one line per step, written after it.

    Args:
        folder: of the run.
        rows: the initial content, which replaces the file's.

    Raises:
        MinllamaError: it cannot be written.
    """

    def __init__(self, folder: Path, rows: Sequence[Row] = ()) -> None:
        self.path = folder / METRICS
        with atomic_file(self.path) as temporary:
            temporary.write_text("".join(_line(row) for row in rows), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        with self._one_line_errors():
            self._file.write(_line(row))
            self._file.flush()

    def sync(self) -> None:
        """Sync the file to disk: the checkpoint must not be ahead of it."""
        with self._one_line_errors():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    @contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MinllamaError(f"cannot write {self.path}: {error.strerror or error}") from error


def read_metrics(folder: str | os.PathLike[str], steps: int | None = None) -> list[Row]:
    """The rows of a run's `metrics.jsonl`, up to the first incomplete line.

    Args:
        folder: of the run.
        steps: number of steps to read, all of which must exist; None for all rows.

    Raises:
        CheckpointError: rows are missing, or the file cannot be read.
    """
    path, rows = Path(folder) / METRICS, list[Row]()
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if steps != 0 else []
        for line in lines:
            row = json.loads(line)
            if row["step"] != len(rows) + 1:
                break
            rows.append(row)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        pass  # a line truncated by a kill: later lines belong to steps that are repeated
    if steps is not None and len(rows) < steps:
        raise CheckpointError(
            f"{path}: it has only {len(rows)} of the checkpoint's {steps} steps; restore it, or "
            f"delete {path.parent / CHECKPOINT} to start again"
        )
    return rows[:steps]


def remove_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Delete the checkpoint of the run in `folder`, after its result has been saved."""
    CheckpointFolder(Path(folder)).remove()


def has_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether there is a checkpoint in `folder`, which no run is writing to at this time."""
    checkpoint = CheckpointFolder(Path(folder))
    checkpoint.recover()
    return checkpoint.path.exists()


def saved_step(folder: str | os.PathLike[str]) -> int | None:
    """The number of steps of the checkpoint in `folder`; None without a checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    state = CheckpointFolder(Path(folder)).state()
    return None if state is None else state.step


def differences(old: Fingerprint, new: Fingerprint) -> list[str]:
    """The differences between two fingerprints, for an error message."""
    return list(dict.fromkeys(_differences(old, new)))  # an option may also be among the settings


def _differences(old: Fingerprint, new: Fingerprint, *, inside: bool = False) -> Iterator[str]:
    for name in dict.fromkeys((*old, *new)):
        was, is_ = old.get(name), new.get(name)
        if was == is_ or name in NEUTRAL_OPTIONS:
            continue
        if isinstance(was, Mapping) and isinstance(is_, Mapping):
            yield from _differences(was, is_, inside=True)
        elif inside and not _is_digest(was):
            yield f"{name} was {_shown(was)}, now {_shown(is_)}"
        else:
            yield f"{name} differ"


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def digest(parts: Iterable[bytes]) -> str:
    """A hash of many parts, in their order."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "big"))
        total.update(part)
    return total.hexdigest()


def _shown(value: Any) -> str:
    return cut(json.dumps(value, ensure_ascii=False))


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _run_state(raw: Mapping[str, Any]) -> RunState:
    state = RunState(**raw["state"])
    if type(state.step) is not int or not isinstance(state.row, dict | None):
        raise ValueError(f"{STATE} differs from what was written")
    return state


def _parts(raw: Mapping[str, Any]) -> dict[str, list[str]]:
    """The files of each kind of tensors: weights, moments, best weights, prior."""
    # There are no best weights before the first evaluation, or if the last ones are kept.
    best = f"best-{int(_run_state(raw).best_step or 0)}"
    return {kind: files_of(kind, raw["files"]) for kind in (WEIGHTS, MOMENTS, best, PRIOR)}


def _whole_step(path: Path) -> int | None:
    """The step of a checkpoint under another name; None if it is incomplete."""
    folder = CheckpointFolder(path.parent)
    folder.path = path
    try:
        raw = folder._raw()
        folder._check_files(raw)
        with folder._damage():
            return _run_state(raw).step
    except CheckpointError:
        return None


def sealed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The content of state.json with the SHA-256 of all else in it."""
    content = {name: value for name, value in raw.items() if name != "sha256"}
    # As it will be read: keys are strings there, and tuples lists.
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return {**content, "sha256": sha256_of(text)}


def _description(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def rows_of(rows: Mapping[str, Rows] | None, name: str) -> Rows | None:
    """The rows of a parameter, or of one of its moments; None for all."""
    if rows is None:
        return None
    return rows.get(name) or rows.get(name.partition(".")[2])


def _file_of(kind: str, tensors: RunTensors, ranks: Ranks) -> str:
    """The file for one kind of this process's tensors."""
    is_whole = tensors.rows is None or kind == PRIOR
    return file_name(kind) if is_whole else file_name(kind, ranks.rank, ranks.size)


def _write(
    staging: Path, contents: Mapping[str, Mapping[str, Tensor]], tensors: RunTensors
) -> dict[str, dict[str, Any]]:
    """Write this process's files; returns their descriptions.

    Raises:
        MinllamaError: they cannot be written.
    """
    try:
        for name, content in contents.items():
            rows = None
            if tensors.rows is not None and name != file_name(PRIOR):
                rows = {t: of for t in content if (of := rows_of(tensors.rows, t)) is not None}
            write_tensors(staging / name, content, rows)
        return {name: _description(staging / name) for name in contents}
    except OSError as error:
        raise MinllamaError(f"cannot write {staging}: {error.strerror or error}") from error


class InBackground:
    """Does one thing after another in a thread: at most one at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Start to work, when what was begun before is done; raises its error."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        # A process does not wait for it when it ends: others may be dead, and never answer.
        self._thread = threading.Thread(target=run, name="minllama-checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for what was begun, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
