"""Weights in 8 and 4 bits: what is stored, what it means, and how it is multiplied."""

import json

import gguf
import pytest
import torch
from torch import nn

from minllama import cli
from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.types import LazyTensor, lazy
from minllama.engine.choose import engine_for
from minllama.errors import CheckpointError, MinllamaError, OptionError
from minllama.generation.decode import Decoder
from minllama.kernels.cpu import ops
from minllama.kernels.cpu.library import library
from minllama.lora import add_lora_wrapper, merge_lora
from minllama.model.llama import Embedding, Llama, load_pretrained
from minllama.options import GenerationOptions
from minllama.quantization.gguf_blocks import (
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_K,
    Q8_0,
    dequantize,
    ggml_type,
    quantize_q8_0,
)
from minllama.quantization.modules import (
    BITS,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    packed,
    quantize,
    quantized,
    rows_of,
)
from tests.gguf_file import FIELDS, SHAPES, write_file
from tests.tiny import our_model, random_ids


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks_of(stored, rows, columns, seed=0):
    """Random blocks of a type, with scales and mins of a sensible size."""
    generator = torch.Generator().manual_seed(seed)
    n = rows * columns // 32
    raw = torch.randint(0, 256, (n, stored.block_bytes), generator=generator, dtype=torch.uint8)
    halves = raw[:, : 4 if stored == Q4_1 else 2]
    numbers = torch.randn(n, halves.shape[1] // 2, generator=generator).half() * 0.1
    halves.copy_(numbers.view(torch.uint8))
    return raw.flatten()


def from_file(raw, stored, shape):
    return LazyTensor(shape, stored.name, raw.nbytes, lambda: None, lambda: (stored, raw))


@pytest.mark.parametrize("stored", [Q4_0, Q4_1, Q8_0], ids=lambda stored: stored.name)
@pytest.mark.parametrize("rows", [16, 40, 7])
@pytest.mark.parametrize("compiled", [True, False])
def test_blocks_of_a_file_keep_their_numbers_to_the_bit(stored, rows, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(ops, "can_pack", lambda raw: False)
    elif library() is None:
        pytest.skip("minllama was installed without a C++ compiler")
    raw = blocks_of(stored, rows, 96)
    parts = quantized("layers.0.x", from_file(raw, stored, (rows, 96)), "stored")
    weight = QuantizedWeight(*parts)
    expected = dequantize(raw, stored, (rows, 96))
    assert torch.equal(weight.dequantize(), expected)
    ids = torch.tensor([[rows - 1, 0], [3, 3]])
    assert torch.equal(weight.rows(ids), expected[ids])


@pytest.mark.parametrize("stored", [Q4_0, Q4_1, Q8_0], ids=lambda stored: stored.name)
def test_compiled_code_packs_blocks_as_torch_does(stored, monkeypatch):
    if library() is None:
        pytest.skip("minllama was installed without a C++ compiler")
    blocks = from_file(blocks_of(stored, 1000, 160), stored, (1000, 160))
    compiled = quantized("layers.0.x", blocks, "stored")
    monkeypatch.setattr(ops, "can_pack", lambda raw: False)
    by_torch = quantized("layers.0.x", blocks, "stored")
    assert torch.equal(compiled.quants, by_torch.quants)
    assert torch.equal(compiled.scales, by_torch.scales)
    assert (compiled.mins is None) == (by_torch.mins is None) == (stored != Q4_1)
    assert compiled.mins is None or torch.equal(compiled.mins, by_torch.mins)
    assert compiled.out_features == by_torch.out_features


def super_blocks(stored, rows, columns, seed=0):
    """Random super-blocks of Q4_K or Q5_K, of weights' size and about zero: (n, block_bytes)."""
    generator = torch.Generator().manual_seed(seed)
    n = rows * columns // 256
    raw = torch.randint(0, 256, (n, stored.block_bytes), generator=generator, dtype=torch.uint8)
    middle = {Q4_K: 7.5, Q5_K: 15.5}[stored]
    scales = torch.rand(n, 1, generator=generator) * 3.75e-3 / middle
    raw[:, :4] = torch.cat([scales, middle * scales], dim=1).half().view(torch.uint8)
    return raw


@pytest.mark.parametrize("stored", [Q4_K, Q5_K], ids=lambda stored: stored.name)
def test_super_blocks_keep_their_numbers_but_for_the_rounding_of_scales(stored):
    shape = (24, 512)
    raw = super_blocks(stored, *shape)
    factors = raw[:, :4].contiguous().view(torch.float16).float()
    exact = torch.from_numpy(
        gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType(stored.id))
    ).view(shape)
    parts = quantized("layers.0.x", from_file(raw.flatten(), stored, shape), "stored")
    weight = QuantizedWeight(*parts)
    assert weight.bits == (4 if stored == Q4_K else 8)
    # Half a last place of the scale and of the min, times what they are multiplied by.
    largest = {Q4_K: 15, Q5_K: 31}[stored] * 63 * factors[:, 0] + 63 * factors[:, 1]
    bound = (largest * 2**-11).repeat_interleave(256).view(shape)
    assert ((weight.dequantize() - exact).abs() <= bound).all()
    assert (weight.dequantize() - exact).abs().mean() < 2e-3 * exact.abs().mean()


def q6_k_blocks(rows, columns, seed=0):
    """Random Q6_K super-blocks and their numbers, of weights' size."""
    generator = torch.Generator().manual_seed(seed)
    n = rows * columns // 256
    raw = torch.randint(0, 256, (n, 210), generator=generator, dtype=torch.uint8)
    scales = torch.randint(20, 40, (n, 16), generator=generator, dtype=torch.int8)
    raw[:, 192:208] = scales.view(torch.uint8)
    raw[:, 208:] = torch.full((n, 1), 1e-4).half().view(torch.uint8)
    numbers = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType.Q6_K)
    return raw, torch.from_numpy(numbers).view(rows, columns)


