"""Write files and folders atomically: completely or not at all.

The new content is written beside the target, fsynced and renamed over it, so that after a kill or a
full disk the target has either its old or its new content. Temporary files of a killed process are
removed by the next writer to the same target. Everything that saves a model, report or
checkpoint calls it.

Also one run at a time in one place (`only_run`): a lock that ends with the process that holds it,
by `flock` or, on Windows, `msvcrt`, on a file beside the place. Without locks (some network drives)
or where that file cannot be created, concurrent runs are not kept apart.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from minllama.errors import MinllamaError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

AT_FDCWD = -100
RENAME_EXCHANGE = 2  # Linux's renameat2(2): swap two names in one step
LEFTOVER_SECONDS = 60  # a younger one may be of a process that has not locked it yet
# Paths that this process has locked, and the thread of each, which may lock again.
_held: dict[Path, int] = {}
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)


@contextlib.contextmanager
def atomic_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it replaces `target` in one step.

    Raises:
        MinllamaError: the target cannot be written (no permission, no such folder, disk full).
    """
    with _one_line_errors(target):
        target, temporary = _file_and_temporary(target)
        try:
            temporary.touch()
            with _locked(temporary):
                yield temporary
                if target.exists():
                    shutil.copymode(target, temporary)
                _fsync(temporary)
                os.replace(temporary, target)
                _fsync(target.parent)
            _remove_leftovers(target)
        finally:
            temporary.unlink(missing_ok=True)


def check_file_writable(target: str | os.PathLike[str]) -> None:
    """Raise the errors of `atomic_file` in advance; the target is not changed.

    Raises:
        MinllamaError: the target cannot be written.
    """
    with _one_line_errors(target):
        _, temporary = _file_and_temporary(target)
        temporary.touch()
        temporary.unlink()


def check_folder_writable(target: str | os.PathLike[str]) -> None:
    """Raise the errors of `atomic_folder` in advance; the target is not changed.

    Raises:
        MinllamaError: the target cannot be written.
    """
    place = _resolved(target)
    made = [path for path in (place, *place.parents) if not path.exists()]
    try:
        with atomic_folder(target):  # a mount point can be written to, and not be replaced
            pass
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def atomic_folder(
    target: str | os.PathLike[str], *, replaces: Callable[[str], bool] = lambda name: False
) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success it replaces `target`.

    Other files in an existing `target` are kept (hard-linked), except those for whose name
    `replaces` is true: they are old content, such as shards of an earlier save.

    Raises:
        MinllamaError: the target cannot be written (no permission, no such folder, disk full), or
            it is the current directory.
    """
    check_replaceable(target)
    with _one_line_errors(target):
        target, temporary = _folder_and_temporary(target)
        temporary.mkdir()
        try:
            with _locked(temporary):
                yield temporary
                if target.exists():
                    _keep_others(target, temporary, replaces)
                    shutil.copymode(target, temporary)
                for path in [*temporary.rglob("*"), temporary]:
                    _fsync(path)
                _put_in_place(temporary, target)
                _fsync(target.parent)
            _remove_leftovers(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(folder: str | os.PathLike[str]) -> None:
    """Refuse the current directory: it would be replaced by another of the same name.

    Processes in it, above all the shell, would be left in a deleted folder. Commands that write at
    the end call this at the start.

    Raises:
        MinllamaError: it is the current directory, or contains it.
    """
    target = _resolved(folder)
    try:
        here = Path.cwd()
    except OSError:  # it is gone already
        return
    if target.name and target in (here, *here.parents):
        raise MinllamaError(
            f"cannot write the folder {folder}: it is the current directory; name a new folder "
            "in it, or change to another directory"
        )


def _resolved(target: str | os.PathLike[str]) -> Path:
    """The resolved `target`: links to other disks are kept, and `.` gets a name to write beside."""
    if not os.fspath(target):
        raise MinllamaError("the output name is empty; name a file or folder")
    try:
        return Path(os.path.realpath(target))
    except ValueError as error:  # a null character, a lone surrogate
        raise MinllamaError(f"cannot write {os.fspath(target)!r}: not a path") from error


def _file_and_temporary(target: str | os.PathLike[str]) -> tuple[Path, Path]:
    """A file's resolved path, and the temporary path beside it."""
    target = _resolved(target)
    if target.is_dir():
        raise MinllamaError(f"cannot write {target}: it is a folder; name a file")
    return target, _beside(target)


