"""Work that is killed, or finds its disk full: a sample of `make faults`; a clock that jumps."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minllama.atomic import atomic_file, atomic_folder
from tests.faults import disk, kill
from tests.faults.tasks import TASKS, Serve, Train, ended, forked

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Children of a fork have one thread, and bits are compared with theirs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TASKS if name != "serve"])
def test_killed_work_is_whole_and_comes_to_the_same_result(name: str, tmp_path: Path) -> None:
    result = kill.campaign(TASKS[name](tmp_path / "given"), tmp_path, n_faults=6, seed=3)
    assert result["kills"] >= 6
    assert result["losses"] == 0


@pytest.mark.slow
def test_a_killed_server_cuts_answers_off_and_answers_the_same_again(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    result = kill.serving(Serve(tmp_path / "given"), tmp_path, n_faults=3, seed=3)
    assert result["truncated"] == 3
    assert result["losses"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TASKS if name != "serve"])
def test_a_full_or_read_only_disk_is_one_line_and_loses_nothing(name: str, tmp_path: Path) -> None:
    try:
        with disk.small_disk(tmp_path / "probe"):
            pass
    except PermissionError as error:
        pytest.skip(str(error))
    result = disk.campaign(TASKS[name](tmp_path / "given"), tmp_path, n_faults=4)
    assert result["full"] > 0
    assert result["losses"] == 0


@pytest.mark.slow
def test_a_clock_that_jumps_changes_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Train(tmp_path / "given")
    expected, _ = kill.uncut(task, tmp_path / "uncut")
    jumps = iter(range(10**9))
    real = time.time

    def jumping() -> float:
        return real() + (-1) ** next(jumps) * 10.0 ** (next(jumps) % 9)

    place = kill.fresh(tmp_path / "place")
    task.begin(place)
    monkeypatch.setattr(time, "time", jumping)
    assert ended(forked(lambda: task.run(place), tmp_path / "log")) == 0
    monkeypatch.undo()
    assert task.result(place) == expected
    assert task.leftovers(place) == []


@pytest.mark.parametrize("seconds", [-86400, 86400])
def test_leftovers_are_removed_wherever_the_clock_has_been_set(
    seconds: int, tmp_path: Path
) -> None:
    file, folder = tmp_path / ".x.01234567.tmp", tmp_path / ".y.01234567.tmp"
    file.touch()
    folder.mkdir()
    for path in (file, folder):
        os.utime(path, (time.time() + seconds,) * 2)
    with atomic_file(tmp_path / "x") as temporary:
        temporary.write_text("new")
    with atomic_folder(tmp_path / "y") as staging:
        (staging / "z").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]
