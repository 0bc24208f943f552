"""The folder of an experiment: what an earlier run left there, and whether it can be written.

Knows nothing of how a classifier comes about.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from minllama.atomic import atomic_folder
from minllama.classifier.description import CLASSIFIER_FILE
from minllama.errors import MinllamaError, OptionError
from minllama.experiment.fitting import LAYER_FILE, TRAINED
from minllama.training_state import CHECKPOINT, METRICS, remove_checkpoint

REPORT_FILE = "metrics.json"


def check_output(output: Path, method: str, *, resume: bool, force: bool) -> None:
    """Refuse to lose an earlier run, or to go on with none.

    Raises:
        MinllamaError: says what is there, or what is not.
    """
    has_checkpoint = (output / CHECKPOINT).exists()
    if resume and force:
        raise OptionError("--resume goes on with a run and --force replaces it; give one of them")
    if resume:
        if method not in TRAINED:
            raise OptionError(
                f"--resume goes on with a training, and {method} has none; leave it away"
            )
        if not has_checkpoint:
            raise MinllamaError(
                f"{output}: there is no checkpoint to go on from; leave --resume away"
            )
        return
    old = (CHECKPOINT, METRICS, CLASSIFIER_FILE, REPORT_FILE)
    if not force and any((output / name).exists() for name in old):
        what = "--resume goes on with it, " if has_checkpoint else ""
        raise MinllamaError(f"{output}: an earlier run is there; {what}--force replaces it")


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """The folder is there, and can be replaced; one that was made for nothing goes again.

    Raises:
        MinllamaError: it cannot be written; better now than after hours of work.
    """
    was_there = folder.exists()
    with atomic_folder(folder):
        pass
    try:
        yield
    except BaseException:
        if not (folder / CHECKPOINT).exists():
            (folder / LAYER_FILE).unlink(missing_ok=True)  # nothing can be gone on with
        if not was_there:
            with contextlib.suppress(OSError):  # it holds something by now
                folder.rmdir()
        raise


def remove_earlier_run(output: Path) -> None:
    """What could be taken for this run's; classifier and report stay until they are replaced."""
    for name in (LAYER_FILE, METRICS):
        (output / name).unlink(missing_ok=True)
    remove_checkpoint(output)
