"""Each way of choosing a token, with literal numbers and against transformers' filters."""

import math

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minllama.errors import MinllamaError
from minllama.generation import sampling
from minllama.generation.sampling import (
    BLOCK,
    apply_min_p,
    apply_repetition_penalty,
    apply_top_p,
    check_chosen,
    choose_tokens,
    draw,
)
from minllama.options import SamplingOptions

LOGITS = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 2


def distribution(logits, draws=2000, **options):
    """Share of each token over evenly spaced draws: exact to 1 / draws."""
    uniforms = [(i + 0.5) / draws for i in range(draws)]
    options = SamplingOptions(**{"temperature": 1.0, **options})
    ids = choose_tokens(logits.expand(draws, -1), options, uniforms)
    return torch.bincount(ids, minlength=logits.shape[-1]) / draws


def test_temperature_zero_takes_the_likeliest():
    options = SamplingOptions(temperature=0.0, top_k=3, seed=1)
    assert choose_tokens(
        torch.tensor([[1.0, 5.0, 2.0], [9.0, 5.0, 2.0]]), options, []
    ).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_samples_follow_the_softmax_of_logits_over_temperature(temperature):
    expected = (LOGITS[0] / temperature).softmax(-1)
    actual = distribution(LOGITS, temperature=temperature)
    torch.testing.assert_close(actual, expected, atol=1 / 1000, rtol=0)


@pytest.mark.parametrize(
    ("options", "warper"),
    [
        ({"top_k": 5}, TopKLogitsWarper(5)),
        ({"top_k": 500}, TopKLogitsWarper(500)),
        ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
        ({"top_p": 0.01}, TopPLogitsWarper(0.01)),
        ({"min_p": 0.2}, MinPLogitsWarper(0.2)),
    ],
)
def test_filters_leave_what_transformers_leave(options, warper):
    expected = warper(None, LOGITS.clone()).softmax(-1)[0]
    torch.testing.assert_close(distribution(LOGITS, **options), expected, atol=1 / 1000, rtol=0)


@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
@pytest.mark.parametrize(
    "options", [(0.95, 0.0), (0.5, 0.0), (0.999, 0.0), (1.0, 0.02), (0.9, 0.05)]
)
def test_of_a_large_vocabulary_top_p_and_min_p_leave_what_transformers_leave(options, scale):
    """Without a sort of all tokens, over which distributions are flat, or peaked at a few."""
    top_p, min_p = options
    logits = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(3)) * scale
    expected = logits.double()
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)
    weights = (logits - logits.max()).exp()[0].numpy()
    chosen = SamplingOptions(temperature=1.0, top_p=top_p, min_p=min_p)
    ids, probabilities = sampling._likely(weights, chosen)
    kept = expected.isfinite()[0].nonzero().squeeze(-1)
    # At the edge of the mass the two round differently.
    assert len(set(ids.tolist()) ^ set(kept.tolist())) <= 2
    assert (probabilities[:-1] >= probabilities[1:]).all()
    exact = logits.double().softmax(-1)[0].numpy()[ids]
    np.testing.assert_allclose(probabilities, exact, rtol=1e-4)
    # Each draw is the token at which the sum of the kept ones' probabilities exceeds it.
    uniforms = [0.0, 0.31, 0.77, 0.9999]
    found = choose_tokens(logits.expand(4, -1), chosen, uniforms)
    sums = probabilities.astype(np.float64).cumsum()
    places = [int((sums <= u * sums[-1]).sum()) for u in uniforms]
    assert found.tolist() == [int(ids[place]) for place in places]


def test_filters_apply_in_the_order_top_k_top_p_min_p():
    expected = LOGITS.clone()
    for warper in (TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)):
        expected = warper(None, expected)
    actual = distribution(LOGITS, top_k=20, top_p=0.9, min_p=0.1)
    torch.testing.assert_close(actual, expected.softmax(-1)[0], atol=1 / 1000, rtol=0)


def test_top_p_keeps_the_smallest_set_with_the_mass():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    assert apply_top_p(p, 0.5).tolist() == [[0.5, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(apply_top_p(p, 0.6), torch.tensor([[0.5, 0.3, 0.0, 0.0]]))
    torch.testing.assert_close(apply_top_p(p, 1e-9), torch.tensor([[0.5, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(apply_top_p(p, 1.0), p)


def test_min_p_is_relative_to_the_likeliest():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    torch.testing.assert_close(apply_min_p(p, 0.3), torch.tensor([[0.5, 0.3, 0.15, 0.0]]))


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([[2.0, -2.0, 3.0], [2.0, -2.0, 3.0]])
    penalized = apply_repetition_penalty(logits, [[0, 1, 0], [2]], 2.0)
    assert penalized.tolist() == [[1.0, -4.0, 3.0], [2.0, -2.0, 1.5]]
    assert logits[0, 0] == 2.0
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[3, 9, 3]]), LOGITS.clone())
    torch.testing.assert_close(apply_repetition_penalty(LOGITS, [[3, 9, 3]], 1.3), theirs)


def test_repetition_penalty_reaches_greedy_choices():
    options = SamplingOptions(repetition_penalty=2.0)
    assert choose_tokens(torch.tensor([[3.0, 2.0]]), options, [], [[0]]).tolist() == [1]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_forbidden_token_is_never_drawn(uniform):
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    chosen = choose_tokens(logits, SamplingOptions(temperature=1.0), [uniform])
    assert chosen.item() in (1, 3)


@pytest.mark.parametrize("size", [3, BLOCK, BLOCK + 1, 5 * BLOCK - 7])
def test_a_draw_is_where_the_sum_of_weights_exceeds_it(size):
    """Beside one sum along the whole row, with stretches that weigh nothing."""
    random = torch.Generator().manual_seed(size)
    weights = torch.rand(40, size, generator=random) * (torch.arange(size) % 7 > 3)
    weights[:, min(1, size - 1) : size // 3] = 0
    weights[:, -1] = 0.01
    uniforms = torch.rand(40, dtype=torch.float64, generator=random).tolist()
    uniforms[:3] = [0.0, 1 - 2**-53, 0.5]
    sums = weights.double().cumsum(-1)
    aims = torch.tensor(uniforms).double().unsqueeze(-1) * sums[:, -1:]
    wanted = (sums <= aims).sum(-1).clamp(max=size - 1)
    found = draw(weights, uniforms)
    assert torch.equal(found, wanted)
    assert (weights.gather(-1, found.unsqueeze(-1)) > 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 0.7, "min_p": 0.1, "top_k": 3},
    ],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(bad, options):
    logits = torch.randn(2, 9)
    logits[1, 3] = bad
    with pytest.raises(MinllamaError, match="NaN or infinite"):
        check_chosen(choose_tokens(logits, SamplingOptions(**options), [0.5, 0.5]).tolist())


def test_ids_without_a_logit_are_no_part_of_the_penalty():
    logits = torch.tensor([[1.0, 2.0]])
    assert apply_repetition_penalty(logits, [[1, 2, 7]], 4.0).tolist() == [[1.0, 0.5]]


@pytest.mark.parametrize("temperature", [1e-30, 1e-46])  # the latter is 0 in float32
def test_a_tiny_temperature_is_nearly_greedy_not_nan(temperature):
    options = SamplingOptions(temperature=temperature)
    assert choose_tokens(torch.tensor([[80.0, 90.0, -90.0]]), options, [0.999]).item() == 1
