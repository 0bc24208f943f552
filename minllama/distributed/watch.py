"""Notice that another process has failed, and say which and why.

A process that fails writes the reason to the launcher's store before it ends. One that is killed
cannot: others of its host see that it is gone, and those elsewhere that it gives no sign of life.
The first to notice writes it down, so that all processes say the same.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minllama.text import one_line

FAILED = "failed"
BEAT_SECONDS = 2.0  # between two signs of life
# Of its own beats: a machine that is suspended silences all, and that is no death.
SILENT_BEATS = 18  # without a sign of life, after which a process counts as dead
GRACE_BEATS = 4  # that a process has to end by itself after another one failed


@dataclass(frozen=True)
class Peer:
    """One of the processes."""

    rank: int
    host: str
    pid: int

    @classmethod
    def here(cls, rank: int) -> "Peer":
        """This process."""
        return cls(rank, socket.gethostname(), os.getpid())

    @property
    def is_gone(self) -> bool:
        """Whether it is of this host and has ended; False if that cannot be known."""
        if self.host != socket.gethostname():
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii", errors="replace")
        except FileNotFoundError:
            if Path("/proc/self/stat").exists():
                return True
        except OSError:
            return False
        else:
            return state.rpartition(")")[2].split()[:1] == ["Z"]  # ended, and not yet waited for
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False


@dataclass(frozen=True)
class Failure:
    """The first process that failed, and the reason: None if it could not say."""

    rank: int
    why: str | None


STORE_IS_GONE = Failure(0, "the launcher's store no longer answers")


class Watch:
    """Gives signs of life to the next process, and looks for those of the one before.

    Args:
        store: the launcher's, of which the thread gets its own connection.
        rank: of this process.
        peers: all of them, by rank.
    """

    def __init__(self, store: Any, rank: int, peers: Sequence[Peer]) -> None:
        self._store, self._rank, self._peers = store, rank, peers
        self._done = threading.Event()
        self._answers = 0  # of the store
        self._thread = threading.Thread(
            target=self._run, args=(store.clone(),), name="minllama-watch", daemon=True
        )
        self._watching_store = threading.Thread(
            target=self._watch_store, name="minllama-watch-store", daemon=True
        )

    def start(self) -> None:
        self._thread.start()
        self._watching_store.start()

    def stop(self) -> None:
        self._done.set()
        for thread in (self._thread, self._watching_store):
            thread.join(timeout=BEAT_SECONDS)

    def announce(self, why: str | None, rank: int | None = None) -> Failure:
        """Write down that a process has failed; returns the first failure, which may be another.

        Args:
            why: it failed; None for unknown.
            rank: of that process; None for this one.
        """
        return _announced(self._store, Failure(self._rank if rank is None else rank, why))

    def failure(self, seconds: float) -> Failure | None:
        """The first failure of another process, waiting for so long; None if all seem well."""
        until = time.monotonic() + seconds
        while True:
            found = _written(self._store) or self._gone(self._store)
            if found is not None or time.monotonic() > until:
                return found
            time.sleep(0.1)

    def describe(self, failure: Failure) -> str:
        """A sentence about a failure."""
        peer = self._peers[failure.rank]
        who = f"process {peer.rank} of {len(self._peers)} ({peer.host}, pid {peer.pid})"
        if failure.why is None:
            return f"{who} was killed or has crashed"
        return f"{who} failed: {failure.why}"

    def _gone(self, store: Any) -> Failure | None:
        """A process of this host that has ended without a word."""
        for peer in self._peers:
            if peer.rank != self._rank and peer.is_gone:
                return _announced(store, Failure(peer.rank, None))
        return None

    def _run(self, store: Any) -> None:
        """End this process if another one has failed and it does not end by itself.

        The main thread may wait for the others in a collective operation, which nothing interrupts.
        """
        before = (self._rank - 1) % len(self._peers)
        last, beats, silent, since_failure = b"", 0, 0, 0
        while not self._done.wait(BEAT_SECONDS):
            beats += 1
            try:
                store.set(f"beat/{self._rank}", str(beats))
                beat = store.get(f"beat/{before}") if store.check([f"beat/{before}"]) else b""
                silent, last = (0 if beat != last else silent + 1), beat
                failure = _written(store) or self._gone(store)
                # One of this host that has not ended is stopped or slow, not dead.
                is_elsewhere = self._peers[before].host != socket.gethostname()
                if failure is None and is_elsewhere and silent > SILENT_BEATS:
                    why = f"no sign of life for {silent * BEAT_SECONDS:.0f} s"
                    failure = _announced(store, Failure(before, why))
                self._answers += 1
            except Exception:  # the host of the store is gone
                failure = STORE_IS_GONE
            if failure is None or failure.rank == self._rank:
                continue
            since_failure += 1
            if since_failure > GRACE_BEATS and not self._done.is_set():
                self._end(failure)

    def _watch_store(self) -> None:
        """End this process if the store has not answered for long.

        Where a host or a cable is gone without a word, TCP waits for many minutes, and so does the
        thread that asks the store.
        """
        last, silent = -1, 0
        while not self._done.wait(BEAT_SECONDS):
            last, silent = self._answers, (silent + 1 if self._answers == last else 0)
            if silent > SILENT_BEATS and not self._done.is_set():
                self._end(STORE_IS_GONE)

    def _end(self, failure: Failure) -> None:
        with contextlib.suppress(OSError):
            print(f"minllama: {one_line(self.describe(failure))}", file=sys.stderr)
            sys.stderr.flush()
        os._exit(1)


def _announced(store: Any, failure: Failure) -> Failure:
    """Write a failure down, unless one is; returns the one that is."""
    try:
        store.compare_set(FAILED, "", json.dumps(asdict(failure)))
    except Exception:  # the store is gone with its host
        return failure
    return _written(store) or failure


def _written(store: Any) -> Failure | None:
    try:
        if not store.check([FAILED]):
            return None
        return Failure(**json.loads(store.get(FAILED)))
    except Exception:
        return None
