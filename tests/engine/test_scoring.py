"""Label scores are the chain rule, whatever the labels, the batch and the cache."""

import pytest
import torch
from torch.nn import functional as F

from minllama.engine.choose import engine_for
from minllama.engine.evaluation import MIN_SHARED_LEN
from minllama.engine.scheduler import Scheduler
from minllama.engine.scoring import ScoreRequest, compute_label_scores
from minllama.kernels.cpu.library import best_level
from minllama.model.llama import load_pretrained
from tests.tiny import both, our_model

LABELS = ((5,), (7, 9), (7, 9, 11), (7, 8, 3, 2), (1, 2, 3, 4, 5))


def prompts(*lengths, labels=LABELS, start=0):
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 61, (n,), generator=generator).tolist() for n in lengths]
    shared = [i % 61 for i in range(start)]
    return [
        ScoreRequest(ids=(*shared, *row), continuations=labels, shared_len=start) for row in ids
    ]


def scheduled(scheduler, requests):
    """What a scheduler answers, (B, C)."""
    evaluations = [scheduler.evaluate(request) for request in requests]
    while scheduler.is_busy:
        scheduler.step()
    return torch.stack([evaluation.result for evaluation in evaluations])


def one_at_a_time(model, batch):
    """The plain computation with transformers: each label a sequence of its own."""
    rows = []
    for prompt in batch:
        scores = []
        for label in prompt.continuations:
            ids = torch.tensor([[*prompt.ids, *label]])
            logits = model(ids).logits[0, :-1]
            log_probs = F.log_softmax(logits.float(), -1)[range(len(ids[0]) - 1), ids[0, 1:]]
            scores.append(log_probs[-len(label) :].sum())
        rows.append(torch.stack(scores))
    return torch.stack(rows)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_scores_equal_transformers_for_labels_of_one_to_five_tokens(tmp_path, tied):
    theirs, ours = both(tmp_path, tie_word_embeddings=tied)
    batch = prompts(1, 9, 4, 30)
    torch.testing.assert_close(
        compute_label_scores(ours, batch), one_at_a_time(theirs, batch), atol=1e-4, rtol=0
    )


@torch.no_grad()
def test_scores_of_one_token_labels_equal_transformers(tmp_path):
    theirs, ours = both(tmp_path)
    batch = prompts(3, 12, labels=((5,), (6,), (60,)))
    torch.testing.assert_close(
        compute_label_scores(ours, batch), one_at_a_time(theirs, batch), atol=1e-4, rtol=0
    )


