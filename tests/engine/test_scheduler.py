"""Sequences that join and leave a running batch get the tokens that they get alone."""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minllama.engine.choose import engine_for
from minllama.engine.prefix_cache import PrefixCache, common_length
from minllama.engine.scheduler import Scheduler
from minllama.engine.sequence import Request
from minllama.errors import MinllamaError, OptionError
from minllama.generation.decode import Decoder, request_of
from minllama.model.kv_cache import KVCache
from minllama.model.llama import LlamaOutput
from minllama.options import GenerationOptions
from tests.tiny import our_model, random_ids

MODEL = our_model()
ENGINES = {backend: engine_for(MODEL, backend) for backend in (None, "eager")}
VOCABULARY, CONTEXT = MODEL.config.vocab_size, MODEL.config.context_len
LONG = list(range(1, 41))


class EveryOther:
    """A constraint whose state matters: tokens are even and odd by turns, and `length` in all."""

    def __init__(self, length: int) -> None:
        self.length, self.seen = length, 0

    def forbid(self, logits: torch.Tensor) -> None:
        logits[self.seen % 2 :: 2] = -torch.inf

    def accept(self, token_id: int) -> None:
        assert token_id % 2 == (self.seen + 1) % 2
        self.seen += 1

    def is_complete(self) -> bool:
        return self.seen == self.length


class Fails(EveryOther):
    """One that gives up at its last token, or before it."""

    def __init__(self, length: int, at: str) -> None:
        super().__init__(length)
        self.at = at

    def forbid(self, logits: torch.Tensor) -> None:
        if self.at == "forbid" and self.seen == self.length - 1:
            raise OptionError("too difficult")
        super().forbid(logits)

    def accept(self, token_id: int) -> None:
        if self.at == "accept" and self.seen == self.length - 1:
            raise OptionError("too difficult")
        super().accept(token_id)


@dataclass
class Case:
    """A request, when it joins, and after how many tokens each sample is cancelled."""

    ids: list[int]
    options: GenerationOptions
    stop_ids: set[int] = field(default_factory=set)
    n_tokens: int | None = None
    constrained: int | None = None
    joins: int = 0
    cancels: int | None = None

    def arguments(self) -> dict[str, Any]:
        length = self.constrained
        make = None if length is None else lambda: EveryOther(length)
        return {"stop_ids": self.stop_ids, "n_tokens": self.n_tokens, "make_constraint": make}

    def request(self) -> Request:
        return request_of(self.ids, self.options, **self.arguments())

    def alone(self, engine: Any) -> list[list[Any]]:
        """Each sample's tokens, of a decoder of its own."""
        found: list[list[Any]] = [[] for _ in range(self.options.n)]
        for step in Decoder(engine, [self.ids], self.options, **self.arguments()):
            for token in step:
                found[token.row].append(token)
        return found


KINDS = ["greedy", "greedy", "sampled", "filtered", "penalty", "lookup"]


@st.composite
def cases(draw: Any, *, plain: bool = False) -> Case:
    """A case; a plain one lets a GPU run ahead of the host."""
    kind = draw(st.sampled_from(KINDS[: 5 if plain else 6]))
    options: dict[str, Any] = {"max_new_tokens": draw(st.integers(1, 14)), "seed": 3}
    if kind in ("sampled", "filtered"):
        options["temperature"] = draw(st.sampled_from([0.7, 1.5]))
    if kind == "filtered":
        options |= draw(st.sampled_from([{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}]))
    if kind == "penalty":
        options["repetition_penalty"] = 1.4
    if kind == "lookup":
        options["prompt_lookup"] = 4
    else:
        options["logprobs"] = None if plain else draw(st.sampled_from([None, None, 0, 2]))
        options["n"] = draw(st.integers(1, 3))
    is_constrained = not plain and kind != "lookup" and draw(st.booleans())
    length = draw(st.sampled_from([1, 2, 5, 17, 40, CONTEXT - 2, CONTEXT]))
    ids = random_ids(1, length, seed=draw(st.integers(0, 2)))[0].tolist()
    return Case(
        ids=ids * 3 if kind == "lookup" and length < 20 else ids,
        options=GenerationOptions(**options),
        stop_ids=set(draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=6))),
        n_tokens=draw(st.sampled_from([None, VOCABULARY - 9])),
        constrained=draw(st.integers(1, 9)) if is_constrained else None,
        joins=draw(st.integers(0, 12)),
        cancels=draw(st.one_of(st.none(), st.none(), st.integers(0, 5))),
    )


