"""Files of texts and labels, in each format and encoding."""

import gzip
import io
import json
from pathlib import Path

from tests.faults.mutations import Mutator, binary, text
from tests.faults.mutations import json_values as json_mutator
from tests.faults.reader import Reader, reader

ROWS = [("fine film", "good"), ("a dull, long one", "bad"), ("so\tso", "so-so"), ("ok", "good")]


def delimited(separator: str) -> bytes:
    return (
        "text"
        + separator
        + "label\n"
        + "".join(f'"{words}"{separator}{label}\n' for words, label in ROWS)
    ).encode()


def data_seeds() -> dict[str, list[bytes]]:
    lines = [json.dumps({"text": words, "label": label}) for words, label in ROWS]
    several = [json.dumps({"text": words, "labels": [label, "x"]}) for words, label in ROWS]
    treebank = "".join(f"(3 (2 {words.split()[0]}) (4 (2 it) (1 is)))\n" for words, _ in ROWS)
    csv = delimited(",")
    return {
        "data.csv": [
            csv,
            'text;a;b\r\nüx;1;0\r\n"y;\nz";0;1\r\n'.encode("utf-16"),
            b"text,labels\na,\"['x', 'y']\"\nb,[]\n",
            csv.decode().encode("utf-8-sig"),
        ],
        "data.tsv": [delimited("\t"), b"id\ttext\tlabel\n1\ta\t3.5\n2\tb\t-1e3\n"],
        "data.json": [f"[{', '.join(lines)}]".encode(), f"[\n{','.join(several)}\n]".encode()],
        "data.jsonl": ["\n".join(lines).encode(), "\n".join(several).encode()],
        "data.txt": ["".join(f"{b} ||| {a}\n" for a, b in ROWS).encode(), treebank.encode()],
        "data.csv.gz": [gzip.compress(csv, mtime=0), gzip.compress(csv * 50, mtime=0)],
        "data.parquet": parquet_seeds(),
    }


def parquet_seeds() -> list[bytes]:
    import pyarrow as pa
    from pyarrow import parquet

    found = []
    for columns in (
        {"text": [words for words, _ in ROWS], "label": [0, 1, 2, 0]},
        {"text": [words for words, _ in ROWS], "label": [["a"], [], ["b", "a"], None]},
        {"text": pa.array(["a", "b", "a", "b"]).dictionary_encode(), "label": [1.5, 2, 3, 4]},
    ):
        stream = io.BytesIO()
        parquet.write_table(pa.table(columns), stream)
        found.append(stream.getvalue())
    return found


@reader(*data_seeds())
def data_file(folder: Path, name: str) -> Reader:
    from minllama.data import load_dataset, stream_rows
    from minllama.options import DataOptions

    path = folder / name
    kinds = [
        DataOptions(),
        DataOptions(skip_bad_rows=True),
        DataOptions(multi_label=True),
        DataOptions(encoding="latin-1", skip_bad_rows=True),
    ]

    def open_bytes(data: bytes) -> None:
        path.write_bytes(data)
        options = kinds[len(data) % len(kinds)]
        if name == "data.parquet" and options.encoding:
            options = kinds[0]
        if len(data) % 3:
            load_dataset(path, options, numbers=len(data) % 7 == 1 and not options.multi_label)
        else:
            for _ in stream_rows(path, options):
                pass

    mutate: Mutator = binary if name.endswith(("gz", "parquet")) else text
    if name.endswith(("json", "jsonl")):
        mutate = json_mutator
    return Reader(data_seeds()[name], open_bytes, mutate)


@reader("label names")
def label_names(folder: Path) -> Reader:
    from minllama.data import read_label_names, read_labels_file

    path = folder / "names.txt"

    def open_bytes(data: bytes) -> None:
        path.write_bytes(data)
        (read_label_names if len(data) % 2 else read_labels_file)(path)

    seeds = [b"0 bad\n1 good\n", b'{"0": "bad", "1": "good"}', b'["bad", "good"]', b"bad\ngood\n"]
    return Reader(seeds, open_bytes, text)
