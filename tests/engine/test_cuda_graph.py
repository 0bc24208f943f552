"""Steps on a GPU compute what the modules compute.

With a GPU on it, captured; without, the same kernels one by one in Triton's interpreter, which
`conftest.py` asks for.
"""

import gc
import weakref

import pytest
import torch

from minllama import GenerationOptions
from minllama.engine import cuda_graph
from minllama.engine.cuda_graph import GraphStep, computes
from minllama.errors import MinllamaError
from minllama.generation.decode import Decoder
from minllama.kernels.gpu import decode_program as walk
from minllama.kernels.gpu import launch as gpu
from minllama.lora import add_lora_wrapper
from minllama.model.config import RopeScaling
from minllama.model.kv_cache import KVCache
from minllama.model.llama import load_pretrained
from minllama.quantization.modules import QuantizedWeight, quantize
from tests.tiny import CHANGED_FIELDS, VARIANTS, our_model, random_ids

pytest.importorskip("triton", reason="needs Triton, which there is for Linux")

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
SHAPE = {"dim": 64, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 61}
# The interpreter multiplies the bits of bfloat16 matrices as if they were numbers.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
ATOL = {torch.float32: 2e-5, torch.float16: 0.03, torch.bfloat16: 0.2}
# Of a padding row, in numbers that nobody reads.
quiet = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """The interpreter takes milliseconds for each program, most of which would have no slots."""
    if not HAS_GPU:
        monkeypatch.setattr(walk, "PROGRAMS", 8)


def model_of(dtype=torch.float32, **changes):
    model = our_model(**{**SHAPE, "max_seq_len": 512, **changes}).to(DEVICE, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.normal_(mean=1.0, std=0.3)
    return model


def step_of(model, **settings):
    settings = settings if HAS_GPU else {"captures": False, "early": False}
    return GraphStep(model, **settings)


def filled(model, lengths, room=8):
    """A cache of rows of these lengths."""
    n, longest = len(lengths), max(lengths)
    ids = random_ids(n, longest).to(DEVICE)
    mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(-1)
    cache = KVCache(model.config, n, longest + room, dtype=model.dtype, device=DEVICE)
    model(ids, attention_mask=mask.to(DEVICE), cache=cache, logits=None)
    return cache


def compare(model, step, lengths, n_steps=3, exact=None):
    """Step after step beside the modules, of the same model or one in float32."""
    exact = exact or model
    cache, other = filled(model, lengths), filled(exact, lengths)
    for number in range(n_steps):
        ids = random_ids(len(lengths), 1, seed=number + 5).to(DEVICE)
        hidden, logits = step(ids, cache)
        cache.advance([1] * len(lengths))
        with torch.no_grad():  # a plain pass over a cache that nothing compiled serves
            wanted = plain(exact, ids, other)
        atol = ATOL[model.dtype]
        assert (hidden - wanted.hidden).abs().max() < atol
        assert (logits - wanted.logits).abs().max() < atol


def plain(model, ids, cache):
    """A pass of the modules, whatever else there is."""
    handle = model.layers[0].register_forward_hook(lambda *_: None)
    try:
        return model(ids, cache=cache)
    finally:
        handle.remove()


@quiet
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(5,), (5, 3, 1)])
@torch.inference_mode()
def test_a_step_is_the_walk_of_the_modules(dtype, lengths):
    model = model_of(dtype)
    compare(model, step_of(model), lengths, exact=model_of(dtype).float())


@quiet
@pytest.mark.parametrize("lengths", [(7,), (4, 2)])
@pytest.mark.parametrize(
    "changes",
    [*VARIANTS, {"rope_scaling": RopeScaling(kind="linear", factor=4.0)}],
)
@torch.inference_mode()
def test_a_step_knows_every_variant(changes, lengths):
    model = model_of(n_layers=1, **changes)
    compare(model, step_of(model), lengths, n_steps=2)


@quiet
@pytest.mark.parametrize("name", sorted(cuda_graph.IMPLEMENTED))
@torch.inference_mode()
def test_a_step_follows_every_field_that_it_implements(name):
    model = model_of(**{"n_layers": 1, **CHANGED_FIELDS[name]})
    compare(model, step_of(model), (4, 2), n_steps=1)


