"""Tokens of one sequence become pieces of text with log-probabilities, as a server sends them."""

import random

import pytest
import torch

from minllama.engine.base import Engine
from minllama.engine.scheduler import Scheduler
from minllama.engine.sequence import Token
from minllama.errors import OptionError
from minllama.generation.api import TextStream, generate, text_request
from minllama.generation.sequence_text import SequenceText, prompt_logprobs
from minllama.options import GenerationOptions
from minllama.tokenizer.sentencepiece_form import from_model
from minllama.tokenizer.tokenizer import Tokenizer
from tests.generation.test_generation import model, tokenizer  # noqa: F401  (fixtures)
from tests.tokenizer_cases import tiny_sentencepiece

TEXTS = ("", "aé日本 ENDE", "a<pad>b<eos>", "日<pad>本", "EEN", "x END")


def fed(words, ids, *, ends_by=None, stop_ids=(), **options):
    """Pieces of a sequence of these tokens, each with a log-probability."""
    text = SequenceText(words, [1], GenerationOptions(**options), stop_ids=stop_ids)
    pieces = []
    for place, token_id in enumerate(ids):
        reason = ends_by if place == len(ids) - 1 else None
        pieces.append(text.feed(Token(4, token_id, -0.5 * place, ((token_id, -1.0),), reason)))
    return text, pieces


def test_characters_are_whole_and_share_the_offset_of_their_bytes(tokenizer):  # noqa: F811
    text, pieces = fed(
        tokenizer, tokenizer.encode("aé日b"), ends_by="length", logprobs=1, max_new_tokens=9
    )
    assert [piece.text for piece in pieces] == ["a", "", "é", "", "", "日", "b"]
    assert [piece.row for piece in pieces] == [4] * 7
    assert [piece.finish_reason for piece in pieces] == [None] * 6 + ["length"]
    found = [token for piece in pieces for token in piece.logprobs]
    assert found == text.result.logprobs
    assert [token.offset for token in found] == [0, 1, 1, 2, 2, 2, 3]
    assert b"".join(token.bytes for token in found).decode() == "aé日b"
    assert [token.text for token in found] == ["a", *"\ufffd" * 5, "b"]
    assert [token.logprob for token in found] == [-0.5 * i for i in range(7)]
    assert found[0].alternatives == ((found[0].id, -1.0),)
    assert (text.result.text, text.result.finish_reason) == ("aé日b", "length")


@pytest.mark.parametrize(
    ("skip", "shown", "offsets"),
    [(True, "aéb", [0, 1, 1, 1, 2]), (False, "a\ufffd<pad>\ufffdb", [0, 1, 2, 7, 8])],
)
def test_offsets_are_in_the_text_that_is_shown(skip, shown, offsets, tokenizer):  # noqa: F811
    ids = tokenizer.encode("aéb")
    ids.insert(2, tokenizer.special_tokens["<pad>"])
    text, _ = fed(tokenizer, ids, ends_by="length", logprobs=0, skip_special_tokens=skip)
    assert text.result.text == shown
    assert [token.offset for token in text.result.logprobs] == offsets


def test_what_may_begin_a_stop_string_is_held_back_and_it_ends_the_text(tokenizer):  # noqa: F811
    text, pieces = fed(tokenizer, tokenizer.encode("aENxENDz"), stop="END", logprobs=0)
    assert [piece.text for piece in pieces] == ["a", "", "", "ENx", "", "", "", ""]
    assert [piece.finish_reason for piece in pieces] == [None] * 6 + ["stop", None]
    assert text.has_ended
    assert (text.result.text, text.result.finish_reason) == ("aENx", "stop")
    assert text.result.token_ids == tokenizer.encode("aENxEND")
    assert [token.offset for token in text.result.logprobs] == list(range(7))
    assert text.finish(4).text == ""


def test_a_sequence_that_is_ended_from_outside_gives_what_it_held_back(tokenizer):  # noqa: F811
    text, pieces = fed(tokenizer, tokenizer.encode("xEN日")[:-1], stop="END")
    assert "".join(piece.text for piece in pieces) == "x"
    assert text.finish(4) == (4, "EN\ufffd", "length", ())
    assert text.finish(4) == (4, "", None, ())
    assert text.result.text == "xEN\ufffd"
    assert text.result.logprobs is None


def test_end_tokens_and_sequences_without_a_token_are_no_text(tokenizer):  # noqa: F811
    ids = [*tokenizer.encode("ab"), 256]
    text, pieces = fed(tokenizer, ids, ends_by="stop", stop_ids={256}, logprobs=0)
    assert (text.result.text, text.result.token_ids) == ("ab", ids[:2])
    assert len(text.result.logprobs) == 2
    assert pieces[-1] == (4, "", "stop", ())
    text, pieces = fed(tokenizer, [None], ends_by="length", logprobs=0)
    assert (pieces, text.result.logprobs) == ([(4, "", "length", ())], [])