def test_blocks_of_other_types_get_eight_bits():
    raw, exact = q6_k_blocks(24, 256)
    tensor = LazyTensor(
        (24, 256), "Q6_K", raw.nbytes, lambda: exact, lambda: (ggml_type(14), raw.flatten())
    )
    weight = QuantizedWeight(*quantized("layers.0.x", tensor, "stored"))
    assert weight.bits == 8
    step = exact.view(24, 8, 32).abs().amax(-1, keepdim=True) / 127
    off = (weight.dequantize() - exact).view(24, 8, 32).abs()
    assert (off <= 0.51 * step).all()


@pytest.mark.parametrize("most", [Q4_K, Q5_K], ids=lambda stored: stored.name)
def test_a_file_of_k_quants_is_computed_with_in_its_blocks(tmp_path, capfd, most):
    """As llama.cpp writes Q4_K_M and Q5_K_M: the vocabulary's matrix and some others in Q6_K."""
    wide = {"llama.embedding_length": 256, "llama.feed_forward_length": 512}
    fields = [(key, kind, wide.get(key, content)) for key, kind, content in FIELDS]
    tensors = []
    for seed, (name, shape) in enumerate(SHAPES.items()):
        shape = tuple(size if size == 40 else 8 * size for size in shape)
        if len(shape) == 1:
            tensors.append((name, shape, 0, random(*shape, seed=seed).numpy().tobytes()))
        elif "attn_v" in name or "blk" not in name:
            raw, _ = q6_k_blocks(*shape, seed)
            tensors.append((name, shape, 14, raw.numpy().tobytes()))
        else:
            raw = super_blocks(most, *shape, seed=seed)
            tensors.append((name, shape, most.id, raw.numpy().tobytes()))
    path = write_file(tmp_path / "k.gguf", fields, tensors)
    near, exact = load_pretrained(path, quantize="auto"), load_pretrained(path)
    assert near.quantize == "stored"
    bits = {module.bits for module in near.modules() if isinstance(module, QuantizedWeight)}
    assert bits == {BITS[most], 8}
    assert not any(isinstance(module, nn.Linear) for module in near.modules())
    same = load_pretrained(path)
    for name, module in near.named_modules():
        if isinstance(module, QuantizedWeight):
            same.get_submodule(name).weight.data.copy_(module.dequantize())
    ids = random_ids(2, 12, vocab_size=40)
    with torch.inference_mode():
        a, b, c = exact(ids).logits, near(ids).logits, same(ids).logits
    assert (c - b).abs().mean() < 0.001 * a.abs().mean()
    # Eight bits are off by 0.4% of a number of random weights; five such matrices are passed.
    assert (a - b).abs().mean() < 5 * 0.004 * a.abs().mean()
    if library() is not None:
        with pytest.raises(SystemExit):
            cli.main(["info", str(path)])
        assert "the file's quantized blocks, Q6_K in 8 bits (" in capfd.readouterr().out


