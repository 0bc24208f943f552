"""Read damaged files by the ten thousand; `make fuzz` calls it.

    python -m tests.faults.fuzz [READER ...] [--cases 10000] [--seed 1] [--found DIR]

Guided by coverage of minllama's code where `atheris` is installed (Google's libFuzzer for Python);
elsewhere by the mutators alone. Each reader runs in a process of its own, so that a crash or an
endless loop costs one case. Every case that does anything but be read or raise MinllamaError is
kept in DIR with its traceback. Exits with 1 if there was one.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

CORPUS = Path(__file__).parent / "corpus"
ROOT = Path(__file__).resolve().parents[2]
CPU_SECONDS = 5.0  # of one case
# Of one case in compiled code, which does not return to Python at a signal: then the process ends.
KILL_SECONDS = 20.0
# Beyond what the process has after it has read the good files: a case is of 512 KiB at most.
MEMORY_BYTES = 2**29
KEPT_PER_FAULT = 3


class Hang(BaseException):
    """A case took more than CPU_SECONDS."""


def check(read: Callable[[bytes], object], data: bytes, *, kills: bool = False) -> str:
    """Read one file, which must be accepted or refused; "accepted" or "refused".

    Args:
        read: a reader's.
        data: the file.
        kills: end this process where compiled code does not return.

    Raises:
        BaseException: anything else that happened, AssertionError for a refusal that hides it.
    """
    from minllama.errors import MinllamaError

    with time_limit(kills=kills), quiet():
        try:
            read(data)
        except MinllamaError as error:
            cause: BaseException | None = error
            while cause is not None:
                is_memory = isinstance(cause, MemoryError) or "allocate memory" in str(cause)
                if is_memory:
                    raise AssertionError(f"refused for want of memory: {cause!r}") from error
                cause = cause.__cause__ or cause.__context__
            return "refused"
        return "accepted"


@contextlib.contextmanager
def time_limit(*, kills: bool) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {CPU_SECONDS:g} s of CPU time")

    old = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_VIRTUAL, KILL_SECONDS if kills else 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGPROF, old)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Minllama's own warnings are fine; a library's, about a file, would be noise to a user."""
    from minllama.errors import CheckpointWarning, SlowDtypeWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", CheckpointWarning)
        warnings.simplefilter("ignore", SlowDtypeWarning)
        yield


