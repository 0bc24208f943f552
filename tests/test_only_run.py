"""Two runs in one place: the second is refused, and a lock dies with its process."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minllama.atomic import atomic_folder, only_run
from minllama.errors import MinllamaError
from minllama.training.run_checkpoint import has_checkpoint

pytest.importorskip("fcntl")

HOLDER = """
import sys, time
from minllama.atomic import only_run
with only_run(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_refused_by_name_and_process(tmp_path: Path, holder) -> None:
    with pytest.raises(MinllamaError) as caught, only_run(tmp_path / "out"):
        pass
    assert f"{tmp_path / 'out'}: another run (process {holder.pid}) is writing" in str(caught.value)


def test_another_name_of_the_same_folder_is_the_same_place(tmp_path: Path, holder) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(MinllamaError, match="another run"), only_run(tmp_path / "link"):
        pass
    with only_run(tmp_path / "other"):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_dies_with_its_process(tmp_path: Path, holder, number: int) -> None:
    holder.send_signal(number)
    holder.wait()
    with only_run(tmp_path / "out"):
        assert (tmp_path / ".out.lock").read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == []


def test_the_lock_may_be_asked_for_again_within_and_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "new" / "deep" / "out"
    with only_run(place), only_run(place):
        assert (place.parent / ".out.lock").exists()
    assert list(tmp_path.iterdir()) == []
    with only_run(place):
        place.mkdir()
    assert place.is_dir()


def test_another_thread_is_another_run(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def second() -> None:
        try:
            with only_run(tmp_path / "out"):
                pass
        except MinllamaError as error:
            errors.append(error)

    with only_run(tmp_path / "out"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(errors) == 1


def test_runs_that_take_turns_are_never_two_at_once(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from minllama.errors import MinllamaError
from minllama.atomic import only_run
folder, done = Path(sys.argv[1]), 0
while done < 100:
    try:
        with only_run(folder / "out"):
            (folder / "inside").mkdir()  # fails where somebody else is
            (folder / "inside").rmdir()
            done += 1
    except MinllamaError:
        pass
"""
    processes = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]


def test_a_place_that_cannot_be_locked_is_not_kept_apart() -> None:
    for place in ("/dev/null", "/proc/none/out", "a\0b", "/"):
        with only_run(place):
            pass


def test_a_save_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "checkpoint") as staging:
        (staging / "x").write_text("x")
        assert not has_checkpoint(tmp_path)
        assert staging.exists()
    assert (tmp_path / "checkpoint" / "x").exists()
    leftover = tmp_path / ".checkpoint.01234567.tmp"
    leftover.mkdir()
    assert has_checkpoint(tmp_path)
    assert not leftover.exists()


def test_a_second_training_is_refused_and_the_first_goes_on(tmp_path: Path, holder) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,y\n" * 5)
    arguments = ["train", "--train", "train.csv", "-o", "out", "--method", "lora"]
    for more in ([], ["--force"], ["--resume"]):
        began = time.monotonic()
        finished = subprocess.run(
            [sys.executable, "-m", "minllama", *arguments, *more],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert (finished.returncode, finished.stdout) == (2, "")
        assert len(finished.stderr.splitlines()) == 1
        assert f"out: another run (process {holder.pid}) is writing there" in finished.stderr
        assert time.monotonic() - began < 30
    assert holder.poll() is None
    assert not (tmp_path / "out").exists()
