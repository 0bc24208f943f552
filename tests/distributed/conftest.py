"""A tiny model, data, and what one process makes of them."""

import shutil
from pathlib import Path

import pytest

from tests.distributed.jobs import JOBS, experiment, write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A folder with a model and files of texts."""
    folder = tmp_path_factory.mktemp("distributed")
    shutil.copytree(base, folder / "base")
    write_data(folder)
    return folder


@pytest.fixture(scope="session")
def by_one(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A folder with the results of one process, by the names of jobs."""
    from minllama.experiment import run_experiment

    output = tmp_path_factory.mktemp("by-one")
    for name in JOBS:
        run_experiment(experiment(data, output / name, name, {}))
    return output
