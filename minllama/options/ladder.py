"""Options of `--method auto`: the time that it may take, and what it prefers."""

from dataclasses import dataclass
from typing import ClassVar

from minllama.options.base import CheckedOptions, Range, option

PREFERENCES = ("accuracy", "speed")


@dataclass(frozen=True, kw_only=True)
class LadderOptions(CheckedOptions):
    """What `--method auto` may spend and looks for; see `minllama.experiment.ladder`."""

    group: ClassVar[str] = "Method"

    minutes: float = option(
        5.0,
        "with --method auto, the most minutes for everything, report included",
        within=Range(0, low_open=True),
        common=True,
    )
    prefer: str = option(
        "accuracy",
        "with --method auto, choose the best by --metric (accuracy), or the fastest in texts per "
        "second within a point of it (speed)",
        choices=PREFERENCES,
    )
