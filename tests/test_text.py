"""What comes from outside is shown on one line, whatever is in it."""

import pickle
import sys

import pytest

from minllama.errors import CheckpointError, DataError, MinllamaError, optional_import
from minllama.text import (
    MAX_LINE_CHARS,
    cut,
    first_few,
    first_line,
    listed,
    one_line,
    printable,
    shown,
)

STEERING = {
    "escape sequence": "\x1b]0;owned\x07\x1b[31mred",
    "C1 control": "\x9b31m",
    "line breaks": "a\nb\r\nc\x0bd\x85e\u2028f\u2029g",
    "bidirectional override": "\u202egnp.exe\u2066\u2069",
    "lone surrogate": "file\udcff.bin",
    "null": "a\0b",
    "tag characters": "\U000e0041",
    "private use": "\ue000",
}


@pytest.mark.parametrize("text", STEERING.values(), ids=STEERING)
def test_nothing_in_a_message_steers_the_terminal(text: str) -> None:
    for text_shown in (printable(text), one_line(text), str(MinllamaError(f"{text}: is damaged"))):
        assert text_shown.isprintable()
        assert len(text_shown.splitlines()) == 1
        text_shown.encode()


def test_text_that_people_read_stays_as_it_is() -> None:
    for text in ("/tmp/a  b/c.gguf", "naïve 中文 हिन्दी 👩\u200d🚀", "क्\u200dष", ""):
        assert printable(text) == text
        assert str(CheckpointError(text)) == text


def test_white_space_becomes_spaces() -> None:
    assert one_line("a\tb\nc\u00a0d") == "a b c d"


def test_of_a_long_message_both_ends_stay() -> None:
    message = str(MinllamaError(f"begin {'x' * 10**6} end"))
    assert len(message) == MAX_LINE_CHARS
    assert message.startswith("begin xxx")
    assert message.endswith("xxx end")
    assert " ... " in message


def test_an_error_survives_another_process() -> None:
    error = pickle.loads(pickle.dumps(CheckpointError("a\nb")))
    assert (type(error), str(error)) == (CheckpointError, "a b")


@pytest.mark.parametrize(
    ("module", "library"),
    [
        ("sklearn.linear_model", "scikit-learn"),
        ("scipy.optimize", "scikit-learn"),
        ("torch.utils.tensorboard", "tensorboard"),
        ("pyarrow", "pyarrow"),
    ],
)
def test_a_missing_library_is_named_with_its_installation(
    monkeypatch: pytest.MonkeyPatch, module: str, library: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError) as caught:
        optional_import(module, "reports need", extra="some", kind=DataError)
    assert str(caught.value) == (
        f"reports need the library {library}; install it with: "
        "python -m pip install 'minllama[some]'"
    )


def test_a_library_that_is_there_is_imported() -> None:
    assert optional_import("json.decoder", "reports need").JSONDecodeError is not None


def test_lists_in_messages_are_short() -> None:
    assert first_few("abc", 3) == "a, b, c"
    assert first_few("abcde", 3) == "a, b, c and 2 more"
    assert first_few("abcde", 3, "; ") == "a; b; c; and 2 more"
    assert first_few([]) == ""
    assert listed(["a", "it's"]) == """'a', "it's\""""


def test_values_in_messages_are_short() -> None:
    assert (cut("abcdef", 6), cut("abcdefg", 6)) == ("abcdef", "abc...")
    assert shown("a\nb") == r"'a\nb'"
    assert shown("a" * 1000) == f"'{'a' * 56}..."
    assert first_line(ValueError("one.\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
