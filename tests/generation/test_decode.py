"""The decode loop on token ids: batches, samples, ends and timings."""

import pytest
import torch

from minllama.engine.cpu import CpuEngine
from minllama.errors import MinllamaError
from minllama.generation.decode import Decoder
from minllama.model.kv_cache import KVCache
from minllama.options import GenerationOptions
from tests.tiny import our_model, random_ids

PROMPTS = [random_ids(1, n, seed=n)[0].tolist() for n in (3, 11, 1, 7, 11)]


def decode(model, prompts, *, stop_ids=(), cache=None, **options):
    """Row -> its tokens, and row -> why it ended."""
    decoder = Decoder(model, prompts, GenerationOptions(**options), stop_ids=stop_ids, cache=cache)
    ids, reasons = {}, {}
    for step in decoder:
        for token in step:
            assert token.row not in reasons, "a token after the end"
            ids.setdefault(token.row, []).append(token.id)
            if token.finish_reason:
                reasons[token.row] = token.finish_reason
    return ids, reasons


@pytest.fixture(params=[False, True], ids=["", "ahead"])
def ahead(request, monkeypatch):
    """Also with the next step computed before a token is seen, as on a GPU."""
    monkeypatch.setattr(
        "minllama.generation.decode._pays_to_run_ahead", lambda device: request.param
    )


def greedy_without_cache(model, prompt, n):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


def test_cached_equals_uncached(ahead):
    model = our_model()
    ids, reasons = decode(model, [PROMPTS[1]], max_new_tokens=20)
    assert ids[0] == greedy_without_cache(model, PROMPTS[1], 20)
    assert reasons == {0: "length"}


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "seed": 5}, {"repetition_penalty": 1.5}]
)
def test_a_batch_of_different_lengths_equals_each_prompt_alone(options, ahead):
    model = our_model()
    batch, _ = decode(model, PROMPTS, max_new_tokens=20, **options)
    for row, prompt in enumerate(PROMPTS):
        assert batch[row] == decode(model, [prompt], max_new_tokens=20, **options)[0][0]


def test_rows_that_end_early_leave_the_others_as_they_are(ahead):
    model = our_model()
    free, _ = decode(model, PROMPTS, max_new_tokens=20)
    stop_ids = {free[1][4], free[3][2], free[0][9]}
    stopped, reasons = decode(model, PROMPTS, max_new_tokens=20, stop_ids=stop_ids)
    assert "stop" in reasons.values()
    for row, ids in free.items():
        ends = [i for i, token_id in enumerate(ids) if token_id in stop_ids]
        expected = ids[: ends[0] + 1] if ends else ids
        assert stopped[row] == expected
        assert reasons[row] == ("stop" if ends else "length")


def test_ignore_eos_goes_on():
    model = our_model()
    free, _ = decode(model, [PROMPTS[0]], max_new_tokens=9)
    on, reasons = decode(
        model, [PROMPTS[0]], max_new_tokens=9, stop_ids=[free[0][3]], ignore_eos=True
    )
    assert on == free
    assert reasons == {0: "length"}


def test_samples_of_a_prompt_share_its_prefill_and_differ(ahead, monkeypatch):
    model = our_model()
    shapes, forward = [], CpuEngine.forward

    def seen(self, ids, *args, **options):
        shapes.append(ids.shape)
        return forward(self, ids, *args, **options)

    monkeypatch.setattr(CpuEngine, "forward", seen)
    ids, _ = decode(model, PROMPTS[:2], n=3, temperature=1.0, seed=1, max_new_tokens=8)
    assert shapes[0] == (2, 11)
    assert shapes[1] == (6, 1)
    assert sorted(ids) == [0, 1, 2, 3, 4, 5]
    assert len({tuple(ids[row]) for row in range(3)}) == 3
    alone, _ = decode(model, PROMPTS[1:2], n=3, temperature=1.0, seed=1, max_new_tokens=8)
    assert [ids[row] for row in (3, 4, 5)] == [alone[row] for row in (0, 1, 2)]


def test_greedy_samples_of_a_prompt_are_alike():
    ids, _ = decode(our_model(), PROMPTS[:2], n=2, max_new_tokens=8)
    assert ids[0] == ids[1]
    assert ids[2] == ids[3]


def test_without_a_seed_equal_prompts_draw_different_samples():
    ids, _ = decode(our_model(), [PROMPTS[0]] * 2, temperature=2.0, max_new_tokens=20)
    assert ids[0] != ids[1]