def test_large_matrices_are_quantized_in_slices(monkeypatch):
    values = random(40, 64)
    whole = {bits: quantize(values, bits) for bits in (4, 8)}
    monkeypatch.setattr("minllama.quantization.modules.SLICE", 16)
    for bits, expected in whole.items():
        assert QuantizedWeight(*expected).is_made_of(quantize(values, bits))


def test_a_tile_is_stored_as_its_description_says():
    quants = torch.arange(16 * 64).remainder(251).to(torch.uint8).view(16, 2, 32)
    scales = torch.ones(16, 2, dtype=torch.float16)
    eight = packed(quants, scales, None, 8).quants
    assert eight.shape == (1, 2, 8, 16, 4)
    assert eight[0, 1, 5, 3, 2] == quants[3, 1, 4 * 5 + 2]
    four = packed(quants & 15, scales, None, 4).quants
    assert four.shape == (1, 2, 4, 16, 4)
    assert four[0, 1, 3, 7, 1] & 15 == quants[7, 1, 8 * 3 + 1] & 15
    assert four[0, 1, 3, 7, 1] >> 4 == quants[7, 1, 8 * 3 + 4 + 1] & 15


def test_eight_bits_are_ggmls_q8_0():
    values = random(24, 64)
    weight = QuantizedWeight(*quantize(values, 8))
    expected = dequantize(quantize_q8_0(values).flatten(), Q8_0, (24, 64))
    # The scale is rounded to float16 before the numbers are divided by it, not after.
    assert (weight.dequantize() - expected).abs().max() <= expected.abs().max() / 127 * 1.01
    assert (weight.dequantize() - values).abs().max() <= values.abs().max() / 127 * 0.51


def test_four_bits_are_closer_than_the_extremes_alone_make_them():
    values = random(32, 256)
    blocks = values.view(32, 8, 32)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = (((blocks - low) / step).round() * step + low).view(32, 256)
    ours = QuantizedWeight(*quantize(values, 4)).dequantize()
    assert (ours - values).square().mean() < 0.95 * (plain - values).square().mean()


@pytest.mark.parametrize("bits", [4, 8])
def test_constant_and_zero_blocks_are_exact(bits):
    values = torch.zeros(16, 64)
    values[:, 32:] = 0.5
    assert torch.equal(
        QuantizedWeight(*quantize(values, bits)).dequantize()[:, :32], values[:, :32]
    )
    assert torch.allclose(QuantizedWeight(*quantize(values, bits)).dequantize(), values, atol=1e-3)


def error_bound(x, weight):
    """How far a product of activations in 15 bits may be off: half of their last digit's worth.

    An activation has 127 * 128 steps between 0 and the largest of its block of 32.
    """
    largest = x.float().unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
    half_a_step = (largest / (127 * 128) / 2).expand(*largest.shape[:-1], 32).flatten(-2)
    return half_a_step @ weight.abs().T + 1e-5


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_dequantized_weight(bits, rows, dtype):
    layer = QuantizedLinear(*quantize(random(40, 64), bits), bias=nn.Parameter(random(40)))
    x = random(rows, 2, 64, seed=1).to(dtype)
    with torch.inference_mode():
        y = layer(x)
        expected = x.float() @ layer.dequantize().T + layer.bias
    assert y.dtype == dtype
    assert y.shape == (rows, 2, 40)
    bound = error_bound(x, layer.dequantize())
    if dtype == torch.bfloat16:  # a weight and the result are rounded to 8 bits as well
        bound += 2**-8 * (x.float().abs() @ layer.dequantize().abs().T) + 2**-8 * expected.abs()
    assert ((y - expected).abs() <= bound).all()


def test_products_without_compiled_code_are_the_same(monkeypatch):
    layer = QuantizedLinear(*quantize(random(40, 64), 4))
    x = random(5, 64, seed=1)
    with torch.inference_mode():
        fast = layer(x)
        monkeypatch.setattr(ops, "serves", lambda x: False)
        assert ((layer(x) - fast).abs() <= error_bound(x, layer.dequantize())).all()
        assert torch.equal(layer(x), x @ layer.dequantize().T)


