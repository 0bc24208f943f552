"""What the frozen first layers of a model make of texts, computed once for all of a training.

Where adapters begin above some layers, those below give a text the same states in every epoch, and
in every other training on the same base. Training begins there.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from minllama.engine.packing import hidden_states
from minllama.model.inputs import padded
from minllama.model.llama import Llama
from minllama.model.mode import evaluating

MOST_BYTES = 2**28  # that are kept
# Of a pass, padding included, unless one text has more.
TOKENS, TOKENS_ON_CPU = 2**14, 768


def n_frozen_layers(llama: Llama) -> int:
    """How many of the first layers, with the embeddings below them, are not trained."""
    if any(p.requires_grad for p in llama.tok_embeddings.parameters()):
        return 0
    is_trained = [any(p.requires_grad for p in layer.parameters()) for layer in llama.layers]
    return is_trained.index(True) if True in is_trained else len(is_trained)


def states_fit(llama: Llama, n_tokens: float) -> bool:
    """Whether states of so many tokens are few enough to be kept."""
    return n_tokens * llama.config.dim * llama.dtype.itemsize <= MOST_BYTES


class FrozenStates:
    """The states of texts after some layers, which must stay as they are.

    They are computed as in training, in passes that depend on the texts alone: a resumed run has
    the same numbers.

    Args:
        llama: the model.
        prompts: token ids of the texts.
        n_layers: how many layers, 1 or more.
    """

    def __init__(self, llama: Llama, prompts: Sequence[Sequence[int]], n_layers: int) -> None:
        self.n_layers = n_layers
        self._states: dict[tuple[int, ...], Tensor] = {}  # (T, D)
        texts = sorted({tuple(ids) for ids in prompts}, key=lambda ids: (len(ids), ids))
        with evaluating(llama), torch.enable_grad():  # other dtypes are for passes without
            most = TOKENS_ON_CPU if llama.device.type == "cpu" else TOKENS
            for start, end in parts_of([len(text) for text in texts], most):
                part = texts[start:end]
                ids, mask = padded(part, llama.device)
                found = hidden_states(llama, n_layers, ids, mask).detach()
                for text, state in zip(part, found, strict=True):
                    self._states[text] = state[: len(text)].clone()

    def start(self, prompts: Sequence[Sequence[int]]) -> tuple[int, Tensor] | None:
        """Where a pass of B texts begins: a number of layers, and (B, T, D) padded on the right.

        None if one of the texts is not known.
        """
        known = [self._states.get(tuple(ids)) for ids in prompts]
        states = [state for state in known if state is not None]
        if len(states) < len(known):
            return None
        return self.n_layers, nn.utils.rnn.pad_sequence(states, batch_first=True)


def parts_of(lengths: Sequence[int], most: float) -> list[tuple[int, int]]:
    """Begin and end of parts of texts, of at most so many padded tokens, or of one text.

    Args:
        lengths: of the texts, in ascending order; at least one.
        most: tokens of a part.
    """
    starts = [0]
    for end, length in enumerate(lengths):
        if end > starts[-1] and length * (end + 1 - starts[-1]) > most:
            starts.append(end)
    return list(pairwise([*starts, len(lengths)]))
