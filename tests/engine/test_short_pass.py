"""A decoder's steps, of which most is known beforehand, are those that look all of it up."""

import copy
import pickle

import pytest
import torch

from minllama import GenerationOptions
from minllama.engine.cpu import NativeStep
from minllama.errors import MinllamaError
from minllama.generation.decode import Decoder
from minllama.generation.sampling import SamplingOptions, choose_tokens
from minllama.kernels.cpu.library import library
from minllama.model.config import RopeScaling
from minllama.model.llama import load_pretrained
from tests.tiny import VARIANTS, our_model, random_ids

pytestmark = pytest.mark.skipif(
    library() is None, reason="minllama was installed without a C++ compiler"
)
SHAPE = {"dim": 64, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 61}
LENGTHS = (5, 3, 1)


@pytest.fixture
def quick_steps(monkeypatch):
    """How many rows each quick step has read so far."""
    rows, own = [], NativeStep.next_logits

    def counted(self, ids, cache, table):
        rows.append(len(ids))
        return own(self, ids, cache, table)

    monkeypatch.setattr(NativeStep, "next_logits", counted)
    return rows


def begun(model, lengths=LENGTHS, capacity=16):
    """A cache of rows of these lengths."""
    ids = random_ids(len(lengths), max(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(-1)
    cache = model.new_cache(len(lengths), capacity)
    model(ids, attention_mask=mask, cache=cache, logits=None)
    return cache


def continued(model, cache, *, is_steady, n=3, dtype=torch.int64):
    """What n passes of a token for each row give, and the lengths after each."""
    found = []
    for seed in range(n):
        ids = random_ids(cache.batch_size, 1, seed=seed).to(dtype)
        cache.is_steady = is_steady
        out = model(ids, cache=cache, logits="last")
        cache.is_steady = False
        found.append((out.hidden, out.logits, list(cache.lengths)))
    return found


def assert_same(found, expected):
    for (hidden, logits, lengths), (hidden_2, logits_2, lengths_2) in zip(
        found, expected, strict=True
    ):
        assert torch.equal(hidden, hidden_2)
        assert torch.equal(logits, logits_2)
        assert hidden.dtype == hidden_2.dtype
        assert lengths == lengths_2


@pytest.mark.parametrize("lengths", [(4,), (2, 2), LENGTHS])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int4"])
def test_a_quick_step_is_the_other_to_the_bit(kind, lengths, quick_steps, tmp_path):
    model = our_model(**SHAPE)
    if kind == "int4":
        model.save_pretrained(tmp_path / "model")
        model = load_pretrained(tmp_path / "model", quantize=kind, dtype="float32")
    else:
        model = model.to(getattr(torch, kind))
    with torch.inference_mode():
        expected = continued(model, begun(model, lengths), is_steady=False)
        assert not quick_steps
        assert_same(continued(model, begun(model, lengths), is_steady=True), expected)
    assert quick_steps == [len(lengths)] * 3


@pytest.mark.parametrize("changes", VARIANTS)
def test_of_every_variant(changes, quick_steps):
    model = our_model(**{**SHAPE, **changes})
    with torch.inference_mode():
        expected = continued(model, begun(model), is_steady=False)
        assert_same(continued(model, begun(model), is_steady=True), expected)
    assert len(quick_steps) == 3


def test_ids_may_be_int32(quick_steps):
    model = our_model(**SHAPE)
    with torch.inference_mode():
        expected = continued(model, begun(model), is_steady=False)
        assert_same(continued(model, begun(model), is_steady=True, dtype=torch.int32), expected)
    assert len(quick_steps) == 3


@pytest.mark.parametrize("way", ["grow", "drop_row", "replace", "copy", "pickle", "repeated"])
def test_a_cache_that_lies_elsewhere_is_found_there(way, quick_steps):
    model = our_model(**SHAPE)

    def other(cache):
        if way == "grow":
            cache.grow(24)
        elif way == "drop_row":
            cache.drop_row(0)
        elif way == "replace":
            cache.keys[1] = cache.keys[1].clone()
            cache.values[0] = cache.values[0].clone()
        elif way == "copy":
            cache = copy.deepcopy(cache)
        elif way == "pickle":
            cache = pickle.loads(pickle.dumps(cache))
        else:
            cache = cache.repeated(2, 20)
        return cache

    def passes(is_steady):
        cache = begun(model)
        found = continued(model, cache, is_steady=is_steady)
        moved = other(cache)
        found += continued(model, moved, is_steady=is_steady)
        if moved is not cache:  # which nobody else has written to
            found += continued(model, cache, is_steady=is_steady)
        return found

    with torch.inference_mode():
        assert_same(passes(True), passes(False))
    assert quick_steps


def test_what_is_not_for_a_quick_step_goes_its_way(quick_steps):
    scaling = RopeScaling("dynamic", 2.0)
    model = our_model(**SHAPE)
    with torch.inference_mode():
        cache = begun(model)
        cache.is_steady = True
        model(random_ids(3, 1), cache=cache, logits="all")
        model(random_ids(3, 2), cache=cache, logits="last")
        model(random_ids(3, 1), cache=cache, logits=None)
        model(random_ids(3, 1), cache=cache, logits=torch.zeros(3, 1, dtype=torch.long))
        mask = torch.ones(3, 1, dtype=torch.bool)
        model(random_ids(3, 1), cache=cache, logits="last", attention_mask=mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(random_ids(3, 1), cache=cache, logits="last")
        empty = model.new_cache(1, 4)
        empty.is_steady = True
        model(random_ids(1, 1), cache=empty, logits="last")
        assert not quick_steps
        longer = our_model(**SHAPE, max_seq_len=6, rope_scaling=scaling)
        expected = continued(longer, begun(longer), is_steady=False)
        assert_same(continued(longer, begun(longer), is_steady=True), expected)
    assert len(quick_steps) == 1  # up to max_seq_len rotations do not depend on the text


@pytest.mark.parametrize("bad", [-1, 61])
def test_ids_out_of_the_vocabulary_are_refused(bad):
    model = our_model(**SHAPE)
    with torch.inference_mode():
        cache = begun(model)
        continued(model, cache, is_steady=True)
        cache.is_steady = True
        with pytest.raises(MinllamaError, match="token ids must be from 0 to 60"):
            model(torch.tensor([[1], [bad], [2]]), cache=cache, logits="last")


def test_a_full_cache_and_other_rows_are_refused():
    model = our_model(**SHAPE)
    with torch.inference_mode():
        cache = begun(model, capacity=8)
        continued(model, cache, is_steady=True)
        cache.is_steady = True
        with pytest.raises(MinllamaError, match="the cache holds 8 tokens a row"):
            model(random_ids(3, 1), cache=cache, logits="last")
        with pytest.raises(MinllamaError, match="2 rows of ids for a cache of 3 rows"):
            model(random_ids(2, 1), cache=cache, logits="last")


@pytest.mark.parametrize("where", ["module", "everywhere"])
def test_a_hook_that_is_hung_up_in_the_midst_of_a_text_is_heard(where, quick_steps):
    model, heard = our_model(**SHAPE), []
    decoder = iter(Decoder(model, [[1, 2, 3]], GenerationOptions(max_new_tokens=8)))
    for _ in range(3):
        next(decoder)
    assert len(quick_steps) == 2

    def listen(module, *_):
        heard.append(module)

    if where == "module":
        handle = model.layers[1].register_forward_hook(listen)
    else:
        handle = torch.nn.modules.module.register_module_forward_hook(listen)
    try:
        next(decoder)
    finally:
        handle.remove()
    assert heard
    assert len(quick_steps) == 2
    next(decoder)
    assert len(quick_steps) == 3


def test_weights_that_are_replaced_in_the_midst_of_a_text_are_seen():
    """By what a module has for it; a decoder does not look for other ways."""
    model = our_model(**SHAPE)
    with torch.inference_mode():
        cache = begun(model)
        continued(model, cache, is_steady=True)
        model.load_state_dict({n: 2 * x for n, x in model.state_dict().items()}, assign=True)
        again = copy.deepcopy(cache)
        expected = continued(model, again, is_steady=False)
        assert_same(continued(model, cache, is_steady=True), expected)


def test_weights_that_are_replaced_before_a_long_pass_are_seen_behind_it(monkeypatch):
    """As between two turns of a conversation, of which the second begins with a long message."""
    monkeypatch.setattr("minllama.engine.cpu.MOST_TOKENS", 4)
    model = our_model(**SHAPE)
    with torch.inference_mode():
        cache = begun(model)
        continued(model, cache, is_steady=True)
    w1 = model.layers[0].feed_forward.w1
    w1.weight = torch.nn.Parameter(w1.weight.detach() * 2)
    with torch.inference_mode():
        model(random_ids(3, 2), cache=cache, logits=None)
        again = copy.deepcopy(cache)
        expected = continued(model, again, is_steady=False)
        assert_same(continued(model, cache, is_steady=True), expected)


def test_the_likeliest_of_each_row_is_the_first_of_equal_ones_and_a_number():
    logits = torch.randn(9, 1024, generator=torch.Generator().manual_seed(0))
    logits[1, 700] = logits[1, 900] = logits[1, 3] = 9.0  # the first of equal ones
    logits[2, 511], logits[3, 512], logits[4, 0], logits[5, 1023] = 9.0, 9.0, 9.0, 9.0
    logits[6] = -torch.inf
    logits[6, 800] = -3.0
    logits[7, 600] = torch.nan
    logits[8, 40] = torch.inf
    chosen = choose_tokens(logits, SamplingOptions(temperature=0.0), [])
    assert chosen[1:].tolist() == [3, 511, 512, 0, 1023, 800, -1, -1]
    assert chosen[0] == logits[0].argmax()
