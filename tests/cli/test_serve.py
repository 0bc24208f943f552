"""Claims about `minllama serve`: what it prints, what it refuses, and how it ends."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from minllama import cli

COMMAND = [sys.executable, "-m", "minllama", "serve"]


@contextmanager
def served(
    *arguments: str, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A process that serves: it, its address, and the lines that it has printed."""
    process = subprocess.Popen(
        [*COMMAND, "--port", "0", "--device", "cpu", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        assert process.poll() is None, process.communicate()
        yield process, lines[0].split()[-1], lines
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and standard error of a process that has been told to end."""
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors


def refused(*arguments: str, **environment: str) -> str:
    finished = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )
    assert finished.returncode == 2, finished
    assert finished.stderr.count("\n") == 1
    return finished.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replica-cpus", "2"], "--replica-cpus: only with --replicas"),
        (["--replicas", "3", "--max-replicas", "2"], "must not be below replicas (3)"),
        (["--replicas", "0"], "replicas"),
    ],
)
def test_options_of_replicas_that_cannot_be_are_one_line(
    capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(["serve", *options])
    assert raised.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_it_prints_a_command_that_works_and_ends_by_a_signal(base: Path, sign: int) -> None:
    with served(str(base)) as (process, _, lines):
        assert re.fullmatch(r"serving on http://127\.0\.0\.1:\d+\n", lines[0])
        assert base.name in lines[1]
        curl = shlex.split(lines[3])
        assert curl[0] == "curl"
        address, body = curl[1], curl[curl.index("-d") + 1]
        answer = httpx.post(
            address, content=body, headers={"Content-Type": "application/json"}, timeout=30
        )
        assert answer.status_code == 200
        assert answer.json()["choices"]
        process.send_signal(sign)
        status, errors = ended(process)
        assert status == 0
        assert "Traceback" not in errors
        (line,) = [line for line in errors.splitlines() if "/v1/" in line]
        assert '"status": 200' in line
        assert "capital" not in line


def test_texts_are_logged_on_request_only(base: Path) -> None:
    with served(str(base), "--log-texts") as (process, url, _):
        body = {"prompt": "a secret", "max_tokens": 2}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=30).status_code == 200
        process.terminate()
        assert "a secret" in ended(process)[1]


def test_keys_come_from_options_files_and_the_environment(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfrom-file\n\n")
    options = ("--api-key", "from-option", "--api-key-file", str(file), "--alias", "x=default")
    with served(str(base), *options[:4], MINLLAMA_API_KEY="from-environment") as (_, url, lines):
        assert "Authorization: Bearer KEY" in lines[3]
        assert httpx.get(f"{url}/v1/models").status_code == 401
        for key in ("from-option", "from-file", "from-environment"):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200


def test_an_open_server_needs_a_key(base: Path) -> None:
    for host in ("0.0.0.0", "::"):
        assert "--api-key" in refused(str(base), "--host", host)
    with served(str(base), "--host", "0.0.0.0", "--allow-unauthenticated") as (_, url, _lines):
        headers = {"Host": "anything.example"}
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200


@pytest.mark.slow
def test_mistakes_are_one_line(base: Path, tmp_path: Path) -> None:
    assert "nothing-here" in refused(str(tmp_path / "nothing-here"))
    assert "--alias" in refused(str(base), "--alias", "x")
    assert "cannot be read" in refused(str(base), "--api-key-file", str(tmp_path / "none"))
    (tmp_path / "empty").write_text("\n")
    assert "no key" in refused(str(base), "--api-key-file", str(tmp_path / "empty"))
    assert "port" in refused(str(base), "--port", "70000")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "--port" in refused(str(base), "--port", str(taken.getsockname()[1]))
