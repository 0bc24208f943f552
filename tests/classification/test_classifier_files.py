"""Classifiers in folders: read back as they were, in another process too, or refused."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minllama import atomic
from minllama.checkpoints.gguf import write_gguf
from minllama.checkpoints.huggingface import write_huggingface
from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.types import lazy
from minllama.classification import (
    LlamaEmbeddingClassifier,
    LlamaZeroShotClassifier,
    load_classifier,
    save_classifier,
)
from minllama.classification.storage.fingerprint import (
    tokenizer_digest,
    weights_digest,
    weights_digest_of_source,
)
from minllama.classification.storage.save_load import merge_classifier
from minllama.errors import CheckpointError, MinllamaError
from minllama.lora import add_lora_wrapper, lora_layers, lora_parameters, set_adapters
from minllama.model.llama import Llama, load_pretrained
from minllama.tokenizer.tokenizer import Tokenizer

TEXTS = ["A fine film.", "no", "It drags on, and on.", "What a mess!"]


def opened(base):
    return load_pretrained(base, device="cpu").requires_grad_(False), Tokenizer.from_pretrained(
        base
    )


def with_adapter(llama):
    add_lora_wrapper(llama, r=2)
    for parameter in lora_parameters(llama):
        torch.nn.init.normal_(parameter, std=0.2)
    return llama


def embedding(base, *, adapter=False, **options):
    llama, words = opened(base)
    if adapter:
        with_adapter(llama)
    classifier = LlamaEmbeddingClassifier(llama, words, ["bad", "so so", "good"], **options)
    torch.nn.init.normal_(classifier.score.weight, std=1.0)
    return classifier.eval()


def zero_shot(base, *, adapter=False, **options):
    llama, words = opened(base)
    if adapter:
        with_adapter(llama)
    return LlamaZeroShotClassifier(llama, words, ["bad", "good"], "{text} It was", **options).eval()


CASES = {
    "head": lambda base: embedding(base, pooling="mean", layer=1, bias=True),
    "several labels": lambda base: embedding(base, multi_label=True),
    "head and adapter": lambda base: embedding(base, adapter=True),
    "zero-shot": lambda base: zero_shot(
        base, score="pmi", prior_strength=0.5, label_words=["awful", "very good"]
    ),
    "shots": lambda base: zero_shot(base, shots=[("Fine.", "good"), ("No.", "bad")]),
    "label words and adapter": lambda base: zero_shot(base, adapter=True),
}


@pytest.mark.parametrize("case", CASES)
def test_a_classifier_is_read_back_as_it_was(base, tmp_path, case):
    classifier = CASES[case](base)
    classifier.temperature = 1.7
    before = classifier.predict_proba(TEXTS)
    classifier.save_pretrained(tmp_path / "saved")
    after = load_classifier(tmp_path / "saved", device="cpu")
    assert type(after) is type(classifier)
    assert after.labels == classifier.labels
    assert after.prompt == classifier.prompt
    assert not after.training
    np.testing.assert_array_equal(after.predict_proba(TEXTS), before)
    assert not (tmp_path / "saved" / "model.safetensors").exists()  # the base is named, not copied


def test_a_fresh_process_gives_the_same_probabilities(base, tmp_path):
    classifier = embedding(base, adapter=True, pooling="weighted-mean", layer=1)
    classifier.save_pretrained(tmp_path)
    program = (
        "import json, sys; from minllama import load_classifier\n"
        "texts = json.loads(sys.argv[2])\n"
        "print(load_classifier(sys.argv[1], device='cpu').predict_proba(texts).tolist())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), json.dumps(TEXTS)],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    np.testing.assert_allclose(
        json.loads(result.stdout), classifier.predict_proba(TEXTS), atol=1e-6
    )


def test_a_trained_base_is_written_too_and_an_untouched_one_is_not(base, tmp_path):
    llama, words = opened(base)
    llama.requires_grad_(True)
    untouched = LlamaEmbeddingClassifier(llama, words, ["a", "b"])
    untouched.save_pretrained(tmp_path / "untouched")
    assert not (tmp_path / "untouched" / "model.safetensors").exists()
    with torch.no_grad():
        llama.layers[0].attention.compute_value.weight += 0.01
    before = untouched.predict_proba(TEXTS)
    untouched.save_pretrained(tmp_path / "trained")
    assert (tmp_path / "trained" / "model.safetensors").exists()
    after = load_classifier(tmp_path / "trained", device="cpu")
    np.testing.assert_array_equal(after.predict_proba(TEXTS), before)


def test_a_whole_model_that_looks_ahead_is_read_back_as_one(base, tmp_path):
    llama = load_pretrained(base, device="cpu", causal=False)
    llama.layers[0].attention.compute_value.weight.data += 0.01
    classifier = LlamaEmbeddingClassifier(llama, Tokenizer.from_pretrained(base), ["a", "b"])
    classifier.save_pretrained(tmp_path)
    after = load_classifier(tmp_path, device="cpu")
    assert not after.llama.config.causal
    np.testing.assert_array_equal(
        after.predict_proba(TEXTS), classifier.eval().predict_proba(TEXTS)
    )


def test_a_new_classifier_leaves_nothing_of_an_old_whole_model(base, tmp_path):
    llama, words = opened(base)
    llama.requires_grad_(True).layers[0].attention.compute_value.weight.data += 0.01
    LlamaEmbeddingClassifier(llama, words, ["a", "b"]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")  # of an older one yet
    LlamaEmbeddingClassifier(llama, words, ["a", "b"]).save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    zero_shot(base).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {
        "classifier.json",
        "README.md",
        "generation_config.json",
    }


def test_a_classifier_in_the_folder_of_its_base_leaves_the_base_alone(base, tmp_path):
    llama, words = opened(base)
    llama.requires_grad_(True).layers[0].attention.compute_value.weight.data += 0.01
    LlamaEmbeddingClassifier(llama, words, ["a", "b"]).save_pretrained(tmp_path)
    embedding(tmp_path).save_pretrained(tmp_path)
    assert load_classifier(tmp_path, device="cpu").labels == ("bad", "so so", "good")


def test_a_merged_classifier_stands_alone(base, tmp_path):
    classifier = embedding(base, adapter=True)
    before = classifier.predict_proba(TEXTS)
    merge_classifier(classifier)
    classifier.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    after = load_classifier(tmp_path, device="cpu")
    np.testing.assert_allclose(after.predict_proba(TEXTS), before, atol=1e-5)
    with pytest.raises(MinllamaError, match="no adapter to merge"):
        merge_classifier(after)


@pytest.mark.parametrize("is_own", [False, True])
def test_without_an_active_adapter_the_base_is_saved(base, tmp_path, is_own):
    classifier = embedding(base, adapter=True)
    if is_own:
        classifier.llama.norm.weight.data += 0.1
    with_it = classifier.predict_proba(TEXTS)
    set_adapters(classifier, [])
    before = classifier.predict_proba(TEXTS)
    classifier.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert (tmp_path / "model.safetensors").exists() == is_own
    after = load_classifier(tmp_path, device="cpu").predict_proba(TEXTS)
    np.testing.assert_array_equal(after, before)
    assert not np.allclose(after, with_it)


def test_of_several_adapters_the_active_one_is_saved(base, tmp_path):
    classifier = embedding(base, adapter=True)
    add_lora_wrapper(classifier, "q_proj", r=3, adapter_name="other")
    for parameter in lora_parameters(classifier, "other"):
        torch.nn.init.normal_(parameter, std=0.4)
    for name in ("other", "default"):
        set_adapters(classifier, name)
        classifier.save_pretrained(tmp_path / name)
        after = load_classifier(tmp_path / name, device="cpu")
        np.testing.assert_array_equal(after.predict_proba(TEXTS), classifier.predict_proba(TEXTS))
    set_adapters(classifier, ["default", "other"])
    with pytest.raises(MinllamaError, match=r"several adapters are active \(default, other\)"):
        classifier.save_pretrained(tmp_path / "both")


def in_all_but_one_layer(classifier):
    next(iter(lora_layers(classifier).values())).active = {}


@pytest.mark.parametrize(
    "act", [lambda classifier: set_adapters(classifier, {"default": 0.3}), in_all_but_one_layer]
)
def test_an_adapter_that_takes_part_in_part_is_refused_and_can_be_merged(base, tmp_path, act):
    classifier = embedding(base, adapter=True)
    act(classifier)
    before = classifier.predict_proba(TEXTS)
    with pytest.raises(MinllamaError, match=r"^the adapter 'default' is active [^\n]*$"):
        classifier.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    merge_classifier(classifier)
    classifier.save_pretrained(tmp_path / "saved")
    after = load_classifier(tmp_path / "saved", device="cpu")
    np.testing.assert_allclose(after.predict_proba(TEXTS), before, atol=1e-5)


def test_a_new_kind_of_classifier_leaves_nothing_of_the_old_one(base, tmp_path):
    embedding(base, adapter=True).save_pretrained(tmp_path)
    (tmp_path / "report.html").write_text("kept")
    zero_shot(base).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "classifier.json",
        "README.md",
        "report.html",
    }


def edited(folder, **changes):
    path = folder / "classifier.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is KeyError:
            del content[key]
        else:
            content[key] = value
    path.write_text(json.dumps(content))


def swapped_head(folder):
    state = load_file(folder / "head.safetensors")
    state["score.weight"] = state["score.weight"] + 1
    save_file(state, folder / "head.safetensors")


def edited_adapter(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 99}))


DAMAGE = {
    "no file": (lambda f: (f / "classifier.json").unlink(), "no classifier.json"),
    "not JSON": (lambda f: (f / "classifier.json").write_text("{"), "not JSON"),
    "a list": (lambda f: (f / "classifier.json").write_text("[]"), "version"),
    "no head": (lambda f: (f / "head.safetensors").unlink(), "is missing"),
    "another head": (swapped_head, "SHA-256 differs"),
    "no adapter": (lambda f: (f / "adapter_model.safetensors").unlink(), "is missing"),
    "another scale": (edited_adapter, "adapter_config.json: was not saved with .*SHA-256 differs"),
    "no digests": (lambda f: edited(f, sha256=KeyError), "'sha256' is missing"),
    "digests of no kind": (lambda f: edited(f, sha256=[]), "sha256 must be an object of digests"),
    "changed label": (lambda f: edited(f, labels=["bad", "so so", "great"]), "its rows are for"),
    "fewer labels": (lambda f: edited(f, labels=["bad", "good"]), "its rows are for"),
    "no labels": (lambda f: edited(f, labels=KeyError), "'labels' is missing"),
    "labels of no kind": (lambda f: edited(f, labels=7), "classifier.json"),
    "another kind": (lambda f: edited(f, kind="forest"), "forest"),
    "no such layer": (lambda f: edited(f, layer=9), "layer must be 1 to 2"),
    "temperature": (lambda f: edited(f, temperature=0), "temperature"),
    "prompt": (lambda f: edited(f, prompt={"prompt": "no place"}), "exactly once"),
    "unknown option": (lambda f: edited(f, prompt={"color": 1}), "color"),
    "base": (lambda f: edited(f, base=None), "classifier.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_missing_or_changed_is_an_error_of_one_line(base, tmp_path, damage):
    embedding(base, adapter=True).save_pretrained(tmp_path)
    act, message = DAMAGE[damage]
    act(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_classifier(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


CHANGES = {
    "labels": (lambda c: c["labels"].reverse(), False),
    "label words": (lambda c: c["label_words"].reverse(), False),
    "prompt": (lambda c: c["prompt"].update(prompt="{text} So"), False),
    "shots": (lambda c: c["shots"].pop(), False),
    "score": (lambda c: c.update(score="token-mean"), False),
    "temperature": (lambda c: c.update(temperature=2.0), False),
    "where the base is": (lambda c: c["base"].update(model=f"{c['base']['model']}/"), True),
    "a note": (lambda c: c["training"].update(note="my first"), True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_description_is_refused_unless_it_changes_no_number(base, tmp_path, change):
    shots = [("Fine.", "very good"), ("No.", "awful")]
    zero_shot(base, label_words=["awful", "very good"], shots=shots).save_pretrained(tmp_path)
    path = tmp_path / "classifier.json"
    content = json.loads(path.read_text())
    act, is_allowed = CHANGES[change]
    act(content)
    path.write_text(json.dumps(content))
    if is_allowed:
        load_classifier(tmp_path, device="cpu")
        return
    with pytest.raises(CheckpointError, match=r"^[^\n]*classifier.json: changed[^\n]*$"):
        load_classifier(tmp_path, device="cpu")


def test_another_base_is_refused_and_a_moved_one_can_be_named(base, tmp_path):
    llama, words = opened(base)
    vocabulary = words.vocabulary
    moved = tmp_path / "here"
    write_huggingface(moved, llama.config, llama.state_dict(), vocabulary=vocabulary)
    classifier = LlamaEmbeddingClassifier(load_pretrained(moved, device="cpu"), words, ["a", "b"])
    classifier.save_pretrained(tmp_path / "saved")
    moved.rename(tmp_path / "there")
    with pytest.raises(CheckpointError, match="if it has moved, name it with --base"):
        load_classifier(tmp_path / "saved", device="cpu")
    after = load_classifier(tmp_path / "saved", model=tmp_path / "there", device="cpu")
    np.testing.assert_array_equal(after.predict_proba(TEXTS), classifier.predict_proba(TEXTS))
    with torch.no_grad():
        llama.layers[1].feed_forward.w2.weight *= 1.1
    write_huggingface(tmp_path / "other", llama.config, llama.state_dict(), vocabulary=vocabulary)
    with pytest.raises(CheckpointError, match="not the classifier's base model:"):
        load_classifier(tmp_path / "saved", model=tmp_path / "other", device="cpu")


def one_number(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    state["model.layers.0.mlp.down_proj.weight"].view(-1)[5] += 0.01
    save_file(state, path, metadata={"format": "pt"})


def json_edited(name, act):
    def edit(folder):
        content = json.loads((folder / name).read_text())
        act(content)
        (folder / name).write_text(json.dumps(content))

    return edit


BASE_CHANGES = {
    "one number": (one_number, "its weights differ"),
    "rope_theta": (
        json_edited("config.json", lambda c: c.update(rope_theta=500.0)),
        r"its rope_theta is 500\.0, was 10000\.0",
    ),
    "norm_eps": (
        json_edited("config.json", lambda c: c.update(rms_norm_eps=0.1)),
        r"its norm_eps is 0\.1, was 1e-05",
    ),
    "tokenizer": (
        json_edited("tokenizer.json", lambda c: c["model"]["merges"].pop()),
        "its tokenizer differs",
    ),
    "bos": (
        json_edited("tokenizer_config.json", lambda c: c.update(add_bos_token=True)),
        "its tokenizer differs",
    ),
}


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("change", BASE_CHANGES)
def test_a_changed_base_is_refused_in_every_dtype(base, tmp_path, change, dtype):
    shutil.copytree(base, tmp_path / "base")
    embedding(tmp_path / "base", adapter=True).save_pretrained(tmp_path / "saved")
    load_classifier(tmp_path / "saved", dtype=dtype, device="cpu")
    act, message = BASE_CHANGES[change]
    act(tmp_path / "base")
    with pytest.raises(
        CheckpointError, match=rf"^[^\n]*not the classifier's base model: {message}; [^\n]*$"
    ):
        load_classifier(tmp_path / "saved", dtype=dtype, device="cpu")


@pytest.mark.parametrize("change", BASE_CHANGES)
def test_a_changed_model_of_its_own_is_refused(base, tmp_path, change):
    llama, words = opened(base)
    llama.layers[0].attention.compute_value.weight.data += 0.01
    LlamaEmbeddingClassifier(llama, words, ["a", "b"]).save_pretrained(tmp_path)
    load_classifier(tmp_path, device="cpu")
    act, message = BASE_CHANGES[change]
    act(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_classifier(tmp_path, device="cpu")


def test_the_same_base_in_another_format_is_the_same_model(base, tmp_path):
    classifier = embedding(base, adapter=True)
    classifier.save_pretrained(tmp_path / "saved")
    stored = open_checkpoint(base)
    tensors = {name: tensor.load() for name, tensor in stored.tensors.items()}
    write_gguf(tmp_path / "base.gguf", stored.config, tensors, stored.vocabulary, "f32")
    after = load_classifier(tmp_path / "saved", model=tmp_path / "base.gguf", device="cpu")
    np.testing.assert_array_equal(after.predict_proba(TEXTS), classifier.predict_proba(TEXTS))
    # Numbers that were rounded are others.
    write_gguf(tmp_path / "base.gguf", stored.config, tensors, stored.vocabulary, "f16")
    with pytest.raises(CheckpointError, match="its weights differ"):
        load_classifier(tmp_path / "saved", model=tmp_path / "base.gguf", device="cpu")


def test_the_default_model_in_another_format_has_the_same_digest(default_model):
    checkpoint = open_checkpoint(default_model)
    digest = weights_digest(checkpoint)
    wide = {name: lazy(tensor.load()) for name, tensor in checkpoint.tensors.items()}
    assert weights_digest(dataclasses.replace(checkpoint, tensors=wide)) == digest
    llama = Llama.from_checkpoint(checkpoint, dtype="bfloat16", device="cpu")
    assert weights_digest_of_source(with_adapter(llama), checkpoint) == digest
    llama.layers[7].feed_forward.w2.base.weight.data[3, 4] += 1
    assert weights_digest_of_source(llama, checkpoint) is None


def test_what_is_not_in_the_source_any_more_is_written_or_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    llama, words = opened(tmp_path / "base")  # frozen, and changed all the same
    llama.layers[0].attention.compute_value.weight.data[0, 0] += 1
    changed = LlamaEmbeddingClassifier(llama, words, ["a", "b"])
    before = changed.predict_proba(TEXTS)
    changed.save_pretrained(tmp_path / "changed")
    assert (tmp_path / "changed" / "model.safetensors").exists()
    after = load_classifier(tmp_path / "changed", device="cpu")
    np.testing.assert_array_equal(after.predict_proba(TEXTS), before)
    adapted = embedding(tmp_path / "base", adapter=True)
    one_number(tmp_path / "base")
    with pytest.raises(MinllamaError, match=r"not in a file: its weights differ"):
        adapted.save_pretrained(tmp_path / "adapted")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(MinllamaError, match=r"not in a file: .*no such file"):
        adapted.save_pretrained(tmp_path / "adapted")
    assert not (tmp_path / "adapted").exists()


def test_a_tokenizer_of_another_place_goes_with_the_classifier(base, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "base")
    BASE_CHANGES["tokenizer"][0](tmp_path / "base")
    llama, words = opened(base)
    other = Tokenizer.from_pretrained(tmp_path / "base")
    classifier = LlamaEmbeddingClassifier(llama, other, ["a", "b"])
    monkeypatch.chdir(tmp_path)
    save_classifier(classifier, tmp_path / "named", tokenizer="base")
    assert not (tmp_path / "named" / "model.safetensors").exists()
    monkeypatch.chdir(tmp_path / "named")  # what was told relative to another place is found
    load_classifier(tmp_path / "named", device="cpu")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="with --base, its tokenizer with --tokenizer"):
        load_classifier(tmp_path / "named", device="cpu")
    moved = load_classifier(tmp_path / "named", tokenizer=tmp_path / "moved", device="cpu")
    np.testing.assert_array_equal(moved.predict_proba(TEXTS), classifier.predict_proba(TEXTS))
    with pytest.raises(CheckpointError, match="its tokenizer differs"):
        load_classifier(tmp_path / "named", tokenizer=base, device="cpu")
    save_classifier(classifier, tmp_path / "whole")
    after = load_classifier(tmp_path / "whole", device="cpu")
    digests = [tokenizer_digest(t.vocabulary) for t in (after.tokenizer, other, words)]
    assert digests[0] == digests[1] != digests[2]


def test_a_classifier_that_was_read_is_saved_with_its_tokenizer_named(base, tmp_path):
    shutil.copytree(base, tmp_path / "words")
    BASE_CHANGES["tokenizer"][0](tmp_path / "words")
    for weights in (*tmp_path.glob("words/*.safetensors"), tmp_path / "words" / "config.json"):
        weights.unlink()  # a tokenizer and nothing else
    llama, _ = opened(base)
    words = Tokenizer.from_pretrained(tmp_path / "words")
    classifier = LlamaEmbeddingClassifier(with_adapter(llama), words, ["a", "b"]).eval()
    for folder in ("first", "second", "third"):
        classifier.save_pretrained(tmp_path / folder)
        assert not (tmp_path / folder / "model.safetensors").exists()
        again = load_classifier(tmp_path / folder, device="cpu")
        np.testing.assert_array_equal(again.predict_proba(TEXTS), classifier.predict_proba(TEXTS))
        classifier = again


def test_a_tokenizer_that_is_the_models_own_is_not_named(base, tmp_path):
    llama, _ = opened(base)
    words = Tokenizer.from_pretrained(base / "tokenizer.json")
    LlamaEmbeddingClassifier(llama, words, ["a", "b"]).save_pretrained(tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / "classifier.json").read_text())
    assert content["base"]["tokenizer"] is None
    shutil.copytree(base, tmp_path / "moved")
    load_classifier(tmp_path / "saved", model=tmp_path / "moved", device="cpu")
    apart = open_checkpoint(base, tokenizer=tmp_path / "moved" / "tokenizer.json")
    found = Tokenizer.from_checkpoint(apart).source
    assert found == str((tmp_path / "moved" / "tokenizer.json").resolve())


def test_a_whole_model_is_written_once_beside_its_place(base, tmp_path, monkeypatch):
    """A kill must leave nothing that the next save would not know for its own."""
    classifier, beside, begun = embedding(base), atomic._beside, []
    monkeypatch.setattr(atomic, "_beside", lambda path: begun.append(path.name) or beside(path))
    classifier.llama.source = None
    save_classifier(classifier, tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").exists()
    assert begun == ["whole"]


def test_the_default_model_is_not_a_file_of_that_name(default_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama, words = load_pretrained(device="cpu"), Tokenizer.from_pretrained()
    classifier = LlamaEmbeddingClassifier(llama, words, ["a", "b"], layer=1).eval()
    (tmp_path / "default").mkdir()
    classifier.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    again = load_classifier(tmp_path / "saved", device="cpu")
    np.testing.assert_array_equal(again.predict_proba(["x"]), classifier.predict_proba(["x"]))


def test_the_model_card_says_what_it_is(base, tmp_path):
    classifier = embedding(base, pooling="mean", layer=1)
    save_classifier(
        classifier,
        tmp_path / "films",
        training={"method": "frozen"},
        metrics={"dev": {"accuracy": 0.5}},
    )
    card = (tmp_path / "films" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: minllama\npipeline_tag: text-classification\n")
    assert "- labels: `bad`, `so so`, `good`" in card
    assert "- layers used: 1 of 2" in card
    assert "| dev | 0.5000 |" in card
    assert '"method": "frozen"' in card
    assert 'load_classifier("films")' in card
