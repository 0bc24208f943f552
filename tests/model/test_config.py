"""Claims about LlamaConfig: what is left out follows, and contradictions are named."""

import dataclasses
import math
from typing import Any

import pytest

from minllama.errors import MinllamaError
from minllama.model.config import ROPE_SCALINGS, LlamaConfig, RopeScaling, meta_hidden_dim

SMALL = {"dim": 48, "n_layers": 2, "n_heads": 6, "vocab_size": 100}


def config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**(SMALL | changes))


def test_what_is_left_out_follows_from_the_rest() -> None:
    assert dataclasses.asdict(config()) == {
        **SMALL,
        "n_kv_heads": 6,
        "head_dim": 8,
        "hidden_dim": 256,
        "max_seq_len": 2048,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_embeddings": False,
        "attention_bias": False,
        "ffn_bias": False,
        "causal": True,
        "dropout": 0.0,
    }


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "expected"),
    [
        (4096, 256, None, 11008),  # Llama 1 and 2, 7B
        (5120, 256, None, 13824),  # 13B
        (8192, 4096, 1.3, 28672),  # Llama 2, 70B
        (4096, 1024, 1.3, 14336),  # Llama 3, 8B
        (288, 32, None, 768),  # llama2.c, 15M
        (768, 768, 1.0, 2304),
    ],
)
def test_the_hidden_width_follows_metas_rule(
    dim: int, multiple_of: int, multiplier: float | None, expected: int
) -> None:
    assert meta_hidden_dim(dim, multiple_of, multiplier) == expected


def test_the_default_hidden_width_is_metas_rule() -> None:
    assert LlamaConfig(dim=4096, n_layers=1, n_heads=32, vocab_size=9).hidden_dim == 11008


def test_head_dim_need_not_be_dim_over_heads() -> None:
    assert config(dim=50, head_dim=10).head_dim == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_heads": 4}, "n_heads (6) must be divisible by n_kv_heads (4)"),
        ({"dim": 50}, "dim (50) must be divisible by n_heads (6); or set head_dim"),
        ({"head_dim": 7}, "head_dim (7) must be even: rotary embeddings rotate pairs"),
        ({"dim": 42}, "head_dim (7) must be even: rotary embeddings rotate pairs"),
        ({"dim": 0}, "dim must be an integer above 0, not 0"),
        ({"n_layers": -1}, "n_layers must be an integer above 0, not -1"),
        ({"n_heads": 6.0}, "n_heads must be an integer above 0, not 6.0"),
        ({"n_heads": 0}, "n_heads must be an integer above 0, not 0"),
        ({"vocab_size": None}, "vocab_size must be an integer above 0, not None"),
        ({"vocab_size": True}, "vocab_size must be an integer above 0, not True"),
        ({"max_seq_len": "8k"}, "max_seq_len must be an integer above 0, not '8k'"),
        ({"n_kv_heads": 0}, "n_kv_heads must be an integer above 0, not 0"),
        ({"head_dim": 0}, "head_dim must be an integer above 0, not 0"),
        ({"hidden_dim": -5}, "hidden_dim must be an integer above 0, not -5"),
        ({"norm_eps": 0}, "norm_eps must be a finite number above 0, not 0"),
        ({"norm_eps": math.nan}, "norm_eps must be a finite number above 0, not nan"),
        ({"rope_theta": -1.0}, "rope_theta must be a finite number above 0, not -1.0"),
        ({"rope_theta": math.inf}, "rope_theta must be a finite number above 0, not inf"),
        ({"rope_theta": "10000"}, "rope_theta must be a finite number above 0, not '10000'"),
        ({"rope_theta": True}, "rope_theta must be a finite number above 0, not True"),
        (
            {"rope_theta": 10**400},
            f"rope_theta must be a finite number above 0, not 1{'0' * 39}... (401 characters)",
        ),
        (
            {"dim": 2**63},
            "dim (9223372036854775808) exceeds the limit of 9007199254740992",
        ),
        ({"dropout": "0.1"}, "dropout must be in [0, 1), not '0.1'"),
        ({"dropout": 1}, "dropout must be in [0, 1), not 1"),
        ({"dropout": -0.1}, "dropout must be in [0, 1), not -0.1"),
        ({"dropout": math.nan}, "dropout must be in [0, 1), not nan"),
        *(
            (
                {"rope_scaling": RopeScaling("dynamic", factor=factor)},
                f"dynamic scaling needs a factor from 1 to 1e+06, not {factor:g}",
            )
            for factor in (0.001, 1e308)
        ),
        (
            {"rope_scaling": RopeScaling("factors", factors=(1.0, 2.0))},
            "rope scaling: 2 factors for 4 frequencies (head_dim / 2)",
        ),
    ],
)
def test_a_contradiction_is_named_with_its_numbers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MinllamaError) as caught:
        config(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "longrope"},
            "rope scaling 'longrope' is unknown; known: linear, dynamic, yarn, llama3, factors",
        ),
        (
            {"kind": "linear", "factor": 0},
            "rope scaling: factor must be a finite number above 0, not 0",
        ),
        (
            {"kind": "linear", "factor": math.nan},
            "rope scaling: factor must be a finite number above 0, not nan",
        ),
        (
            {"kind": "linear", "factor": True},
            "rope scaling: factor must be a finite number above 0, not True",
        ),
        (
            {"kind": "llama3", "original_max_seq_len": 10**300},
            f"rope scaling: original_max_seq_len (1{'0' * 39}... (301 characters)) exceeds the "
            "limit of 9007199254740992",
        ),
        (
            {"kind": "yarn", "original_max_seq_len": 64.5},
            "rope scaling: original_max_seq_len must be an integer above 0, not 64.5",
        ),
        (
            {"kind": "llama3", "original_max_seq_len": 64, "high_freq_factor": "4"},
            "rope scaling: high_freq_factor must be a finite number above 0, not '4'",
        ),
        ({"kind": "yarn", "factor": 4.0}, "rope scaling 'yarn' needs original_max_seq_len"),
        ({"kind": "llama3", "factor": 8.0}, "rope scaling 'llama3' needs original_max_seq_len"),
        (
            {"kind": "yarn", "original_max_seq_len": -1},
            "rope scaling: original_max_seq_len must be an integer above 0, not -1",
        ),
        (
            {
                "kind": "llama3",
                "original_max_seq_len": 8192,
                "low_freq_factor": 4,
                "high_freq_factor": 4,
            },
            "rope scaling: low_freq_factor (4) must be above 0 and below high_freq_factor (4)",
        ),
        (
            {"kind": "yarn", "original_max_seq_len": 64, "beta_fast": 1e308},
            "rope scaling: beta_fast (1e+308) is above 1e+06",
        ),
        (
            {"kind": "factors", "factors": (1.0, 0.0)},
            "rope scaling: each of factors must be a finite number above 0, not 0.0",
        ),
    ],
)
def test_a_wrong_rope_scaling_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MinllamaError) as caught:
        RopeScaling(**arguments)
    assert str(caught.value) == message


