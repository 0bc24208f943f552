"""Check the fields of a `classifier.json` before anything is built from it.

A file with a correct digest of itself may still contain anything. Unknown fields are ignored, so
that later versions can add some.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from minllama.options import POOLINGS, QUANTIZE, SCORES
from minllama.text import cut

# What it must be, in words, and whether a value is that.
Rule = tuple[str, Callable[[Any], bool]]

LARGEST = 1e30  # of a number, so that arithmetic with it stays finite


def check(content: Mapping[str, Any]) -> None:
    """Hold the content of a classifier.json against the rules.

    Raises:
        KeyError: a field is missing.
        ValueError: it is of another type, or out of range; the message names it.
    """
    _check_fields(content, _FIELDS)
    if content["kind"] == "zero-shot":
        _check_fields(content, _ZERO_SHOT)
    elif content["kind"] == "experts":
        _check_fields(content, _EXPERTS)
        if content["multi_label"]:
            raise ValueError("multi_label must be false, for experts choose one label")
    else:
        _check_fields(content, _EMBEDDING)
    there = {name: rule for name, rule in _OPTIONAL.items() if content.get(name) is not None}
    _check_fields(content, there)
    if content.get("base_choices") and content["weights"] != "adapter":
        raise ValueError("base_choices are for heads beside an adapter, and there is none")
    if "scale" in there:
        _check_fields(content["scale"], _SCALE, "scale.")
    base = content["base"]
    _check_fields(base, _BASE, "base.")
    _check_fields(base["identity"], _IDENTITY, "base.identity.")
    if base.get("quantize") not in (None, *QUANTIZE):
        raise ValueError(f"base.quantize must be one of {', '.join(QUANTIZE)}")


def _check_fields(content: Mapping[str, Any], rules: Mapping[str, Rule], prefix: str = "") -> None:
    for name, (words, holds) in rules.items():
        if not holds(content[name]):
            shown = repr(content[name])
            shown = cut(shown)
            raise ValueError(f"{prefix}{name} must be {words}, not {shown}")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= LARGEST  # which NaN is not


def _is_float(value: Any) -> bool:
    """A number up to what targets may be (`minllama.data.numbers.LARGEST`)."""
    return type(value) in (int, float) and abs(value) <= 1e100


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_place(value: Any) -> bool:
    return value is None or (_is_text(value) and value != "" and "\0" not in value)


def _within(least: float, most: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: _is_number(value) and least <= value <= most


def _one_of(*values: Any) -> Rule:
    words = ", ".join(map(str, values))
    return f"one of {words}", lambda value: _is_text(value) and value in values


_FLAG: Rule = ("true or false", lambda value: isinstance(value, bool))
_TEXT: Rule = ("text", _is_text)
_TEXTS: Rule = ("a list of texts", _is_texts)
_OBJECT: Rule = ("an object", _is_object)
_PLACE: Rule = ("a path, a name or null", _is_place)
_FIELDS: dict[str, Rule] = {
    "base": _OBJECT,
    "weights": _one_of("base", "adapter", "full"),
    "kind": _one_of("zero-shot", "embedding", "experts"),
    "labels": ("a list of names", lambda value: _is_texts(value) and bool(value)),
    "multi_label": _FLAG,
    "temperature": ("above 0", lambda value: _is_number(value) and value > 0),
    "prompt": _OBJECT,
    "causal": _FLAG,
    "sha256": (
        "an object of digests",
        lambda value: _is_object(value) and all(map(_is_text, value.values())),
    ),
}
_BASE: dict[str, Rule] = {
    "model": _PLACE,
    "tokenizer": _PLACE,
    "dtype": _one_of("float32", "bfloat16", "float16", "float64"),
    "identity": _OBJECT,
}
_IDENTITY: dict[str, Rule] = {
    "weights": _TEXT,
    "config": _OBJECT,
    "tokenizer": ("text or null", lambda value: value is None or _is_text(value)),
}
_ZERO_SHOT: dict[str, Rule] = {
    "label_words": _TEXTS,
    "score": _one_of(*SCORES),
    "prior_strength": ("a number from 0 to 2", _within(0, 2)),
    "shots": (
        "a list of pairs of texts",
        lambda value: (
            isinstance(value, list) and all(_is_texts(shot) and len(shot) == 2 for shot in value)
        ),
    ),
    "prior": (
        "a list of numbers or null",
        lambda value: value is None or (isinstance(value, list) and all(map(_is_number, value))),
    ),
}
_EMBEDDING: dict[str, Rule] = {
    "pooling": _one_of(*POOLINGS),
    "layer": ("an integer", lambda value: type(value) is int and 0 < value < 2**31),
    "dropout": ("a number from 0 to 1", _within(0, 1)),
}
_CHOICES: Rule = (
    "a list of pairs of a number of layers and a pooling",
    lambda value: (
        isinstance(value, list)
        and all(isinstance(choice, list) and len(choice) == 2 for choice in value)
        and all(
            type(layer) is int and 0 < layer < 2**31 and pooling in POOLINGS
            for layer, pooling in value
        )
    ),
)
_EXPERTS: dict[str, Rule] = {"choices": _CHOICES, "tfidf": _FLAG}
_OPTIONAL: dict[str, Rule] = {
    "base_choices": _CHOICES,
    "thresholds": _OBJECT,  # of which `minllama.evaluation.thresholds.read` knows more
    "scale": _OBJECT,
    "pad_id": ("an integer", lambda value: type(value) is int and abs(value) < 2**31),
    "tokenizer_eos": _FLAG,
}
_SCALE: dict[str, Rule] = {
    "mean": ("a number", _is_float),
    "std": ("above 0", lambda value: _is_float(value) and value > 0),
}
