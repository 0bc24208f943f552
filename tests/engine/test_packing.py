"""Texts of a batch without their padding, against the padded rows that they stand for."""

import itertools

import pytest
import torch
from torch import nn

from minllama.engine import packing as packing_module
from minllama.engine.packing import (
    forward,
    hidden_states,
    layer_states,
    packed_layout,
    shared_prefix_len,
)
from minllama.errors import ContextError
from minllama.kernels.cpu import attention
from minllama.kernels.cpu.attention import causal_attention
from minllama.kernels.cpu.library import library
from minllama.model.attention_layout import PackedSequences
from minllama.model.config import RopeScaling
from minllama.model.llama import FeedForward
from minllama.model.rope import apply_rotary_embedding
from tests.tiny import our_model, random_ids

pytestmark = pytest.mark.skipif(
    library() is None, reason="minllama was installed without a C++ compiler"
)

LENGTHS = (7, 20, 1, 13)


def mask_of(side, lengths=LENGTHS, length=20):
    columns = torch.arange(length)
    mask = columns < torch.tensor(lengths).unsqueeze(-1)
    return mask.flip(-1) if side == "left" else mask


@pytest.fixture
def padded(monkeypatch):
    """From its call on, padding is computed."""

    def on():
        monkeypatch.setattr(attention, "serves_packed", lambda longest: False)

    return on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(70, 3, 1, 130, 64, 65), (5, 0, 9)])
