"""Claims about adapters that cannot be used: refused in one line, with the model as it was."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minllama.errors import CheckpointError, MinllamaError
from minllama.lora import add_lora_wrapper, lora_layers, lora_parameters, merge_lora
from minllama.lora.peft_files import load_adapter, save_adapter
from minllama.model.llama import Llama
from tests.peft_model import randomise, their_adapter
from tests.tiny import our_model

HEAD = "base_model.model.score.weight"
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter that fits `our_model()`: q and v, rank 8."""
    model = our_model()
    add_lora_wrapper(model, ["q_proj", "v_proj"])
    randomise(model)
    save_adapter(tmp_path / "adapter", model, base_model_name="org/base")
    return tmp_path / "adapter"


def set_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_tensors(
    adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any]
) -> dict[str, torch.Tensor]:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return tensors


def refusal(adapter: Path, model: Llama | None = None) -> str:
    """The message with which an adapter is refused, on one line, and the model untouched."""
    model = our_model() if model is None else model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(MinllamaError) as error:
        load_adapter(model, adapter)
    assert "\n" not in str(error.value)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == trainable
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "an adapter of type 'IA3'; only LORA"),
        ({"peft_type": None}, "an adapter of type None"),
        ({"bias": "all"}, "not supported: bias='all'; merge the adapter into its base"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication=[[0, 1], [0, 2]]"),
        ({"modules_to_save": ["lm_head", "score"]}, "modules_to_save=['lm_head']"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters="),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices="),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens=[5]"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora="),
        ({"arrow_config": {"top_k": 3}}, "arrow_config="),
        ({"kasa_config": {"beta": 1}}, "kasa_config="),
        ({"monteclora_config": {"n": 1}}, "monteclora_config="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"task_type": "TOKEN_CLS"}, "task_type='TOKEN_CLS'"),
        ({"from_the_future": 3, "bias": "all"}, "bias='all', from_the_future=3"),
        ({"r": "8"}, "r must be an integer >= 1, not '8'"),
        ({"r": 0}, "r must be >= 1, not 0"),
        ({"r": None}, "r must be an integer"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number"),
        ({"lora_alpha": -1}, "lora_alpha must be > 0"),
        ({"lora_dropout": 2}, "lora_dropout must be in [0, 1], not 2"),
        ({"use_dora": "yes"}, "use_dora must be true or false"),
        ({"target_modules": 5}, "target_modules must be a list of names, not 5"),
        ({"target_modules": [1]}, "target_modules must be a list of names"),
        ({"exclude_modules": {"a": 1}}, "exclude_modules must be a list of names"),
        ({"modules_to_save": "score"}, "modules_to_save must be a list of names"),
        ({"layers_to_transform": ["a"]}, "layers_to_transform must be integers"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object"),
        ({"rank_pattern": {"q_proj": "x"}}, "r must be an integer"),
        ({"alpha_pattern": {"(q|v_proj": 3}}, "'(q|v_proj' is not a regular expression"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path must be a string"),
    ],
)
def test_configs_that_are_not_understood_are_refused(
    adapter: Path, changes: dict[str, Any], words: str
) -> None:
    set_config(adapter, **changes)
    message = refusal(adapter)
    assert words in message
    assert message.startswith(str(adapter / "adapter_config.json"))


@pytest.mark.parametrize(
    "changes",
    [
        {"megatron_core": "megatron.core", "qalora_group_size": 16, "peft_version": "9.9"},
        {"loftq_config": {}, "eva_config": {"rho": 2.0}, "revision": "main"},
        {"from_the_future": None, "and_this": False, "or_this": {}},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj", "o_proj", "mlp"]},
    ],
)
def test_settings_without_effect_on_the_output_are_let_pass(
    adapter: Path, changes: dict[str, Any]
) -> None:
    if "target_modules" in changes:
        changes["exclude_modules"] += ["gate_proj", "up_proj", "down_proj"]
    set_config(adapter, **changes)
    assert len(load_adapter(our_model(), adapter).modules) == 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not readable as JSON"),
        (b"{", "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"[1]", "not a JSON object"),
        (b'"LORA"', "not a JSON object"),
        (b" " * (2**24 + 1), "far larger than such a file should be"),
    ],
    ids=["empty", "cut", "bytes", "deep", "list", "string", "large"],
)
def test_damaged_configs_are_refused(adapter: Path, content: bytes, words: str) -> None:
    (adapter / "adapter_config.json").write_bytes(content)
    assert words in refusal(adapter)


def test_a_folder_without_an_adapter_is_refused(adapter: Path) -> None:
    assert "no adapter_config.json; name a PEFT" in refusal(adapter / "x")
    (adapter / "adapter_model.safetensors").unlink()
    assert "neither adapter_model.safetensors nor adapter_model.bin" in refusal(adapter)
    (adapter / "adapter_config.json").unlink()
    os.mkfifo(adapter / "adapter_config.json")  # opening it would wait for ever
    assert "no adapter_config.json" in refusal(adapter)


def test_an_adapter_of_another_base_lists_every_difference(adapter: Path) -> None:
    message = refusal(adapter, our_model(dim=24, n_layers=1))
    for line in (
        f"{QUERY}.lora_A.weight has shape (8, 32), but the config implies (8, 24)",
        f"{QUERY}.lora_B.weight has shape (32, 8), but the config implies (24, 8)",
        "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight is unexpected",
        "load the base model that adapter_config.json names",
    ):
        assert line in message


