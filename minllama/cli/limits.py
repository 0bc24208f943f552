"""Limit threads to the CPUs that a container grants, if the machine has more.

torch counts the machine's CPUs. Threads beyond the container's share wait for one another at the
end of every operation. `minllama.cli.main` calls it before torch is imported, which then reads the
environment variable.
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


def keep_to_granted_cpus() -> None:
    """Limit the threads of libraries to the granted CPUs, unless the user has set a number."""
    granted = granted_cpus()
    if granted is not None and granted < (os.cpu_count() or 1):
        os.environ.setdefault(THREADS, str(granted))


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
