"""Scores, hidden states and log-probabilities are the same in any company, budget and cache."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minllama.engine import scheduler as scheduler_module
from minllama.engine.choose import engine_for
from minllama.engine.log_probs import LogProbsRequest
from minllama.engine.prefix_cache import PrefixCache
from minllama.engine.scheduler import Scheduler
from minllama.engine.scoring import ScoreRequest
from minllama.engine.states import StatesRequest
from minllama.errors import ContextError, MinllamaError, OptionError
from minllama.generation.decode import request_of
from minllama.options import GenerationOptions
from tests.tiny import both, our_model, random_ids

MODEL = our_model()
ENGINE = engine_for(MODEL)
VOCABULARY, CONTEXT = MODEL.config.vocab_size, MODEL.config.context_len
CHOICES = ((1, "mean"), (1, "last"), (1, "weighted-mean"), (2, "last"), (2, "mean"))


@pytest.fixture(autouse=True)
def _bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token budget holds although no sequence runs."""
    monkeypatch.setattr(scheduler_module, "EVALUATION_TOKENS", 0)


def alone(request: Any) -> Any:
    scheduler = Scheduler(ENGINE)
    evaluation = scheduler.evaluate(request)
    scheduler.step()
    assert evaluation.has_ended
    return evaluation.result


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=2e-5)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


@st.composite
def requests(draw: Any) -> Any:
    """Of each kind; texts begin with one of three beginnings, which some share."""
    salt = draw(st.sampled_from(["", "other"]))
    begin = draw(st.sampled_from([[], [5] * 20, list(range(1, 31))]))
    length = draw(st.integers(1, 30))
    rest = random.Random(draw(st.integers(0, 5))).choices(range(VOCABULARY), k=length)
    ids, shared = tuple(begin + rest), draw(st.sampled_from([0, len(begin)]))
    common: dict[str, Any] = {"ids": ids, "shared_len": shared, "salt": salt}
    kind = draw(st.sampled_from(["score", "states", "log-probs"]))
    if kind == "score":
        labels = draw(st.sampled_from([((3,), (4,)), ((3, 4, 5), (3, 4, 6)), ((9,), (8, 7), (6,))]))
        return ScoreRequest(continuations=labels, **common)
    if kind == "states":
        chosen = draw(st.sampled_from([CHOICES[:1], CHOICES[1:2], CHOICES[3:4], CHOICES]))
        last = draw(st.sampled_from([None, 0, len(ids) // 2]))
        return StatesRequest(choices=chosen, last=last, **common)
    start = draw(st.integers(shared + 1, len(ids)))
    return LogProbsRequest(start=start, top=draw(st.integers(0, 3)), **common)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    entries=st.lists(st.tuples(st.integers(0, 6), requests(), st.booleans()), max_size=12),
    prompts=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 50)), max_size=4),
    budget=st.sampled_from([None, 5, 16, 60]),
    batch_tokens=st.sampled_from([None, 50, 200]),
    has_cache=st.booleans(),
    seed=st.integers(0, 100),
)
def test_evaluations_that_come_and_go_get_the_answers_that_they_get_alone(
    entries, prompts, budget, batch_tokens, has_cache, seed
):
    rng = random.Random(seed)
    cache = PrefixCache(1 << 20) if has_cache else None
    scheduler = Scheduler(
        ENGINE, token_budget=budget, batch_tokens=batch_tokens, prefix_cache=cache
    )
    options = GenerationOptions(max_new_tokens=6)
    texts = [(when, rng.choices(range(VOCABULARY), k=length)) for when, length in prompts]
    sequences, evaluations, cancelled = [], [], []
    step = 0
    while scheduler.is_busy or step < 8:
        for when, ids in texts:
            if when == step:
                sequences += [(ids, *scheduler.add(request_of(ids, options)))]
        for when, request, is_cancelled in entries:
            if when == step:
                evaluation = scheduler.evaluate(request)
                (cancelled if is_cancelled else evaluations).append(evaluation)
        for evaluation in cancelled:
            if rng.random() < 0.3:
                scheduler.cancel(evaluation)
        scheduler.step()
        assert all(evaluation.has_ended for evaluation in scheduler.evaluated)
        step += 1
        assert step < 500
    for evaluation in evaluations:
        assert_same(evaluation.result, alone(evaluation.request))
    for ids, sequence in sequences:
        (expected,) = (s := Scheduler(ENGINE)).add(request_of(ids, options))
        while s.is_busy:
            s.step()
        assert sequence.ids == expected.ids


