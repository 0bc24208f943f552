"""How many CPUs this process may use, where a container grants fewer than the machine has.

torch counts the machine's. Threads beyond a container's share take turns on it, and wait for one
another at the end of every operation. Knows nothing of torch, which reads the variable when it is
imported.
"""

import math
import os
from pathlib import Path

# The shares of control groups, version 2 and 1, as a container sees its own (cgroups(7)).
SHARE = Path("/sys/fs/cgroup/cpu.max")
OLD_SHARE = (
    Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
    Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)
THREADS = "OMP_NUM_THREADS"


def keep_to_granted_cpus() -> None:
    """Let libraries start no more threads than that, unless somebody has said how many."""
    granted = granted_cpus()
    if granted is not None and granted < (os.cpu_count() or 1):
        os.environ.setdefault(THREADS, str(granted))


def granted_cpus() -> int | None:
    """A container's share of CPU time, in CPUs, rounded up; None where there is no limit."""
    try:
        if SHARE.exists():
            quota, period = SHARE.read_text(encoding="ascii").split()
        else:
            quota, period = (path.read_text(encoding="ascii") for path in OLD_SHARE)
        share = float(quota) / float(period)  # "max" where there is none, or -1
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return math.ceil(share) if 0 < share < math.inf else None
