"""How many threads share a pass: claims about counts, with times that are made up, and one real."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minllama.kernels.cpu import team
from minllama.kernels.cpu.library import best_level
from minllama.kernels.hardware import PORTABLE

STEP = 0.004


class Passes:
    """Passes of 4 ms, one after the other, on a machine that gives them `cores`."""

    def __init__(self, threads):
        self.team, self.threads, self.now = team.Team(), threads, 0.0

    def run(self, seconds, cores):
        """The numbers of threads of the passes of so many seconds, in the order of use."""
        used, ends = [], self.now + seconds
        while self.now < ends:
            count = self.team.size(self.threads, self.now)
            missing = max(0.0, count - cores)
            self.team.ran(count, self.now, self.now + STEP, missing * STEP)
            self.now += STEP
            used.append(count)
        return used


def test_who_has_all_cores_uses_all_threads():
    assert set(Passes(2).run(5, cores=2)) == {2}
    assert set(Passes(8).run(5, cores=7.8)) == {8}  # what else runs now and then costs less


@pytest.mark.parametrize(
    ("threads", "cores", "left"), [(2, 1.5, 1), (8, 7, 7), (8, 4.5, 4), (2, 0.3, 1)]
)
def test_as_many_threads_as_miss_a_core_are_left_out(threads, cores, left):
    passes = Passes(threads)
    passes.run(3, cores)
    used = passes.run(20, cores)
    assert min(used) == left
    assert used.count(left) > 0.9 * len(used)
    assert max(used) == threads  # tried again now and then


def test_all_threads_are_back_soon_after_the_cores_are():
    passes = Passes(4)
    passes.run(10, cores=3)
    passes.run(team.LONGEST_PAUSE_S, cores=4)
    assert set(passes.run(5, cores=4)) == {4}


def test_a_short_loss_costs_a_short_pause():
    passes = Passes(2)
    passes.run(team.WINDOW_S + STEP, cores=1)
    assert passes.run(team.FIRST_PAUSE_S / 2, cores=2)[-1] == 1
    passes.run(team.FIRST_PAUSE_S, cores=2)
    assert set(passes.run(1, cores=2)) == {2}


def test_one_thread_has_nobody_to_wait_for():
    assert set(Passes(1).run(1, cores=0.5)) == {1}


PINNED = """
import os, sys, torch
from minllama.engine import cpu
from minllama.engine.choose import engine_for
from tests.tiny import our_model, random_ids

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_num_threads(2)
used = []
real = cpu._TEAM.ran
def ran(threads, began, ended, lost):
    used.append((threads, lost / (ended - began)))
    real(threads, began, ended, lost)
cpu._TEAM.ran = ran
model = our_model(dim=256, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=64, hidden_dim=512)
engine = engine_for(model)
with torch.inference_mode():
    for _ in range(3000):
        engine.forward(random_ids(1, 64), cache=model.new_cache(1, 64))
        if used[-1][0] == 1:
            break
assert used[-1][0] == 1, used[-20:]
assert max(lost for threads, lost in used if threads == 2) > 0.25
"""


@pytest.mark.skipif(best_level() == PORTABLE, reason="passes run torch's modules")
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads can't be bound to a core")
@pytest.mark.skipif("TSAN_OPTIONS" in os.environ, reason="torch's OpenMP is not instrumented")
def test_two_threads_on_one_core_become_one():
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", PINNED], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
