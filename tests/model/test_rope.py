"""Rotary embeddings against the closed form, with literal numbers."""

import math

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minllama.errors import MinllamaError
from minllama.model.config import LlamaConfig, RopeScaling
from minllama.model.rope import RotaryEmbedding, apply_rotary_embedding, frequencies
from tests.tiny import TheirConfig


def config(**changes):
    fields = {"dim": 8, "n_layers": 1, "n_heads": 2, "vocab_size": 4, "max_seq_len": 32}
    return LlamaConfig(**{**fields, **changes})


def test_frequencies_of_four_channels_are_1_and_a_hundredth():
    assert torch.equal(frequencies(config())[0], torch.tensor([1.0, 0.01]))


def test_pairs_are_interleaved_and_turn_by_position_times_frequency():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    rotated = apply_rotary_embedding(x, RotaryEmbedding(config())(torch.tensor([[3]])))
    # cos 3 = -0.9899925, sin 3 = 0.14112; cos 0.03 = 0.99955003, sin 0.03 = 0.0299955
    expected = torch.tensor(
        [
            1 * -0.9899925 - 2 * 0.14112001,
            1 * 0.14112001 + 2 * -0.9899925,
            3 * 0.99955003 - 4 * 0.0299955,
            3 * 0.0299955 + 4 * 0.99955003,
        ]
    )
    torch.testing.assert_close(rotated.flatten(), expected, atol=1e-6, rtol=0)


def test_scores_depend_on_the_distance_only():
    rope = RotaryEmbedding(config())
    query, key = torch.randn(2, 1, 1, 2, 4, generator=torch.Generator().manual_seed(0))

    def score(m, n):
        q = apply_rotary_embedding(query, rope(torch.tensor([[m]])))
        k = apply_rotary_embedding(key, rope(torch.tensor([[n]])))
        return (q * k).sum(-1)

    torch.testing.assert_close(score(5, 2), score(23, 20))
    assert not torch.allclose(score(5, 2), score(5, 3), atol=1e-3)


def test_rotation_is_computed_in_float32_and_returned_in_the_dtype_of_x():
    rope = RotaryEmbedding(config())
    x = torch.randn(1, 1, 2, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotation = rope(torch.tensor([[31]]))
    assert rotation.dtype == torch.complex64
    rotated = apply_rotary_embedding(x, rotation)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, apply_rotary_embedding(x.float(), rotation).bfloat16())


def test_tables_survive_a_change_of_the_models_dtype():
    rope = RotaryEmbedding(config())
    before = rope(torch.arange(32))
    assert torch.equal(rope.to(torch.bfloat16)(torch.arange(32)), before)


def test_the_table_is_built_once(monkeypatch):
    rope = RotaryEmbedding(config())
    rope(torch.arange(3))
    monkeypatch.setattr("minllama.model.rope.frequencies", None)  # a second build would fail
    assert rope(torch.arange(32)).shape == (32, 1, 2)


def test_the_table_grows_with_the_text_and_not_to_the_whole_context():
    rope = RotaryEmbedding(config(max_seq_len=2**24))
    short = rope(torch.arange(5))
    long = rope(torch.arange(5000))
    assert torch.equal(long[:5], short)
    assert len(rope._tables[torch.device("cpu")]) == 5000
    # 9000 x 1 and 9000 x 0.01 radians
    expected = torch.polar(torch.ones(2), torch.tensor([9000.0, 90.0]))
    torch.testing.assert_close(rope(torch.tensor([9000]))[0, 0], expected)


SCALINGS = {
    "linear": ({"factor": 4.0}, {"factor": 4.0}),
    "dynamic": ({"factor": 4.0}, {"factor": 4.0}),
    "llama3": (
        {
            "factor": 8.0,
            "original_max_seq_len": 256,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        {
            "factor": 8.0,
            "original_max_position_embeddings": 256,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
    "yarn": (
        {"factor": 16.0, "original_max_seq_len": 256},
        {"factor": 16.0, "original_max_position_embeddings": 256},
    ),
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_scaled_frequencies_equal_transformers(kind, theta):
    ours, theirs = SCALINGS[kind]
    shape = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 4096}
    reference = TheirConfig(
        **shape, rope_parameters={"rope_type": kind, "rope_theta": theta, **theirs}
    )
    expected, expected_length = ROPE_INIT_FUNCTIONS[kind](reference, "cpu", seq_len=9000)
    mine = config(
        dim=256,
        n_heads=4,
        max_seq_len=4096,
        rope_theta=theta,
        rope_scaling=RopeScaling(kind, **ours),
    )
    actual, length = frequencies(mine, text_len=9000)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert length == pytest.approx(expected_length, rel=1e-6)


@pytest.mark.parametrize(
    "extra",
    [{"attention_factor": 1.5}, {"mscale": 0.7, "mscale_all_dim": 0.4}, {"truncate": False}],
)
def test_yarns_further_settings_equal_transformers(extra):
    shape = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 4096}
    settings = {"factor": 16.0, "original_max_position_embeddings": 256, "beta_fast": 20.0, **extra}
    reference = TheirConfig(
        **shape, rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, **settings}
    )
    expected, expected_length = ROPE_INIT_FUNCTIONS["yarn"](reference, "cpu")
    scaling = RopeScaling("yarn", factor=16.0, original_max_seq_len=256, beta_fast=20.0, **extra)
    actual, length = frequencies(config(dim=256, n_heads=4, max_seq_len=4096, rope_scaling=scaling))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert length == pytest.approx(expected_length, rel=1e-6)


def test_yarns_attention_factor_is_the_papers():
    scaling = RopeScaling("yarn", factor=16.0, original_max_seq_len=8)
    _, length = frequencies(config(rope_scaling=scaling))
    assert length == pytest.approx(0.1 * math.log(16) + 1)
    unit = RotaryEmbedding(config(rope_scaling=scaling))(torch.tensor([5]))
    torch.testing.assert_close(unit.abs(), torch.full((1, 1, 2), 0.1 * math.log(16) + 1))


def test_factors_divide_each_frequency():
    scaled, _ = frequencies(config(rope_scaling=RopeScaling("factors", factors=(2.0, 5.0))))
    torch.testing.assert_close(scaled, torch.tensor([0.5, 0.002]))


def test_dynamic_scaling_leaves_short_texts_alone_and_stretches_long_ones():
    plain = RotaryEmbedding(config())
    dynamic = RotaryEmbedding(config(rope_scaling=RopeScaling("dynamic", factor=2.0)))
    short, long = torch.arange(32), torch.arange(48)
    assert torch.equal(dynamic(short), plain(short))
    # base 10000 x (2 x 48 / 32 - 1)^(4 / 2) = 40000: the second pair turns by 40000^-0.5 = 0.005
    torch.testing.assert_close(
        torch.view_as_real(dynamic(long)[40, 0, 1]),
        torch.tensor([math.cos(40 * 0.005), math.sin(40 * 0.005)]),
    )


def test_an_unknown_scaling_is_named():
    with pytest.raises(MinllamaError, match=r"'longrope' is unknown; known: linear, dynamic"):
        RopeScaling("longrope", factor=2.0)
