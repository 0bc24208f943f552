"""The classifiers' commands as processes: pipes that stay open or close, signals, a terminal."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from tests.experiment_cases import examples, write_labelled

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}


def test_a_stream_answers_before_it_has_ended(base):
    """More rows than a chunk holds are written, and the pipe stays open."""
    with subprocess.Popen(
        [sys.executable, "-m", "minllama", "classify", "--labels", "a,b", "-m", base, "-i", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as process:
        process.stdin.write(b"".join(b"a b %d\n" % i for i in range(513)))
        process.stdin.flush()
        first = json.loads(process.stdout.readline())
        assert (first["index"], first["text"]) == (0, "a b 0")
        process.stdout.close()  # as `| head -1` does
        process.stdin.close()
        assert process.wait(timeout=60) == 0
        assert b"Traceback" not in process.stderr.read()


def start_training(base, files, output, *, epochs="50", stderr=subprocess.PIPE):
    command = ["train", "--train", files / "many.txt", "--dev", files / "dev.txt", "-m", base]
    how = ["--method", "lora", "--layer", "2"]
    options = ["--epochs", epochs, "--save-every", "1000", "--device", "cpu", *how]
    return subprocess.Popen(
        [sys.executable, "-m", "minllama", *command, *options, "--pooling", "mean", "-o", output],
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "80"},
    )


@pytest.mark.slow
@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="Ctrl-C is ignored here (nohup, &)"
)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint(base, labelled_files, tmp_path, number, status):
    write_labelled(labelled_files / "many.txt", examples(200, seed=8))
    output = tmp_path / "run"
    with start_training(base, labelled_files, output) as process:
        until = time.monotonic() + 60
        while not (output / "metrics.jsonl").exists() or not (output / "metrics.jsonl").read_text():
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert out == b""
    assert b"Traceback" not in err
    assert f"without --force, continues {output}".encode() in err
    assert (output / "checkpoint" / "state.json").exists()
    assert not (output / "classifier.json").exists()


@pytest.mark.slow
def test_a_terminal_shows_bars_that_fit_and_go(base, labelled_files, tmp_path):
    write_labelled(labelled_files / "many.txt", examples(60, seed=8))
    ours, theirs = pty.openpty()
    with start_training(
        base, labelled_files, tmp_path / "run", epochs="5", stderr=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                break
            shown += part
        out, _ = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0, shown
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "reading the training texts" in text
    assert re.search(r"training .*\d+/20", text)
    assert all(len(line.split("\r")[-1]) <= 80 for line in text.split("\r\n") if "━" in line)
    assert b"\x1b" not in out
    assert shown.endswith(b"predictions.jsonl\r\n")