def run(scheduler: Scheduler, entries: list[Case]) -> list[list[list[Any]]]:
    """Each sample's tokens of each case."""
    found: list[list[list[Any]]] = [[[] for _ in range(case.options.n)] for case in entries]
    joined, place = {}, {}
    for step in range(10_000):
        for number, case in enumerate(entries):
            if case.joins == step:
                joined[number] = scheduler.add(case.request())
                place |= {s.index: (number, i) for i, s in enumerate(joined[number])}
        for number, sequences in joined.items():
            for sequence, tokens in zip(sequences, found[number], strict=True):
                if len(tokens) == entries[number].cancels:
                    scheduler.cancel(sequence)
        if not scheduler.is_busy and len(joined) == len(entries):
            return found
        for token in scheduler.step():
            number, sample = place[token.row]
            assert not found[number][sample] or not found[number][sample][-1].finish_reason
            found[number][sample].append(token)
    raise AssertionError("it never ends")


def assert_same_tokens(found: list[Any], expected: list[Any]) -> None:
    assert [(t.id, t.finish_reason) for t in found] == [(t.id, t.finish_reason) for t in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.logprob is None) == (theirs.logprob is None)
        if ours.logprob is not None:
            assert ours.logprob == pytest.approx(theirs.logprob, abs=2e-4)
            assert [i for i, _ in ours.alternatives] == [i for i, _ in theirs.alternatives]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    entries=st.one_of(
        st.lists(cases(), min_size=1, max_size=7),
        st.lists(cases(plain=True), min_size=2, max_size=9),
    ),
    budget=st.sampled_from([None, None, 4, 7, 16, 50]),
    prefix_bytes=st.sampled_from([None, 0, 20_000, 10**9]),
    backend=st.sampled_from([None, "eager"]),
    runs_ahead=st.booleans(),
)
def test_sequences_that_come_and_go_get_the_tokens_that_they_get_alone(
    entries: list[Case],
    budget: int | None,
    prefix_bytes: int | None,
    backend: str | None,
    runs_ahead: bool,
) -> None:
    prefix_cache = None if prefix_bytes is None else PrefixCache(prefix_bytes)
    engine = ENGINES[backend]
    scheduler = Scheduler(engine, token_budget=budget, prefix_cache=prefix_cache)
    scheduler._runs_ahead = runs_ahead
    for case, samples in zip(entries, run(scheduler, entries), strict=True):
        for tokens, expected in zip(samples, case.alone(engine), strict=True):
            if case.cancels is not None and len(tokens) < len(expected):
                assert len(tokens) >= case.cancels
                expected = expected[: len(tokens)]
            assert_same_tokens(tokens, expected)
    assert scheduler.nbytes == 0
    if prefix_cache is not None:
        assert prefix_cache.nbytes <= (prefix_bytes or 0)


def asked(ids: list[int], max_new_tokens: int, **options: Any) -> Request:
    return request_of(ids, GenerationOptions(max_new_tokens=max_new_tokens, **options))


def tokens_of(ids: list[int], n: int, **options: Any) -> list[int]:
    steps = Decoder(MODEL, [ids], GenerationOptions(max_new_tokens=n, **options))
    return [token.id for (token,) in steps]


