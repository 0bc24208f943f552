"""Compiled code reads and writes by address: what does not fit it is refused or left to torch."""

import copy
import ctypes
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from minllama.errors import MinllamaError
from minllama.kernels.cpu import attention, library, ops, structs
from minllama.kernels.cpu.lora import low_rank_product
from minllama.lora import add_lora_wrapper, lora_parameters
from minllama.model.llama import Attention, Llama, RMSNorm
from minllama.model.rope import RotaryEmbedding, apply_rotary_embedding
from minllama.quantization.half import upcast_matmul
from minllama.quantization.modules import QuantizedLinear, quantize
from minllama.training.optimizer import AdamW
from tests.tiny import our_model, random_ids

pytestmark = pytest.mark.skipif(
    library.library() is None, reason="minllama was installed without a C++ compiler"
)

of = torch.zeros
WRONG = {
    "norm, wider": lambda: RMSNorm(32, 1e-5)(of(1, 64)),
    "norm, narrower": lambda: RMSNorm(32, 1e-5)(of(2, 16)),
    "gate": lambda: ops.swiglu(of(2, 8), of(1, 8)),
    "rotation, fewer positions": lambda: ops.rotate(
        of(2, 10, 4, 16), of(1, 5, 1, 8, dtype=torch.complex64)
    ),
    "rotation, other rows": lambda: ops.rotate(
        of(4, 10, 4, 16), of(2, 10, 1, 8, dtype=torch.complex64)
    ),
    "rotation, another width": lambda: ops.rotate(
        of(2, 10, 4, 16), of(1, 10, 1, 4, dtype=torch.complex64)
    ),
    "blocks": lambda: QuantizedLinear(*quantize(of(16, 32), 8))(of(1, 64)),
    "blocks of a file, longer ones": lambda: ops.pack(of(6, 18).byte(), 2, 8, False),
    "blocks of a file, of fewer rows": lambda: ops.pack(of(6, 18).byte(), 4, 4, False),
    "blocks of a file, no bytes": lambda: ops.pack(of(6, 18), 2, 4, False),
    "halves": lambda: upcast_matmul(of(1, 64), of(16, 32, dtype=torch.bfloat16)),
    "attention, fewer values": lambda: attention.causal_attention(
        of(1, 4, 2, 16), of(1, 4, 2, 16), of(1, 3, 2, 16)
    ),
    "attention, other heads": lambda: attention.causal_attention(
        of(1, 4, 3, 16), of(1, 4, 2, 16), of(1, 4, 2, 16)
    ),
    "attention, another width": lambda: attention.causal_attention(
        of(1, 4, 2, 32), of(1, 4, 2, 16), of(1, 4, 2, 16)
    ),
    "adapter, x": lambda: low_rank_product(of(1, 16), of(2, 8), of(4, 2), 1.0),
    "adapter, rank": lambda: low_rank_product(of(1, 8), of(2, 8), of(4, 3), 1.0),
    "adapter, onto": lambda: low_rank_product(of(2, 8), of(2, 8), of(4, 2), 1.0, onto=of(1, 4)),
}


@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_do_not_fit_are_refused(case):
    with pytest.raises(MinllamaError, match=r"do not match|times"):
        WRONG[case]()


def test_moments_of_another_shape_are_not_written_to():
    parameter = nn.Parameter(torch.zeros(64))
    optimizer = AdamW([parameter])
    optimizer.state[parameter] = {
        "step": 1,
        "exp_avg": torch.zeros(8),
        "exp_avg_sq": torch.zeros(8),
    }
    parameter.grad = torch.ones(64)
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()


def test_positions_without_rows_turn_every_row():
    config = our_model().config
    x = torch.randn(3, 10, 4, config.head_dim)
    rope = RotaryEmbedding(config)
    turned = apply_rotary_embedding(x, rope(torch.arange(10)))
    assert torch.equal(turned, apply_rotary_embedding(x, rope(torch.arange(10).expand(3, -1))))


class _Silent(Attention):
    def forward(self, x, rotation, view, cache):
        return torch.zeros_like(x)


def _fewer_layers(model):
    model.layers = model.layers[:1]


def _larger_vocabulary(model):
    old, model.tok_embeddings = model.tok_embeddings, nn.Embedding(69, 32)
    nn.init.normal_(model.tok_embeddings.weight)
    model.tok_embeddings.weight.data[:61] = old.weight.data


def _a_layer_left_out(model):
    class Through(nn.Module):
        def forward(self, x, rotation, view, cache):
            return x

    model.layers[1] = Through()


