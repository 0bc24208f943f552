"""Frequency and presence penalties and logit bias: formulas, batches, and what is generated."""

import dataclasses
import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SequenceBiasLogitsProcessor

from minllama.engine.base import Engine
from minllama.engine.choice import choice_of
from minllama.engine.scheduler import Scheduler
from minllama.errors import OptionError
from minllama.generation.api import generate, stream
from minllama.generation.decode import Decoder, OptionsSampler, request_of
from minllama.generation.sampling import apply_count_penalties, apply_logit_bias, choose_tokens
from minllama.options import GenerationOptions, SamplingOptions
from tests.generation.test_generation import model, tokenizer  # noqa: F401  (fixtures)
from tests.tiny import our_model

VOCABULARY = 7


def test_penalties_are_subtracted_by_count_and_once():
    logits = torch.tensor([[1.0, 2.0, -3.0, 0.5], [1.0, 2.0, -3.0, 0.5]])
    penalized = apply_count_penalties(logits, [[0, 2, 2, 2], []], 0.5, 0.25)
    assert penalized.tolist() == [[0.25, 2.0, -4.75, 0.5], [1.0, 2.0, -3.0, 0.5]]
    assert logits[0].tolist() == [1.0, 2.0, -3.0, 0.5]
    negative = apply_count_penalties(logits, [[1], [1, 1]], -2.0, -1.0)
    assert negative.tolist() == [[1.0, 5.0, -3.0, 0.5], [1.0, 7.0, -3.0, 0.5]]


def test_ids_without_a_logit_are_no_part_of_penalties_and_biases():
    logits = torch.tensor([[1.0, 2.0]])
    assert apply_count_penalties(logits, [[1, 2, 7]], 0.5, 0.0).tolist() == [[1.0, 1.5]]
    assert apply_count_penalties(logits, [[2, 7]], 0.5, 0.0).tolist() == [[1.0, 2.0]]
    assert apply_logit_bias(logits, [(1, 3.0), (2, 9.0)]).tolist() == [[1.0, 5.0]]
    assert apply_logit_bias(logits, [(2, 9.0)]).tolist() == [[1.0, 2.0]]


def test_the_penalties_are_those_of_vllm():
    """Its `apply_penalties`: counts of output tokens as a matrix, then these two lines."""
    random_numbers = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 40, generator=random_numbers)
    generated = torch.randint(0, 40, (5, 30), generator=random_numbers)
    counts = torch.zeros(5, 40).scatter_add_(1, generated, torch.ones(5, 30))
    expected = logits.clone()
    expected -= 0.7 * counts
    expected -= -1.3 * (counts > 0)
    actual = apply_count_penalties(logits, generated.tolist(), 0.7, -1.3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_a_bias_is_that_of_transformers():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(4))
    bias = {3: 4.5, 0: -100.0, 39: 0.25}
    theirs = SequenceBiasLogitsProcessor({(i,): value for i, value in bias.items()})
    expected = theirs(torch.zeros(3, 1, dtype=torch.long), logits.clone())
    before = logits.clone()
    assert torch.equal(apply_logit_bias(logits, tuple(bias.items())), expected)
    assert torch.equal(logits, before)


def test_a_bias_lifts_no_token_that_is_forbidden():
    logits = torch.tensor([[-math.inf, 1.0]])
    assert apply_logit_bias(logits, ((0, 100.0),)).tolist() == [[-math.inf, 1.0]]


def test_a_bias_comes_before_the_repetition_penalty_and_that_before_counts():
    """(4 - 6) * 2 - 1.5 = -5.5 loses to -5; in any other order it would win, or be above -5."""
    logits = torch.tensor([[4.0, -5.0]])
    options = SamplingOptions(
        logit_bias={0: -6.0}, repetition_penalty=2.0, frequency_penalty=1.0, presence_penalty=0.5
    )
    assert choose_tokens(logits, options, [], [[0]], [[0]]).tolist() == [1]
    for change in (
        {"logit_bias": ()},
        {"repetition_penalty": 1.0},
        {"frequency_penalty": 0.0, "presence_penalty": 0.0},
    ):
        other = dataclasses.replace(options, **change)
        assert choose_tokens(logits, other, [], [[0]], [[0]]).tolist() == [0]


