"""Sequence classifiers of transformers and PEFT: opened with equal logits, and written for them."""

import dataclasses
import json
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForSequenceClassification
from transformers import LlamaConfig as TheirConfig

from minllama import cli, load_classifier, load_pretrained
from minllama.classification import LlamaEmbeddingClassifier, save_classifier
from minllama.classification.storage.save_load import merge_classifier
from minllama.errors import MinllamaError
from minllama.evaluation.regression import TargetScale
from minllama.evaluation.thresholds import as_thresholds
from minllama.experiment import run_experiment
from minllama.model.llama import Llama
from minllama.tokenizer.tokenizer import Tokenizer
from minllama.tokenizer.vocabulary import Vocabulary
from tests.peft_model import unwarned
from tests.tiny import SHAPE
from tests.tokenizer_cases import byte_json

TEXTS = ["A fine film.", "no", "It drags on, and on, and on.", "Größe: 日本", "7"]
NAMES = ("zero", "a", "m, or not")


@pytest.fixture
def minllama(capfd, monkeypatch):
    """The command, in this process."""

    def call(*arguments, status=0):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert ended.value.code == status, err
        return SimpleNamespace(stdout=out, stderr=err)

    return call


def write_tokenizer(folder, **changes):
    """Of the 256 bytes, <s> 0, </s> 1, <|turn|> 2."""
    fields = {"bos_id": 0, "eos_id": 1, "pad_id": 2, "add_bos": True} | changes
    Tokenizer(
        Vocabulary("tokenizers", json.dumps(byte_json()).encode(), "test", **fields)
    ).save_pretrained(folder)


def their_classifier(folder, *, names=NAMES, words=None, **changes):
    """A transformers classifier whose every number matters, in a folder with a tokenizer."""
    torch.manual_seed(3)
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    fields = {**SHAPE, "vocab_size": 259, "pad_token_id": 2, **labels, **changes}
    model = LlamaForSequenceClassification(TheirConfig(**fields)).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(mean=1.0 if "norm" in name else 0.0, std=0.15)
    write_tokenizer(folder, **(words or {}))  # first: it may be that of another model
    model.save_pretrained(folder)
    return model


def their_logits(model, folder, texts, *, side="right", batch=True):
    """What transformers makes of texts, padded in one batch or one by one."""
    words = AutoTokenizer.from_pretrained(folder, padding_side=side)
    rows = [texts] if batch else [[text] for text in texts]
    with torch.no_grad():
        return torch.cat(
            [model(**words(row, return_tensors="pt", padding=batch)).logits for row in rows]
        )


