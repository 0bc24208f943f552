"""The model against transformers, full tensors, and against the formulas written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from minllama.errors import MinllamaError
from minllama.model.config import LlamaConfig
from minllama.model.kv_cache import KVCache
from minllama.model.llama import Attention, FeedForward, Llama, RMSNorm
from tests.tiny import both, our_model, random_ids, their_model

VARIANTS = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped-query": {"num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "odd head_dim": {"head_dim": 10},
    "theta and eps": {"rope_theta": 100000.0, "rms_norm_eps": 1e-2},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        "max_position_embeddings": 24,
    },
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, tmp_path):
    theirs, ours = both(tmp_path, **VARIANTS[variant])
    ids = random_ids(3, 60, 97)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", ["grouped-query", "biases", "llama3"])
def test_bfloat16_logits_equal_transformers_to_its_rounding(variant, tmp_path):
    theirs, _ = both(tmp_path, **VARIANTS[variant])
    ours = Llama.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")
    ids = random_ids(3, 60, 97)
    with torch.no_grad():
        exact = theirs(ids).logits
        reference = theirs.to(torch.bfloat16)(ids).logits.float()
        actual = ours(ids).logits
    assert actual.dtype == torch.bfloat16
    # Both round; ours may be no further from the exact logits than bfloat16 takes theirs.
    rounding = (reference - exact).abs().max()
    assert (actual.float() - exact).abs().max() < 1.5 * rounding
    assert rounding < 0.1 * exact.abs().max()  # else the bound above would allow anything


def test_hidden_states_are_those_before_the_vocabulary(tmp_path):
    theirs, ours = both(tmp_path)
    ids = random_ids(2, 20, 97)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(ids).hidden, theirs.model(ids).last_hidden_state, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_real_token(side, tmp_path):
    theirs, ours = both(tmp_path)
    ids = random_ids(3, 24, 97)
    mask = torch.ones(3, 24, dtype=torch.long)
    for row, pads in enumerate([0, 5, 20]):
        columns = slice(0, pads) if side == "left" else slice(24 - pads, 24)
        mask[row, columns] = 0
    with torch.no_grad():
        padded = ours(ids, attention_mask=mask).logits
        for row in range(3):
            alone = theirs(ids[row : row + 1, mask[row].bool()]).logits[0]
            torch.testing.assert_close(padded[row, mask[row].bool()], alone, atol=1e-4, rtol=0)
        assert padded.isfinite().all()


def test_last_logits_are_each_rows_last_real_token():
    model, ids = our_model(), random_ids(3, 8)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [0] * 2 + [1] * 6])
    with torch.no_grad():
        every = model(ids, attention_mask=mask).logits
        last = model(ids, attention_mask=mask, logits="last").logits
    expected = torch.stack([every[0, 7], every[1, 4], every[2, 7]])
    torch.testing.assert_close(last, expected)


def test_only_the_logits_asked_for_are_computed(monkeypatch):
    model, ids = our_model(), random_ids(2, 8)
    with torch.no_grad():
        every = model(ids).logits
        chosen = torch.tensor([[0, 3, 7], [2, 2, 5]])
        sizes = []
        plain = model.compute_logits
        monkeypatch.setattr(model, "compute_logits", lambda h: sizes.append(h.shape) or plain(h))
        some = model(ids, logits=chosen).logits
        none = model(ids, logits=None)
        last = model(ids, logits="last")
        from_the_end = model(ids, logits=chosen - 8).logits
    torch.testing.assert_close(some, torch.stack([every[0, chosen[0]], every[1, chosen[1]]]))
    assert none.logits is None
    assert none.hidden.shape == (2, 8, 32)
    torch.testing.assert_close(last.hidden, none.hidden[:, -1])
    torch.testing.assert_close(from_the_end, some)
    assert sizes == [(2, 3, 32), (2, 32), (2, 3, 32)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (torch.tensor([[8], [0]]), "positions that 8 tokens do not have"),
        (torch.tensor([[0], [-9]]), "positions that 8 tokens do not have"),
        (torch.tensor([[0.5], [1.0]]), "integers, not torch.float32"),
        (torch.tensor([[True], [False]]), "integers, not torch.bool"),
        (torch.tensor([0, 1]), r"shape \(2,\); give \(B, N\), here \(2, N\)"),
        (torch.tensor([[0], [1], [2]]), r"shape \(3, 1\); give \(B, N\), here \(2, N\)"),
        (torch.zeros(2, 0, dtype=torch.long), r"shape \(2, 0\)"),
    ],
)
def test_logits_of_columns_that_are_not_there_are_refused(columns, message):
    with pytest.raises(MinllamaError, match=message):
        our_model()(random_ids(2, 8), logits=columns)


@pytest.mark.parametrize("kind", [None, "llama3", "yarn", "linear"])
def test_cached_decode_equals_the_full_forward(kind, tmp_path):
    _, model = both(tmp_path, **(VARIANTS[kind] if kind else {}))
    ids = random_ids(2, 30, 97)
    cache = KVCache(model.config, batch_size=2, capacity=30)
    with torch.no_grad():
        full = model(ids).logits
        parts = [model(ids[:, :11], cache=cache).logits, model(ids[:, 11:15], cache=cache).logits]
        parts += [model(ids[:, t : t + 1], cache=cache).logits for t in range(15, 30)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-5, rtol=0)
    assert cache.lengths == [30, 30]


def test_rows_of_different_lengths_share_a_cache():
    model, ids = our_model(), random_ids(3, 20)
    lens = [9, 4, 1]
    mask = torch.arange(9) < torch.tensor(lens).unsqueeze(-1)
    cache = KVCache(model.config, batch_size=3, capacity=20)
    with torch.no_grad():
        first = model(ids[:, :9], attention_mask=mask, cache=cache, logits="last").logits
        assert cache.lengths == lens
        nexts = torch.stack([ids[row, n : n + 3] for row, n in enumerate(lens)])
        second = model(nexts[:, :2], cache=cache).logits
        third = model(nexts[:, 2:], cache=cache).logits
        for row, n in enumerate(lens):
            alone = model(ids[row : row + 1, : n + 3]).logits[0]
            torch.testing.assert_close(first[row], alone[n - 1], atol=1e-5, rtol=0)
            torch.testing.assert_close(second[row], alone[n : n + 2], atol=1e-5, rtol=0)
            torch.testing.assert_close(third[row], alone[n + 2 :], atol=1e-5, rtol=0)


def test_an_encoder_sees_both_ways_but_no_padding():
    model, ids = our_model(causal=False), random_ids(2, 10)
    mask = torch.tensor([[1] * 10, [1] * 6 + [0] * 4])
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).hidden
        alone = model(ids[1:, :6]).hidden
        changed = ids.clone()
        changed[0, 9] = (changed[0, 9] + 1) % 61
        torch.testing.assert_close(padded[1, :6], alone[0], atol=1e-5, rtol=0)
        assert not torch.allclose(model(changed).hidden[0, 0], padded[0, 0], atol=1e-4)


def test_a_causal_model_does_not_see_ahead():
    model, ids = our_model(), random_ids(1, 10)
    changed = ids.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 61
    with torch.no_grad():
        assert torch.equal(model(changed).hidden[0, :9], model(ids).hidden[0, :9])


def test_attention_is_the_written_out_softmax():
    config = LlamaConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=2)
    attention = Attention(config, layer=0).eval()
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 7, 8, generator=generator)
    mask = torch.rand(2, 1, 5, 7, generator=generator) > 0.3
    mask[..., 0] = True
    # Query head h reads key/value head h // 2.
    repeated_key, repeated_value = (t.repeat_interleave(2, dim=1) for t in (key, value))
    scores = query @ repeated_key.transpose(-1, -2) / math.sqrt(8)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    actual = attention.compute_query_key_value_scores(query, key, value, mask)
    torch.testing.assert_close(actual, weights @ repeated_value, atol=1e-6, rtol=0)
    square_key, square_value = repeated_key[:, :, :5], repeated_value[:, :, :5]
    scores = query @ square_key.transpose(-1, -2) / math.sqrt(8)
    weights = scores.masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf).softmax(-1)
    actual = attention.compute_query_key_value_scores(
        query, key[:, :, :5], value[:, :, :5], is_causal=True
    )
    torch.testing.assert_close(actual, weights @ square_value, atol=1e-6, rtol=0)


def test_attention_weights_drop_out_in_training_only():
    config = LlamaConfig(dim=32, n_layers=1, n_heads=4, vocab_size=2, dropout=0.5)
    attention = Attention(config, layer=0)
    query, key, value = torch.randn(3, 1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    trained = [attention.compute_query_key_value_scores(query, key, value) for _ in range(2)]
    assert not torch.equal(*trained)
    attention.eval()
    evaluated = [attention.compute_query_key_value_scores(query, key, value) for _ in range(2)]
    assert torch.equal(*evaluated)


@pytest.mark.parametrize("part", ["dropout", "attention.resid_dropout", "feed_forward.dropout"])
def test_every_residual_branch_and_the_embedding_drop_out_in_training(part):
    model = our_model(dropout=0.5).train()
    module = model.get_submodule(part if part == "dropout" else f"layers.0.{part}")
    assert isinstance(module, torch.nn.Dropout)
    assert module.p == 0.5
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    model(random_ids(1, 4))
    assert calls == [1]


def test_rms_norm_has_eps_inside_the_root_and_computes_in_float32():
    norm = RMSNorm(2, eps=0.5)
    norm.weight.data = torch.tensor([2.0, -1.0])
    # mean square (9 + 16) / 2 = 12.5; sqrt(12.5 + 0.5) = 3.6055513
    expected = torch.tensor([2 * 3 / 3.6055513, -4 / 3.6055513])
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), expected)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(norm(x), norm(x.float()).bfloat16())
    huge = torch.full((2,), 1e3, dtype=torch.float16)  # its square overflows float16
    torch.testing.assert_close(norm(huge), torch.tensor([2.0, -1.0]).half())


def test_feed_forward_is_swiglu():
    feed_forward = FeedForward(
        LlamaConfig(dim=2, n_layers=1, n_heads=1, hidden_dim=1, vocab_size=2)
    )
    feed_forward.w1.weight.data = torch.tensor([[1.0, 0.0]])
    feed_forward.w3.weight.data = torch.tensor([[0.0, 1.0]])
    feed_forward.w2.weight.data = torch.tensor([[1.0], [2.0]])
    # silu(2) = 2 / (1 + e^-2) = 1.7615942; times 3
    torch.testing.assert_close(
        feed_forward(torch.tensor([2.0, 3.0])), torch.tensor([5.2847825, 10.569565])
    )


def test_initial_weights_are_normal_and_residual_outputs_smaller():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(dim=256, n_layers=8, n_heads=4, vocab_size=512, attention_bias=True))
    layer = model.layers[3]
    for weight in (model.tok_embeddings.weight, model.output.weight, layer.feed_forward.w1.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    for weight in (layer.attention.compute_output.weight, layer.feed_forward.w2.weight):
        assert weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    assert torch.equal(layer.ffn_norm.weight, torch.ones(256))
    assert not layer.attention.compute_query.bias.any()


def test_gradients_reach_every_weight_and_equal_transformers(tmp_path):
    theirs, ours = both(tmp_path, attention_bias=True)
    ids = random_ids(2, 12, 97)
    F.cross_entropy(ours(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in ours.parameters())
    torch.testing.assert_close(
        ours.tok_embeddings.weight.grad, theirs.model.embed_tokens.weight.grad, atol=1e-6, rtol=1e-3
    )


def test_generate_takes_the_likeliest_token_at_temperature_zero(tmp_path):
    theirs, ours = both(tmp_path)
    ids = random_ids(3, 7, 97).clamp(min=1)
    expected = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(ours.generate(ids, 20, temperature=0.0), expected)


def test_generate_samples_from_the_softmax_of_logits_over_temperature():
    model = our_model(vocab_size=5)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = (model(ids, logits="last").logits / 0.7).softmax(-1)[0]
    drawn = model.generate(ids.repeat(4000, 1), 1, temperature=0.7, seed=0)[:, -1]
    shares = torch.bincount(drawn, minlength=5) / 4000
    # Five standard deviations of a share of 4000 draws.
    assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_generate_repeats_itself_with_a_seed_only():
    model, ids = our_model(), random_ids(2, 3)
    assert torch.equal(model.generate(ids, 12, seed=3), model.generate(ids, 12, seed=3))
    assert not torch.equal(model.generate(ids, 12, seed=3), model.generate(ids, 12, seed=4))
    assert not torch.equal(model.generate(ids, 12), model.generate(ids, 12))


def cache_of(model, batch_size=1, capacity=4):
    return KVCache(model.config, batch_size, capacity)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(random_ids(1, 65)), "65 tokens, but the model's context is 64"),
        (lambda m: m.generate(random_ids(1, 60), 5), "make 65, but the context is 64"),
        (lambda m: m.generate(random_ids(1, 4), 5, temperature=-1.0), "temperature must be >= 0"),
        (
            lambda m: m(random_ids(1, 5), cache=cache_of(m)),
            "room for 4 tokens per sequence: 0 are filled, and 5 more do not fit",
        ),
        (lambda m: m(random_ids(2, 2), cache=cache_of(m, 3)), "2 sequences for a cache of 3"),
        (
            lambda m: m(random_ids(1, 2), positions=random_ids(1, 2), cache=cache_of(m)),
            "with a cache, give both positions and an attention_mask",
        ),
        (
            lambda m: m(random_ids(1, 2), attention_mask=torch.tensor([[0, 1]]), cache=cache_of(m)),
            "padding must be on the right",
        ),
        (lambda m: m(random_ids(1, 2)[0], logits="last"), r"shape \(B, T\), neither 0"),
        (
            lambda m: m(random_ids(2, 7), attention_mask=torch.ones(2, 6), logits="last"),
            r"attention_mask has shape \(2, 6\) and ids \(2, 7\)",
        ),
        (lambda m: m(random_ids(1, 2)[:, :0]), "neither 0, not"),
        (lambda m: m(random_ids(1, 2)[:0]), "neither 0, not"),
        (
            lambda m: m(random_ids(2, 1), attention_mask=torch.ones(2, 7), cache=cache_of(m, 2)),
            r"attention_mask has shape \(2, 7\) and ids \(2, 1\)",
        ),
        (lambda m: m(random_ids(1, 2), logits="first"), "logits must be 'all', 'last'"),
        (
            lambda m: m(random_ids(1, 2), attention_mask=torch.zeros(1, 2), logits="last"),
            "a sequence without tokens",
        ),
        (
            lambda m: m(random_ids(1, 2), positions=torch.tensor([[0, 64]])),
            "positions must be from 0 to 63, not 0 to 64",
        ),
        (
            lambda m: m.bfloat16()(random_ids(1, 2), cache=cache_of(m)),
            r"make it with model\.new_cache\(\)",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(call, message):
    with torch.no_grad(), pytest.raises(MinllamaError, match=message):
        call(our_model())


def test_a_refused_pass_leaves_the_cache_as_it_was():
    model = our_model()
    cache = model.new_cache(2, 16)
    with torch.no_grad():
        model(random_ids(2, 3), cache=cache)
        with pytest.raises(MinllamaError):
            model(random_ids(2, 1), attention_mask=torch.ones(2, 4), cache=cache)
    assert cache.lengths == [3, 3]


def test_a_cache_is_refused_while_gradients_are_recorded():
    model = our_model()
    with pytest.raises(MinllamaError, match="gradients do not flow through a cache"):
        model(random_ids(1, 2), cache=model.new_cache(1, 4))


def test_positions_may_be_given():
    model, ids = our_model(), random_ids(1, 6)
    with torch.no_grad():
        shifted = model(ids, positions=torch.arange(20, 26).unsqueeze(0)).logits
        # Rotary attention depends on distances only.
        torch.testing.assert_close(shifted, model(ids).logits, atol=1e-5, rtol=0)
        spread = model(ids, positions=torch.arange(0, 60, 10).unsqueeze(0)).logits
    assert not torch.allclose(spread, shifted, atol=1e-3)


def test_logits_go_through_the_output_module():
    # So that a wrapped or quantized output layer is not bypassed.
    model, ids = our_model(), random_ids(1, 3)
    model.output = torch.nn.Sequential(model.output, torch.nn.Tanh())
    with torch.no_grad():
        assert model(ids).logits.abs().max() <= 1


def test_an_encoder_has_no_cache():
    model = our_model(causal=False)
    with pytest.raises(MinllamaError, match="a cache needs causal attention"):
        model(random_ids(1, 2), cache=KVCache(model.config, 1, 4))


def test_a_tied_model_has_one_matrix_for_both_ends():
    model = our_model(tie_embeddings=True)
    assert "output.weight" not in model.state_dict()
    hidden = torch.randn(3, 32)
    assert torch.equal(model.compute_logits(hidden), hidden @ model.tok_embeddings.weight.T)


def test_their_models_weights_are_not_all_alike():
    # The comparisons above would be blind to a norm that is forgotten if norms were all ones.
    assert their_model().model.norm.weight.std() > 0.1
