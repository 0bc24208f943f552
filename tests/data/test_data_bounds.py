"""Claims about small files that would become large: they are read in pieces, or refused early."""

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minllama.data import count_rows, load_dataset, stream_rows
from minllama.errors import DataError
from minllama.options import DataOptions

SKIP = DataOptions(skip_bad_rows=True)


def peak_of(call: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def one_line(call: Callable[[], Any]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    return str(caught.value)


def packed(path: Path, *parts: tuple[bytes, int]) -> Path:
    with gzip.open(path, "wb") as file:
        for part, times in parts:
            block, rest = divmod(times, 1000)
            for _ in range(block):
                file.write(part * 1000)
            file.write(part * rest)
    return path


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("x.json.gz", [(b"[", 1), (b"{},", 30_000), (b"{}]", 1)]),
        ("x.jsonl.gz", [(b"{}\n", 30_000)]),
        ("x.jsonl.gz", [(b"0\n", 30_000)]),
        ("x.csv.gz", [(b"text,label\n", 1), (b"a,b,c\n", 30_000)]),
        ("x.csv.gz", [(b"text,label\n", 1), (b"fine,a\n", 3), (b",\n", 30_000)]),
        ("x.txt.gz", [(b"a ||| b\n", 25), (b"||| a\n", 30_000)]),
    ],
)
@pytest.mark.parametrize("options", [SKIP, DataOptions()])
def test_files_of_bad_rows_are_not_read_to_their_end(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    parts: list[tuple[bytes, int]],
    options: DataOptions,
) -> None:
    monkeypatch.setattr("minllama.data.records.TOO_MANY", 5000)
    path = packed(tmp_path / name, *parts)

    def load() -> None:
        message = one_line(lambda: load_dataset(path, options))
        assert message.startswith(f"{path}: 5,000 of the first 5,0")

    assert peak_of(load) < 2**24
    if name != "x.txt.gz":  # texts have no need of a label
        assert "5,000 of the first" in one_line(lambda: count_rows(path, options))


def test_a_hundred_thousand_bad_rows_are_enough(tmp_path: Path) -> None:
    path = packed(tmp_path / "x.json.gz", (b"[", 1), (b"{},", 10**7), (b"{}]", 1))
    message = one_line(lambda: count_rows(path))
    assert message == (
        f"{path}: 100,000 of the first 100,000 rows are bad (line 1: no 'text'; and 99990 more); "
        "is it the right file and format?"
    )


def test_a_few_good_rows_among_many_bad_ones_are_read(tmp_path: Path) -> None:
    path = packed(tmp_path / "x.jsonl.gz", (b"{}\n" * 50 + b'{"text": "a"}\n', 3000))
    count, bad_rows = count_rows(path, SKIP)
    assert (count, bad_rows.count) == (3000, 150_000)


def test_a_json_list_is_read_in_constant_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    row = json.dumps({"text": "word " * 100, "label": "a"})
    path.write_text(f"[{', '.join([row] * 20_000)}]")
    count = 0

    def read() -> None:
        nonlocal count
        count = sum(1 for _ in stream_rows(path))

    assert peak_of(read) < 2**21 < path.stat().st_size / 4
    assert count == 20_000


