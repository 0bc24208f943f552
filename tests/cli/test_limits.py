"""A container's share of the CPUs, as the kernel writes it down."""

import os

import pytest

from minllama.cli import limits


@pytest.mark.parametrize(
    ("content", "cpus"),
    [
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("10000 100000\n", 1),
        ("max 100000\n", None),
        ("nonsense\n", None),
        ("100000 0\n", None),
    ],
)
def test_a_share_is_read_in_cpus(content, cpus, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text(content)
    monkeypatch.setattr(limits, "SHARE", tmp_path / "cpu.max")
    assert limits.granted_cpus() == cpus


@pytest.mark.parametrize(("quota", "cpus"), [("300000", 3), ("-1", None)])
def test_an_old_kernels_share_is_read_too(quota, cpus, tmp_path, monkeypatch):
    files = tmp_path / "quota", tmp_path / "period"
    for path, content in zip(files, (quota, "100000"), strict=True):
        path.write_text(content + "\n")
    monkeypatch.setattr(limits, "SHARE", tmp_path / "none")
    monkeypatch.setattr(limits, "OLD_SHARE", files)
    assert limits.granted_cpus() == cpus
    monkeypatch.setattr(limits, "OLD_SHARE", (tmp_path / "none",) * 2)
    assert limits.granted_cpus() is None


@pytest.mark.parametrize(
    ("granted", "said", "threads"),
    [(2, None, "2"), (2, "5", "5"), (8, None, None), (99, None, None), (None, None, None)],
)
def test_no_more_threads_are_started_than_are_granted(granted, said, threads, monkeypatch):
    monkeypatch.setattr(limits, "granted_cpus", lambda: granted)
    monkeypatch.setattr(limits.os, "cpu_count", lambda: 8)
    monkeypatch.delenv(limits.THREADS, raising=False)
    if said is not None:
        monkeypatch.setenv(limits.THREADS, said)
    with monkeypatch.context() as patch:
        if said is None:  # what it sets goes again with the test
            patch.setenv(limits.THREADS, "")
            patch.delenv(limits.THREADS)
        limits.keep_to_granted_cpus()
        assert os.environ.get(limits.THREADS) == threads


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_give_cores_back_unless_somebody_says_how_they_wait(given, spins, monkeypatch):
    for name in (limits.SPINS, limits.POLICY):
        monkeypatch.setenv(name, "")  # what is set goes again with the test
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    limits.give_cores_back()
    assert os.environ.get(limits.SPINS) == spins
