"""Decode steps of the engine for CPUs are its other passes, and engines refuse changed models."""

import copy
import pickle

import pytest
import torch
from torch import nn

from minllama import AdamW, add_lora_wrapper
from minllama.engine.choose import engine_for
from minllama.engine.cpu import NativeStep
from minllama.engine.support import Snapshot
from minllama.errors import MinllamaError, OptionError
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


def begun(engine, lengths=LENGTHS, capacity=16):
    """A cache of sequences of these lengths."""
    ids = random_ids(len(lengths), max(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(-1)
    cache = engine.new_cache(len(lengths), capacity)
    engine.forward(ids, cache, attention_mask=mask, logits=None)
    return cache


def continued(engine, cache, *, quick, n=3, dtype=torch.int64):
    """What n decode steps give, and the lengths after each; or the passes of the long way."""
    found = []
    for seed in range(n):
        ids = random_ids(cache.batch_size, 1, seed=seed).to(dtype)
        out = engine.forward(ids, cache) if quick else engine._short_pass(ids, cache, None, "last")
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
def test_a_decode_step_is_a_short_pass_to_the_bit(kind, lengths, quick_steps, tmp_path):
    model = our_model(**SHAPE)
    if kind == "int4":
        model.save_pretrained(tmp_path / "model")
        model = load_pretrained(tmp_path / "model", quantize=kind, dtype="float32")
    else:
        model = model.to(getattr(torch, kind))
    engine = engine_for(model)
    assert engine.backend == "cpu"
    expected = continued(engine, begun(engine, lengths), quick=False)
    assert not quick_steps
    assert_same(continued(engine, begun(engine, lengths), quick=True), expected)
    assert quick_steps == [len(lengths)] * 3


@pytest.mark.parametrize("changes", VARIANTS)
def test_of_every_variant(changes, quick_steps):
    engine = engine_for(our_model(**{**SHAPE, **changes}))
    expected = continued(engine, begun(engine), quick=False)
    assert_same(continued(engine, begun(engine), quick=True), expected)
    assert len(quick_steps) == 3


def test_ids_may_be_int32(quick_steps):
    engine = engine_for(our_model(**SHAPE))
    expected = continued(engine, begun(engine), quick=False)
    assert_same(continued(engine, begun(engine), quick=True, dtype=torch.int32), expected)
    assert len(quick_steps) == 3


@pytest.mark.parametrize("way", ["grow", "drop_row", "replace", "copy", "pickle", "repeated"])
def test_a_cache_that_lies_elsewhere_is_found_there(way, quick_steps):
    engine = engine_for(our_model(**SHAPE))

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

    def passes(quick):
        cache = begun(engine)
        found = continued(engine, cache, quick=quick)
        moved = other(cache)
        found += continued(engine, moved, quick=quick)
        if moved is not cache:  # which nobody else has written to
            found += continued(engine, cache, quick=quick)
        return found

    assert_same(passes(True), passes(False))
    assert quick_steps


def test_other_passes_are_no_decode_steps(quick_steps):
    model = our_model(**SHAPE)
    engine = engine_for(model)
    cache = begun(engine)
    engine.forward(random_ids(3, 1), cache, logits="all")
    engine.forward(random_ids(3, 2), cache)
    engine.forward(random_ids(3, 1), cache, logits=None)
    engine.forward(random_ids(3, 1), cache, attention_mask=torch.ones(3, 1, dtype=torch.bool))
    engine.forward(random_ids(1, 1), engine.new_cache(1, 4))
    assert not quick_steps
    scaling = RopeScaling("dynamic", 2.0)
    longer = engine_for(our_model(**SHAPE, max_seq_len=6, rope_scaling=scaling))
    expected = continued(longer, begun(longer), quick=False)
    assert_same(continued(longer, begun(longer), quick=True), expected)
    assert len(quick_steps) == 1  # up to max_seq_len rotations do not depend on the text


@pytest.mark.parametrize("bad", [-1, 61])
def test_ids_out_of_the_vocabulary_are_refused(bad):
    engine = engine_for(our_model(**SHAPE))
    cache = begun(engine)
    with pytest.raises(MinllamaError, match="token ids must be from 0 to 60"):
        engine.forward(torch.tensor([[1], [bad], [2]]), cache)


def test_a_full_cache_and_other_rows_are_refused():
    engine = engine_for(our_model(**SHAPE))
    cache = begun(engine, capacity=8)
    continued(engine, cache, quick=True)
    with pytest.raises(MinllamaError, match="the cache has room for 8 tokens per sequence"):
        engine.forward(random_ids(3, 1), cache)
    with pytest.raises(MinllamaError, match="2 sequences for a cache of 3"):
        engine.forward(random_ids(2, 1), cache)


def replace_a_weight(model):
    w1 = model.layers[0].feed_forward.w1
    w1.weight = nn.Parameter(w1.weight.detach() * 2)


def write_to_a_weight(model):
    with torch.no_grad():
        model.norm.weight.mul_(2)


def take_a_training_step(model):
    optimizer = AdamW(model.parameters(), lr=0.1)
    model(random_ids(1, 3)).logits.sum().backward()
    optimizer.step()


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrize_the_norm(model):
    nn.utils.parametrize.register_parametrization(model.norm, "weight", Twice())


def give_a_bias(model):
    model.layers[1].feed_forward.w1.bias = nn.Parameter(torch.randn(96))


def put_a_module_in(model):
    model.layers[1].feed_forward.w1 = nn.Linear(64, 96, bias=False)


def load_into_its_owner(model):
    owner = nn.Sequential(model)
    state = {name: 2 * x for name, x in owner.state_dict().items()}
    owner.load_state_dict(state, assign=True)


CHANGES = {
    "parametrized": parametrize_the_norm,
    "a bias": give_a_bias,
    "a module": put_a_module_in,
    "loaded into its owner": load_into_its_owner,
    "replaced": replace_a_weight,
    "written to": write_to_a_weight,
    "trained": take_a_training_step,
    "loaded": lambda m: m.load_state_dict({n: 2 * x for n, x in m.state_dict().items()}),
    "assigned": lambda m: m.load_state_dict(
        {n: 2 * x for n, x in m.state_dict().items()}, assign=True
    ),
    "converted": lambda m: m.bfloat16(),
    "other data": lambda m: setattr(m.norm.weight, "data", m.norm.weight.data * 2),
    "a layer less": lambda m: m.layers.pop(1),
    "an adapter": lambda m: add_lora_wrapper(m, r=2),
    "a hook": lambda m: m.layers[1].register_forward_hook(lambda *_: None),
    "training mode": lambda m: m.train(),
    "a forward of its own": lambda m: setattr(m.layers[0], "forward", m.layers[0].forward),
}


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("how", CHANGES)
def test_an_engine_refuses_a_model_that_has_changed(how, backend):
    model = our_model(**SHAPE)
    engine = engine_for(model, backend)
    begun(engine)
    CHANGES[how](model)
    with pytest.raises(MinllamaError, match=r"changed since its engine was opened: open another"):
        begun(engine)
    again = engine_for(model)
    assert again.backend == ("cpu" if how in UNHARMED else "eager")
    begun(again)


UNHARMED = {
    *("replaced", "written to", "trained", "loaded", "assigned", "other data", "converted"),
    *("training mode", "a bias", "a module", "loaded into its owner"),
}


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_only_passes_over_a_prompt_look_for_changes(backend, monkeypatch):
    looked = []
    monkeypatch.setattr(Snapshot, "check", lambda snapshot: looked.append(snapshot))
    engine = engine_for(our_model(**SHAPE), backend)
    cache = begun(engine)
    assert len(looked) == 1
    engine.forward(random_ids(3, 1), cache)
    engine.forward(random_ids(3, 4), cache, logits="all")  # draft tokens
    assert len(looked) == 1
    engine.forward(random_ids(3, 2), cache)  # the next turn of a conversation
    assert len(looked) == 2


def test_hooks_that_are_removed_again_are_no_change():
    model = our_model(**SHAPE)
    engine = engine_for(model)
    model.layers[1].register_forward_hook(lambda *_: None).remove()
    begun(engine)


def test_another_engine_runs_the_changed_model():
    model = our_model(**SHAPE)
    engine = engine_for(model)
    cache = begun(engine)
    replace_a_weight(model)
    assert not engine.snapshot.is_current()
    fresh = engine_for(model)
    expected = fresh.forward(random_ids(3, 1), begun(fresh)).logits
    with torch.no_grad():
        found = model(random_ids(3, 1), cache=begun(fresh), logits="last").logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert cache.lengths == list(LENGTHS)


def test_a_backend_that_cannot_run_a_model_is_refused():
    encoder = our_model(**SHAPE, causal=False)
    assert engine_for(encoder).backend == "eager"
    for backend in ("cpu", "cuda_graph"):
        with pytest.raises(MinllamaError, match=f"cannot run on the engine '{backend}'"):
            engine_for(encoder, backend)
    with pytest.raises(OptionError, match="backend must be one of cpu, cuda_graph, eager, not"):
        engine_for(encoder, "tpu")


def test_autocast_is_for_the_modules():
    model = our_model(**SHAPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert engine_for(model).backend == "eager"


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