def _another_attention(model):
    model.layers[0].attention = _Silent(model.config, 0)


def _another_norm(model):
    model.norm = nn.Identity()
    model.norm.weight = model.layers[0].ffn_norm.weight


def _a_wider_gate(model):
    for layer in model.layers:
        layer.feed_forward.w1 = nn.Linear(32, 64, bias=False)
        layer.feed_forward.w3 = nn.Linear(32, 64, bias=False)
        layer.feed_forward.w2 = nn.Linear(64, 32, bias=False)


@pytest.mark.parametrize(
    "change",
    [
        *(_fewer_layers, _larger_vocabulary, _a_layer_left_out),
        *(_another_attention, _another_norm, _a_wider_gate),
    ],
)
def test_a_model_that_was_changed_by_hand_is_left_to_its_modules(change, monkeypatch):
    model, ids, new = our_model(), random_ids(1, 6), random_ids(1, 1, seed=4)
    change(model)

    @torch.inference_mode()
    def continued():
        cache = model.new_cache(1, 8)
        model(ids, cache=cache)
        return model(new, cache=cache).logits

    found = continued()
    monkeypatch.setattr("minllama.engine.cpu.can_run", lambda llama: False)
    assert torch.equal(found, continued())


def test_hooks_of_all_modules_are_heard():
    heard = []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: heard.append(1))
    try:
        model = our_model()
        with torch.inference_mode():
            model(random_ids(1, 3), cache=model.new_cache(1, 4))
    finally:
        handle.remove()
    assert heard


def test_a_hook_that_is_registered_between_two_steps_is_heard():
    model, heard = our_model(), []
    cache = model.new_cache(1, 8)
    with torch.inference_mode():
        model(random_ids(1, 3), cache=cache)
        handle = model.layers[1].register_forward_hook(lambda *args: heard.append(1))
        model(random_ids(1, 1), cache=cache)
        assert heard == [1]
        handle.remove()
        model(random_ids(1, 1), cache=cache)
    assert heard == [1]


