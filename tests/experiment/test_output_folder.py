"""The folder of an experiment: cut and gone on with, kept, replaced, never half of one."""

import dataclasses
import shutil
import sys

import pytest
import torch

from minllama.checkpoints.huggingface import write_huggingface
from minllama.checkpoints.open import open_checkpoint
from minllama.classification import load_classifier
from minllama.errors import CheckpointError, DataError, MinllamaError, OptionError
from minllama.experiment import run_experiment
from minllama.experiment import train as run_module
from minllama.model.llama import Llama
from minllama.options import LoRAOptions
from tests.experiment_cases import REPORT, Heard, examples, names_in, write_labelled


def results(folder):
    """What must not depend on a cut."""
    classifier = load_classifier(folder, device="cpu")
    state = {n: p for n, p in classifier.named_parameters() if "adapters" in n or "score" in n}
    return state, (folder / "predictions.jsonl").read_bytes(), classifier.temperature


@pytest.mark.parametrize(
    ("objective", "cut", "training"),
    [
        ("head", 4, {}),
        ("label-words", 4, {}),
        pytest.param(
            *("head", 4, {"self_distillation": 0.5, "keep": "last"}), marks=pytest.mark.slow
        ),
        pytest.param("head", 1, {}, marks=pytest.mark.slow),
        pytest.param("head", "reading dev", {}, marks=pytest.mark.slow),
        pytest.param("label-words", "reading dev", {}, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_cut_and_resumed_equals_the_uncut_one(
    make_experiment, tmp_path, objective, cut, training
):
    uncut, cut_run = (
        make_experiment(objective=objective, training=training, output=name)
        for name in ("uncut", "cut")
    )
    run_experiment(uncut)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(cut_run, reporter=Heard(interrupt_after=cut))
    assert not (tmp_path / "cut" / "classifier.json").exists()
    with pytest.raises(MinllamaError, match="--resume continues it, --force replaces it"):
        run_experiment(cut_run)
    outcome = run_experiment(cut_run, resume=True)
    assert outcome.training.resumed_from == (cut if cut != "reading dev" else 6)
    assert names_in(tmp_path / "cut") == names_in(tmp_path / "uncut")
    (state, predictions, temperature), expected = map(results, (tmp_path / "cut", uncut.output))
    assert state.keys() == expected[0].keys() != set()
    assert all(torch.equal(state[name], expected[0][name]) for name in state)
    assert (predictions, temperature) == expected[1:]


def test_a_run_may_be_resumed_with_the_data_under_another_name_but_not_with_other_options(
    make_experiment, labelled_files, tmp_path
):
    with pytest.raises(KeyboardInterrupt):
        run_experiment(make_experiment(), reporter=Heard(interrupt_after=2))
    with pytest.raises(CheckpointError, match=r"dropout was 0\.1, now 0\.2"):
        run_experiment(make_experiment(dropout=0.2), resume=True)
    other = write_labelled(tmp_path / "other.txt", examples(24, seed=9))
    with pytest.raises(CheckpointError, match="training texts"):
        run_experiment(make_experiment(train=other), resume=True)
    (tmp_path / "copy.txt").write_bytes((labelled_files / "train.txt").read_bytes())
    assert (
        run_experiment(make_experiment(train=tmp_path / "copy.txt"), resume=True).training.steps
        == 6
    )


def test_a_run_goes_on_where_its_base_is_called_otherwise(make_experiment, base, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_experiment(make_experiment(), reporter=Heard(interrupt_after=2))
    (tmp_path / "moved").symlink_to(base)
    outcome = run_experiment(make_experiment(model=str(tmp_path / "moved")), resume=True)
    assert (outcome.training.resumed_from, outcome.training.steps) == (2, 6)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("change", ["weights", "config"])
def test_a_run_does_not_go_on_with_another_base(make_experiment, base, tmp_path, method, change):
    with pytest.raises(KeyboardInterrupt):
        run_experiment(make_experiment(method), reporter=Heard(interrupt_after=2))
    checkpoint = open_checkpoint(base)
    llama = Llama.from_checkpoint(checkpoint, device="cpu")
    config = llama.config
    if change == "weights":
        llama.layers[0].attention.compute_value.weight.data *= 2
    else:
        config = config.replace(rope_theta=500.0)
    other = tmp_path / "other"
    write_huggingface(other, config, llama.state_dict(), vocabulary=checkpoint.vocabulary)
    said = "its weights differ" if change == "weights" else "rope_theta was 10000.0, now"
    with pytest.raises(CheckpointError, match=said):
        run_experiment(make_experiment(method, model=str(other)), resume=True)


@pytest.mark.parametrize("is_wanted", [True, False])
def test_whether_to_calibrate_can_be_chosen_anew_when_a_run_goes_on(make_experiment, is_wanted):
    with pytest.raises(KeyboardInterrupt):
        run_experiment(make_experiment(no_calibration=is_wanted), reporter=Heard(interrupt_after=2))
    outcome = run_experiment(make_experiment(no_calibration=not is_wanted), resume=True)
    assert (outcome.classifier.temperature != 1) == is_wanted


@pytest.mark.parametrize("content", ["{", '{"layer": 2}', '{"layer": 9, "pooling": "mean"}', "[]"])
def test_a_damaged_choice_of_layer_is_refused(make_experiment, tmp_path, content):
    with pytest.raises(KeyboardInterrupt):
        run_experiment(make_experiment(), reporter=Heard(interrupt_after=2))
    (tmp_path / "run" / "layer.json").write_text(content)
    with pytest.raises(MinllamaError, match="layer"):
        run_experiment(make_experiment(), resume=True)


def test_resume_needs_a_checkpoint_and_a_method_that_is_trained(make_experiment):
    with pytest.raises(MinllamaError, match="no checkpoint to resume from"):
        run_experiment(make_experiment(), resume=True)
    with pytest.raises(OptionError, match="frozen has none"):
        run_experiment(make_experiment("frozen"), resume=True)
    with pytest.raises(OptionError, match="give one of them"):
        run_experiment(make_experiment(), resume=True, force=True)


@pytest.mark.parametrize(
    "left", [{"metrics.jsonl"}, {"layer.json"}, {"metrics.jsonl", "layer.json"}]
)
def test_a_run_that_was_cut_before_its_first_checkpoint_is_begun_anew(
    make_experiment, tmp_path, left
):
    run_experiment(make_experiment(output="uncut"))
    (tmp_path / "run").mkdir()
    for name in left:  # a choice of layer whose head was not kept would start with a random one
        (tmp_path / "run" / name).write_text('{"layer": 1, "pooling": "mean"}\n')
    if "metrics.jsonl" in left:
        with pytest.raises(
            MinllamaError, match="contains a run without a checkpoint; --force starts again"
        ):
            run_experiment(make_experiment())
    heard = Heard()
    outcome = run_experiment(make_experiment(), resume=True, reporter=heard)
    assert heard.lines[0].endswith(
        "was interrupted before its first checkpoint; starting from the beginning"
    )
    assert outcome.training.resumed_from == 0
    (state, *rest), (expected, *others) = map(results, (tmp_path / "run", tmp_path / "uncut"))
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert rest == others


def test_a_run_that_has_ended_is_not_gone_on_with(make_experiment, tmp_path):
    run_experiment(make_experiment())
    before = contents(tmp_path / "run")
    with pytest.raises(
        MinllamaError, match="without a checkpoint to resume from; --force replaces it"
    ):
        run_experiment(make_experiment(), resume=True)
    with pytest.raises(MinllamaError, match="an earlier run; --force replaces it"):
        run_experiment(make_experiment())
    assert contents(tmp_path / "run") == before


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_an_old_classifier_is_kept_unless_it_is_replaced_as_a_whole(
    make_experiment, tmp_path, monkeypatch
):
    run_experiment(make_experiment("frozen"))
    before = contents(tmp_path / "run")
    with pytest.raises(MinllamaError, match="an earlier run; --force replaces it"):
        run_experiment(make_experiment("lora"))

    def fails(folder, report):
        raise MinllamaError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "write_files", fails)
        with pytest.raises(MinllamaError, match="disk full"):
            run_experiment(make_experiment("full"), force=True)
    after = contents(tmp_path / "run")
    assert {name: after[name] for name in before} == before
    assert not any(path.name.endswith(".tmp") for path in tmp_path.iterdir())
    run_experiment(
        make_experiment("zero-shot"), force=True
    )  # nothing of head, run or checkpoint is left
    assert names_in(tmp_path / "run") == {"classifier.json", "README.md"} | REPORT


def test_a_wrong_file_costs_no_old_checkpoint(make_experiment, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_experiment(make_experiment(), reporter=Heard(interrupt_after=2))
    with pytest.raises(DataError):
        run_experiment(make_experiment(train=tmp_path / "none.txt"), force=True)
    assert run_experiment(make_experiment(), resume=True).training.resumed_from == 2


FAILURES = {
    "diverged": {"training": {"lr": 1e30}},
    "layer": {"layer": "999"},
    "shots": {"method": "zero-shot", "shots": 25},
    "words": {"method": "zero-shot", "label_words": "one"},
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_run_that_fails_leaves_no_classifier(make_experiment, tmp_path, case):
    with pytest.raises(MinllamaError):
        run_experiment(make_experiment(**FAILURES[case]))
    left = names_in(tmp_path / "run") if (tmp_path / "run").exists() else set()
    assert left <= {"metrics.jsonl"}
    assert (case == "diverged") == bool(left)


def test_an_interrupt_before_the_first_step_leaves_nothing(make_experiment, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_experiment(
            make_experiment(), reporter=Heard(interrupt_after="reading the training texts")
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("output", ["a file", "a file/below", "/proc/minllama"])
def test_what_cannot_be_written_is_found_before_the_work(make_experiment, tmp_path, output):
    (tmp_path / "a file").write_text("mine")
    heard = Heard()
    with pytest.raises(MinllamaError, match="cannot write"):
        run_experiment(make_experiment("frozen", output=output), reporter=heard)
    assert heard.titles == []
    assert (tmp_path / "a file").read_text() == "mine"


@pytest.mark.parametrize("module", ["sklearn", "matplotlib"])
def test_a_missing_library_is_found_before_the_work(make_experiment, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MinllamaError, match=r"pip install 'minllama\[train\]'"):
        run_experiment(make_experiment("frozen", train=tmp_path / "is never read"))


def test_tensorboard_without_its_library_is_found_before_the_work(make_experiment, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    experiment = make_experiment(training={"tensorboard": True}, train="is never read")
    with pytest.raises(MinllamaError, match=r"pip install 'minllama\[tensorboard\]'"):
        run_experiment(experiment)


@pytest.mark.parametrize("objective", ["head", "label-words"])
def test_names_of_layers_that_are_not_there_are_found_before_texts_are_computed(
    make_experiment, objective
):
    experiment = make_experiment(objective=objective)
    experiment = dataclasses.replace(experiment, lora=LoRAOptions(target_modules=("nosuch",)))
    heard = Heard()
    with pytest.raises(OptionError, match="no linear layer is named 'nosuch'; there are"):
        run_experiment(experiment, reporter=heard)
    assert heard.titles == []
    assert not experiment.output.exists()


@pytest.mark.parametrize("layer", ["1", "2", "auto"])
def test_names_in_layers_that_cannot_come_to_run_are_found_before_texts_are_computed(
    make_experiment, layer
):
    experiment = make_experiment(layer=layer)
    only_last = LoRAOptions(target_modules=("layers.1.feed_forward.w1",))
    heard = Heard(interrupt_after=1)
    refused = OptionError if layer == "1" else KeyboardInterrupt
    with pytest.raises(refused, match="matches nothing" if layer == "1" else None):
        run_experiment(dataclasses.replace(experiment, lora=only_last), reporter=heard)
    assert (heard.titles == []) == (layer == "1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training": {"ordinal": 0.5}}, "no order; omit --ordinal"),
        ({"objective": "label-words"}, "for several use --method frozen, or lora"),
        ({"method": "zero-shot"}, "for several use --method frozen, or lora"),
    ],
)
def test_what_needs_one_label_is_refused_before_texts_with_several_are_read(
    make_experiment, tmp_path, options, message
):
    asked = make_experiment(**options, train="is never read", data={"multi_label": True})
    with pytest.raises(MinllamaError, match=message):
        run_experiment(asked)
    (tmp_path / "lists.jsonl").write_text('{"text": "a", "labels": ["x", "y"]}\n' * 3)
    lists = tmp_path / "lists.jsonl"
    heard = Heard()
    with pytest.raises(MinllamaError, match=message):
        run_experiment(make_experiment(**options, train=lists, dev=lists), reporter=heard)
    assert heard.titles == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "name"),
    [("frozen", "README.md"), ("lora", "predictions.jsonl"), ("full", "model.safetensors")],
)
def test_files_of_no_run_are_not_replaced(make_experiment, tmp_path, method, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    (tmp_path / "run" / "notes.txt").write_text("are in nobody's way")
    with pytest.raises(MinllamaError, match=f"{name} would be replaced, but are not part of a run"):
        run_experiment(make_experiment(method))
    assert (tmp_path / "run" / name).read_text() == "mine"
    assert names_in(tmp_path / "run") == {name, "notes.txt"}


def test_a_run_is_not_written_over_its_base(make_experiment, base, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(base, folder)
    before = names_in(folder)
    for model in (folder, folder / "model.safetensors"):
        with pytest.raises(MinllamaError, match="contains the base model"):
            run_experiment(make_experiment("full", model=str(model)), force=True)
    assert names_in(folder) == before


def test_what_prompts_show_is_not_learned_from(make_experiment, monkeypatch):
    seen, fit = [], run_module.fit

    def heard(model, train, *others, **options):
        seen.append(train)
        return fit(model, train, *others, **options)

    monkeypatch.setattr(run_module, "fit", heard)
    outcome = run_experiment(make_experiment(objective="label-words", shots=4))
    shown = {text for text, _ in outcome.classifier.shots}
    assert len(shown) == 4
    assert len(seen[0]) == 20
    assert shown.isdisjoint(seen[0].texts)
