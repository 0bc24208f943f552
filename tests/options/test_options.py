"""Claims about options: each is checked when it is set, against a range that it states."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from minllama.errors import MinllamaError, OptionError
from minllama.options import CheckedOptions, GenerationOptions, Range, SamplingOptions, option


def test_the_defaults_are_greedy_and_filter_nothing() -> None:
    assert dataclasses.asdict(SamplingOptions()) == {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "logit_bias": (),
        "seed": None,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 1e-6),
        ("top_k", 0),
        ("top_k", 10**9),
        ("top_p", 1),
        ("top_p", 5e-324),
        ("min_p", 0.0),
        ("min_p", 1.0),
        ("repetition_penalty", 0.01),
        ("frequency_penalty", -2),
        ("frequency_penalty", 2),
        ("presence_penalty", -2.0),
        ("presence_penalty", 2.0),
        ("logit_bias", ((0, -100.0), (5, 100.0))),
        ("seed", None),
        ("seed", 0),
        ("max_new_tokens", 1),
        ("n", 1),
        ("logprobs", None),
        ("logprobs", 0),
        ("logprobs", 100),
        ("ignore_eos", True),
        ("json_schema", "{}"),
        ("regex", "a+"),
        ("stop", ()),
    ],
)
def test_values_up_to_the_ends_of_a_range_are_taken(name: str, value: Any) -> None:
    assert getattr(GenerationOptions(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", -0.1, "temperature must be >= 0, not -0.1"),
        ("temperature", math.nan, "temperature must be a finite number >= 0, not nan"),
        ("temperature", math.inf, "temperature must be a finite number >= 0, not inf"),
        ("temperature", 10**400, "temperature must be a finite number >= 0, not inf"),
        ("temperature", "hot", "temperature must be a number >= 0, not 'hot'"),
        ("temperature", True, "temperature must be a number >= 0, not True"),
        ("temperature", None, "temperature must be a number >= 0, not None"),
        ("top_k", -1, "top_k must be >= 0, not -1"),
        ("top_k", 40.0, "top_k must be an integer >= 0, not 40.0"),
        ("top_k", True, "top_k must be an integer >= 0, not True"),
        ("top_p", 0, "top_p must be in (0, 1], not 0.0"),
        ("top_p", 1.01, "top_p must be in (0, 1], not 1.01"),
        ("min_p", -0.01, "min_p must be in [0, 1], not -0.01"),
        ("min_p", 2, "min_p must be in [0, 1], not 2.0"),
        ("repetition_penalty", 0, "repetition_penalty must be > 0, not 0.0"),
        ("frequency_penalty", 2.1, "frequency_penalty must be in [-2, 2], not 2.1"),
        ("presence_penalty", -3, "presence_penalty must be in [-2, 2], not -3.0"),
        (
            "presence_penalty",
            math.nan,
            "presence_penalty must be a finite number in [-2, 2], not nan",
        ),
        (
            "presence_penalty",
            True,
            "presence_penalty must be a number in [-2, 2], not True",
        ),
        ("logit_bias", {5: 101}, "logit_bias of 5 must be in [-100, 100], not 101.0"),
        (
            "logit_bias",
            {" a": math.nan},
            "logit_bias of ' a' must be a finite number in [-100, 100], not nan",
        ),
        (
            "logit_bias",
            {5: True},
            "logit_bias of 5 must be a number in [-100, 100], not True",
        ),
        ("logit_bias", {5: "1"}, "logit_bias of 5 must be a number in [-100, 100], not '1'"),
        ("logit_bias", {-1: 1}, "logit_bias contains -1, but token ids are >= 0"),
        ("logit_bias", {True: 1}, "logit_bias contains True, which is not a token"),
        ("logit_bias", {"": 1}, "logit_bias contains '', which is not a token"),
        ("logit_bias", {1.0: 1}, "logit_bias contains 1.0, which is not a token"),
        ("logit_bias", {5: 1, "5": 2}, "logit_bias holds the token 5 twice; give it once"),
        (
            "logit_bias",
            {"9" * 5000: 1},
            "logit_bias contains 999999999999999999..., but no id is so long",
        ),
        ("logit_bias", "5=1", "logit_bias must be a mapping of tokens to numbers, not '5=1'"),
        ("logit_bias", 5, "logit_bias must be a mapping of tokens to numbers, not 5"),
        ("logit_bias", [5], "logit_bias must be a mapping of tokens to numbers, not [5]"),
        ("logit_bias", ["5"], "logit_bias must be ID=VALUE, such as 42=-100, not '5'"),
        ("logit_bias", ["=5"], "logit_bias contains '', which is not a token"),
        (
            "logit_bias",
            ["5=inf"],
            "logit_bias of 5 must be a finite number in [-100, 100], not inf",
        ),
        ("logit_bias", None, "logit_bias must be a mapping of tokens to numbers, not None"),
        ("seed", -1, "seed must be >= 0, not -1"),
        ("seed", 1.5, "seed must be an integer >= 0, not 1.5"),
        ("max_new_tokens", 0, "max_new_tokens must be >= 1, not 0"),
        ("max_new_tokens", None, "max_new_tokens must be an integer >= 1, not None"),
        ("n", 0, "n must be in [1, 4096], not 0"),
        ("n", 10**12, "n must be in [1, 4096], not 1000000000000"),
        ("logprobs", 101, "logprobs must be in [0, 100], not 101"),
        ("ignore_eos", 1, "ignore_eos must be true or false, not 1"),
        ("json_schema", {"type": "object"}, "json_schema must be a string, not {'type': 'object'}"),
        ("regex", b"a", "regex must be a string, not b'a'"),
        ("stop", 3, "stop must be a list of strings, not 3"),
        ("stop", ["a", 3], "stop must be a list of strings, not ['a', 3]"),
        ("stop", ["a", ""], "stop contains an empty string, which would match everywhere"),
        ("stop", "", "stop contains an empty string, which would match everywhere"),
    ],
)
def test_a_value_out_of_range_or_of_another_type_is_refused(
    name: str, value: Any, message: str
) -> None:
    with pytest.raises(OptionError) as caught:
        GenerationOptions(**{name: value})
    assert str(caught.value) == message


def test_an_option_error_is_one_that_the_user_can_mend() -> None:
    assert issubclass(OptionError, MinllamaError)


def test_two_constraints_on_one_text_are_refused() -> None:
    with pytest.raises(OptionError, match="json_schema and regex exclude each other"):
        GenerationOptions(json_schema="{}", regex="a")


def test_whole_numbers_become_floats_and_lists_become_tuples() -> None:
    options = GenerationOptions(temperature=1, stop=["a", "b"])  # type: ignore[arg-type]
    assert type(options.temperature) is float
    assert options.stop == ("a", "b")
    assert GenerationOptions(stop="one").stop == ("one",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given",
    [
        {7: 1, "3": -2, "==": 0.5},
        {"==": 0.5, "3": -2, 7: 1},
        [("==", 0.5), (7, 1), (3, -2)],
        ("7=1", "===0.5", "3=-2"),
        {np.int64(7): np.float32(1), 3: np.int32(-2), "==": np.float64(0.5)},
        ((3, -2.0), (7, 1.0), ("==", 0.5)),
    ],
)
def test_biases_are_sorted_pairs_however_they_were_given(given: Any) -> None:
    options = GenerationOptions(logit_bias=given)
    assert options.logit_bias == ((3, -2.0), (7, 1.0), ("==", 0.5))
    assert all(type(value) is float for _, value in options.logit_bias)
    assert hash(options) == hash(dataclasses.replace(options))


@pytest.mark.parametrize(
    "option", [{"frequency_penalty": 1}, {"presence_penalty": -1}, {"logit_bias": {1: 1}}]
)
def test_draft_tokens_are_for_the_logits_as_they_are(option: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"omit {next(iter(option))}"):
        GenerationOptions(prompt_lookup=3, **option)


def test_options_cannot_be_changed_once_they_are_checked() -> None:
    options = GenerationOptions()
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.top_k = -1  # type: ignore[misc]
    with pytest.raises(OptionError, match="top_k must be >= 0, not -1"):
        dataclasses.replace(options, top_k=-1)


@pytest.mark.parametrize("field", dataclasses.fields(GenerationOptions), ids=lambda f: f.name)
def test_every_option_says_what_it_means(field: "dataclasses.Field[Any]") -> None:
    assert field.metadata["meaning"]
    assert "\n" not in field.metadata["meaning"]


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "text"),
    [
        (Range(0), (0, 1e300), (-1e-300,), ">= 0"),
        (Range(0, low_open=True), (1e-300,), (0, -1), "> 0"),
        (Range(0, 1), (0, 0.5, 1), (-0.1, 1.1), "in [0, 1]"),
        (Range(-1, 1, low_open=True), (-0.9, 1), (-1, 1.1), "in (-1, 1]"),
        (Range(0, 1, high_open=True), (0, 0.99), (-0.1, 1), "in [0, 1)"),
    ],
)
def test_a_range_holds_its_ends_unless_open_and_says_so(
    interval: Range, inside: tuple[float, ...], outside: tuple[float, ...], text: str
) -> None:
    assert all(value in interval for value in inside)
    assert not any(value in interval for value in (*outside, math.nan))
    assert str(interval) == text


def test_options_of_ones_own_are_checked_alike() -> None:
    @dataclass(frozen=True)
    class Mine(CheckedOptions):
        rate: float = option(0.5, "how fast", within=Range(0, 1))
        name: str = option("x", "what it is called")

    assert Mine(rate=1).rate == 1.0
    with pytest.raises(OptionError, match=r"rate must be in \[0, 1\], not 2\.0"):
        Mine(rate=2)
    with pytest.raises(OptionError, match="name must be a string, not 1"):
        Mine(name=1)  # type: ignore[arg-type]


def test_a_word_outside_the_choices_is_refused() -> None:
    @dataclass(frozen=True)
    class Options(CheckedOptions):
        pooling: str = option("last", "which state stands for a text", choices=("last", "mean"))
        other: str | None = option(None, "or none", choices=("a", "b"))

    assert Options(pooling="mean").pooling == "mean"
    with pytest.raises(OptionError, match=r"^pooling must be one of last, mean, not 'max'$"):
        Options(pooling="max")
    with pytest.raises(OptionError, match=r"^other must be one of a, b, not 'c'$"):
        Options(other="c")
