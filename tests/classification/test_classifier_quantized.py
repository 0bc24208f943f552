"""Classifiers on quantized weights: the same answers, the same base, and what was said kept."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch

from minllama.checkpoints.gguf import write_gguf
from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.weight_format import resolve_weight_format
from minllama.classification import LlamaEmbeddingClassifier, load_classifier
from minllama.classification.storage.fingerprint import (
    base_tensors,
    weights_digest,
    weights_digest_of_source,
)
from minllama.classification.storage.save_load import (
    SAMPLE,
    merge_classifier,
    weight_format_in_training,
)
from minllama.errors import CheckpointError, MinllamaError, OptionError
from minllama.experiment import run_experiment
from minllama.kernels.cpu import library
from minllama.lora import add_lora_wrapper, lora_parameters, merge_lora
from minllama.model.llama import load_pretrained
from minllama.options.loading import LoadOptions
from minllama.quantization.modules import QuantizedWeight
from minllama.tokenizer.tokenizer import Tokenizer
from tests.experiment_cases import Heard
from tests.tiny import our_model

TEXTS = ["A fine film.", "no", "It drags on, and on.", "What a mess!"]
CPU = torch.device("cpu")


def write_blocks(path, words_of=None, *, changed=False):
    """A tiny model in blocks; a changed one has other weights, and the tokenizer that is there."""
    vocabulary = open_checkpoint(words_of or path).vocabulary
    model = our_model(dim=64, hidden_dim=96, vocab_size=49152, max_seq_len=128)
    if changed:
        model.layers[1].feed_forward.w1.weight.data *= 1.5
    write_gguf(path, model.config, model.state_dict(), vocabulary=vocabulary, dtype="q8_0")


@pytest.fixture(scope="module")
def blocks(tmp_path_factory, default_model):
    """A tiny Llama with the default model's tokenizer, in a GGUF file of Q8_0 blocks."""
    path = tmp_path_factory.mktemp("blocks") / "tiny.gguf"
    write_blocks(path, default_model)
    return path


def classifier_on(source, quantize, *, adapter=False):
    llama = load_pretrained(source, device="cpu", dtype="float32", quantize=quantize)
    llama.requires_grad_(False)
    torch.manual_seed(1)
    if adapter:
        add_lora_wrapper(llama, r=2)
        for parameter in lora_parameters(llama):
            torch.nn.init.normal_(parameter, std=0.1)
    words = Tokenizer.from_pretrained(source)
    classifier = LlamaEmbeddingClassifier(llama, words, ["bad", "good"], "mean", bias=True)
    torch.nn.init.normal_(classifier.score.weight, std=1.0)
    return classifier.eval()


def quantized(classifier):
    return [m for m in classifier.llama.modules() if isinstance(m, QuantizedWeight)]


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("how", ["stored", "int8", "int4"])
def test_a_classifier_on_quantized_weights_is_read_back_as_it_was(blocks, tmp_path, how, adapter):
    classifier = classifier_on(blocks, how, adapter=adapter)
    before = classifier.predict_proba(TEXTS)
    classifier.save_pretrained(tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / "classifier.json").read_text())
    assert content["base"]["quantize"] == how
    assert content["weights"] == ("adapter" if adapter else "base")
    after = load_classifier(tmp_path / "saved", device="cpu")
    assert quantized(after)
    np.testing.assert_array_equal(after.predict_proba(TEXTS), before)
    assert f"`{how}`" in (tmp_path / "saved" / "README.md").read_text()


def test_stored_blocks_and_their_numbers_classify_alike(blocks, tmp_path):
    classifier_on(blocks, "stored", adapter=True).save_pretrained(tmp_path)
    stored = load_classifier(tmp_path, device="cpu")
    dense = load_classifier(tmp_path, device="cpu", quantize="none")
    assert quantized(stored)
    assert not quantized(dense)
    np.testing.assert_allclose(dense.predict_logits(TEXTS), stored.predict_logits(TEXTS), atol=2e-3)
    merge_classifier(dense)
    np.testing.assert_allclose(dense.predict_logits(TEXTS), stored.predict_logits(TEXTS), atol=2e-3)


