"""Compiled draws beside sums over sorted probabilities, at every level of instructions."""

import math

import numpy as np
import pytest
import torch

from minllama.errors import MinllamaError
from minllama.generation.sampling import choose_tokens
from minllama.generation.sampling import draw_tokens as drawn
from minllama.kernels.cpu.library import best_level, library
from minllama.kernels.cpu.sampling import draw_tokens
from minllama.options import SamplingOptions

pytestmark = pytest.mark.skipif(
    library() is None, reason="minllama was installed without a C++ compiler"
)
UNIFORMS = [0.0, 0.001, 0.2, 0.5, 0.77, 0.93, 0.999, math.nextafter(1.0, 0.0)]
FILTERS = [(1.0, 0.0), (0.95, 0.0), (0.3, 0.0), (1e-6, 0.0), (1.0, 0.05), (0.9, 0.02), (0.999, 1.0)]


@pytest.fixture(autouse=True, params=range(best_level() + 1))
def at_level(request, monkeypatch):
    """Operations use the instructions of this level."""
    monkeypatch.setattr("minllama.kernels.cpu.library.best_level", lambda: request.param)


def options(top_p=1.0, min_p=0.0, temperature=1.0):
    return SamplingOptions(temperature=temperature, top_p=top_p, min_p=min_p)


def nucleus(logits, chosen):
    """Ids and probabilities that top-p and then min-p leave, likeliest first."""
    z = logits.double().numpy() / chosen.temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    order = np.lexsort((np.arange(len(p)), -p))
    kept = (p[order].cumsum() - p[order] < chosen.top_p) | (chosen.top_p == 1)
    kept[0] = True
    kept &= p[order] >= chosen.min_p * p.max()
    return order[kept], p[order][kept]


@pytest.mark.parametrize("size", [1, 2, 63, 64, 511, 512, 513, 1500, 20_000])
@pytest.mark.parametrize("scale", [0.3, 3.0, 12.0])
@pytest.mark.parametrize(("top_p", "min_p"), FILTERS)
def test_draws_are_those_of_sorted_probabilities(size, scale, top_p, min_p):
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(1, size, generator=generator) * scale
    chosen = options(top_p, min_p, temperature=0.8)
    found = draw_tokens(logits.expand(len(UNIFORMS), -1), chosen, UNIFORMS).tolist()
    ids, p = nucleus(logits[0], chosen)
    if (top_p, min_p) == (1.0, 0.0):  # in the order of tokens
        p, ids = p[np.argsort(ids)], np.sort(ids)
    sums = p.cumsum() / p.sum()
    for token, uniform in zip(found, UNIFORMS, strict=True):
        place = min(int((sums <= uniform).sum()), len(ids) - 1)
        if token == ids[place]:
            continue
        # Another token only where the draw falls on an edge, within the rounding of a float32.
        assert np.abs(sums - uniform).min() < 1e-5
        (at,) = np.flatnonzero(ids == token)
        assert abs(sums[at] - uniform) < p[at] / p.sum() + 1e-5


def test_the_distribution_is_the_nucleus():
    """Evenly spaced draws, so that each token gets its share."""
    logits = torch.log(torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15]))
    uniforms = [(i + 0.5) / 1000 for i in range(1000)]
    counts = draw_tokens(logits.expand(1000, -1), options(0.8), uniforms).bincount(minlength=5)
    expected = torch.tensor([0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85])
    torch.testing.assert_close(counts / 1000, expected, atol=0.002, rtol=0)


def test_tokens_that_are_not_allowed_are_never_drawn():
    logits = torch.full((8, 700), -math.inf)
    allowed = [3, 511, 512, 699]
    logits[:, allowed] = torch.tensor([0.1, 0.2, 0.0, 0.3])
    for top_p, min_p in FILTERS:
        assert set(draw_tokens(logits, options(top_p, min_p), UNIFORMS).tolist()) <= set(allowed)
    even = [(i + 0.5) / 8 for i in range(8)]
    assert draw_tokens(logits, options(), even).tolist() == [3, 3, 511, 511, 512, 512, 699, 699]


def test_equal_tokens_are_in_the_order_of_their_ids():
    found = draw_tokens(torch.zeros(4, 300), options(0.5), [0.0, 0.5, 0.99, 0.999999])
    assert found.tolist() == [0, 75, 148, 149]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("top_p", "min_p"), FILTERS[:2])
def test_a_row_with_nan_or_infinity_gives_minus_one_and_others_are_drawn(bad, top_p, min_p):
    logits = torch.zeros(3, 100)
    logits[1, 77] = bad
    logits[:, 5] = 50.0
    assert draw_tokens(logits, options(top_p, min_p), [0.5] * 3).tolist() == [5, -1, 5]


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 700, 20_000])
def test_at_temperature_zero_the_first_of_the_likeliest_is_chosen(size):
    logits = torch.randn(40, size, generator=torch.Generator().manual_seed(size)).round(decimals=1)
    found = draw_tokens(logits, options(temperature=0.0), ())
    assert found.tolist() == logits.numpy().argmax(-1).tolist()
    logits[1::4] = -math.inf
    logits[2::4, size // 2] = math.nan
    logits[3::4, -1] = math.inf
    found = draw_tokens(logits, options(temperature=0.0), ())
    assert found.tolist() == drawn.reference(logits, options(temperature=0.0), ()).tolist()
    assert found[1::4].unique().tolist() == [0]
    assert found[2::4].unique().tolist() == found[3::4].unique().tolist() == [-1]


def test_tiny_and_huge_temperatures():
    logits = torch.tensor([[1.0, 3.0, 2.0]]).repeat(3, 1)
    assert draw_tokens(logits, options(temperature=1e-45), [0.0, 0.5, 0.999]).tolist() == [1, 1, 1]
    assert draw_tokens(logits, options(temperature=1e30), [0.1, 0.5, 0.9]).tolist() == [0, 1, 2]


def test_a_view_of_larger_logits_is_read_as_it_is():
    wide = torch.randn(4, 90, generator=torch.Generator().manual_seed(0))
    part = wide[::2, 10:70]
    uniforms = [0.2, 0.8]
    expected = draw_tokens(part.clone(), options(0.9), uniforms)
    assert torch.equal(draw_tokens(part, options(0.9), uniforms), expected)
    assert expected.tolist() == drawn.reference(part, options(0.9), uniforms).tolist()


def test_as_many_draws_as_rows_are_needed():
    with pytest.raises(MinllamaError, match=r"draw_tokens: tensors of shapes \(2, 5\) and \(1,\)"):
        draw_tokens(torch.zeros(2, 5), options(), [0.5])


def test_sampling_uses_it(monkeypatch):
    called = []
    monkeypatch.setattr(
        "minllama.kernels.cpu.sampling.call", lambda name, draw: called.append((name, draw.rows))
    )
    choose_tokens(torch.zeros(3, 7), options(0.9), [0.5] * 3)
    assert called == [("draw", 3)]
