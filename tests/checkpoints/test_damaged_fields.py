"""Every field of every JSON file beside a model may hold anything: one line, or it loads."""

import contextlib
import copy
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minllama import (
    Llama,
    LlamaConfig,
    LlamaEmbeddingClassifier,
    LlamaZeroShotClassifier,
    Tokenizer,
    add_lora_wrapper,
    load_classifier,
    load_pretrained,
    open_checkpoint,
)
from minllama.classification.storage import manifest as description
from minllama.errors import MinllamaError
from minllama.lora.peft_files import load_adapter, save_adapter

CONFIG = LlamaConfig(
    dim=16, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=32, vocab_size=300, max_seq_len=64
)
# What a field may hold instead.
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", "a", "\ud800", "\x1b[31m\n", "../x", "\0", "9" * 5000),
    *([], [None], [[]], [1, 2], ["a"], [["a", 1]], {}, {"a": 1}, {"": {}}, {"type": "Sequence"}),
    {"content": 7},
    {"content": "\x00"},
]


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value in a JSON document; of long lists and objects only the ends."""
    yield path
    if isinstance(content, dict):
        keys = list(content)
        for key in keys if len(keys) < 40 else [*keys[:2], *keys[-2:]]:
            yield from places(content[key], (*path, key))
    elif isinstance(content, list):
        for index in range(len(content)) if len(content) < 10 else (0, len(content) - 1):
            yield from places(content[index], (*path, index))


def changed(content: Any, path: tuple[Any, ...], how: str, value: Any) -> Any:
    """The document with one value replaced, removed, or put under another key."""
    if not path:
        return value
    content = copy.deepcopy(content)
    parent = content
    for step in path[:-1]:
        parent = parent[step]
    if how == "remove":
        del parent[path[-1]]
    elif how == "rename" and isinstance(parent, dict):
        parent[f"{path[-1]}\x1b[31m"] = parent.pop(path[-1])
    else:
        parent[path[-1]] = value
    return content


def tiny_tokenizer() -> dict[str, Any]:
    words = json.loads(Tokenizer.from_pretrained().vocabulary.data)
    vocab = {text: i for i, text in enumerate(list(words["model"]["vocab"])[:290])}
    words["model"] |= {"vocab": vocab, "merges": []}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    words["added_tokens"] = [
        {"id": 290 + i, "content": text, "special": True, **special}
        for i, text in enumerate(("<s>", "</s>"))
    ]
    words["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "x"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "y"},
        ],
    }
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its tokenizer, an adapter and two classifiers."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    Llama(CONFIG).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tiny_tokenizer()))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": "<s>",
                "eos_token": {"content": "</s>", "special": True},
                "add_bos_token": True,
                "add_eos_token": False,
                "additional_special_tokens": ["<s>"],
                "added_tokens_decoder": {"290": {"content": "<s>", "special": True}},
                "chat_template": [{"name": "default", "template": "{{ messages }}"}],
            }
        )
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [291, 1]}))
    (folder / "added_tokens.json").write_text(json.dumps({"<s>": 290}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "</s>"}))
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"] = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    config |= {"id2label": {"0": "a"}, "eos_token_id": 1, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "w.safetensors"}}
    (folder / "index.json").write_text(json.dumps(index))
    llama, words = load_pretrained(folder), Tokenizer.from_pretrained(folder)
    LlamaZeroShotClassifier(llama, words, ["a", "b"]).save_pretrained(folder / "zero-shot")
    LlamaEmbeddingClassifier(llama, words, ["a", "b"]).save_pretrained(folder / "embedding")
    add_lora_wrapper(llama)
    save_adapter(folder / "adapter", llama)
    return folder


def written(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_sharded(folder: Path, content: Any) -> None:
    (folder / "model.safetensors").rename(folder / "w.safetensors")
    written(folder / "model.safetensors.index.json", content)


def write_header(folder: Path, content: Any) -> None:
    old = (folder / "model.safetensors").read_bytes()
    header = json.dumps(content).encode()
    data = old[8 + int.from_bytes(old[:8], "little") :]
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)


def read_header(folder: Path) -> Any:
    content = (folder / "model.safetensors").read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def write_description(folder: Path, content: Any) -> None:
    """classifier.json with the digest of what it says, as who makes it up computes it."""
    with contextlib.suppress(Exception):  # it is no longer of a form that has a digest
        content["sha256"]["classifier.json"] = description._digest(content)
    written(folder / "classifier.json", content)


def open_all(folder: Path) -> None:
    """What `generate` does: config, weights, tokenizer, a text there and back, the model."""
    checkpoint = open_checkpoint(folder)
    words = Tokenizer.from_checkpoint(checkpoint)
    words.decode(words.encode("hello there", special=True))
    Llama.from_checkpoint(checkpoint, device="cpu")(torch.zeros(1, 3, dtype=torch.long))


def open_adapter(folder: Path) -> None:
    llama = Llama(CONFIG)
    load_adapter(llama, folder / "adapter")
    llama(torch.zeros(1, 3, dtype=torch.long))


def open_classifier(folder: Path) -> None:
    load_classifier(folder, device="cpu").predict_proba(["a text"])


Case = tuple[str, Callable[[Path], Any], Callable[[Path, Any], None], Callable[[Path], None]]


def of(name: str) -> tuple[Callable[[Path], Any], Callable[[Path, Any], None]]:
    return (
        lambda folder: json.loads((folder / name).read_text()),
        lambda folder, content: written(folder / name, content),
    )


MODEL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
CASES: list[Case] = [("", *of(name), open_all) for name in MODEL_FILES]
CASES += [
    ("", of("index.json")[0], write_sharded, open_all),
    ("", read_header, write_header, open_all),
    ("", *of("adapter/adapter_config.json"), open_adapter),
    ("zero-shot", of("classifier.json")[0], write_description, open_classifier),
    ("embedding", of("classifier.json")[0], write_description, open_classifier),
]
NAMES = [*MODEL_FILES, "index", "header", "adapter_config.json", "zero-shot", "embedding"]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_field_may_hold_anything(
    case: Case, data: st.DataObject, folder: Path, tmp_path: Path
) -> None:
    where, read, write, load = case
    copied = tmp_path / "copy"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(folder / where, copied)
    content = read(copied)
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(places(content))))
        how = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"]))
        content = changed(content, path, how, data.draw(st.sampled_from(VALUES)))
    write(copied, content)
    with contextlib.suppress(MinllamaError):
        load(copied)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_files_load_as_they_are(case: Case, folder: Path, tmp_path: Path) -> None:
    where, read, write, load = case
    copied = tmp_path / "copy"
    shutil.copytree(folder / where, copied)
    write(copied, read(copied))
    load(copied)
