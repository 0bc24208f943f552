"""The time of a run of `--method auto`: how much is left, and how long something may take."""

import math
import time
from collections.abc import Callable

from minllama.text import duration

# An estimate from first batches is exceeded now and then: by other work on the machine, and by long
# texts. A rung starts if this many times its estimate fits.
SAFETY = 1.2
REPORT_SECONDS = 6.0  # for the page, its figures and the baselines of a run, whatever its size


class Budget:
    """Counts down from a number of minutes.

    Args:
        minutes: for the whole run.
        clock: returns seconds.
        spent: seconds that the run took before it was interrupted.

    Attributes:
        reserve: seconds that are kept for what comes after the ladder: predictions for the report,
            and the report.
    """

    def __init__(
        self,
        minutes: float,
        *,
        clock: Callable[[], float] = time.perf_counter,
        spent: float = 0.0,
    ) -> None:
        self._seconds, self.clock = 60 * minutes, clock
        self._began = clock() - spent
        self.reserve = REPORT_SECONDS

    @property
    def spent(self) -> float:
        """Seconds since the beginning, also those before an interruption."""
        return self.clock() - self._began

    def add(self, seconds: float) -> None:
        """Count seconds of an earlier process."""
        self._began -= seconds

    @property
    def left(self) -> float:
        """Seconds that the ladder may still take; negative when they are over."""
        return self._seconds - self.spent - self.reserve

    def allows(self, seconds: float) -> bool:
        """Whether something that takes about so many seconds may start."""
        return seconds * SAFETY <= self.left

    @property
    def left_in_words(self) -> str:
        """How much time is left, as part of a sentence."""
        return f"{duration(self.left)} were left" if self.left > 0 else "no time was left"

    def minutes_for(self, seconds: float) -> int:
        """The minutes with which something that takes so many more seconds would fit."""
        return math.ceil((self.spent + self.reserve + seconds * SAFETY) / 60)
