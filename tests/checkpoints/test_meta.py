"""Meta's checkpoints: shards cut by hand, as its model-parallel layers cut them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minllama.checkpoints.meta import config_from_params, is_meta, read_meta
from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.types import Checkpoint
from minllama.errors import CheckpointError
from minllama.model.config import LlamaConfig, RopeScaling
from minllama.model.llama import Llama

PARAMS: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": 48,
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
HIDDEN_DIM = 112  # 2/3 * 4 * 32 = 85; 1.3 * 85 = 110; the next multiple of 16

OURS = {
    "wq": "compute_query",
    "wk": "compute_key",
    "wv": "compute_value",
    "wo": "compute_output",
}


def our_name(theirs: str) -> str:
    return ".".join(OURS.get(part, part) for part in theirs.split("."))


def whole_model(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"tok_embeddings": (48, 32), "norm": (32,), "output": (48, 32)}
    for i in range(2):
        shapes |= {
            f"layers.{i}.attention.wq": (32, 32),
            f"layers.{i}.attention.wk": (16, 32),
            f"layers.{i}.attention.wv": (16, 32),
            f"layers.{i}.attention.wo": (32, 32),
            f"layers.{i}.feed_forward.w1": (HIDDEN_DIM, 32),
            f"layers.{i}.feed_forward.w2": (32, HIDDEN_DIM),
            f"layers.{i}.feed_forward.w3": (HIDDEN_DIM, 32),
            f"layers.{i}.attention_norm": (32,),
            f"layers.{i}.ffn_norm": (32,),
        }
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }


def cut(tensors: dict[str, Tensor], n_shards: int, embedding_dim: int) -> list[dict[str, Tensor]]:
    """Shards as fairscale's layers cut them: column-parallel by rows, row-parallel by columns."""
    shards: list[dict[str, Tensor]] = [{} for _ in range(n_shards)]
    for name, tensor in tensors.items():
        module = name.split(".")[-2]
        if tensor.dim() == 1:
            parts = [tensor] * n_shards
        elif module == "tok_embeddings":
            parts = list(tensor.chunk(n_shards, dim=embedding_dim))
        else:
            parts = list(tensor.chunk(n_shards, dim=1 if module in ("wo", "w2") else 0))
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    for shard in shards:
        shard["rope.freqs"] = torch.ones(2)
    return shards


def write(folder: Path, shards: list[dict[str, Tensor]], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    params = {key: value for key, value in (PARAMS | changes).items() if value is not None}
    (folder / "params.json").write_text(json.dumps(params))
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02d}.pth")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "weights"