def test_a_forward_that_is_put_on_a_module_is_run():
    """As accelerate's hooks are."""
    model, called = our_model(), []
    cache, layer = model.new_cache(1, 8), model.layers[1]
    forward = layer.forward

    def wrapped(*args):
        called.append(1)
        return forward(*args)

    with torch.inference_mode():
        expected = [model(random_ids(1, n), cache=cache).logits for n in (3, 1, 1)]
        cache.truncate(0)
        found = [model(random_ids(1, 3), cache=cache).logits]
        layer.forward = wrapped
        found.append(model(random_ids(1, 1), cache=cache).logits)
        del layer.forward
        found.append(model(random_ids(1, 1), cache=cache).logits)
    assert called == [1]
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("way", ["subclass", "instance"])
def test_logits_that_somebody_computes_otherwise_are_computed_so(way):
    class Doubled(Llama):
        def compute_logits(self, hidden):
            return 2 * super().compute_logits(hidden)

    plain = our_model()
    model = (Doubled if way == "subclass" else Llama)(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    if way == "instance":
        model.compute_logits = lambda hidden: 2 * Llama.compute_logits(model, hidden)
    ids = random_ids(1, 3)
    with torch.inference_mode():
        found = model(ids, cache=model.new_cache(1, 4)).logits
        expected = plain(ids, cache=plain.new_cache(1, 4)).logits
    assert torch.allclose(found, 2 * expected, atol=1e-5)


@pytest.fixture
def with_default():
    """Sets torch's default dtype for the test."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def everything(model, weight):
    """Numbers from every operation that is compiled."""
    ids, model = random_ids(2, 6), copy.deepcopy(model)
    cache = model.new_cache(2, 8, dtype=torch.float32)
    with torch.inference_mode():
        found = [model(ids, cache=cache).logits, model(ids[:, :1], cache=cache).hidden]
        found.append(weight(found[0][..., :32]))
    add_lora_wrapper(model, r=2)
    generator = torch.Generator().manual_seed(0)
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.2, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    model.train().requires_grad_()
    model(ids, attention_mask=mask).logits.square().sum().backward()
    return [*found, *(parameter.grad for parameter in model.parameters())]


def test_torchs_default_dtype_is_not_that_of_compiled_code(with_default):
    model, weight = our_model(), QuantizedLinear(*quantize(torch.randn(16, 32), 8))
    plain = everything(model, weight)
    assert all(x.any() for x in plain)
    with_default(torch.float64)
    for a, b in zip(plain, everything(model, weight), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_an_update_is_seen_by_who_saved_the_weights_for_a_backward_pass():
    weight = nn.Parameter(torch.ones(3))
    square = (weight * weight).sum()
    weight.grad = torch.ones(3)
    AdamW([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@pytest.mark.parametrize("changes", [{"n_layers": 1}, {"n_kv_heads": 1}, {"head_dim": 4}])
def test_a_cache_of_another_model_is_refused(changes):
    model, other = our_model(), our_model(**changes)
    with torch.inference_mode(), pytest.raises(MinllamaError, match="for another model"):
        model(random_ids(1, 3), cache=other.new_cache(1, 8))


def test_a_cache_serves_the_model_that_it_is_given_to():
    one, other = our_model(), our_model(seed=1)
    ids, new = random_ids(1, 4), random_ids(1, 1, seed=5)
    with torch.inference_mode():
        cache = one.new_cache(1, 8)
        one(ids, cache=cache)
        fresh = one.new_cache(1, 8)
        fresh.keys, fresh.values, fresh.lengths = cache.keys, cache.values, list(cache.lengths)
        wanted = other(new, cache=fresh).logits
        assert torch.equal(other(new, cache=cache).logits, wanted)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_cache_goes_on_by_itself(copied):
    model, new = our_model(), random_ids(1, 1, seed=5)
    with torch.inference_mode():
        cache = model.new_cache(1, 8)
        model(random_ids(1, 4), cache=cache)
        other = copied(cache)
        assert torch.equal(model(new, cache=cache).logits, model(new, cache=other).logits)
        assert cache.lengths == other.lengths == [5]
        assert cache.keys[0].data_ptr() != other.keys[0].data_ptr()


@pytest.mark.parametrize("length", [4, 40])  # in compiled code, and through the modules
def test_what_a_pass_gives_does_not_depend_on_its_length(length):
    model = our_model(max_seq_len=128)
    ids = random_ids(2, length)
    wanted = torch.tensor([[0, -1]], dtype=torch.int32)
    with torch.no_grad():
        out = model(ids, cache=model.new_cache(2, length), logits=wanted)
        every = model(ids).logits
    assert torch.allclose(out.logits, every[:, [0, -1]], atol=1e-4)
    head = nn.Linear(32, 2)
    head(out.hidden).sum().backward()  # not a tensor that autograd may not keep
    assert head.weight.grad is not None


def test_second_derivatives_are_refused_rather_than_wrong():
    x = torch.randn(2, 8, requires_grad=True)
    y = ops.rms_norm(x, torch.ones(8), 1e-5)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def changed(fields):
    """The structs of calls, with the fields of Heads changed."""
    other = type("Heads", (ctypes.Structure,), {"_fields_": fields})
    return tuple(other if struct is structs.Heads else struct for struct in structs.STRUCTS)


HEADS = structs.Heads._fields_


@pytest.mark.parametrize(
    "others",
    [
        structs.STRUCTS[::-1],
        structs.STRUCTS[:-1],
        changed((HEADS[0], HEADS[2], HEADS[1], HEADS[3])),  # of the same size
        changed((*HEADS[:3], ("head_stride", ctypes.c_double))),
        changed((*HEADS[:3], ("stride_of_heads", ctypes.c_int64))),
        changed((*HEADS, ("more", ctypes.c_int64))),
    ],
    ids=["order", "fewer", "fields exchanged", "type", "name", "more"],
)
def test_a_library_of_another_version_is_not_used(monkeypatch, others):
    monkeypatch.setattr(library, "STRUCTS", others)
    library.library.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="another version of minllama"):
            assert library.library() is None
    finally:
        library.library.cache_clear()


def test_the_header_has_the_structs_that_python_fills():
    """By name and type, also where there is no compiler that would describe them."""
    header = Path(structs.__file__).with_name("src") / "structs.h"
    text = re.sub(r"//[^\n]*", "", header.read_text(encoding="utf-8"))
    found = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\n\};", text, re.S):
        found[name] = []
        for declaration in filter(str.strip, body.split(";")):
            first, *others = declaration.replace("*", " * ").split(",")
            *kind, field = first.split()
            for each in (field, *others):
                is_pointer = "*" in (kind if each is field else each)
                own = "pointer" if is_pointer else kind[-1].removesuffix("_t")
                found[name].append((each.replace("*", "").strip(), own))
    expected = {
        struct.__name__: [
            (field, kind)
            for _, field, _, kind in map(str.split, structs.described(struct).splitlines()[:-1])
        ]
        for struct in structs.STRUCTS
    }
    assert found == expected
