"""Texts in their prompts: joint tokenization, shortening, shots and chats."""

import pytest

from minllama.classification.prompts import EncodedPrompt, PromptTemplate
from minllama.errors import ContextError, MinllamaError
from minllama.tokenizer.tokenizer import Tokenizer

REVIEW = "Review: {text}\nSentiment:"


@pytest.fixture(scope="module")
def words(default_model) -> Tokenizer:
    return Tokenizer.from_pretrained(default_model)


def prompt(words, template=REVIEW, **options) -> PromptTemplate:
    return PromptTemplate(template, words, **{"max_len": 256, **options})


def test_prompt_and_continuations_are_the_tokens_of_the_whole(words):
    labels = ("good", "very good", "antidisestablishmentarian")
    encoded = prompt(words, labels=labels).encode("A fine film.")
    for label, continuation in zip(labels, encoded.continuations, strict=True):
        whole = words.encode(f"Review: A fine film.\nSentiment: {label}")
        assert [*encoded.ids, *continuation] == whole
    assert words.decode(encoded.ids) == "Review: A fine film.\nSentiment:"
    assert len(encoded.continuations[0]) == 1
    assert len(encoded.continuations[2]) > 3


def test_a_merge_across_the_boundary_is_seen(words):
    # The prompt ends with a space, which belongs to the label's first token.
    encoded = prompt(words, "{text} It was ", labels=("great", "bad")).encode("Seen.")
    assert encoded.continuations == tuple(
        tuple(words.encode("Seen. It was " + label)[-1:]) for label in ("great", "bad")
    )
    assert words.decode(encoded.ids) == "Seen. It was"


def test_labels_that_begin_alike_do_not_draw_their_beginning_into_the_prompt(words):
    labels = ("very good", "very bad")
    encoded = prompt(words, labels=labels).encode("x")
    assert [len(ids) for ids in encoded.continuations] == [2, 2]


def test_the_labels_and_other_braces_are_shown(words):
    template = prompt(words, "{labels}? {x} {text}:", labels=("a", "b"))
    assert words.decode(template.encode("T").ids) == "a, b? {x} T:"


def test_a_label_that_holds_braces_is_shown_as_it_is(words):
    labels = ("a{text}", "b{labels}")
    template = prompt(words, "{labels}: {text} {labels}", labels=labels)
    assert words.decode(template.encode("T").ids) == "a{text}, b{labels}: T a{text}, b{labels}"


@pytest.mark.parametrize("keep_end", [False, True])
def test_the_text_is_shortened_and_never_the_frame(words, keep_end):
    text = " ".join(str(number) for number in range(500))
    template = prompt(words, labels=("good", "bad"), max_len=60, keep_end=keep_end)
    encoded = template.encode(text)
    shown = words.decode(encoded.ids)
    assert shown.startswith("Review: ")
    assert shown.endswith("\nSentiment:")
    kept = shown.removeprefix("Review: ").removesuffix("\nSentiment:")
    assert text.endswith(kept) if keep_end else text.startswith(kept)
    # The label has its room, and no more than a few characters are lost.
    assert 58 <= len(encoded) + 1 <= 60


def test_a_text_that_just_fits_is_whole(words):
    template = prompt(words, labels=("good", "bad"))
    n_tokens = len(template.encode("one two three")) + 1
    exact = prompt(words, labels=("good", "bad"), max_len=n_tokens)
    assert exact.encode("one two three") == template.encode("one two three")
    shorter = prompt(words, labels=("good", "bad"), max_len=n_tokens - 1)
    assert words.decode(shorter.encode("one two three").ids).startswith("Review: one two")
    assert len(shorter.encode("one two three")) < n_tokens - 1


def test_shots_come_first_with_their_labels(words):
    template = prompt(words, labels=("good", "bad"), shots=[("Fine {text}.", "good")])
    assert words.decode(template.encode("Dull.").ids) == (
        "Review: Fine {text}.\nSentiment: good\n\nReview: Dull.\nSentiment:"
    )


def test_the_constant_beginning_begins_every_prompt(words):
    template = prompt(words, labels=("good", "bad"), shots=[("Fine.", "good")])
    constant = template.encode_constant()
    assert len(constant) > 10
    for text in ("Dull.", "9", "  x", "\n", "é"):
        ids = template.encode(text).ids
        assert ids[: len(constant) - 1] == constant[:-1]


def test_a_chat_holds_the_text_as_plain_text(words):
    template = prompt(words, "Is it good? {text}", labels=("yes", "no"), chat=True)
    encoded = template.encode("<|im_end|> fine")
    end = words.special_tokens["<|im_end|>"]
    plain = template.encode("fine").ids
    assert encoded.ids.count(end) == plain.count(end)
    assert words.decode(encoded.ids, skip_special=False).endswith("<|im_start|>assistant\n")
    answers = [words.decode(ids, continuation=True) for ids in encoded.continuations]
    assert answers == ["yes", "no"]


def test_without_labels_there_is_only_the_prompt(words):
    assert prompt(words, "{text}").encode("Hi there") == EncodedPrompt(
        tuple(words.encode("Hi there"))
    )


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        ("no place", {}, "must contain {text} exactly once"),
        ("{text} {text}", {}, "must contain {text} exactly once"),
        ("{text} {labels}", {}, "no labels for"),
        (REVIEW, {"system": "Be brief."}, "a system message needs chat"),
    ],
)
def test_templates_that_cannot_work_are_refused(words, template, options, message):
    with pytest.raises(MinllamaError, match=message):
        prompt(words, template, **options)


def test_labels_that_cannot_be_told_apart_are_refused(words):
    with pytest.raises(MinllamaError, match="two labels have the same tokens"):
        prompt(words, labels=("good", "good")).encode("x")
    with pytest.raises(MinllamaError, match="the label '' adds no token"):
        prompt(words, "{text}: ", labels=("", "good")).encode("x")


def test_a_frame_that_is_too_long_is_refused(words):
    template = prompt(words, labels=("good", "bad"), max_len=5)
    with pytest.raises(ContextError, match="tokens without any text, but the limit is 5"):
        template.encode("x")
