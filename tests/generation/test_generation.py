"""Text in, text out: stop strings, streams, samples, ends; on a tiny model with real words."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from minllama.errors import ContextError, MinllamaError, OptionError
from minllama.generation.api import TextStream, encode_prompt, generate, spelled_special, stream
from minllama.generation.decode import Decoder
from minllama.model.kv_cache import KVCache
from minllama.options import GenerationOptions
from minllama.tokenizer.tokenizer import Tokenizer
from minllama.tokenizer.vocabulary import Vocabulary
from tests.tiny import our_model

ALPHABET = "abcdefghijklmnopqrstuvwxyz .,éß日本"


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE without merges: every token is one byte, so characters are split."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<eos>", "<pad>"])
    data = library.to_str().encode()
    return Tokenizer(Vocabulary("tokenizers", data, "test", eos_id=256, pad_id=257))


@pytest.fixture(scope="module")
def model():
    return our_model(vocab_size=258, max_seq_len=256)


def test_text_is_the_decoded_tokens_and_streamed_equals_whole(model, tokenizer):
    options = GenerationOptions(max_new_tokens=80, temperature=1.5, seed=2, ignore_eos=True)
    pieces = list(stream(model, tokenizer, "Grüße, 日本", options))
    [result] = generate(model, tokenizer, "Grüße, 日本", options)
    assert "".join(piece.text for piece in pieces) == result.text
    assert result.text == tokenizer.decode(result.token_ids, continuation=True)
    assert len(result.token_ids) == 80
    assert result.prompt_ids == tokenizer.encode("Grüße, 日本")
    assert (pieces[-1].finish_reason, result.finish_reason) == ("length", "length")
    assert all(piece.finish_reason is None for piece in pieces[:-1])


class Scripted:
    """An engine that gives scripted tokens, whatever it reads."""

    def __init__(self, model, tokenizer, texts):
        self.config, self.device = model.config, model.device
        self.scripts = [tokenizer.encode(text, special=True) for text in texts]
        self.rows = list(range(len(texts)))

    def new_cache(self, rows, capacity):
        return KVCache(self.config, rows, capacity)

    def forward(self, ids, cache, *, attention_mask=None, logits="last"):
        new = (
            [ids.shape[1]] * len(ids) if attention_mask is None else attention_mask.sum(1).tolist()
        )
        before = list(cache.lengths)
        cache.advance(new)
        scores = torch.zeros(len(ids), 258)
        for slot in range(len(ids)):
            if before[slot] == 0:  # prompts are one token long, and of the row's own number
                cache.keys[0][slot, 0, 0, 0] = ids[slot, 0]
            row = int(cache.keys[0][slot, 0, 0, 0])
            scores[slot, self.scripts[row][cache.lengths[slot] - 1]] = 1.0
        return type("Output", (), {"logits": scores})


def scripted(model, tokenizer, texts, **options):
    """The results of rows that say `texts`."""
    options = GenerationOptions(**{"max_new_tokens": 200, **options})
    script = Scripted(model, tokenizer, texts)
    text_stream = TextStream(script, tokenizer, [[row] for row in range(len(texts))], options)
    pieces = [""] * len(texts)
    for piece in text_stream:
        pieces[piece.row] += piece.text
    assert pieces == [result.text for result in text_stream.results]
    return text_stream.results


def test_an_end_token_stops_and_is_not_text(model, tokenizer):
    [result] = scripted(model, tokenizer, ["The end.<eos>"])
    assert (result.text, result.finish_reason) == ("The end.", "stop")
    assert result.token_ids == tokenizer.encode("The end.")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three<eos>", ("two",), "one "),
        ("one two three<eos>", ("three", "wo"), "one t"),
        ("aab aaab<eos>", ("aaab",), "aab "),
        ("x\n\ny<eos>", ("\n\n",), "x"),
        ("日本語 text<eos>", ("本",), "日"),
        ("end en<eos>", ("ending",), "end en"),
        ("stop<eos>", ("stop",), ""),
    ],
)
def test_stop_strings_end_the_text_before_them(text, stop, expected, model, tokenizer):
    [result] = scripted(model, tokenizer, [text], stop=stop)
    assert result.text == expected
    assert result.finish_reason == "stop"


def test_text_that_may_begin_a_stop_string_is_held_back(model, tokenizer):
    options = GenerationOptions(max_new_tokens=50, stop=("END",))
    script = Scripted(model, tokenizer, ["aENxEND<eos>"])
    texts = [piece.text for piece in TextStream(script, tokenizer, [[0]], options)]
    assert texts == ["a", "", "", "ENx", "", "", ""]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("ab<pad>cd<eos>", ("<pad>",), ("ab", "ab")),  # as a whole it is a stop token
        ("ab<pad>cd<eos>", ("b<pad>",), ("a", "ab<pad>")),
        ("a\n<pad>b<eos>", ("\n<pad>",), ("a", "a\n<pad>")),
        ("ab<pad>cd<eos>", ("<pad>c",), ("ab", "ab<pad>c")),
        ("a<pad>b<pad>c<eos>", ("<pad>c",), ("ab", "a<pad>b<pad>c")),
        ("<pad><pad>c<eos>", ("<pad><pad>",), ("", "<pad><pad>")),
        ("ab<pad>cd<eos>", ("bc",), ("a", "ab<pad>c")),  # what is shown holds it
        ("ab<pad>cd<eos>", ("<pad>x", "pad", "b<p", "ad>c"), ("abcd", "ab<pad>cd")),
        ("a\n<eos>", ("\n<eos>",), ("a", "a\n")),
        ("a\n<eos>", ("\n<pad>",), ("a\n", "a\n")),
    ],
)
def test_a_stop_string_may_hold_special_tokens(text, stop, expected, model, tokenizer):
    [result] = scripted(model, tokenizer, [text], stop=stop)
    assert (result.text, result.finish_reason) == (expected[0], "stop")
    assert result.token_ids == tokenizer.encode(expected[1], special=True)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("ab<pad>cd<eos>", (), "ab<pad>cd"),
        ("ab<pad>cd<eos>", ("<pad>",), "ab"),
        ("ab<pad>cd<eos>", ("d>c",), "ab<pa"),
        ("ab<pad>cd<eos>", ("bc",), "ab<pad>cd"),
        ("ab<pad>c\n<eos>", ("\n<eos>",), "ab<pad>c"),
        ("ab<pad>c\n<eos>", ("\nx",), "ab<pad>c\n"),
    ],
)
def test_special_tokens_are_shown_when_asked_for(text, stop, expected, model, tokenizer):
    [result] = scripted(model, tokenizer, [text], stop=stop, skip_special_tokens=False)
    assert (result.text, result.finish_reason) == (expected, "stop")


def test_a_special_token_within_a_character_leaves_it_whole_unless_it_is_shown(model, tokenizer):
    script = Scripted(model, tokenizer, ["é<eos>"])
    script.scripts[0].insert(1, tokenizer.special_tokens["<pad>"])
    for skip, expected in ((True, "é"), (False, "\ufffd<pad>\ufffd")):
        options = GenerationOptions(max_new_tokens=9, skip_special_tokens=skip, stop=("x",))
        text_stream = TextStream(script, tokenizer, [[0]], options)
        assert "".join(piece.text for piece in text_stream) == expected
        ids = text_stream.results[0].token_ids
        assert expected == tokenizer.decode(ids, skip_special=skip, continuation=True)


@pytest.mark.parametrize("token", [99, "99", "<pad>", "c", ["z", "c"], [257], (1, "<pad>")])
def test_stop_tokens_by_id_or_text_end_whatever_else_does(token, model, tokenizer):
    token_id = tokenizer.encode("c")[0]
    token = token_id if token == 99 else str(token_id) if token == "99" else token
    for options in ({}, {"ignore_eos": True}):
        [result] = scripted(
            model, tokenizer, ["ab" + ("<pad>c" if "pad" in str(token) or token == [257] else "c")],
            stop_token_ids=token, logprobs=0, **options,
        )  # fmt: skip
        assert (result.text, result.finish_reason) == ("ab", "stop")
        assert result.token_ids == tokenizer.encode("ab")
        assert [token.bytes for token in result.logprobs] == [b"a", b"b"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([258], "holds 258, and the tokenizer knows 0 to 257"),
        (["<none>"], "'<none>' is not one token of this vocabulary"),
        (["ab"], "'ab' is not one token"),
        ([-1], "contains -1, but token ids are >= 0"),
        ([True], "contains True, which is not a token"),
        ([""], "contains '', which is not a token"),
        ([1.5], "must be a list of token ids or token texts"),
        (b"a", "must be a list of token ids"),
        ({"a": 1}, "must be a list of token ids"),
    ],
)
def test_what_is_no_stop_token_is_refused_in_one_line(tokens, message, model, tokenizer):
    with pytest.raises(OptionError, match=message) as caught:
        generate(model, tokenizer, "a", stop_token_ids=tokens)
    assert "\n" not in str(caught.value)


def test_stops_hold_in_batches_samples_lookup_and_constraints(model, tokenizer):
    texts = ["ab<pad>c<eos>", "a<eos>", "no pad", "<pad>"]
    results = scripted(model, tokenizer, texts, stop=("<pad>", "o p"), n=1)
    assert [r.text for r in results] == ["ab", "a", "n", ""]
    script = Scripted(model, tokenizer, ["xy<pad>c<eos>"])
    options = GenerationOptions(n=3, temperature=1e-3, seed=1, stop=("y<pad>",))
    stream_ = TextStream(script, tokenizer, [[0]], options)
    assert {piece.row for piece in stream_} == {0, 1, 2}
    assert [(r.text, r.finish_reason) for r in stream_.results] == [("x", "stop")] * 3
    pytest.importorskip("llguidance")
    [result] = generate(model, tokenizer, "a", regex="[a-z]{200}", max_new_tokens=200)
    stop = result.text[9:11]
    [cut] = generate(model, tokenizer, "a", regex="[a-z]{200}", max_new_tokens=200, stop=stop)
    assert (cut.text, cut.finish_reason) == (result.text.split(stop)[0], "stop")


def cycling_model(tokenizer, text):
    """A model that says the tokens of `text` again and again: each foretells the next alone."""
    ids = tokenizer.encode(text, special=True)
    assert len(set(ids)) == len(ids)
    model = our_model(vocab_size=258, max_seq_len=256)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        for place, token_id in enumerate(ids):
            model.tok_embeddings.weight[token_id, place] = 1.0
            model.output.weight[ids[(place + 1) % len(ids)], place] = 1.0
    return model


@pytest.mark.parametrize("lookup", [0, 7])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ({"stop": "<pad>"}, ("bc", "bc")),
        ({"stop": "c<pad>"}, ("b", "bc<pad>")),
        ({"stop_token_ids": "c"}, ("b", "b")),
        ({}, ("bcabcabc", "bc<pad>abc<pad>abc")),
    ],
)
def test_prompt_lookup_ends_where_decoding_without_it_does(lookup, stop, expected, tokenizer):
    model = cycling_model(tokenizer, "abc<pad>")
    prompt = tokenizer.encode("abc<pad>abc<pad>a", special=True)
    [result] = generate(model, tokenizer, prompt, max_new_tokens=10, prompt_lookup=lookup, **stop)
    assert (result.text, result.finish_reason) == (expected[0], "stop" if stop else "length")
    assert result.token_ids == tokenizer.encode(expected[1], special=True)


def test_half_a_character_at_the_end_becomes_one_replacement(model, tokenizer):
    [result] = scripted(model, tokenizer, ["a日<eos>"], max_new_tokens=3)
    assert result.text == "a�"
    assert result.finish_reason == "length"


def test_each_row_of_a_batch_stops_by_itself(model, tokenizer):
    texts = ["a. b<eos>", "no stop here<eos>", "<eos>", "x. y. z<eos>"]
    results = scripted(model, tokenizer, texts, stop=(".",))
    assert [r.text for r in results] == ["a", "no stop here", "", "x"]
    assert [r.finish_reason for r in results] == ["stop"] * 4


def test_a_batch_equals_each_prompt_alone(model, tokenizer):
    prompts = ["a", "Once upon a time", "日本", "the quick brown fox"]
    together = generate(model, tokenizer, prompts, max_new_tokens=30, repetition_penalty=1.3)
    for prompt, result in zip(prompts, together, strict=True):
        alone = generate(model, tokenizer, prompt, max_new_tokens=30, repetition_penalty=1.3)
        assert alone == [result]


def test_samples_come_in_the_order_of_their_prompts(model, tokenizer):
    results = generate(model, tokenizer, ["one", "two"], n=3, temperature=1.0, seed=1)
    assert [tokenizer.decode(r.prompt_ids) for r in results] == ["one"] * 3 + ["two"] * 3
    assert len({r.text for r in results}) == 6


def test_logprobs_stand_beside_their_tokens(model, tokenizer):
    [result] = generate(model, tokenizer, "abc", max_new_tokens=6, logprobs=2)
    assert [token.id for token in result.logprobs] == result.token_ids
    assert all(len(token.alternatives) == 2 for token in result.logprobs)
    assert all(t.alternatives[0] == (t.id, t.logprob) for t in result.logprobs)  # greedy
    assert generate(model, tokenizer, "abc", max_new_tokens=2)[0].logprobs is None


def test_token_ids_are_prompts_too(model, tokenizer):
    ids = tokenizer.encode("abc")
    assert generate(model, tokenizer, ids, max_new_tokens=5) == generate(
        model, tokenizer, "abc", max_new_tokens=5
    )
    assert len(generate(model, tokenizer, [ids, "de"], max_new_tokens=5)) == 2


def test_what_cannot_work_is_refused_before_any_work(model, tokenizer, monkeypatch):
    monkeypatch.setattr(Decoder, "__iter__", None)
    with pytest.raises(MinllamaError, match="the prompt is empty"):
        generate(model, tokenizer, "")
    with pytest.raises(MinllamaError, match="300 tokens and the model's context is 256"):
        generate(model, tokenizer, "a" * 300)
    with pytest.raises(OptionError, match="unknown option max_tokens; known are"):
        generate(model, tokenizer, "a", max_tokens=3)
    with pytest.raises(OptionError, match="exclude each other"):
        generate(model, tokenizer, "a", regex="a", json_schema="{}")


@pytest.mark.parametrize(
    "prompts",
    [
        *(5, None, {"a": 1}, {1, 2}, [1.5], [float("nan")], ["a", 3], [3, "a"], [[["a"]]], [["1"]]),
        *(b"abc", bytearray(b"abc"), memoryview(b"abc"), [b"abc"], ["a", b"b"], [bytearray(b"a")]),
        *([True, False], [[True]], [1, True], [[1, 2], [3, False]], [[[1, 2]]], [None], [[1.0]]),
        *(np.array([1.0, 2.0]), np.array([True]), [np.float32(1)], [np.bool_(True)], np.array(3)),
        *(torch.tensor([1.5]), torch.tensor([True]), torch.zeros(1, 1, 1, dtype=torch.long)),
        *([{"role": "user", "content": "a"}], iter([1, 2]), Path("prompt.txt")),
    ],
    ids=lambda prompts: type(prompts).__name__,
)
def test_what_is_no_prompt_is_refused_in_one_line(prompts, model, tokenizer):
    with pytest.raises(MinllamaError, match=r"a text(, token ids)? or a list of") as caught:
        generate(model, tokenizer, prompts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there is no prompt; give a text, or at least one token id"),
        ((), "there is no prompt"),
        (np.array([], dtype=int), "there is no prompt"),
        ([[]], "the prompt is empty"),
        (["a", ""], "prompt 2 of 2 is empty"),
        ([3, 258], "holds the token id 258, and the model knows 0 to 257"),
        ([[1], [-1]], "prompt 2 of 2 holds the token id -1"),
        ([10**30], "holds the token id 1000"),
        (b"a", r"decode bytes first: prompt.decode\(\)"),
    ],
)
def test_empty_prompts_and_ids_of_no_token_are_refused(prompts, message, model, tokenizer):
    with pytest.raises(MinllamaError, match=message):
        generate(model, tokenizer, prompts)


@pytest.mark.parametrize(
    "ids", [b"abc", [[1, 2]], "abc", torch.tensor([1]), torch.tensor([[True]]), torch.ones(1, 1)]
)
def test_a_models_own_generate_takes_a_tensor_of_ids_and_nothing_else(ids, model):
    with pytest.raises(MinllamaError, match="ids must be "):
        model.generate(ids, max_new_tokens=1)


def test_bytes_of_logprobs_joined_are_the_text(model, tokenizer):
    [result] = scripted(model, tokenizer, ["Grüße, 日本<eos>"], logprobs=1)
    joined = b"".join(token.bytes for token in result.logprobs)
    assert joined.decode() == result.text == "Grüße, 日本"
    assert "\ufffd" in {token.text for token in result.logprobs}


def test_special_tokens_in_a_prompt_are_tokens_on_request(model, tokenizer):
    options = {"max_new_tokens": 1}
    assert generate(model, tokenizer, "a<pad>b", special=True, **options)[0].prompt_ids == [
        *tokenizer.encode("a"), 257, *tokenizer.encode("b"),
    ]  # fmt: skip
    [plain] = generate(model, tokenizer, "a<pad>b", **options)
    assert len(plain.prompt_ids) == len("a<pad>b")
    assert spelled_special("x<pad><eos><pad>", tokenizer) == ["<pad>", "<eos>"]
    assert spelled_special("<p ad>", tokenizer) == []


def test_a_prompt_that_spells_bos_has_one(tokenizer):
    begun = Tokenizer(dataclasses.replace(tokenizer.vocabulary, bos_id=257, add_bos=True))
    a = begun.encode("a", bos=False)
    for special, text, expected in (
        (True, "<pad>a", [257, *a]),
        (True, "a", [257, *a]),
        (False, "a", [257, *a]),
        (False, "<pad>a", [257, *begun.encode("<pad>", bos=False), *a]),
        (True, "<pad><pad>a", [257, 257, *a]),  # as it was written
    ):
        assert encode_prompt(text, begun, 256, special=special) == expected


def test_megabytes_are_refused_before_they_are_taken_apart(model, tokenizer, monkeypatch):
    context_len = model.config.context_len
    longest = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
    with pytest.raises(ContextError, match=f"the prompt has {context_len + 1} tokens"):
        generate(model, tokenizer, "x" * (context_len + 1))
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", None)
        with pytest.raises(ContextError, match="more than a context of 256 tokens can hold"):
            generate(model, tokenizer, "x" * (context_len * longest + 1))
    ids = encode_prompt("x" * (context_len * longest), tokenizer, context_len)
    assert ids == [tokenizer.encode("x")[0]] * (context_len * longest)


def test_a_missing_llguidance_is_named(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MinllamaError, match=r"need the library llguidance; .*\[constraint\]"):
        generate(model, tokenizer, "x", regex="a+")


def test_a_regular_expression_is_matched_in_full(model, tokenizer):
    pytest.importorskip("llguidance")
    results = generate(
        model, tokenizer, ["x", "yy"], regex=r"(ja|nein), [0-9]{3}!", temperature=3.0, n=4, seed=1
    )
    for result in results:
        word, number = result.text.removesuffix("!").split(", ")
        assert word in ("ja", "nein")
        assert len(number) == 3
        assert number.isdigit()
        assert result.finish_reason == "stop"
    assert len({r.text for r in results}) > 2


def test_a_json_schema_is_followed(model, tokenizer):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {
            "label": {"enum": ["good", "bad"]},
            "stars": {"type": "integer", "minimum": 1, "maximum": 5},
        },
        "required": ["label", "stars"],
        "additionalProperties": False,
    }
    options = {"json_schema": json.dumps(schema), "temperature": 2.0, "max_new_tokens": 200}
    for seed in range(4):
        [result] = generate(model, tokenizer, "review", seed=seed, **options)
        record = json.loads(result.text)
        assert set(record) == {"label", "stars"}
        assert record["label"] in ("good", "bad")
        assert 1 <= record["stars"] <= 5


def test_a_constraint_that_is_met_ends_the_text_even_if_end_tokens_do_not(model, tokenizer):
    pytest.importorskip("llguidance")
    [result] = generate(model, tokenizer, "a", regex="ab", ignore_eos=True)
    assert (result.text, result.finish_reason) == ("ab", "stop")


def test_a_vocabulary_padded_beyond_the_tokenizer_and_a_constraint_go_together(tokenizer):
    pytest.importorskip("llguidance")
    padded = our_model(vocab_size=320, max_seq_len=256)
    [result] = generate(padded, tokenizer, "a", regex="[a-z]{5}", temperature=5.0, seed=1)
    assert len(result.text) == 5
    [free] = generate(padded, tokenizer, "a", temperature=90.0, seed=1, ignore_eos=True)
    assert max(free.token_ids) < tokenizer.vocab_size


def test_ids_may_be_a_tensor_or_an_array(model, tokenizer):
    ids = tokenizer.encode("abc")
    expected = generate(model, tokenizer, ids, max_new_tokens=5)
    for form in (torch.tensor(ids), np.array(ids), list(np.array(ids)), list(torch.tensor(ids))):
        assert generate(model, tokenizer, form, max_new_tokens=5) == expected
    texts = np.array(["abc", "abc"])
    assert generate(model, tokenizer, texts, max_new_tokens=5) == expected * 2
    assert generate(model, tokenizer, torch.tensor([ids, ids]), max_new_tokens=5) == expected * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "("}, "regex cannot be followed"),
        ({"json_schema": "{"}, "json_schema is not JSON"),
        ({"json_schema": '{"type": "nothing"}'}, "json_schema cannot be followed"),
        ({"json_schema": '{"not":' * 5000 + "{}" + "}" * 5000}, "json_schema is not JSON"),
        ({"json_schema": '{"const": "\udcff"}'}, "json_schema"),
        ({"json_schema": '{"$ref": "#"}'}, "no text of this vocabulary satisfies it"),
        ({"regex": r"[^\s\S]"}, "no text of this vocabulary satisfies it"),
        ({"regex": "\udcff"}, "regex holds a lone surrogate"),
        ({"regex": "(" * 20_000 + ")" * 20_000}, "regex cannot be followed"),
    ],
)
def test_a_bad_constraint_is_refused_in_one_line(options, message, model, tokenizer):
    pytest.importorskip("llguidance")
    with pytest.raises(OptionError, match=message) as caught:
        generate(model, tokenizer, "a", **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("regex", ["a{1000000}", "((a{1000}){1000}){1000}"])
def test_a_constraint_that_the_library_gives_up_on_is_an_error_and_no_early_end(
    regex, model, tokenizer, capfd
):
    pytest.importorskip("llguidance")
    with pytest.raises(OptionError, match="regex cannot be followed: lexer error: too many"):
        generate(model, tokenizer, "a", regex=regex)
    assert capfd.readouterr().err == ""


def test_any_callable_is_a_sampler(model, tokenizer):
    seen = []

    def second_best(logits, sequences):
        seen.append([len(sequence.ids) for sequence in sequences])
        return logits.topk(2).indices[:, 1]

    results = generate(model, tokenizer, ["abc", "d"], max_new_tokens=4, sampler=second_best)
    with torch.no_grad():
        for result in results:
            ids = torch.tensor([result.prompt_ids + result.token_ids])
            ranked = model(ids).logits[0, :, : tokenizer.vocab_size].argsort(-1, descending=True)
            expected = ranked[len(result.prompt_ids) - 1 : -1, 1].tolist()
            assert result.token_ids == expected
    assert len(seen[0]) == 2
    assert seen[1] == [n + 1 for n in seen[0]]
    with pytest.raises(OptionError, match="prompt_lookup is for the most likely tokens alone"):
        generate(model, tokenizer, "abc", prompt_lookup=3, sampler=second_best)
