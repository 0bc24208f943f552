"""The processes of a run: what one does for all, and how their results come together.

`joined` connects the processes that a launcher has started; within it `current()` is this one
among them, and everything that predicts texts takes its part of them. Without a launcher, and
outside of `joined`, there is one process, for which all of this does nothing: the same code runs.

Collective operations are called by all processes, in the same order.
"""

import contextlib
import hashlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from minllama.distributed.launcher import Launch, launch
from minllama.distributed.watch import Failure, Peer, Watch
from minllama.errors import MinllamaError
from minllama.text import one_line

T = TypeVar("T")
E = TypeVar("E")

# Of a collective operation. It is not what notices a dead process (that is `watch`): the first
# process may fit a baseline or write a large model while the others wait.
TIMEOUT = timedelta(days=1)
MEETING = timedelta(minutes=5)  # in which all processes must have started
# Seconds that are spent on finding out who has failed, before an error is taken for one's own.
TO_BLAME, TO_BE_FIRST = 8.0, 3.0
INTERRUPTED = "interrupted"


class PeerError(MinllamaError):
    """Another process has failed; the message says which and why."""


class Ranks:
    """The processes of a run, as seen by one of them.

    Args:
        launched: which one it is.
        group: by which they exchange values; None for the one that all code has in common.

    Attributes:
        rank: its number; the first, 0, writes files and prints.
        size: how many there are.
    """

    def __init__(self, launched: Launch | None = None, group: Any = None) -> None:
        self._launched = launched or Launch()
        self.rank, self.size = self._launched.rank, self._launched.size
        self._group = group

    def aside(self) -> "Ranks":
        """The same processes for a thread beside the main one; all call it at once.

        What these exchange is on the CPU, and does not meet what others exchange meanwhile.
        """
        if self.size == 1:
            return self
        return Ranks(self._launched, dist.new_group(backend="gloo", timeout=TIMEOUT))

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def first(self, compute: Callable[[], T]) -> T:
        """What `compute` returns in the first process, in all of them.

        Raises:
            MinllamaError: that of the first process, in all of them.
        """
        if self.size == 1:
            return compute()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome = [compute(), None]
            except MinllamaError as error:
                outcome = [None, error]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        value, raised = outcome
        if raised is not None:
            raise raised
        result: T = value
        return result

    def each(self, compute: Callable[[], T]) -> T:
        """What `compute` returns here, if it fails in no process.

        Raises:
            MinllamaError: that of the first process in which it fails, in all of them.
        """
        if self.size == 1:
            return compute()
        value, raised = None, None
        try:
            value = compute()
        except MinllamaError as error:
            raised = error
        for error_elsewhere in self.collected(raised):
            if error_elsewhere is not None:
                raise error_elsewhere
        return cast(T, value)

    def collected(self, value: T) -> list[T]:
        """Each process's value, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def summed(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self._group)
        return [float(value) for value in total]

    def any(self, value: bool) -> bool:
        """Whether it is true in any process."""
        return value if self.size == 1 else self.summed([value])[0] > 0

    def send(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the first process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0, group=self._group)

    def part(self, elements: Sequence[E]) -> Sequence[E]:
        """This process's share: every `size`-th element, so that long texts are spread."""
        return elements if self.size == 1 else elements[self.rank :: self.size]

    def part_of_texts(self, texts: Sequence[str]) -> Sequence[str]:
        """This process's share of texts, after a look whether all processes have the same.

        Raises:
            MinllamaError: they have not; in all processes.
        """
        if self.size > 1:
            found = hashlib.sha256()
            for text in texts:
                found.update(repr(text).encode("utf-8", "backslashreplace"))
            self.check_equal(found.hexdigest(), lambda first, other: "it has read other texts")
        return self.part(texts)

    def joined_rows(self, mine: NDArray[np.float32], total: int) -> NDArray[np.float32]:
        """The rows of all processes in their original order, in all of them.

        Args:
            mine: (M, ...), those of this process's `part`.
            total: N, how many rows there are.

        Returns:
            (N, ...).
        """
        if self.size == 1:
            return mine
        most = -(-total // self.size)
        padded = np.zeros((most, *mine.shape[1:]), dtype=np.float32)
        padded[: len(mine)] = mine
        parts = [torch.empty(padded.shape) for _ in range(self.size)]
        dist.all_gather(parts, torch.from_numpy(padded), group=self._group)
        rows = np.empty((total, *mine.shape[1:]), dtype=np.float32)
        for rank, part in enumerate(parts):
            rows[rank :: self.size] = part.numpy()[: len(rows[rank :: self.size])]
        return rows

    def advanced(
        self, progress: Callable[[int], None] | None, total: int
    ) -> Callable[[int], None] | None:
        """A progress of this process's part as one of `total` texts."""
        if progress is None or self.size == 1:
            return progress
        report, done = progress, 0

        def advance(n: int) -> None:
            nonlocal done
            n = min(n * self.size, total - done)
            done += n
            report(n)

        return advance

    def check_equal(self, value: T, differ: Callable[[T, T], str]) -> None:
        """Refuse values that differ between processes.

        Args:
            value: of this process.
            differ: says how another process's value differs from the first one's.

        Raises:
            MinllamaError: in all processes.
        """
        first, *others = self.collected(value)
        for rank, other in enumerate(others, start=1):
            if other != first:
                raise MinllamaError(
                    f"process {rank} of {self.size} differs from the first: "
                    f"{differ(first, other)}; give all processes the same files and options"
                )

    @contextlib.contextmanager
    def interrupts_noted(self) -> Iterator[Callable[[], bool]]:
        """Note Ctrl-C within the block instead of raising it; yields whether there was one.

        Processes are interrupted at different places; they end at the same one, by agreement. For
        one process nothing changes: it is interrupted at once.
        """
        if self.size == 1 or threading.current_thread() is not threading.main_thread():
            yield lambda: False
            return
        received: list[int] = []
        before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
        try:
            yield lambda: bool(received)
        finally:
            signal.signal(signal.SIGINT, before)


ALONE = Ranks()
_current: list[Ranks] = [ALONE]
_met: list[Ranks] = []  # whether or not they still are together


def current() -> Ranks:
    """The processes of the run that this one has joined; it alone outside of `joined`."""
    return _current[-1]


def have_met() -> bool:
    """Whether this process has joined others, which then know of its errors."""
    return bool(_met)


@contextlib.contextmanager
def joined(*, device: str | None = None) -> Iterator[Ranks]:
    """Connect the processes that the launcher has started; nothing for one process.

    Tensors of GPUs are exchanged by NCCL, all others by gloo. Each process of a host gets the GPU
    of its local rank.

    Args:
        device: as given by the user; None for GPUs where there are.

    Raises:
        MinllamaError: the processes do not find one another.
        PeerError: another process has failed.
    """
    launched = launch()
    if launched.size == 1 or current().size > 1:
        yield current()
        return
    uses_gpu = torch.cuda.is_available() and (device or "cuda").startswith("cuda")
    if uses_gpu:
        torch.cuda.set_device(launched.local_rank)
    watch = _meet(launched, "cpu:gloo,cuda:nccl" if uses_gpu else "gloo")
    ranks = Ranks(launched)
    _current.append(ranks)
    _met.append(ranks)
    try:
        with _failures_explained(ranks, watch):
            yield ranks
            dist.barrier()
    finally:
        _current.pop()
        watch.stop()
        if not uses_gpu:  # NCCL would wait for processes that are gone
            dist.destroy_process_group()


def _meet(launched: Launch, backend: str) -> Watch:
    """Open the process group, and start to watch the others."""
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(
            rendezvous("env://", rank=launched.rank, world_size=launched.size, timeout=MEETING)
        )
        # The launcher keeps its store when it starts all again, with the addresses of those before.
        attempt = f"attempt-{launched.restarts}"
        store = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]  # public all the same
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        peers: list[Any] = [None] * size
        dist.all_gather_object(peers, Peer.here(rank))
    except (RuntimeError, ValueError, OSError) as error:  # torch's own are RuntimeErrors
        raise MinllamaError(
            f"process {launched.rank} of {launched.size} cannot reach the others: "
            f"{one_line(str(error))}; check the launcher's address and port, and "
            "GLOO_SOCKET_IFNAME on hosts with several networks"
        ) from error
    watch = Watch(store, rank, peers)
    watch.start()
    return watch


