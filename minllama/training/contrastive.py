"""Contrastive tuning: vectors of a class are drawn together, those of different classes apart.

For a few rows a class, from which every pair of texts learns (as SetFit tunes sentence encoders:
Tunstall et al. 2022), with the supervised contrastive loss of Khosla et al. 2020. The ladder of
`--method auto` calls `tune`, which trains the adapters of a Llama; a head is fitted afterwards.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from minllama.engine.frozen_states import FrozenStates, n_frozen_layers, parts_of, states_fit
from minllama.engine.states import Choice, pooled_states
from minllama.model.inputs import padded
from minllama.model.llama import Llama
from minllama.model.mode import evaluating
from minllama.training.optimizer import AdamW
from minllama.training.run import MAX_TOKENS

STEPS = 20
WARM_UP = 3  # steps, after which the rate falls linearly
RATE = 1e-3
TEMPERATURE = 0.1  # Khosla et al. 2020, sec. 4.4
BATCH = 64  # texts; of more rows some classes, with as many texts each
MOST_CLASSES = 16  # of a batch, so that a class has at least four texts in it
MOST_NORM = 1.0  # of the gradient


def contrastive_loss(vectors: Tensor, classes: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """The supervised contrastive loss (Khosla et al. 2020, eq. 2), the mean over B texts.

    Args:
        vectors: (B, D), of any length; their directions count.
        classes: (B,), of the texts. A text that is alone in its class counts as zero.
        temperature: divides cosines.
    """
    directions = F.normalize(vectors, dim=-1)
    is_self = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    cosines = (directions @ directions.T).masked_fill(is_self, -torch.inf)
    log_probs = (cosines / temperature).log_softmax(-1).masked_fill(is_self, 0.0)
    is_same = (classes[:, None] == classes[None]) & ~is_self  # (B, B)
    n_same = is_same.sum(-1).clamp(min=1)
    return -((log_probs * is_same).sum(-1) / n_same).mean()


def tune(
    llama: Llama,
    prompts: Sequence[Sequence[int]],
    classes: NDArray[np.int64],
    choice: Choice,
    *,
    seed: int,
    progress: Callable[[int], None] = lambda step: None,
) -> None:
    """Train a Llama's adapters by the contrastive loss of pooled states.

    Args:
        llama: the parameters that require gradients are trained, without dropout.
        prompts: token ids of N texts.
        classes: (N,), theirs.
        choice: the layer and the pooling that vectors are of.
        seed: of the batches.
        progress: receives the number of steps done, after each; may raise to end the training.
    """
    parameters = [p for p in llama.parameters() if p.requires_grad]
    optimizer = AdamW(parameters, lr=RATE)
    random = np.random.default_rng(seed)
    with evaluating(llama):
        texts = _Texts(llama, prompts)
        for step in range(STEPS):
            rate = RATE * min(1.0, (step + 1) / WARM_UP) * (1 - step / STEPS)
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = _batch(classes, random)
            optimizer.zero_grad()
            _backward(texts, rows, classes[rows], choice)
            nn.utils.clip_grad_norm_(parameters, MOST_NORM)
            optimizer.step()
            progress(step + 1)


def _batch(classes: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
    """The rows of a step: all, or as many of some classes each."""
    if len(classes) <= BATCH:
        return np.arange(len(classes))
    names = np.unique(classes)
    some = random.permutation(names)[:MOST_CLASSES]
    each = BATCH // len(some)
    return np.concatenate([random.permutation(np.flatnonzero(classes == c))[:each] for c in some])


class _Texts:
    """The texts of a tuning, from where the first layer is trained.

    Args:
        llama: the model.
        prompts: token ids of N texts.
    """

    def __init__(self, llama: Llama, prompts: Sequence[Sequence[int]]) -> None:
        self.prompts, self.device, self._llama = prompts, llama.device, llama
        n_frozen, self._states = n_frozen_layers(llama), None
        if n_frozen and states_fit(llama, sum(map(len, prompts))):
            self._states = FrozenStates(llama, prompts, n_frozen)

    def parts(self, rows: Sequence[int]) -> list[Sequence[int]]:
        """Rows, those of the shortest texts first, in parts that are computed at once."""
        order = sorted(rows, key=lambda row: len(self.prompts[row]))
        n_layers = self._llama.config.n_layers
        n_run = n_layers - (0 if self._states is None else self._states.n_layers)
        most = MAX_TOKENS.get(self.device.type, math.inf) * (n_layers // max(1, n_run))
        lengths = [len(self.prompts[row]) for row in order]
        return [order[start:end] for start, end in parts_of(lengths, most)]

    def vectors(self, rows: Sequence[int], choice: Choice) -> Tensor:
        """(B, D) of texts, with gradients."""
        prompts = [self.prompts[row] for row in rows]
        start = None if self._states is None else self._states.start(prompts)
        return pooled_states(self._llama, *padded(prompts, self.device), *choice, start=start)


def _backward(
    texts: _Texts, rows: NDArray[np.int64], classes: NDArray[np.int64], choice: Choice
) -> None:
    """Add the gradients of the loss of some texts, whose classes are given.

    Every pair of texts counts, but few fit into memory with what their gradients need. So vectors
    are computed without, then the loss's gradients with respect to them, and a part of the texts at
    a time those of the parameters (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size
    under Memory Limited Setup", sec. 3.2).
    """
    parts = texts.parts(rows.tolist())
    of_row = dict(zip(rows.tolist(), classes.tolist(), strict=True))
    in_order = torch.tensor([of_row[row] for part in parts for row in part], device=texts.device)
    if len(parts) == 1:
        contrastive_loss(texts.vectors(parts[0], choice), in_order).backward()
        return
    with torch.no_grad():
        found = torch.cat([texts.vectors(part, choice) for part in parts])
    found.requires_grad_()
    (gradients,) = torch.autograd.grad(contrastive_loss(found, in_order), found)
    for part, gradient in zip(parts, gradients.split([len(part) for part in parts]), strict=True):
        texts.vectors(part, choice).backward(gradient)
