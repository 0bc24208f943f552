"""Claims about the patterns of an adapter's modules: they match what they match in PEFT."""

import time
from pathlib import Path
from typing import Any

import pytest
from peft.utils.other import get_pattern_key

from minllama.checkpoints import module_patterns
from minllama.checkpoints.module_patterns import first_matches
from minllama.errors import CheckpointError
from minllama.lora.peft_files import load_adapter
from tests.lora.test_peft_files import assert_equal_logits
from tests.peft_model import ALL, their_adapter, unwarned

ENDS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
NAMES = [f"{root}layers.{i}.{end}" for root in ("model.", "") for i in (0, 1, 11) for end in ENDS]

KEYS = [
    ["q_proj"],
    ["^q_proj", "q_proj"],
    ["^model.layers.0.self_attn.q_proj", "^layers.1.self_attn.q_proj"],
    ["q.proj", "v_proj$", "^self_attn.k_proj"],
    ["layers.1.self_attn.q_proj"],
    [r"model\.layers\.1\.self_attn\.q_proj"],
    ["_proj", "proj", ""],
    [".*", "q_proj"],
    ["(q|v)_proj", r"layers\.[01]\.self_attn\.[ok]_proj", "nothing"],
    ["(?P<a>q)_(?=p)proj", "^.*k_proj$"],
    ["model|q_proj", "k_proj|v_proj"],
    ["Q_PROJ", "(?:q|k)_proj"],
    ["layers.1"],
]


@pytest.mark.parametrize("keys", KEYS)
def test_the_first_key_that_matches_is_pefts(keys: list[str]) -> None:
    found = first_matches("rank_pattern", keys, NAMES)
    for name, number in zip(NAMES, found, strict=True):
        theirs = get_pattern_key(keys, name)
        assert (name if number is None else keys[number]) == theirs, name


@pytest.mark.parametrize(
    "options",
    [
        {"alpha_pattern": {"^q_proj": 100, "v.proj": 3, "v_proj": 50}},
        {"rank_pattern": {"(q|k)_proj": 2, "q_proj": 7, r".*\.1\..*up_proj": 5}},
        {"rank_pattern": {"^model.layers.0.*": 3}, "alpha_pattern": {"layers.[12].mlp.*": 1.5}},
        {"target_modules": r".*layers\.[02]\.(self_attn|mlp)\.(q|up)_proj"},
        {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
        {
            "target_modules": ["q_proj", "model.layers.2.mlp.up_proj"],
            "layers_to_transform": [0, 1],
            "layers_pattern": ["h", "layers"],
        },
    ],
)
def test_an_adapter_with_patterns_gives_pefts_logits(
    options: dict[str, Any], tmp_path: Path
) -> None:
    theirs, ours = their_adapter(tmp_path, **{"target_modules": ALL, **options})
    load_adapter(ours, tmp_path / "adapter")
    assert_equal_logits(theirs, ours)


def test_a_bare_models_names_begin_one_level_lower(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    pattern = {"^layers.0.self_attn.q_proj": 2, "^model.layers.1.self_attn.q_proj": 7}
    options: dict[str, Any] = {"target_modules": ["q_proj"], "alpha_pattern": pattern}
    theirs, ours = their_adapter(tmp_path, **options)
    with unwarned():  # of the pattern that matches nothing from a bare root
        bare = get_peft_model(theirs.unload().model, LoraConfig(r=4, lora_alpha=6, **options))
    want = [
        module.scaling["default"]
        for name, module in bare.named_modules()
        if name.endswith("q_proj")
    ]
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {n.replace(".model.model.", ".model."): t for n, t in load_file(file).items()}
    save_file(tensors, file)
    load_adapter(ours, tmp_path / "adapter")
    got = [layer.attention.compute_query.adapters["default"].scaling for layer in ours.layers]
    assert got == want


def test_a_pattern_that_never_ends_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_patterns, "MAX_SECONDS", 1)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="take longer than 1 seconds"):
        first_matches("rank_pattern", ["([a-z0-9_.]+)+!"], ["model.layers.0.self_attn.q_proj"])
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["q_proj", "(q"], r"'\(q' is not a regular expression"),
        (["*"], "is not a regular expression"),
        (["a" * 2000], "has 2000 characters, but at most 1000 are supported"),
        (["a"] * 20_000, "20000 keys, but at most 10000 are supported"),
    ],
)
def test_what_is_no_pattern_is_one_line(keys: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        first_matches("alpha_pattern", keys, NAMES)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
