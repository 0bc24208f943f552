"""Everything that minllama reads from a disk, as functions of one file's bytes.

A reader has good files to start from, and opens a damaged one as a user's command would: a model is
loaded and computes two passes, a vocabulary encodes and decodes, a classifier classifies. Whatever
the bytes are, it returns or raises MinllamaError. `fuzz.py` and `test_fuzzed_readers.py` call it;
the readers themselves are in `read_*.py`.
"""

import shutil
from importlib import import_module
from pathlib import Path

from tests.faults.reader import READERS, Reader

for part in ("models", "gguf", "adapters", "tokenizers", "classifiers", "data", "runs"):
    import_module(f"tests.faults.read_{part}")  # registers its readers


def make(name: str, folder: Path) -> Reader:
    """The reader of that name, with files of its own in a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return READERS[name](folder)
