"""How many threads share a forward pass: fewer while other processes use their cores."""

# Schedulers let a thread that has waited go first: in a shorter window it loses nothing.
WINDOW_S = 0.03
TOLERATED = 0.25  # of a core: one thread of two decodes at three quarters of the speed of both
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0


class Team:
    """The threads of forward passes, which wait for one another about a hundred times in each.

    So one that has lost its core to another process for a few milliseconds holds up all of them,
    and a pass is faster without it. As soon as threads spend more than `TOLERATED` of the time
    without a core, as many as are missing are left out; after a pause, which doubles each time that
    this was too early, all of them are tried again. Results don't depend on the number of threads.
    Waiting for weights that are still on disk counts as well, for the first passes over a new file.

    Times are seconds, of one clock that never goes back.
    """

    def __init__(self) -> None:
        self._left_out = 0
        self._pause = FIRST_PAUSE_S
        self._pause_ends = 0.0
        self._elapsed = self._lost = 0.0

    def size(self, threads: int, now: float) -> int:
        """How many of these threads should compute a pass that begins now, at least one."""
        if self._left_out and now >= self._pause_ends:
            self._left_out = 0
        return max(1, threads - self._left_out)

    def ran(self, threads: int, began: float, ended: float, lost: float) -> None:
        """Note a pass.

        Args:
            threads: that computed it.
            began, ended: when.
            lost: time that they spent without a core, summed over threads.
        """
        if threads == 1:
            return
        self._elapsed += ended - began
        self._lost += lost
        if self._elapsed < WINDOW_S:
            return
        missing = self._lost / self._elapsed
        self._elapsed = self._lost = 0.0
        if missing > TOLERATED:
            self._left_out += max(1, round(missing))
            self._pause_ends = ended + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        elif not self._left_out:
            self._pause = FIRST_PAUSE_S