@torch.no_grad()
def test_rows_may_have_different_continuations():
    model = our_model()
    batch = [
        ScoreRequest(ids=(1, 2, 3), continuations=((4, 5, 6), (7,))),
        ScoreRequest(ids=(9,), continuations=((8,), (7,))),
        ScoreRequest(ids=(9, 3, 2, 1, 5), continuations=((4, 5), (4, 7, 8, 9))),
    ]
    alone = torch.cat([compute_label_scores(model, [prompt]) for prompt in batch])
    torch.testing.assert_close(compute_label_scores(model, batch), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("labels", [LABELS, ((5,), (6,))])
@pytest.mark.parametrize("budget", [None, 7, 30])
@torch.no_grad()
def test_a_prefix_that_is_read_once_changes_nothing(labels, budget):
    model = our_model()
    scheduler = Scheduler(engine_for(model), token_budget=budget)
    for lengths in ((4, 4), (9, 1, 3), (2, 30, 5, 1), (3,)):  # the cache shrinks and grows
        batch = prompts(*lengths, labels=labels, start=MIN_SHARED_LEN)
        torch.testing.assert_close(
            scheduled(scheduler, batch), compute_label_scores(model, batch), atol=1e-5, rtol=0
        )


@torch.no_grad()
def test_prompts_with_and_without_a_prefix_are_answered_together():
    model = our_model()
    batch = [*prompts(4, start=MIN_SHARED_LEN), *prompts(20), *prompts(3, 2, start=20)]
    found = scheduled(Scheduler(engine_for(model)), batch)
    torch.testing.assert_close(found, compute_label_scores(model, batch), atol=1e-5, rtol=0)


def test_a_shared_prefix_and_labels_are_not_run_again():
    model = our_model()
    lengths = []
    model.layers[0].register_forward_hook(lambda m, args, out: lengths.append(args[0].shape))
    scheduler = Scheduler(engine_for(model))
    for _ in range(3):
        scheduled(scheduler, prompts(5, 5, start=20))
    # 20 once; then five tokens and the eight inner nodes of the trie of the five labels' 15 tokens.
    assert [shape[1] for shape in lengths] == [20, 13, 13, 13]


class ExactRequest(ScoreRequest):
    is_exact = True


def quantized_model(folder):
    our_model(dim=64, hidden_dim=96, vocab_size=61, max_seq_len=400).save_pretrained(folder)
    return load_pretrained(folder, quantize="int4", dtype="float32")


def exact_prompts(*lengths, start=0):
    return [
        ExactRequest(ids=each.ids, continuations=each.continuations, shared_len=each.shared_len)
        for each in prompts(*lengths, start=start)
    ]


@pytest.mark.parametrize("start", [0, MIN_SHARED_LEN, 150])
@torch.inference_mode()
def test_exact_scores_have_the_same_bits_in_any_company(start, tmp_path):
    model = quantized_model(tmp_path / "model")
    engine = engine_for(model)
    batch = exact_prompts(30, 1, 9, 2, 17, 130, 5, start=start)
    together = scheduled(Scheduler(engine), batch)
    assert torch.equal(scheduled(Scheduler(engine), batch[::-1]), together.flipud())
    assert torch.equal(scheduled(Scheduler(engine, token_budget=40), batch), together)
    alone = [scheduled(Scheduler(engine), [each])[0] for each in batch]
    assert torch.equal(torch.stack(alone), together)
    torch.testing.assert_close(together, compute_label_scores(model, batch), atol=2e-3, rtol=0)


@pytest.mark.skipif(best_level() < 2, reason="values depend on the batch without AVX-512")
@torch.inference_mode()
def test_exact_scores_are_computed_together_where_values_do_not_depend_on_it(tmp_path, monkeypatch):
    engine = engine_for(quantized_model(tmp_path / "model"))
    assert engine.is_batch_invariant
    assert not engine_for(our_model()).is_batch_invariant
    rows = []
    own = type(engine).tree_logits

    def counted(self, ids, *args):
        rows.append(len(ids))
        return own(self, ids, *args)

    monkeypatch.setattr(type(engine), "tree_logits", counted)
    batch = exact_prompts(*[5] * 9, start=20)
    scheduled(Scheduler(engine), batch)
    assert rows == [9]
    monkeypatch.setattr(engine, "is_batch_invariant", False)
    rows.clear()
    scheduled(Scheduler(engine), batch)
    assert rows == []


def test_gradients_are_those_of_the_plain_computation(tmp_path):
    theirs, ours = both(tmp_path)
    batch = prompts(3, 6)
    target = torch.tensor([1, 4])
    F.cross_entropy(compute_label_scores(ours, batch), target).backward()
    F.cross_entropy(one_at_a_time(theirs, batch), target).backward()
    ours_grad = ours.layers[1].feed_forward.w2.weight.grad
    theirs_grad = theirs.model.layers[1].mlp.down_proj.weight.grad
    torch.testing.assert_close(ours_grad, theirs_grad, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_bfloat16_differences_between_labels_are_not_rounded_to_eighths():
    model = our_model(seed=2)
    model.tok_embeddings.weight.data *= 8  # logits in the tens, as those of real models
    exact = compute_label_scores(model, prompts(6, labels=((5,), (6,), (7,))))
    rounded = compute_label_scores(model.to(torch.bfloat16), prompts(6, labels=((5,), (6,), (7,))))
    assert rounded.dtype == torch.float32
    steps = rounded.unsqueeze(-1) - rounded.unsqueeze(-2)
    assert (steps * 16 != (steps * 16).round()).any()
    torch.testing.assert_close(rounded, exact, atol=1.5, rtol=0.05)
