"""AdamW: adaptive moments with decoupled weight decay (Loshchilov & Hutter 2019)."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from minllama.errors import OptionError
from minllama.kernels.dispatch import accelerated


class AdamW(Optimizer):
    """Algorithm 2 of Loshchilov & Hutter 2019, with two changes.

    The bias correction is the efficient form at the end of section 2 of Kingma & Ba 2015: for step
    t, with moments m and v,

        step = lr * sqrt(1 - beta2^t) / (1 - beta1^t)
        p   -= step * m / (sqrt(v) + eps)

    so that eps is added to the uncorrected root, and corrected moments are not computed. Weight
    decay follows the update, multiplied by the learning rate:

        p   -= lr * weight_decay * p

    Parameters of one group, device and dtype are updated together, by one call for each line above
    instead of one for each parameter. Moments have their parameter's dtype.

    Args:
        params: parameters, or dictionaries of parameters and their own options (groups).
        lr: learning rate, >= 0.
        betas: decay of the first and of the second moment, each in [0, 1).
        eps: keeps the division finite, >= 0.
        weight_decay: >= 0; 0 for none.
        correct_bias: False leaves the correction away: step = lr.

    Raises:
        OptionError: an option is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with separate options; the class lists what is refused."""
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch's stub has two overloads for the same thing
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss and its gradients.

        Returns:
            The closure's loss, if there is one.

        Raises:
            OptionError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Checked before any update, so that a step is atomic.
        every = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        if any(p.grad is not None and p.grad.is_sparse for p in every):
            raise OptionError(
                "AdamW does not support sparse gradients; create the embedding with sparse=False"
            )
        for group in self.param_groups:
            batches: dict[tuple[Any, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                # A parameter that had no gradient for a while has taken fewer steps.
                batch_key = (parameter.device, parameter.dtype, parameter.grad.dtype, state["step"])
                batches.setdefault(batch_key, []).append(parameter)
            for (*_, step), parameters in batches.items():
                self._update(parameters, step, group)
        return loss

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        exp_avgs = [self.state[p]["exp_avg"] for p in parameters]
        exp_avg_sqs = [self.state[p]["exp_avg_sq"] for p in parameters]

        step_size = lr
        if group["correct_bias"]:
            step_size *= (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        shrink = 1 - lr * group["weight_decay"]
        adamw_update(
            parameters,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            group["betas"],
            group["eps"],
            step_size,
            shrink,
        )


@accelerated
def adamw_update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    betas: tuple[float, float],
    eps: float,
    step_size: float,
    shrink: float,
) -> None:
    """One step of `AdamW` in place, for parameters with the same step count.

    Args:
        parameters, gradients, exp_avgs, exp_avg_sqs: as many of each.
        betas, eps: of the moments and the denominator.
        step_size: of the update, with the bias correction in it.
        shrink: factor on the parameters after it: 1 - lr * weight_decay.
    """
    beta1, beta2 = betas
    torch._foreach_lerp_(exp_avgs, gradients, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - beta2)

    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(parameters, exp_avgs, denominators, -step_size)
    if shrink != 1:
        torch._foreach_mul_(parameters, shrink)


def _check_options(options: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not options[name] >= 0:
            raise OptionError(f"{name} must be >= 0, not {options[name]!r}")
    betas = options["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise OptionError(f"betas must be two numbers in [0, 1), not {betas!r}")
