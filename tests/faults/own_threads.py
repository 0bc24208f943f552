"""A plugin for pytest: compiled code runs on threads of its own, more than one of them.

ThreadSanitizer knows how those wait for one another; of OpenMP's, in a library that was not
compiled for it, it does not.
"""

import torch

from minllama.engine import cpu
from minllama.kernels.cpu import library


def pytest_configure() -> None:
    library._use_torchs_threads = lambda found: None
    torch.set_num_threads(4)
    cpu._TEAM.size = lambda threads, now: threads  # also with fewer cores than threads
