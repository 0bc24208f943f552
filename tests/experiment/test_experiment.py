"""From files to an evaluated classifier in a folder: what is there at the end, and after a cut."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import LlamaForSequenceClassification

from minllama.classification import load_classifier
from minllama.data import load_dataset
from minllama.errors import MinllamaError, OptionError
from minllama.experiment import load_splits, run_experiment
from minllama.experiment import train as run_module
from minllama.experiment.build import label_words_of, make_head, make_trainable
from minllama.model.llama import load_pretrained
from minllama.options import ClassifierOptions, DataOptions, LoRAOptions, PromptOptions
from minllama.tokenizer.tokenizer import Tokenizer
from tests.experiment_cases import REPORT, Heard, examples, names_in, write_labelled
from tests.peft_model import unwarned

TEXTS = ["a fine film", "dull", "great music and a slow plot"]
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
WHOLE = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}


CASES = {
    "zero-shot": ({"method": "zero-shot", "score": "pmi", "shots": 2}, set()),
    "frozen": ({"method": "frozen"}, {"head.safetensors", "vocabulary.json"}),
    "frozen, one layer": ({"method": "frozen", "layer": "2"}, {"head.safetensors"}),
    "lora": ({"method": "lora"}, {"head.safetensors", "metrics.jsonl"} | ADAPTER),
    "full": ({"method": "full"}, {"head.safetensors", "metrics.jsonl"} | WHOLE),
    "full, looking ahead": (
        {"method": "full", "bidirectional": True},
        {"head.safetensors", "metrics.jsonl"} | WHOLE,
    ),
    "lora of label words": (
        {"method": "lora", "objective": "label-words", "label_words": "awful, lovely"},
        {"metrics.jsonl"} | ADAPTER,
    ),
    "full of label words": (
        {"method": "full", "objective": "label-words"},
        {"metrics.jsonl"} | WHOLE,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_method_leaves_one_folder_that_gives_the_same_probabilities(
    make_experiment, labelled_files, case
):
    options, own = CASES[case]
    heard = Heard()
    experiment = make_experiment(**options, test=labelled_files / "dev.txt")
    outcome = run_experiment(experiment, reporter=heard)
    folder = experiment.output
    assert names_in(folder) == {"classifier.json", "README.md"} | REPORT | own
    after = load_classifier(folder, device="cpu")
    np.testing.assert_array_equal(
        after.predict_proba(TEXTS), outcome.classifier.predict_proba(TEXTS)
    )
    content = json.loads((folder / "classifier.json").read_text())
    assert content["labels"] == ["bad", "good"]
    assert content["temperature"] == outcome.classifier.temperature != 1.0
    assert content["training"]["classifier"]["method"] == options["method"]
    assert content["prompt"]["prompt"]
    metrics = json.loads((folder / "metrics.json").read_text())
    accuracy = metrics["splits"]["dev"]["evaluation"]["accuracy"]
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    of_dev = [row for row in rows if row["split"] == "dev"]
    assert accuracy == np.mean([row["label"] == row["predicted"] for row in of_dev])
    # The same rows were read once as dev and once as test.
    assert [row["probabilities"] for row in rows if row["split"] == "test"] == [
        row["probabilities"] for row in of_dev
    ]
    assert f"| dev | {accuracy:.4f} |" in (folder / "README.md").read_text()
    assert any("temperature" in line for line in heard.lines)
    if options.get("objective") == "label-words" or options["method"] == "zero-shot":
        assert any(f"score {content['score']}" in line for line in heard.lines)
    others = metrics["splits"]["dev"]["others"]
    assert {"majority class", "TF-IDF + logistic regression"} <= set(others)
    assert ("zero-shot (before training)" in others) == (options.get("objective") is not None)


def test_a_head_on_the_last_token_after_all_layers_is_in_peft_s_file(make_experiment, base):
    experiment = make_experiment("lora", layer="all", pooling="last")
    classifier = run_experiment(experiment).classifier
    folder = experiment.output
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert "score" in config["modules_to_save"]
    assert "also in PEFT's file" in (folder / "README.md").read_text()
    with unwarned(), torch.no_grad():
        plain = LlamaForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=0)
        theirs = PeftModel.from_pretrained(plain, folder).eval()
        ids = [torch.tensor([classifier.encode(text).ids]) for text in TEXTS]
        logits = torch.cat([theirs(row).logits for row in ids])
    loaded = load_classifier(folder, device="cpu")
    for ours in (classifier, loaded):
        np.testing.assert_allclose(ours.predict_logits(TEXTS), logits, atol=1e-4)
    loaded.save_pretrained(folder.parent / "again")
    again = folder.parent / "again" / "adapter_model.safetensors"
    assert again.read_bytes() == (folder / "adapter_model.safetensors").read_bytes()


OTHER_HEADS = {
    "pooling": ({"layer": "all", "pooling": "mean"}, "its pooling is mean"),
    "layer": ({"layer": "1", "pooling": "last"}, "it runs 1 of 2 layers"),
    "looking ahead": (
        {"layer": "all", "pooling": "last", "bidirectional": True},
        "its attention is bidirectional",
    ),
}


@pytest.mark.parametrize("case", OTHER_HEADS)
def test_the_card_says_why_a_head_is_in_no_file_of_peft(make_experiment, case):
    options, reason = OTHER_HEADS[case]
    experiment = make_experiment("lora", **options)
    assert run_experiment(experiment).classifier.score.bias.any()
    config = json.loads((experiment.output / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert (
        f"only in `head.safetensors`, because {reason}, which"
        in (experiment.output / "README.md").read_text()
    )


def test_dev_is_read_once_after_training(make_experiment, monkeypatch):
    seen = []
    original = run_module.Classifier.predict_logits

    def counted(self, texts, **options):
        seen.append(len(texts))
        return original(self, texts, **options)

    monkeypatch.setattr(run_module.Classifier, "predict_logits", counted)
    run_experiment(make_experiment("frozen"))
    assert seen == [8]


@pytest.mark.parametrize("is_wanted", [True, False])
def test_probabilities_are_calibrated_unless_they_are_to_stay(make_experiment, is_wanted):
    heard = Heard()
    experiment = make_experiment("frozen", no_calibration=not is_wanted)
    temperature = run_experiment(experiment, reporter=heard).classifier.temperature
    assert (temperature != 1) == is_wanted
    content = json.loads((experiment.output / "classifier.json").read_text())
    assert content["temperature"] == temperature
    assert any("fitted on" in line for line in heard.lines) == is_wanted


@pytest.mark.parametrize("method", ["frozen", "lora", "full"])
def test_several_labels_a_text_some_with_none(make_experiment, tmp_path, method):
    labels = ("late", "broken", "kind")
    with (tmp_path / "train.jsonl").open("w") as file:
        for i in range(24):
            given = [label for bit, label in enumerate(labels) if i >> bit & 1]
            print(json.dumps({"text": f"{i} {' '.join(given)}", "labels": given}), file=file)
    outcome = run_experiment(make_experiment(method, train=tmp_path / "train.jsonl", dev=""))
    assert outcome.classifier.multi_label
    assert () in outcome.splits.train.labels
    assert outcome.splits.train.label_names == ["broken", "kind", "late"]
    after = load_classifier(tmp_path / "run", device="cpu")
    np.testing.assert_array_equal(
        after.predict_proba(["late"]), outcome.classifier.predict_proba(["late"])
    )


@pytest.mark.parametrize("options", [{"method": "zero-shot"}, {"objective": "label-words"}])
def test_label_words_and_several_labels_exclude_each_other(make_experiment, tmp_path, options):
    (tmp_path / "t.jsonl").write_text('{"text": "a", "labels": ["x", "y"]}\n' * 3)
    experiment = make_experiment(**options, train=tmp_path / "t.jsonl", dev=tmp_path / "t.jsonl")
    with pytest.raises(MinllamaError, match="--objective head"):
        run_experiment(experiment)
    assert not experiment.output.exists()


@pytest.mark.parametrize("method", ["zero-shot", "frozen"])
@pytest.mark.parametrize("option", ["ordinal", "self_distillation"])
def test_targets_in_parts_are_for_what_is_trained_by_steps(make_experiment, method, option):
    experiment = make_experiment(method, training={option: 0.5})
    with pytest.raises(MinllamaError, match=f"--method {method} does not use .*lora or full"):
        run_experiment(experiment)
    assert not experiment.output.exists()


def test_numbers_get_names_from_a_file_and_a_dev_split_is_said_aloud(make_experiment, tmp_path):
    (tmp_path / "names.json").write_text('["bad", "good"]')
    numbers = {"bad": 0, "good": 1}
    write_labelled(tmp_path / "train.txt", ((numbers[k], text) for k, text in examples(24)))
    heard = Heard()
    outcome = run_experiment(
        make_experiment(
            "frozen",
            train=tmp_path / "train.txt",
            dev="",
            data={"label_names": str(tmp_path / "names.json")},
        ),
        reporter=heard,
    )
    assert outcome.classifier.labels == ("bad", "good")
    for file in ("classifier.json", "metrics.json"):
        content = json.loads((tmp_path / "run" / file).read_text())
        settings = content["training" if file == "classifier.json" else "settings"]
        assert settings["data"]["label_names"] == str(tmp_path / "names.json")
        assert settings["data"]["skip_bad_rows"] is False
    assert "no --dev: 2 of 24 rows of" in heard.lines[0]
    assert (len(outcome.splits.train), len(outcome.splits.dev)) == (22, 2)


PLACEHOLDERS = {
    "unlabelled": "".join(f"{text}\n" for _, text in examples(6, seed=2)),
    "-1": "".join(f"-1 ||| {text}\n" for _, text in examples(6, seed=2)),
    "all one class": "".join(f"bad ||| {text}\n" for _, text in examples(6, seed=2)),
}


@pytest.mark.parametrize("kind", PLACEHOLDERS)
def test_labels_that_say_nothing_are_not_measured(make_experiment, tmp_path, kind):
    (tmp_path / "test.txt").write_text(PLACEHOLDERS[kind])
    outcome = run_experiment(make_experiment("frozen", test=tmp_path / "test.txt"))
    split = json.loads((tmp_path / "run" / "metrics.json").read_text())["splits"]["test"]
    assert (split["rows"], split["evaluation"], split["others"]) == (6, None, {})
    assert outcome.splits.test.labels is None
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["label"] for row in rows if row["split"] == "test"] == [None] * 6
    assert "| test |" not in (tmp_path / "run" / "README.md").read_text()


def test_the_labels_of_a_real_test_file_without_gold_are_left_out(shared_data, tmp_path):
    train = write_labelled(tmp_path / "train.txt", [(1, "fine"), (0, "dull"), (1, "a"), (0, "b")])
    options = DataOptions(label_names=str(shared_data / "cfimdb-label-mapping.json"))
    test = shared_data / "cfimdb-test.txt"
    splits = load_splits(train, train, test, options, dev_fraction=0.1, seed=0)
    assert splits.test.labels is None
    assert len(splits.test) == 488
    assert any("placeholder" in notice for notice in splits.notices)


def test_a_tenth_is_held_out_but_of_a_large_file_less(tmp_path, monkeypatch):
    monkeypatch.setattr("minllama.experiment.splits.MOST_HELD_OUT", 6)
    sizes = {}
    for n in (40, 200):
        train = write_labelled(tmp_path / "train.txt", [(i % 2, f"text {i}") for i in range(n)])
        for fraction in (None, 0.1):
            splits = load_splits(train, None, None, DataOptions(), dev_fraction=fraction, seed=0)
            sizes[n, fraction] = len(splits.dev)
    assert sizes == {(40, None): 4, (40, 0.1): 4, (200, None): 6, (200, 0.1): 20}


def test_labels_of_test_are_found_where_those_of_train_are(tmp_path):
    rows = (("b", "fine"), ("a", "dull"), ("b", "x"), ("a", "y"))
    for name, lines in {
        "train": ["gold,text", *(f"{label},{text}" for label, text in rows)],
        "more": ["id,gold,text,topic", *(f"7,{label},{text},z" for label, text in rows)],
        "bare": ["text", *(text for _, text in rows)],
    }.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    train = tmp_path / "train.csv"
    for name, labels in (("train", [1, 0, 1, 0]), ("more", [1, 0, 1, 0]), ("bare", None)):
        test = tmp_path / f"{name}.csv"
        splits = load_splits(train, train, test, DataOptions(), dev_fraction=0.1, seed=0)
        assert splits.test.texts == [text for _, text in rows]
        assert splits.test.labels == labels


def test_one_labelled_test_row_is_no_placeholder(labelled_files, tmp_path):
    test = write_labelled(tmp_path / "test.txt", [("good", "lovely")])
    sources = (labelled_files / "train.txt", labelled_files / "dev.txt", test)
    splits = load_splits(*sources, DataOptions(), dev_fraction=0.1, seed=0)
    assert splits.test.labels == [1]


@pytest.mark.parametrize(("method", "per_class"), [("frozen", 1), ("frozen", 3), ("lora", 2)])
def test_a_few_rows_of_each_class_are_enough(make_experiment, tmp_path, per_class, method):
    outcome = run_experiment(make_experiment(method, per_class=per_class))
    assert outcome.splits.train.class_counts() == [per_class, per_class]
    assert load_classifier(tmp_path / "run", device="cpu").labels == ("bad", "good")


def opened(base, **changes):
    llama = load_pretrained(base, device="cpu", **changes).requires_grad_(False)
    return llama, Tokenizer.from_pretrained(base)


def test_a_head_is_fitted_on_all_rows_though_chosen_on_some(base, labelled_files, monkeypatch):
    llama, words = opened(base)
    splits = load_splits(
        labelled_files / "train.txt",
        labelled_files / "dev.txt",
        None,
        DataOptions(),
        dev_fraction=0.1,
        seed=0,
    )
    options = ClassifierOptions(method="frozen", layer="1", pooling="mean")
    monkeypatch.setattr("minllama.classification.features.PENALTIES", (0.3,))
    kind = {"balanced": False, "seed": 0}
    whole = make_head(
        llama, words, splits.train, PromptOptions(), options, reporter=Heard(), **kind
    )
    monkeypatch.setattr("minllama.experiment.build.MAX_ROWS", 12)
    heard = Heard()
    chosen = make_head(llama, words, splits.train, PromptOptions(), options, reporter=heard, **kind)
    assert heard.titles == ["reading the training texts", "reading all of them"]
    assert "on 12 training texts" in heard.lines[0]
    torch.testing.assert_close(chosen.score.weight, whole.score.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_frozen_head_searches_layers(balanced, base, labelled_files, monkeypatch):
    llama, words = opened(base)
    both = [(1, "mean"), (2, "mean")]
    monkeypatch.setattr("minllama.experiment.build.candidate_choices", lambda *_: both)
    monkeypatch.setattr("minllama.classification.layer_search.SEARCH_TEXTS", 4)
    monkeypatch.setattr("minllama.classification.layer_search.MARGIN", 0)
    train, heard = load_dataset(labelled_files / "train.txt"), Heard()
    options = ClassifierOptions(method="frozen")
    kind = {"balanced": balanced, "seed": 0, "reporter": heard}
    chosen = make_head(llama, words, train, PromptOptions(), options, **kind)
    searched = [line for line in heard.lines if line.startswith("after 4 texts")]
    assert len(searched) == (0 if balanced else 1)
    if searched:
        assert f"layers {chosen.layer}" in searched[0]


def test_the_rows_that_a_head_starts_from_have_all_classes(monkeypatch):
    from minllama.data import Dataset
    from minllama.data.task import Task
    from minllama.experiment.heads import ClassHeads

    labels = [0] * 500 + [1] * 3
    train = Dataset([str(i) for i in range(503)], labels, ["common", "rare"], "here")
    some = train.select(ClassHeads(train, Task.of(train)).some_rows(20))
    assert some.class_counts()[1] == 3
    assert 20 <= len(some) <= 23


def test_full_trains_what_runs_and_nothing_else(base):
    llama, words = opened(base)
    from minllama.classification import LlamaEmbeddingClassifier

    classifier = LlamaEmbeddingClassifier(llama, words, ["a", "b"], layer=1)
    assert make_trainable(classifier, "full", LoRAOptions()) == []
    wanted = {name for name, p in classifier.named_parameters() if p.requires_grad}
    classifier.compute_logits([classifier.encode("a film")]).sum().backward()
    reached = {name for name, p in classifier.named_parameters() if p.grad is not None}
    assert wanted == reached


def test_label_words_are_as_many_as_labels():
    assert label_words_of(None, ["x", "y"]) == ("x", "y")
    assert label_words_of(" good , bad", ["x", "y"]) == ("good", "bad")
    with pytest.raises(OptionError, match=r"3 words \(a, b, c\) for 2 labels \(x, y\)"):
        label_words_of("a,b,c", ["x", "y"])