def test_missing_unexpected_and_misshapen_tensors_are_listed(adapter: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{QUERY}.lora_B.weight"]
        tensors[f"{QUERY}.lora_magnitude_vector"] = torch.ones(32)
        tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"] = torch.ones(2, 3)

    set_tensors(adapter, change)
    message = refusal(adapter)
    assert f"{QUERY}.lora_B.weight is missing" in message
    assert f"{QUERY}.lora_magnitude_vector is unexpected" in message
    assert "v_proj.lora_A.weight has shape (2, 3), but the config implies (8, 32)" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 4}, f"{QUERY}.lora_A.weight has shape (8, 32), but the config implies (4, 32)"),
        ({"r": 10**12}, "but the config implies (1000000000000, 32)"),
        ({"use_dora": True}, f"{QUERY}.lora_magnitude_vector is missing"),
        ({"target_modules": ["q_proj"]}, "v_proj.lora_A.weight is unexpected"),
        (
            {"layers_to_transform": None, "target_modules": "all-linear"},
            "k_proj.lora_A.weight is m",
        ),
        ({"layers_to_transform": [0]}, "layers.1.self_attn.q_proj.lora_A.weight is unexpected"),
        ({"task_type": "SEQ_CLS"}, "base_model.model.score.weight is missing"),
        ({"modules_to_save": ["score"]}, "base_model.model.score.weight is missing"),
        ({"target_modules": ["c_attn"]}, "is unexpected"),
        ({"target_modules": []}, "is unexpected"),
    ],
)
def test_a_config_that_its_tensors_contradict_is_refused(
    adapter: Path, changes: dict[str, Any], words: str
) -> None:
    set_config(adapter, **changes)
    assert words in refusal(adapter)


@pytest.mark.parametrize("shape", [(3,), (3, 31), (2, 3, 32)])
def test_a_misshapen_head_is_refused(adapter: Path, shape: tuple[int, ...]) -> None:
    set_config(adapter, task_type="SEQ_CLS")
    set_tensors(adapter, lambda tensors: tensors.update({HEAD: torch.ones(shape)}))
    assert f"score.weight has shape {shape}, but the config implies (" in refusal(adapter)


def test_a_head_that_no_config_speaks_of_is_refused(adapter: Path) -> None:
    set_tensors(adapter, lambda tensors: tensors.update({HEAD: torch.ones(3, 32)}))
    assert "base_model.model.score.weight is unexpected" in refusal(adapter)


def test_numbers_that_are_none_are_refused(adapter: Path) -> None:
    set_tensors(adapter, lambda tensors: tensors[f"{QUERY}.lora_A.weight"][0, :2].fill_(torch.nan))
    assert f"{QUERY}.lora_A.weight has 2 NaN or infinite values of 256" in refusal(adapter)


def test_an_empty_adapter_is_refused(adapter: Path) -> None:
    set_config(adapter, target_modules="nothing")
    save_file({}, adapter / "adapter_model.safetensors")
    assert "contains no tensors" in refusal(adapter)


def test_damaged_weights_are_refused(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[:5], whole[:200], whole[:-1]):
        path.write_bytes(content)
        assert "not a complete safetensors file" in refusal(adapter)


def test_pickled_weights_are_read_without_running_them(adapter: Path, tmp_path: Path) -> None:
    model = our_model()
    load_adapter(model, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    again = our_model()
    load_adapter(again, adapter)
    assert all(map(torch.equal, lora_parameters(again), lora_parameters(model)))

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({**tensors, "x": Evil()}, adapter / "adapter_model.bin")
    assert "is refused: its pickle calls" in refusal(adapter)
    assert not (tmp_path / "ran").exists()


def test_a_pattern_that_would_never_end_is_not_run(adapter: Path) -> None:
    set_config(adapter, target_modules="(.*.*.*)*x", layers_to_transform=None)
    assert len(load_adapter(our_model(), adapter).modules) == 4


def test_an_adapter_of_the_vocabulary_is_refused(tmp_path: Path) -> None:
    _, ours = their_adapter(tmp_path, target_modules=["q_proj", "lm_head"])
    assert "it adapts the vocabulary (base_model.model.lm_head." in refusal(
        tmp_path / "adapter", ours
    )


def test_nothing_is_loaded_beside_merged_adapters(adapter: Path) -> None:
    model = our_model()
    add_lora_wrapper(model, adapter_name="a")
    merge_lora(model)
    with pytest.raises(MinllamaError, match="adapters are merged into the weights"):
        load_adapter(model, adapter)
    assert "default" not in lora_layers(model)["layers.0.attention.compute_query"].adapters


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
KEYS = (
    "alpha_pattern base_model_name_or_path bias exclude_modules init_lora_weights layers_pattern "
    "layers_to_transform lora_alpha lora_dropout modules_to_save peft_type r rank_pattern "
    "target_modules task_type use_dora use_rslora auto_mapping unknown"
)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(key=st.sampled_from(KEYS.split()), value=VALUES)
def test_no_value_of_a_config_is_more_than_a_refusal(adapter: Path, key: str, value: Any) -> None:
    config = adapter / "adapter_config.json"
    good = config.read_text()
    set_config(adapter, **{key: value})
    message = ""
    try:
        load_adapter(our_model(), adapter)
    except CheckpointError as error:
        message = str(error)
    config.write_text(good)
    assert "\n" not in message
