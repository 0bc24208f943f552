"""Hugging Face folders: read what others wrote, write what others read, refuse what is wrong."""

import errno
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlamaModel

from minllama.checkpoints import huggingface
from minllama.checkpoints.gguf import write_gguf
from minllama.checkpoints.huggingface import to_half_split, to_interleaved
from minllama.checkpoints.huggingface_config import config_from_huggingface, config_to_huggingface
from minllama.checkpoints.llama2c import write_llama2c_bin
from minllama.checkpoints.open import open_checkpoint
from minllama.errors import CheckpointError, MinllamaError, OptionError
from minllama.model.config import LlamaConfig, RopeScaling
from minllama.model.llama import Llama, load_pretrained
from tests.model.test_llama import VARIANTS
from tests.tiny import both, our_model, random_ids, their_model


def edit_config(folder, **changes):
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "DELETE"}))


def test_the_permutation_is_the_one_of_the_two_layouts():
    half_split = torch.tensor([0, 2, 4, 1, 3, 5, 10, 12, 14, 11, 13, 15])  # two heads of width 6
    interleaved = torch.tensor([0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15])
    assert torch.equal(to_interleaved(half_split, 2), interleaved)
    assert torch.equal(to_half_split(interleaved, 2), half_split)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_we_write_transformers_loads_with_equal_logits(variant, tmp_path):
    theirs, ours = both(tmp_path / "theirs", **VARIANTS[variant])
    ours.save_pretrained(tmp_path / "ours")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    ids = random_ids(2, 60, 97)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, theirs(ids).logits, atol=1e-6, rtol=0)
        torch.testing.assert_close(loaded(ids).logits, ours(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_to_theirs_to_ours_is_bit_for_bit(variant, dtype, tmp_path):
    _, ours = both(tmp_path / "theirs", **VARIANTS[variant])
    ours.to(dtype).save_pretrained(tmp_path / "ours")
    back = Llama.from_pretrained(tmp_path / "ours", dtype=dtype, device="cpu")
    assert back.config == ours.config
    assert back.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_shards_with_an_index_are_read_and_written(tmp_path, monkeypatch):
    theirs = their_model()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours = load_pretrained(tmp_path / "theirs")
    monkeypatch.setattr(huggingface, "MAX_SHARD_SIZE", "30KB")
    ours.save_pretrained(tmp_path / "ours")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    ids = random_ids(2, 30, 97)
    with torch.no_grad():
        expected = theirs(ids).logits
        for loaded in (
            LlamaForCausalLM.from_pretrained(tmp_path / "ours"),
            load_pretrained(tmp_path / "ours"),
        ):
            torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-4, rtol=0)


def test_a_smaller_save_leaves_no_stale_shards_and_keeps_other_files(tmp_path, monkeypatch):
    model = our_model()
    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "MAX_SHARD_SIZE", "10KB")
        model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    (tmp_path / "m" / "runs").mkdir()
    (tmp_path / "m" / "runs" / "log").write_text("mine too")
    model.save_pretrained(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
        "notes.txt",
        "runs",
    ]
    assert (tmp_path / "m" / "runs" / "log").read_text() == "mine too"


@pytest.mark.parametrize(
    "write",
    [
        huggingface.write_huggingface,
        lambda path, config, tensors: write_gguf(path, config, tensors, None),
        write_llama2c_bin,
    ],
    ids=["hf", "gguf", "llama2c"],
)
def test_tensors_that_disagree_with_the_config_are_all_listed_and_none_is_written(write, tmp_path):
    model = our_model()
    tensors = {**model.state_dict(), "norm.weight": torch.ones(3), "wings": torch.ones(2)}
    del tensors["output.weight"]
    with pytest.raises(MinllamaError) as caught:
        write(tmp_path / "m", model.config, tensors)
    assert str(caught.value) == (
        "the tensors disagree with their config: output.weight is missing; wings is unexpected; "
        "norm.weight has shape (3,), but the config implies (32,)"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_are_not_written_in_a_dtype_that_cannot_be_read(dtype, tmp_path):
    model = our_model()
    with pytest.raises(OptionError, match=f"dtype must be one of .*, not {dtype}"):
        huggingface.write_huggingface(tmp_path / "m", model.config, model.state_dict(), dtype=dtype)


def test_tensors_that_share_memory_are_written_each_in_full(tmp_path):
    model = our_model()
    tensors = dict(model.state_dict())
    tensors["output.weight"] = tensors["tok_embeddings.weight"]
    tensors["norm.weight"] = tensors["tok_embeddings.weight"][3]
    huggingface.write_huggingface(tmp_path / "m", model.config, tensors)
    found = load_pretrained(tmp_path / "m").state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name


def test_every_file_of_a_folder_has_the_mode_of_new_files(tmp_path):
    our_model().save_pretrained(tmp_path / "m")
    (tmp_path / "new").touch()
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "m").iterdir()}
    assert modes == dict.fromkeys(
        ("config.json", "model.safetensors"), (tmp_path / "new").stat().st_mode
    )


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(file, tmp_path, monkeypatch):
    our_model().save_pretrained(tmp_path / "m")
    opened = io.open

    def forbidden(path, *args, **kwargs):
        if Path(path).name == file:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(io, "open", forbidden)  # root may read everything
    with pytest.raises(CheckpointError, match=rf"{file}: cannot be read \(Permission denied\)$"):
        load_pretrained(tmp_path / "m")


