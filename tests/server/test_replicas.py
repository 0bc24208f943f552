"""`minllama serve --replicas`: Ray Serve answers as one process does, also when a replica dies.

Replicas follow the load, and no request fails as they come and go.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from minllama import Tokenizer, generate, load_pretrained
from minllama.errors import OptionError
from minllama.options.replicas import ReplicaOptions
from minllama.options.server import ServerOptions

pytest.importorskip("ray.serve", reason="needs ray[serve], the extra ray")
from ray.serve.deployment import deployment_to_schema

from minllama.server.replicas import application, deployment

pytestmark = pytest.mark.slow
KEY = {"Authorization": "Bearer secret"}
STARTS = 240  # seconds within which replicas are ready


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[psutil.Process]:
    """A command of Ray's, whose processes end with the block."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with log.open("w") as file:
        started = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    process = psutil.Process(started.pid)
    try:
        yield process
    finally:
        for one in (*process.children(recursive=True), process) if process.is_running() else ():
            with contextlib.suppress(psutil.Error):
                one.kill()
        started.wait()


def wait_until(condition: Callable[[], bool], process: psutil.Process, log: Path) -> None:
    until = time.monotonic() + STARTS
    while not condition():
        assert process.status() != psutil.STATUS_ZOMBIE, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.5)


@contextlib.contextmanager
def replicas_of(model: Path, log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The address of two replicas, and the command's process."""
    command = [sys.executable, "-m", "minllama", "serve", str(model), "--replicas", "2"]
    options = ["--replica-cpus", "0.5", "--port", "0", "--api-key", "secret", "--dtype", "float32"]
    with running([*command, *options], log) as process:
        wait_until(lambda: "serving on " in log.read_text(), process, log)
        yield log.read_text().partition("serving on ")[2].split(",")[0], process


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
            wait_until(lambda: len(set(replica_ids(process)) - {first}) == 2, process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert "Traceback" not in log.read_text()
    assert "SIGTERM" not in log.read_text()


def test_replicas_follow_the_load_and_no_request_fails(base: Path, tmp_path: Path) -> None:
    log, config = tmp_path / "log", tmp_path / "config.yaml"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2}
    scaling |= {"upscale_delay_s": 2, "downscale_delay_s": 5}
    scaling |= {"metrics_interval_s": 1, "look_back_period_s": 2}
    replica = {"name": "minllama", "autoscaling_config": scaling}
    replica |= {"ray_actor_options": {"num_cpus": 0.5}}
    served = {"import_path": "minllama.server.replicas:application", "deployments": [replica]}
    served |= {"args": {"models": [str(base)]}}
    http = {"host": "127.0.0.1", "port": port}
    config.write_text(json.dumps({"http_options": http, "applications": [served]}))  # is YAML, too
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{url}/ready", timeout=60).status_code == 200
        return False

    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(config)]
    with running(command, log) as process, ThreadPoolExecutor(9) as clients:
        wait_until(is_ready, process, log)
        body = {"prompt": "Once upon", "max_tokens": 64, "temperature": 0, "ignore_eos": True}
        loads = True

        def statuses(_: int) -> list[int]:
            found = []
            with httpx.Client(timeout=STARTS) as client:
                while loads:
                    found.append(client.post(f"{url}/v1/completions", json=body).status_code)
            return found

        try:
            assert len(replica_ids(process)) == 1
            under_load = clients.map(statuses, range(8))
            wait_until(lambda: len(replica_ids(process)) == 2, process, log)
        finally:
            loads = False
        assert {status for found in under_load for status in found} == {200}
        loads = True
        after = clients.submit(statuses, 0)  # of one client, while a replica ends
        try:
            wait_until(lambda: len(replica_ids(process)) == 1, process, log)
        finally:
            loads = False
        assert set(after.result()) == {200}


def test_options_are_those_of_rays_autoscaling() -> None:
    def schema(**values: int) -> Any:
        options = ServerOptions(max_sequences=24)
        return deployment_to_schema(deployment({"model": None}, options, ReplicaOptions(**values)))

    fixed, scaled = schema(replicas=3), schema(replicas=2, max_replicas=5)
    assert fixed.num_replicas == 3
    assert ReplicaOptions(replicas=2, max_replicas=5).numbers == "2 to 5"
    assert ReplicaOptions(max_replicas=1).numbers == "1"
    limits = {"min_replicas": 2, "max_replicas": 5, "target_ongoing_requests": 12}
    assert limits.items() <= dict(scaled.autoscaling_config).items()


def test_arguments_of_a_config_file_are_checked() -> None:
    with pytest.raises(OptionError, match="no option 'max_quue'; see minllama serve --help"):
        application({"max_quue": 1})
    with pytest.raises(OptionError, match="models must be a list"):
        application({"models": "runs/sst"})
    with pytest.raises(OptionError, match="max_queue"):
        application({"max_queue": -1})
