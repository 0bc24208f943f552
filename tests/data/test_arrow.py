"""Claims about Parquet files, and data sets on a stand-in for the hub on this machine."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minllama.data import load_dataset, stream_rows
from minllama.data.arrow import HubDataset, parse_hub_id
from minllama.errors import DataError
from minllama.options import DataOptions
from tests.hub import Hub, Repository, serving

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).resolve().parents[2]
CLASSES = {"names": ["neg", " pos "], "_type": "ClassLabel"}


def write(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None) -> Path:
    table = pa.table(columns)
    if features is not None:  # as the library `datasets` describes columns
        described = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": described})
    parquet.write_table(table, path, row_group_size=2)
    return path


def test_classes_of_a_parquet_file_have_the_names_that_it_declares(tmp_path: Path) -> None:
    columns = {"text": ["a", "b", "c"], "label": [1, 0, 1]}
    path = write(tmp_path / "x.parquet", columns, {"label": CLASSES})
    dataset = load_dataset(path)
    assert (dataset.labels, dataset.label_names) == ([1, 0, 1], ["neg", "pos"])
    # Known classes count in their own order: the names say which is which.
    dataset = load_dataset(path, label_names=["pos", "neg"])
    assert (dataset.labels, dataset.label_names) == ([0, 1, 0], ["pos", "neg"])
    (tmp_path / "names.json").write_text('["bad", "good"]')
    options = DataOptions(label_names=str(tmp_path / "names.json"))
    assert load_dataset(path, options).label_names == ["bad", "good"]


def test_numbers_of_declared_classes_are_never_names(tmp_path: Path) -> None:
    features = {"label": {"names": ["1", "2", "3"], "_type": "ClassLabel"}}
    columns = {"text": ["a", "b", "c"], "label": [0, 1, 2]}
    dataset = load_dataset(write(tmp_path / "x.parquet", columns, features))
    assert (dataset.labels, dataset.label_names) == ([0, 1, 2], ["1", "2", "3"])


def test_a_class_that_is_only_declared_is_a_class(tmp_path: Path) -> None:
    columns = {"text": ["a", "b"], "label": [1, -1]}
    path = write(tmp_path / "x.parquet", columns, {"label": CLASSES})
    with pytest.raises(DataError, match=r"x\.parquet, row 2: label -1 means no label"):
        load_dataset(path)
    dataset = load_dataset(path, DataOptions(skip_bad_rows=True))
    assert (dataset.labels, dataset.class_counts()) == ([1], [0, 1])


@pytest.mark.parametrize("kind", ["List", "Sequence"])
def test_lists_of_classes_have_their_names_too(tmp_path: Path, kind: str) -> None:
    columns = {"text": ["a", "b"], "labels": [[1, 0], []]}
    features = {"labels": {"feature": CLASSES, "_type": kind}}
    dataset = load_dataset(write(tmp_path / "x.parquet", columns, features))
    assert (dataset.labels, dataset.label_names) == ([(0, 1), ()], ["neg", "pos"])


@pytest.mark.parametrize(
    "features", [{}, {"label": 3}, {"label": {"names": "x"}}, {"label": {"feature": None}}]
)
def test_declarations_of_another_kind_are_passed_over(tmp_path: Path, features: Any) -> None:
    path = write(tmp_path / "x.parquet", {"text": ["a"], "label": [7]}, features)
    assert load_dataset(path).label_names == ["7"]


def test_streamed_rows_hold_plain_columns_only(tmp_path: Path) -> None:
    import datetime

    plain = {
        "text": ["a", "b", "c"],
        "score": [1.5, None, 3.0],
        "tags": [["x"], [], None],
        "ok": [True, False, None],
        "kind": pa.array(["p", "q", "p"]).dictionary_encode(),
        "day": [datetime.date(2024, 1, 1)] * 3,
    }
    others = {
        "image": [b"1", b"2", b"3"],
        "moment": [datetime.datetime(2024, 1, 1)] * 3,
        "deep": [{"a": 1}] * 3,
    }
    path = write(tmp_path / "x.parquet", plain | others)
    rows = list(stream_rows(path, start=1))
    assert [(row.index, row.place, row.text) for row in rows] == [
        (1, "row 2", "b"),
        (2, "row 3", "c"),
    ]
    assert rows[0].record == {
        "text": "b",
        "score": None,
        "tags": [],
        "ok": False,
        "kind": "q",
        "day": "2024-01-01",
    }
    refusal = (
        "column 'image' is binary, which cannot be a text; convert it to strings, in pandas with "
        "df\\['image'\\].str.decode\\(\"utf-8\"\\), or give --text-column one of 'text'"
    )
    with pytest.raises(DataError, match=refusal):
        load_dataset(path, DataOptions(text_column="image"))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pa.array([[1, 2], [3]]), "list<element: int64>"),
        (pa.array([[["a"]], [["b"]]]), "list<element: list<element: string>>"),
        (pa.array([b"a", b"b"]), "binary"),
        (pa.array([1, 2]), "int64"),
        (pa.array([True, False]), "bool"),
        (pa.array([{"a": 1}, {"a": 2}]), "struct<a: int64>"),
        (pa.array([1, 2], pa.timestamp("us")), "timestamp[us]"),
        (pa.array([["a"], ["b"]], pa.list_(pa.string(), 1)), "fixed_size_list<element: string>[1]"),
    ],
)
def test_columns_that_can_hold_no_text_are_named_with_their_type(
    tmp_path: Path, values: Any, kind: str
) -> None:
    path = write(tmp_path / "x.parquet", {"text": values, "label": ["p", "q"]})
    assert str(parquet.read_schema(path).field("text").type) == kind
    for load in (load_dataset, lambda source: list(stream_rows(source))):
        for options in (None, DataOptions(text_column="text")):
            with pytest.raises(DataError) as caught:
                load(path) if options is None else load_dataset(path, options)
            # That the other column is called 'label' says that it is no text.
            message = (
                f"{path}: column 'text' is {kind}, which cannot be a text; convert it to strings"
            )
            how = {"binary": 'str.decode("utf-8")', "bool": "astype(str)"}.get(
                kind, "map(str)" if "<" in kind else "astype(str)"
            )
            assert str(caught.value) == f"{message}, in pandas with df['text'].{how}"


def test_columns_that_can_hold_no_label_are_named_with_their_type(tmp_path: Path) -> None:
    # A day would be a label: it is the same text in every format.
    day = pa.array([1, 2], pa.timestamp("us"))
    path = write(tmp_path / "x.parquet", {"text": ["a", "b"], "label": day, "day": day})
    with pytest.raises(
        DataError, match=r"column 'label' is timestamp\[us\], which cannot be a label"
    ):
        load_dataset(path)
    with pytest.raises(
        DataError, match=r"column 'day' is timestamp\[us\], which cannot be a label"
    ):
        load_dataset(path, DataOptions(label_column="day"))
    with pytest.raises(DataError) as caught:
        load_dataset(path)
    assert "text" not in str(caught.value).partition("which")[2]  # the texts are no labels
    assert load_dataset(path, needs_labels=False).texts == ["a", "b"]
    path = write(tmp_path / "y.parquet", {"day": day})
    with pytest.raises(DataError, match=r"which column holds the text\? no column has that"):
        load_dataset(path)


def test_a_type_is_shown_cut_and_on_one_line(tmp_path: Path) -> None:
    wide = pa.array([{f"field\n{i}": i for i in range(1000)}])
    path = write(tmp_path / "x.parquet", {"text": wide, "label": ["a"]})
    with pytest.raises(DataError) as caught:
        load_dataset(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_numbers_beside_the_texts_are_not_taken_for_them(tmp_path: Path) -> None:
    columns = {"words": ["a", "b"], "score": [0.5, 1.5], "label": ["p", "q"]}
    assert load_dataset(write(tmp_path / "x.parquet", columns)).texts == ["a", "b"]


def test_text_that_is_not_utf_8_makes_one_bad_row(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"b", b"caf\xe9", b"d"]).cast(pa.string(), safe=False)
    path = write(tmp_path / "x.parquet", {"text": texts, "label": [0, 1, 0, 1]})
    with pytest.raises(DataError, match=r"x\.parquet, row 3: text that is not UTF-8; fix it"):
        load_dataset(path)
    assert load_dataset(path, DataOptions(skip_bad_rows=True)).texts == ["a", "b", "d"]


def test_damaged_parquet_files_are_one_line(tmp_path: Path) -> None:
    columns = {"text": [f"text {i}" for i in range(50)], "label": [i % 2 for i in range(50)]}
    whole = write(tmp_path / "x.parquet", columns).read_bytes()
    path = tmp_path / "x.parquet"
    messages = []
    for at in range(0, len(whole), 17):
        for damaged in (whole[:at], whole[:at] + b"\xff\xff\xff" + whole[at + 3 :]):
            path.write_bytes(damaged)
            with contextlib.suppress(DataError):  # some damage is to what nobody reads
                load_dataset(path)
                continue
            with pytest.raises(DataError) as caught:
                load_dataset(path)
            messages.append(str(caught.value))
    assert not any("\n" in message for message in messages)
    assert len(messages) > len(whole) / 17  # every cut, and some of the rest


def test_parquet_comes_from_files_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Parquet cannot be read from standard input; name a file"):
        load_dataset("-", DataOptions(data_format="parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "x.parquet"
    path.touch()
    with pytest.raises(
        DataError, match=r"needs the library pyarrow; .* pip install 'minllama\[train"
    ):
        load_dataset(path)


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("owner/name", ("owner/name", None, None, None)),
        ("owner/name:train", ("owner/name", None, None, "train")),
        ("owner/name/config:test", ("owner/name", "config", None, "test")),
        ("o/n/c@refs/convert/parquet:dev", ("o/n", "c", "refs/convert/parquet", "dev")),
        ("owner/name@v1.0", ("owner/name", None, "v1.0", None)),
        ("name", None),
        ("owner/name:", None),
        ("a/b/c/d", None),
        ("/owner/name", None),
        ("../owner/name", None),
        ("https://owner/name", None),
    ],
)
def test_ids_on_the_hub_name_a_config_a_revision_and_a_split(
    name: str, parsed: tuple[str, str | None, str | None, str | None] | None
) -> None:
    assert parse_hub_id(name) == (None if parsed is None else HubDataset(*parsed))


CONFIGS = b"""---
configs:
- config_name: plain
  data_files:
  - {split: train, path: train.csv}
  - {split: test, path: test.csv}
