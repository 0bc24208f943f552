"""Allow one run at a time per output: a lock that ends with the process that holds it.

The lock is on a file beside the output (`flock`, on Windows `msvcrt`), so the system releases it
however the process ends. Without lock support (some network drives), or if the file cannot be
created, there is no lock. Training and `minllama classify` call it.
"""

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from minllama.errors import MinllamaError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

# What is held by this process, and the thread that does: it may ask again.
_held: dict[Path, int] = {}
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)


@contextlib.contextmanager
def only_run(place: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of an output file or folder while the block runs.

    The file `.NAME.lock` beside it has the process id, and is removed at the end. The lock is
    reentrant within a thread.

    Raises:
        MinllamaError: another run has it.
    """
    try:
        target = Path(os.path.realpath(place))
    except ValueError:  # no path, as who writes there will say
        yield
        return
    thread = threading.get_ident()
    if (owner := _held.get(target)) is not None:
        if owner != thread:
            raise _taken(place, str(os.getpid()))
        yield
        return
    # A pipe or /dev/null takes what several write.
    is_place = bool(target.name) and (not target.exists() or target.is_file() or target.is_dir())
    beside = target.with_name(f".{target.name}.lock") if is_place else None
    made = [] if beside is None else [p for p in beside.parents if not p.exists()]
    descriptor = None if beside is None else _acquired(beside, place)
    _held[target] = thread
    try:
        yield
    finally:
        del _held[target]
        if descriptor is not None:
            assert beside is not None
            _release(beside, descriptor)
        for path in made:  # folders that were made for the lock, and hold nothing else
            with contextlib.suppress(OSError):
                path.rmdir()


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or folder; False if another process has, None without lock support."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 2**30, os.SEEK_SET)  # a byte behind the content, which stays free
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _TAKEN else None
    return True


def _acquired(file: Path, place: str | os.PathLike[str]) -> int | None:
    """A descriptor that holds the lock of a file, created if needed; None if impossible."""
    for _ in range(100):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            descriptor = os.open(file, flags, 0o666)
        except OSError:
            return None  # who writes there will say why
        locked = try_lock(descriptor)
        if locked is False:
            owner = os.pread(descriptor, 20, 0) if hasattr(os, "pread") else b""
            os.close(descriptor)
            raise _taken(place, owner.decode("ascii", "replace").strip())
        # Who had it before may have removed the file in between: then it locks nobody out.
        if not locked or _is_still(file, descriptor):
            with contextlib.suppress(OSError):  # a full disk; the number is for people
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.truncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
            return descriptor
        os.close(descriptor)
    return None


def _is_still(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _release(file: Path, descriptor: int) -> None:
    """Remove the file while it is locked, then release the lock."""
    try:
        with contextlib.suppress(OSError):  # Windows does not remove what is open
            file.unlink()
    finally:
        os.close(descriptor)


def _taken(place: str | os.PathLike[str], owner: str) -> MinllamaError:
    process = f" (process {owner})" if owner.isdigit() else ""
    return MinllamaError(
        f"{os.fspath(place)}: another run{process} is writing there; wait until it ends, or name "
        "another output"
    )