def assert_read(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    assert checkpoint.tensors.keys() == {our_name(name) for name in tensors}
    for name, tensor in tensors.items():
        found = checkpoint.tensors[our_name(name)]
        assert found.shape == tuple(tensor.shape)
        assert torch.equal(found.load(), tensor), name


@pytest.mark.parametrize("embedding_dim", [0, 1], ids=["llama 3", "llama 1 and 2"])
@pytest.mark.parametrize("n_shards", [1, 2, 4])
def test_model_parallel_shards_are_joined(folder: Path, n_shards: int, embedding_dim: int) -> None:
    tensors = whole_model()
    checkpoint = read_meta(write(folder, cut(tensors, n_shards, embedding_dim)))
    assert_read(checkpoint, tensors)
    assert checkpoint.format == "Meta"
    assert checkpoint.ignored == ("rope.freqs",)
    assert checkpoint.config == LlamaConfig(
        dim=32,
        n_layers=2,
        n_heads=8,
        n_kv_heads=4,
        vocab_size=48,
        hidden_dim=HIDDEN_DIM,
        rope_theta=500000.0,
        max_seq_len=8192,
    )
    stored = checkpoint.tensors["layers.0.feed_forward.w2.weight"]
    assert (stored.stored_as, stored.stored_bytes) == ("float32", 32 * HIDDEN_DIM * 4)


def test_the_joined_model_computes_what_its_tensors_do(folder: Path) -> None:
    tensors = whole_model()
    checkpoint = open_checkpoint(write(folder, cut(tensors, 2, 1), max_seq_len=64))
    model = Llama(checkpoint.config).eval()
    model.load_state_dict({our_name(name): tensor for name, tensor in tensors.items()})
    ids = torch.arange(40).view(1, 40)
    read = Llama.from_checkpoint(checkpoint, device="cpu")
    assert torch.equal(read(ids).logits, model(ids).logits)


def test_logits_are_those_of_transformers_for_the_same_model(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=48,
        intermediate_size=HIDDEN_DIM,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    words = {
        "model.embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "model.norm": "norm",
        "model.layers": "layers",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    meta = {}
    for name, tensor in theirs.state_dict().items():
        for word, other in words.items():
            name = name.replace(word, other)
        if name.split(".")[-2] in ("wq", "wk"):  # channel i is turned with i + 2 there, heads are 4
            rows = [head + i for head in range(0, len(tensor), 4) for i in (0, 2, 1, 3)]
            tensor = tensor[rows]
        meta[name] = tensor
    ids = torch.randint(0, 48, (2, 60))
    ours = Llama.from_checkpoint(read_meta(write(folder, cut(meta, 2, 1))), device="cpu")
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_square_embedding_of_one_shard_needs_no_guess(folder: Path) -> None:
    tensors = whole_model()
    tensors["tok_embeddings.weight"] = torch.randn(32, 32)
    tensors["output.weight"] = torch.randn(32, 32)
    assert_read(read_meta(write(folder, cut(tensors, 1, 0), vocab_size=-1)), tensors)


def test_bfloat16_stays_bfloat16(folder: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in whole_model().items()}
    checkpoint = read_meta(write(folder, cut(tensors, 2, 0)))
    assert_read(checkpoint, tensors)
    assert checkpoint.tensors["output.weight"].stored_as == "bfloat16"


def test_a_vocab_size_of_minus_one_is_the_embedding_s(folder: Path) -> None:
    assert read_meta(write(folder, cut(whole_model(), 2, 1), vocab_size=-1)).config.vocab_size == 48


def test_a_model_without_an_output_matrix_is_tied(folder: Path) -> None:
    tensors = whole_model()
    del tensors["output.weight"]
    checkpoint = read_meta(write(folder, cut(tensors, 2, 0)))
    assert checkpoint.config.tie_embeddings
    assert_read(checkpoint, tensors)


@pytest.mark.parametrize(
    ("changes", "max_seq_len", "scaling"),
    [
        ({"rope_theta": None, "norm_eps": 1e-6}, 2048, None),
        ({"rope_theta": None}, 4096, None),
        ({"rope_theta": 1e6}, 16384, None),
        ({}, 8192, None),
        (
            {"use_scaled_rope": True},
            131072,
            RopeScaling("llama3", factor=8.0, original_max_seq_len=8192),
        ),
        (
            {"use_scaled_rope": True, "rope_scaling_factor": 32.0, "max_seq_len": 100},
            100,
            RopeScaling("llama3", factor=32.0, original_max_seq_len=8192),
        ),
        ({"use_scaled_rope": False, "max_batch_size": 4, "max_seq_len": 77}, 77, None),
    ],
    ids=["llama 1", "llama 2", "code llama", "llama 3", "llama 3.1", "stated factor", "stated"],
)
def test_the_context_is_that_of_the_generation(
    folder: Path, changes: dict[str, Any], max_seq_len: int, scaling: RopeScaling | None
) -> None:
    config = read_meta(write(folder, cut(whole_model(), 1, 0), **changes)).config
    assert config.max_seq_len == max_seq_len
    assert config.rope_scaling == scaling


def test_a_stated_hidden_dim_goes_before_the_rule(folder: Path) -> None:
    changes = {"hidden_dim": HIDDEN_DIM, "multiple_of": None, "ffn_dim_multiplier": None}
    checkpoint = read_meta(write(folder, cut(whole_model(), 1, 0), **changes))
    assert checkpoint.config.hidden_dim == HIDDEN_DIM


def test_a_folder_is_recognized_by_the_files_inside(folder: Path) -> None:
    folder.mkdir()
    assert not is_meta(folder)
    (folder / "params.json").write_text("{}")
    assert not is_meta(folder)
    (folder / "consolidated.00.pth").write_bytes(b"")
    assert is_meta(folder)
    assert not is_meta(folder / "params.json")


def test_a_shard_s_path_opens_its_folder(folder: Path) -> None:
    write(folder, cut(whole_model(), 2, 0))
    assert open_checkpoint(folder / "consolidated.00.pth").format == "Meta"


COMMON = {
    "vocab_size": 128256,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "multiple_of": 256,
}
SMALL = {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "ffn_dim_multiplier": 1.5}


@pytest.mark.parametrize(
    ("params", "factor"),
    [
        (SMALL, 32.0),
        ({"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8}, 32.0),
        # Llama Guard 3 1B as it was pruned: fewer layers, a narrower feed-forward
        (SMALL | {"n_layers": 12, "hidden_dim": 6400}, 32.0),
        ({"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8}, 8.0),
        ({"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8}, 8.0),
        ({"dim": 16384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 8}, 8.0),
        (SMALL | {"rope_scaling_factor": 16}, 16.0),
        (SMALL | {"rope_scaling_factor": None, "quantization_args": None}, 32.0),
    ],
)
def test_the_factor_is_that_of_the_release_which_the_shape_shows(
    params: dict[str, Any], factor: float
) -> None:
    scaling = config_from_params(COMMON | params, {}).rope_scaling
    assert scaling == RopeScaling("llama3", factor=factor, original_max_seq_len=8192)


def test_a_stated_high_freq_factor_counts() -> None:
    scaling = config_from_params(COMMON | SMALL | {"rope_high_freq_factor": 1.5}, {}).rope_scaling
    assert scaling is not None
    assert scaling.high_freq_factor == 1.5


@pytest.mark.parametrize("n_shards", [1, 2, 4])
def test_biases_are_joined_and_those_that_are_absent_beside_others_are_zero(
    folder: Path, n_shards: int
) -> None:
    tensors = whole_model()
    biases = {
        name.replace(".weight", ".bias"): torch.arange(1.0, len(tensor) + 1)
        for name, tensor in tensors.items()
        if ".attention.w" in name and "wo" not in name
    }
    shards = cut(tensors, n_shards, 0)
    for name, bias in biases.items():  # one for each row of what is cut by rows
        for shard, part in zip(shards, bias.chunk(n_shards), strict=True):
            shard[name] = part.clone()
    checkpoint = open_checkpoint(write(folder, shards))
    assert (checkpoint.config.attention_bias, checkpoint.config.ffn_bias) == (True, False)
    for name, bias in biases.items():
        assert torch.equal(checkpoint.tensors[our_name(name)].load(), bias), name
    zero = checkpoint.tensors["layers.1.attention.compute_output.bias"].load()
    assert torch.equal(zero, torch.zeros(32))
    assert Llama.from_checkpoint(checkpoint, device="cpu").config == checkpoint.config


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_meta(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_args": {"num_experts": 8}}, "moe_args is not supported: it is a mixture of experts"),
        (
            {"quantization_args": {}, "lora_args": {}},
            "quantization_args is not supported: its weights",
        ),
        ({"quantization_args": {"scheme": "8da4w"}}, "weights are quantized"),
        ({"vision_chunk_size": 560}, "it has a vision encoder"),
        ({"depth_of_field": 3, "dim": "x"}, "depth_of_field: unknown to minllama"),
        ({"use_scaled_rope": "false"}, "use_scaled_rope must be true or false, not 'false'"),
        ({"dim": None}, "dim is missing"),
        ({"dim": "32"}, "dim must be an integer"),
        ({"dim": 10**400}, "too large"),
        ({"n_heads": 5}, r"dim \(32\) must be divisible by n_heads \(5\)"),
        ({"n_layers": 10**9}, "1000000000 layers, but there are tensors of 2"),
        ({"multiple_of": 0}, "multiple_of must be an integer above 0"),
        ({"ffn_dim_multiplier": "x"}, "ffn_dim_multiplier must be a number"),
        ({"norm_eps": "x"}, "norm_eps must be a finite number"),
        ({"max_seq_len": 2**40}, "exceeds the limit"),
        ({"use_scaled_rope": True, "rope_scaling_factor": -1}, "factor must be a finite number"),
        ({"vocab_size": 10**9}, "vocab_size 1000000000, but no tensor is wider"),
    ],
)
def test_a_key_that_cannot_be_is_one_line(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    refused(write(folder, cut(whole_model(), 2, 0), **changes), message)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\udcff", "[" * 100000])
def test_a_damaged_params_json_is_one_line(folder: Path, content: str) -> None:
    write(folder, cut(whole_model(), 1, 0))
    (folder / "params.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(folder, "not readable as JSON|not a JSON object")


def test_a_missing_shard_is_named(folder: Path) -> None:
    write(folder, cut(whole_model(), 4, 0))
    (folder / "consolidated.03.pth").unlink()
    refused(folder, "a model of 4 shards, but there are 3 consolidated.NN.pth")
    (folder / "consolidated.01.pth").unlink()
    refused(folder, r"consolidated\.01\.pth is missing")


def test_shards_that_do_not_fit_each_other_are_one_line(folder: Path) -> None:
    shards = cut(whole_model(), 2, 0)
    shards[1]["layers.1.feed_forward.w1.weight"] = torch.ones(7, 32)
    refused(write(folder, shards), r"layers\.1\.feed_forward\.w1\.weight differs between shards")
    del shards[1]["layers.1.feed_forward.w1.weight"]
    refused(write(folder, shards), r"w1\.weight is in some shards but not in others")


def test_a_damaged_shard_is_one_line(folder: Path) -> None:
    write(folder, cut(whole_model(), 2, 0))
    shard = folder / "consolidated.01.pth"
    shard.write_bytes(shard.read_bytes()[:1000])
    refused(folder, r"consolidated\.01\.pth is truncated or damaged")
    torch.save({"norm.weight": torch.ones(3)}, shard)
    refused(folder, "in some shards but not in others")
    shard.unlink()
    torch.save({"norm.weight": torch.ones(3)}, folder / "consolidated.00.pth")
    refused(folder, r"tok_embeddings\.weight is missing")
    torch.save({"tok_embeddings.weight": torch.tensor(1.0)}, folder / "consolidated.00.pth")
    refused(folder, "2 layers, but there are tensors of 0")
    write(folder, [{"tok_embeddings.weight": torch.tensor(1.0)}], vocab_size=-1)
    refused(folder, "vocab_size must be an integer")


def test_a_misshapen_tensor_is_for_the_loader_to_list(folder: Path) -> None:
    tensors = whole_model()
    tensors["layers.0.ffn_norm.weight"] = torch.ones(31)
    tensors["layers.0.attention.q_norm.weight"] = torch.ones(4)
    checkpoint = read_meta(write(folder, cut(tensors, 2, 0)))
    with pytest.raises(CheckpointError, match=r"ffn_norm\.weight has shape \(31,\)") as caught:
        Llama.from_checkpoint(checkpoint)
    assert "layers.0.attention.q_norm.weight is unexpected" in str(caught.value)
