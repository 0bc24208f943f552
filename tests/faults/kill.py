"""SIGKILL at random instants of training, saving, converting, labeling and serving.

    python -m tests.faults.kill [TASK ...] [--faults 200] [--seed 1]

After each, what is there must be whole; when the work is done at last, it must equal that of a run
that nobody interrupted. Prints a line of JSON for each task: runs that were begun, processes
that were killed, and losses, of which there must be none.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from tests.faults.tasks import TASKS, Serve, Task, ended, forked, kill


class Lost(Exception):
    """Something is missing, damaged or different."""


def uncut(task: Task, folder: Path) -> tuple[Any, float]:
    """The result of an uninterrupted run, and its seconds."""
    place = fresh(folder)
    task.begin(place)
    began = time.monotonic()
    log = task.folder / "log"
    if ended(forked(lambda: task.run(place), log)):
        raise Lost(f"an uncut run failed: {log.read_text()}")
    seconds = time.monotonic() - began
    task.check_whole(place)
    if found := task.leftovers(place):
        raise Lost(f"an uncut run left {found}")
    return task.result(place), seconds


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def interrupted(task: Task, folder: Path, draw: random.Random, seconds: float, most: int) -> int:
    """One piece of work, killed and begun again until it is done, or has been killed `most` times.

    Returns:
        How often it was killed.

    Raises:
        Lost: what is there is not whole, or a run fails.
    """
    place, kills, longest = fresh(folder), 0, seconds * 1.1
    task.begin(place)
    log = task.folder / "log"
    while kills < most:
        pid = forked(lambda: task.run(place), log)
        time.sleep(draw.random() * longest)
        if not kill(pid):
            break
        kills += 1
        for path in place.rglob(".*.tmp"):  # a save leaves those of the last minute alone
            os.utime(path, (time.time() - 100,) * 2)
        try:
            task.check_whole(place)
        except Exception as error:
            raise Lost(f"after {kills} kills: {traceback.format_exc()}") from error
    else:
        if ended(forked(lambda: task.run(place), log)):
            raise Lost(f"after {kills} kills: {log.read_text()}")
    return kills


def campaign(task: Task, folder: Path, n_faults: int, seed: int) -> dict[str, Any]:
    """Kill a task so often; the counts."""
    draw, runs, kills, losses = random.Random(seed), 0, 0, 0
    began = time.monotonic()
    results: dict[str, Any] = {}
    while kills < n_faults:
        task.kind = task.kinds[runs % len(task.kinds)]
        if task.kind not in results:
            results[task.kind] = uncut(task, folder / "uncut")
        expected, seconds = results[task.kind]
        runs += 1
        try:
            kills += interrupted(task, folder / "cut", draw, seconds, min(8, n_faults - kills))
            if task.result(folder / "cut") != expected:
                raise Lost("the result differs from an uncut run's")
            if found := task.leftovers(folder / "cut"):
                raise Lost(f"left behind: {found}")
        except Lost as error:
            losses += 1
            print(f"{task.name}: {error}", file=sys.stderr, flush=True)
            if losses > 5:
                break
    took = round(time.monotonic() - began)
    return {"task": task.name, "runs": runs, "kills": kills, "losses": losses, "seconds": took}


def serving(task: Serve, folder: Path, n_faults: int, seed: int) -> dict[str, Any]:
    """Kill servers while they answer: what a client gets is whole, or an error."""
    draw, place, losses, answered, cut = random.Random(seed), fresh(folder / "place"), 0, 0, 0
    began = time.monotonic()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (place / "port").write_text(str(probe.getsockname()[1]))
    expected = None
    for fault in range(n_faults + 1):
        pid = forked(lambda: task.run(place), task.folder / "log")
        _wait_until_ready(pid, place, task.folder / "log")
        if expected is None:
            start = time.monotonic()
            expected = task.result(place)
            longest = 2.5 * (time.monotonic() - start)
        timer = threading.Timer(draw.random() * longest, kill, (pid,)) if fault < n_faults else None
        if timer is not None:
            timer.start()
        try:
            while True:
                losses += task.result(place) != expected
                answered += 1
                if timer is None:
                    kill(pid)
                    break
        except (OSError, http.client.HTTPException):
            cut += 1
        if timer is not None:
            timer.join()
    took = round(time.monotonic() - began)
    return {
        "task": task.name,
        "kills": n_faults,
        "answered in full": answered,
        "truncated": cut,
        "losses": losses,
        "seconds": took,
    }


def _wait_until_ready(pid: int, place: Path, log: Path) -> None:
    port = int((place / "port").read_text())
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            with contextlib.closing(connection):
                connection.request("GET", "/ready")  # alive is not loaded
                if connection.getresponse().status == 200:
                    return
        time.sleep(0.05)
    raise Lost(f"the server does not start: {log.read_text()}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="*")
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    losses = 0
    for name in options.tasks or TASKS:
        with tempfile.TemporaryDirectory(prefix="minllama-kill-") as folder:
            task = TASKS[name](Path(folder) / "given")
            run = serving if isinstance(task, Serve) else campaign
            result = run(task, Path(folder), options.faults, options.seed)  # type: ignore[arg-type, operator]
        losses += result["losses"]
        print(json.dumps(result), flush=True)
    sys.exit(1 if losses else 0)


if __name__ == "__main__":
    main()
