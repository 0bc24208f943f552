"""Memory that training frees goes back to the system."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from minllama.training.malloc import give_back_freed_memory
if sys.argv[1] == "give back":
    assert give_back_freed_memory()
torch.empty(30 * 2**18).zero_()  # 30 MiB: glibc keeps blocks of this size from now on
kept = []
for i in range(40):  # between what stays, what goes leaves holes that the next do not fit into
    some = torch.empty((5 + i % 2) * 2**18 + i * 1024).zero_()
    kept.append(torch.empty(2**16).zero_())
    larger = torch.empty((10 + i) * 2**17).zero_()
    del some, larger
with open("/proc/self/statm") as statm:
    print(int(statm.read().split()[1]) * resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this is about glibc's malloc")
def test_freed_blocks_are_not_kept():
    sizes = {}
    for how in ("as it is", "give back"):
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True
        )
        sizes[how] = int(result.stdout)
    assert sizes["give back"] < sizes["as it is"] - 5 * 2**20
