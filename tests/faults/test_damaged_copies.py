"""Classifiers whose files were cut or changed on their way: the digests beside them say so."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minllama.classification import LlamaEmbeddingClassifier, load_classifier
from minllama.classification.storage.save_load import CARD_FILE
from minllama.errors import MinllamaError
from minllama.lora import add_lora_wrapper, lora_parameters
from minllama.model.llama import Llama
from minllama.tokenizer.tokenizer import Tokenizer
from tests.faults.read_models import CONFIG, tiny_folder
from tests.server.heads import experts

# Nothing is computed by these; the first is for people, the second says how to generate.
FOR_OTHERS = {CARD_FILE, "generation_config.json"}


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
    saved = tmp_path / "saved"
    KINDS[kind](base).save_pretrained(saved)
    text = "a fine film"
    expected = load_classifier(saved, device="cpu").predict_proba([text])
    draw, damaged, refused = random.Random(0), tmp_path / "damaged", 0
    shutil.copytree(saved, damaged)
    for path in sorted(saved.iterdir()):
        data, copy = path.read_bytes(), damaged / path.name
        changes = [data[: draw.randrange(len(data))] for _ in range(4)]
        for _ in range(24):
            at = draw.randrange(len(data))
            changes.append(data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :])
        for changed in changes:
            copy.write_bytes(changed)
            try:
                found = load_classifier(damaged, device="cpu").predict_proba([text])
            except MinllamaError:
                refused += 1
            else:
                assert (found == expected).all(), path.name
                assert path.name in FOR_OTHERS or is_same(changed, data), path.name
        copy.write_bytes(data)
    assert refused > 40


def is_same(changed: bytes, data: bytes) -> bool:
    """Whether only white space, or a place that may move, was changed in a JSON file."""
    try:
        one, other = json.loads(changed), json.loads(data)
    except ValueError:
        return False
    for content in (one, other):
        content.pop("training", None)
        content.pop("minllama", None)
        content.get("base", {}).pop("model", None)
    return bool(one == other)
