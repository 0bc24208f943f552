"""Inner layers, trees of continuations, and gradient checkpointing."""

import itertools

import pytest
import torch

from minllama.engine.packing import layer_states
from minllama.errors import MinllamaError
from tests.tiny import both, our_model, random_ids


def test_layer_states_equal_transformers_hidden_states(tmp_path):
    theirs, ours = both(tmp_path)
    ids = random_ids(2, 9, 97)
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True).hidden_states
        states = list(layer_states(ours, ids))
    assert len(states) == len(expected) == 4
    for state, hidden in zip(states[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(state, hidden, atol=1e-4, rtol=0)
    # Transformers' last one is normalized.
    torch.testing.assert_close(ours.norm(states[-1]), expected[-1], atol=1e-4, rtol=0)


def test_layers_that_nobody_asks_for_do_not_run():
    model, ids = our_model(n_layers=3), random_ids(2, 5)
    calls = []
    for number, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    with torch.no_grad():
        list(itertools.islice(layer_states(model, ids), 3))
    assert calls == [0, 1]


# A prompt of four tokens, then three continuations that share their first token: slots 4 to 8 are
# x, x y, x z, w, and padding in the second row, whose prompt is one token shorter.
TREE_POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 5, 4], [0, 1, 2, 3, 4, 4, 3, 0]])
PARENTS = ([-1, 0, 1, 2, 3, 4, 4, 3], [-1, 0, 1, 2, 3, 3, 2, -1])


def tree_mask():
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    for row, parents in enumerate(PARENTS):
        for slot in range(8):
            at = slot
            while at >= 0:
                mask[row, slot, at] = True
                at = parents[at]
    return mask


def paths():
    """Each slot's text: the slots from the root to it."""
    for row, parents in enumerate(PARENTS):
        for slot in range(8):
            path, at = [], slot
            while at >= 0:
                path.insert(0, at)
                at = parents[at]
            yield row, slot, path


@pytest.mark.parametrize("prefix_len", [0, 5])
def test_a_tree_of_continuations_gives_what_each_text_gives_alone(prefix_len):
    model, ids = our_model(), random_ids(2, 8)
    prefix = random_ids(1, 5, seed=3).expand(2, 5)[:, :prefix_len]
    with torch.no_grad():
        cache = None
        if prefix_len:
            cache = model.new_cache(2, 16)
            model(prefix, cache=cache, logits=None)
        logits = model(
            ids,
            attention_mask=tree_mask(),
            positions=TREE_POSITIONS + prefix_len,
            cache=cache,
        ).logits
        for row, slot, path in paths():
            alone = torch.cat((prefix[row], ids[row, path])).unsqueeze(0)
            expected = model(alone, logits="last").logits[0]
            torch.testing.assert_close(logits[row, slot], expected, atol=1e-5, rtol=0)


def test_after_a_tree_the_cache_can_be_cut_back_to_its_prefix():
    model, ids = our_model(), random_ids(2, 8)
    prefix, more = random_ids(2, 5, seed=3), random_ids(2, 3, seed=4)
    with torch.no_grad():
        cache = model.new_cache(2, 16)
        model(prefix, cache=cache, logits=None)
        model(ids, attention_mask=tree_mask(), positions=TREE_POSITIONS + 5, cache=cache)
        assert cache.lengths == [13, 13]
        cache.truncate(5)
        again = model(more, cache=cache).logits
        expected = model(torch.cat((prefix, more), dim=1)).logits[:, 5:]
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)


def uneven_cache(model):
    cache = model.new_cache(2, 32)
    model(random_ids(2, 3), attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]), cache=cache)
    return cache


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda m: {"attention_mask": tree_mask()}, "needs positions"),
        (
            lambda m: {"attention_mask": tree_mask(), "cache": m.new_cache(2, 16)},
            "both positions and an attention_mask of shape",
        ),
        (
            lambda m: {
                "attention_mask": tree_mask(),
                "positions": TREE_POSITIONS,
                "cache": uneven_cache(m),
            },
            "needs sequences of equal length",
        ),
        (
            lambda m: {"attention_mask": tree_mask(), "positions": TREE_POSITIONS + 60},
            "positions must be from 0 to 63, not 60 to 65",
        ),
        (
            lambda m: {
                "attention_mask": tree_mask(),
                "positions": TREE_POSITIONS,
                "logits": "last",
            },
            "a sequence without tokens, so there is no last one",
        ),
        (lambda m: {"attention_mask": torch.ones(2, 8, 7)}, r"or the mask \(B, T, T\)"),
    ],
)
def test_trees_that_cannot_work_are_refused(arguments, message):
    model = our_model()
    with torch.no_grad(), pytest.raises(MinllamaError, match=message):
        model(random_ids(2, 8), **arguments(model))


def test_gradient_checkpointing_changes_no_gradient():
    # With dropout: what is computed again must drop the same numbers.
    model, ids = our_model(dropout=0.3).train(), random_ids(2, 9)

    def gradients(gradient_checkpointing):
        model.gradient_checkpointing = gradient_checkpointing
        model.zero_grad()
        torch.manual_seed(5)
        model(ids).logits.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-6)


def test_gradient_checkpointing_keeps_fewer_activations():
    model, ids = our_model(n_layers=2), random_ids(2, 9)

    def saved_numbers(gradient_checkpointing):
        model.gradient_checkpointing = gradient_checkpointing
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(ids, logits=None)
        return sum(sizes)

    assert saved_numbers(True) < saved_numbers(False) / 5
