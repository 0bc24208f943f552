"""Damaged files of each kind are read or refused: a sample of `make fuzz`, and what it found."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.fuzz import CORPUS, check
from tests.faults.readers import READERS, make

FOUND = sorted(path for path in CORPUS.glob("*/*") if path.is_file())
FOLDERS = {name.replace(" ", "_"): name for name in READERS}


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_once_is_read_or_refused(path: Path, tmp_path: Path) -> None:
    check(make(FOLDERS[path.parent.name], tmp_path / "files").open, path.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused(name: str, tmp_path: Path) -> None:
    reader = make(name, tmp_path / "files")
    outcomes = {check(reader.open, seed) for seed in reader.seeds}
    assert "accepted" in outcomes

    @settings(
        max_examples=8 if name == "chat template" else 40,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(reader.seeds), st.randoms(use_true_random=False))
    def damaged(seed: bytes, draw: object) -> None:
        outcomes.add(check(reader.open, reader.mutate(seed, draw)))  # type: ignore[arg-type]

    damaged()
    assert "refused" in outcomes
