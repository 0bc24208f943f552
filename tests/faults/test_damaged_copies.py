"""Classifiers whose files were truncated or changed: the digests beside them say so."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minllama.classification import LlamaEmbeddingClassifier, load_classifier
from minllama.classification.storage.manifest import CLASSIFIER_FILE
from minllama.errors import MinllamaError
from minllama.lora import add_lora_wrapper, lora_parameters
from minllama.model.llama import Llama
from minllama.tokenizer.tokenizer import Tokenizer
from tests.faults.read_models import CONFIG, tiny_folder
from tests.server.heads import experts

TEXT = "a fine film"


def head(base: Path, *, adapter: bool = False) -> LlamaEmbeddingClassifier:
    llama, words = Llama.from_pretrained(base, device="cpu"), Tokenizer.from_pretrained(base)
    if adapter:
        add_lora_wrapper(llama, r=2)
        for parameter in lora_parameters(llama):
            torch.nn.init.normal_(parameter, std=0.2)
    classifier = LlamaEmbeddingClassifier(llama, words, ["bad", "good"], bias=True)
    torch.nn.init.normal_(classifier.score.weight)
    return classifier.eval()


def whole(base: Path) -> LlamaEmbeddingClassifier:
    """One whose weights differ from the checkpoint's, so that all are saved."""
    classifier = head(base)
    classifier.llama.norm.weight.data += 1
    return classifier


KINDS: dict[str, Any] = {
    "head": head,
    "adapter": lambda base: head(base, adapter=True),
    "full": whole,
    "experts": experts,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base") / "base", CONFIG.replace(max_seq_len=128))


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_or_cut_file_is_refused(kind: str, base: Path, tmp_path: Path) -> None:
    saved, damaged = tmp_path / "saved", tmp_path / "damaged"
    KINDS[kind](base).save_pretrained(saved)
    shutil.copytree(saved, damaged)
    expected = load_classifier(saved, device="cpu").predict_proba([TEXT])
    vouched_for = set(json.loads((saved / CLASSIFIER_FILE).read_text())["sha256"])
    if kind == "full":
        vouched_for |= {"model.safetensors", "tokenizer.json"}
    draw = random.Random(0)
    for path in sorted(saved.iterdir()):
        data, refused = path.read_bytes(), 0
        for at in [draw.randrange(len(data)) for _ in range(28)]:
            changed = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
            if at % 7 == 0:
                changed = data[:at]
            (damaged / path.name).write_bytes(changed)
            try:
                found = load_classifier(damaged, device="cpu").predict_proba([TEXT])
            except MinllamaError:
                refused += 1
            else:
                assert (found == expected).all(), path.name
                assert path.name not in vouched_for or means_the_same(changed, data), path.name
        assert refused > 0 or path.name not in vouched_for, path.name
        (damaged / path.name).write_bytes(data)


def means_the_same(changed: bytes, data: bytes) -> bool:
    """Whether only white space, notes for people, or a place that may move, was changed."""
    if len(data) > 8 and data[8:9] == b"{":  # safetensors: notes are in its header
        end = 8 + int.from_bytes(data[:8], "little")
        return changed[end:] == data[end:]
    try:
        one, other = json.loads(changed), json.loads(data)
    except ValueError:
        return False
    for content in (one, other):
        for note in ("training", "minllama"):
            content.pop(note, None)
        content.get("base", {}).pop("model", None)
    return bool(one == other)