def slow_choice(logits, options, uniform, prompt, generated):
    """One row by loops over tokens in float64, by the documented order."""
    scores = [float(x) for x in logits]
    for token, value in options.logit_bias:
        scores[token] += value
    for token in {*prompt, *generated}:
        penalty = options.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in range(len(scores)):
        count = generated.count(token)
        scores[token] -= count * options.frequency_penalty
        scores[token] -= options.presence_penalty if count else 0.0
    if options.temperature == 0:
        order = sorted(scores, reverse=True)
        return scores.index(order[0]), order[0] - order[1]
    weights = [math.exp((score - max(scores)) / options.temperature) for score in scores]
    aim, total, margin = uniform * sum(weights), 0.0, math.inf
    chosen = None
    for token, weight in enumerate(weights):
        total += weight
        margin = min(margin, abs(total - aim) / sum(weights))
        if chosen is None and total > aim:
            chosen = token
    return chosen, margin


numbers = st.floats(-2, 2).map(lambda x: round(x, 2))
tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(st.tuples(tokens, tokens), min_size=1, max_size=5),
    frequency=numbers,
    presence=numbers,
    repetition=st.sampled_from([1.0, 1.3, 0.5]),
    bias=st.dictionaries(
        st.integers(0, VOCABULARY - 1), st.floats(-100, 100).map(lambda x: round(x, 1))
    ),
    temperature=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 2**30),
)
def test_a_batch_gets_what_each_row_gets_alone_by_a_slow_reference(
    rows, frequency, presence, repetition, bias, temperature, seed
):
    options = SamplingOptions(
        frequency_penalty=frequency,
        presence_penalty=presence,
        repetition_penalty=repetition,
        logit_bias=bias,
        temperature=temperature,
    )
    logits = 3 * torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(seed))
    draws = random.Random(seed)
    uniforms = [draws.random() for _ in rows]
    prompts, generated = zip(*rows, strict=True)
    histories = [p + g for p, g in rows]
    before = logits.clone()
    together = choose_tokens(logits, options, uniforms, histories, generated).tolist()
    assert torch.equal(logits, before)
    for row, chosen in enumerate(together):
        alone = choose_tokens(
            logits[row : row + 1], options, uniforms[row : row + 1], [histories[row]],
            [generated[row]],
        )  # fmt: skip
        assert alone.tolist() == [chosen]
        expected, margin = slow_choice(
            logits[row], options, uniforms[row], prompts[row], generated[row]
        )
        assert chosen == expected or margin < 1e-4


def greedy_reference(tiny, prompt, options, new_tokens):
    """Greedy generation by full forward passes and a formula."""
    ids = list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = tiny(torch.tensor([ids])).logits[0, -1]
        for token, count in Counter(ids[len(prompt) :]).items():
            logits[token] -= count * options["frequency_penalty"] + options["presence_penalty"]
        for token, value in options["logit_bias"].items():
            logits[token] += value
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def decoded(tiny, prompts, **options):
    """The tokens of each row."""
    decoder = Decoder(tiny, prompts, GenerationOptions(**options))
    found: dict[int, list[int]] = {}
    for step in decoder:
        for token in step:
            found.setdefault(token.row, []).append(token.id)
    return [found[row] for row in sorted(found)]


@pytest.mark.parametrize("backend", [None, "eager"])
def test_generated_tokens_count_and_those_of_the_prompt_do_not(backend):
    from minllama.engine.choose import engine_for

    tiny = our_model()
    options = {
        "frequency_penalty": 1.1,
        "presence_penalty": 0.7,
        "logit_bias": {5: 3.5, 9: -100.0},
    }
    prompts = [[5, 6, 7, 5], [1], [9, 9, 9, 9, 9, 9]]
    expected = [greedy_reference(tiny, prompt, options, 12) for prompt in prompts]
    assert len({tuple(row) for row in expected}) == 3
    engine = engine_for(tiny, backend)
    assert decoded(engine, prompts, max_new_tokens=12, **options) == expected
    alone = [decoded(engine, [p], max_new_tokens=12, **options)[0] for p in prompts]
    assert alone == expected
    plain = decoded(engine, prompts, max_new_tokens=12)
    assert plain != expected


