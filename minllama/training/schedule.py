"""The schedule of a training: texts, learning rate and evaluations of each step.

Everything is a function of the seed and the step, so a resumed run needs only its step.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch

from minllama.data.rows import zeros
from minllama.options import TrainingOptions
from minllama.options.training import EPOCHS

WINDOW = 50  # number of steps whose texts are sorted by length together
MIN_WINDOWS = 4  # of an epoch: with one, the same texts would always meet


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """A separate seed for each purpose and number, 0 to 2**63 - 1."""
    digest = hashlib.blake2b(f"{seed} {purpose} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Schedule:
    """The steps of a run.

    A step has `batch_size * gradient_accumulation` texts, in one or several batches. The last step
    of an epoch may have fewer.

    Args:
        lengths: of the N training texts, in tokens.
        options: batch size, epochs, learning rate's course, seed.
        max_tokens: the most padded tokens that are computed at once, unless one text has more.

    Attributes:
        steps_per_epoch: there are `epochs` of these.
        total_steps: of the run.
        eval_steps: after which steps of an epoch (1 to steps_per_epoch) to evaluate.
    """

    def __init__(
        self, lengths: Sequence[int], options: TrainingOptions, max_tokens: float = math.inf
    ) -> None:
        self._lengths = np.asarray(lengths)
        self._options = options
        self._max_tokens = max_tokens
        self.step_size = options.batch_size * options.gradient_accumulation
        self.steps_per_epoch = math.ceil(len(lengths) / self.step_size)
        self.total_steps = self.steps_per_epoch * (options.epochs or EPOCHS)
        evals = min(options.evals_per_epoch, self.steps_per_epoch)
        self.eval_steps = {math.ceil(self.steps_per_epoch * (i + 1) / evals) for i in range(evals)}
        self._epoch = -1
        self._order = np.asarray(zeros("q", len(lengths)))
        self._steps = np.empty(0, dtype=np.int64)

    def texts(self, step: int) -> list[int]:
        """The texts of a step.

        Args:
            step: 1 to total_steps.
        """
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        if epoch != self._epoch:
            self._begin(epoch)
        start = int(self._steps[place]) * self.step_size
        texts: list[int] = self._order[start : start + self.step_size].tolist()
        return texts

    def batches(self, step: int) -> list[list[int]]:
        """The texts of a step in batches, longest first."""
        (batches,) = self.shares(step, 1)
        return batches

    def shares(self, step: int, size: int) -> list[list[list[int]]]:
        """The batches of a step for each of `size` processes; as many for each, some empty.

        Every batch is divided in turn, so that all get long and short texts.
        """
        texts, of_batch = self.texts(step), self._options.batch_size
        batches = [texts[start : start + of_batch] for start in range(0, len(texts), of_batch)]
        shares = [
            [part for batch in batches for part in self._parts(batch[rank::size])]
            for rank in range(size)
        ]
        most = max(map(len, shares))
        return [share + [[]] * (most - len(share)) for share in shares]

    def _parts(self, texts: list[int]) -> list[list[int]]:
        """Split into as few batches as possible, of similar size, since small ones are slow."""
        parts = self._filled(texts, self._max_tokens)
        for tenths in range(9, 0, -1) if len(parts) > 1 else ():
            evener = self._filled(texts, self._max_tokens * tenths / 10)
            if len(evener) > len(parts):
                break
            parts = evener
        return parts

    def _filled(self, texts: list[int], max_tokens: float) -> list[list[int]]:
        """Split texts, longest first, into parts with a maximum number of padded tokens."""
        parts: list[list[int]] = []
        for text in texts:
            if not parts or (len(parts[-1]) + 1) * self._lengths[parts[-1][0]] > max_tokens:
                parts.append([])
            parts[-1].append(text)
        return parts

    def evaluates_after(self, step: int) -> bool:
        """Whether the dev split is due after this step."""
        return (step - 1) % self.steps_per_epoch + 1 in self.eval_steps

    def lr_factor(self, step: int) -> float:
        """The learning rate of a step as a share of the highest, in (0, 1].

        It rises in equal steps, is highest right after the warm-up, and would be zero (if it falls)
        one step after the last: no step is without effect.
        """
        total = self.total_steps
        warmup, before = round(self._options.warmup * total), step - 1
        if before < warmup:
            return step / (warmup + 1)
        done = (before - warmup) / (total - warmup)
        if self._options.schedule == "linear":
            return 1 - done
        if self._options.schedule == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        return 1.0

    def _begin(self, epoch: int) -> None:
        """Order the texts of an epoch: steps of similar length, to reduce padding, at random."""
        generator = torch.Generator().manual_seed(derived_seed(self._options.seed, "order", epoch))
        order = self._order
        torch.randperm(len(order), generator=generator, out=torch.from_numpy(order))
        window = self.step_size * max(1, min(WINDOW, self.steps_per_epoch // MIN_WINDOWS))
        for start in range(0, len(order), window):
            part = order[start : start + window]
            # A stable sort: texts of equal length stay shuffled.
            order[start : start + window] = part[np.argsort(-self._lengths[part], kind="stable")]
        self._epoch = epoch
        self._steps = torch.randperm(self.steps_per_epoch, generator=generator).numpy()
