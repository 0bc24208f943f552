"""A disk that fills up, or is read-only, under training, saving, converting and labeling.

    python -m tests.faults.disk [TASK ...] [--faults 25]

The output goes to a small tmpfs, which only root may mount (or `unshare --map-root-user --mount`).
A ballast leaves a little room, each time a little more. The command must then end with one line and
status 2, or be done; what was there must be whole; and once there is room, the work must come to
the result of a run that lacked none. Prints a line of JSON for each task.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minllama.atomic import sha256_of
from tests.faults.kill import Lost, uncut
from tests.faults.tasks import TASKS, Task, ended, forked

SIZE = 2**25
BALLAST = "ballast"


@contextlib.contextmanager
def small_disk(place: Path, size: int = SIZE) -> Iterator[Path]:
    """A tmpfs of so many bytes at `place` while the block runs.

    Raises:
        PermissionError: this user may not mount one.
    """
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        raise PermissionError("only root can mount a small tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def free(place: Path) -> int:
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


def check_message(status: int, log: Path) -> None:
    """The command was done, or failed with one line that says what a user can do."""
    if status == 0:
        return
    lines = [line for line in log.read_text().splitlines() if line.startswith("minllama")]
    text = log.read_text()
    if status != 2 or "Traceback" in text or len(lines) != 1:
        raise Lost(f"status {status}: {text[-3000:]}")


def contents(place: Path) -> dict[str, str]:
    files = (path for path in place.rglob("*") if path.is_file() and path.name != BALLAST)
    return {str(path.relative_to(place)): sha256_of(path) for path in files}


def used_by(task: Task, place: Path) -> int:
    """The most bytes beyond the older output that an uncut run has on the disk at a time."""
    task.begin(place)
    before, least = free(place), free(place)
    pid = forked(lambda: task.run(place), task.folder / "log")
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        least = min(least, free(place))
        time.sleep(0.002)
    return before - least


def filled(task: Task, folder: Path, room: int, expected: Any) -> bool:
    """Run with so much room, then with enough; whether the room was too little."""
    log = task.folder / "log"
    with small_disk(folder / "disk") as place:
        task.begin(place)
        ballast = place / BALLAST
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free(place) - room))
        status = ended(forked(lambda: task.run(place), log))
        check_message(status, log)
        task.check_whole(place)
        ballast.unlink()
        if status:
            again = ended(forked(lambda: task.run(place), log))
            if again:
                raise Lost(f"with room again: status {again}: {log.read_text()[-3000:]}")
        if task.result(place) != expected:
            raise Lost(f"with {room} bytes of room, the result differs")
        if found := task.leftovers(place):
            raise Lost(f"left behind: {found}")
    (folder / "disk").rmdir()
    return status != 0


def read_only(task: Task, folder: Path, expected: Any) -> None:
    """Run on a disk that cannot be written to, then on one that can."""
    log = task.folder / "log"
    with small_disk(folder / "disk") as place:
        task.begin(place)
        before = contents(place)
        for mode in ("ro", "rw"):
            subprocess.run(["mount", "-o", f"remount,{mode}", str(place)], check=True)
            status = ended(forked(lambda: task.run(place), log))
            check_message(status, log)
            if mode == "ro" and (status != 2 or contents(place) != before):
                raise Lost(f"on a read-only disk: status {status}: {log.read_text()[-3000:]}")
        if status or task.result(place) != expected:
            raise Lost(f"once it can be written to: status {status}: {log.read_text()[-3000:]}")
    (folder / "disk").rmdir()


def campaign(task: Task, folder: Path, n_faults: int, seed: int = 1) -> dict[str, Any]:
    """Fill the disk so often, with more and more room; the counts."""
    draw, full, losses, runs = random.Random(seed), 0, 0, 0
    began = time.monotonic()
    for kind in task.kinds:
        task.kind = kind
        expected, _ = uncut(task, folder / "uncut")
        with small_disk(folder / "disk") as place:
            most = used_by(task, place)
        (folder / "disk").rmdir()
        share = -(-n_faults // len(task.kinds))
        rooms = [round(most * (i + draw.random()) / share) for i in range(share)]
        for room in [*rooms, None]:
            runs += 1
            try:
                if room is None:
                    read_only(task, folder, expected)
                else:
                    full += filled(task, folder, room, expected)
            except Lost as error:
                losses += 1
                print(f"{task.name} {kind}: {error}", file=sys.stderr, flush=True)
                with contextlib.suppress(OSError):
                    (folder / "disk").rmdir()
    took = round(time.monotonic() - began)
    return {"task": task.name, "runs": runs, "full": full, "losses": losses, "seconds": took}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="*")
    parser.add_argument("--faults", type=int, default=25)
    options = parser.parse_args()
    losses = 0
    for name in options.tasks or [name for name in TASKS if name != "serve"]:
        with tempfile.TemporaryDirectory(prefix="minllama-disk-") as folder:
            result = campaign(TASKS[name](Path(folder) / "given"), Path(folder), options.faults)
        losses += result["losses"]
        print(json.dumps(result), flush=True)
    sys.exit(1 if losses else 0)


if __name__ == "__main__":
    main()
