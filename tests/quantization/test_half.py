"""Half-precision weights that are kept, and computed with as if they were float32."""

import pytest
import torch
from torch import nn

from minllama import cli
from minllama.checkpoints.gguf import write_gguf
from minllama.checkpoints.huggingface import write_huggingface
from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.weight_format import resolve_weight_format
from minllama.engine.cpu import NativeStep, can_run
from minllama.kernels.cpu import ops
from minllama.kernels.cpu.library import best_level, library
from minllama.kernels.cpu.linear import HALF_DTYPES
from minllama.lora import add_lora_wrapper, lora_parameters
from minllama.model.kv_cache import KVCache
from minllama.model.llama import load_pretrained
from minllama.options.loading import LoadOptions
from minllama.quantization.half import UpcastEmbedding, UpcastLinear, upcast_matmul
from tests.tiny import our_model, random_ids

needs_library = pytest.mark.skipif(library() is None, reason="needs the compiled code")


def write(path, dtype, **changes):
    """A tiny Llama in a Hugging Face folder, in a dtype."""
    model = our_model(dim=64, hidden_dim=96, vocab_size=61, **changes)
    write_huggingface(path, model.config, model.state_dict(), dtype=dtype)
    return path


def both(path):
    """The same weights kept in halves, and as float32."""
    return (
        load_pretrained(path, device="cpu", dtype="float32", quantize="stored"),
        load_pretrained(path, device="cpu", dtype="float32"),
    )


@needs_library
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False, "attention_bias": True, "ffn_bias": True}],
    ids=["tied", "biases"],
)
def test_kept_halves_compute_what_float32_does(tmp_path, dtype, changes):
    kept, wide = both(write(tmp_path / "model", dtype, **changes))
    matrices = [p for p in kept.parameters() if p.dim() == 2]
    assert {p.dtype for p in matrices} == {dtype}
    assert kept.dtype == torch.float32
    assert kept.quantize == "stored"
    for length in (1, 5, 40):  # few rows and many
        ids = random_ids(2, length)
        with torch.inference_mode():
            a, b = kept(ids), wide(ids)
        assert a.logits.dtype == torch.float32
        assert torch.allclose(a.logits, b.logits, atol=1e-5), length


@needs_library
@pytest.mark.parametrize("level", range(best_level() + 1))
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_a_compiled_step_reads_kept_halves(tmp_path, dtype, level):
    kept, wide = both(write(tmp_path / "model", dtype))
    assert can_run(kept)
    ids = random_ids(2, 6)
    cache = KVCache(kept.config, 2, 8, dtype=torch.float32)
    positions = torch.arange(6).unsqueeze(0)
    _, logits = NativeStep(kept, level)(
        ids, positions, kept.rope(positions), cache, torch.arange(12)
    )
    with torch.inference_mode():
        expected = wide(ids).logits.view(12, -1)
    assert torch.allclose(logits, expected, atol=1e-5)
    texts = [model.generate(ids, max_new_tokens=8, temperature=0.0) for model in (kept, wide)]
    assert torch.equal(*texts)


@needs_library
def test_adapters_learn_beside_kept_halves(tmp_path):
    gradients = []
    for model in both(write(tmp_path / "model", torch.bfloat16)):
        torch.manual_seed(0)
        model.requires_grad_(False)
        add_lora_wrapper(model, r=2)
        for parameter in lora_parameters(model):
            nn.init.normal_(parameter, std=0.1)
        logits = model(random_ids(3, 20)).logits
        gradients.append(torch.autograd.grad(logits.square().mean(), lora_parameters(model)))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rows", [3, 50])
@pytest.mark.parametrize("is_compiled", [True, False])
def test_gradients_of_an_upcast_matmul(rows, is_compiled, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr(ops, "serves", lambda x: False)
    torch.manual_seed(0)
    x = torch.randn(rows, 32, requires_grad=True)
    weight = torch.randn(24, 32).bfloat16().requires_grad_()
    of_y = torch.randn(rows, 24)
    of_x, of_weight = torch.autograd.grad(upcast_matmul(x, weight), (x, weight), of_y)
    assert torch.allclose(of_x, of_y @ weight.float(), atol=1e-5)
    assert of_weight.dtype == torch.bfloat16
    assert torch.allclose(of_weight.float(), of_y.T @ x, rtol=2**-7, atol=1e-4)


@needs_library
def test_only_matrices_in_halves_are_kept(tmp_path):
    kept, _ = both(write(tmp_path / "model", torch.float32))
    assert kept.quantize is None
    assert not any(isinstance(m, UpcastLinear | UpcastEmbedding) for m in kept.modules())
    folder = write(tmp_path / "halves", torch.bfloat16)
    other = load_pretrained(folder, device="cpu", dtype="bfloat16", quantize="stored")
    assert not any(isinstance(m, UpcastLinear) for m in other.modules())


@needs_library
@pytest.mark.parametrize(
    ("stored", "is_fast", "expected"),
    [
        ("float32", False, (torch.float32, None)),
        ("bfloat16", False, (torch.float32, "stored")),
        ("bfloat16", True, (torch.bfloat16, None)),
        ("float16", False, (torch.float32, "stored")),
        ("float16", True, (torch.float32, "stored")),
    ],
)
def test_halves_are_kept_where_they_generate_fastest(tmp_path, as_cpu, stored, is_fast, expected):
    as_cpu(*(["bf16"] if is_fast else []))
    checkpoint = open_checkpoint(write(tmp_path / "model", getattr(torch, stored)))
    chosen = resolve_weight_format(checkpoint, LoadOptions(device="cpu", quantize="auto"))
    assert (chosen.dtype, chosen.quantize) == expected


@needs_library
def test_a_gguf_file_of_halves_is_kept_too(tmp_path, capsys):
    model = our_model(dim=64, hidden_dim=96, vocab_size=61)
    write_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), None, dtype="f16")
    kept, wide = both(tmp_path / "m.gguf")
    assert isinstance(kept.layers[0].feed_forward.w1, UpcastLinear)
    ids = random_ids(2, 9)
    with torch.inference_mode():
        assert torch.allclose(kept(ids).logits, wide(ids).logits, atol=1e-5)
    with pytest.raises(SystemExit):
        cli.main(["info", str(tmp_path / "m.gguf")])
    assert "the file's half-precision weights, computed in float32" in capsys.readouterr().out