def test_pytorch_model_bin_is_read(tmp_path):
    theirs, ours = both(tmp_path / "safe")
    folder = tmp_path / "bin"
    folder.mkdir()
    theirs.config.save_pretrained(folder)
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    for name, tensor in load_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


def test_sharded_pytorch_model_bin_is_read(tmp_path):
    theirs, ours = both(tmp_path / "safe")
    folder = tmp_path / "bin"
    folder.mkdir()
    theirs.config.save_pretrained(folder)
    names = list(theirs.state_dict())
    weight_map = {}
    for number, part in enumerate((names[:7], names[7:])):
        file = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        torch.save({name: theirs.state_dict()[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for name, tensor in load_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


def test_a_bare_llama_model_without_prefix_is_read_if_tied(tmp_path):
    theirs, ours = both(tmp_path / "full", tie_word_embeddings=True)
    bare = LlamaModel(theirs.config)
    bare.load_state_dict(theirs.model.state_dict())
    bare.save_pretrained(tmp_path / "bare")
    for name, tensor in load_pretrained(tmp_path / "bare").state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


def test_weights_are_mapped_not_copied(tmp_path):
    both(tmp_path)
    model = load_pretrained(tmp_path)
    maps = [
        range(*(int(side, 16) for side in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(tmp_path / "model.safetensors"))
    ]
    assert any(model.layers[0].feed_forward.w1.weight.data_ptr() in part for part in maps)


def test_training_in_place_leaves_the_file_alone(tmp_path):
    both(tmp_path)
    model = load_pretrained(tmp_path)
    before = model.norm.weight.clone()
    model.norm.weight.data.add_(1)
    assert torch.equal(load_pretrained(tmp_path).norm.weight, before)


def test_the_old_and_the_new_words_for_rope_mean_the_same(tmp_path):
    both(tmp_path)
    old = {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    newer = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    newest = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}}
    raw = json.loads((tmp_path / "config.json").read_text())
    plain = {k: v for k, v in raw.items() if not k.startswith("rope_")}
    configs = [config_from_huggingface({**plain, **words}) for words in (old, newer, newest)]
    assert configs[0].rope_theta == 500000.0
    assert configs[0].rope_scaling == RopeScaling("linear", factor=2.0)
    assert configs[0] == configs[1] == configs[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"model_type": "DELETE"}, "model_type is None"),
        ({"hidden_size": "DELETE"}, "hidden_size is missing"),
        ({"hidden_size": "48"}, "dim must be an integer above 0, not '48'"),
        ({"num_key_value_heads": 3}, r"n_heads \(4\) must be divisible by n_kv_heads \(3\)"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized with 'gptq'"),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
            "rope scaling 'longrope' is unknown; known: default, linear, dynamic",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "'linear' has no factor"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": "x"}},
            "factor must be a finite number",
        ),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], not a JSON object"),
        (
            {"num_hidden_layers": 10**9},
            "the config has 1000000000 layers, but there are tensors of 3",
        ),
        ({"vocab_size": 10**12}, "the config has vocab_size 1000000000000"),
        ({"quantization_config": "gptq"}, "quantized with 'gptq'"),
        ({"tie_word_embeddings": "false"}, "tie_embeddings must be true or false, not 'false'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": -1}}, "beta_fast"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": "a"}}, "mscale"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}}, "above 1"),
        ({"rms_norm_eps": -1}, "norm_eps must be a finite number above 0"),
    ],
)
def test_a_config_that_is_no_llamas_is_refused_in_one_line(changes, message, tmp_path):
    both(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "\x00\xff", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(content, tmp_path):
    both(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json: not"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_a_cut_safetensors_file_is_refused(size, tmp_path):
    both(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="not a complete safetensors file") as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_safetensors_header_past_the_end_is_refused(tmp_path):
    both(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_pretrained(tmp_path)


def test_every_difference_between_tensors_and_config_is_listed(tmp_path):
    both(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.extra"] = torch.zeros(2)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(4, 5)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(tmp_path)
    message = str(caught.value)
    assert "norm.weight is missing" in message
    assert "model.extra is unexpected" in message
    shapes = "compute_query.weight has shape (4, 5), but the config implies (48, 48)"
    assert shapes in message
    assert "\n" not in message


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinite_weights_are_refused(bad, dtype, tmp_path):
    both(tmp_path)
    tensors = {k: t.to(dtype) for k, t in load_file(tmp_path / "model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.feed_forward\.w3\.weight has 1 NaN"):
        load_pretrained(tmp_path)


def test_what_float16_cannot_hold_is_not_blamed_on_the_file(tmp_path):
    both(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"float16 cannot represent 1 values of norm\.weight"):
        load_pretrained(tmp_path, dtype="float16")
    assert load_pretrained(tmp_path, dtype="bfloat16").dtype == torch.bfloat16


def test_a_dtype_that_is_none_is_refused(tmp_path):
    both(tmp_path)
    for dtype in ("float3", torch.int32):
        with pytest.raises(MinllamaError, match="is not supported"):
            load_pretrained(tmp_path, dtype=dtype)


def test_large_finite_weights_whose_sum_overflows_are_fine(tmp_path):
    both(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.full((48,), 3e38)
    save_file(tensors, tmp_path / "model.safetensors")
    assert load_pretrained(tmp_path).norm.weight[0] == 3e38


def test_an_integer_tensor_is_no_weight(tmp_path):
    both(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(48, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="stored as I8, which is not a weight"):
        load_pretrained(tmp_path)


def test_an_index_cannot_reach_out_of_its_folder(tmp_path):
    both(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a file in this folder"):
        load_pretrained(tmp_path / "m")


def test_an_index_that_an_earlier_save_left_is_not_followed(tmp_path):
    model = our_model()
    model.save_pretrained(tmp_path)
    stale = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(stale))
    again = load_pretrained(tmp_path)
    assert torch.equal(again.output.weight, model.output.weight)


@pytest.mark.parametrize("weight_map", [{"a": ["x"]}, {"a": 5, "b": "x"}, {"a": None}])
def test_a_damaged_index_is_one_line(weight_map, tmp_path):
    our_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"missing|not a file"):
        load_pretrained(tmp_path)


def test_a_matrix_without_a_shape_is_listed(tmp_path):
    our_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: torch.tensor(1.0)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="compute_query"):
        load_pretrained(tmp_path)


def test_a_missing_shard_and_missing_weights_are_named(tmp_path):
    both(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights beside config\.json"):
        load_pretrained(tmp_path)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors is missing"):
        load_pretrained(tmp_path)


def test_unknown_keys_are_said_not_dropped(tmp_path):
    both(tmp_path)
    edit_config(tmp_path, some_new_thing=3)
    assert open_checkpoint(tmp_path).ignored == ("some_new_thing",)


def test_what_config_json_has_no_words_for_is_refused():
    config = LlamaConfig(dim=8, n_layers=1, n_heads=2, vocab_size=4)
    factors = config.replace(rope_scaling=RopeScaling("factors", factors=(1.0, 2.0)))
    with pytest.raises(MinllamaError, match=r"cannot represent rope scaling 'factors'"):
        config_to_huggingface(factors, "float32", None)
    with pytest.raises(MinllamaError, match="always causal"):
        config_to_huggingface(config.replace(causal=False), "float32", None)


def test_the_config_can_be_changed_while_loading(tmp_path):
    both(tmp_path)
    model = load_pretrained(tmp_path, dropout=0.25, causal=False)
    assert model.config.dropout == 0.25
    assert model.layers[0].attention.attention_dropout == 0.25
    assert not model.training
    with pytest.raises(MinllamaError, match="unknown config field hidden_size"):
        load_pretrained(tmp_path, hidden_size=3)
