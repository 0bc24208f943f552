"""Save and restore a training run: a checkpoint to resume from, and one line of metrics per step.

A checkpoint is a folder of safetensors and JSON, written atomically; nothing in it is executed.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from minllama.atomic import (
    atomic_file,
    atomic_folder,
    is_being_written,
    remove,
    sha256_of,
    temporaries,
)
from minllama.errors import CheckpointError, MinllamaError
from minllama.text import cut

CHECKPOINT, METRICS = "checkpoint", "metrics.jsonl"
STATE, WEIGHTS, MOMENTS = "state.json", "weights.safetensors", "optimizer.safetensors"
PRIOR = "prior.safetensors"
FORMAT = 2  # the second has a digest of the state itself
# These may change when a run is resumed: they do not affect its results.
NEUTRAL_OPTIONS = ("no_calibration", "save_every", "tensorboard")

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
    """The tensors of a run, each kind by the parameter's name.

    Attributes:
        weights: the parameters that are trained.
        moments: of the optimizer: `exp_avg.` or `exp_avg_sq.` and the parameter's name.
        updates: how often the optimizer has updated each.
        best: the weights of the best evaluation; empty before the first.
        prior: (N, C) probabilities of the training texts before the first step; None if targets do
            not use them.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor] = field(default_factory=dict)
    updates: dict[str, int] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    prior: Tensor | None = None


class CheckpointFolder:
    """The checkpoint of the run in `folder`.

    A SIGKILL during a save leaves either the previous checkpoint or the new one. The best weights
    so far, if unchanged, are hard-linked instead of written again.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / CHECKPOINT
        self._written: dict[str, dict[str, Any]] = {}  # size and hash of files that may be reused

    def save(self, state: RunState, tensors: RunTensors, fingerprint: Fingerprint) -> None:
        """Replace the checkpoint.

        Raises:
            MinllamaError: it cannot be written; the previous one is untouched.
        """
        lasting: dict[str, dict[str, Tensor]] = {}
        if tensors.best:
            lasting[f"best-{state.best_step}.safetensors"] = tensors.best
        if tensors.prior is not None:
            lasting[PRIOR] = {"prior": tensors.prior}
        unchanged = {n for n in lasting if n in self._written and (self.path / n).is_file()}
        contents = {WEIGHTS: tensors.weights, MOMENTS: tensors.moments}
        contents |= {name: lasting[name] for name in lasting if name not in unchanged}
        with atomic_folder(self.path, replaces=lambda name: name not in unchanged) as staging:
            files = {name: self._written[name] for name in unchanged}
            for name, content in contents.items():
                _write_tensors(staging / name, content)
                files[name] = _description(staging / name)
            raw = {
                "format": FORMAT,
                "state": dataclasses.asdict(state),
                "updates": tensors.updates,
                "files": files,
                "fingerprint": fingerprint,
            }
            text = json.dumps(sealed(raw), indent=1, allow_nan=False)
            (staging / STATE).write_text(text + "\n", encoding="utf-8")
            for name in contents:  # the library makes files that only their owner can read
                shutil.copymode(staging / STATE, staging / name)
        self._written = files

    def load(self, fingerprint: Fingerprint) -> tuple[RunState, RunTensors] | None:
        """Load the saved run; None without a checkpoint.

        Raises:
            CheckpointError: the checkpoint is damaged, or from a run with other options or data;
                the message lists the differences.
        """
        self.recover()
        if not self.path.exists():
            return None
        raw = self._raw()
        if changes := differences(raw["fingerprint"], fingerprint):
            raise CheckpointError(
                f"{self.path}: cannot resume: {'; '.join(changes)}; resume with the settings of "
                "the run, or start again in another folder"
            )
        state, tensors = self._content(raw)
        self._written = dict(raw["files"])
        return state, tensors

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

    def _content(self, raw: Mapping[str, Any]) -> tuple[RunState, RunTensors]:
        with self._damage():
            state = _run_state(raw)
            best_name = f"best-{int(state.best_step or 0)}.safetensors"
            # There are no best weights before the first evaluation, or if the last ones are kept.
            lasting = [name for name in (best_name, PRIOR) if name in raw["files"]]
            read = {}
            for name in (WEIGHTS, MOMENTS, *lasting):
                if _description(self.path / name) != raw["files"][name]:
                    raise ValueError(f"{name} differs from what was written")
                read[name] = _read_tensors(self.path / name)
            updates = {str(name): int(count) for name, count in raw["updates"].items()}
            best, prior = read.get(best_name, {}), read.get(PRIOR, {}).get("prior")
            return state, RunTensors(read[WEIGHTS], read[MOMENTS], updates, best, prior)

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


def _whole_step(path: Path) -> int | None:
    """The step of a checkpoint under another name; None if it is incomplete."""
    folder = CheckpointFolder(path.parent)
    folder.path = path
    try:
        return folder._content(folder._raw())[0].step
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


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(on_cpu, path)
    except SafetensorError as error:  # of a full disk
        raise OSError(str(error)) from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    # Copies: a memory-mapped file would keep a replaced checkpoint on the disk.
    return {name: torch.clone(tensor) for name, tensor in load_file(path).items()}
