"""Claims about atomic writes: the old content or the new one, whatever happens in between."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minllama import atomic
from minllama.atomic import atomic_file, atomic_folder, check_file_writable, check_folder_writable
from minllama.errors import MinllamaError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=["exchange", "aside"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways to put a folder in place: with an atomic swap of names, and without."""
    if request.param == "aside":
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    return request.param


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "target"
    for text in ("first", "second"):
        with atomic_file(target) as temporary:
            temporary.write_text(text)
            assert temporary.parent == target.parent  # one file system: a rename is one step
            assert not target.exists() or target.read_text() == "first"
        assert content(tmp_path) == {"deep/er/target": text}


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")

    def fail(error: type[BaseException]) -> None:
        with atomic_file(tmp_path / "target") as temporary:
            temporary.write_text("half")
            raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            fail(error)
        assert content(tmp_path) == {"target": "old"}


def test_a_folder_is_replaced_and_what_others_put_there_is_kept(tmp_path: Path, swap: str) -> None:
    target = tmp_path / "model"
    for text, shards in (("first", 3), ("second", 1)):
        with atomic_folder(target, replaces=lambda name: name.startswith("shard")) as folder:
            for i in range(shards):
                (folder / f"shard{i}").write_text(text)
            (folder / "config").write_text(text)
        if text == "first":
            (target / "notes").mkdir()
            (target / "notes" / "mine").write_text("kept")
            (target / "link").symlink_to("notes/mine")
    assert content(tmp_path) == {
        "model/shard0": "second",
        "model/config": "second",
        "model/notes/mine": "kept",
        "model/link": "kept",
    }
    assert (target / "link").is_symlink()
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_leaves_the_old_folder_and_nothing_beside_it(tmp_path: Path, swap: str) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config").write_text("old")

    def fail(error: type[BaseException]) -> None:
        with atomic_folder(target) as folder:
            (folder / "config").write_text("half")
            raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            fail(error)
        assert content(tmp_path) == {"model/config": "old"}
        assert list(tmp_path.iterdir()) == [target]


def test_a_file_in_the_old_folder_is_not_written_through(tmp_path: Path, swap: str) -> None:
    # What is kept is hard-linked: the old folder must not change under who still has it open.
    target = tmp_path / "model"
    target.mkdir()
    (target / "config").write_text("old")
    descriptor = os.open(target / "config", os.O_RDONLY)
    with atomic_folder(target) as folder:
        (folder / "config").write_text("new")
    assert os.read(descriptor, 100) == b"old"
    os.close(descriptor)
    assert content(target) == {"config": "new"}


def test_a_linked_target_is_written_where_the_link_points(tmp_path: Path, swap: str) -> None:
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "disk" / "file").write_text("old")
    (tmp_path / "model").symlink_to("disk/model")
    (tmp_path / "file").symlink_to("disk/file")
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "config").write_text("new")
    with atomic_file(tmp_path / "file") as file:
        file.write_text("new")
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "file").is_symlink()
    assert content(tmp_path / "disk") == {"model/config": "new", "file": "new"}
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("target", [".", "..", "../../tree", "link"])
def test_a_folder_that_one_stands_in_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    here = tmp_path / "tree" / "here"
    here.mkdir(parents=True)
    (here / "mine").write_text("old")
    (here / "link").symlink_to(here)
    monkeypatch.chdir(here)
    with (
        pytest.raises(MinllamaError, match="is the current directory") as caught,
        atomic_folder(target),
    ):
        pytest.fail("nothing may be written")
    assert f"cannot write the folder {target}: " in str(caught.value)
    assert content(tmp_path)["tree/here/mine"] == "old"
    with atomic_folder("new") as folder:
        (folder / "config").write_text("new")
    assert Path("new/config").read_text() == "new"


