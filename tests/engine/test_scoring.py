"""Label scores are the chain rule, whatever the labels, the batch and the cache."""

import pytest
import torch
from torch.nn import functional as F

from minllama.engine.choose import engine_for
from minllama.engine.evaluation import MIN_SHARED_LEN
from minllama.engine.scheduler import Scheduler
from minllama.engine.scoring import ScoreRequest, compute_label_scores
from tests.tiny import both, our_model

LABELS = ((5,), (7, 9), (7, 9, 11), (7, 8, 3, 2), (1, 2, 3, 4, 5))


def prompts(*lengths, labels=LABELS, start=0):
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 61, (n,), generator=generator).tolist() for n in lengths]
    shared = list(range(start))
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
