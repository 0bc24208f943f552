"""Interrupted and killed runs go on, in as many processes as before or in another number."""

import shutil
from pathlib import Path

import pytest

from tests.distributed.launching import run_jobs
from tests.distributed.test_equal_to_one import assert_equal_run, assert_same_run, rows_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[int, Path]:
    """Folders of runs that were interrupted after the third of eight steps, by their processes."""
    found = {}
    for size in (1, 2):
        output = tmp_path_factory.mktemp(f"interrupted-{size}")
        ended = run_jobs(size, folder=data, output=output, jobs=["lora"], interrupt=3)
        assert ended.returncode == 0, ended.stderr
        assert len(rows_of(output / "lora" / "metrics.jsonl")) == 3
        assert (output / "lora" / "checkpoint" / "state.json").exists()
        found[size] = output
    return found


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4), (2, 4), (1, 2)])
def test_a_run_goes_on_in_another_number_of_processes(
    interrupted: dict[int, Path],
    by_one: Path,
    data: Path,
    tmp_path: Path,
    before: int,
    after: int,
) -> None:
    # The place is part of the report, not of the run.
    shutil.copytree(interrupted[before], tmp_path, dirs_exist_ok=True)
    ended = run_jobs(after, folder=data, output=tmp_path, jobs=["lora"], resume=True)
    assert ended.returncode == 0, ended.stderr
    assert_same_run(tmp_path / "lora", by_one / "lora")


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    output = tmp_path_factory.mktemp("uncut")
    ended = run_jobs(2, folder=data, output=output, jobs=["lora"], training={"save_every": 2})
    assert ended.returncode == 0, ended.stderr
    return output


@pytest.mark.parametrize(("step", "rank"), [(5, 1), (6, 0), (1, 1)])
def test_the_launcher_restarts_a_killed_run_exactly(
    uncut: Path, data: Path, tmp_path: Path, step: int, rank: int
) -> None:
    ended = run_jobs(
        2,
        options=("--max-restarts", "1"),
        folder=data,
        output=tmp_path,
        jobs=["lora"],
        training={"save_every": 2},
        kill=[step, rank],
    )
    assert ended.returncode == 0, ended.stderr
    assert_equal_run(tmp_path / "lora", uncut / "lora")


def test_all_end_when_one_is_killed_and_say_which(data: Path, tmp_path: Path) -> None:
    ended = run_jobs(2, folder=data, output=tmp_path, jobs=["lora"], kill=[3, 1])
    assert ended.returncode != 0
    (said,) = {
        line.partition("PeerError: ")[2]
        for line in ended.stderr.splitlines()
        if "PeerError: " in line
    }
    assert said.startswith("process 1 of 2 (")
    assert "was killed or has crashed, so this process ends, too" in said
