"""A tiny classifier in a folder, and files to label."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from minllama.checkpoints.open import open_checkpoint
from minllama.classification import LlamaEmbeddingClassifier, save_classifier
from minllama.model.llama import load_pretrained
from minllama.tokenizer.tokenizer import Tokenizer

LABELS = ("bad", "good", "so-so")


@pytest.fixture(scope="session")
def folder_of_classifier(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of three classes on the tiny model."""
    llama = load_pretrained(str(base), device="cpu")
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(str(base)))
    torch.manual_seed(1)
    classifier = LlamaEmbeddingClassifier(llama, tokenizer, LABELS, pooling="mean", bias=True)
    folder = tmp_path_factory.mktemp("classifier") / "c"
    save_classifier(classifier, folder)
    return folder


def write_rows(folder: Path, n_files: int, n_rows: int, *, bad: tuple[int, ...] = ()) -> Path:
    """Parquet files of numbered texts with a key; those of `bad` numbers are empty or missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in range(n_files):
        numbers = range(file * n_rows, (file + 1) * n_rows)
        texts = [
            ("  " if n % 2 else None) if n in bad else f"text number {n}{' so' * (n % 7)}"
            for n in numbers
        ]
        columns = {"key": [f"{n:06}" for n in numbers], "text": pa.array(texts, pa.string())}
        parquet.write_table(pa.table(columns), folder / f"rows-{file}.parquet")
    return folder
