"""Claims about folders whose weights and config disagree: what transformers 5 runs is what we run.

An output matrix of its own beside `tie_word_embeddings`, and biases on some projections only.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from minllama.checkpoints.gguf import write_gguf
from minllama.checkpoints.llama2c import write_llama2c_bin
from minllama.checkpoints.open import open_checkpoint
from minllama.errors import CheckpointError, CheckpointWarning
from minllama.model.llama import load_pretrained
from tests.tiny import both, random_ids

Stored = Callable[[Path], None]


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "DELETE"}))


def their_untied(folder: Path, **changes: Any) -> LlamaForCausalLM:
    """A model with an output matrix of its own, whose config then says that there is none."""
    theirs, _ = both(folder, **changes)
    edit_config(folder, tie_word_embeddings=True)
    return theirs


def as_pickle(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    where = {name: files["lm_head" in name] for name in tensors}
    for file in files:
        part = {name: tensor for name, tensor in tensors.items() if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def as_it_is(folder: Path) -> None:
    pass


@pytest.mark.parametrize("stored", [as_it_is, as_pickle, as_shards])
def test_a_head_of_its_own_counts_although_the_config_ties_it(
    stored: Stored, tmp_path: Path
) -> None:
    their_untied(tmp_path)
    stored(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with pytest.warns(CheckpointWarning, match="a different lm_head.weight"):
        ours = load_pretrained(tmp_path, device="cpu")
    assert not ours.config.tie_embeddings
    assert torch.equal(ours.output.weight, theirs.lm_head.weight)
    ids = random_ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-4)


def test_a_head_of_its_own_is_saved_quantized_and_converted(tmp_path: Path) -> None:
    theirs = their_untied(tmp_path / "hf")
    with pytest.warns(CheckpointWarning):
        ours = load_pretrained(tmp_path / "hf", device="cpu")
    ours.save_pretrained(tmp_path / "saved")
    write_gguf(tmp_path / "x.gguf", ours.config, ours.state_dict(), None, "f32")
    write_llama2c_bin(tmp_path / "x.bin", ours.config.replace(norm_eps=1e-5), ours.state_dict())
    for written in ("saved", "x.gguf", "x.bin"):
        again = load_pretrained(tmp_path / written, device="cpu")  # without a warning
        assert torch.equal(again.output.weight, theirs.lm_head.weight), written
        assert not torch.equal(again.tok_embeddings.weight, again.output.weight), written
    with pytest.warns(CheckpointWarning):
        small = load_pretrained(tmp_path / "hf", device="cpu", quantize="int8")
    ids = random_ids(1, 9)
    with torch.no_grad():
        difference = (small(ids).logits - ours(ids).logits).abs().max()
    assert difference < 0.1


@pytest.mark.parametrize("stored", [as_it_is, as_pickle, as_shards])
def test_a_head_that_equals_the_embedding_stays_tied_without_a_word(
    stored: Stored, tmp_path: Path
) -> None:
    their_untied(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    stored(tmp_path)
    checkpoint = open_checkpoint(tmp_path)  # a warning would be an error
    assert checkpoint.config.tie_embeddings
    assert checkpoint.ignored == ("lm_head.weight",)


def test_a_tied_head_alone_stands_for_the_embedding(tmp_path: Path) -> None:
    their_untied(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    head = tensors["lm_head.weight"]
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_pretrained(tmp_path, device="cpu")
    assert torch.equal(theirs.model.embed_tokens.weight, head)
    assert torch.equal(ours.tok_embeddings.weight, head)


def test_without_a_word_on_ties_a_missing_head_is_missing(tmp_path: Path) -> None:
    both(tmp_path, tie_word_embeddings=True)
    edit_config(tmp_path, tie_word_embeddings="DELETE")
    with pytest.raises(CheckpointError, match=r"output.weight is missing"):
        load_pretrained(tmp_path)


BIASES = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")


def keep_biases(folder: Path, ends: tuple[str, ...]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    kept = {n: t for n, t in tensors.items() if not n.endswith(".bias") or n.endswith(ends)}
    save_file(kept, file, metadata={"format": "pt"})


@pytest.mark.parametrize("stored", [as_it_is, as_pickle])
@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({"attention_bias": True}, BIASES),
        ({"attention_bias": True}, BIASES[:1]),
        ({"mlp_bias": True}, ("mlp.gate_proj.bias", "mlp.up_proj.bias")),
    ],
)
def test_a_bias_that_is_absent_beside_others_is_zero(
    stored: Stored, changes: dict[str, Any], ends: tuple[str, ...], tmp_path: Path
) -> None:
    both(tmp_path / "hf", **changes)
    keep_biases(tmp_path / "hf", ends)
    stored(tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ours = load_pretrained(tmp_path / "hf", device="cpu")
    write_gguf(tmp_path / "x.gguf", ours.config, ours.state_dict(), None, "f32")
    ours.save_pretrained(tmp_path / "saved")
    ids = random_ids(2, 9)
    with torch.no_grad():
        want = theirs(ids).logits
        for source in (tmp_path / "hf", tmp_path / "x.gguf", tmp_path / "saved"):
            got = load_pretrained(source, device="cpu")(ids).logits
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_biases_and_a_config_that_disagree_are_refused(tmp_path: Path) -> None:
    both(tmp_path / "all", attention_bias=True, mlp_bias=True)
    edit_config(tmp_path / "all", attention_bias=False)
    with pytest.raises(
        CheckpointError, match=r"biases \(model.layers.0.self_attn.* set it to true"
    ):
        load_pretrained(tmp_path / "all")
    edit_config(tmp_path / "all", attention_bias=True, mlp_bias="DELETE")
    with pytest.raises(CheckpointError, match=r"biases \(model.layers.0.mlp.* not set mlp_bias"):
        load_pretrained(tmp_path / "all")
    both(tmp_path / "none")
    edit_config(tmp_path / "none", attention_bias=True)
    with pytest.raises(CheckpointError, match=r"compute_query.bias is missing"):
        load_pretrained(tmp_path / "none")
