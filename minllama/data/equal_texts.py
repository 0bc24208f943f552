"""Find equal texts among many rows by their hashes, a few bytes a row.

`minllama.data.splits` keeps them on one side, and reports those with different labels.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from minllama.data.rows import zeros

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Hashes = memoryview[int] | NDArray[np.uint64]

AT_ONCE = 2**16  # rows that are looked up together


def first_rows(hashes: "memoryview[int]") -> "NDArray[np.bool_]":
    """(N,): whether a row is the first with its text."""
    import numpy as np

    first = ~among(hashes, _repeated(hashes))
    rows = np.flatnonzero(~first)
    _, places = np.unique(np.asarray(hashes)[rows], return_index=True)
    first[rows[places]] = True
    return first


def among(hashes: "memoryview[int]", some: "Hashes") -> "NDArray[np.bool_]":
    """(N,): whether each of the hashes is one of some others, which are sorted."""
    import numpy as np

    own, others = np.asarray(hashes), np.asarray(some)
    found = np.zeros(len(own), dtype=np.bool_)
    for start in range(0, len(own) if len(others) else 0, AT_ONCE):
        part = own[start : start + AT_ONCE]
        places = np.minimum(np.searchsorted(others, part), len(others) - 1)
        found[start : start + AT_ONCE] = others[places] == part
    return found


def in_order(hashes: "memoryview[int]") -> "NDArray[np.uint64]":
    """(N,), sorted."""
    import numpy as np

    ordered = np.asarray(zeros("Q", len(hashes)))
    ordered[:] = hashes
    ordered.sort()
    return ordered


def n_conflicting(hashes: "memoryview[int]", labels: Sequence[Any]) -> int:
    """How many texts occur with different labels."""
    import numpy as np

    rows = np.flatnonzero(among(hashes, _repeated(hashes)))
    numbers: dict[Any, int] = {}  # of different labels
    found: Iterable[int] = (numbers.setdefault(labels[int(row)], len(numbers)) for row in rows)
    texts, of_label = np.asarray(hashes)[rows], np.fromiter(found, np.int64, len(rows))
    order = np.lexsort((of_label, texts))
    texts, of_label = texts[order], of_label[order]
    differ = (texts[1:] == texts[:-1]) & (of_label[1:] != of_label[:-1])
    return len(np.unique(texts[1:][differ]))


def _repeated(hashes: "memoryview[int]") -> "NDArray[np.uint64]":
    """Those that occur more than once, each once, sorted."""
    import numpy as np

    ordered = in_order(hashes)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
