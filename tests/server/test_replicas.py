"""`minllama serve --replicas`: Ray Serve answers as one process does, also when a replica dies."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from minllama import Tokenizer, generate, load_pretrained
from minllama.errors import OptionError

pytest.importorskip("ray.serve", reason="needs ray[serve], the extra ray")
from minllama.server.replicas import application

pytestmark = pytest.mark.slow
KEY = {"Authorization": "Bearer secret"}
STARTS = 240  # seconds within which replicas are ready


@contextlib.contextmanager
def replicas_of(model: Path, log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The address of two replicas, and the command's process."""
    command = [sys.executable, "-m", "minllama", "serve", str(model), "--replicas", "2"]
    options = ["--replica-cpus", "0.5", "--port", "0", "--api-key", "secret", "--dtype", "float32"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with log.open("w") as file:
        started = subprocess.Popen([*command, *options], stdout=file, stderr=file, env=environment)
    process = psutil.Process(started.pid)
    try:
        until = time.monotonic() + STARTS
        while "serving on " not in log.read_text():
            assert started.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.5)
        yield log.read_text().partition("serving on ")[2].split(",")[0], process
    finally:
        for one in (*process.children(recursive=True), process) if process.is_running() else ():
            with contextlib.suppress(psutil.Error):
                one.kill()
        started.wait()


def replica_ids(process: psutil.Process) -> list[int]:
    """Those of the replicas among a command's processes."""
    found = []
    for one in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("ServeReplica" in part for part in one.cmdline()):
                found.append(one.pid)
    return found


def test_replicas_answer_as_one_process_and_survive_a_kill(base: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    llama, tokenizer = load_pretrained(base), Tokenizer.from_pretrained(base)
    (expected,) = generate(llama, tokenizer, "Once upon", max_new_tokens=8, temperature=0)
    body = {"prompt": "Once upon", "max_tokens": 8, "temperature": 0}
    with replicas_of(base, log) as (url, process):
        with httpx.Client(base_url=url, headers=KEY, timeout=60) as client:
            assert client.get("/ready").json() == {"status": "ready"}
            model = client.get("/v1/models").json()["data"][0]["id"]

            def text() -> str:
                answer = client.post("/v1/completions", json={"model": model, **body})
                assert answer.status_code == 200, answer.text
                return str(answer.json()["choices"][0]["text"])

            assert {text() for _ in range(8)} == {expected.text}
            streamed = client.post("/v1/completions", json={"model": model, "stream": True, **body})
            assert streamed.text.rstrip().endswith("data: [DONE]")
            assert httpx.get(f"{url}/v1/models").status_code == 401
            first, *_ = replica_ids(process)
            os.kill(first, signal.SIGKILL)
            answered = [text() for _ in range(8)]
            assert set(answered) == {expected.text}
            until = time.monotonic() + STARTS
            while len(set(replica_ids(process)) - {first}) < 2:
                assert time.monotonic() < until
                time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert "Traceback" not in log.read_text()
    assert "SIGTERM" not in log.read_text()


def test_arguments_of_a_config_file_are_checked() -> None:
    with pytest.raises(OptionError, match="no option 'max_quue'; see minllama serve --help"):
        application({"max_quue": 1})
    with pytest.raises(OptionError, match="models must be a list"):
        application({"models": "runs/sst"})
    with pytest.raises(OptionError, match="max_queue"):
        application({"max_queue": -1})
