"""What the launcher's environment means, and what is refused."""

import pytest

from minllama.distributed.launcher import Launch, launch
from minllama.distributed.ranks import current
from minllama.errors import OptionError

ADDRESS = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def nothing_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT", *ADDRESS):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launch()),
        ({"WORLD_SIZE": "4"}, Launch()),  # some platforms set it for other programs
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch()),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "2"},
            Launch(restarts=2),
        ),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **ADDRESS},
            Launch(rank=5, size=8, local_rank=1),
        ),
    ],
)
def test_the_environment_says_which_process_this_is(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Launch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch() == expected
    assert launch().is_first == (expected.rank == 0)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR, MASTER_PORT is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", **ADDRESS}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "0", "WORLD_SIZE": "two", **ADDRESS}, "WORLD_SIZE must be a number from 1 on"),
        ({"RANK": "-1", "WORLD_SIZE": "2", **ADDRESS}, "RANK must be a number from 0 on"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000, **ADDRESS}, "WORLD_SIZE must be a number"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=message):
        launch()


def test_one_process_does_everything_itself() -> None:
    ranks = current()
    assert (ranks.rank, ranks.size, ranks.is_first) == (0, 1, True)
    assert ranks.first(lambda: 3) == 3
    assert ranks.summed([1.5, 2.0]) == [1.5, 2.0]
    assert ranks.collected("a") == ["a"]
    assert ranks.part([1, 2, 3]) == [1, 2, 3]
