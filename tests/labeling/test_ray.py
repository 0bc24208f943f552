"""Ray Data gives the rows of the local engine, also where its processes are killed.

Needs Ray, which `pip install minllama[ray]` brings: `python -m pytest tests/labeling/test_ray.py`.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from minllama.errors import DataError, MinllamaError
from minllama.labeling import Labeler, label_files
from minllama.options.labeling import LabelingOptions
from tests.labeling.conftest import write_rows

ray = pytest.importorskip("ray", reason="needs Ray: pip install minllama[ray]")
pytest.importorskip("ray.data", reason="needs Ray Data: pip install minllama[ray]")

pytestmark = [
    pytest.mark.slow,
    # Of Ray's own code and sockets.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
def labeler(folder_of_classifier: Path) -> Labeler:
    return Labeler(folder_of_classifier)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray with two processors, whatever this machine has."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def rows_in(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder).sort_values("row_id", ignore_index=True)


def check_same(one: Path, other: Path) -> None:
    """The same rows; probabilities up to rounding, which depends on a text's batch."""
    left, right = rows_in(one), rows_in(other)
    assert left["row_id"].is_unique
    assert right["row_id"].is_unique
    pd.testing.assert_frame_equal(left, right[left.columns], rtol=1e-4, check_categorical=False)


def test_ray_gives_the_rows_of_the_local_engine(
    labeler: Labeler, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # people name their folders from where they are
    source = str(write_rows(tmp_path / "in", 3, 50, bad=(7, 60, 141)))
    for engine in ("local", "ray"):
        options = LabelingOptions(engine=engine, rows_per_part=16, actors=1)
        outcome = label_files(labeler, source, Path(engine), options=options, keep=["key"])
        assert (outcome.labeled, outcome.bad) == (147, 3)
    check_same(tmp_path / "local", tmp_path / "ray")
    assert not (tmp_path / "ray" / "_checkpoint").exists()
    parts = [*(tmp_path / "ray" / "status=labeled").glob("*.parquet")]
    assert len(parts) >= 3


def test_errors_are_ours(labeler: Labeler, tmp_path: Path, cluster: None) -> None:
    source = write_rows(tmp_path / "in", 1, 5)
    options = LabelingOptions(engine="ray", actors=3)
    with pytest.raises(MinllamaError, match="need more than the 1 CPUs that Ray has"):
        label_files(labeler, str(source), tmp_path / "out", options=options)
    (source / "rows-0.parquet").write_bytes(b"PAR1 and nothing else")
    options = LabelingOptions(engine="ray")
    with pytest.raises(DataError, match="damaged, or not a Parquet file"):
        label_files(labeler, str(source), tmp_path / "out", options=options, force=True)


def actor_of_ray(driver: int) -> int | None:
    """The process of an actor that labels, among the descendants of a driver's Ray."""
    found = subprocess.run(
        ["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True
    ).stdout
    for line in found.splitlines():
        number, _, title = line.strip().partition(" ")
        if title.startswith("ray::MapWorker") and is_below(int(number), driver):
            return int(number)
    return None


def is_below(process: int, ancestor: int) -> bool:
    while process > 1:
        if process == ancestor:
            return True
        try:
            stat = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            return False
        process = int(stat.rpartition(")")[2].split()[1])
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_killed_actors_and_a_killed_driver_lose_and_repeat_nothing(
    labeler: Labeler, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "in", 2, 3000, bad=tuple(range(0, 6000, 499)))
    label_files(labeler, str(source), tmp_path / "local")
    command = [
        *(sys.executable, "-m", "minllama", "classify", labeler.classifier_name),
        *("--input", str(source), "--output", str(tmp_path / "ray"), "--engine", "ray"),
        *("--rows-per-part", "64", "--resume"),
    ]

    def parts() -> int:
        return len(list((tmp_path / "ray").rglob("*.parquet")))

    def run_until(n_parts: int) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        while parts() < n_parts:
            assert process.poll() is None
            time.sleep(0.02)
        return process

    process = run_until(6)
    actor = actor_of_ray(process.pid)
    assert actor is not None
    os.kill(actor, signal.SIGKILL)  # Ray starts another
    while parts() < 20:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # the driver, and Ray with it
    process.wait()
    before = parts()
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    assert parts() > before
    check_same(tmp_path / "local", tmp_path / "ray")
    assert len(rows_in(tmp_path / "ray")) == 6000
