"""Claims about adapters on disk: PEFT reads ours, we read PEFT's, with the same numbers."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minllama.errors import MinllamaError
from minllama.lora import add_lora_wrapper, lora_layers, lora_parameters, merge_lora, set_adapters
from minllama.lora.peft_files import LoadedAdapter, load_adapter, save_adapter
from minllama.model.llama import Llama, load_pretrained
from tests.peft_model import (
    ALL,
    VOCAB_SIZE,
    classifier_base,
    in_peft,
    randomise,
    their_adapter,
    their_classifier,
    unwarned,
)
from tests.tiny import both, our_model, random_ids

IDS = random_ids(3, 11, VOCAB_SIZE)

KINDS = [
    pytest.param({}, id="lora"),
    pytest.param({"use_rslora": True}, id="rslora"),
    pytest.param({"use_dora": True}, id="dora"),
    pytest.param({"use_rslora": True, "use_dora": True}, id="both"),
]


def logits(model: Llama) -> Tensor:
    with torch.no_grad():
        found = model(IDS).logits
    assert found is not None
    return found


def assert_equal_logits(theirs: Any, ours: Llama) -> None:
    with torch.no_grad():
        expected = theirs(IDS).logits
    torch.testing.assert_close(logits(ours), expected, atol=1e-4, rtol=0)


def plain_logits(folder: Path) -> Tensor:
    return logits(load_pretrained(folder / "base", device="cpu"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [[name] for name in ALL] + ["all-linear"], ids=str)
def test_an_adapter_of_pefts_gives_the_same_logits_here(
    tmp_path: Path, targets: Any, kind: dict[str, bool]
) -> None:
    theirs, ours = their_adapter(tmp_path, target_modules=targets, **kind)
    load_adapter(ours, tmp_path / "adapter")
    assert_equal_logits(theirs, ours)
    assert (logits(ours) - plain_logits(tmp_path)).abs().max() > 0.1  # it does something


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [[name] for name in ALL] + ["all-linear"], ids=str)
def test_an_adapter_of_ours_gives_the_same_logits_in_peft(
    tmp_path: Path, targets: Any, kind: dict[str, bool]
) -> None:
    _, ours = both(tmp_path / "base")
    add_lora_wrapper(ours, targets, r=3, lora_alpha=5, lora_dropout=0.1, **kind)
    randomise(ours)
    save_adapter(tmp_path / "adapter", ours, base_model_name="tiny")
    theirs = in_peft(tmp_path)
    assert theirs.peft_config["default"].base_model_name_or_path == "tiny"
    assert theirs.peft_config["default"].lora_dropout == 0.1
    assert_equal_logits(theirs, ours)
    assert (logits(ours) - plain_logits(tmp_path)).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_pefts(tmp_path: Path, kind: dict[str, bool]) -> None:
    theirs, ours = their_adapter(tmp_path, target_modules=ALL, **kind)
    load_adapter(ours, tmp_path / "adapter")
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)
    theirs(IDS).logits.logsumexp(-1).mean().backward()
    ours(IDS).logits.logsumexp(-1).mean().backward()
    # Saved as if they were the parameters, the gradients are in one layout.
    for model in (theirs, ours):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data = parameter.grad
    with unwarned():
        theirs.save_pretrained(tmp_path / "theirs")
    save_adapter(tmp_path / "ours", ours)
    expected = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    found = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)
        assert gradient.abs().max() > 1e-4, name


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*\.(q_proj|down_proj)"},
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ALL, "exclude_modules": ["k_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": ALL, "exclude_modules": r".*\.0\..*"},
        {
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 2, "model.layers.1.mlp.up_proj": 7},
            "alpha_pattern": {r"^model\.layers\.0\.self_attn\.k_proj$": 3, "down_proj": 1.5},
        },
        {"target_modules": ["q_proj", "w1"], "init_lora_weights": "gaussian"},
        {"target_modules": ["q_proj"], "init_lora_weights": False, "lora_dropout": 0.5},
        {"target_modules": ["q_proj"], "task_type": None},
    ],
    ids=lambda options: "-".join(list(options)[1:]) or "regex",
)
def test_what_peft_can_say_about_modules_is_understood(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    theirs, ours = their_adapter(tmp_path, **options)
    load_adapter(ours, tmp_path / "adapter")
    assert_equal_logits(theirs, ours)
    save_adapter(tmp_path / "adapter", ours)
    assert_equal_logits(in_peft(tmp_path), ours)


def test_an_adapter_for_a_bare_model_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaModel

    _, ours = both(tmp_path / "base")
    with unwarned():
        base = LlamaModel.from_pretrained(tmp_path / "base")
        config = LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["q_proj", "o_proj"])
        theirs = get_peft_model(base, config).eval()
        randomise(theirs)
        theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs(IDS).last_hidden_state
        torch.testing.assert_close(ours(IDS, logits=None).hidden, expected, atol=1e-4, rtol=1e-4)


def last_token_scores(ours: Llama, loaded: LoadedAdapter) -> Tensor:
    assert loaded.head is not None
    with torch.no_grad():
        return ours(IDS, logits=None).hidden[:, -1] @ loaded.head.T


def test_the_head_of_a_sequence_classifier_comes_along(tmp_path: Path) -> None:
    theirs, ours = their_classifier(tmp_path, target_modules="all-linear")
    loaded = load_adapter(ours, tmp_path / "adapter", adapter_name="reviews")
    assert loaded.adapter_name == "reviews"
    assert loaded.base_model_name == str(tmp_path / "base")
    assert loaded.modules == tuple(lora_layers(ours))
    assert loaded.head is not None
    assert loaded.head.shape == (5, 48)
    with torch.no_grad():
        expected = theirs(IDS).logits
    torch.testing.assert_close(last_token_scores(ours, loaded), expected, atol=1e-4, rtol=1e-4)


def test_a_head_of_ours_loads_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    _, ours = both(tmp_path / "base")
    add_lora_wrapper(ours, use_dora=True)
    randomise(ours)
    head = torch.randn(5, 48)
    save_adapter(tmp_path / "adapter", ours, head=head)
    with unwarned():
        theirs = PeftModel.from_pretrained(classifier_base(tmp_path), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
        found = ours(IDS, logits=None).hidden[:, -1] @ head.T
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    again = load_adapter(load_pretrained(tmp_path / "base", device="cpu"), tmp_path / "adapter")
    assert again.head is not None
    assert torch.equal(again.head, head)


def test_pefts_own_classifier_file_and_ours_have_the_same_keys(tmp_path: Path) -> None:
    _, ours = their_classifier(tmp_path, target_modules="all-linear", use_dora=True)
    loaded = load_adapter(ours, tmp_path / "adapter")
    save_adapter(tmp_path / "again", ours, head=loaded.head)
    theirs = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert found.keys() == theirs.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_config_says_what_the_adapter_is(tmp_path: Path) -> None:
    model = our_model()
    add_lora_wrapper(model, ["q_proj", "w1"], r=3, lora_alpha=5, layers_to_transform=1)
    save_adapter(tmp_path, model, base_model_name="org/base")
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "alpha_pattern": {},
        "base_model_name_or_path": "org/base",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": "layers",
        "layers_to_transform": [1],
        "lora_alpha": 5,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 3,
        "rank_pattern": {},
        "target_modules": ["gate_proj", "q_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    assert {
        name: tuple(tensor.shape)
        for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
    } == {
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": (3, 32),
        "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight": (32, 3),
        "base_model.model.model.layers.1.mlp.gate_proj.lora_A.weight": (3, 32),
        "base_model.model.model.layers.1.mlp.gate_proj.lora_B.weight": (48, 3),
    }


def test_an_irregular_choice_of_modules_is_named_in_full(tmp_path: Path) -> None:
    _, ours = both(tmp_path / "base")
    add_lora_wrapper(ours, ["layers.0.attention.compute_query", "layers.2.feed_forward.w2"])
    randomise(ours)
    save_adapter(tmp_path / "adapter", ours)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.2.mlp.down_proj",
    ]
    assert config["layers_to_transform"] is None
    assert_equal_logits(in_peft(tmp_path), ours)


def test_a_bfloat16_base_takes_and_gives_a_float32_adapter(tmp_path: Path) -> None:
    _, ours = both(tmp_path / "base")
    add_lora_wrapper(ours, use_dora=True)
    randomise(ours)
    save_adapter(tmp_path / "adapter", ours)
    half = load_pretrained(tmp_path / "base", device="cpu", dtype="bfloat16")
    load_adapter(half, tmp_path / "adapter")
    assert {parameter.dtype for parameter in lora_parameters(half)} == {torch.float32}
    assert all(map(torch.equal, lora_parameters(half), lora_parameters(ours)))
    assert (logits(half).float() - logits(ours)).norm() / logits(ours).norm() < 0.05


def test_two_adapters_are_loaded_beside_each_other(tmp_path: Path) -> None:
    theirs, ours = their_adapter(tmp_path, target_modules="all-linear")
    add_lora_wrapper(ours, "w1", adapter_name="mine")
    load_adapter(ours, tmp_path / "adapter", adapter_name="theirs")
    assert_equal_logits(theirs, ours)  # the one loaded last is active
    set_adapters(ours, "mine")
    torch.testing.assert_close(logits(ours), plain_logits(tmp_path))
    with pytest.raises(MinllamaError, match="already an adapter 'theirs'"):
        load_adapter(ours, tmp_path / "adapter", adapter_name="theirs")


def test_a_merged_model_saves_the_same_adapter(tmp_path: Path) -> None:
    model = our_model()
    add_lora_wrapper(model, use_dora=True)
    randomise(model)
    save_adapter(tmp_path / "before", model)
    merge_lora(model)
    save_adapter(tmp_path / "after", model)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_loading_draws_no_random_numbers_and_leaves_the_adapter_trainable(tmp_path: Path) -> None:
    _, ours = their_adapter(tmp_path, target_modules=["q_proj"])
    state = torch.get_rng_state()
    load_adapter(ours, tmp_path / "adapter")
    assert torch.equal(torch.get_rng_state(), state)
    assert [p for p in ours.parameters() if p.requires_grad] == lora_parameters(ours)


def test_saving_keeps_other_files_and_replaces_an_older_adapter(tmp_path: Path) -> None:
    model = our_model()
    add_lora_wrapper(model)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "adapter_model.bin").write_text("old")
    save_adapter(tmp_path, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    modes = {path.stat().st_mode for path in tmp_path.iterdir() if "adapter" in path.name}
    assert len(modes) == 1  # whoever may read one may read the other


def test_a_disk_that_is_full_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = our_model()
    add_lora_wrapper(model, r=2)

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MinllamaError, match="adapter: No space left on device"):
        save_adapter(tmp_path / "adapter", model)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_not_there_is_not_saved(tmp_path: Path) -> None:
    model = our_model()
    with pytest.raises(MinllamaError, match="there is no adapter 'default' to save; there are non"):
        save_adapter(tmp_path / "x", model)
    add_lora_wrapper(model, adapter_name="a")
    with pytest.raises(MinllamaError, match="there is no adapter 'b' to save; there are a"):
        save_adapter(tmp_path / "x", model, adapter_name="b")
    assert not (tmp_path / "x").exists()