@torch.no_grad()
def test_log_probabilities_are_those_of_transformers(tmp_path):
    theirs, ours = both(tmp_path)
    ids = random_ids(1, 20)
    expected = theirs(ids).logits[0].log_softmax(-1)
    for budget in (None, 6):
        scheduler = Scheduler(engine_for(ours), token_budget=budget)
        some = scheduler.evaluate(LogProbsRequest(ids=tuple(ids[0].tolist()), top=2))
        last = scheduler.evaluate(LogProbsRequest(ids=tuple(ids[0].tolist()), start=18))
        while scheduler.is_busy:
            scheduler.step()
        assert len(some.result) == 19
        for place, found in enumerate(some.result):
            assert found.logprob == pytest.approx(
                expected[place, ids[0, place + 1]].item(), abs=1e-4
            )
            values, best = expected[place].topk(2)
            assert [token for token, _ in found.alternatives] == best.tolist()
            assert [p for _, p in found.alternatives] == pytest.approx(values.tolist(), abs=1e-4)
        assert_same([t.logprob for t in last.result], [t.logprob for t in some.result[17:]])


@torch.no_grad()
def test_states_are_those_of_transformers(tmp_path):
    theirs, ours = both(tmp_path)
    ids = random_ids(1, 20)
    states = theirs(ids, output_hidden_states=True).hidden_states  # the last one after the norm
    scheduler = Scheduler(engine_for(ours), token_budget=6)
    n_layers = ours.config.n_layers
    choices = ((1, "mean"), (n_layers, "last"), (n_layers, "mean"))
    evaluation = scheduler.evaluate(StatesRequest(ids=tuple(ids[0].tolist()), choices=choices))
    while scheduler.is_busy:
        scheduler.step()
    first = (
        states[1][0] * (states[1][0].pow(2).mean(-1, keepdim=True) + ours.config.norm_eps).rsqrt()
    )
    expected = [first.mean(0), states[-1][0, -1], states[-1][0].mean(0)]
    assert_same(evaluation.result, [tensor.float() for tensor in expected])


def test_neither_prompts_nor_evaluations_starve():
    scheduler = Scheduler(ENGINE, token_budget=4)
    options = GenerationOptions(max_new_tokens=1)
    sequences = [scheduler.add(request_of([1] * 20, options))[0] for _ in range(10)]
    evaluations = [
        scheduler.evaluate(StatesRequest(ids=(2,) * 20, choices=CHOICES[:1])) for _ in range(10)
    ]
    for _ in range(30):
        scheduler.step()
    done = sum(s.has_ended for s in sequences), sum(e.has_ended for e in evaluations)
    assert min(done) >= 2


def test_neither_long_prompts_nor_floods_hold_up_running_sequences():
    scheduler = Scheduler(ENGINE, token_budget=8, max_sequences=4)
    (chat,) = scheduler.add(request_of([1] * 3, GenerationOptions(max_new_tokens=40)))
    assert len(scheduler.step()) == 1
    long = scheduler.add(request_of([2] * 60, GenerationOptions(max_new_tokens=2)))
    many = scheduler.add(request_of([3] * 4, GenerationOptions(max_new_tokens=2, n=4)))
    last = scheduler.add(request_of([4] * 4, GenerationOptions(max_new_tokens=2)))
    for _ in range(50):
        scheduler.evaluate(StatesRequest(ids=(2,) * 20, choices=CHOICES[:1]))
    for _ in range(39):
        rows = [token.row for token in scheduler.step()]
        assert rows.count(chat.index) == 1  # in each step, whatever else there is
    assert chat.has_ended
    n_steps = 0
    while not all(sequence.has_ended for sequence in (*long, *many, *last)):
        scheduler.step()
        n_steps += 1
        assert n_steps < 60
    assert scheduler._evaluations.waiting or scheduler.evaluated