def test_sequences_of_different_penalties_run_in_one_batch():
    tiny = our_model()
    scheduler = Scheduler(Engine(tiny))
    changes = [{}, {"frequency_penalty": 2.0}, {"presence_penalty": -2.0}, {"logit_bias": {3: 100}}]
    sequences = [
        scheduler.add(request_of([1, 2], GenerationOptions(max_new_tokens=10, **change)))[0]
        for change in changes
    ]
    while scheduler.is_busy:
        scheduler.step()
    for sequence, change in zip(sequences, changes, strict=True):
        assert [sequence.ids[2:]] == decoded(tiny, [[1, 2]], max_new_tokens=10, **change)
    assert sequences[3].ids[2:] == [3] * 10


def test_options_that_are_off_leave_samplers_equal_and_ahead():
    """Where a GPU may run ahead, it may with penalties too: they are of tokens that have come."""
    plain = OptionsSampler.of(GenerationOptions(max_new_tokens=3))
    assert plain == OptionsSampler.of(GenerationOptions(logit_bias={}, frequency_penalty=0))
    assert plain != OptionsSampler.of(GenerationOptions(logit_bias={1: 1}))
    scheduler = Scheduler(Engine(our_model()))
    sequences = scheduler.add(request_of([1], GenerationOptions(frequency_penalty=1)))
    assert choice_of(sequences, torch.device("cpu")).can_run_ahead


def test_tokens_that_run_ahead_are_penalized_alike():
    tiny = our_model()
    options = GenerationOptions(max_new_tokens=20, frequency_penalty=1.5, presence_penalty=0.5)
    found = []
    for ahead in (False, True):
        scheduler = Scheduler(Engine(tiny))
        scheduler._runs_ahead = ahead
        sequences = [scheduler.add(request_of(ids, options))[0] for ids in ([1, 2], [3])]
        while scheduler.is_busy:
            scheduler.step()
        found.append([sequence.ids for sequence in sequences])
    assert found[0] == found[1]


def test_reported_log_probabilities_are_the_models_own(model, tokenizer):  # noqa: F811
    change = {"frequency_penalty": 2, "presence_penalty": 2, "logit_bias": {"a": 5, "b": -100}}
    [result] = generate(
        model, tokenizer, "ab", max_new_tokens=8, logprobs=0, ignore_eos=True, **change
    )
    ids = result.prompt_ids + result.token_ids
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0, :, : tokenizer.vocab_size].log_softmax(-1)
    expected = [
        float(scores[place - 1, ids[place]]) for place in range(len(result.prompt_ids), len(ids))
    ]
    assert [token.logprob for token in result.logprobs] == pytest.approx(expected, abs=1e-4)


def test_a_bias_names_tokens_by_text_too(model, tokenizer):  # noqa: F811
    [result] = generate(model, tokenizer, "x", logit_bias={"q": 100}, max_new_tokens=5)
    assert result.text == "qqqqq"
    [ended] = generate(model, tokenizer, "x", logit_bias={"<eos>": 100}, max_new_tokens=5)
    assert (ended.text, ended.finish_reason) == ("", "stop")
    constrained = {"logit_bias": {"b": 100}, "max_new_tokens": 4}
    pytest.importorskip("llguidance")
    [held] = generate(model, tokenizer, "x", regex="[ab]c[ab]b", **constrained)
    assert held.text == "bcbb"


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({258: 1}, r"logit_bias \(--logit-bias\) holds 258, and the tokenizer knows 0 to 257"),
        ({"ab": 1}, "'ab' is not one token of this vocabulary; give the ids of its tokens"),
        ({"a": 1, 64: 2}, "logit_bias holds the token 64 twice"),
    ],
)
def test_what_is_no_token_is_refused_in_one_line(bias, message, model, tokenizer):  # noqa: F811
    assert tokenizer.encode("a") == [64]
    for call in (generate, stream):
        with pytest.raises(OptionError, match=message) as caught:
            call(model, tokenizer, "a", logit_bias=bias)
        assert "\n" not in str(caught.value)


def test_requests_refuse_biases_of_what_is_no_id():
    tiny = our_model()
    with pytest.raises(OptionError, match="'a' is a text; give its id here"):
        request_of([1], GenerationOptions(logit_bias={"a": 1}))
    with pytest.raises(OptionError, match="holds 61, and the ids are 0 to 60"):
        Decoder(tiny, [[1]], GenerationOptions(logit_bias={61: 1}))
    with pytest.raises(OptionError, match="holds 50, and the ids are 0 to 49"):
        Decoder(tiny, [[1]], GenerationOptions(logit_bias={50: 1}), n_tokens=50)