@quiet
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("how", ["int4", "int8"])
@torch.inference_mode()
def test_a_step_reads_weights_in_blocks(how, rows, tmp_path, monkeypatch):
    # A CPU's product of blocks has an error of its own.
    monkeypatch.setattr("minllama.kernels.cpu.ops.serves", lambda x: False)
    our_model(**SHAPE, n_layers=1, attention_bias=True).save_pretrained(tmp_path / "model")
    model = load_pretrained(tmp_path / "model", quantize=how, dtype="float32", device=DEVICE)
    assert computes(model)
    compare(model, step_of(model), (4,) * rows, n_steps=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_mins", [True, False])
def test_weights_in_blocks_are_taken_apart_and_multiplied(bits, has_mins, dtype):
    """The last tile is not full, and the last blocks are fewer than are read at once."""
    torch.manual_seed(0)
    parts = quantize(torch.randn(37, 71 * 32), bits)
    mins = (torch.randn(parts.scales.shape) / 10).half() if has_mins else None
    weight = QuantizedWeight(parts.quants, parts.scales, mins, 37).to(DEVICE)
    exact = weight.dequantize()
    apart = gpu.dequantize(weight, dtype)
    assert torch.equal(apart, exact.to(dtype))
    for rows in (1, 3, 9):
        x = torch.randn(rows, 71 * 32, device=DEVICE).to(dtype)
        wanted = x.float() @ exact.t()
        error = (gpu.quantized_matmul(weight, x).float() - wanted).abs().max()
        assert error < (1e-3 if dtype == torch.float32 else 0.02) * wanted.abs().max()


@torch.inference_mode()
def test_long_texts_are_attended_to_in_parts():
    model = model_of(n_layers=1)
    compare(model, step_of(model), (300,), n_steps=2)


@torch.inference_mode()
def test_wide_weights_are_read_in_pieces(monkeypatch):
    monkeypatch.setattr(walk, "MOST_COLUMNS", 16)
    monkeypatch.setattr(walk, "TILE", 64)
    model = model_of(n_layers=1)
    compare(model, step_of(model), (5,), n_steps=2)


@torch.inference_mode()
def test_one_step_serves_one_cache_after_another_and_one_that_was_cut():
    model = model_of(n_layers=1)
    step = step_of(model)
    compare(model, step, (5,), n_steps=2)
    cache = filled(model, (9,))
    ids = random_ids(1, 1, seed=3).to(DEVICE)
    first, _ = step(ids, cache)
    step(random_ids(1, 1, seed=4).to(DEVICE), filled(model, (3,)))
    again, _ = step(ids, cache)  # the cache was not advanced: the same slot once more
    assert torch.equal(first, again)
    cache.grow(40)
    assert torch.equal(step(ids, cache)[0], first)


def test_a_step_is_taken_in_inference_mode_and_out_of_it():
    model = model_of(n_layers=1)
    step = step_of(model)
    with torch.inference_mode():
        compare(model, step, (5,), n_steps=1)
    with torch.no_grad():
        compare(model, step, (5,), n_steps=1)


@torch.inference_mode()
def test_a_step_that_failed_is_taken_again_as_if_nothing_had_been(monkeypatch):
    model = model_of(n_layers=1)
    step, cache = step_of(model), filled(model, (4,))
    ids = random_ids(1, 1).to(DEVICE)
    wanted, _ = step(ids, cache)
    cache.advance([1])
    cache.truncate(4)

    def out_of_memory(state):
        state.rows.lengths.add_(1)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(step, "_run", out_of_memory)
        with pytest.raises(MemoryError):
            step(ids, cache)
    assert torch.equal(step(ids, cache)[0], wanted)


@torch.inference_mode()
def test_what_a_step_gives_is_not_written_over():
    model = model_of(n_layers=1)
    step, cache = step_of(model), filled(model, (4,))
    hidden, logits = step(random_ids(1, 1, seed=1).to(DEVICE), cache)
    kept = hidden.clone(), logits.clone()
    cache.advance([1])
    step(random_ids(1, 1, seed=2).to(DEVICE), cache)
    assert torch.equal(hidden, kept[0])
    assert torch.equal(logits, kept[1])


@quiet
@torch.inference_mode()
def test_an_id_that_there_is_not_gives_no_number():
    model = model_of(n_layers=1)
    _, logits = step_of(model)(torch.tensor([[61]], device=DEVICE), filled(model, (4,)))
    assert logits.isnan().all()


def test_kernels_that_cannot_be_compiled_are_logged_once_and_done_without(monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def no_compiler(*_, **__):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    monkeypatch.setattr(torch, "ones", no_compiler)
    device = torch.device("cuda", 3)
    assert not gpu.works(device)
    assert not gpu.works(device)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("minllama", "WARNING")
    assert record.getMessage().endswith("slower: Failed to find C compiler.")


@torch.inference_mode()
def test_a_model_whose_kernels_cannot_be_compiled_goes_on_in_its_modules(monkeypatch, caplog):
    model = model_of(n_layers=1)
    step, cache = step_of(model), filled(model, (4,))
    ids = random_ids(1, 1).to(DEVICE)

    def too_large(rows):
        raise RuntimeError("out of resource: shared memory\nand more")

    monkeypatch.setattr(step, "_program", too_large)
    monkeypatch.setattr(cuda_graph, "DecodeProgram", lambda *_, **__: too_large)
    assert step(ids, cache) is None
    assert step(ids, cache) is None
    (message,) = caplog.messages
    assert "the modules', which is slower: out of resource: shared memory" in message


@torch.inference_mode()
def test_steps_that_cannot_be_captured_are_launched(monkeypatch, caplog):
    model = model_of(n_layers=1)
    step = step_of(model)
    monkeypatch.setattr(step, "_captures", True)

    def no_capture(rows):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(step, "_captured", no_capture)
    compare(model, step, (5,), n_steps=3)
    assert "are not captured, which is slower: operation not" in caplog.text


@torch.inference_mode()
def test_a_step_does_not_keep_a_cache_that_is_gone():
    model = model_of(n_layers=1)
    step, cache = step_of(model), filled(model, (4,))
    step(random_ids(1, 1).to(DEVICE), cache)
    keys = weakref.ref(cache.keys[0])
    del cache
    gc.collect()
    assert keys() is None


def test_shapes_that_do_not_fit_are_refused():
    weight = QuantizedWeight(*quantize(torch.randn(16, 64), 4)).to(DEVICE)
    u = torch.randn(2, 32, device=DEVICE)
    with pytest.raises(MinllamaError, match="quantized_matmul: tensors of shapes"):
        gpu.quantized_matmul(weight, u)
    with pytest.raises(MinllamaError, match=r"swiglu: .* \(2, 32\) and \(2, 31\)"):
        gpu.swiglu(u, u[:, :31])
    turns = torch.polar(torch.ones(1, 3, 1, 3), torch.zeros(1, 3, 1, 3)).to(DEVICE)
    for shape in ((2, 4, 5, 6), (1, 3, 5, 8)):
        with pytest.raises(MinllamaError, match="rotate: tensors of shapes"):
            gpu.rotate(torch.randn(shape, device=DEVICE), turns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2])
def test_what_stands_between_products(dtype, rows):
    torch.manual_seed(0)
    u, v = (torch.randn(2, 3, 50, device=DEVICE).to(dtype) for _ in range(2))
    wanted = torch.nn.functional.silu(u.float()) * v.float()
    assert torch.allclose(
        gpu.swiglu(u, v).float(), wanted, atol=1e-5 if dtype == torch.float32 else 0.03
    )
    x = torch.randn(2, 3, 5, 6, device=DEVICE).to(dtype)
    turns = torch.polar(torch.ones(rows, 3, 1, 3), torch.randn(rows, 3, 1, 3)).to(DEVICE)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turns
    wanted = torch.view_as_real(pairs).flatten(-2)
    turned = gpu.rotate(x, turns)
    assert turned.dtype == dtype
    assert torch.allclose(turned.float(), wanted, atol=1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize(
    "changes",
    [
        {"causal": False},
        {"max_seq_len": 64, "rope_scaling": RopeScaling(kind="dynamic", factor=2.0)},
    ],
)
def test_models_that_the_kernels_do_not_compute(changes):
    assert computes(model_of())
    assert not computes(model_of(**changes))


def test_adapters_and_mixed_dtypes_stay_with_the_modules():
    model = model_of()
    add_lora_wrapper(model, ["compute_query"])
    assert not computes(model)
    model = model_of(torch.float16)
    model.layers[0].ffn_norm.float()
    assert not computes(model)


def test_biases_of_some_matrices_only_stay_with_the_modules():
    model = model_of(attention_bias=True)
    assert computes(model)
    model.layers[1].attention.compute_key.bias = None
    assert not computes(model)


def test_without_a_gpu_nothing_is_asked_of_triton():
    assert not cuda_graph.can_run(our_model())


@needs_gpu
@torch.inference_mode()
def test_generation_on_a_gpu_takes_steps_and_chooses_the_same_tokens(monkeypatch):
    model = model_of()
    options = GenerationOptions(max_new_tokens=24, temperature=0.0, ignore_eos=True)
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (5, 17, 3)]

    def texts(prompts):
        found = {}
        for tokens in Decoder(model, prompts, options):
            for token in tokens:
                found.setdefault(token.row, []).append(token.id)
        return found

    for some in (prompts, prompts[:1]):
        fast = texts(some)
        assert len(cuda_graph._steps[model][1]) == 1
        with monkeypatch.context() as patch:
            patch.setattr(cuda_graph, "can_run", lambda llama: False)
            assert texts(some) == fast


@needs_gpu
@torch.inference_mode()
def test_a_model_that_is_changed_or_gone_takes_its_graphs_along():
    model = model_of()
    step = cuda_graph.step_of(model)
    assert cuda_graph.step_of(model) is step
    model.layers[0].feed_forward.w1.weight.data = torch.zeros_like(
        model.layers[0].feed_forward.w1.weight
    )
    assert cuda_graph.step_of(model) is not step
    model.to("cpu")
    assert model not in cuda_graph._steps
    model.to(DEVICE)
    step = cuda_graph.step_of(model)
    known = weakref.ref(model)
    del model, step
    gc.collect()
    assert known() is None


@needs_gpu
@torch.inference_mode()
def test_autocast_is_the_modules_business(monkeypatch):
    model = model_of()
    cache = filled(model, (4,))
    monkeypatch.setattr(GraphStep, "__call__", None)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        model(random_ids(1, 1).to(DEVICE), cache=cache)


@needs_gpu
@torch.inference_mode()
def test_a_whole_text_on_a_gpu_is_the_same_with_the_kernels(monkeypatch):
    model, ids = model_of(), random_ids(2, 40).to(DEVICE)
    fast = model(ids).logits
    monkeypatch.setattr(gpu, "serves", lambda x: False)
    assert torch.allclose(model(ids).logits, fast, atol=2e-5)


@needs_gpu
@pytest.mark.parametrize("trained", ["", "w1", "w3", "compute_key"])
def test_training_on_a_gpu_has_gradients(trained):
    """Of all parameters, and of one kind alone, which some inputs of an operation depend on."""
    model, ids = model_of(), random_ids(2, 10).to(DEVICE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    model(ids).logits.logsumexp(-1).sum().backward()
    exact = our_model(**SHAPE, max_seq_len=512)
    exact.load_state_dict({name: x.cpu() for name, x in model.state_dict().items()})
    exact(ids.cpu()).logits.logsumexp(-1).sum().backward()
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        if not ours.requires_grad:
            assert ours.grad is None
            continue
        assert torch.allclose(ours.grad.cpu(), theirs.grad, rtol=1e-3, atol=1e-3)


@needs_gpu
def test_adapters_are_trained_on_weights_in_blocks_on_a_gpu(tmp_path):
    our_model(**SHAPE).save_pretrained(tmp_path / "model")
    found = []
    for device in ("cpu", DEVICE):
        model = load_pretrained(tmp_path / "model", quantize="int4", dtype="float32", device=device)
        add_lora_wrapper(model, ["compute_query", "w2"])
        torch.manual_seed(1)
        for name, parameter in sorted(model.named_parameters()):
            if "lora" in name:
                parameter.data = (torch.randn(parameter.shape) / 10).to(device)
        model(random_ids(2, 10).to(device)).logits.logsumexp(-1).sum().backward()
        found.append({n: p.grad.cpu() for n, p in model.named_parameters() if "lora" in n})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=0.01, atol=0.01), name
