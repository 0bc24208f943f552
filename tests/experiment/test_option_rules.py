"""Options that would change nothing are refused, whichever method they are given with."""

import dataclasses
from pathlib import Path

import pytest

from minllama.errors import OptionError
from minllama.experiment import Experiment, check_uses
from minllama.experiment.option_rules import USES
from minllama.options import ClassifierOptions, LoRAOptions, TrainingOptions
from minllama.options.evaluation import ReportOptions, ThresholdOptions
from minllama.options.ladder import LadderOptions

GROUPS = {
    "classifier": ClassifierOptions,
    "ladder": LadderOptions,
    "lora": LoRAOptions,
    "training": TrainingOptions,
    "threshold": ThresholdOptions,
    "report": ReportOptions,
}
ALWAYS = {"method", "bidirectional", "seed"}


def experiment(dev: str | None = None, **options: object) -> Experiment:
    made = {}
    for name, group in GROUPS.items():
        own = {field.name for field in dataclasses.fields(group)} & options.keys()
        made[name] = group(**{option: options[option] for option in own})
    return Experiment(train="never read", output=Path("never written"), dev=dev, **made)


def test_every_option_has_its_use() -> None:
    named = {name for use in USES for name in use.names}
    there = {field.name for group in GROUPS.values() for field in dataclasses.fields(group)}
    assert named | ALWAYS == there
    assert not named & ALWAYS


TAKEN = (
    {
        "method": "zero-shot",
        "label_words": "a,b",
        "score": "pmi",
        "prior_strength": 0.5,
        "shots": 3,
    },
    {"method": "zero-shot", "objective": "label-words", "seed": 3, "per_class": 4},
    {"method": "frozen", "layer": "3", "pooling": "mean", "class_weights": "balanced"},
    {"method": "frozen", "bidirectional": True, "dev_fraction": 0.3, "no_calibration": True},
    {"method": "lora", "r": 3, "use_dora": True, "lr": 1e-3, "head_lr": 1e-2, "dropout": 0.2},
    {"method": "full", "epochs": 9, "layer": "3", "ordinal": 0.5, "tensorboard": True},
    {"method": "lora", "objective": "label-words", "label_words": "a,b", "epochs": 2, "shots": 1},
    {"method": "frozen", "objective": "regression", "layer": "3", "dev_fraction": 0.3},
    {"method": "lora", "objective": "regression", "metric": "mae", "patience": 2, "dropout": 0.2},
    {"method": "frozen", "threshold": ("0.3",), "positive": "a", "headline": "macro_f1"},
    {"minutes": 3.0, "prefer": "speed", "metric": "macro_f1", "seed": 1, "per_class": 4},
    {"label_words": "a,b", "score": "pmi", "r": 3, "epochs": 9, "dropout": 0.2, "layer": "3"},
    {"objective": "regression", "minutes": 3.0, "epochs": 9, "r": 3, "metric": "mae"},
)


@pytest.mark.parametrize("options", TAKEN)
def test_what_takes_effect_is_taken(options: dict[str, object]) -> None:
    check_uses(experiment(**options))
    check_uses(experiment(**options), set(options))


IDLE = (
    ("frozen", {"label_words": "a,b", "score": "pmi"}, "zero-shot or --objective label-words"),
    ("frozen", {"r": 3, "target_modules": ("q_proj",)}, "--method lora"),
    ("frozen", {"epochs": 9, "tensorboard": True, "keep": "last"}, "--method lora or full"),
    ("frozen", {"dropout": 0.5, "head_lr": 0.1}, "lora or full with --objective head"),
    ("zero-shot", {"layer": "3", "pooling": "mean"}, "heads: --method frozen"),
    ("zero-shot", {"epochs": 4, "lr": 3.0, "self_distillation": 0.1}, "--method lora or full"),
    ("zero-shot", {"use_dora": True}, "--method lora"),
    ("zero-shot", {"class_weights": "balanced"}, "--method frozen, lora or full"),
    ("zero-shot", {"prior_strength": 0.5}, "--score pmi, contextual or batch"),
    ("full", {"r": 3, "use_rslora": True}, "--method lora"),
    ("lora", {"score": "pmi", "prior_strength": 0.5}, "zero-shot or --objective label-words"),
    ("lora", {"minutes": 2.0, "prefer": "speed"}, "--method auto"),
    ("auto", {"patience": 2, "keep": "last", "evals_per_epoch": 2}, "--method lora or full"),
    ("auto", {"tensorboard": True}, "--method lora or full"),
)
OF_CLASSES = ({"class_weights": "balanced"}, {"ordinal": 0.5}, {"per_class": 4})
IDLE += tuple(
    (method, {"objective": "regression", **options}, "classes: without --objective regression")
    for method in ("frozen", "full")
    for options in (
        *(*OF_CLASSES, {"no_calibration": True}),
        *({"threshold": ("f1",)}, {"positive": "a"}, {"headline": "brier"}),
    )
)


@pytest.mark.parametrize(("method", "options", "purpose"), IDLE)
def test_what_would_be_ignored_is_refused(
    method: str, options: dict[str, object], purpose: str
) -> None:
    with pytest.raises(OptionError) as caught:
        check_uses(experiment(method=method, **options))
    line = str(caught.value)
    assert line.startswith(f"--method {method}")
    assert purpose in line
    for name in options.keys() - {"objective"}:
        assert f"--{name.replace('_', '-')}" in line


def test_label_words_have_no_layer_and_no_head() -> None:
    options = {"layer": "3", "dropout": 0.5, "head_lr": 0.1}
    with pytest.raises(OptionError, match="--method lora --objective label-words does not use"):
        check_uses(experiment(objective="label-words", **options))


def test_auto_with_label_words_trains_them() -> None:
    assert ClassifierOptions().method == "auto"
    assert ClassifierOptions(objective="label-words").method == "lora"
    assert ClassifierOptions(objective="regression").method == "auto"


def test_all_that_is_idle_is_named_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        check_uses(experiment(method="frozen", score="pmi", r=3, epochs=9))
    assert str(caught.value) == (
        "--method frozen does not use --score (for --method zero-shot or --objective "
        "label-words), --epochs (for --method lora or full), --r (for --method lora); omit "
        "these options, or choose a method that uses them"
    )


def test_a_default_that_was_chosen_is_refused_too() -> None:
    check_uses(experiment(method="frozen", batch_size=16))
    with pytest.raises(OptionError, match="--batch-size"):
        check_uses(experiment(method="frozen", batch_size=16), {"method", "batch_size"})
    with pytest.raises(OptionError, match="--objective"):
        check_uses(experiment(method="zero-shot"), {"method", "objective"})


def test_no_part_is_set_aside_where_there_is_a_dev_file() -> None:
    with pytest.raises(OptionError, match=r"--dev-fraction \(for a run without --dev\)"):
        check_uses(experiment(dev="dev.txt", dev_fraction=0.3))