@pytest.mark.parametrize("how", ["stored", "int8", "int4"])
def test_merging_keeps_what_the_adapter_was_trained_beside(blocks, tmp_path, how):
    classifier = classifier_on(blocks, how, adapter=True)
    before = classifier.predict_logits(TEXTS)
    with pytest.raises(MinllamaError, match="without quantize"):
        merge_lora(classifier.llama)
    prompts = [classifier.encode(text) for text in SAMPLE]
    with torch.no_grad():
        sample = classifier.compute_logits(prompts)
        drift = merge_classifier(classifier)
        assert drift == float((classifier.compute_logits(prompts) - sample).abs().max())
    assert not quantized(classifier)
    classifier.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "classifier.json").read_text())
    assert (content["weights"], content["base"]["quantize"]) == ("full", None)
    after = load_classifier(tmp_path, device="cpu")
    np.testing.assert_allclose(after.predict_logits(TEXTS), before, atol=2e-3)
    assert drift < 2e-3


@pytest.mark.parametrize("how", [None, "int8"])
def test_the_form_of_training_is_that_of_merging(blocks, tmp_path, how):
    classifier_on(blocks, how, adapter=True).save_pretrained(tmp_path)
    word = weight_format_in_training(tmp_path)
    assert word == (how or "none")
    assert bool(quantized(load_classifier(tmp_path, device="cpu", quantize=word))) == bool(how)


def test_another_base_in_blocks_is_refused(blocks, tmp_path):
    classifier_on(blocks, "stored").save_pretrained(tmp_path / "saved")
    write_blocks(tmp_path / "other.gguf", blocks, changed=True)
    with pytest.raises(CheckpointError, match="its weights differ"):
        load_classifier(tmp_path / "saved", model=tmp_path / "other.gguf", device="cpu")


def test_a_changed_quantized_base_is_not_taken_for_the_file(blocks):
    llama = load_pretrained(blocks, quantize="stored", dtype="float32", device="cpu")
    checkpoint = open_checkpoint(blocks)
    assert weights_digest_of_source(llama, checkpoint) == weights_digest(checkpoint)
    llama.layers[1].feed_forward.w2.quants[0, 0, 0, 0, 0] ^= 1
    assert weights_digest_of_source(llama, checkpoint) is None


def test_base_tensors_are_what_quantized_weights_compute_with(blocks):
    classifier = classifier_on(blocks, "stored", adapter=True)
    dense = load_pretrained(blocks, dtype="float32", device="cpu")
    found, expected = base_tensors(classifier.llama), dense.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_quantized_model_that_is_in_no_file_is_written_in_numbers(blocks, tmp_path):
    classifier = classifier_on(blocks, "int4")
    classifier.llama.source = None
    before = classifier.predict_logits(TEXTS)
    classifier.save_pretrained(tmp_path)
    after = load_classifier(tmp_path, device="cpu")
    assert not quantized(after)
    np.testing.assert_allclose(after.predict_logits(TEXTS), before, atol=2e-3)


# ------------------------------------------------------------------ what is chosen


def weight_format(checkpoint, purpose, dtype=None, quantize="auto", **trained):
    options = LoadOptions(dtype=dtype, device=CPU, quantize=quantize)
    found = resolve_weight_format(checkpoint, options, purpose, **trained)
    assert (found.device.type, found.is_chosen) == ("cpu", False)
    return found.dtype, found.quantize


@pytest.mark.skipif(library.library() is None, reason="needs the compiled code")
@pytest.mark.parametrize(
    ("level", "features", "expected"),
    [
        ("avx512", ["bf16"], (torch.bfloat16, None)),
        ("avx512", ["amx"], (torch.bfloat16, None)),
        ("avx512", [], (torch.float32, "stored")),
        ("avx2", ["bf16"], (torch.bfloat16, None)),
        ("avx2", [], (torch.float32, "stored")),
        ("portable", ["bf16"], (torch.bfloat16, None)),
        ("portable", [], (torch.float32, None)),
    ],
)
def test_the_form_to_read_in_is_the_fastest(blocks, as_cpu, level, features, expected):
    as_cpu(*features, level=level)
    checkpoint = open_checkpoint(blocks)
    assert weight_format(checkpoint, "read") == expected
    assert weight_format(checkpoint, "train") == (torch.float32, None)


