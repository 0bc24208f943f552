"""Help pages: options in titled groups that fit 80 columns; and the nearest name for a typo."""

import re
import subprocess
import sys
import time
from dataclasses import fields

import click
import pytest

from minllama import cli
from minllama.cli.grouped import COMMON, OTHER, did_you_mean
from minllama.options import (
    ClassifierOptions,
    DataOptions,
    GenerationOptions,
    LoRAOptions,
    PromptOptions,
    TrainingOptions,
    group_of,
)
from minllama.options.base import GROUPS
from minllama.options.evaluation import ReportOptions, ThresholdOptions

OPTIONS = (
    ClassifierOptions,
    DataOptions,
    GenerationOptions,
    LoRAOptions,
    PromptOptions,
    ReportOptions,
    ThresholdOptions,
    TrainingOptions,
)


def help_of(*command: str, capfd: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    return capfd.readouterr().out


def groups_of(page: str) -> dict[str, list[str]]:
    """Title of a group -> its options, as a help page lists them."""
    found: dict[str, list[str]] = {}
    options: list[str] = []
    for line in page.splitlines():
        if title := re.fullmatch(r"(\S.*):", line):
            options = found.setdefault(title[1], [])
        elif option := re.match(r"  (?:-\w, )?(--[\w-]+)", line):
            options.append(option[1])
    return found


def test_train_lists_its_options_in_groups_with_the_common_ones_first(capfd):
    groups = groups_of(help_of("train", capfd=capfd))
    assert list(groups) == [
        COMMON, "Data", "Prompt", "Model", "Method", "Training", "Adapters", "Evaluation",
        "Output", OTHER,
    ]  # fmt: skip
    assert {"--train", "--test", "--output", "--model", "--method", "--epochs"} <= {*groups[COMMON]}
    assert len(groups[COMMON]) <= 10
    assert "--lora-alpha" in groups["Adapters"]
    assert "--threshold" in groups["Evaluation"]
    assert "--tensorboard" in groups["Output"]
    assert groups[OTHER] == ["--debug", "--help"]


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_option_is_listed_once_within_80_columns(command, capfd):
    page = help_of(command, capfd=capfd)
    assert max(map(len, page.splitlines())) <= 80
    listed = [option for options in groups_of(page).values() for option in options]
    parser = cli.cli.get_command(click.Context(cli.cli), command)
    assert parser is not None
    names = [
        next(name for name in parameter.opts if name.startswith("--"))
        for parameter in parser.get_params(click.Context(parser, help_option_names=["--help"]))
        if isinstance(parameter, click.Option)
    ]
    assert sorted(listed) == sorted(names)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.__name__)
def test_the_group_of_an_option_is_one_of_the_titles(options):
    assert {group_of(options, field) for field in fields(options)} <= {*GROUPS}


def test_an_inherited_option_keeps_its_group():
    groups = {field.name: group_of(GenerationOptions, field) for field in fields(GenerationOptions)}
    assert groups["top_p"] == "Sampling"
    assert groups["stop"] == "Generation"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generat", "a"], "No such command 'generat'; did you mean generate? (see: minllama"),
        (["Train"], "No such command 'Train'; did you mean train? (see: minllama --help)"),
        (["evalute", "x"], "did you mean evaluate?"),
        (["generate", "a", "--max-new-tokns", "3"], "did you mean --max-new-tokens?"),
        (["generate", "a", "--max_new_tokens=3"], "did you mean --max-new-tokens?"),
        (["generate", "a", "--temp", "1"], "No such option '--temp'; did you mean --temperature?"),
        (["train", "--lern-rate", "1"], "No such option '--lern-rate'"),
        (["train", "--lora-alfa", "1"], "did you mean --lora-alpha? (see: minllama train --help)"),
        (["--hlep"], "No such option '--hlep'; did you mean --help? (see: minllama --help)"),
    ],
)
def test_a_mistyped_name_is_one_line_with_the_nearest(arguments, message, capfd):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    captured = capfd.readouterr()
    assert (ended.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert message in captured.err


@pytest.mark.parametrize("name", ["zzz", "", "-", "--"])
def test_no_name_is_suggested_without_a_near_one(name):
    assert did_you_mean(name, ["generate", "--model"]) == ""


def test_help_takes_less_than_three_tenths_of_a_second():
    def seconds() -> float:
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "minllama", "train", "--help"], check=True, capture_output=True
        )
        return time.perf_counter() - began

    # The least of several: other processes make some of them slower.
    assert min(seconds() for _ in range(5)) < 0.3
