"""Ctrl-C, once or twice, ends a command with status 130 and no traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("fcntl")


def heeding_ctrl_c() -> None:
    """A shell that runs the tests in the background has them ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("gap", [0.0, 0.05])
@pytest.mark.parametrize(
    "moment",
    [0.7, pytest.param(0.3, marks=pytest.mark.slow), pytest.param(2.0, marks=pytest.mark.slow)],
)
def test_a_second_interrupt_ends_a_run_as_the_first(
    tmp_path: Path, moment: float, gap: float
) -> None:
    lines = [f"text {i},{'xy'[i % 2]}" for i in range(40)]
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *lines, ""]))
    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "minllama", "train", "--train", "t.csv", "-o", "out"],
            cwd=tmp_path,
            stderr=stderr,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb"},
            preexec_fn=heeding_ctrl_c,
        )
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        time.sleep(gap)
        process.send_signal(signal.SIGINT)
        # To a shell both are 130: while it ends, Python gives the signal back to the system.
        assert process.wait(60) in (130, -signal.SIGINT)
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".lock")]


IN_A_CALLBACK = """
import sys, time, minllama.__main__ as door

class Dying:
    def __del__(self):
        raise KeyboardInterrupt  # as where Ctrl-C comes while it runs

sys.unraisablehook = door._ignored
dying = Dying()
del dying
try:
    time.sleep(30)
except KeyboardInterrupt:
    print("raised")
"""


def test_an_interrupt_in_a_callback_comes_once_more():
    """Python could only print it there, with a traceback, and go on."""
    ended = subprocess.run(
        [sys.executable, "-c", IN_A_CALLBACK],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=heeding_ctrl_c,
    )
    assert (ended.stdout, ended.stderr) == ("raised\n", "")
