"""Claims about rows that are kept in files: equal to lists, in any number of bytes of memory."""

import json
import os
import pickle
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minllama.data import Dataset, load_dataset, rows
from minllama.data.rows import CLASS, CLASSES, NUMBER, TEXT, Column, Kind, stored, zeros
from minllama.errors import DataError
from minllama.options import DataOptions

ODD_TEXTS = ["", "a", "\0", "é\u0301", "🦙" * 9, "\ud83d", "\ud83d\ude00", "\udcff tail", "b\r\n"]
EXAMPLES: list[tuple[Kind[Any], list[Any]]] = [
    (TEXT, ODD_TEXTS * 5),
    (CLASS, [0, 3, 2**31 - 1] * 7),
    (CLASSES, [(), (1,), (0, 5, 7), ()] * 6),
    (NUMBER, [0.5, -1.0, 1e100, 5e-324] * 4),
]


@pytest.fixture(params=[rows.HELD, 16], ids=["in memory", "in files"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Few bytes or many that stay in memory."""
    monkeypatch.setattr(rows, "HELD", request.param)
    return int(request.param)


@pytest.mark.parametrize(("kind", "values"), EXAMPLES)
def test_rows_are_the_list_that_they_were_made_of(
    held: int, kind: Kind[Any], values: list[Any]
) -> None:
    found = stored(kind, values)
    assert list(found) == values
    assert [found[i] for i in range(-len(values), len(values))] == values * 2
    assert len(found) == len(values)
    assert found == values
    assert values == found
    assert found != values[:-1]
    assert found != [*values[:-1], "other"]
    assert found[2:9:3] == values[2:9:3]
    assert found[::-1][1:4] == values[::-1][1:4]
    assert pickle.loads(pickle.dumps(found)) == values
    with pytest.raises(IndexError):
        found[len(values)]


@pytest.mark.parametrize(("kind", "values"), EXAMPLES)
def test_selections_of_selections_are_those_of_the_list(
    held: int, kind: Kind[Any], values: list[Any]
) -> None:
    draw = random.Random(0)
    first = draw.choices(range(len(values)), k=30)
    second = draw.choices(range(len(first)), k=40)
    found = stored(kind, values).select(first).select(np.array(second))
    assert found == [values[first[i]] for i in second]
    assert found[3:5] == [values[first[i]] for i in second[3:5]]
    for wrong in (-1, 30):
        with pytest.raises(IndexError):
            stored(kind, values).select(first).select([wrong])


def test_arrays_of_rows_are_those_of_the_list(held: int) -> None:
    for kind, values in EXAMPLES[1::2]:
        found = stored(kind, values)
        assert np.array_equal(np.asarray(found), values)
        assert np.array_equal(
            np.array(found.select([2, 0]), dtype=np.float64), [values[2], values[0]]
        )


def test_zeros_may_be_overwritten(held: int) -> None:
    found = np.asarray(zeros("q", 100))
    assert not found.any()
    found[:] = range(100)
    assert found.tolist() == list(range(100))


def test_a_data_set_holds_any_sequences_as_rows() -> None:
    whole = Dataset(("x", "y", "z"), np.array([1, 0, 1]), ["a", "b"], "here")  # type: ignore[arg-type]
    assert whole == Dataset(["x", "y", "z"], [1, 0, 1], ["a", "b"], "here")
    some = whole.select(np.array([2, 0]))
    assert (some.texts, some.labels, some.class_counts()) == (["z", "x"], [1, 1], [0, 2])
    assert isinstance(some.labels[0], int)  # type: ignore[index]
    with pytest.raises(DataError, match=r"here: texts\[1\] is None"):
        Dataset(["x", None], [0, 0], ["a"], "here")  # type: ignore[list-item]


def write(path: Path, n: int, as_line: Callable[[int], str], header: str = "") -> Path:
    path.write_text(header + "".join(as_line(i) + "\n" for i in range(n)), encoding="utf-8")
    return path


FORMS: dict[str, tuple[str, str, Callable[[int], str], dict[str, Any]]] = {
    "csv": ("x.csv", "text,label\n", lambda i: f"text é {i},class {i % 3}", {}),
    "lines": ("x.txt", "", lambda i: f"class {i % 3} ||| text é {i}", {}),
    "jsonl": ("x.jsonl", "", lambda i: json.dumps({"text": f"t {i}", "label": i % 3}), {}),
    "several labels": (
        "x.jsonl",
        "",
        lambda i: json.dumps({"text": f"t {i}", "labels": ["a", "b", "c"][: i % 4]}),
        {"multi_label": True},
    ),
    "vectors": (
        "x.jsonl",
        "",
        lambda i: json.dumps({"text": f"t {i}", "labels": [i % 2, i % 3 // 2, 1]}),
        {},
    ),
    "skipped": (
        "x.jsonl",
        "",
        lambda i: json.dumps({"text": f"t {i}", "label": "a" if i % 3 else None}),
        {"skip_bad_rows": True},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_in_files_is_the_one_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    name, header, as_line, fields = FORMS[form]
    path = write(tmp_path / name, 50, as_line, header)
    in_memory = load_dataset(path, DataOptions(**fields))
    monkeypatch.setattr(rows, "HELD", 16)
    assert load_dataset(path, DataOptions(**fields)) == in_memory


def test_rows_with_unknown_labels_are_left_out_of_files_as_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.csv", 40, lambda i: f"t {i},{'ab?'[i % 3]}", "text,label\n")
    monkeypatch.setattr(rows, "HELD", 16)
    options = DataOptions(skip_bad_rows=True)
    found = load_dataset(path, options, label_names=["a", "b"], needs_labels=False)
    assert found.texts == [f"t {i}" for i in range(40) if i % 3 < 2]
    assert found.labels == [i % 3 for i in range(40) if i % 3 < 2]


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    monkeypatch.setattr(rows, "HELD", 16)
    with pytest.raises(DataError, match=r"missing: cannot keep the rows .* set the .* TMPDIR"):
        stored(TEXT, ["a text"] * 5)


def test_files_of_rows_have_no_name(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("/proc is Linux's")
    folder = tmp_path / "rows"
    folder.mkdir()
    code = (
        "import os; from minllama.data import rows; rows.HELD = 64\n"
        "column = rows.Column('q')\n"
        "for i in range(100): column.append(i)\n"
        "found = column.mapped()\n"
        f"assert os.listdir({str(folder)!r}) == [] and found[99] == 99\n"
        "print(open('/proc/self/maps').read())\n"
    )
    environment = {**os.environ, "TMPDIR": str(folder)}
    maps = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert f"{folder}/" in maps


MEASURE = """
import re, sys, threading, time
from pathlib import Path
import numpy
from minllama.data import check_splits, load_dataset, rows, stratified_split
rows.HELD = 2**16

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def work(path):
    train, dev = stratified_split(load_dataset(path), 0.1, 0)
    check_splits(train, dev)
    return train, dev

work(sys.argv[1])  # what is needed once
before = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
kept = work(sys.argv[2])
done.set()
thread.join()
print(peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Reading, splitting and checking 40,000 rows: lists of them took over 400 bytes a row."""

    def as_line(i: int) -> str:
        return f"this is text number {i} of a file with a good many words in each row,class {i % 3}"

    small, large = (
        write(tmp_path / f"{n}.csv", n, as_line, "text,label\n") for n in (4_000, 40_000)
    )
    command = [sys.executable, "-c", MEASURE, str(small), str(large)]
    grown = int(subprocess.check_output(command, text=True))
    assert grown / 40_000 < 60


def test_a_column_of_one_type_has_all_that_was_added(held: int) -> None:
    column = Column("i")
    for i in range(50):
        column.append(i)
    column.extend(np.arange(50, 90, dtype=np.int32).tobytes())
    assert column.mapped().tolist() == list(range(90))
