"""AdamW against literal numbers, a step-by-step computation, and torch's own."""

import copy
import math

import pytest
import torch
from torch import nn

from minllama.errors import OptionError
from minllama.training.optimizer import AdamW


def test_the_first_two_steps_are_these_numbers():
    # p = 1, gradients 0.5 and then -0.25, lr 0.1, betas 0.9 and 0.99, eps 0.01, decay 0.1.
    parameter = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = AdamW([parameter], lr=0.1, betas=(0.9, 0.99), eps=0.01, weight_decay=0.1)
    # m = 0.05, v = 0.0025, step = 0.1 * 0.1 / 0.1 = 0.1
    # p = 1 - 0.1 * 0.05 / (0.05 + 0.01) = 0.91666667; p -= 0.1 * 0.1 * p = 0.9075
    parameter.grad = torch.tensor([0.5], dtype=torch.float64)
    optimizer.step()
    assert parameter.item() == pytest.approx(0.9075, abs=1e-12)
    # m = 0.9 * 0.05 - 0.1 * 0.25 = 0.02, v = 0.99 * 0.0025 + 0.01 * 0.0625 = 0.0031
    # step = 0.1 * sqrt(1 - 0.9801) / (1 - 0.81) = 0.0742457
    parameter.grad = torch.tensor([-0.25], dtype=torch.float64)
    optimizer.step()
    step = 0.1 * math.sqrt(0.0199) / 0.19
    moved = 0.9075 - step * 0.02 / (math.sqrt(0.0031) + 0.01)
    assert parameter.item() == pytest.approx(0.99 * moved, abs=1e-12)


def plain_steps(start, gradients, *, lr, betas, eps, weight_decay, correct_bias):
    """The formulas, one number at a time."""
    p, m, v = list(start), [0.0] * len(start), [0.0] * len(start)
    for t, gradient in enumerate(gradients, start=1):
        step = lr
        if correct_bias:
            step = lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        for i, g in enumerate(gradient):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g * g
            p[i] -= step * m[i] / (math.sqrt(v[i]) + eps)
            p[i] -= lr * weight_decay * p[i]
    return p


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_many_steps_equal_the_formulas(correct_bias, weight_decay):
    torch.manual_seed(0)
    start, gradients = torch.randn(6).double(), torch.randn(20, 6).double()
    options = {
        "lr": 0.02,
        "betas": (0.8, 0.95),
        "eps": 1e-3,
        "weight_decay": weight_decay,
        "correct_bias": correct_bias,
    }
    # In two parameters of different shapes: they are updated together.
    parameters = [nn.Parameter(start[:2].clone()), nn.Parameter(start[2:].reshape(2, 2).clone())]
    optimizer = AdamW(parameters, **options)
    for gradient in gradients:
        parameters[0].grad, parameters[1].grad = gradient[:2], gradient[2:].reshape(2, 2)
        optimizer.step()
    expected = plain_steps(start.tolist(), gradients.tolist(), **options)
    found = torch.cat([p.detach().flatten() for p in parameters]).tolist()
    assert found == pytest.approx(expected, abs=1e-12)


def test_with_the_two_changes_undone_it_is_torchs():
    # Torch divides by sqrt(v / (1 - beta2^t)) + eps: ours with eps * sqrt(1 - beta2^t) in step t.
    # Torch decays before the update: p (1 - lr wd) - u; ours decays p - u. So decay by hand.
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    theirs, x = copy.deepcopy(model), torch.randn(4, 5).double()
    lr, weight_decay, betas, eps = 0.01, 0.2, (0.9, 0.98), 1e-3
    optimizer = AdamW(model.parameters(), lr=lr, betas=betas)
    reference = torch.optim.AdamW(
        theirs.parameters(), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
    )
    for t in range(1, 31):
        for module, stepper in ((model, optimizer), (theirs, reference)):
            stepper.zero_grad()
            module(x).square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 - lr * weight_decay)
        optimizer.param_groups[0]["eps"] = eps * math.sqrt(1 - betas[1] ** t)
        optimizer.step()
        reference.step()
    for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, other, atol=1e-12, rtol=0)


def test_groups_have_options_of_their_own():
    fast, still = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdamW([{"params": [fast], "lr": 0.5}, {"params": [still], "lr": 0.0}])
    fast.grad = still.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(fast, torch.full((2,), 0.5), atol=1e-4, rtol=0)
    assert torch.equal(still, torch.ones(2))


def test_a_parameter_without_gradient_is_left_alone_and_counts_its_own_steps():
    torch.manual_seed(2)
    late, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamW([late, other], lr=0.1)
    other.grad = torch.randn(3)
    optimizer.step()
    assert torch.equal(late, torch.ones(3))
    assert late not in optimizer.state
    late.grad = torch.tensor([1.0, -2.0, 3.0])
    optimizer.step()
    alone = nn.Parameter(torch.ones(3))
    alone.grad = late.grad.clone()
    AdamW([alone], lr=0.1).step()
    assert torch.equal(late, alone)


def test_a_loaded_state_goes_on_as_if_never_saved(tmp_path):
    torch.manual_seed(3)
    gradients = torch.randn(8, 4)

    def steps(parameter, optimizer, chosen):
        for gradient in chosen:
            parameter.grad = gradient.clone()
            optimizer.step()

    whole = nn.Parameter(torch.ones(4))
    steps(whole, AdamW([whole], lr=0.1, weight_decay=0.1), gradients)
    first = nn.Parameter(torch.ones(4))
    optimizer = AdamW([first], lr=0.1, weight_decay=0.1)
    steps(first, optimizer, gradients[:5])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    second = nn.Parameter(first.detach().clone())
    resumed = AdamW([second], lr=9.0)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(second, resumed, gradients[5:])
    assert torch.equal(second, whole)


def test_a_closure_computes_the_loss_with_gradients():
    parameter = nn.Parameter(torch.tensor([3.0]))
    optimizer = AdamW([parameter], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert parameter.item() == pytest.approx(2.9, abs=1e-4)


def test_torchs_schedulers_move_its_learning_rate():
    parameter = nn.Parameter(torch.ones(1))
    optimizer = AdamW([parameter], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for _ in range(3):
        parameter.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = AdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(OptionError, match="does not support sparse gradients; create"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0, not -1.0"),
        ({"lr": math.nan}, "lr must be >= 0, not nan"),
        ({"eps": -1e-9}, "eps must be >= 0"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, r"betas must be two numbers in \[0, 1\)"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(OptionError, match=message):
        AdamW([parameter], **options)
    with pytest.raises(OptionError, match=message):
        AdamW([{"params": [parameter], **options}])


def test_a_sparse_gradient_is_refused_before_anything_is_updated():
    dense, sparse = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    dense.grad, sparse.grad = torch.ones(3), torch.ones(3).to_sparse()
    optimizer = AdamW([{"params": [dense]}, {"params": [sparse]}])
    with pytest.raises(OptionError, match="sparse"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3))
    assert not optimizer.state