def test_what_is_said_is_done(blocks, as_cpu):
    as_cpu(level="avx2")
    checkpoint = open_checkpoint(blocks)
    read = functools.partial(weight_format, checkpoint, "read")
    assert read("float32") == (torch.float32, None)
    assert read(None, None) == read(None, "none") == (torch.float32, None)
    assert read(None, "int4") == (torch.float32, "int4")
    assert read("bfloat16", "int8") == (torch.bfloat16, "int8")


@pytest.mark.skipif(library.library() is None, reason="needs the compiled code")
def test_what_a_classifier_was_trained_on_stands_for_what_is_not_said(blocks, as_cpu):
    as_cpu("bf16", level="avx2")
    checkpoint = open_checkpoint(blocks)
    on = functools.partial(weight_format, checkpoint, "read", trained_on=("bfloat16", "int8"))
    assert on(None, None) == (torch.bfloat16, "int8")
    assert on(None, "none") == (torch.bfloat16, None)
    assert on("float32", None) == (torch.float32, "int8")
    assert on(None, "auto") == (torch.bfloat16, None)
    assert on("float32", "auto") == (torch.float32, None)
    as_cpu(level="avx2")  # which only emulates it: then what reads fastest, unless bits are named
    assert on(None, None) == on(None, "auto") == (torch.float32, "stored")
    assert on(None, "int4") == (torch.float32, "int4")


def test_a_half_precision_of_the_training_is_left_where_it_is_slow(base, tmp_path, as_cpu):
    llama = load_pretrained(base, dtype="bfloat16", device="cpu")
    words = Tokenizer.from_pretrained(base)
    LlamaEmbeddingClassifier(llama, words, ["a", "b"]).save_pretrained(tmp_path)
    for is_fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        as_cpu(*(["bf16"] if is_fast else []), level="avx2")
        assert load_classifier(tmp_path, device="cpu").llama.dtype == dtype
        given = load_classifier(tmp_path, device="cpu", dtype="bfloat16")
        assert given.llama.dtype == torch.bfloat16


# ------------------------------------------------------------------ experiments


@pytest.mark.parametrize("method", ["zero-shot", "frozen", "lora"])
def test_an_experiment_runs_on_quantized_weights(make_experiment, blocks, tmp_path, method):
    experiment = make_experiment(method, model=str(blocks), quantize="int8", dtype=None)
    outcome = run_experiment(experiment)
    assert quantized(outcome.classifier)
    loaded = load_classifier(tmp_path / "run", device="cpu")
    assert loaded.llama.quantize == "int8"
    np.testing.assert_array_equal(
        loaded.predict_proba(TEXTS), outcome.classifier.predict_proba(TEXTS)
    )


def test_all_weights_are_trained_in_numbers(make_experiment, blocks):
    with pytest.raises(OptionError, match="full training cannot update"):
        make_experiment("full", model=str(blocks), quantize="int8")
    with pytest.raises(OptionError, match="quantize must be one of"):
        make_experiment("lora", quantize="int3")


def test_a_run_does_not_go_on_with_another_base_in_blocks(make_experiment, blocks, tmp_path):
    model = tmp_path / "base.gguf"
    shutil.copy(blocks, model)
    experiment = make_experiment("lora", model=str(model), quantize="stored", dtype=None)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, reporter=Heard(interrupt_after=2))
    write_blocks(model, changed=True)
    with pytest.raises(MinllamaError, match="weights of the frozen base"):
        run_experiment(experiment, resume=True)
    shutil.copy(blocks, model)
    run_experiment(experiment, resume=True)