- config_name: odd
  data_files:
  - {split: only, path: only.csv}
---
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        hub.repositories["org/reviews"] = Repository(
            {
                "README.md": CONFIGS,
                "train.csv": b"text,label\ngood one,1\nbad one,0\n",
                "test.csv": b"text,label\nmeh,0\n",
                "only.csv": b"review,stars\nfine,4\nno,1\n",
            }
        )
        hub.repositories["org/table"] = Repository({"README.md": b""})
        hub.repositories["org/program"] = Repository({"README.md": b"", "program.py": b"x = 1"})
        hub.repositories["org/private"] = Repository({"README.md": b""}, private=True)
        yield hub


# The library reads its environment when it is imported, so that this needs a process.
LOAD = """
import json, sys
from minllama.data import load_dataset
from minllama.errors import DataError
for name in sys.argv[1:]:
    try:
        dataset = load_dataset(name)
        rows = list(dataset.texts), list(dataset.labels)
        print(json.dumps([*rows, dataset.label_names, dataset.source]))
    except DataError as error:
        print(json.dumps(str(error)))
"""


def loaded(hub: Hub, home: Path, *names: str) -> list[Any]:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home)}
    environment["HF_HUB_OFFLINE"] = "0"
    finished = subprocess.run(
        [sys.executable, "-c", LOAD, *names],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")
def test_data_sets_on_the_hub_are_read_and_what_it_refuses_is_one_line(
    hub: Hub, tmp_path: Path
) -> None:
    table = write(tmp_path / "t.parquet", {"text": ["a", "b"], "label": [1, 0]}, {"label": CLASSES})
    hub.repositories["org/table"].files["train.parquet"] = table.read_bytes()
    answers = loaded(
        hub,
        tmp_path / "home",
        "org/reviews/plain:train",
        "org/reviews/odd",
        "org/table",
        "org/reviews/plain",
        "org/reviews/plain:dev",
        "org/reviews:train",
        "org/program:train",
        "org/private:train",
        "org/nothing:train",
        "org/table@v9:train",
    )
    assert answers[:3] == [
        [["good one", "bad one"], [1, 0], ["0", "1"], "org/reviews/plain:train"],
        [["fine", "no"], [1, 0], ["1", "4"], "org/reviews/odd"],
        [["a", "b"], [1, 0], ["neg", "pos"], "org/table"],
    ]
    assert answers[3] == (
        "org/reviews/plain: has the splits 'train', 'test'; choose one, such as "
        "org/reviews/plain:train"
    )
    for answer, part in zip(
        answers[4:],
        [
            "org/reviews/plain:dev: Unknown split \"dev\". Should be one of ['train', 'test']; ",
            "org/reviews:train: Config name is missing. Please pick one among the available "
            "configs: ['plain', 'odd'] ",
            "org/program:train: the dataset needs a script, which is not supported; try its "
            "conversion org/program@refs/convert/parquet, or another copy",
            "org/private:train: no such file, and no accessible dataset of that name on Hugging "
            "Face (",
            "org/nothing:train: no such file, and no accessible dataset of that name on Hugging "
            "Face (",
            "org/table@v9:train: no such file, and no accessible dataset of that name on "
            "Hugging Face (Revision 'v9' doesn't exist for dataset 'org/table' on the Hub); "
            "check the name",
        ],
        strict=True,
    ):
        assert answer.startswith(part)
        assert "\n" not in answer


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")
def test_without_the_network_it_is_said() -> None:
    with pytest.raises(DataError) as caught:  # the tests run with HF_HUB_OFFLINE
        load_dataset("org/reviews:train")
    assert str(caught.value) == (
        "org/reviews:train: no such file, and it cannot be downloaded from Hugging Face "
        "(Couldn't reach 'org/reviews' on the Hub (OfflineModeIsEnabled)); check the name and "
        "the connection"
    )


def test_without_the_library_for_the_hub_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"need the library datasets; .* pip install 'minllama\[tr"):
        load_dataset("org/reviews:train")
