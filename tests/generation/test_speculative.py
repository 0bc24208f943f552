"""Drafts from the text itself change no token, only how many come at once."""

import pytest

from minllama.errors import OptionError
from minllama.generation.api import generate
from minllama.generation.decode import Decoder
from minllama.generation.speculative import PromptLookup
from minllama.model.llama import load_pretrained
from minllama.options import GenerationOptions
from minllama.tokenizer.tokenizer import Tokenizer
from tests.tiny import our_model, random_ids


def test_the_latest_place_of_the_longest_run_is_continued():
    text = [1, 2, 3, 4, 9, 2, 3, 5, 6, 1, 2, 3]
    lookup = PromptLookup(3)
    assert lookup.draft(text, 9) == [4, 9, 2]  # 1 2 3 stood there once; 2 3 stood later
    assert lookup.draft([*text, 8], 9) == []
    assert lookup.draft([*text, 8, 2, 3], 9) == [8, 2, 3]  # now 2 3 was last followed by 8
    assert lookup.draft([*text, 8, 2, 3, 8], 2) == [2, 3]
    assert lookup.draft([*text, 8, 2, 3, 8], 0) == []


def test_short_and_new_texts_have_no_drafts():
    assert PromptLookup(4).draft([5], 4) == []
    assert PromptLookup(4).draft([5, 5], 4) == []
    assert PromptLookup(4).draft([5, 5, 5], 4) == [5]
    assert PromptLookup(4).draft([1, 2, 3, 4], 4) == []


@pytest.mark.parametrize("most", [1, 3, 8, 31])
def test_greedy_tokens_stay_the_same(most):
    model = our_model(max_seq_len=160)
    prompt = random_ids(1, 6)[0].tolist() * 4
    plain = Decoder(model, [prompt], GenerationOptions(max_new_tokens=100))
    with_drafts = Decoder(
        model, [prompt], GenerationOptions(max_new_tokens=100, prompt_lookup=most)
    )
    steps = list(with_drafts)
    tokens = [token.id for step in steps for token in step]
    assert tokens == [token.id for (token,) in plain]
    assert len(steps) < len(tokens) == 100  # a random model repeats itself soon
    assert with_drafts.timings.decode_tokens == 99


def test_a_text_ends_where_it_would_end():
    model = our_model(max_seq_len=64)
    prompt = random_ids(1, 6)[0].tolist() * 4
    every = [
        token.id for (token,) in Decoder(model, [prompt], GenerationOptions(max_new_tokens=30))
    ]
    stop = {every[17]}
    ends = []
    for most in (0, 5):
        options = GenerationOptions(max_new_tokens=30, prompt_lookup=most)
        decoder = Decoder(model, [prompt], options, stop_ids=stop)
        ends.append([(token.id, token.finish_reason) for step in decoder for token in step])
    assert ends[0] == ends[1]
    full = Decoder(model, [prompt], GenerationOptions(max_new_tokens=500, prompt_lookup=5))
    tokens = [token for step in full for token in step]
    assert len(prompt) + len(tokens) == 64
    assert tokens[-1].finish_reason == "length"


def test_several_rows_go_on_as_they_do_alone():
    model = our_model(max_seq_len=64)
    prompts = [random_ids(1, 5, seed=seed)[0].tolist() for seed in range(3)]
    ids = []
    for most in (0, 4):
        options = GenerationOptions(max_new_tokens=20, prompt_lookup=most)
        ids.append([[t.id for t in step] for step in Decoder(model, prompts, options)])
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("clash", "name"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"logprobs": 2}, "logprobs"),
        ({"regex": "a+"}, "regex"),
    ],
)
def test_what_drafts_cannot_serve_is_refused(clash, name):
    with pytest.raises(OptionError, match=f"omit {name}"):
        GenerationOptions(prompt_lookup=4, **clash)


def test_the_default_model_writes_the_same_text_with_stop_strings(default_model):
    model = load_pretrained(default_model, quantize="auto", device="cpu")
    tokenizer = Tokenizer.from_pretrained(default_model)
    prompt = "A list of numbers: one, two, three, one, two, three, one,"
    texts = [
        generate(model, tokenizer, prompt, max_new_tokens=40, stop=[". "], prompt_lookup=most)[0]
        for most in (0, 8)
    ]
    assert texts[0].text == texts[1].text
    assert texts[0].token_ids == texts[1].token_ids
