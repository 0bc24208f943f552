"""Run the compiled code's tests under sanitizers; `make sanitize` calls it.

    python -m tests.faults.sanitize [address] [thread] [-- PYTEST ARGUMENTS]

`address` is AddressSanitizer and UndefinedBehaviorSanitizer: no byte outside what was allocated, no
overflowed sum, shift or conversion. `thread` is ThreadSanitizer, with the library's own threads,
since torch's OpenMP is not instrumented and its barriers would be taken for none. The library is
compiled into a copy of the package in build/sanitize, so that the one in use stays. A report ends
the tests; reports are printed at the end, since pytest keeps what a process that ends has written.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"address": "address,undefined,float-cast-overflow", "thread": "thread"}
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
TESTS = ("tests/kernels", "tests/engine/test_decode_steps.py")
COPIED = ("minllama", "tests", "pyproject.toml", "setup.py", "README.md", "LICENSE")
OPTIONS = {
    # Python and torch keep memory until the end, which is no leak of the library's.
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=0:exitcode=66",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:exitcode=66",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66:history_size=7",
}


def build(kind: str) -> Path:
    """A copy of the sources with the library compiled for one kind of sanitizer."""
    place = ROOT / "build" / "sanitize" / kind
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "node_modules")
            shutil.copytree(source, place / name, ignore=ignored)
        elif source.exists():
            shutil.copy2(source, place / name)
    shared = ROOT.parent / "shared"
    if shared.is_dir():  # data of some tests, which is beside a repository
        (place.parent / "shared").unlink(missing_ok=True)
        (place.parent / "shared").symlink_to(shared)
    environment = {**os.environ, "MINLLAMA_SANITIZE": KINDS[kind]}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=place, env=environment, check=True)
    assert list(place.glob("minllama/kernels/cpu/_step*.so")), "the library was not compiled"
    return place


def runtime(kind: str) -> str:
    """The sanitizer's library, which must be loaded before Python's own allocations.

    With C++'s own: a sanitizer looks when it starts for what throws exceptions, as torch does.
    """
    paths = []
    for name in (RUNTIMES[kind], "libstdc++.so.6"):
        command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_file():
            sys.exit(f"{name} is missing; install gcc's sanitizers (package libgcc-*-dev)")
        paths.append(os.path.realpath(path))
    return " ".join(paths)


def run(kind: str, arguments: list[str]) -> int:
    """The exit status of the tests under one kind."""
    place = build(kind)
    plugin = ["-p", "tests.faults.own_threads"] if kind == "thread" else []
    environment = {**os.environ, "LD_PRELOAD": runtime(kind)}
    environment |= {name: f"{value}:log_path={place}/report" for name, value in OPTIONS.items()}
    environment |= {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "2", "PYTHONMALLOC": "malloc"}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *plugin]
    chosen = arguments or [*TESTS, "-m", "not slow"]
    print(f"{kind}: {KINDS[kind]}", flush=True)
    status = subprocess.run([*command, *chosen], cwd=place, env=environment).returncode
    reports = sorted(place.glob("report.*"))
    print(f"{kind}: {len(reports)} reports", *(path.read_text() for path in reports), sep="\n")
    return status or len(reports)


def main() -> None:
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        usage="python -m tests.faults.sanitize [-h] [address] [thread] [-- PYTEST ARGUMENTS]",
        description="Run the compiled code's tests under sanitizers.",
        epilog="PYTEST ARGUMENTS: which tests, rather than all of the compiled code but slow ones.",
    )
    parser.add_argument("kinds", nargs="*", choices=KINDS, help="which sanitizers (default: both)")
    kinds = parser.parse_args(words[:end]).kinds
    sys.exit(max(run(kind, words[end + 1 :]) for kind in kinds or KINDS))


if __name__ == "__main__":
    main()