@contextlib.contextmanager
def _failures_explained(ranks: Ranks, watch: Watch) -> Iterator[None]:
    """Let every process know of the first failure, and one of them print it.

    Raises:
        PeerError: another process has failed, which is why an operation did here.
        SystemExit: another process reports the same error.
    """
    try:
        yield
    except BaseException as error:
        with _undisturbed():
            _explain(error, ranks, watch)
        raise


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore the launcher's signals while an error is explained."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explain(error: BaseException, ranks: Ranks, watch: Watch) -> None:
    """Announce an error, or raise another one in its place; see `_failures_explained`."""
    if isinstance(error, MinllamaError):
        # An error that all meet, such as an unreadable file, is the first process's to print.
        elsewhere = None if ranks.is_first else watch.failure(TO_BE_FIRST)
        found = elsewhere or watch.announce(str(error))
        if found.rank == ranks.rank:
            if not ranks.is_first:
                raise MinllamaError(watch.describe(found)) from error
        elif found.why == str(error):
            raise SystemExit(2) from error
        else:
            raise _peer_error(watch, found) from error
        return
    if isinstance(error, KeyboardInterrupt):
        # A launcher interrupts all when its user does, and the others when one has failed.
        found = watch.failure(TO_BE_FIRST / 6) or watch.announce(INTERRUPTED)
        if found.rank != ranks.rank and found.why != INTERRUPTED:
            raise _peer_error(watch, found) from error
        return
    words = ("gloo", "nccl", "connection")
    is_collective = any(word in str(error).lower() for word in words)
    elsewhere = watch.failure(TO_BLAME if is_collective else 0.0)
    if elsewhere is not None and elsewhere.rank != ranks.rank:
        raise _peer_error(watch, elsewhere) from error
    if isinstance(error, Exception):
        watch.announce(f"{type(error).__name__}: {one_line(str(error))}")


def _peer_error(watch: Watch, failure: Failure) -> PeerError:
    return PeerError(
        f"{watch.describe(failure)}, so this process ends, too; a run that has a checkpoint "
        "continues with --resume"
    )
