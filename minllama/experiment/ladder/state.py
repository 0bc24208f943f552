"""What an interrupted run of `--method auto` needs to go on: plain JSON, arrays and classifiers.

All of it is in the folder `ladder` of the run's output: `state.json`, and for each rung a folder
with its scores, its classifier, and the checkpoints of its training. It is removed at the end.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from minllama.atomic import atomic_file
from minllama.errors import CheckpointError
from minllama.experiment.ladder.scoring import Scores
from minllama.training.run_checkpoint import METRICS, differences

LADDER = "ladder"
STATE_FILE = "state.json"
WHOLE = "all"  # the training on all rows


def has_ladder(output: Path) -> bool:
    """Whether an output folder has the ladder of an interrupted run."""
    return (output / LADDER / STATE_FILE).is_file()


# What NumPy raises of a damaged file, and Python's own parser, by which it reads a header.
UNREADABLE = (
    *(OSError, ValueError, TypeError, EOFError, MemoryError, ArithmeticError),
    *(LookupError, RecursionError, SyntaxError, TokenError),
)


class RungFolder:
    """The files of one rung.

    Args:
        path: need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def run(self, name: str) -> Path:
        """The folder of a training."""
        folder = self._path / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def classifier(self) -> Path:
        """The folder of its classifier."""
        return self._path / "classifier"

    @property
    def metrics(self) -> Path | None:
        """The metrics of its training on all rows; None without one."""
        path = self._path / WHOLE / METRICS
        return path if path.exists() else None

    def plan(self) -> dict[str, int] | None:
        """What was planned; None if nothing was."""
        path = self._path / "plan.json"
        if not path.exists():
            return None
        content = _read(path)
        if not all(type(value) is int for value in content.values()):
            raise _damaged(path, "a plan of something else than numbers")
        return content

    def save_plan(self, plan: Mapping[str, int]) -> None:
        _write(self._path / "plan.json", plan)

    def scores(self, empty: Scores) -> Scores:
        """The scores so far; `empty` without any."""
        path = self._path / "scores.npy"
        if not path.exists():
            return empty
        try:
            with path.open("rb") as file:
                # The library makes room for what the header says before it looks at the data.
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                if shape != empty.shape or dtype != empty.dtype:
                    raise ValueError(f"an array of shape {shape}")
                file.seek(0)
                scores = np.load(file, allow_pickle=False)
        except UNREADABLE as error:
            raise _damaged(path, error) from error
        return np.asarray(scores, dtype=np.float32)

    def save_scores(self, scores: Scores) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._path / "scores.npy") as path, path.open("wb") as file:
            np.save(file, scores, allow_pickle=False)


class LadderState:
    """Which rungs are done.

    Args:
        folder: the ladder's.
        settings: of the run; another run's state is refused.
        resume: read what is there; otherwise begin.

    Attributes:
        rungs: name -> what is known of a rung that is done.
        starting: the best single head, as plain values.
        spent: seconds of the run so far.

    Raises:
        CheckpointError: the state is damaged, or of another run.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self._path = folder / STATE_FILE
        self._settings = json.loads(json.dumps(settings, default=str))
        self.rungs: dict[str, dict[str, Any]] = {}
        self.starting: dict[str, Any] | None = None
        self.spent = 0.0
        if resume and self._path.exists():
            self._load(_read(self._path))

    def _load(self, content: Mapping[str, Any]) -> None:
        try:
            if changes := differences(content["settings"], self._settings):
                raise CheckpointError(
                    f"{self._path.parent}: cannot resume: {'; '.join(changes)}; resume with the "
                    "settings of the run, or start again with --force"
                )
            self.rungs = {str(name): dict(rung) for name, rung in content["rungs"].items()}
            self.starting, self.spent = content["starting"], float(content["spent"])
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise _damaged(self._path, error) from error

    def save(self, spent: float) -> None:
        """Write it, with the seconds of the run so far."""
        self.spent = spent
        content = {
            "settings": self._settings,
            "rungs": self.rungs,
            "starting": self.starting,
            "spent": spent,
        }
        _write(self._path, content)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _damaged(path: Path, error: object) -> CheckpointError:
    return CheckpointError(f"{path}: damaged ({error}); start again with --force")
