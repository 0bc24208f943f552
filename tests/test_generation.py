"""Text in, text out: stop strings, streams, samples, ends; on a tiny model with real words."""

import json

import pytest
import torch

from minllama.decoding import Decoder
from minllama.errors import ContextError, MinllamaError, OptionError
from minllama.generation import TextStream, encode_prompt, generate, stream
from minllama.options import GenerationOptions
from minllama.tokenizer import Tokenizer
from minllama.vocabulary import Vocabulary
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
    """A model that says what it is told to, whatever it reads."""

    def __init__(self, model, tokenizer, texts):
        self.config, self.device = model.config, model.device
        self.cache_dtype = model.dtype
        self.scripts = [tokenizer.encode(text, special=True) for text in texts]
        self.rows = list(range(len(texts)))

    def __call__(self, ids, *, attention_mask=None, cache=None, logits="last"):
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
    with pytest.raises(OptionError, match="cannot both constrain"):
        generate(model, tokenizer, "a", regex="a", json_schema="{}")


@pytest.mark.parametrize(
    "prompts", [5, None, {"a": 1}, [1.5], [float("nan")], ["a", 3], [3, "a"], [[["a"]]], [["1"]]]
)
def test_what_is_no_prompt_is_refused_in_one_line(prompts, model, tokenizer):
    with pytest.raises(MinllamaError, match=r"a text(, token ids)? or a list of") as caught:
        generate(model, tokenizer, prompts)
    assert "\n" not in str(caught.value)


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
    assert generate(model, tokenizer, torch.tensor(ids), max_new_tokens=5) == expected
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