def test_places_in_a_long_json_list_are_right(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    rows = [json.dumps({"text": "wörd " * (i % 50), "label": "a"}) for i in range(5000)]
    whole = "[\n" + ",\n".join(rows)
    path.write_text(whole + ",\n  {'a'}]", encoding="utf-8")
    message = one_line(lambda: list(stream_rows(path, SKIP)))
    assert message.startswith(f"{path}, line 5002: not JSON (Expecting property name")
    assert message.endswith("at character 4)")
    path.write_bytes(whole.encode() + b',\n  {"text": "\xff"}]')
    message = one_line(lambda: list(stream_rows(path, SKIP)))
    assert message.startswith(f"{path}, line 5002: byte 13 (0xff) is not UTF-8")
    one = "[" + ",".join(rows)
    path.write_bytes(one.encode() + b',{"text": "\xff"}]')
    message = one_line(lambda: list(stream_rows(path, SKIP)))
    assert message.startswith(f"{path}, line 1: byte {len(one.encode()) + 12} (0xff) is not UTF-8")
    path.write_text(one + ",x]", encoding="utf-8")
    message = one_line(lambda: list(stream_rows(path, SKIP)))
    assert message == f"{path}, line 1: not JSON (Expecting value at character {len(one) + 2})"


@pytest.mark.parametrize("size", [1, 100, 2**16 - 1, 2**16, 2**16 + 1, 2**18, 2**22])
def test_objects_of_any_size_are_read_over_the_pieces_of_a_stream(
    tmp_path: Path, size: int
) -> None:
    path = tmp_path / "x.json"
    texts = ["é" * size, '\\"\u2028' * 3, "b" * (size // 2 + 1), "end"]
    rows = [{"text": text, "n": [1, -1.5e3, None, True], "label": "a"} for text in texts]
    for ascii_only in (False, True):
        path.write_text(json.dumps(rows, ensure_ascii=ascii_only, indent=1), encoding="utf-8")
        assert [row.text for row in stream_rows(path)] == texts
        assert [row.record["n"] for row in stream_rows(path)] == [rows[0]["n"]] * 4


def test_a_json_object_without_an_end_is_refused(tmp_path: Path) -> None:
    path = packed(tmp_path / "x.json.gz", (b'[{"text": "', 1), (b"abcdefgh", 3_000_000))
    message = one_line(lambda: load_dataset(path))
    assert "an object of more than 16,777,216 bytes; is it a list of rows?" in message


def test_what_unpacks_beyond_all_measure_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minllama.data.unpacking.UNPACKED_FREELY", 2**20)
    path = packed(tmp_path / "x.txt.gz", (b"texts, the same\n" * 64, 2_000))
    message = one_line(lambda: count_rows(path))
    assert "unpacks to more than 500 times its size; if that is intended, unpack it fir" in message
    path = packed(tmp_path / "x.csv.gz", (b"text,label\n", 1), (b"\n", 1_100_000))
    assert "1,000,000 blank lines before it" in one_line(lambda: load_dataset(path))
    path.write_bytes(gzip.compress(gzip.compress(b"text,label\na,b\n")))
    assert "is compressed twice" in one_line(lambda: load_dataset(path))


def dictionary(texts: list[str], indices: list[int]) -> Any:
    pa = pytest.importorskip("pyarrow")
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(texts))


@pytest.mark.parametrize("in_list", [False, True])
def test_a_text_that_parquet_repeats_is_held_a_few_times(tmp_path: Path, in_list: bool) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows, size = 600, 2**21
    long = dictionary(["x" * size, "short"], [i % 2 for i in range(rows)])
    if in_list:
        long = pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), long)
    table = pa.table({"text": pa.array(["t"] * rows) if in_list else long, "tags": long})
    path = tmp_path / "x.parquet"
    parquet.write_table(table, path)
    assert path.stat().st_size < 2**19
    del table, long
    counts = []

    def read() -> None:
        counts.append(sum(1 for _ in stream_rows(path)))

    before = pa.default_memory_pool().max_memory()
    assert peak_of(read) < 2**27 < rows * size / 8
    assert pa.default_memory_pool().max_memory() - before < 2**27
    assert counts == [rows]


def test_batches_of_every_size_give_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"text": "t" * (i % 7 + 1), "tags": ["a" * (i % 5)] * (i % 3), "n": i if i % 4 else None}
        for i in range(50)
    ]
    path = tmp_path / "x.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    for size in (1, 5, 20, 2**24):
        monkeypatch.setattr("minllama.data.arrow.BYTES_AT_ONCE", size)
        assert (
            [row.record for row in stream_rows(path)]
            == rows
            == parquet.read_table(path).to_pylist()
        )