def test_gradients_flow_through_to_the_input():
    layer = QuantizedLinear(*quantize(random(24, 64), 4))
    x, of_y = random(40, 64, seed=1).requires_grad_(), random(40, 24, seed=2)
    layer(x).backward(of_y)
    assert torch.allclose(x.grad, of_y @ layer.dequantize(), rtol=1e-4, atol=1e-4)
    assert not list(layer.parameters())


def test_other_dtypes_leave_scales_as_they_are():
    embedding = QuantizedEmbedding(*quantize(random(20, 32), 8))
    before = embedding.dequantize()
    embedding.bfloat16()
    assert embedding.scales.dtype == torch.float16
    assert torch.equal(embedding.dequantize(), before)
    assert embedding(torch.tensor([3])).dtype == torch.bfloat16


@pytest.mark.parametrize("id", [-1, -100, 20, 31, 32])
def test_an_id_that_is_none_is_refused(id):
    embedding = QuantizedEmbedding(*quantize(random(20, 32), 8))
    with pytest.raises(MinllamaError, match="token ids must be from 0 to 19"):
        embedding(torch.tensor([[3, id]]))
    assert embedding(torch.zeros(1, 0, dtype=torch.long)).shape == (1, 0, 32)


def test_a_head_and_its_rows_are_those_of_its_matrix():
    embedding = QuantizedEmbedding(*quantize(random(20, 32), 8))
    x, plain = random(3, 32), Embedding(20, 32)
    off = (embedding.as_linear(x) - x @ embedding.dequantize().T).abs()
    assert (off <= error_bound(x, embedding.dequantize())).all()
    assert torch.equal(plain.as_linear(x), x @ plain.weight.T)
    ids = torch.tensor([4, 19])
    assert torch.equal(rows_of(embedding, ids), embedding.dequantize()[ids])
    assert torch.equal(rows_of(plain, ids), plain.weight[ids])


@pytest.fixture
def folder(tmp_path):
    model = our_model(dim=64, hidden_dim=96, vocab_size=61)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(("how", "far"), [("int8", 0.03), ("int4", 0.7)])
def test_a_quantized_llama_is_near_the_one_it_was(folder, how, far):
    exact, near = load_pretrained(folder), load_pretrained(folder, quantize=how, dtype="float32")
    assert isinstance(near.layers[0].feed_forward.w2, QuantizedLinear)
    assert near.layers[0].feed_forward.w2.bits == (4 if how == "int4" else 8)
    assert near.tok_embeddings.bits == 8
    ids = random_ids(2, 12)
    with torch.inference_mode():
        a, b = exact(ids).logits, near(ids).logits
    assert 0 < (a - b).abs().mean() < far * a.abs().mean()


def test_a_matrix_that_blocks_do_not_fit_stays_as_it_is(tmp_path):
    our_model(dim=64, hidden_dim=48).save_pretrained(tmp_path / "model")
    layer = load_pretrained(tmp_path / "model", quantize="int4").layers[0]
    assert isinstance(layer.feed_forward.w1, QuantizedLinear)
    assert isinstance(layer.feed_forward.w2, nn.Linear)


def test_stored_changes_nothing_where_nothing_is_in_blocks(folder):
    model = load_pretrained(folder, quantize="stored")
    assert not any(isinstance(module, QuantizedWeight) for module in model.modules())


def test_an_unknown_word_and_numbers_that_are_none_are_refused(folder):
    with pytest.raises(OptionError, match="quantize must be one of stored, int8, int4"):
        load_pretrained(folder, quantize="int3")
    model = our_model(dim=64, hidden_dim=96)
    model.layers[1].feed_forward.w1.weight.data[3, 4] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="NaN"):
        load_pretrained(folder, quantize="int8")


def test_the_default_model_runs_on_its_blocks(default_model):
    checkpoint = open_checkpoint(default_model)
    stored = Llama.from_checkpoint(checkpoint, quantize="stored", device="cpu").float()
    exact = Llama.from_checkpoint(checkpoint, device="cpu")
    assert torch.equal(
        stored.layers[7].attention.compute_key.dequantize(),
        exact.layers[7].attention.compute_key.weight,
    )
    ids = random_ids(1, 20, vocab_size=49152)
    with torch.inference_mode():
        assert torch.allclose(stored(ids).logits, exact(ids).logits, atol=0.05)


