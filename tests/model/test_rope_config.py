"""Claims about config.json's rotary settings: each combination means what it does in transformers.

The reference is transformers' own LlamaConfig and rotary module; a few go through whole models.
What transformers cannot load may be read by us only where nothing else can be meant.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig as TheirConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minllama.checkpoints.huggingface_config import (
    config_from_huggingface,
    ignored_keys,
    rope_contradiction,
)
from minllama.errors import CheckpointError, CheckpointWarning, MinllamaError
from minllama.model.llama import load_pretrained
from minllama.model.rope import RotaryEmbedding
from tests.tiny import both

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
ORIGINAL = "original_max_position_embeddings"
KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear, old word": {"type": "linear", "factor": 4},
    "both words": {"rope_type": "linear", "type": "dynamic", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn, all": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 8,
        "beta_slow": 2.0,
        "mscale": 1.5,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "yarn, zeros and nulls": {
        "rope_type": "yarn",
        "factor": None,
        "beta_fast": 0,
        "mscale": 0,
        "attention_factor": None,
        "truncate": None,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}
HOLDERS = ("rope_scaling", "rope_parameters", "scaling beside default", "scaling beside yarn")


def raw_config(holder: str, kind: str, theta: str, original: str) -> dict[str, Any]:
    """A config.json with a scaling in one place and its theta and original length in others."""
    scaling = dict(KINDS[kind])
    raw = dict(SHAPE)
    if theta in ("inside", "both"):
        scaling["rope_theta"] = 500.0
    if theta in ("outside", "both"):
        raw["rope_theta"] = 2000.0
    if original in ("inside", "both"):
        scaling[ORIGINAL] = 32
    if original in ("outside", "both"):
        raw[ORIGINAL] = 16
    if holder == "rope_parameters":
        return {**raw, "rope_parameters": scaling, "rope_scaling": None}
    raw["rope_scaling"] = scaling
    if holder == "scaling beside default":
        raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    if holder == "scaling beside yarn":
        raw["rope_parameters"] = {"rope_type": "yarn", "factor": 2.0, ORIGINAL: 32}
    return raw


def their_vectors(raw: dict[str, Any], length: int) -> torch.Tensor:
    """Transformers' unit vectors of the first positions, complex (length, C / 2)."""
    rotary = LlamaRotaryEmbedding(TheirConfig.from_dict(json.loads(json.dumps(raw))))
    cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
    half = cos.shape[-1] // 2
    return torch.complex(cos[0, :, :half], sin[0, :, :half])


