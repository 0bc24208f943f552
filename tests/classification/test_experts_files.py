"""Claims about folders of products of experts: what they keep, and what is refused."""

import contextlib
import copy
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minllama.atomic import sha256_of
from minllama.classification import LlamaExpertsClassifier, load_classifier
from minllama.classification.explain import explain
from minllama.classification.prompts import EncodedPrompt
from minllama.classification.storage.manifest import read_description, write_description
from minllama.classification.storage.save_load import merge_classifier
from minllama.classification.storage.transformers_export import check_exportable
from minllama.cli.merge import command as merge
from minllama.errors import CheckpointError, MinllamaError
from tests.server.heads import experts

TEXTS = ["a fine film", "dull", "it drags on, and on", "", "what a mess! " * 60]
FILES = ("classifier.json", "head.safetensors", "vocabulary.json")


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    experts(base).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def load(folder: Path) -> LlamaExpertsClassifier:
    loaded = load_classifier(folder, device="cpu")
    assert isinstance(loaded, LlamaExpertsClassifier)
    return loaded


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def signed(folder: Path, **fields: Any) -> None:
    """Change fields of the manifest, and let it vouch for all files as they are now."""
    path = folder / "classifier.json"
    content = {**read_description(path), **fields}
    content["sha256"] = {name: sha256_of(folder / name) for name in FILES[1:]}
    write_description(path, content)


def test_it_is_read_back_to_the_bit(base: Path, folder: Path) -> None:
    classifier, loaded = experts(base), load(folder)
    assert {path.name for path in folder.iterdir()} == {*FILES, "README.md"}
    np.testing.assert_array_equal(loaded.predict_logits(TEXTS), classifier.predict_logits(TEXTS))
    again = pickle.loads(pickle.dumps(loaded))
    np.testing.assert_array_equal(again.predict_logits(TEXTS), classifier.predict_logits(TEXTS))
    assert loaded.predict([]) == []
    assert "are not calibrated" not in (folder / "README.md").read_text()


def test_a_base_in_memory_is_saved_too(base: Path, tmp_path: Path) -> None:
    classifier = experts(base)
    classifier.llama.norm.weight.data += 0.1
    classifier.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    np.testing.assert_array_equal(
        load(tmp_path).predict_logits(TEXTS), classifier.predict_logits(TEXTS)
    )


def test_it_predicts_in_bfloat16(base: Path) -> None:
    classifier = experts(base)
    before = classifier.predict_logits(TEXTS)
    after = classifier.to(torch.bfloat16).predict_logits(TEXTS)
    assert after.dtype == np.float32
    np.testing.assert_allclose(after, before, atol=0.3)


def test_threads_predict_the_same(base: Path) -> None:
    classifier = experts(base)
    expected = classifier.predict_logits(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: classifier.predict_logits(TEXTS), range(12)):
            np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(copy.deepcopy(classifier).predict_logits(TEXTS), expected)


def test_prompts_of_ids_have_no_words(base: Path) -> None:
    classifier = experts(base)
    with pytest.raises(MinllamaError, match="give texts, not ids"):
        classifier.predict_encoded([EncodedPrompt((1, 2))])
    classifier.tfidf = None
    assert classifier.predict_encoded([EncodedPrompt((1, 2))]).shape == (1, 3)


def test_words_of_the_same_ids_are_explained_apart(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = experts(base)
    monkeypatch.setattr(classifier.template, "_ids", lambda text, label: (1, 2, 3))
    (target,) = explain(classifier, "a fine film").targets
    assert target.effects[1] != 0


@pytest.mark.parametrize("name", FILES)
def test_a_changed_or_missing_file_is_refused(folder: Path, name: str) -> None:
    path = folder / name
    data = path.read_bytes()
    for at in range(0, len(data), max(1, len(data) // 12)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        if name != "classifier.json":
            assert "SHA-256 differs" in refused(folder)
            continue
        with contextlib.suppress(CheckpointError):
            load(folder)  # notes and white space may change
    path.unlink()
    assert name in refused(folder)


def with_tensor(name: str, value: float) -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        path = folder / "head.safetensors"
        tensors = load_file(path)
        tensors[name].view(-1)[0] = value
        labels = json.dumps(read_description(folder / "classifier.json")["labels"])
        save_file(tensors, path, {"labels": labels})

    return act


def with_terms(content: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "vocabulary.json").write_text(json.dumps(content))


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("act", "fields", "message"),
    [
        (with_terms({"a": 1}), {}, "not a list of terms"),
        (with_terms([1, 2]), {}, "not a list of terms"),
        (with_terms(None), {}, "not a list of terms"),
        (with_terms(["a", "a"]), {}, "a duplicate term"),
        (with_terms(["a", "b"]), {}, "tfidf.weight must be of shape"),
        (lambda folder: (folder / "vocabulary.json").write_text("[" * 9999), {}, "cannot be read"),
        (lambda folder: (folder / "vocabulary.json").write_bytes(b"\xff"), {}, "cannot be read"),
        (with_tensor("tfidf.weight", float("nan")), {}, "tfidf.weight has NaN"),
        (with_tensor("tfidf.idf", float("inf")), {}, "tfidf.idf has NaN"),
        (with_tensor("score.weight", float("nan")), {}, "score.weight has NaN"),
        (nothing, {"choices": [[1, "mean"]]}, "score.weight must be of shape"),
        (nothing, {"choices": [[1, "mean"], [1, "mean"]]}, "given twice"),
        (nothing, {"choices": [[1, "mean"], [9, "last"]]}, "layer must be 1 to 2"),
        (nothing, {"choices": [[1, "mean"], [10**99, "last"]]}, "choices must be a list of pairs"),
        (nothing, {"choices": [[1, "mean"], [1e99, "last"]]}, "choices must be a list of pairs"),
        (nothing, {"choices": [[1, "mean"], [2, ["last"]]]}, "choices must be a list of pairs"),
        (nothing, {"choices": [[1, "mean", 3]]}, "choices must be a list of pairs"),
        (nothing, {"choices": 7}, "choices must be a list of pairs"),
        (nothing, {"tfidf": "yes"}, "tfidf must be true or false"),
        (nothing, {"multi_label": True}, "multi_label must be false"),
        (nothing, {"version": 5}, "not a classifier of version"),
    ],
)
def test_what_a_file_may_not_say(
    folder: Path, act: Callable[[Path], object], fields: dict[str, Any], message: str
) -> None:
    act(folder)
    signed(folder, **fields)
    assert message in refused(folder)


def test_large_vocabularies_are_read(base: Path, tmp_path: Path) -> None:
    terms = [f"#{'[' * 6}{number}" for number in range(200_000)]
    experts(base, terms).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.tfidf is not None
    assert len(loaded.tfidf.vocabulary.index) == len(terms)


def test_it_has_nothing_to_merge_and_transformers_cannot_represent_it(
    folder: Path, tmp_path: Path
) -> None:
    loaded = load(folder)
    with pytest.raises(MinllamaError, match="no adapter to merge"):
        merge_classifier(loaded)
    with pytest.raises(MinllamaError, match=r"several layers.*use this one with minllama$"):
        check_exportable(loaded)
    with pytest.raises(MinllamaError, match="several layers"):
        merge.main([str(folder), str(tmp_path / "out"), "--to", "hf"], standalone_mode=False)
    assert not (tmp_path / "out").exists()
