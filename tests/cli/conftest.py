"""What tests of several commands need."""

import io
import sys

import pytest

from minllama import cli


@pytest.fixture
def classify(capfd, monkeypatch, base, tmp_path):
    """Call `minllama classify` in tmp_path: its status and what is on standard output and error."""
    monkeypatch.chdir(tmp_path)

    def call(*args, stdin=b"", model=base):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        start = ["classify", "-m", str(model), "--device", "cpu", "--labels", "bad,good"]
        with pytest.raises(SystemExit) as ended:
            cli.main([*start, *map(str, args)])
        captured = capfd.readouterr()
        return ended.value.code, captured.out, captured.err

    return call
