"""Two hosts, which are network namespaces with names of their own, train what one process does.

Needs Linux, root and `ip` (iproute2); skips without.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launching import HANGS, ROOT
from tests.distributed.test_equal_to_one import rows_of, weights_in

pytestmark = pytest.mark.slow

HOSTS = ("minllama-a", "minllama-b")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 29517
JOBS = ("lora", "full", "frozen")
A_MINUTE = 60.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    """Two network namespaces, joined by a cable."""
    if sys.platform != "linux" or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs Linux with ip and unshare")
    try:
        for host in HOSTS:
            ip("netns", "add", host)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    try:
        ends = ("eth-a", "netns", HOSTS[0]), ("eth-b", "netns", HOSTS[1])
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host, device, address in zip(HOSTS, ("eth-a", "eth-b"), ADDRESSES, strict=True):
            ip("-n", host, "address", "add", f"{address}/24", "dev", device)
            ip("-n", host, "link", "set", device, "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True, timeout=60)


def started(node: int, **asked: Any) -> subprocess.Popen[str]:
    """`torchrun` on one of the hosts, which does jobs of `tests.distributed.jobs`."""
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in asked.items()}
    worker = ROOT / "tests" / "distributed" / "jobs.py"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
        *("--node-rank", str(node), "--master-addr", ADDRESSES[0], "--master-port", str(PORT)),
        *(str(worker), json.dumps(asked)),
    ]
    device = f"eth-{HOSTS[node][-1]}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": device,
    }
    # A host is known by its name.
    there = ["ip", "netns", "exec", HOSTS[node], "unshare", "--uts"]
    named = ["sh", "-c", 'hostname "$0" && exec "$@"', HOSTS[node]]
    return subprocess.Popen(
        [*there, *named, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_hosts_train_what_one_process_does(
    hosts: None, by_one: Path, data: Path, tmp_path: Path
) -> None:
    both = [started(node, folder=data, output=tmp_path, jobs=list(JOBS)) for node in (0, 1)]
    for process in both:
        _, said = process.communicate(timeout=HANGS)
        assert process.returncode == 0, said
    for job in JOBS:
        one, many = weights_in(by_one / job), weights_in(tmp_path / job)
        assert one.keys() == many.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(many[name], tensor, rtol=1e-4, atol=2e-5, msg=name)
        if (by_one / job / "metrics.jsonl").exists():
            losses, expected = (
                [row["loss"] for row in rows_of(by / job / "metrics.jsonl")]
                for by in (tmp_path, by_one)
            )
            assert losses == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_both_end_within_a_minute_when_the_cable_is_cut(
    hosts: None, data: Path, tmp_path: Path
) -> None:
    both = [
        started(node, folder=data, output=tmp_path, jobs=["lora"], stall=[3, 1]) for node in (0, 1)
    ]
    try:
        until = time.monotonic() + HANGS
        while not (tmp_path / "stalled").exists():
            assert time.monotonic() < until
            assert all(process.poll() is None for process in both)
            time.sleep(0.2)
        ip("-n", HOSTS[1], "link", "set", "eth-b", "down")
        cut = time.monotonic()
        said = [process.communicate(timeout=HANGS)[1] for process in both]
        assert time.monotonic() - cut < A_MINUTE
        assert all(process.returncode != 0 for process in both)
        assert "no sign of life" in said[0]
        assert "no longer answers" in said[1] or "no sign of life" in said[1]
    finally:
        for process in both:
            process.kill()
        ip("-n", HOSTS[1], "link", "set", "eth-b", "up")