def edit_config(folder, **changes):
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "GONE"}))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_logits_and_probabilities_are_those_of_transformers(tmp_path, problem, side):
    theirs = their_classifier(tmp_path, problem_type=problem)
    ours = load_classifier(tmp_path)
    assert isinstance(ours, LlamaEmbeddingClassifier)
    assert ours.labels == NAMES
    assert ours.multi_label == (problem == "multi_label_classification")
    expected = their_logits(theirs, tmp_path, TEXTS, side=side)
    torch.testing.assert_close(torch.from_numpy(ours.predict_logits(TEXTS)), expected)
    p = expected.sigmoid() if ours.multi_label else expected.softmax(-1)
    np.testing.assert_allclose(ours.predict_proba(TEXTS), p, atol=1e-6)
    # Token ids that a caller has padded, too, with a mask and without one.
    words = AutoTokenizer.from_pretrained(tmp_path, padding_side=side)
    batch = words(TEXTS, return_tensors="pt", padding=True)
    log_p = ours(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(log_p.exp(), p)
    if side == "right":
        torch.testing.assert_close(ours(batch["input_ids"]).exp(), p)


@pytest.mark.parametrize("pad_id", [1, 0, 60, None])
@pytest.mark.parametrize("add_eos", [False, True])
def test_the_token_read_is_the_last_that_is_no_padding(tmp_path, pad_id, add_eos):
    # The end of a text is the padding here, or BOS, or a letter, or nothing is.
    theirs = their_classifier(
        tmp_path, pad_token_id=pad_id, words={"add_eos": add_eos, "pad_id": pad_id}
    )
    texts = [*TEXTS, "word " + chr(57 + 33) * 3, chr(57 + 33) * 4]
    assert Tokenizer.from_pretrained(tmp_path).encode(texts[-1])[1:5] == [60] * 4
    expected = their_logits(theirs, tmp_path, texts, batch=False)
    found = load_classifier(tmp_path).predict_logits(texts)
    torch.testing.assert_close(torch.from_numpy(found), expected)


def test_one_output_is_a_number(tmp_path):
    theirs = their_classifier(tmp_path, names=["stars"])
    expected = their_logits(theirs, tmp_path, TEXTS)[:, 0].tolist()
    for problem in ("regression", "GONE"):
        edit_config(tmp_path, problem_type=problem)
        ours = load_classifier(tmp_path)
        found = ours.predict(TEXTS)
        assert found == pytest.approx(expected, abs=1e-5)
        assert all(type(value) is float for value in found)
        with pytest.raises(MinllamaError, match="numbers"):
            ours.predict_proba(TEXTS)
    edit_config(tmp_path, problem_type="multi_label_classification")
    p = load_classifier(tmp_path).predict_proba(TEXTS)
    np.testing.assert_allclose(p[:, 0], torch.tensor(expected).sigmoid(), atol=1e-6)


def test_names_that_are_missing_are_transformers_own(tmp_path):
    their_classifier(tmp_path)
    edit_config(tmp_path, id2label="GONE", label2id="GONE")
    assert load_classifier(tmp_path).labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def as_shards(folder):
    model = LlamaForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100kB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_architectures(folder):
    edit_config(folder, architectures="GONE")


def without_prefix(folder):
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("change", [as_shards, as_pickle, without_architectures, without_prefix])
def test_other_ways_to_store_it_are_the_same_classifier(tmp_path, change):
    theirs = their_classifier(tmp_path)
    expected = their_logits(theirs, tmp_path, TEXTS)
    change(tmp_path)
    found = load_classifier(tmp_path).predict_logits(TEXTS)
    torch.testing.assert_close(torch.from_numpy(found), expected)


def test_bfloat16_is_read_in_float32_and_computed_closer_than_transformers(tmp_path):
    theirs = their_classifier(tmp_path)
    theirs.bfloat16().save_pretrained(tmp_path)
    upcast = LlamaForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    exact = their_logits(upcast, tmp_path, TEXTS)
    found = load_classifier(tmp_path, device="cpu").predict_logits(TEXTS)
    torch.testing.assert_close(torch.from_numpy(found), exact)
    rounded = load_classifier(tmp_path, device="cpu", dtype=torch.bfloat16).predict_logits(TEXTS)
    torch.testing.assert_close(torch.from_numpy(rounded), exact, atol=0.1, rtol=0.05)


def tensors_edited(act):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        act(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def with_bias(tensors):
    tensors["score.bias"] = torch.zeros(3)


def without_head(tensors):
    del tensors["score.weight"]


def narrow_head(tensors):
    tensors["score.weight"] = tensors["score.weight"][:, :-1].contiguous()


def nan_head(tensors):
    tensors["score.weight"][1, 1] = torch.nan


def without_words(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_words, "--tokenizer"),
        (tensors_edited(with_bias), "score.bias"),
        (tensors_edited(without_head), "score.weight is missing"),
        (tensors_edited(narrow_head), r"score.weight is of shape \(3, 47\)"),
        (tensors_edited(nan_head), "score.weight has NaN"),
        (lambda folder: edit_config(folder, id2label={"0": "a", "1": "b"}), "names 2 labels"),
        (lambda folder: edit_config(folder, id2label={"1": "a", "2": "b", "3": "c"}), "0 to 2"),
        (lambda folder: edit_config(folder, id2label={"0": "a", "1": "a", "2": "c"}), "twice"),
        (lambda folder: edit_config(folder, id2label=["a", "b", "c"]), "id2label"),
        (lambda folder: edit_config(folder, problem_type="regression"), "3 outputs"),
        (lambda folder: edit_config(folder, id2label={"9" * 5000: "a"}), "id2label"),
        (lambda folder: edit_config(folder, pad_token_id=2**70), "pad_token_id"),
        (lambda folder: edit_config(folder, problem_type="ranking"), "problem_type"),
        (lambda folder: edit_config(folder, problem_type=["regression"]), "problem_type"),
        (lambda folder: edit_config(folder, pad_token_id="</s>"), "pad_token_id"),
        (lambda folder: edit_config(folder, architectures=["LlamaForReward"]), "LlamaForReward"),
    ],
)
def test_what_cannot_be_read_is_an_error_of_one_line(tmp_path, change, message):
    their_classifier(tmp_path)
    change(tmp_path)
    with pytest.raises(MinllamaError, match=message) as caught:
        load_classifier(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("kind", ["TokenClassification", "QuestionAnswering"])
def test_other_heads_are_named(tmp_path, kind):
    model = getattr(transformers, f"LlamaFor{kind}")
    model(TheirConfig(**SHAPE)).save_pretrained(tmp_path)
    for opens in (load_classifier, load_pretrained):
        with pytest.raises(MinllamaError, match=f"LlamaFor{kind}, which") as caught:
            opens(tmp_path)
        assert "\n" not in str(caught.value)


def test_it_is_no_language_model_and_a_language_model_is_no_classifier(tmp_path):
    their_classifier(tmp_path / "head")
    for opens in (load_pretrained, Llama.from_pretrained):
        with pytest.raises(MinllamaError, match="LlamaForSequenceClassification"):
            opens(tmp_path / "head")
    transformers.LlamaForCausalLM(TheirConfig(**SHAPE)).save_pretrained(tmp_path / "words")
    with pytest.raises(MinllamaError, match="LlamaForCausalLM"):
        load_classifier(tmp_path / "words")


def test_the_commands_open_it_or_say_what_it_is(minllama, tmp_path):
    theirs = their_classifier(tmp_path / "c")
    expected = their_logits(theirs, tmp_path / "c", TEXTS).softmax(-1)
    shown = minllama("info", tmp_path / "c").stdout
    assert "LlamaForSequenceClassification: one of 3 labels ('zero', 'a', 'm, or not')" in shown
    lines = minllama("classify", tmp_path / "c", "--json", "--text", TEXTS[0]).stdout
    found = json.loads(lines)["probabilities"]
    assert list(found) == list(NAMES)
    np.testing.assert_allclose(list(found.values()), expected[0], atol=1e-5)
    rows = [{"text": t, "label": NAMES[i]} for t, i in zip(TEXTS, expected.argmax(-1), strict=True)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = minllama("evaluate", tmp_path / "c", "--data", data).stdout
    assert "Right on 5 of 5" in " ".join(summary.split())
    for command in (("generate", "-m", tmp_path / "c", "Once"), ("convert", tmp_path / "c", "x")):
        options = ("--to", "hf") if command[0] == "convert" else ()
        refused = minllama(*command, *options, status=2)
        assert "LlamaForSequenceClassification" in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_it_is_saved_as_one_of_ours_and_read_back(tmp_path):
    their_classifier(tmp_path / "theirs", pad_token_id=1, words={"add_eos": True, "pad_id": 1})
    ours = load_classifier(tmp_path / "theirs")
    save_classifier(ours, tmp_path / "ours")
    assert not (tmp_path / "ours" / "model.safetensors").exists()  # its base is named
    again = load_classifier(tmp_path / "ours")
    np.testing.assert_array_equal(again.predict_logits(TEXTS), ours.predict_logits(TEXTS))
    assert (again.pad_id, again.tokenizer_eos) == (1, True)


def their_adapter(folder, base, base_folder):
    """A random adapter of PEFT's on a sequence classifier, saved; and its logits."""
    with unwarned():
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"])
        model = peft.get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter.data.normal_(std=0.2)
        model.peft_config["default"].base_model_name_or_path = str(base_folder)
        model.save_pretrained(folder)
        return their_logits(model.eval(), base_folder, TEXTS)


@pytest.mark.parametrize("names", [["stars"], NAMES])
def test_an_adapter_of_peft_is_opened_with_its_base(tmp_path, names):
    base = their_classifier(tmp_path / "base", names=names)
    expected = their_adapter(tmp_path / "adapter", base, tmp_path / "base")
    ours = load_classifier(tmp_path / "adapter")
    assert ours.labels == tuple(names)
    torch.testing.assert_close(torch.from_numpy(ours.predict_logits(TEXTS)), expected)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(MinllamaError, match="--base"):
        load_classifier(tmp_path / "adapter")
    moved = load_classifier(tmp_path / "adapter", model=tmp_path / "moved")
    torch.testing.assert_close(torch.from_numpy(moved.predict_logits(TEXTS)), expected)


def test_an_adapter_of_a_language_model_is_no_classifier(minllama, tmp_path):
    base = transformers.LlamaForCausalLM(TheirConfig(**SHAPE))
    with unwarned():
        peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(MinllamaError, match="CAUSAL_LM"):
        load_classifier(tmp_path)


def test_a_tokenizer_of_another_model_is_said_to_be_one(tmp_path):
    their_classifier(tmp_path, vocab_size=100)
    classifier = load_classifier(tmp_path)
    with pytest.raises(MinllamaError, match="the model has 100 tokens"):
        classifier.predict(["日本"])


def test_a_new_head_is_trained_on_the_llama_below(make_experiment, tmp_path):
    their_classifier(tmp_path / "theirs")
    experiment = make_experiment("frozen", pooling="last", layer="all")
    experiment = dataclasses.replace(experiment, model=str(tmp_path / "theirs"))
    made = run_experiment(experiment).classifier
    assert made.labels == ("bad", "good")
    read = load_classifier(tmp_path / "run")
    np.testing.assert_allclose(read.predict_proba(TEXTS), made.predict_proba(TEXTS), atol=1e-5)
    words = dataclasses.replace(
        make_experiment("zero-shot", output="words"), model=str(tmp_path / "theirs")
    )
    with pytest.raises(MinllamaError, match="LlamaForSequenceClassification"):
        run_experiment(words)


# The other way.


def trained(tmp_path, **options):
    """A classifier of ours on a language model, whose head has numbers that matter."""
    torch.manual_seed(5)
    base = tmp_path / "base"
    if not base.exists():
        model = transformers.LlamaForCausalLM(TheirConfig(**SHAPE | {"vocab_size": 259}))
        model.save_pretrained(base)
        write_tokenizer(base, pad_id=None, **options.pop("words", {}))
    llama, words = load_pretrained(base, device="cpu"), Tokenizer.from_pretrained(base)
    names = options.pop("names", NAMES)
    classifier = LlamaEmbeddingClassifier(llama, words, names, **options).eval()
    torch.nn.init.normal_(classifier.score.weight, std=1.0)
    classifier.temperature = 1.7
    save_classifier(classifier, tmp_path / "ours")
    return classifier


def exported(minllama, tmp_path, *options):
    done = minllama("merge", tmp_path / "ours", tmp_path / "out", "--to", "hf", *options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, loaded = LlamaForSequenceClassification.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
    assert not any(loaded.values()), loaded
    return model.eval(), done.stderr


@pytest.mark.parametrize("multi_label", [False, True])
def test_transformers_computes_the_same_probabilities(minllama, tmp_path, multi_label):
    ours = trained(tmp_path, multi_label=multi_label)
    theirs, said = exported(minllama, tmp_path)
    assert "temperature 1.7, which is folded" in said
    assert list(theirs.config.id2label.values()) == list(NAMES)
    logits = their_logits(theirs, tmp_path / "out", TEXTS)
    torch.testing.assert_close(logits, torch.from_numpy(ours.predict_logits(TEXTS) / 1.7))
    p = logits.sigmoid() if multi_label else logits.softmax(-1)
    np.testing.assert_allclose(ours.predict_proba(TEXTS), p, atol=1e-6)
    pipe = transformers.pipeline("text-classification", str(tmp_path / "out"), top_k=None)
    for text, row in zip(TEXTS, ours.predict_proba(TEXTS), strict=True):
        found = {entry["label"]: entry["score"] for entry in pipe([text])[0]}
        assert found == pytest.approx(dict(zip(NAMES, row.tolist(), strict=True)), abs=1e-5)
    # And what was written is read again.
    again = load_classifier(tmp_path / "out")
    np.testing.assert_allclose(again.predict_proba(TEXTS), p, atol=1e-6)
    assert not (tmp_path / "out" / "classifier.json").exists()


def test_a_tokenizer_that_ends_texts_is_written_as_the_classifier_uses_it(minllama, tmp_path):
    ours = trained(tmp_path, words={"add_eos": True}, prompt="Review: {text} :")
    theirs, said = exported(minllama, tmp_path)
    assert "'Review: {text} :'" in said
    framed = [f"Review: {text} :" for text in TEXTS]
    logits = their_logits(theirs, tmp_path / "out", framed)
    torch.testing.assert_close(logits, torch.from_numpy(ours.predict_logits(TEXTS) / 1.7))


def test_numbers_are_exported_with_their_scale_in_the_head(minllama, tmp_path):
    ours = trained(tmp_path, names=["stars"], scale=TargetScale(0.0, 12.5))
    theirs, _ = exported(minllama, tmp_path)
    values = their_logits(theirs, tmp_path / "out", TEXTS)[:, 0].tolist()
    assert ours.predict(TEXTS) == pytest.approx(values, rel=1e-4)
    assert theirs.config.problem_type == "regression"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pooling": "mean"}, "its pooling is mean"),
        ({"layer": 2}, "it runs 2 of 3 layers"),
        (
            {"names": ["stars"], "scale": TargetScale(3.5, 1.0)},
            "its logits have an offset of 3.5, but score.weight has no bias",
        ),
    ],
)
def test_what_transformers_has_no_place_for_is_refused(minllama, tmp_path, options, reason):
    trained(tmp_path, **options)
    refused = minllama("merge", tmp_path / "ours", tmp_path / "out", "--to", "hf", status=2)
    assert reason in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_bias_is_refused_unless_it_moves_all_logits_alike(minllama, tmp_path):
    ours = trained(tmp_path, bias=True)
    torch.nn.init.constant_(ours.score.bias, 2.5)
    save_classifier(ours, tmp_path / "ours")
    theirs, _ = exported(minllama, tmp_path)
    p = their_logits(theirs, tmp_path / "out", TEXTS).softmax(-1)
    np.testing.assert_allclose(ours.predict_proba(TEXTS), p, atol=1e-6)
    torch.nn.init.normal_(ours.score.bias)
    save_classifier(ours, tmp_path / "ours")
    refused = minllama(
        "merge", tmp_path / "ours", tmp_path / "out", "--to", "hf", "--force", status=2
    )
    assert "its head has a bias" in refused.stderr


def test_a_bias_that_cancels_the_mean_of_the_targets_is_no_offset(minllama, tmp_path):
    ours = trained(tmp_path, names=["stars"], scale=TargetScale(3.0, 2.0), bias=True)
    torch.nn.init.constant_(ours.score.bias, -1.5)
    save_classifier(ours, tmp_path / "ours")
    theirs, _ = exported(minllama, tmp_path)
    values = their_logits(theirs, tmp_path / "out", TEXTS)[:, 0].tolist()
    assert ours.predict(TEXTS) == pytest.approx(values, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("multi_label", "names", "threshold", "said"),
    [
        (
            False,
            ["no", "yes"],
            0.31,
            ["threshold 0.31 for 'yes': cannot be stored", "most likely class"],
        ),
        (True, list(NAMES), 0.2, ["threshold 0.2 for each label: cannot be stored", "only scores"]),
        (
            *(True, list("abcdefgh"), {name: i / 10 for i, name in enumerate("abcdefgh", 1)}),
            [f"{i / 10:g} for '{name}'" for i, name in enumerate("abcdefgh", 1)],
        ),
        (False, ["no", "yes"], 0.5, []),
    ],
)
def test_a_threshold_does_not_travel_and_that_is_said(
    minllama, tmp_path, multi_label, names, threshold, said
):
    ours = trained(tmp_path, names=names, multi_label=multi_label)
    ours.decide_by(as_thresholds(threshold, names, None if multi_label else 1))
    save_classifier(ours, tmp_path / "ours")
    theirs, notices = exported(minllama, tmp_path)
    card = (tmp_path / "out" / "README.md").read_text()
    for words in said:
        assert words in notices
        assert words in card
    assert ("apply it to the probabilities, since" in notices) == bool(said)
    assert "threshold" not in str(theirs.config)
    assert set(load_classifier(tmp_path / "out").thresholds.values()) == {0.5}
    logits = their_logits(theirs, tmp_path / "out", TEXTS)
    p = logits.sigmoid() if multi_label else logits.softmax(-1)
    np.testing.assert_allclose(ours.predict_proba(TEXTS), p, atol=1e-5)


def test_an_imported_adapter_is_merged_into_either_kind_of_folder(minllama, tmp_path):
    base = their_classifier(tmp_path / "base")
    expected = their_adapter(tmp_path / "ours", base, tmp_path / "base")
    theirs, _ = exported(minllama, tmp_path)
    torch.testing.assert_close(
        their_logits(theirs, tmp_path / "out", TEXTS), expected, atol=1e-4, rtol=1e-4
    )
    ours = load_classifier(tmp_path / "ours")
    ours.save_pretrained(tmp_path / "again")  # as a classifier of ours, with its adapter
    found = load_classifier(tmp_path / "again").predict_logits(TEXTS)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)
    minllama("merge", tmp_path / "ours", tmp_path / "merged")
    found = load_classifier(tmp_path / "merged").predict_logits(TEXTS)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)
    assert merge_classifier(ours) < 1e-4
    ours.save_pretrained(tmp_path / "whole")
    found = load_classifier(tmp_path / "whole").predict_logits(TEXTS)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)