def test_texts_in_one_row_attend_as_if_each_were_alone(lengths, dtype):
    torch.manual_seed(0)
    starts = torch.tensor((0, *lengths)).cumsum(0)
    n, packed = int(starts[-1]), PackedSequences(starts, max(lengths))
    tensors = [torch.randn(1, n, heads, 12).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    of_out = torch.randn(1, n, 4, 12).to(dtype)
    together = causal_attention(*tensors, packed=packed)
    gradients = torch.autograd.grad(together, tensors, of_out)
    for first, end in itertools.pairwise(starts):
        own = [x[:, first:end].detach().clone().requires_grad_() for x in tensors]
        alone = causal_attention(*own)
        assert torch.equal(together[:, first:end], alone)
        for a, b in zip(
            gradients, torch.autograd.grad(alone, own, of_out[:, first:end]), strict=True
        ):
            assert torch.equal(a[:, first:end], b)


def test_the_layout_counts_each_text_from_zero():
    packing, layout = packed_layout(mask_of("left", (2, 3), 4), our_model().config)
    assert packing.tokens.tolist() == [2, 3, 5, 6, 7]
    assert layout.positions.tolist() == [[0, 1, 0, 1, 2]]
    assert layout.packed.starts.tolist() == [0, 2, 5]
    assert layout.packed.longest == 3
    assert packing.packed(torch.arange(8).view(2, 4)).tolist() == [[2, 3, 5, 6, 7]]
    back = packing.padded(torch.ones(1, 5, 2))
    assert back.shape == (2, 4, 2)
    assert back[..., 0].tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 1, "head_dim": 10},
        {"rope_scaling": RopeScaling("dynamic", factor=4.0), "max_seq_len": 16},
        {"attention_bias": True, "ffn_bias": True},
    ],
    ids=["plain", "multi-query", "dynamic", "biases"],
)
def test_packed_rows_give_what_padded_ones_do(changes, side, padded):
    model, ids, mask = our_model(**changes), random_ids(4, 20), mask_of(side)

    def results():
        model.zero_grad()
        states = torch.stack(list(layer_states(model, ids, attention_mask=mask)))[:, mask]
        logits = forward(model, ids, attention_mask=mask).logits[mask]
        nn.functional.cross_entropy(logits, ids[mask]).backward()
        return states, logits, [p.grad.clone() for p in model.parameters()]

    states, logits, gradients = results()
    padded()
    padded_states, padded_logits, padded_gradients = results()
    assert torch.allclose(states, padded_states, rtol=1e-4, atol=1e-5)
    assert torch.allclose(logits, padded_logits, rtol=1e-4, atol=1e-4)
    for a, b in zip(gradients, padded_gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_padding_is_not_computed(monkeypatch):
    model, ids, mask = our_model(), random_ids(4, 20), mask_of("right")
    seen = []

    def rotate(x, rotation):
        seen.append(x.shape)
        return apply_rotary_embedding(x, rotation)

    monkeypatch.setattr("minllama.model.llama.apply_rotary_embedding", rotate)
    h = hidden_states(model, 2, ids, mask)
    assert set(seen) == {(1, sum(LENGTHS), heads, 8) for heads in (4, 2)}
    assert h.shape == (4, 20, 32)
    assert not h[~mask].any()


def test_hooks_are_told_of_padded_rows():
    model, ids, mask = our_model(), random_ids(4, 20), mask_of("right")
    seen = []
    hook = lambda module, args, out: seen.append(out.shape)  # noqa: E731
    model.layers[0].feed_forward.register_forward_hook(hook)
    hidden_states(model, 2, ids, mask)
    assert seen == [(4, 20, 32)]


def test_a_part_that_alone_is_in_training_keeps_texts_apart():
    model, ids, mask = our_model(dropout=0.5), random_ids(4, 20), mask_of("right")
    model.layers[0].attention.train()
    torch.manual_seed(0)
    h = hidden_states(model, 1, ids, mask)
    ids[0] = 0
    torch.manual_seed(0)
    assert torch.equal(hidden_states(model, 1, ids, mask)[1:], h[1:])


@pytest.mark.parametrize(
    ("changes", "training", "mask"),
    [
        ({"causal": False}, False, mask_of("right")),
        ({"dropout": 0.1}, True, mask_of("right")),
        ({}, False, torch.ones(4, 20, dtype=torch.bool)),
        ({}, False, torch.ones(4, 20, 20, dtype=torch.bool).tril()),
    ],
    ids=["encoder", "dropout", "no padding", "tree"],
)
def test_what_cannot_be_packed_is_computed_as_it_stands(changes, training, mask, monkeypatch):
    def refuse(*args):
        raise AssertionError("packed")

    monkeypatch.setattr("minllama.engine.packing.packed_layout", refuse)
    model = our_model(**changes).train(training)
    positions = torch.arange(20).unsqueeze(0) if mask.dim() == 3 else None
    h = hidden_states(model, 2, random_ids(4, 20), mask, positions)
    assert h.shape == (4, 20, 32)


def test_texts_beyond_the_context_are_refused():
    with pytest.raises(ContextError, match="65 tokens"):
        hidden_states(our_model(), 2, random_ids(2, 65), mask_of("right", (65, 3), 65))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("packed", [True, False])
def test_states_at_some_tokens_are_those_of_all(side, packed, monkeypatch):
    model, ids, mask = our_model(), random_ids(4, 20), mask_of(side)
    if not packed:
        monkeypatch.setattr("minllama.engine.packing._packed", lambda *_: None)
    at = mask.flatten().nonzero().squeeze(-1)[[1, 7, 0, 29, 7]]  # in any order, and again
    gradients = []
    for n_layers in (1, 2):
        model.zero_grad()
        some = hidden_states(model, n_layers, ids, mask, selected=at)
        some.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        every = hidden_states(model, n_layers, ids, mask).flatten(0, 1)[at]
        every.square().sum().backward()
        torch.testing.assert_close(some, every, rtol=1e-4, atol=1e-5)
        expected = [p.grad for p in model.parameters() if p.grad is not None]
        for a, b in zip(gradients[-1], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_only_the_tokens_that_are_wanted_go_through_the_last_feed_forward(monkeypatch):
    model, ids, mask = our_model(), random_ids(4, 20), mask_of("right")
    seen = []

    def feed_forward(self, x):
        seen.append(x.shape)
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))

    monkeypatch.setattr(FeedForward, "forward", feed_forward)
    forward(model, ids, attention_mask=mask, logits="last")
    assert seen == [(1, sum(LENGTHS), 32), (1, 4, 32)]


def test_states_at_padding_are_zero():
    model, ids, mask = our_model(), random_ids(4, 20), mask_of("right")
    h = hidden_states(
        model, 2, ids, mask, selected=torch.tensor([6, 7, 79])
    )  # rows have 7, 20, 1, 13
    assert h[0].any()
    assert not h[1:].any()
    nothing = torch.zeros(4, 20, dtype=torch.bool)
    assert hidden_states(model, 2, ids, nothing, selected=torch.tensor([6])).isfinite().all()


def test_a_last_layer_of_somebody_else_is_asked_for_all():
    class Doubled(nn.Module):
        def forward(self, x, rotation, layout, cache):
            return 2 * x

    model, ids, mask = our_model(), random_ids(4, 20), mask_of("right")
    before = hidden_states(model, 1, ids, mask)
    model.layers[1] = Doubled()
    at = mask.flatten().nonzero().squeeze(-1)[[3, 0, 20]]
    found = hidden_states(model, 2, ids, mask, selected=at)
    torch.testing.assert_close(found, 2 * before.flatten(0, 1)[at], rtol=1e-4, atol=1e-5)