def limit_memory(n_bytes: int = MEMORY_BYTES) -> None:
    """Let this process have so many bytes more than it has mapped now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + n_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class Counts:
    """Cases of a worker, in a file that outlives it."""

    NAMES = ("cases", "refused", "accepted", "faults")

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(8 * len(self.NAMES)))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def add(self, name: str) -> None:
        at = 8 * self.NAMES.index(name)
        struct.pack_into("<Q", self._map, at, struct.unpack_from("<Q", self._map, at)[0] + 1)

    def values(self) -> dict[str, int]:
        values = struct.unpack(f"<{len(self.NAMES)}Q", self._map[:])
        return dict(zip(self.NAMES, values, strict=True))


def keep(found: Path, name: str, data: bytes, report: str) -> None:
    """Save a case and what happened."""
    found.mkdir(parents=True, exist_ok=True)
    path = found / f"{name.replace(' ', '_')}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    path.with_name(path.name + ".txt").write_text(report, errors="backslashreplace")


def place_of(error: BaseException) -> str:
    """Type and last place in minllama's code of an exception: faults of one place are one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}minllama{os.sep}" in frame.filename]
    last = ours[-1] if ours else frames[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"


class Worker:
    """Runs the cases of one reader.

    Args:
        name: of the reader.
        folder: for its files, on a file system in memory if there is one.
        found: for cases that fail.
        n_cases: so many are left.
    """

    def __init__(self, name: str, folder: Path, found: Path, n_cases: int) -> None:
        from tests.faults.readers import make

        self.name, self.folder, self.found, self.n_cases = name, folder, found, n_cases
        self.reader = make(name, folder / "files")
        self.counts = Counts(folder / "counts")
        self.seen: Counter[str] = Counter()
        for seed in self.reader.seeds:
            check(self.reader.open, seed)  # imports what is imported late
        kept = CORPUS / name.replace(" ", "_")
        self.seeds = [*self.reader.seeds, *(p.read_bytes() for p in sorted(kept.glob("*")))]

    def case(self, data: bytes) -> None:
        (self.folder / "current").write_bytes(data)
        self.counts.add("cases")
        try:
            self.counts.add(check(self.reader.open, data, kills=True))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self.counts.add("faults")
            place = place_of(error)
            self.seen[place] += 1
            if self.seen[place] <= KEPT_PER_FAULT:
                report = "".join(traceback.format_exception(error))
                keep(self.found, self.name, data, f"{self.name}: {place}\n{report}")

    def run_unguided(self, draw: random.Random) -> None:
        pool = list(self.seeds)
        for _ in range(self.n_cases):
            data = self.reader.mutate(draw.choice(pool), draw)
            self.case(data)
            if draw.random() < 0.02:  # damage upon damage
                pool.append(data)

    def run_guided(self, seed: int) -> None:
        import atheris

        from tests.faults.mutations import MAX_BYTES

        corpus = self.folder / "corpus"
        corpus.mkdir(exist_ok=True)
        for i, data in enumerate(self.seeds):
            (corpus / f"seed-{i}").write_bytes(data)

        def mutate(data: bytes, max_size: int, number: int) -> bytes:
            draw = random.Random(number)
            if draw.random() < 0.25:
                return bytes(atheris.Mutate(data, max_size))
            if draw.random() < 0.1:
                data = draw.choice(self.seeds)
            return self.reader.mutate(data, draw)[:max_size]

        arguments = [sys.argv[0], f"-runs={self.n_cases}", f"-seed={seed}", f"-max_len={MAX_BYTES}"]
        # Its own limit is of time on the clock, which on a busy machine says little.
        arguments += ["-timeout=100000", "-rss_limit_mb=0", "-len_control=0"]
        arguments += [f"-artifact_prefix={self.folder}/crash-", "-verbosity=0", str(corpus)]
        atheris.Setup(arguments, self.case, custom_mutator=mutate)
        limit_memory()
        atheris.Fuzz()


def work(name: str, folder: Path, found: Path, n_cases: int, seed: int) -> None:
    """The body of a worker process."""
    if importlib.util.find_spec("atheris") is not None:
        import atheris

        with atheris.instrument_imports(include=["minllama"]):
            from tests.faults.readers import make

            make(name, folder / "files")  # imports what this reader needs, instrumented
        Worker(name, folder, found, n_cases).run_guided(seed)
        return
    worker = Worker(name, folder, found, n_cases)
    limit_memory()
    worker.run_unguided(random.Random(seed))


def fuzz(name: str, n_cases: int, seed: int, found: Path) -> dict[str, Any]:
    """Run one reader's cases, in as many processes as it takes."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="minllama-fuzz-", dir=base))
    began, crashes, last = time.monotonic(), 0, -1
    command = [sys.executable, "-m", "tests.faults.fuzz", "--worker", str(folder), name]
    try:
        while (done := Counts(folder / "counts").values()["cases"]) < n_cases and done > last:
            last = done
            options = ["--cases", str(n_cases - done), "--seed", str(seed + done)]
            with (folder / "log").open("wb") as log:
                finished = subprocess.run(
                    [*command, *options, "--found", str(found)],
                    cwd=ROOT,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                    stdout=log,
                    stderr=log,
                )
            if finished.returncode:
                crashes += 1
                case = folder / "current"
                data = case.read_bytes() if case.exists() else b""
                log_text = (folder / "log").read_text(errors="replace")[-20000:]
                report = f"{name}: the process ended with {finished.returncode}\n{log_text}"
                keep(found, name, data, report)
        counts = Counts(folder / "counts").values()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = round(time.monotonic() - began)
    return {"reader": name, **counts, "crashes": crashes, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("readers", nargs="*")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--found", type=Path, default=Path("runs/fuzz-found"))
    parser.add_argument("--worker", type=Path)
    options = parser.parse_args()
    found = options.found.resolve()
    if options.worker is not None:
        work(options.readers[0], options.worker, found, options.cases, options.seed)
        return
    from tests.faults.readers import READERS

    failed = 0
    for name in options.readers or READERS:
        result = fuzz(name, options.cases, options.seed, found)
        failed += result["faults"] + result["crashes"] + (result["cases"] < options.cases)
        print(json.dumps(result), flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
