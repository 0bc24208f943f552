"""Processes for `results.py`: minllama's command line and its public names, in a child each.

A child is forked from this process, which has imported libraries and none of minllama's code: it
does what `python -m minllama` does in a fresh one, without two seconds of imports.
"""

import json
import os
import platform
import re
import runpy
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

# Before torch is imported: sums depend on the number of threads, and a GPU is another machine.
os.environ.update(
    OMP_NUM_THREADS="1",
    CUDA_VISIBLE_DEVICES="",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    COLUMNS="80",
    NO_COLOR="1",
)

import torch
from result_files import Results

# Whoever imported it before: a child that is forked from several threads waits for all but its own.
torch.set_num_threads(1)

for library in ("sklearn.linear_model", "matplotlib.pyplot", "pyarrow.parquet", "rich.console"):
    with suppress(ImportError):
        import_module(library)


def use_importable() -> None:
    """Let children, and what they start, have the minllama that this process would import."""
    spec = find_spec("minllama")
    assert spec is not None, "no minllama can be imported"
    assert spec.origin is not None
    print(f"minllama of {spec.origin}", file=sys.stderr, flush=True)
    sys.path.insert(0, home := str(Path(spec.origin).resolve().parents[1]))
    os.environ["PYTHONPATH"] = os.pathsep.join([home, os.environ.get("PYTHONPATH", "")])


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    err: str


def forked(results: Results, call: Callable[[], None], stdin: str = "") -> Ended:
    """Call something in a process of its own, in the folder of the results."""
    paths = [results.folder / name for name in (".in", ".out", ".err")]
    paths[0].write_text(stdin, encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return Ended(status, *(p.read_text(encoding="utf-8", errors="replace") for p in paths[1:]))
    status = 1
    try:
        os.chdir(results.folder)
        for number, (path, name, mode) in enumerate(
            zip(paths, ("stdin", "stdout", "stderr"), "rww", strict=True)
        ):
            with path.open(mode) as file:
                os.dup2(file.fileno(), number)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
        status = _status_of(call)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _status_of(call: Callable[[], None]) -> int:
    try:
        call()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def command(results: Results, *arguments: str | Path, stdin: str = "") -> Ended:
    """`python -m minllama ...`, to its end."""

    def call() -> None:
        sys.argv = ["minllama", *map(str, arguments)]
        runpy.run_module("minllama", run_name="__main__", alter_sys=True)

    return forked(results, call, stdin)


def ran(results: Results, key: str, *arguments: str | Path, stdin: str = "") -> Ended:
    """A command that must succeed; what it said is wording."""
    ended = command(results, *arguments, stdin=stdin)
    results.values[f"{key} status"] = ended.status
    results.add_text(f"{key} stderr", ended.err)
    if ended.status:
        said = ended.err.strip().splitlines() or ["(nothing)"]
        results.failures.append(f"{key}: {said[-1]}")
    return ended


def called(results: Results, key: str, call: Callable[[], dict[str, Any]]) -> None:
    """What a function returns that calls minllama's public names: a result for each key."""
    ended = forked(results, lambda: print(json.dumps(call())))
    if ended.status:
        said = ended.err.strip().splitlines() or ["(nothing)"]
        results.failures.append(f"{key}: {said[-1]}")
    else:
        for name, value in json.loads(ended.out.splitlines()[-1]).items():
            results.add_json(f"{key} {name}", value)


def add_info(results: Results, key: str, *arguments: str) -> None:
    """What `info` says: its numbers are results."""
    ended = ran(results, key, "info", *arguments)
    results.values[key] = re.findall(r"\d[\d.,/]*", results.mask(ended.out))
    results.add_text(key, ended.out)


def machine() -> dict[str, str]:
    """What results depend on beside minllama."""
    return {
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "stated processor": os.environ.get("MINLLAMA_CPU", ""),
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
