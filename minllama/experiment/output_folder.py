"""Check the output folder of an experiment: earlier runs in it, and whether it is writable."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from minllama.atomic import atomic_folder, check_replaceable
from minllama.classification.storage.manifest import CLASSIFIER_FILE
from minllama.classification.storage.save_load import files_to_replace
from minllama.errors import MinllamaError, OptionError
from minllama.evaluation.report.files import METRICS_FILE, REPORT_FILES
from minllama.experiment.build import AUTO, LAYER_FILE, TRAINED
from minllama.experiment.ladder.state import LADDER, has_ladder
from minllama.training.run_checkpoint import CHECKPOINT, METRICS, has_checkpoint, remove_checkpoint

# Files about a classifier's training and evaluation, which are moved with it.
RECORDS = (*REPORT_FILES, METRICS)
RESULTS = (CLASSIFIER_FILE, METRICS_FILE)  # of a finished run


def check_output(output: Path, method: str, *, resume: bool, force: bool) -> bool:
    """Refuse to overwrite an earlier run, or to resume without one.

    Returns:
        Whether there is a checkpoint to resume from. False also if a
        run was interrupted before its first checkpoint: it then starts from the beginning.

    Raises:
        MinllamaError: there is an earlier run, or nothing to resume.
    """
    check_replaceable(output)
    if resume and force:
        raise OptionError("--resume continues a run and --force replaces it; give one of them")
    if resume:
        return _is_resumable(output, method)
    if force:
        return False
    if (output / CHECKPOINT).exists() or has_ladder(output):
        raise MinllamaError(
            f"{output}: contains an earlier run; --resume continues it, --force replaces it"
        )
    if any((output / name).exists() for name in RESULTS):
        raise MinllamaError(f"{output}: contains an earlier run; --force replaces it")
    if (output / METRICS).exists():
        raise MinllamaError(f"{output}: contains a run without a checkpoint; --force starts again")
    strangers = files_to_replace(output, is_own=method == "full")
    strangers += [name for name in REPORT_FILES if (output / name).exists()]
    if strangers:
        raise MinllamaError(
            f"{output}: {', '.join(strangers)} would be replaced, but are not part of a run; "
            "name another folder, or give --force"
        )
    return False


def is_begun(output: Path, method: str) -> bool:
    """Whether a run with a training loop was begun in the folder, and not finished."""
    if method not in TRAINED:
        return False
    has_begun = any((output / name).exists() for name in (METRICS, LAYER_FILE))
    is_finished = any((output / name).exists() for name in RESULTS)
    return has_checkpoint(output) or (has_begun and not is_finished)


def check_not_base(output: Path, model: str | None) -> None:
    """Refuse to write into the base model's folder: its files would be mistaken for the run's.

    Raises:
        MinllamaError: it is the base model's folder.
    """
    if model is None:
        return
    path = Path(model).expanduser()
    folder = path.parent if path.is_file() else path
    if folder.is_dir() and folder.resolve() == output.resolve():
        raise MinllamaError(f"{output}: contains the base model; name another folder")


def _is_resumable(output: Path, method: str) -> bool:
    if method not in (*TRAINED, AUTO):
        raise OptionError(
            f"--resume is for methods with a training loop, and {method} has none; omit it"
        )
    if has_ladder(output) if method == AUTO else has_checkpoint(output):
        return True
    if has_ladder(output) or has_checkpoint(output):
        raise MinllamaError(
            f"{output}: contains a run of another method; resume it with --method "
            f"{AUTO if has_ladder(output) else 'lora or full'}, or start again with --force"
        )
    if any((output / name).exists() for name in RESULTS):
        raise MinllamaError(
            f"{output}: contains an earlier run without a checkpoint to resume from; --force "
            "replaces it"
        )
    if not any((output / name).exists() for name in (METRICS, LAYER_FILE)):
        raise MinllamaError(f"{output}: no checkpoint to resume from; omit --resume")
    return False


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Check that the folder can be written; a folder created for the check is removed.

    Raises:
        MinllamaError: it cannot be written; better now than after hours of work.
    """
    existed = folder.exists()
    with atomic_folder(folder):
        pass
    try:
        yield
    except BaseException:
        if not (folder / CHECKPOINT).exists():
            (folder / LAYER_FILE).unlink(missing_ok=True)  # nothing to resume
        if not existed:
            with contextlib.suppress(OSError):  # it is no longer empty
                folder.rmdir()
        raise


def remove_earlier_run(output: Path) -> None:
    """Remove files of an earlier run; classifier and report stay until they are replaced."""
    for name in (LAYER_FILE, METRICS):
        (output / name).unlink(missing_ok=True)
    remove_checkpoint(output)
    shutil.rmtree(output / LADDER, ignore_errors=True)


def copy_records(source: Path, target: Path) -> None:
    """Copy existing records to a classifier's new folder."""
    for name in RECORDS:
        if (source / name).is_file():
            shutil.copy2(source / name, target / name)