def _folder_and_temporary(target: str | os.PathLike[str]) -> tuple[Path, Path]:
    """A folder's resolved path, and the temporary path beside it."""
    target = _resolved(target)
    if not target.name:
        raise MinllamaError(f"cannot write the folder {target}: name a folder in it")
    if target.exists() and not target.is_dir():
        raise MinllamaError(f"cannot write the folder {target}: a file of that name is there")
    return target, _beside(target)


def _beside(target: Path) -> Path:
    if target.parent.exists() and not target.parent.is_dir():
        raise MinllamaError(f"cannot write {target}: {target.parent} is not a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def _locked(temporary: Path) -> Iterator[None]:
    """Mark a temporary path as in use while the process lives, if there are locks.

    (Windows and some network drives have none of this kind: leftovers stay there.)
    """
    descriptor = _lock(temporary)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock on a file or folder; None if that is impossible."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        if try_lock(descriptor):
            return descriptor
        os.close(descriptor)
    return None


def sha256_of(content: Path | str | bytes) -> str:
    """The SHA-256 of a file, of a text in UTF-8 or of bytes, in 64 hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(content, Path):
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()


def is_being_written(temporary: Path) -> bool:
    """Whether a running process holds the lock of that temporary path."""
    try:
        descriptor = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return try_lock(descriptor) is False
    finally:
        os.close(descriptor)


def temporaries(target: Path) -> list[Path]:
    """Temporary paths of any process, running or not, for a target.

    Raises:
        OSError: its parent folder cannot be read.
    """
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    return [path for path in target.parent.iterdir() if name.fullmatch(path.name)]


def remove(path: Path) -> None:
    """Delete a file, or a folder with its contents, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_leftovers(target: Path) -> None:
    """Remove temporary paths of dead processes for a target that has been written."""
    found: list[Path] = []
    with contextlib.suppress(OSError):  # a folder may be one to write to and not to read
        found = temporaries(target)
    for path in found:
        with contextlib.suppress(OSError):  # another process may be at the same
            # A clock that was set back makes it younger than now.
            if 0 <= time.time() - path.lstat().st_mtime < LEFTOVER_SECONDS:
                continue
            descriptor = _lock(path)
            if descriptor is None:
                continue
            os.close(descriptor)
            remove(path)


def _keep_others(old: Path, new: Path, replaces: Callable[[str], bool]) -> None:
    for path in old.iterdir():
        if (new / path.name).exists() or replaces(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, new / path.name)


def _link(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _put_in_place(new: Path, target: Path) -> None:
    """Rename the folder `new` to `target`; an existing `target` ends up under the name `new`."""
    if not target.exists():
        os.rename(new, target)
    elif not _exchange(new, target):
        # Without an atomic swap the old folder steps aside first: for that instant its content is
        # under a second name, whole, rather than gone.
        aside = _beside(target)
        os.rename(target, aside)
        os.rename(new, target)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically; False if the system or file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    paths = os.fsencode(one), os.fsencode(other)
    return bool(libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0)


def _fsync(path: Path) -> None:
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return  # opening a pipe would wait for its writer
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _one_line_errors(target: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV):
            # A mount point cannot be exchanged with a folder next to it either.
            reason += (
                " (a new name is needed inside it instead)"
                if os.path.isdir(target) and error.errno != errno.EROFS
                else " (name a path in a folder that you may write to)"
            )
        raise MinllamaError(
            f"cannot write {target}: {reason}; an existing file is unchanged"
        ) from error


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
    except ValueError:  # not a path; writing to it reports the problem
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
        for path in made:  # folders that were created for the lock and contain nothing else
            with contextlib.suppress(OSError):
                path.rmdir()


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or folder; False if another process has, None without lock support."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 2**30, os.SEEK_SET)  # a byte after the content
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
            return None  # writing there reports the reason
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