def test_keys_are_rounded_only_where_compiled_code_reads_them(folder):
    model = load_pretrained(folder, quantize="int4", dtype="float32")
    assert engine_for(model).cache_dtype == (torch.float32 if library() is None else torch.float16)
    add_lora_wrapper(model, r=2)
    assert engine_for(model).cache_dtype == torch.float32


def test_adapters_learn_beside_quantized_weights(folder):
    model = load_pretrained(folder, quantize="int4", dtype="float32")
    before = model.layers[1].feed_forward.w2.quants.clone()
    names = add_lora_wrapper(model, "all-linear", r=4)
    assert len(names) == 14
    ids = random_ids(4, 10)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        logits = model(ids).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(model.layers[1].feed_forward.w2.base.quants, before)


def test_no_matrix_in_numbers_is_kept_for_the_gradients_of_adapters(folder):
    model = load_pretrained(folder, quantize="int8", dtype="float32")
    add_lora_wrapper(model, "all-linear", r=4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(random_ids(1, 10)).logits.sum().backward()
    wide = {(64, 64), (96, 64), (64, 96), (61, 64), (64, 61)}
    assert kept
    assert not [x for x in kept if x.is_floating_point() and tuple(x.shape) in wide]


@pytest.mark.parametrize("how", ["int8", "int4"])
@pytest.mark.parametrize("largest", [1e-6, 5e-4, 2e-3])
def test_a_matrix_too_small_for_scales_stays_in_numbers(how, largest):
    values = torch.randn(32, 64)
    values *= largest / values.abs().max()
    made = quantized("layers.0.feed_forward.w1.weight", lazy(values), how)
    assert (made is None) == (largest < 1e-3)
    if made is not None:
        error = (QuantizedLinear(*made).dequantize() - values).norm() / values.norm()
        assert error < (0.02 if how == "int8" else 0.15)


@pytest.mark.parametrize("how", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantized_model_is_saved_in_the_numbers_that_it_computes_with(
    folder, tmp_path, how, dtype
):
    model = load_pretrained(folder, quantize=how, dtype=dtype)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"
    assert {t.stored_as for t in open_checkpoint(tmp_path).tensors.values()} == {"float32"}
    saved, ids = load_pretrained(tmp_path, dtype="float32"), random_ids(2, 7)
    if dtype == "float32":
        with torch.no_grad():
            torch.testing.assert_close(saved(ids).logits, model(ids).logits, atol=2e-3, rtol=0)
    name = "layers.1.feed_forward.w2"
    expected = model.get_submodule(name).dequantize()
    assert torch.equal(saved.get_submodule(name).weight, expected)


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_on_quantized_weights_is_that_on_their_numbers(folder, use_dora):
    quantized, dense = (
        load_pretrained(folder, quantize="int8", dtype="float32"),
        our_model(dim=64, hidden_dim=96, vocab_size=61),
    )
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedWeight):
            dense.get_submodule(name).weight.data = module.dequantize()
    ids, logits = random_ids(2, 9), []
    for model in (quantized, dense):
        torch.manual_seed(3)
        add_lora_wrapper(model, "all-linear", r=4, use_dora=use_dora)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(parameter, std=0.1)
        logits.append(model(ids).logits)
    assert torch.allclose(*logits, atol=2e-3)
    with pytest.raises(MinllamaError, match="without quantize"):
        merge_lora(quantized)


@pytest.mark.skipif(library() is None, reason="minllama was installed without a C++ compiler")
def test_generation_keeps_halves_beside_weights_in_few_bits_and_nowhere_else(folder):
    near, exact = load_pretrained(folder, quantize="int8", dtype="float32"), load_pretrained(folder)
    assert (engine_for(near).cache_dtype, engine_for(exact).cache_dtype) == (
        torch.float16,
        torch.float32,
    )
    ids, new = random_ids(2, 5), random_ids(2, 1, seed=1)
    found = []
    with torch.inference_mode():
        for dtype in (None, torch.float16):
            cache = near.new_cache(2, 8, dtype=dtype)
            assert cache.keys[0].dtype == (dtype or torch.float32)
            near(ids, cache=cache)
            found.append(near(new, cache=cache).logits)
        assert torch.allclose(*found, atol=0.02)
        assert not torch.equal(*found)
    decoder = Decoder(near, [[1, 2, 3]], GenerationOptions(max_new_tokens=2))
    next(iter(decoder))
    assert decoder.scheduler._cache.keys[0].dtype == torch.float16