def our_vectors(raw: dict[str, Any], length: int) -> torch.Tensor:
    rotary = RotaryEmbedding(config_from_huggingface(raw))
    return rotary(torch.arange(length)).squeeze(-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_every_combination_turns_as_in_transformers(holder: str, kind: str) -> None:
    places = ("nowhere", "inside", "outside", "both")
    for theta, original in itertools.product(places, places):
        raw = raw_config(holder, kind, theta, original)
        for length in (40, 100):  # within the context and beyond, where dynamic scaling begins
            torch.testing.assert_close(
                our_vectors(raw, length), their_vectors(raw, length), rtol=0, atol=2e-5
            )


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_scaling": None, "rope_parameters": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": None},
        {"rope_scaling": {"type": "linear", "factor": 2.0, "unheard_of": 3}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
        {"rope_scaling": {**KINDS["yarn"], ORIGINAL: 32.0}},
        {"head_dim": None, "rope_scaling": {"type": "dynamic", "factor": 3.0}},
    ],
)
def test_odd_spellings_mean_what_transformers_makes_of_them(changes: dict[str, Any]) -> None:
    raw = {**SHAPE, **changes}
    torch.testing.assert_close(our_vectors(raw, 40), their_vectors(raw, 40), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "plainly"),
    [
        ({"rope_theta": None}, {}),
        (
            {"rope_theta": 500.0, "rope_scaling": {**KINDS["linear"], "rope_theta": None}},
            {"rope_theta": 500.0, "rope_scaling": KINDS["linear"]},
        ),
        (
            {"rope_parameters": {"rope_type": None, "type": "linear", "factor": 4.0}},
            {"rope_parameters": KINDS["linear"]},
        ),
        (
            {"rope_scaling": {**KINDS["llama3"], ORIGINAL: 16}, ORIGINAL: None},
            {"rope_scaling": {**KINDS["llama3"], ORIGINAL: 16}},
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": None}},
            {},
        ),
    ],
)
def test_null_counts_as_not_said_where_transformers_fails(
    changes: dict[str, Any], plainly: dict[str, Any]
) -> None:
    assert config_from_huggingface({**SHAPE, **changes}) == config_from_huggingface(
        {**SHAPE, **plainly}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # transformers would turn by theta 10000, for it looks into rope_scaling alone
        (
            {
                "rope_scaling": KINDS["linear"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            },
            "rope_scaling takes precedence but has no rope_theta, .* has 500000.0",
        ),
        # it would look for a type one level higher, and find none
        (
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}},
            "separate settings for full_attention",
        ),
        # its Llama ignores it, and vLLM's does not
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"factor": 4.0}}, "has a factor but no rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' has no factor"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "'linear' has no factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a finite number"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "no low_freq_factor, high_freq"),
        ({"rope_scaling": {"type": ["linear"], "factor": 2}}, r"rope scaling \['linear'\]"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "'longrope' is unknown"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', not a JSON object"),
        (
            {"rope_scaling": KINDS["linear"], "rope_parameters": "x"},
            "rope_parameters is 'x', not a JSON object",
        ),
        ({"rope_theta": 10**400}, "rope_theta must be a finite number above 0"),
        (
            {"rope_scaling": {**KINDS["yarn"], ORIGINAL: 10**300}},
            "exceeds the limit of 9007199254740992",
        ),
    ],
)
def test_what_is_not_clear_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MinllamaError, match=message):
        config_from_huggingface({**SHAPE, **changes})


def test_what_is_overridden_is_said_and_what_is_not_read_is_listed() -> None:
    raw = raw_config("scaling beside yarn", "linear", "inside", "inside")
    said = rope_contradiction(raw)
    assert said is not None
    assert "rope_scaling (linear) is used" in said
    assert "rope_parameters beside it has rope_type 'yarn', factor 2.0" in said
    assert ignored_keys(raw) == [f"rope_scaling.{ORIGINAL}"]
    agreeing = raw_config("scaling beside default", "linear", "nowhere", "nowhere")
    assert rope_contradiction(agreeing) is None


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_a_scaling_added_by_hand_gives_the_logits_of_transformers(
    kind: str, tmp_path: Path
) -> None:
    both(tmp_path)  # saved by transformers, with rope_parameters
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    assert "rope_parameters" in raw
    raw["rope_scaling"] = {**KINDS[kind], ORIGINAL: 32}
    file.write_text(json.dumps(raw))
    ids = torch.arange(1, 91)[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            load_pretrained(tmp_path, device="cpu")(ids).logits,
            theirs(ids).logits,
            rtol=0,
            atol=1e-4,
        )


def test_a_contradiction_is_warned_of_when_the_folder_is_opened(tmp_path: Path) -> None:
    both(tmp_path, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({**raw, "rope_scaling": {"type": "linear", "factor": 4.0}}))
    with pytest.warns(CheckpointWarning, match=r"config.json: rope_scaling \(linear\) is used"):
        assert load_pretrained(tmp_path).config.rope_scaling.factor == 4.0
    file.write_text(json.dumps({**raw, "rope_scaling": [4.0]}))
    with pytest.raises(CheckpointError, match=r"config.json: rope_scaling is \[4.0\]"):
        load_pretrained(tmp_path)