def test_numbers_of_any_size_are_floats_and_lengths_are_integers() -> None:
    scaling = RopeScaling("yarn", factor=4, original_max_seq_len=64.0)  # type: ignore[arg-type]
    built = config(rope_theta=2**64, rope_scaling=scaling)
    assert (built.rope_theta, type(built.rope_theta)) == (2.0**64, float)
    assert (type(scaling.factor), type(scaling.original_max_seq_len)) == (float, int)


def test_every_known_scaling_can_be_built() -> None:
    for kind in ROPE_SCALINGS:
        scaling = RopeScaling(kind, original_max_seq_len=64, factors=(1.0, 1.0, 2.0, 2.0))
        assert config(rope_scaling=scaling).rope_scaling == scaling


def test_only_dynamic_scaling_reaches_beyond_max_seq_len() -> None:
    def context(kind: str) -> int:
        scaling = RopeScaling(kind, factor=2.5, original_max_seq_len=64)
        return config(max_seq_len=100, rope_scaling=scaling).context_len

    assert config(max_seq_len=100).context_len == 100
    assert {kind: context(kind) for kind in ("linear", "dynamic", "yarn", "llama3")} == {
        "linear": 100,
        "dynamic": 250,
        "yarn": 100,
        "llama3": 100,
    }


def test_replace_checks_anew_and_keeps_what_was_settled() -> None:
    changed = config(n_kv_heads=2).replace(causal=False)
    assert (changed.causal, changed.n_kv_heads, changed.hidden_dim) == (False, 2, 256)
    with pytest.raises(MinllamaError, match=r"n_heads \(6\) must be divisible by n_kv_heads \(5\)"):
        config().replace(n_kv_heads=5)
    with pytest.raises(MinllamaError, match="unknown config field depth, width; known are"):
        config().replace(width=1, depth=2)


def test_a_rope_scaling_is_not_its_name() -> None:
    with pytest.raises(MinllamaError, match="rope_scaling must be a RopeScaling or None"):
        config(rope_scaling="yarn")


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().dim = 1  # type: ignore[misc]
