"""What the launcher says of this process: the only place that reads its environment variables.

`torchrun` sets them (https://docs.pytorch.org/docs/stable/elastic/run.html), and so do schedulers
that start processes by themselves. Without them there is one process.
"""

import os
from dataclasses import dataclass

from minllama.errors import OptionError

ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """A process among those that were started together.

    Attributes:
        rank: its number, 0 to size - 1.
        size: how many processes there are, on all hosts.
        local_rank: its number on its host, which is that of its GPU.
        restarts: how often the launcher has started all of them again.
        local_size: how many processes its host has.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def launch() -> Launch:
    """This process among those that were started together; alone without a launcher.

    Raises:
        OptionError: the launcher's variables are incomplete, or no numbers.
    """
    # Some platforms set WORLD_SIZE for processes of their own, too.
    size = _number("WORLD_SIZE", 1, least=1) if os.environ.get("RANK") else 1
    if size == 1:
        return Launch(restarts=_number("TORCHELASTIC_RESTART_COUNT", 0))
    missing = [name for name in ADDRESS if not os.environ.get(name)]
    if missing:
        raise OptionError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set; start several processes "
            "with torchrun, or unset RANK"
        )
    rank = _number("RANK", 0)
    if rank >= size:
        raise OptionError(f"RANK is {rank}, but WORLD_SIZE is {size}; start with torchrun")
    return Launch(
        rank=rank,
        size=size,
        local_rank=_number("LOCAL_RANK", 0),
        local_size=_number("LOCAL_WORLD_SIZE", 1, least=1),
        restarts=_number("TORCHELASTIC_RESTART_COUNT", 0),
    )


def _number(name: str, default: int, *, least: int = 0) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < least:
        raise OptionError(
            f"the environment variable {name} must be a number from {least} on, not {text!r}; "
            "start several processes with torchrun, or unset it"
        )
    return int(text)
