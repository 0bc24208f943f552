"""Compiled code computes what the plain modules compute, at every level of instructions."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from minllama.engine import cpu as native_step
from minllama.engine.choose import engine_for
from minllama.engine.cpu import NativeStep, can_run, most_tokens
from minllama.errors import MinllamaError
from minllama.kernels.cpu import attention, ops, team
from minllama.kernels.cpu.library import best_level, library
from minllama.kernels.cpu.lora import low_rank_product
from minllama.model.kv_cache import KVCache
from minllama.model.llama import FeedForward, RMSNorm, load_pretrained
from minllama.model.rope import apply_rotary_embedding
from minllama.quantization.half import UpcastLinear
from minllama.quantization.modules import QuantizedWeight, quantize
from tests.tiny import VARIANTS, our_model, random_ids

pytestmark = pytest.mark.skipif(
    library() is None, reason="minllama was installed without a C++ compiler"
)
LEVELS = range(best_level() + 1)
SHAPE = {"dim": 64, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 61}


@pytest.fixture(params=LEVELS)
def at_level(request, monkeypatch):
    """Operations use the instructions of this level."""
    monkeypatch.setattr("minllama.kernels.cpu.library.best_level", lambda: request.param)
    return request.param


@pytest.fixture
def plain(monkeypatch):
    """From its call on nothing is compiled."""

    def off():
        monkeypatch.setattr(ops, "serves", lambda x: False)

    return off


def model_of(kind, tmp_path, **changes):
    model = our_model(**{**SHAPE, **changes})
    if kind in ("int4", "int8"):
        model.save_pretrained(tmp_path / "model")
        return load_pretrained(tmp_path / "model", quantize=kind, dtype="float32")
    return model.to(getattr(torch, kind))


def steps(model, level, lengths=(5, 3, 1), new=3, cache_dtype=None):
    """Logits of what rows of different lengths are continued by: one token, then several."""
    ids = random_ids(len(lengths), max(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(-1)
    cache = KVCache(model.config, len(lengths), 16, dtype=cache_dtype or model.dtype)
    model(ids, attention_mask=mask, cache=cache, logits=None)
    found = []
    for part in (random_ids(len(lengths), 1, seed=1), random_ids(len(lengths), new, seed=2)):
        if level is None:
            found.append(model(part, cache=cache).logits)
            continue
        starts = torch.tensor(cache.lengths).unsqueeze(-1)
        positions = starts + torch.arange(part.shape[1])
        every = torch.arange(part.numel())
        rotation = model.rope(positions)
        _, logits = NativeStep(model, level)(part, positions, rotation, cache, every)
        found.append(logits.view(*part.shape, -1))
        cache.advance([part.shape[1]] * len(lengths))
    return found


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_a_step_is_the_walk_of_the_modules(kind, level, plain, tmp_path):
    model = model_of(kind, tmp_path)
    with torch.inference_mode():
        fast = steps(model, level)
        plain()
        # Activations stay float32 in the step, so half precision is compared with float32 modules.
        exact = steps(model.float(), None)
    atol = {"float32": 1e-5, "float16": 0.02, "bfloat16": 0.15}.get(kind, 2e-3)
    for a, b in zip(fast, exact, strict=True):
        assert torch.allclose(a, b, atol=atol), (a - b).abs().max()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "changes",
    VARIANTS,
)
def test_a_step_knows_every_variant(changes, level, plain):
    model = our_model(**{**SHAPE, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.normal_(mean=1.0, std=0.3)
    with torch.inference_mode():
        fast = steps(model, level)
        plain()
        for a, b in zip(fast, steps(model, None), strict=True):
            assert torch.allclose(a, b, atol=2e-5), (a - b).abs().max()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_texts_are_attended_to_in_pieces(dtype, level, plain):
    """More slots than one piece of attention holds, in every kind of cache."""
    model = our_model(**SHAPE, max_seq_len=512).to(dtype)
    with torch.inference_mode():
        cache = KVCache(model.config, 1, 400, dtype=dtype)
        ids = random_ids(1, 300)
        plain()
        model(ids, cache=cache, logits=None)
        exact = KVCache(model.config, 1, 400)
        for mine, theirs in zip(exact.keys + exact.values, cache.keys + cache.values, strict=True):
            mine.copy_(theirs)
        exact.lengths = [300]
        new = random_ids(1, 2, seed=3)
        positions = torch.tensor([[300, 301]])
        step = NativeStep(model, level)
        _, logits = step(new, positions, model.rope(positions), cache, torch.arange(2))
        expected = model.float()(new, cache=exact).logits[0]
    atol = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]
    assert torch.allclose(logits, expected, atol=atol), (logits - expected).abs().max()


def ragged_pass(model, forward, cache_dtype=None, rows=(0, 1, 2)):
    """Hidden states and last logits of rows of 5, 130 and 200 tokens that get 40, 9 and 70."""
    old, new = [(5, 130, 200)[row] for row in rows], [(40, 9, 70)[row] for row in rows]
    cache = KVCache(model.config, len(rows), 280, dtype=cache_dtype or model.dtype)
    for slot, row in enumerate(rows):
        one = KVCache(model.config, 1, 280, dtype=cache.keys[0].dtype)
        model(random_ids(1, old[slot], seed=row), cache=one, logits=None)
        cache.load_prefix(slot, one, old[slot])
    ids = torch.zeros(len(rows), max(new), dtype=torch.long)
    mask = torch.arange(max(new)) < torch.tensor(new).unsqueeze(-1)
    for slot, row in enumerate(rows):
        ids[slot, : new[slot]] = random_ids(1, new[slot], seed=10 + row)
    output = forward(ids, attention_mask=mask, cache=cache, logits="last")
    return output.hidden, output.logits, cache


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [{}, {"n_heads": 3, "n_kv_heads": 1, "head_dim": 20}])
def test_runs_of_tokens_read_a_cache_together(shape, cache_dtype, at_level, plain, tmp_path):
    model = model_of("int4", tmp_path, **shape, max_seq_len=512)
    engine = engine_for(model, "cpu")
    with torch.inference_mode():
        mine = ragged_pass(model, engine.forward, cache_dtype)
        plain()
        theirs = ragged_pass(model, model, cache_dtype)
    atol = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 0.03}[cache_dtype]
    for a, b in zip(mine[:2], theirs[:2], strict=True):
        assert torch.allclose(a, b, atol=atol), (a - b).abs().max()
    assert mine[2].lengths == theirs[2].lengths == [45, 139, 270]


def test_a_long_pass_of_a_row_has_the_same_bits_in_any_company(at_level, tmp_path):
    model = model_of("int4", tmp_path, max_seq_len=512)
    engine = engine_for(model, "cpu")
    with torch.inference_mode():
        together = ragged_pass(model, engine.forward)[1]
        turned = ragged_pass(model, engine.forward, rows=(2, 0, 1))[1]
        alone = torch.cat([ragged_pass(model, engine.forward, rows=(i,))[1] for i in range(3)])
    turned = turned[[1, 2, 0]]
    if at_level == 2:  # elsewhere sums of one token and of several are in another order
        assert torch.equal(together, turned)
        assert torch.equal(together, alone)
    assert torch.allclose(together, turned, atol=1e-3)
    assert torch.allclose(together, alone, atol=1e-3)


# The passes below have rows of 40, 9 and 70 tokens, and of 100. Fewer than eight tokens at the end
# of a row attend one by one, which sums in another order, and that can round an activation to its
# other neighbor. At level 2 all else is summed in one order wherever the pieces end.
@pytest.mark.parametrize(("piece", "least"), [(16, 4), (33, 1), (20, 9), (40, 9)])
def test_long_passes_are_read_in_pieces(piece, least, at_level, monkeypatch, tmp_path):
    model = model_of("int4", tmp_path, max_seq_len=512)
    engine = engine_for(model, "cpu")
    ids = random_ids(1, 100)

    def results():
        every = engine.forward(ids, engine.new_cache(1, 100), logits="all").logits
        return *ragged_pass(model, engine.forward)[:2], every

    with torch.inference_mode():
        whole = results()
        monkeypatch.setattr(native_step, "PIECE", piece)
        for a, b in zip(results(), whole, strict=True):
            if at_level == 2 and least >= 8:
                assert torch.equal(a, b), (a - b).abs().max()
            assert torch.allclose(a, b, atol=2e-3), (a - b).abs().max()


def test_passes_of_any_length_are_compiled_but_for_half_precision_in_hardware(as_cpu, tmp_path):
    as_cpu(level="avx2")
    quantized, dense = model_of("int4", tmp_path), our_model(**SHAPE)
    for model in (quantized, dense, our_model(**SHAPE).bfloat16()):
        assert {most_tokens(model, of_one_each=e) for e in (0, 1)} == {float("inf")}
    as_cpu("bf16", level="avx2")
    assert most_tokens(dense, of_one_each=False) == float("inf")
    assert most_tokens(our_model(**SHAPE).bfloat16(), of_one_each=False) == 32
    as_cpu("fp16", level="avx2")
    assert most_tokens(our_model(**SHAPE).half(), of_one_each=False) == 64
    as_cpu("amx", level="avx2")  # matrix instructions
    models = quantized.bfloat16(), dense.bfloat16()
    assert {most_tokens(m, of_one_each=e) for m in models for e in (0, 1)} == {32}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"),
    [(1, 1, 64), (4, 2, 16), (3, 1, 40), (8, 2, 8), (5, 1, 32), (8, 1, 24), (6, 2, 12), (2, 2, 20)],
)
def test_heads_of_any_number_and_width_are_attended_to(heads, kv_heads, width, level, plain):
    shape = {**SHAPE, "n_heads": heads, "n_kv_heads": kv_heads, "head_dim": width}
    model = our_model(**shape)
    with torch.inference_mode():
        fast = steps(model, level)
        halves = steps(model, level, cache_dtype=torch.float16)
        plain()
        for a, b, half in zip(fast, steps(model, None), halves, strict=True):
            assert torch.allclose(a, b, atol=2e-5), (a - b).abs().max()
            assert torch.allclose(half, b, atol=0.02)
            assert not torch.equal(half, a)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(threads, tmp_path, monkeypatch):
    monkeypatch.setattr(team, "TOLERATED", threads)  # all of them, however many cores there are
    model = model_of("int4", tmp_path)
    before = torch.get_num_threads()
    with torch.inference_mode():
        torch.set_num_threads(1)
        alone = steps(model, best_level())
        torch.set_num_threads(threads)
        together = steps(model, best_level())
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("what", ["product", "weight", "gate", "attention", "adamw"])
def test_whoever_takes_which_part_of_an_operation_gives_the_same_bits(what):
    """Threads take parts as they come, in another way each time."""
    torch.manual_seed(0)
    weight = QuantizedWeight(*quantize(torch.randn(400, 6 * 32), 4))
    x, u, v = torch.randn(300, 6 * 32), torch.randn(3, 7001), torch.randn(3, 7001)
    heads = [torch.randn(5, 70, n, 16) for n in (4, 2, 2)]

    def optimize():
        tensors = [tensor.clone() for tensor in (u, v, u * 0.1, v * v)]
        settings = {"betas": (0.9, 0.99), "eps": 1e-8, "step_size": 0.01, "shrink": 0.999}
        ops.adamw(*([tensor] for tensor in tensors), **settings)
        return tensors

    compute = {
        "product": lambda: [ops.quantized_matmul(weight, x)],
        "weight": lambda: [ops.dequantize_transposed(weight, torch.float32)],
        "gate": lambda: gradients_of(ops.swiglu, u, v),
        "attention": lambda: gradients_of(attention.causal_attention, *heads),
        "adamw": optimize,
    }[what]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = compute()
        torch.set_num_threads(5)
        for _ in range(30):
            together = compute()
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    finally:
        torch.set_num_threads(before)


def test_logits_and_hidden_states_are_those_asked_for(plain):
    model = our_model(**SHAPE)
    ids, mask = random_ids(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    wanted = ("all", "last", None, torch.tensor([[0, 1], [1, 1]]))

    def passes():
        with torch.inference_mode():
            outs = []
            for logits in wanted:
                cache = model.new_cache(2, 8)
                outs.append(model(ids, attention_mask=mask, cache=cache, logits=logits))
                assert cache.lengths == [4, 2]
            return outs

    fast = passes()
    plain()
    for logits, mine, theirs in zip(wanted, fast, passes(), strict=True):
        of_all = logits is None or (isinstance(logits, str) and logits == "all")
        real = mask.bool() if of_all else slice(None)
        assert mine.hidden.shape == theirs.hidden.shape
        assert torch.allclose(mine.hidden[real], theirs.hidden[real], atol=1e-5)
        if theirs.logits is None:
            assert mine.logits is None
        else:
            assert mine.logits.shape == theirs.logits.shape
    for index in (1, 3):
        assert torch.allclose(fast[index].logits, passes()[index].logits, atol=1e-5)


def test_models_and_passes_that_it_does_not_know_are_left_to_the_modules():
    model = our_model(**SHAPE)
    assert can_run(model)
    assert not can_run(our_model(**SHAPE, dropout=0.1).train())
    assert not can_run(model.double())
    hooked = our_model(**SHAPE)
    hooked.layers[1].attention.register_forward_hook(lambda module, args, output: None)
    assert not can_run(hooked)
    model = our_model(**SHAPE, tie_embeddings=False)
    model.output = nn.Sequential(model.output)
    assert not can_run(model)


def test_ids_out_of_the_vocabulary_are_refused():
    model = our_model(**SHAPE)
    for cache in (None, model.new_cache(1, 4)):
        with pytest.raises(MinllamaError, match=r"must be int64 or int32, not torch\.float32"):
            model(torch.tensor([[3.0, 4.0]]), cache=cache)
    for bad in ([[3, 61]], [[-1, 3]]):
        with torch.inference_mode(), pytest.raises(MinllamaError, match="from 0 to 60"):
            model(torch.tensor(bad), cache=model.new_cache(1, 4))
        with pytest.raises(MinllamaError, match="from 0 to 60"):
            model(torch.tensor(bad))


def test_copies_of_a_cache_are_continued_in_several_threads():
    model = our_model(**SHAPE, max_seq_len=400)
    prompt, others = random_ids(1, 20), [random_ids(1, 300, seed=i)[0] for i in (1, 2)]
    threads = torch.get_num_threads()
    engine = engine_for(model, "cpu")
    beginning = engine.new_cache(1, 400)
    engine.forward(prompt, beginning)
    engine.forward(prompt[:, :1], beginning)

    def logits_of(ids, cache):
        torch.set_num_threads(1)
        return torch.cat([engine.forward(i.view(1, 1), cache).logits for i in ids])

    try:
        expected = [logits_of(ids, beginning.repeated(1, 400)) for ids in others]
        copies = [beginning.repeated(1, 400) for _ in others]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(logits_of, others, copies))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, found, expected))


def test_another_tensor_in_a_cache_is_read():
    engine, ids, new = engine_for(our_model(**SHAPE)), random_ids(1, 4), random_ids(1, 1, seed=5)
    cache, other = engine.new_cache(1, 8), engine.new_cache(1, 8)
    for each in (cache, other):
        engine.forward(ids, each)
        engine.forward(new, each)
    for kept in (cache.keys, cache.values, other.keys, other.values):
        kept[1] = kept[1] * 0.5
    other.engine_state = None
    found, expected = (engine.forward(new, each).logits for each in (cache, other))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("is_short_pass", [False, True])
def test_autocast_is_for_the_modules(is_short_pass):
    model = our_model(**SHAPE, max_seq_len=128)
    new = random_ids(1, 1 if is_short_pass else 70, seed=5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        cache = model.new_cache(1, 80)
        model(random_ids(1, 4), cache=cache, logits=None)
        assert model(new, cache=cache).logits.dtype == torch.bfloat16


def test_other_devices_can_be_compiled_without_a_break():
    norm = RMSNorm(32, 1e-5).to("meta")
    compiled = torch.compile(norm, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2, 32, device="meta")).shape == (2, 32)


def test_tensors_without_memory_go_the_plain_way():
    model, ids = our_model(**SHAPE), random_ids(2, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(ids).logits.shape == (2, 5, 61)
    with torch.no_grad():
        model(ids)
    exported = torch.export.export(model, (ids,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, model(ids).logits, atol=1e-5, rtol=0)

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (ids,)).logits.square().mean()

    parameters = dict(model.named_parameters())
    gradients = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_a_library_that_is_missing_leaves_everything_to_torch(monkeypatch):
    model, ids = our_model(**SHAPE), random_ids(1, 4)
    with torch.inference_mode():
        fast = model(ids, cache=model.new_cache(1, 4)).logits
        monkeypatch.setattr(native_step, "library", lambda: None)
        monkeypatch.setattr(ops, "library", lambda: None)
        assert torch.allclose(model(ids, cache=model.new_cache(1, 4)).logits, fast, atol=1e-5)


def test_the_exponential_is_as_near_as_it_says(at_level):
    u = torch.linspace(-80, 80, 40_001)
    wanted = u.double() * u.double().sigmoid()
    error = (ops.swiglu(u, torch.ones_like(u)) - wanted) / wanted.where(u != 0, 1.0)
    # Where it is not fused, a product near 80 is rounded: 80 * 2^-24.
    assert error.abs().max() < (6e-7 if at_level else 6e-6)


def gradients_of(compute, *tensors):
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = compute(*tensors)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    (y * weights).sum().backward()
    return [y.detach(), *(tensor.grad for tensor in tensors)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["norm", "gate", "rotation"])
def test_operations_and_their_gradients_are_those_of_the_equations(what, dtype, plain, at_level):
    torch.manual_seed(0)
    x, other = torch.randn(3, 7, 4, 26), torch.randn(3, 7, 4, 26)
    norm, gate = RMSNorm(26, 1e-5), FeedForward.__new__(FeedForward)
    nn.init.normal_(norm.weight)
    rotation = torch.polar(torch.ones(1, 7, 1, 13), torch.randn(1, 7, 1, 13))
    assert gate is not None

    def of_equation(*tensors):
        if what == "norm":
            x, weight = tensors
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight
        if what == "gate":
            return nn.functional.silu(tensors[0]) * tensors[1]
        return apply_rotary_embedding(tensors[0], rotation)

    def of_library(*tensors):
        if what == "norm":
            return ops.rms_norm(*tensors, 1e-5)
        return ops.swiglu(*tensors) if what == "gate" else ops.rotate(*tensors, rotation)

    tensors = {"norm": (x, norm.weight), "gate": (x, other), "rotation": (x,)}[what]
    tensors = [tensor.to(dtype) for tensor in tensors]
    mine = gradients_of(of_library, *tensors)
    plain()
    theirs = (
        gradients_of(of_equation, *(tensor.double() for tensor in tensors))
        if what != "rotation"
        else gradients_of(of_equation, *(tensor.float() for tensor in tensors))
    )
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == dtype
        rtol = 1e-5 if dtype == torch.float32 else 2**-7
        assert torch.allclose(a.double(), b.double(), rtol=rtol, atol=rtol), (a - b).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 30, 4, 2, 16), (1, 150, 6, 1, 10), (3, 65, 4, 4, 80)])
def test_causal_attention_and_its_gradients_are_torchs(shape, dtype, at_level):
    batch, length, heads, kv_heads, width = shape
    torch.manual_seed(0)
    tensors = [torch.randn(batch, length, n, width).to(dtype) for n in (heads, kv_heads, kv_heads)]

    def of_torch(*tensors):
        swapped = (x.transpose(1, 2) for x in tensors)
        sdpa = nn.functional.scaled_dot_product_attention
        return sdpa(*swapped, is_causal=True, enable_gqa=True).transpose(1, 2)

    mine = gradients_of(attention.causal_attention, *tensors)
    theirs = gradients_of(of_torch, *(tensor.double() for tensor in tensors))
    rtol = 2e-5 if dtype == torch.float32 else 2**-7
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a.double(), b, rtol=rtol, atol=rtol * b.abs().max())


def test_training_gives_the_gradients_of_the_plain_equations(plain):
    model, ids = our_model(**SHAPE), random_ids(2, 20)
    mask = torch.arange(20) < torch.tensor([[20], [13]])

    def gradients():
        model.zero_grad()
        logits = model(ids, attention_mask=mask).logits
        nn.functional.cross_entropy(logits[mask], ids[mask]).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    fast = gradients()
    plain()
    for name, gradient in gradients().items():
        assert torch.allclose(fast[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 8, 21])
def test_low_rank_products_and_their_gradients_are_those_of_two_products(rank, dtype, at_level):
    torch.manual_seed(0)
    x = torch.randn(3, 50, 40).to(dtype)
    a, b = torch.randn(rank, 40), torch.randn(27, rank)
    mine = gradients_of(lambda x, a, b: low_rank_product(x, a, b, 0.5), x, a, b)
    doubles = (x.double(), a.double(), b.double())
    theirs = gradients_of(lambda x, a, b: 0.5 * (x @ a.T) @ b.T, *doubles)
    rtol = 1e-5 if dtype == torch.float32 else 2**-7
    for ours, exact in zip(mine, theirs, strict=True):
        assert torch.allclose(ours.double(), exact, rtol=rtol, atol=rtol * exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_of_low_rank_products_takes_the_same_numbers_back(dtype, at_level):
    torch.manual_seed(0)
    x, a, b = torch.randn(70, 40).to(dtype), torch.randn(5, 40), torch.randn(27, 5)
    torch.manual_seed(3)
    identity = torch.eye(40)
    kept = low_rank_product(torch.ones(70, 40), identity, identity, 1.0, dropout=0.25)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs((kept == 0).float().mean() - 0.25) < 0.03
    assert ((kept == 0).float().mean(0) < 0.5).all()  # no column is always hit, nor a row
    assert ((kept == 0).float().mean(1) < 0.6).all()

    def dropped(x, a, b):
        torch.manual_seed(3)
        return low_rank_product(x, a, b, 0.5, dropout=0.25)

    doubles = (x.double(), a.double(), b.double())
    theirs = gradients_of(lambda x, a, b: 0.5 * (kept.double() * x @ a.T) @ b.T, *doubles)
    rtol = 1e-5 if dtype == torch.float32 else 2**-7
    for ours, exact in zip(gradients_of(dropped, x, a, b), theirs, strict=True):
        assert torch.allclose(ours.double(), exact, rtol=rtol, atol=rtol * exact.abs().max())


def test_all_of_it_can_be_dropped():
    x, a, b = torch.randn(5, 16), torch.randn(4, 16), torch.randn(8, 4)
    assert not low_rank_product(x, a, b, 1.0, dropout=1.0).any()


@pytest.mark.parametrize("kind", ["int4", "int4 without mins", "int8", "int8 with mins"])
def test_quantized_products_of_many_rows_and_blocks(kind, at_level):
    torch.manual_seed(0)
    parts = quantize(torch.randn(40, 13 * 32), 8 if kind.startswith("int8") else 4)
    if kind == "int4 without mins":
        parts = parts._replace(mins=None)
    elif kind == "int8 with mins":  # as Q5_K has them
        parts = parts._replace(mins=-100 * parts.scales)
    weight = QuantizedWeight(*parts)
    x = torch.randn(133, 13 * 32)
    y = ops.quantized_matmul(weight, x)
    exact = x.double() @ weight.dequantize(torch.float64).T
    # An activation is off by half of 1 / (127 * 128) of its block's largest number.
    largest = x.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
    bound = largest @ weight.dequantize().abs().T / (127 * 128 * 2) + 1e-4
    assert ((y - exact).abs() <= bound).all()
    # A row gets the same bits whoever stands beside it, but where loops are left to the compiler.
    for n in (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 47):
        few = ops.quantized_matmul(weight, x[:n])
        assert torch.equal(few, y[:n]) if at_level else torch.allclose(few, y[:n], atol=1e-3), n


@pytest.mark.skipif(best_level() < 2, reason="these products need AVX-512")
@pytest.mark.parametrize("kind", ["int4", "int4 without mins", "int8", "int8 with mins"])
def test_winograds_inner_products_have_the_bits_of_plain_ones(kind, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(200, 5 * 32)
    x[3], x[40, 32:64] = 1e30, 0.0
    x[7, 0::2], x[7, 1::2] = 1.0, -1.0
    x[11] = 1.0
    for out in (40, 64):  # an odd number of tiles, the last of them with rows left out
        quants, scales, mins = quantize(torch.randn(out, 5 * 32), 8 if "int8" in kind else 4)[:3]
        quants[0, :2], quants[1, 1:] = 255, 0  # all of one block the largest, and the smallest
        has_mins = kind in ("int4", "int8 with mins")
        mins = -7 * scales if has_mins and mins is None else mins if has_mins else None
        weight = QuantizedWeight(quants, scales, mins, out)
        for rows in (12, 13, 16, 63, 64, 65, 68, 127, 200):
            monkeypatch.setattr(ops, "sums_from", lambda level: 0)
            plain_products = ops.quantized_matmul(weight, x[:rows])
            monkeypatch.setattr(ops, "sums_from", lambda level: 12)
            assert torch.equal(ops.quantized_matmul(weight, x[:rows]), plain_products), rows


@pytest.mark.skipif(best_level() < 2, reason="these products need AVX-512")
@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "ffn_bias": True}])
def test_passes_of_winograds_inner_products_have_the_bits_of_plain_ones(
    kind, changes, monkeypatch, tmp_path
):
    model = model_of(kind, tmp_path, max_seq_len=512, **changes)
    for bias in (p for name, p in model.named_parameters() if name.endswith("bias")):
        nn.init.normal_(bias)
    found = []
    with torch.inference_mode():
        for least in (0, 12):
            monkeypatch.setattr(native_step, "sums_from", lambda level, least=least: least)
            found.append(ragged_pass(model, engine_for(model, "cpu").forward)[:2])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "out", "n"),
    [
        *((25, 16, 16), (33, 35, 50), (48, 3, 576), (49, 17, 577), (97, 1, 1), (64, 40, 7)),
        *((240, 33, 1153), (241, 20, 96), (300, 48, 31), (577, 17, 40), (1200, 16, 3), (0, 5, 7)),
    ],
)
def test_dense_products_of_many_rows(rows, out, n, dtype, at_level):
    """Panels and blocks of tokens, tiles of rows and parts of columns, whole ones and others."""
    torch.manual_seed(0)
    x, weight = torch.randn(n, rows).T, torch.randn(out, 2 * n)[:, ::2].to(dtype)
    y = ops.dense_matmul(weight, x)
    exact = x.double() @ weight.double().T
    assert torch.allclose(y.double(), exact, rtol=0, atol=2e-6 * n**0.5 * float(weight.abs().max()))
    # A row gets the same bits whoever stands beside it, and on any number of threads.
    before = torch.get_num_threads()
    try:
        for threads, few in ((1, rows), (3, rows), (2, 25)):
            torch.set_num_threads(threads)
            found = ops.dense_matmul(weight, x[:few])
            assert torch.equal(found, y[:few]) if at_level else torch.allclose(found, y[:few])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_only_what_is_selected_is_computed_behind_the_last_attention(
    kind, level, tmp_path, monkeypatch
):
    """More values to gather than heads have, in pieces of which one has no selected token."""
    model = model_of(kind, tmp_path, max_seq_len=128, **({} if kind == "int8" else {"head_dim": 2}))
    monkeypatch.setattr(native_step, "PIECE", 32)
    ids, positions = random_ids(1, 90), torch.arange(90).unsqueeze(0)
    for places in ([0, 1, 30, 31, 89], [89], [], list(range(90))):
        found, caches = [], []
        for only_logits in (True, False):
            cache = KVCache(model.config, 1, 96, dtype=torch.float32)
            found.append(
                NativeStep(model, level)(
                    *(ids, positions, model.rope(positions), cache),
                    torch.tensor(places, dtype=torch.long),
                    only_logits=only_logits,
                )
            )
            caches.append([*cache.keys, *cache.values])
        (hidden, logits), (whole, every) = found
        atol = 1e-5 if kind == "float32" else 5e-3
        assert torch.allclose(hidden[0, places], whole[0, places], atol=atol)
        others = [place for place in range(90) if place not in places]
        assert not hidden[0, others].any()
        assert torch.allclose(logits, every, atol=atol)
        assert all(
            torch.equal(a[..., :90, :], b[..., :90, :]) for a, b in zip(*caches, strict=True)
        )


@pytest.mark.parametrize("rows", [25, 70])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row_of_dense_products(rows, value, at_level):
    x, weight = torch.randn(rows, 40), torch.randn(35, 40).half()
    x[rows // 2, 3] = value
    y = ops.dense_matmul(weight, x)
    assert not y[rows // 2].isfinite().any()
    assert y[torch.arange(rows) != rows // 2].isfinite().all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("is_mixed", [False, True], ids=["dense", "beside quantized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_long_passes_over_dense_weights(dtype, is_mixed, level, plain, tmp_path):
    """Widths that are no whole vectors, biases, and quantized layers that read other forms."""
    changes = {"dim": 64, "hidden_dim": 96} if is_mixed else {"dim": 40, "hidden_dim": 75}
    changes |= {"attention_bias": True, "ffn_bias": True, "max_seq_len": 512, "n_layers": 3}
    model = model_of("int8" if is_mixed else "float32", tmp_path, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.normal_(mean=1.0, std=0.3)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if is_mixed:
        names = [f"layers.{i}.feed_forward.w{w}" for i, w in ((0, 1), (0, 3), (1, 2), (2, 3))]
        names += ["layers.0.attention.compute_key", "layers.1.attention.compute_output"]
    for name in names:
        old = model.get_submodule(name)
        weight = old.dequantize() if is_mixed else old.weight.detach()
        new = UpcastLinear(weight.shape[1], weight.shape[0])
        new.weight, new.bias = nn.Parameter(weight.to(dtype)), old.bias
        model.set_submodule(name, new)
    assert can_run(model)
    ids = random_ids(1, 300)
    with torch.inference_mode():
        cache = KVCache(model.config, 1, 300, dtype=torch.float32)
        positions = torch.arange(300).unsqueeze(0)
        rotation = model.rope(positions, 300)
        hidden, logits = NativeStep(model, level)(
            ids, positions, rotation, cache, torch.arange(300)
        )
        plain()
        expected = model(ids)
    atol = 5e-3 if is_mixed else 2e-5
    assert torch.allclose(hidden, expected.hidden, atol=atol), (
        (hidden - expected.hidden).abs().max()
    )
    assert torch.allclose(logits[None], expected.logits, atol=atol)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_none_in_quantized_products(bits, rows, value, at_level):
    weight = QuantizedWeight(*quantize(torch.randn(40, 96), bits))
    for place in (0, 13, 31, 64, 95):
        x = torch.randn(rows, 96)
        x[rows // 2, place] = value
        y = ops.quantized_matmul(weight, x)
        finite = torch.arange(rows) != rows // 2
        assert y[finite].isfinite().all()
        assert not y[rows // 2].isfinite().any()
    assert ops.quantized_matmul(weight, torch.full((1, 96), float("nan"))).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_products_can_be_added_in_place(dtype, at_level):
    torch.manual_seed(0)
    x, y, a, b = (torch.randn(*shape) for shape in ((9, 16), (9, 8), (4, 16), (8, 4)))
    x, y = x.to(dtype), y.to(dtype)

    def added(x, y, a, b):
        onto = y * 1  # a leaf cannot be written to
        result = low_rank_product(x, a, b, 0.5, onto=onto)
        assert result.data_ptr() == onto.data_ptr()
        return result

    doubles = (t.double() for t in (x, y, a, b))
    theirs = gradients_of(lambda x, y, a, b: y + 0.5 * (x @ a.T) @ b.T, *doubles)
    rtol = 1e-5 if dtype == torch.float32 else 2**-7
    for ours, exact in zip(gradients_of(added, x, y, a, b), theirs, strict=True):
        assert torch.allclose(ours.double(), exact, rtol=rtol, atol=rtol * exact.abs().max())


def test_low_rank_products_take_matrices_of_half_precision():
    x, a, b = torch.randn(5, 16), torch.randn(4, 16).bfloat16(), torch.randn(8, 4).bfloat16()
    exact = 2 * x @ a.float().T @ b.float().T
    assert torch.allclose(low_rank_product(x, a, b, 2.0), exact, atol=1e-4)
