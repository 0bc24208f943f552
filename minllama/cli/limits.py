"""Keep torch's threads from waiting for cores that others have.

torch counts the machine's CPUs, also where a container grants fewer. Threads beyond its share, or
beside another busy process, wait for one another at the end of every operation. Both functions set
environment variables that torch's OpenMP library reads when torch is imported.
"""

import math
import os
from pathlib import Path

# The CPU quota of the container's control group, version 2 and 1 (cgroups(7)).
SHARE = Path("/sys/fs/cgroup/cpu.max")
OLD_SHARE = (
    Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
    Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)
THREADS = "OMP_NUM_THREADS"
# GNU OpenMP: for how many turns of a loop a thread waits on its core before it gives it back. By
# default 300,000, about four ms, or 1,000 where a process has more threads than cores.
SPINS, POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
FEW_SPINS = "1000"


def keep_to_granted_cpus() -> None:
    """Limit the threads of libraries to the granted CPUs, unless the user has set a number."""
    granted = granted_cpus()
    if granted is not None and granted < (os.cpu_count() or 1):
        os.environ.setdefault(THREADS, str(granted))


def give_cores_back() -> None:
    """Let threads wait on their cores for microseconds only, unless the user has set how they wait.

    Two runs of training on the same cores are done in a third of the time then, and one takes no
    longer. Steps of decoding are too short for it: they would lose 5%.
    """
    if POLICY not in os.environ:
        os.environ.setdefault(SPINS, FEW_SPINS)


def granted_cpus() -> int | None:
    """A container's CPU quota, in CPUs, rounded up; None without a limit."""
    try:
        if SHARE.exists():
            quota, period = SHARE.read_text(encoding="ascii").split()
        else:
            quota, period = (path.read_text(encoding="ascii") for path in OLD_SHARE)
        share = float(quota) / float(period)  # "max" or -1 without a limit
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return math.ceil(share) if 0 < share < math.inf else None