def finish(scheduler: Scheduler) -> dict[int, list[int]]:
    """Row -> its tokens, of all that is still to come."""
    found: dict[int, list[int]] = {}
    while scheduler.is_busy:
        for token in scheduler.step():
            found.setdefault(token.row, []).append(token.id)
    return found


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens, without padding, each forward pass of the default engine reads."""
    sizes, own = [], type(ENGINES[None]).forward

    def seen(self, ids, cache, **options):
        mask = options.get("attention_mask")
        sizes.append(ids.numel() if mask is None else int(mask.sum()))
        return own(self, ids, cache, **options)

    monkeypatch.setattr(type(ENGINES[None]), "forward", seen)
    return sizes


def test_what_was_read_ahead_stays_with_its_sequence():
    """Where the others end, by a stop token, by their limit or by being cancelled."""
    engine, requests = ENGINES[None], [(LONG[: 2 + i], 4 + 3 * i) for i in range(6)]
    drawn = {"temperature": 1.0, "seed": 5}
    expected = [tokens_of(*request, **drawn) for request in requests]
    for ends in ("length", "stop", "cancel"):
        scheduler = Scheduler(engine)
        scheduler._runs_ahead = True
        for number, (ids, n) in enumerate(requests):
            stop_ids = expected[number][3:4] if ends == "stop" and number % 2 else []
            options = GenerationOptions(max_new_tokens=n if ends == "length" else 19, **drawn)
            scheduler.add(request_of(ids, options, stop_ids=stop_ids))
        found: dict[int, list[int]] = {number: [] for number in range(6)}
        while scheduler.is_busy:
            for token in scheduler.step():
                found[token.row].append(token.id)
            for sequence in scheduler.running if ends == "cancel" else []:
                if len(found[sequence.index]) == requests[sequence.index][1]:
                    scheduler.cancel(sequence)
        for number, ids in found.items():
            assert len(ids) >= 4
            assert ids[: len(expected[number])] == expected[number][: len(ids)]


def test_sequences_of_different_options_share_a_forward_pass(passes):
    scheduler = Scheduler(ENGINES[None])
    for options in ({}, {"temperature": 1.0, "seed": 1}, {"repetition_penalty": 1.3}):
        scheduler.add(asked(LONG[:4], 5, **options))
    finish(scheduler)
    assert passes == [12, 3, 3, 3, 3]


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("budget", [3, 8, 21])
def test_no_step_reads_more_than_the_budget(budget, runs_ahead, passes):
    scheduler = Scheduler(ENGINES[None], token_budget=budget)
    scheduler._runs_ahead = runs_ahead
    for number, length in enumerate([2, 1, 30, 5, 5, 5, 1, 1, 12]):
        scheduler.add(asked(LONG[:length], 5 + number))
    reads = []
    while scheduler.is_busy:
        before = len(passes)
        scheduler.step()
        reads.append(sum(passes[before:]))
    assert max(reads) == budget
    assert scheduler.prefill_tokens == 62


def test_drafts_are_read_within_the_budget(passes):
    scheduler = Scheduler(ENGINES[None], token_budget=4)
    scheduler.add(asked([1, 2, 3] * 5, 30, prompt_lookup=9))
    finish(scheduler)
    assert max(passes) == 4


def test_a_long_prompt_does_not_hold_up_what_runs():
    scheduler = Scheduler(ENGINES[None], token_budget=5)
    (first,) = scheduler.add(asked(LONG[:3], 40))
    scheduler.step()
    (late,) = scheduler.add(asked(LONG, 3))
    n_steps = 0
    while late in scheduler.waiting:
        tokens = scheduler.step()
        assert tokens[0].row == first.index
        n_steps += 1
    assert n_steps == 10  # 40 tokens, of which each step reads what one running sequence leaves


def test_samples_that_cannot_run_together_are_refused():
    scheduler = Scheduler(ENGINES[None], token_budget=3)
    with pytest.raises(OptionError, match="n = 4 samples are more than the 3 sequences"):
        scheduler.add(asked([1], 2, n=4, temperature=1.0))
    with pytest.raises(OptionError, match="max_sequences must be 1 or more, not 0"):
        Scheduler(ENGINES[None], max_sequences=0)


def test_no_more_sequences_run_than_may():
    scheduler = Scheduler(ENGINES[None], max_sequences=4)
    for number in range(7):
        scheduler.add(asked([1 + number], 3, n=1 + number % 3, temperature=1.0))
    seen = set()
    while scheduler.is_busy:
        scheduler.step()
        seen.add(len(scheduler.running))
    assert max(seen) <= 4


def test_cancelled_sequences_give_back_their_memory_within_a_step():
    scheduler = Scheduler(ENGINES[None])
    sequences = [scheduler.add(asked(LONG[: 3 + i], 20))[0] for i in range(8)]
    scheduler.step()
    whole = scheduler.nbytes
    for sequence in sequences[:6]:
        scheduler.cancel(sequence)
    assert scheduler.running == [sequences[7], sequences[6]]
    assert scheduler.nbytes <= whole / 4
    tokens = [token.row for token in scheduler.step()]
    assert tokens == [7, 6]
    scheduler.cancel(sequences[6])
    scheduler.cancel(sequences[7])
    assert scheduler.nbytes == 0
    assert not scheduler.is_busy
    assert scheduler.step() == []


def test_a_long_sequence_that_leaves_takes_its_room_along():
    model = our_model(max_seq_len=100_000)
    scheduler = Scheduler(engine_for(model))
    scheduler.add(asked([1], 90_000))
    (long,) = scheduler.add(asked([1] * 3_000, 50_000))
    scheduler.step()
    scheduler.cancel(long)
    assert scheduler.nbytes <= model.new_cache(1, 600).nbytes


@pytest.mark.parametrize("when", ["waiting", "in prefill", "one of the samples"])
def test_what_is_cancelled_before_its_first_token_is_never_read(when):
    scheduler = Scheduler(ENGINES[None], token_budget=8)
    (first,) = scheduler.add(asked(LONG[:3], 12))
    expected = finish(scheduler)[0]
    (first,) = scheduler.add(asked(LONG[:3], 12))
    scheduler.step()
    late = scheduler.add(asked(LONG, 4, n=2, temperature=1.0))
    if when != "waiting":
        scheduler.step()
        assert 0 < scheduler.prefill_tokens < 46
    if when == "one of the samples":
        late = late[:1]
    for sequence in late:
        scheduler.cancel(sequence)
    rest = finish(scheduler)
    assert len(expected) == 12
    assert rest[first.index] == expected[-len(rest[first.index]) :]
    assert (len(rest) == 2) == (when == "one of the samples")
    assert scheduler.nbytes == 0


class Counting:
    """An engine without a model: the next token is the last plus one."""

    def __init__(self) -> None:
        self.config, self.device = MODEL.config, torch.device("cpu")

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        return KVCache(self.config, rows, capacity)

    def forward(self, ids, cache, *, attention_mask=None, logits="last"):
        n_new = attention_mask.sum(-1) if attention_mask is not None else [ids.shape[1]] * len(ids)
        cache.reserve(ids.shape[1])
        cache.advance([int(n) for n in n_new])
        last = torch.tensor([row[int(n) - 1] for row, n in zip(ids.tolist(), n_new, strict=True)])
        scores = torch.nn.functional.one_hot((last + 1) % VOCABULARY, VOCABULARY).float()
        return LlamaOutput(scores, scores)


def test_ten_thousand_short_sequences_pass_through_bounded_memory():
    scheduler = Scheduler(Counting(), token_budget=64, prefix_cache=PrefixCache(100_000))
    source = random.Random(0)
    n_added = n_tokens = most = 0
    while n_added < 10_000 or scheduler.is_busy:
        while n_added < 10_000 and len(scheduler.waiting) < 20:
            ids = [source.randrange(VOCABULARY) for _ in range(source.randrange(1, 12))]
            (sequence,) = scheduler.add(asked(ids, source.randrange(1, 6)))
            n_added += 1
        for token in scheduler.step():
            n_tokens += 1
            assert token.id is not None
        most = max(most, scheduler.nbytes)
    assert n_tokens > 20_000
    assert sequence.has_ended
    # Rows for 64 sequences, once doubled, and 20 that are being read; 2 layers, 2 heads of 8.
    assert most <= 150 * CONTEXT * 2 * 2 * 2 * 8 * 4
    assert scheduler.nbytes == 0
    assert scheduler.prefix_cache.nbytes <= 100_000


@pytest.mark.parametrize("at", ["forbid", "accept"])
def test_a_sequence_that_fails_ends_alone(at):
    scheduler = Scheduler(ENGINES[None])
    scheduler.add(asked(LONG[:5], 6))
    options = GenerationOptions(max_new_tokens=9)
    (bad,) = scheduler.add(
        request_of(LONG[:4], options, make_constraint=lambda: Fails(3, at), name="it")
    )
    tokens: list[list[Any]] = [[], []]
    while scheduler.is_busy:
        for token in scheduler.step():
            tokens[token.row].append(token)
    assert [token.id for token in tokens[0]] == tokens_of(LONG[:5], 6)
    assert [token.finish_reason for token in tokens[1]] == [None, None, "error"]
    assert tokens[1][-1].id is None
    assert "too difficult" in str(bad.error)
    with pytest.raises(OptionError, match="too difficult"):
        list(Decoder(MODEL, [LONG[:4]], options, make_constraint=lambda: Fails(3, at)))


@pytest.mark.parametrize("number", range(2, 9))
def test_a_step_that_fails_may_be_tried_again(number, monkeypatch):
    expected = [tokens_of(LONG[:5], 8), tokens_of(LONG[:20], 4)]
    scheduler, own, calls = Scheduler(ENGINES[None], token_budget=6), ENGINES[None].forward, []

    def fails(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            raise MemoryError
        return own(*arguments, **options)

    monkeypatch.setattr(scheduler.engine, "forward", fails, raising=False)
    scheduler.add(asked(LONG[:5], 8))
    scheduler.add(asked(LONG[:20], 4))
    found: dict[int, list[int]] = {0: [], 1: []}
    failures = 0
    while scheduler.is_busy:
        try:
            tokens = scheduler.step()
        except MemoryError:
            failures += 1
            continue
        for token in tokens:
            found[token.row].append(token.id)
    assert failures == 1
    assert list(found.values()) == expected


def test_a_callers_cache_is_continued_without_company():
    scheduler, cache = Scheduler(ENGINES[None]), ENGINES[None].new_cache(1, 4)
    (sequence,) = scheduler.add(asked(LONG[:6], 9), cache=cache)
    with pytest.raises(MinllamaError, match="runs alone"):
        scheduler.add(asked([1], 2))
    scheduler.step(), scheduler.step()
    assert cache.lengths == [len(sequence.ids) - 1] == [7]
    scheduler.cancel(sequence)
    scheduler.add(asked([1], 2))
    with pytest.raises(MinllamaError, match="runs alone"):
        scheduler.add(asked(LONG, 2), cache=cache)
    assert len(finish(scheduler)) == 1
    assert cache.lengths == [7]


def test_a_model_that_has_changed_is_refused():
    model = our_model()
    scheduler = Scheduler(engine_for(model))
    scheduler.add(asked([1, 2], 4))
    with torch.no_grad():
        model.norm.weight.mul_(2)
    with pytest.raises(MinllamaError, match="the model has changed since its engine was opened"):
        scheduler.step()


# ------------------------------------------------------------------------------ shared prefixes


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("budget", [None, 7])
def test_a_hit_and_a_miss_give_the_same_tokens(backend, budget):
    scheduler = Scheduler(ENGINES[backend], token_budget=budget, prefix_cache=PrefixCache(10**8))
    prompts = [LONG, [*LONG[:25], 3, 3], LONG[:30], LONG, [*LONG, 5], LONG[:1]]
    n_read = []
    for ids in prompts:
        before = scheduler.prefill_tokens
        (sequence,) = scheduler.add(asked(ids, 8, logprobs=1))
        expected = Case(ids, GenerationOptions(max_new_tokens=8, logprobs=1)).alone(ENGINES[None])
        found = []
        while scheduler.is_busy:
            found += scheduler.step()
        assert_same_tokens(found, expected[0])
        n_read.append(scheduler.prefill_tokens - before)
        assert sequence.cached_tokens == len(ids) - n_read[-1]
    # The last token of a prompt is always read.
    assert n_read == [40, 2, 1, 1, 1, 1]


def test_an_answer_is_found_by_the_prompt_that_goes_on_after_it():
    scheduler = Scheduler(ENGINES[None], prefix_cache=PrefixCache(10**8))
    (first,) = scheduler.add(asked(LONG[:9], 10))
    finish(scheduler)
    before = scheduler.prefill_tokens
    scheduler.add(asked([*first.ids, 4, 5], 3))
    finish(scheduler)
    assert scheduler.prefill_tokens - before == 3  # its last token was never read
    assert len(scheduler.prefix_cache) == 1


def test_prompts_of_different_hits_begin_together_as_far_as_the_context_allows():
    scheduler = Scheduler(ENGINES[None], prefix_cache=PrefixCache(10**8))
    scheduler.add(asked(LONG, 1))
    finish(scheduler)
    requests = [[*LONG, 9, 9], [7] * 50, [*LONG[:20], 8], [5] * 3]
    for ids in requests:
        scheduler.add(asked(ids, 4))
    found = finish(scheduler)
    assert [found[i + 1] for i in range(4)] == [tokens_of(ids, 4) for ids in requests]


def test_callers_of_another_salt_learn_nothing():
    scheduler = Scheduler(ENGINES[None], prefix_cache=PrefixCache(10**8))
    for salt, expected in (("a", 40), ("b", 40), ("a", 1), ("", 40)):
        before = scheduler.prefill_tokens
        scheduler.add(request_of(LONG, GenerationOptions(max_new_tokens=2), salt=salt))
        finish(scheduler)
        assert scheduler.prefill_tokens - before == expected


def entry(length: int) -> KVCache:
    cache = ENGINES[None].new_cache(2, 64)
    cache.lengths = [0, length]
    return cache


def test_the_least_recently_used_prefix_goes_first():
    per_token = ENGINES[None].new_cache(1, 1).nbytes
    known = PrefixCache(per_token * 30)
    first, second, third = [1] * 10, [2] * 15, [3] * 12
    for ids in (first, second):
        known.put(ids, entry(len(ids)), 1)
    assert known.nbytes == per_token * 25
    assert known.find([*first, 9])[1] == 10
    known.put(third, entry(12), 1)
    assert known.find([*second, 9]) is None
    assert known.find([*first, 9])[1] == 10
    assert known.find(third)[1] == 11
    known.put([4] * 31, entry(31), 1)  # more than all
    assert len(known) == 2
    known.clear()
    assert (len(known), known.nbytes) == (0, 0)
    with pytest.raises(OptionError, match="must be 0 or more, not -1"):
        PrefixCache(-1)


def test_an_entry_that_another_one_continues_is_replaced_by_it():
    known = PrefixCache(10**9)
    known.put([1, 2, 3], entry(3), 1)
    known.put([1, 2, 3, 4], entry(4), 1)
    known.put([1, 2], entry(2), 1)
    known.put([1, 2, 3], entry(3), 1, salt="other")
    assert len(known) == 2
    assert known.find([1, 2, 3, 4, 5])[1] == 4


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8])
def test_common_length_is_found_by_halving(length):
    assert common_length([1] * length + [2] * 3, [1] * length + [3] * 9) == length
    assert common_length([1] * length, [1] * 9) == length
