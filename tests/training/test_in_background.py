"""Work in a thread beside the training: one thing at a time, and no error is lost."""

import threading

import pytest

from minllama.errors import MinllamaError
from minllama.training.run_checkpoint import InBackground


def test_one_thing_is_done_at_a_time() -> None:
    background, may_end, done = InBackground(), threading.Event(), []

    def first() -> None:
        may_end.wait(60)
        done.append("first")

    background.begin(first)
    assert not done
    # The second waits for the first, which ends when the timer says so.
    timer = threading.Timer(0.2, may_end.set)
    timer.start()
    background.begin(lambda: done.append("second"))
    assert done[0] == "first"
    background.wait()
    assert done == ["first", "second"]


def test_an_error_is_raised_when_it_is_waited_for_and_once() -> None:
    background = InBackground()

    def fail() -> None:
        raise MinllamaError("the disk is full")

    background.begin(fail)
    with pytest.raises(MinllamaError, match="the disk is full"):
        background.begin(lambda: None)
    background.wait()
