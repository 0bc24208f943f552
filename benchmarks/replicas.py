"""Replicas of a server over time, under load and after it, and requests that failed: autoscaling.

    python benchmarks/replicas.py [MODEL ...] [--max-replicas 2] [--clients 48] [--seconds 240]

Starts `minllama serve --replicas 1 --max-replicas N`, has so many clients complete a prompt again
and again for so many seconds, and then two clients, a request a second each, until one replica is
left or --wait seconds are over. Prints a line of JSON for each change of the replicas' states, with
the seconds since the load began, and one for each phase: requests, failures by kind, and seconds
that a request took. Needs the extras ray and serve.
"""

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve

PROMPT = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}


class Load:
    """Clients that complete the prompt again and again.

    Attributes:
        seconds: that answered requests took.
        failures: what other ones ended with, and how often.
    """

    def __init__(self, url: str, model: str, clients: int, pause: float = 0) -> None:
        self.seconds: list[float] = []
        self.failures: collections.Counter[str] = collections.Counter()
        self._url, self._body, self._pause = url, {"model": model, **PROMPT}, pause
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=600) as client:
            while not self._ended.is_set():
                began = time.monotonic()
                try:
                    answer = client.post("/v1/completions", json=self._body)
                    kind = "" if answer.status_code == 200 else str(answer.status_code)
                except httpx.HTTPError as error:
                    kind = type(error).__name__
                if kind:
                    self.failures[kind] += 1
                else:
                    self.seconds.append(time.monotonic() - began)
                self._ended.wait(self._pause)

    def end(self) -> dict[str, Any]:
        """Let each client finish its request; the figures."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        found: dict[str, Any] = {"clients": len(self._threads), "answered": len(self.seconds)}
        found["failed"] = dict(self.failures)
        if len(self.seconds) > 1:
            found["median s"] = round(statistics.median(self.seconds), 2)
            found["95th percentile s"] = round(statistics.quantiles(self.seconds, n=20)[-1], 2)
        return found


def states() -> dict[str, int]:
    """How many replicas are in each state, such as RUNNING."""
    (application,) = serve.status().applications.values()
    (deployment,) = application.deployments.values()
    return {str(k): n for k, n in sorted(deployment.replica_states.items()) if n}


def watch(began: float, until: Callable[[dict[str, int]], bool], seconds: float) -> None:
    """Print each change of the replicas until a condition holds or seconds are over."""
    last, end = {}, time.monotonic() + seconds
    while time.monotonic() < end:
        now = states()
        if now != last:
            print(json.dumps({"s": round(time.monotonic() - began), "replicas": now}), flush=True)
            last = now
        if until(now):
            return
        time.sleep(1)


def started(command: list[str], log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """The server's process, and its address once it serves."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    while "serving on " not in log.read_text():
        if process.poll() is not None:
            sys.exit(log.read_text())
        time.sleep(0.5)
    return process, log.read_text().partition("serving on ")[2].split(",")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Autoscaling of replicas under load.")
    parser.add_argument("models", nargs="*")
    parser.add_argument("--max-replicas", type=int, default=2)
    parser.add_argument("--replica-cpus", type=float, default=0.5)
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--wait", type=float, default=900)
    given = parser.parse_args()
    command = [sys.executable, "-m", "minllama", "serve", *given.models, "--replicas", "1"]
    command += ["--max-replicas", str(given.max_replicas), "--port", "0"]
    command += ["--replica-cpus", str(given.replica_cpus)]
    with tempfile.TemporaryDirectory() as folder:
        process, url = started(command, Path(folder) / "log")
        try:
            os.environ.setdefault("RAY_ADDRESS", "auto")
            ray.init(log_to_driver=False, logging_level="ERROR")
            model = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
            began = time.monotonic()
            load = Load(url, model, given.clients)
            watch(began, lambda _: False, given.seconds)
            print(json.dumps({"phase": "load", **load.end()}), flush=True)
            after = time.monotonic() - began
            load = Load(url, model, 2, pause=1)
            watch(began, lambda now: now == {"RUNNING": 1}, given.wait)
            print(json.dumps({"phase": f"after {after:.0f} s", **load.end()}), flush=True)
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