def test_pieces_joined_are_the_text_at_every_cut(tokenizer):  # noqa: F811
    draws = random.Random(5)
    for _ in range(300):
        ids = [
            token_id
            for part in draws.choices(TEXTS, k=3)
            for token_id in tokenizer.encode(part, special=True)
        ]
        ids = [i for i in ids if draws.random() < 0.9]
        skip = draws.random() < 0.5
        options = {"stop": draws.choice([(), ("END",), ("NE", "<pad>b")]), "logprobs": 0}
        text, pieces = fed(tokenizer, ids, skip_special_tokens=skip, **options)
        last = text.finish(4)
        assert "".join(piece.text for piece in (*pieces, last)) == text.result.text
        whole = tokenizer.decode(ids, skip_special=skip, continuation=True)
        assert whole.startswith(text.result.text)
        if not options["stop"]:
            assert text.result.text == whole
        offsets = [token.offset for token in text.result.logprobs]
        assert offsets == sorted(offsets)
        for token in text.result.logprobs:
            if "\ufffd" not in whole and not (skip and token.id in (256, 257)):
                whole_text = token.text if "\ufffd" not in token.text else ""
                assert whole.startswith(whole_text, token.offset)


def test_a_scheduler_with_text_requests_gives_what_generate_gives(model, tokenizer):  # noqa: F811
    options = GenerationOptions(
        max_new_tokens=30,
        temperature=1.2,
        seed=3,
        n=2,
        logprobs=2,
        stop=("e", "<pad>"),
        stop_token_ids=("q",),
        logit_bias={"z": 3},
        presence_penalty=0.5,
    )
    ids = tokenizer.encode("Hello")
    expected = generate(model, tokenizer, [ids], options)
    request = text_request(tokenizer, ids, options, model.config.vocab_size)
    scheduler = Scheduler(Engine(model))
    sequences = scheduler.add(request)
    texts = [SequenceText(tokenizer, ids, options, stop_ids=request.stop_ids) for _ in sequences]
    while scheduler.is_busy:
        for token in scheduler.step():
            texts[token.row].feed(token)
            if texts[token.row].has_ended:
                scheduler.cancel(sequences[token.row])
    for text, other in zip(texts, expected, strict=True):
        assert (text.result.text, text.result.token_ids) == (other.text, other.token_ids)
        assert text.result.finish_reason == other.finish_reason
    with pytest.raises(OptionError, match="not one token of this vocabulary"):
        text_request(tokenizer, ids, GenerationOptions(logit_bias={"ab": 1}), 258)


@pytest.mark.parametrize("prompt", ["é, 日本!", "a", "x<pad>y"])
def test_log_probabilities_of_a_prompt_are_those_of_a_full_forward_pass(
    prompt, model, tokenizer  # noqa: F811
):  # fmt: skip
    ids = tokenizer.encode(prompt, special=True)
    options = {"max_new_tokens": 3, "logprobs": 2, "n": 2, "temperature": 1.0, "ignore_eos": True}
    results = generate(model, tokenizer, [ids, ids[:1]], prompt_logprobs=True, **options)
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for result in results[:2]:
        found = result.prompt_logprobs
        assert [token.id for token in found] == result.prompt_ids == ids
        assert (found[0].logprob, found[0].alternatives) == (None, ())
        for place, token in enumerate(found[1:]):
            assert token.logprob == pytest.approx(float(scores[place, token.id]), abs=1e-4)
            values, best = scores[place].topk(2)
            assert [i for i, _ in token.alternatives] == best.tolist()
            assert [v for _, v in token.alternatives] == pytest.approx(values.tolist(), abs=1e-4)
        assert b"".join(token.bytes for token in found).decode() == prompt
        shown = prompt.replace("<pad>", "")
        assert tokenizer.decode(ids) == shown
        for token in found:
            if len(token.text.strip("\ufffd")) == 1:
                assert shown[token.offset] == token.text
    for result in results[2:]:
        assert [token.logprob for token in result.prompt_logprobs] == [None]
    assert generate(model, tokenizer, [ids], **options)[0].prompt_logprobs is None


def test_log_probabilities_of_a_prompt_need_an_option_and_no_cache(model, tokenizer):  # noqa: F811
    with pytest.raises(OptionError, match="prompt_logprobs needs logprobs"):
        GenerationOptions(prompt_logprobs=True)
    with pytest.raises(OptionError, match=r"prompt_lookup .* omit logprobs"):
        GenerationOptions(prompt_logprobs=True, logprobs=0, prompt_lookup=2)
    cache = Engine(model).new_cache(1, 9)
    with pytest.raises(OptionError, match="reads all of a prompt; omit it, or cache"):
        TextStream(
            model, tokenizer, ["ab"], GenerationOptions(prompt_logprobs=True, logprobs=0),
            cache=cache,
        )  # fmt: skip


def test_offsets_of_a_prompt_do_not_count_a_space_that_is_not_shown():
    words = Tokenizer(from_model(tiny_sentencepiece(), "tiny"))
    ids = words.encode("Once upon a time")
    text = words.decode(ids)
    assert text == "Once upon a time"
    found = prompt_logprobs(words, ids, [(-1.0, ())] * (len(ids) - 1))
    assert found[-1].offset + len(words.decode([ids[-1]], continuation=True)) == len(text)
    assert [token.offset for token in found] == [
        len(words.decode(ids[:place])) for place in range(len(ids))
    ]
