"""Runs whose weights are divided (`--parallel fsdp`), and their checkpoints.

That they train what one process does is in `test_equal_to_one`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minllama.training.tensor_files import read_tensors
from tests.distributed.launching import run_jobs, torchrun
from tests.distributed.test_commands import said, train
from tests.distributed.test_equal_to_one import assert_equal_run, assert_same_run, rows_of

pytestmark = pytest.mark.slow
FSDP, DDP = {"parallel": "fsdp"}, {"parallel": "ddp"}
STOP = 5  # of eight steps; after the fourth is an evaluation


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    """Folders of runs of all weights that were interrupted after the fifth step."""
    found = {}
    for name, size, training in (("one", 1, {}), ("ddp", 2, DDP), ("fsdp", 2, FSDP)):
        output = tmp_path_factory.mktemp(f"interrupted-{name}")
        ended = run_jobs(
            size, folder=data, output=output, jobs=["full"], interrupt=STOP, training=training
        )
        assert ended.returncode == 0, ended.stderr
        assert len(rows_of(output / "full" / "metrics.jsonl")) == STOP
        found[name] = output
    return found


def test_each_process_has_its_rows_in_a_checkpoint(interrupted: dict[str, Path]) -> None:
    whole, divided = (interrupted[name] / "full" / "checkpoint" for name in ("ddp", "fsdp"))
    names = {path.name for path in divided.iterdir()}
    kinds = ("weights", "optimizer", "best-4")
    parts = {k: [f"{k}-{n:05}-of-00002.safetensors" for n in (1, 2)] for k in kinds}
    assert names == {"state.json", *(name for kind in kinds for name in parts[kind])}
    assert json.loads((divided / "state.json").read_text())["files"].keys() == names - {
        "state.json"
    }
    for kind in kinds:
        expected = load_file(whole / f"{kind}.safetensors")
        found = read_tensors([divided / name for name in parts[kind]])
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5, msg=name)
        sizes = [(divided / name).stat().st_size for name in parts[kind]]
        assert max(sizes) < 0.6 * (whole / f"{kind}.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("before", "size", "parallel"),
    [
        *(("fsdp", 1, "auto"), ("fsdp", 4, "fsdp"), ("fsdp", 2, "ddp")),
        *(("one", 4, "fsdp"), ("ddp", 2, "fsdp")),
    ],
)
def test_a_run_goes_on_divided_in_another_way(
    interrupted: dict[str, Path],
    by_one: Path,
    data: Path,
    tmp_path: Path,
    before: str,
    size: int,
    parallel: str,
) -> None:
    shutil.copytree(interrupted[before], tmp_path, dirs_exist_ok=True)
    training = {"parallel": parallel}
    ended = run_jobs(
        size, folder=data, output=tmp_path, jobs=["full"], resume=True, training=training
    )
    assert ended.returncode == 0, ended.stderr
    assert_same_run(tmp_path / "full", by_one / "full")


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    output = tmp_path_factory.mktemp("uncut")
    training = {**FSDP, "save_every": 2}
    ended = run_jobs(2, folder=data, output=output, jobs=["full"], training=training)
    assert ended.returncode == 0, ended.stderr
    return output


@pytest.mark.parametrize(
    "killed",
    [
        {"kill": [5, 1]},
        {"kill_in_save": [1, 1, False]},
        {"kill_in_save": [2, 0, True]},
        {"kill_in_save": [2, 1, True]},
    ],
    ids=str,
)
def test_the_launcher_restarts_a_killed_run_exactly(
    uncut: Path, data: Path, tmp_path: Path, killed: dict[str, list[int]]
) -> None:
    """The checkpoint is the one before the save in which a process was killed."""
    ended = run_jobs(
        2,
        options=("--max-restarts", "1"),
        folder=data,
        output=tmp_path,
        jobs=["full"],
        training={**FSDP, "save_every": 2},
        **killed,
    )
    assert ended.returncode == 0, ended.stderr
    assert_equal_run(tmp_path / "full", uncut / "full")
    assert not list((tmp_path / "full").glob(".*"))


def test_one_process_is_refused(data: Path, tmp_path: Path) -> None:
    ended = torchrun(1, *train(data, tmp_path / "run", "--method", "lora", "--parallel", "fsdp"))
    assert ended.returncode != 0
    assert (
        "--parallel fsdp divides weights among processes, and there is one" in said(ended.stderr)[0]
    )
    assert not (tmp_path / "run").exists()


def test_weights_of_several_dtypes_are_divided(data: Path) -> None:
    ended = torchrun(2, "tests/distributed/half.py", data / "base")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["same_dtypes"]
    assert found["fsdp"] == pytest.approx(found["ddp"], rel=0.02)
    assert found["change"] < 0.02  # two steps of AdamW at most, where a gradient is near zero