@pytest.mark.parametrize(
    ("write", "target", "reason"),
    [
        (atomic_file, "folder", "it is a folder; name a file"),
        (atomic_file, "file/x", "file is not a folder"),
        (atomic_folder, "file", "a file of that name is there"),
        (atomic_folder, "file/x", "file is not a folder"),
        (atomic_file, "x" * 250, "File name too long; an existing file is unchanged"),
        (atomic_folder, "x" * 250, "File name too long; an existing file is unchanged"),
        (atomic_file, "/proc/no/such", "an existing file is unchanged"),
        (atomic_folder, "/proc/no/such", "an existing file is unchanged"),
        (atomic_folder, "/", "name a folder in it"),
    ],
)
def test_an_unwritable_target_is_one_line(
    write: Any, target: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(MinllamaError) as caught, write(tmp_path / target) as temporary:
        (temporary / "config" if write is atomic_folder else temporary).write_text("new")
    assert str(caught.value).startswith("cannot write ")
    assert str(tmp_path / target) in str(caught.value)
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()
    assert content(tmp_path) == {"file": "old"}
    if write is atomic_file:
        with pytest.raises(MinllamaError) as early:
            check_file_writable(tmp_path / target)
        assert str(early.value) == str(caught.value)


def test_a_folder_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for place in ("old", "new", "deep/er/new"):
        check_folder_writable(tmp_path / place)
    for place in ("file", "file/below"):
        with pytest.raises(MinllamaError, match="cannot write"):
            check_folder_writable(tmp_path / place)
    assert content(tmp_path) == {"old/mine": "x", "file": "x"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "old"]


def test_a_file_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    for name in ("file", "deep/er/new"):
        check_file_writable(tmp_path / name)
    assert content(tmp_path) == {"file": "old"}


FILL = """
import resource, sys
from pathlib import Path
from minllama.atomic import atomic_file, atomic_folder
from minllama.errors import MinllamaError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write, name, file in ((atomic_file, "file", ""), (atomic_folder, "folder", "weights")):
    try:
        with write(name) as temporary:
            (temporary / file).write_bytes(bytes(5000))
    except MinllamaError as error:
        print(error)
"""


def test_a_disk_that_fills_up_leaves_the_target_untouched(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights").write_text("old")
    finished = subprocess.run(
        [sys.executable, "-c", FILL],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    reason = os.strerror(errno.EFBIG)
    assert finished.stdout.splitlines() == [
        f"cannot write {name}: {reason}; an existing file is unchanged"
        for name in ("file", "folder")
    ], finished.stderr
    assert content(tmp_path) == {"file": "old", "folder/weights": "old"}


# Each child replaces the old content by the new, and kills itself before the n-th line of Python
# that it executes, whichever file the line stands in.
KILL_EVERYWHERE = """
import os, shutil, signal, sys
from pathlib import Path
from minllama import atomic

def old(folder):
    shutil.rmtree(folder, ignore_errors=True)  # with what the last child has left there
    (folder / "model").mkdir(parents=True)
    for name in ("a", "b", "mine"):
        (folder / "model" / name).write_text("old " * 1000)
    (folder / "file").write_text("old " * 1000)

def write(folder):
    with atomic.atomic_file(folder / "file") as temporary:
        temporary.write_text("new " * 1000)
    with atomic.atomic_folder(folder / "model", replaces=lambda name: name in "ab") as temporary:
        for name in "ab":
            (temporary / name).write_text("new " * 1000)

def killed_at(n):
    def trace(frame, event, argument):
        nonlocal n
        if event == "line":
            n -= 1
            if n == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    child = os.fork()
    if child == 0:
        sys.settrace(trace)
        write(Path("here"))
        sys.settrace(None)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

n = 0
while True:
    n += int(sys.argv[1])
    old(Path("here"))
    killed = killed_at(n)
    texts = [(Path("here") / name).read_text() for name in ("file", "model/a", "model/b")]
    print(n, *(text[:3] if text == text[:4] * 1000 else "half" for text in texts),
          (Path("here") / "model" / "mine").read_text()[:3])
    if not killed:
        break
"""


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_instant_leaves_the_old_content_or_the_new(
    tmp_path: Path, stride: int
) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", KILL_EVERYWHERE, str(stride)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    seen = [tuple(line.split()[1:]) for line in finished.stdout.splitlines()]
    # The file comes first and the folder second; what else lay in the folder is never lost.
    old, file_new, new = [
        (*texts, "old") for texts in (("old",) * 3, ("new", "old", "old"), ("new",) * 3)
    ]
    assert set(seen) == {old, file_new, new}, finished.stderr
    assert seen == sorted(seen, key=[old, file_new, new].index)
    assert len(seen) > 500 // stride


DIE_WITHIN = """
import os, signal, sys
from minllama import atomic

with atomic.atomic_file("file") as file, atomic.atomic_folder("model") as folder:
    file.write_text("of another")
    (folder / "a").write_text("of another")
    if sys.argv[1] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    print("writing", flush=True)
    sys.stdin.read()
"""


def hidden(folder: Path) -> list[str]:
    return sorted(path.name.split(".")[1] for path in folder.glob(".*.tmp"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs locks on files and folders")
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Any = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    start = [sys.executable, "-c", DIE_WITHIN]
    subprocess.run([*start, "die"], **settings)
    assert hidden(tmp_path) == ["file", "model"]
    (tmp_path / ".other.12345678.tmp").touch()

    def write() -> list[str]:
        with atomic_file(tmp_path / "file") as file, atomic_folder(tmp_path / "model"):
            file.write_text("ours")
        return hidden(tmp_path)

    assert write() == ["file", "model", "other"]  # too young to be judged
    monkeypatch.setattr("minllama.atomic.LEFTOVER_SECONDS", 0)
    assert write() == ["other"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*start, "live"], **settings, **pipes) as living:
        assert living.stdout is not None
        assert living.stdout.readline() == "writing\n"
        assert write() == ["file", "model", "other"]
        living.communicate()
    assert living.returncode == 0
    assert (tmp_path / "file").read_text() == "of another"
    assert hidden(tmp_path) == ["other"]


def test_what_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("old")
    file.chmod(0o600)
    folder.mkdir(mode=0o700)
    with atomic_file(file) as path:
        path.write_text("new")
    with atomic_folder(folder) as path:
        (path / "a").write_text("new")
    assert file.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_pipe_in_a_folder_does_not_hang_its_replacement(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    with atomic_folder(folder) as path:
        (path / "a").write_text("new")
    assert (folder / "pipe").is_fifo()
    assert (folder / "a").read_text() == "new"


@pytest.mark.parametrize("name", ["", "a\0b", "\udc80\ud800"])
def test_what_is_no_path_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("mine")
    inode = tmp_path.stat().st_ino
    monkeypatch.chdir(tmp_path)
    for writer in (atomic_file, atomic_folder):
        with pytest.raises(MinllamaError, match=r"empty; name a|not a path$"), writer(name):
            pass
    assert content(tmp_path) == {"mine": "mine"}
    assert tmp_path.stat().st_ino == inode