def test_generation_ends_cleanly_at_the_end_of_the_context():
    model = our_model(max_seq_len=16)
    prompts = [random_ids(1, n)[0].tolist() for n in (16, 13, 2)]
    ids, reasons = decode(model, prompts, max_new_tokens=8)
    assert ids[0] == [None]
    assert len(ids[1]) == 3
    assert len(ids[2]) == 8
    assert set(reasons.values()) == {"length"}
    assert decode(model, prompts[:1], n=2, max_new_tokens=8)[1] == {0: "length", 1: "length"}


def test_logprobs_are_the_models_own():
    model = our_model()
    options = GenerationOptions(max_new_tokens=5, temperature=0.5, top_k=3, seed=0, logprobs=4)
    tokens = [step[0] for step in Decoder(model, [PROMPTS[1]], options)]
    ids = [*PROMPTS[1], *(token.id for token in tokens)]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for place, token in enumerate(tokens, start=len(PROMPTS[1]) - 1):
        assert token.logprob == pytest.approx(expected[place, token.id].item(), abs=1e-5)
        values, best = expected[place].topk(4)
        assert [i for i, _ in token.alternatives] == best.tolist()
        assert [p for _, p in token.alternatives] == pytest.approx(values.tolist(), abs=1e-5)


def test_a_cache_that_holds_the_beginning_is_continued():
    model = our_model()
    cache = KVCache(model.config, 1, 64)
    first, _ = decode(model, [PROMPTS[1]], cache=cache, max_new_tokens=4)
    longer = [*PROMPTS[1], *first[0], 3, 4]
    assert cache.lengths == [len(PROMPTS[1]) + 3]
    continued, _ = decode(model, [longer], cache=cache, max_new_tokens=6)
    assert continued == decode(model, [longer], max_new_tokens=6)[0]


def test_a_small_cache_grows_as_the_texts_do(monkeypatch):
    monkeypatch.setattr("minllama.generation.decode._ROOM", 1)
    model = our_model()
    grown = decode(model, PROMPTS, max_new_tokens=40)
    monkeypatch.undo()
    assert grown == decode(model, PROMPTS, max_new_tokens=40)
    cache = KVCache(model.config, 1, 1)
    small, _ = decode(model, PROMPTS[:1], cache=cache, max_new_tokens=40)
    assert small[0] == grown[0][0]
    assert cache.lengths == [len(PROMPTS[0]) + 39]


def test_a_generous_limit_costs_no_memory_before_it_is_used():
    model = our_model(max_seq_len=100_000)
    decoder = Decoder(model, [[1]], GenerationOptions(max_new_tokens=90_000))
    next(iter(decoder))
    assert decoder._cache.capacity < 1000


def test_a_cache_of_another_prompt_is_refused():
    model = our_model()
    full = KVCache(model.config, 1, 9)
    full.lengths = [3]
    for prompts, cache, message in (
        (PROMPTS[:1], full, "holds 3 tokens, and must be shorter than the prompt of 3"),
        (PROMPTS[:2], full, "one prompt and one sample, not of 1 rows for 2 prompts"),
        (PROMPTS[:1], KVCache(model.config, 2, 9), "not of 2 rows for 1 prompts"),
    ):
        with pytest.raises(MinllamaError, match=message):
            Decoder(model, prompts, GenerationOptions(), cache=cache)


def test_ids_beyond_the_tokenizer_are_never_chosen():
    model = our_model()
    options = GenerationOptions(temperature=50.0, seed=0, max_new_tokens=50)
    ids = [step[0].id for step in Decoder(model, [[1]], options, n_tokens=7)]
    assert set(ids) == set(range(7))


def test_finish_takes_a_row_out():
    decoder = Decoder(our_model(), PROMPTS, GenerationOptions(max_new_tokens=6))
    rows = []
    for step in decoder:
        rows.append(sorted(token.row for token in step))
        if len(rows) == 2:
            decoder.finish(1)
            decoder.finish(4)
    assert rows == [[0, 1, 2, 3, 4]] * 2 + [[0, 2, 3]] * 4


