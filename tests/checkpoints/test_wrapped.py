"""Claims about weights that training programs have saved inside other things, or under more names.

The names are those that torch, PEFT and their kin give themselves: the wrappers are real ones.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.wrapped import without_wrappers
from minllama.errors import CheckpointError
from minllama.model.llama import load_pretrained
from tests.checkpoints.test_meta import assert_read, cut, whole_model, write
from tests.peft_model import their_adapter
from tests.tiny import both, random_ids

State = dict[str, Tensor]


class Wrapped(nn.Module):
    """As DataParallel and DistributedDataParallel hold a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Lightning(nn.Module):
    """As a LightningModule holds a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def compiled_layers(module: Any) -> nn.Module:
    module.model.layers[0] = torch.compile(module.model.layers[0], backend="eager")
    return module  # type: ignore[no-any-return]


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "DDP": Wrapped,
    "torch.compile": compiled,
    "a compiled layer": compiled_layers,
    "Lightning": Lightning,
    "all": lambda module: Wrapped(compiled(Lightning(compiled_layers(module)))),
}


def saved(folder: Path, state: State, *, pickled: bool) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    state = {name: tensor.clone() for name, tensor in state.items()}
    if pickled:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_models_weights_are_read(
    wrapper: str, pickled: bool, tied: bool, tmp_path: Path
) -> None:
    theirs, _ = both(tmp_path, tie_word_embeddings=tied)
    ids = random_ids(theirs.config.vocab_size, 1, 9)
    with torch.no_grad():
        logits = theirs(ids).logits
    state = WRAPPERS[wrapper](theirs).state_dict()
    if tied:
        state = {name: tensor for name, tensor in state.items() if "lm_head" not in name}
    saved(tmp_path, state, pickled=pickled)
    ours = load_pretrained(tmp_path, device="cpu")
    torch.testing.assert_close(ours(ids).logits, logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "nested",
    [
        lambda state: {"state_dict": state, "epoch": 3, "optimizer_states": [{"state": state}]},
        lambda state: {"model_state_dict": state, "optimizer": {"state": {0: state}}, "loss": 0.5},
        lambda state: {"module": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"app": {"model": state, "optim": {"state": {}}}},
    ],
)
def test_a_state_dict_inside_a_training_checkpoint_is_read(
    nested: Callable[[State], dict[str, Any]], tmp_path: Path
) -> None:
    theirs, _ = both(tmp_path)
    ids = random_ids(theirs.config.vocab_size, 1, 9)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(nested(state), tmp_path / "pytorch_model.bin")
    ours = load_pretrained(tmp_path, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: {"ema": s}, "tensors are in 'ema'; keep only the model's state dict:"),
        (lambda s: {"model": s, "module": s}, "tensors are in 'model', 'module'"),
        (lambda s: {"epoch": 3, "config": {}}, "contains no tensors, only 'epoch', 'config'; save"),
        (lambda s: {**s, "epoch": 3}, "'epoch' is of type int, not a tensor; save the model's"),
        (lambda s: {"state_dict": {**s, 7: 8}}, "'state_dict' has keys that are not tensor names"),
    ],
)
def test_what_is_not_unmistakable_is_one_line_with_the_way(
    content: Callable[[State], dict[str, Any]], message: str, tmp_path: Path
) -> None:
    both(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(content(state), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_names_of_two_kinds_stay_as_they_are() -> None:
    root = "model.embed_tokens.weight"
    for names in (
        [root, "module.other"],
        [f"language_model.{root}", "vision_tower.x.weight"],
        [f"a.{root}", f"b.{root}"],
        [root, f"_orig_mod.{root}"],
    ):
        assert list(without_wrappers(dict.fromkeys(names), root, "embed_tokens.weight")) == names


def test_a_model_with_adapters_in_it_is_refused_with_the_way(tmp_path: Path) -> None:
    both(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    state["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 3)
    saved(tmp_path, state, pickled=False)
    with pytest.raises(CheckpointError, match=r"with adapters .*merge_and_unload"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("n_shards", [1, 2])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_metas_files_may_be_wrapped_and_have_tables(
    prefix: str, n_shards: int, tmp_path: Path
) -> None:
    tensors = whole_model()
    shards = []
    for shard in cut(tensors, n_shards, 0):
        shard["freqs_cis"] = torch.ones(3, 4, dtype=torch.complex64)
        shard["layers.0.attention.inner_attention.rope.freqs"] = torch.ones(2)
        shards.append({f"{prefix}{name}": tensor for name, tensor in shard.items()})
    folder = write(tmp_path / "meta", shards)
    assert_read(open_checkpoint(folder), tensors)
    for number, shard in enumerate(shards):
        torch.save({"model": shard, "step": 7}, folder / f"consolidated.{number:02d}.pth")
    assert_read(open_checkpoint(folder), tensors)


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("use_dora", [True, False])
def test_an_adapter_saved_from_a_wrapped_model_is_read(
    use_dora: bool, pickled: bool, tmp_path: Path
) -> None:
    their_adapter(tmp_path, target_modules=["q_proj", "v_proj"], use_dora=use_dora)
    folder = tmp_path / "adapter"
    config = folder / "adapter_config.json"
    raw = {**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path / "base")}
    config.write_text(json.dumps(raw))
    right = {n: t.load() for n, t in open_checkpoint(folder).tensors.items()}
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    file.unlink()

    def in_training(name: str) -> str:
        name = name.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight")
        for kind in ("lora_A", "lora_B"):
            name = name.replace(f"{kind}.weight", f"{kind}.default.weight")
        return f"module._orig_mod.{name}"

    state = {in_training(name): tensor for name, tensor in state.items()}
    if pickled:
        torch.save({"state_dict": state, "epoch": 1}, folder / "adapter_model.bin")
    else:
        save_file(state, file)
    found = open_checkpoint(folder).tensors
    assert found.keys() == right.keys()
    assert all(torch.equal(found[name].load(), tensor) for name, tensor in right.items())
