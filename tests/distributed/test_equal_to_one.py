"""Several processes train, evaluate and predict what one process does, to rounding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.jobs import JOBS
from tests.distributed.launching import run_jobs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[(2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp")], ids=str)
def by_many(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, data: Path
) -> Path:
    size, parallel = request.param
    output = tmp_path_factory.mktemp(f"by-{size}-{parallel}")
    training = {"parallel": parallel}
    ended = run_jobs(size, folder=data, output=output, jobs=list(JOBS), training=training)
    assert ended.returncode == 0, ended.stderr
    return output


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a classifier's folder."""
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {f"{path.name} {name}": t for path in files for name, t in load_file(path).items()}


def losses_in(folder: Path) -> list[float]:
    """Of the steps of a run."""
    return [row["loss"] for row in rows_of(folder / "metrics.jsonl")]


def assert_same_run(found: Path, expected: Path) -> None:
    """The folders of two runs have the same files, losses and weights, to rounding."""
    names = [{path.name for path in folder.iterdir()} for folder in (found, expected)]
    assert names[0] == names[1]
    assert losses_in(found) == pytest.approx(losses_in(expected), rel=1e-4, abs=1e-6)
    weights = weights_in(found)
    for name, tensor in weights_in(expected).items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=2e-5, msg=name)


def assert_equal_run(found: Path, expected: Path) -> None:
    """Two runs have the same losses and weights, bit by bit."""
    weights, others = weights_in(found), weights_in(expected)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in others.items())
    assert losses_in(found) == losses_in(expected)


@pytest.mark.parametrize("job", JOBS)
def test_folders_have_the_same_files(by_one: Path, by_many: Path, job: str) -> None:
    names = [{path.name for path in (by / job).iterdir()} for by in (by_one, by_many)]
    assert names[0] == names[1]


@pytest.mark.parametrize("job", [name for name in JOBS if JOBS[name]["method"] in ("lora", "full")])
def test_losses_are_equal_step_by_step(by_one: Path, by_many: Path, job: str) -> None:
    one, many = (rows_of(by / job / "metrics.jsonl") for by in (by_one, by_many))
    assert [row["step"] for row in many] == [row["step"] for row in one]
    for name in ("loss", "grad_norm", "lr", "dev_loss", "dev_accuracy", "dev_rmse"):
        assert [row.get(name) for row in many] == [
            None if name not in row else pytest.approx(row[name], rel=1e-4, abs=1e-6) for row in one
        ]


@pytest.mark.parametrize("job", JOBS)
def test_weights_are_equal(by_one: Path, by_many: Path, job: str) -> None:
    if job == "zero-shot":  # has none of its own
        return
    one, many = weights_in(by_one / job), weights_in(by_many / job)
    assert one.keys() == many.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(many[name], tensor, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("job", JOBS)
def test_every_row_is_predicted_once(by_one: Path, by_many: Path, job: str) -> None:
    one, many = (rows_of(by / job / "predictions.jsonl") for by in (by_one, by_many))
    assert [(row["split"], row["text"]) for row in many] == [
        (row["split"], row["text"]) for row in one
    ]
    for mine, theirs in zip(many, one, strict=True):
        assert mine.keys() == theirs.keys()
        for name in {"probabilities", "value"} & theirs.keys():
            assert mine[name] == pytest.approx(theirs[name], abs=1e-5)
