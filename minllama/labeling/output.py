"""The folder of a labeling: what it was started with, and its Parquet parts.

    DIR/_labeling.json           classifier, files and options; whether it is complete
    DIR/status=labeled/*.parquet rows with labels
    DIR/status=bad/*.parquet     rows without, and the reason in `error`
    DIR/_checkpoint/             Ray's, while it runs

The names are those of Hive partitions: readers of the whole folder (pandas, Arrow, Spark, Ray) get
a column `status`, and leave out what begins with an underscore.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minllama.atomic import atomic_file
from minllama.errors import DataError, MinllamaError, OptionError
from minllama.labeling.inputs import ERROR
from minllama.text import listed

MANIFEST = "_labeling.json"
CHECKPOINT = "_checkpoint"
STATUS, LABELED, BAD = "status", "labeled", "bad"
VERSION = 1


def status_folder(folder: Path, status: str) -> Path:
    """The folder of the parts with that status."""
    return folder / f"{STATUS}={status}"


class OutputFolder:
    """The folder that a labeling writes.

    Args:
        folder: its path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self, *, resume: bool, force: bool) -> None:
        """Refuse a folder that has something else, before anything is opened.

        Raises:
            OptionError: it is not empty, and is not to be resumed or replaced.
        """
        if resume and force:
            raise OptionError("--resume continues DIR and --force replaces it; give one of them")
        if self.folder.exists() and not self.folder.is_dir():
            raise OptionError(f"{self.folder} is a file; name a folder for the parts")
        if not self.folder.is_dir() or not any(self.folder.iterdir()):
            return
        if not (self.folder / MANIFEST).is_file():
            raise OptionError(
                f"{self.folder} has files of something else; name a new folder, or an empty one"
            )
        if not (resume or force):
            raise OptionError(f"{self.folder} exists; --resume continues it, --force replaces it")

    def start(self, settings: Mapping[str, Any], *, resume: bool) -> bool:
        """Begin, or continue where an earlier run ended.

        Args:
            settings: what must be the same in a run that is continued, as plain values.
            resume: continue; start if there is nothing.

        Returns:
            Whether there is work to do: False if the earlier run is complete.

        Raises:
            DataError: the earlier run had other settings, or its manifest is damaged.
            MinllamaError: the folder cannot be written.
        """
        manifest = self.folder / MANIFEST
        if resume and manifest.is_file():
            content = self._read(manifest)
            before = content["settings"]
            differing = [
                name for name in {**before, **settings} if before.get(name) != settings.get(name)
            ]
            if differing:
                raise DataError(
                    f"{self.folder}: was started with other {listed(differing)}; give the run's "
                    "original command, or another --output"
                )
            return not content["complete"]
        try:
            for path in (
                *(status_folder(self.folder, one) for one in (LABELED, BAD)),
                self.checkpoint,
            ):
                if path.exists():
                    shutil.rmtree(path)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(settings, complete=False)
        except OSError as error:
            raise MinllamaError(f"{self.folder}: cannot be written ({error.strerror})") from error
        return True

    def complete(self, settings: Mapping[str, Any]) -> None:
        """Mark the labeling as complete, and remove the checkpoint."""
        self._write(settings, complete=True)
        shutil.rmtree(self.checkpoint, ignore_errors=True)

    @property
    def checkpoint(self) -> Path:
        """The folder of Ray's checkpoint."""
        return self.folder / CHECKPOINT

    def counts(self) -> dict[str, int]:
        """Rows of the parts, by status, from the files' footers."""
        from pyarrow import parquet

        return {
            status: sum(
                parquet.read_metadata(path).num_rows
                for path in status_folder(self.folder, status).glob("*.parquet")
            )
            for status in (LABELED, BAD)
        }

    def reasons(self, most: int = 5) -> list[tuple[str, int]]:
        """The most frequent reasons of bad rows, and how many rows have each."""
        from collections import Counter

        from pyarrow import parquet

        found = Counter[str]()
        for path in status_folder(self.folder, BAD).glob("*.parquet"):
            found.update(parquet.read_table(path, columns=[ERROR])[ERROR].to_pylist())
        return found.most_common(most)

    def _write(self, settings: Mapping[str, Any], *, complete: bool) -> None:
        content = {"version": VERSION, "complete": complete, "settings": dict(settings)}
        with atomic_file(self.folder / MANIFEST) as path:
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")

    def _read(self, manifest: Path) -> dict[str, Any]:
        try:
            content = json.loads(manifest.read_bytes())
            if content["version"] != VERSION or not isinstance(content["settings"], dict):
                raise ValueError("its version is another")
            return {"settings": content["settings"], "complete": bool(content["complete"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{manifest}: cannot be read ({error}); start again with --force"
            ) from error
