"""Claims about what the fields of a classifier.json must be that not every classifier has."""

import copy
from typing import Any

import pytest

from minllama.classification.storage import schema

CONTENT: dict[str, Any] = {
    "base": {
        "model": "org/base",
        "tokenizer": None,
        "dtype": "float32",
        "identity": {"weights": "ab", "config": {}, "tokenizer": None},
    },
    "weights": "base",
    "kind": "embedding",
    "labels": ["no", "yes"],
    "multi_label": False,
    "temperature": 1.0,
    "prompt": {},
    "causal": True,
    "sha256": {"classifier.json": "ab"},
    "pooling": "last",
    "layer": 2,
    "dropout": 0.0,
}


def with_field(name: str, value: Any) -> dict[str, Any]:
    return {**copy.deepcopy(CONTENT), name: value}


def test_fields_of_imported_classifiers_may_be_absent() -> None:
    schema.check(CONTENT)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("pad_id", value) for value in (None, 0, 1, -1, 128_004, 2**31 - 1)),
        *(("tokenizer_eos", value) for value in (None, True, False)),
    ],
)
def test_what_they_may_be(name: str, value: Any) -> None:
    schema.check(with_field(name, value))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(
            ("pad_id", value, f"pad_id must be an integer, not {value!r}")
            for value in (True, 1.0, "1", [1], {}, 2**31, -(2**31), float("nan"))
        ),
        *(
            ("tokenizer_eos", value, f"tokenizer_eos must be true or false, not {value!r}")
            for value in (0, 1, "true", [], 0.5)
        ),
    ],
)
def test_what_they_may_not_be(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        schema.check(with_field(name, value))
    assert str(error.value) == message