def test_timings_count_tokens_of_both_phases():
    decoder = Decoder(our_model(), PROMPTS[:2], GenerationOptions(max_new_tokens=6))
    for _ in decoder:
        pass
    assert decoder.timings.prefill_tokens == 14
    assert decoder.timings.decode_tokens == 10
    assert decoder.timings.prefill_seconds > 0
    assert decoder.timings.decode_rate > 0


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 2 of 2 is empty"),
        ([[]], "the prompt is empty"),
        ([[1] * 65], "the prompt has 65 tokens and the model's context is 64"),
        ([[1, 61]], "holds the token id 61, and the model knows 0 to 60"),
        ([[-1]], "holds the token id -1"),
    ],
)
def test_bad_prompts_are_refused_before_any_work(prompts, message, monkeypatch):
    model = our_model()
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(MinllamaError, match=message):
        Decoder(model, prompts, GenerationOptions())


@pytest.mark.parametrize("stops_at", [2, 4, None])
def test_who_owns_a_cache_finds_all_but_the_last_token_in_it(stops_at, ahead):
    """However the text ended: by a token, by who read it, or by its limit."""
    model = our_model()
    free, _ = decode(model, [PROMPTS[1]], max_new_tokens=6)
    cache = model.new_cache(1, 40)
    stop_ids = [free[0][stops_at]] if stops_at == 2 else []
    options = GenerationOptions(max_new_tokens=6)
    decoder = Decoder(model, [PROMPTS[1]], options, stop_ids=stop_ids, cache=cache)
    for number, _ in enumerate(decoder):
        if stops_at == 4 and number == stops_at:
            decoder.finish(0)
    n_tokens = {2: free[0].index(free[0][2]) + 1, 4: 5, None: 6}[stops_at]
    assert cache.lengths == [len(PROMPTS[1]) + n_tokens - 1]
    again, _ = decode(
        model, [PROMPTS[1] + free[0][:n_tokens]], max_new_tokens=6 - n_tokens + 2, cache=cache
    )
    assert again[0][: 6 - n_tokens] == free[0][n_tokens:]


def test_a_generation_that_is_left_leaves_its_cache_in_order(ahead):
    model = our_model()
    cache = model.new_cache(1, 40)
    steps = iter(Decoder(model, [PROMPTS[1]], GenerationOptions(max_new_tokens=9), cache=cache))
    for _ in range(3):
        next(steps)
    steps.close()
    assert cache.lengths == [len(PROMPTS[1]) + 2]


def test_between_two_tokens_a_cache_is_as_its_owner_expects(ahead):
    model = our_model()
    cache = model.new_cache(1, 40)
    for number, _ in enumerate(
        Decoder(model, [PROMPTS[1]], GenerationOptions(max_new_tokens=5), cache=cache)
    ):
        assert cache.lengths == [len(PROMPTS[1]) + number]


def test_a_generation_that_nobody_reads_any_more_leaves_the_cache_to_the_next(ahead):
    model = our_model()
    free, _ = decode(model, [PROMPTS[1]], max_new_tokens=9)
    cache = model.new_cache(1, 40)
    first = iter(Decoder(model, [PROMPTS[1]], GenerationOptions(max_new_tokens=9), cache=cache))
    for _ in range(3):
        next(first)
    second = iter(
        Decoder(model, [PROMPTS[1] + free[0][:3]], GenerationOptions(max_new_tokens=6), cache=cache)
    )
    found = [next(second)[0].id for _ in range(4)]
    first.close()
    found += [step[0].id for step in second]
    assert found == free[0][3:]


def test_the_next_step_begins_before_a_token_is_seen(monkeypatch):
    monkeypatch.setattr("minllama.generation.decode._pays_to_run_ahead", lambda device: True)
    model = our_model()
    passes, forward = [], CpuEngine.forward

    def counted(self, *args, **options):
        passes.append(1)
        return forward(self, *args, **options)

    monkeypatch.setattr(CpuEngine, "forward", counted)
    seen = []
    for _ in Decoder(model, [PROMPTS[0]], GenerationOptions(max_new_tokens=5)):
        seen.append(len(passes))
    # The first token waits for nothing else; the last has nothing after it.
    assert seen == [1, 3, 4, 5, 5]


def test_numbers_that_are_none_are_refused_when_they_arrive(ahead):
    model = our_model()
    steps = iter(Decoder(model, [PROMPTS[0]], GenerationOptions(max_new_tokens=9)))
    next(steps), next(steps)
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(MinllamaError, match="NaN or infinite"):
        list(steps)