def test_hooks_are_told_of_all_tokens_whichever_are_wanted():
    model, ids, mask = our_model(), random_ids(4, 20), mask_of("right")
    expected = forward(model, ids, attention_mask=mask, logits="last").hidden
    seen = []
    hook = lambda module, args, out: seen.append(out.shape)  # noqa: E731
    model.layers[-1].register_forward_hook(hook)
    torch.testing.assert_close(
        forward(model, ids, attention_mask=mask, logits="last").hidden,
        expected,
        rtol=1e-4,
        atol=1e-5,
    )
    assert seen == [(4, 20, 32)]


def rows_that_begin_alike(shared=5, lengths=(9, 20, 6, 5, 13)):
    ids = random_ids(len(lengths), max(lengths))
    ids[:, :shared] = ids[0, :shared]
    return ids, mask_of("right", lengths, max(lengths))


@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 1, "head_dim": 10}, {"causal": False}])
@torch.no_grad()
def test_what_all_texts_begin_with_is_computed_once(changes, is_padded, padded, monkeypatch):
    """All tokens, some of each row (of the common beginning too), each layer, and with fewer."""
    model, (ids, mask) = our_model(**changes), rows_that_begin_alike()
    mask = mask if is_padded else None
    at = torch.tensor([[0, 4, 5, -1]])
    n_seen = []
    own = FeedForward.forward

    def seen(self, x):
        n_seen.append(x.shape[1])
        return own(self, x)

    def found():
        if not is_padded:
            some = forward(model, ids, logits=at).logits
        else:  # padding is nobody's: of each row its last real token, and some of all
            some = torch.cat(
                (
                    forward(model, ids, attention_mask=mask, logits=at[:, :2]).logits,
                    forward(model, ids, attention_mask=mask, logits="last").logits.unsqueeze(1),
                ),
                dim=1,
            )
        whole = forward(model, ids, attention_mask=mask).logits
        states = torch.stack(list(layer_states(model, ids, attention_mask=mask)))
        real = torch.ones_like(ids).bool() if mask is None else mask
        return some, whole[real], states[:, real]

    with monkeypatch.context() as patch:
        patch.setattr(FeedForward, "forward", seen)
        together = found()
    if model.config.causal:
        n_tokens = ids.numel() if mask is None else int(mask.sum())
        assert max(n_seen) == n_tokens - 5 * (len(ids) - 1)
    padded()
    for a, b in zip(together, found(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), (a - b).abs().max()


def test_a_beginning_is_shared_where_it_pays_and_no_gradient_is_asked_for():
    ids, mask = rows_that_begin_alike()
    assert shared_prefix_len(ids, mask) == 5
    assert shared_prefix_len(ids, None) == 5
    assert shared_prefix_len(ids, mask.flip(-1)) == 0  # padding before it: not the same columns
    assert shared_prefix_len(ids[:1], None) == 0
    assert shared_prefix_len(ids[:, 5:], mask[:, 5:]) == 0
    long = torch.cat((ids[:2, :1], random_ids(2, 60)), dim=1)
    long[1, 0] = long[0, 0]
    assert shared_prefix_len(long, None) == 0  # two tokens of 122
    same = ids[:1].expand(4, -1)
    assert shared_prefix_len(same, None) == 20
    model = our_model()
    assert torch.equal(forward(model, same).logits[0], forward(model, same[:1]).logits[0])
    packing, _ = packing_module._layout_of(model, ids, mask, None, None)
    assert packing.shared == 0
    with torch.no_grad():
        assert packing_module._layout_of(model, ids, mask, None, None)[0].shared == 5
        equal = forward(model, same).logits
    assert torch.equal(equal[3], equal[0])


def test_the_layout_of_rows_that_begin_alike():
    mask = mask_of("right", (3, 2, 4), 4)
    packing, layout = packed_layout(mask, our_model().config, shared=2)
    assert packing.tokens.tolist() == [0, 1, 2, 10, 11]
    assert layout.positions.tolist() == [[0, 1, 2, 2, 3]]
    assert layout.packed.starts.tolist() == [0, 3, 5, 9]
    assert layout.packed.expand.tolist() == [0, 1, 2, 0, 1, 0, 1, 3, 4]
    assert layout.packed.compact.tolist() == [0, 1, 2, 7, 8]
    assert packing.row_indices(torch.tensor([5, 8, 11, 1])).tolist() == [1, 0, 4, 1]
    back = packing.padded(torch.arange(1.0, 6.0).view(1, 5, 1)).squeeze(-1)
    assert back.tolist() == [[1, 2, 3, 0], [1, 2, 0, 0], [1, 2, 4, 5]]