def test_a_cancelled_evaluation_gives_back_its_memory_at_once():
    scheduler = Scheduler(ENGINE, token_budget=10)
    long = scheduler.evaluate(
        ScoreRequest(ids=(1,) * 60, continuations=((1,), (2,)), shared_len=30)
    )
    other = scheduler.evaluate(ScoreRequest(ids=(1,) * 60, continuations=((1,), (2,))))
    scheduler.step()
    assert scheduler.nbytes
    scheduler.cancel(long)
    assert long.has_ended
    assert scheduler.nbytes == 0
    scheduler.step()
    assert scheduler.nbytes
    scheduler.cancel(other, other)
    assert not scheduler.is_busy
    assert scheduler.nbytes == 0


def test_four_hundred_questions_read_their_text_once():
    read = []
    model = our_model()
    model.layers[0].register_forward_hook(
        lambda m, args, out: read.append(args[0].shape[:2].numel())
    )
    scheduler = Scheduler(engine_for(model), token_budget=64, batch_tokens=4096)
    text = tuple(random_ids(1, 50)[0].tolist())
    questions = [
        ScoreRequest(ids=(*text, i % 61, i // 61), continuations=((1,), (2,)), shared_len=50)
        for i in range(400)
    ]
    evaluations = [scheduler.evaluate(question) for question in questions]
    while scheduler.is_busy:
        scheduler.step()
    assert sum(read) == 50 + 800
    assert_same(evaluations[333].result, alone(questions[333]))


def test_what_cannot_be_evaluated_is_refused_before_anything_is_read():
    scheduler = Scheduler(ENGINE)
    for request, error, said in (
        (StatesRequest(ids=(), choices=CHOICES), MinllamaError, "has no tokens"),
        (StatesRequest(ids=(1,) * (CONTEXT + 1), choices=CHOICES), ContextError, f"{CONTEXT}"),
        (StatesRequest(ids=(1, VOCABULARY), choices=CHOICES), MinllamaError, "token id"),
        (ScoreRequest(ids=(1,) * CONTEXT, continuations=((1, 2), (3,))), ContextError, "tokens"),
        (StatesRequest(ids=(1, 2), choices=((3, "last"),)), MinllamaError, "0 to 2"),
        (StatesRequest(ids=(1, 2), choices=((-1, "last"),)), MinllamaError, "0 to 2"),
        (StatesRequest(ids=(1, 2), choices=((1, "first"),)), MinllamaError, "mean"),
        (StatesRequest(ids=(1, 2), choices=()), MinllamaError, "choices"),
        (StatesRequest(ids=(1, 2), choices=CHOICES, last=2), MinllamaError, "0 to 1"),
        (LogProbsRequest(ids=(1, 2), start=0), MinllamaError, "start"),
        (LogProbsRequest(ids=(1, 2), start=3), MinllamaError, "start"),
        (LogProbsRequest(ids=(1, 2), shared_len=1), MinllamaError, "start"),
    ):
        with pytest.raises(error, match=said):
            scheduler.evaluate(request)
    assert not scheduler.is_busy
    with pytest.raises(OptionError, match="batch_tokens"):
        Scheduler(ENGINE, batch_tokens=0)


def test_a_bidirectional_text_is_read_at_once():
    model = our_model(causal=False)
    scheduler = Scheduler(engine_for(model), token_budget=4)
    request = StatesRequest(ids=tuple(range(1, 30)), choices=CHOICES)
    evaluation = scheduler.evaluate(request)
    scheduler.step()
    whole = Scheduler(engine_for(model))
    expected = whole.evaluate(request)
    whole.step()
    assert_same(evaluation.result, expected.result)


def test_evaluations_alone_fill_a_batch_whatever_the_budget(monkeypatch):
    monkeypatch.setattr(scheduler_module, "EVALUATION_TOKENS", 100)
    scheduler = Scheduler(ENGINE, token_budget=30, batch_tokens=1000)
    request = StatesRequest(ids=(1,) * 20, choices=CHOICES[:1])
    evaluations = [scheduler.evaluate(request) for _ in range(8)]
    scheduler.step()
    assert sum(e.has_ended for e in evaluations) == 5
    scheduler.add(request_of([1] * 4, GenerationOptions(max_new_tokens=3)))
    scheduler.step()
    assert sum(e.has_ended for e in evaluations) == 6
