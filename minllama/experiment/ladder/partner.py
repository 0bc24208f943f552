"""What LoRA is multiplied by: heads on layers below the adapters and TF-IDF, or TF-IDF alone.

Adapters change what the layers above them compute. Heads on lower layers stay what they were fitted
to be, and one forward pass serves both.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from minllama.classification.frozen import Shallow
from minllama.classification.products import spread, weighted_product
from minllama.experiment.ladder.candidate import save_candidate
from minllama.experiment.ladder.rung import Context
from minllama.experiment.ladder.scoring import Scores, measured_rows
from minllama.experiment.ladder.state import RungFolder
from minllama.experiment.ladder.tfidf import TfidfRung

SHALLOW = "shallow"  # the folder of the heads on lower layers


class Partner(NamedTuple):
    """A classifier that a rung can be multiplied by.

    Attributes:
        name: of its folder.
        n_layers: that it reads, and adapters leave as they are.
    """

    name: str
    n_layers: int

    def scores(self, context: Context) -> Scores:
        """(R, C)."""
        return RungFolder(context.folder / self.name).scores(context.empty_scores())


class Multiplied(NamedTuple):
    """The product of a rung and its partner.

    Attributes:
        scores: (R, C), of the rows on which both were measured.
        of_rung, of_partner: their weights, one of which may be zero.
    """

    scores: Scores
    of_rung: float
    of_partner: float


def keep_shallow(context: Context, shallow: Shallow, rows: NDArray[np.int64]) -> None:
    """Keep the heads on lower layers, and what they say of rows that they were not fitted to."""
    folder = RungFolder(context.folder / SHALLOW)
    scores = context.empty_scores()
    scores[rows] = shallow.log_probs
    context.measure_dev(shallow.classifier, scores)
    save_candidate(shallow.classifier, folder.classifier, context.experiment.tokenizer)
    folder.save_scores(scores)
    folder.save_plan({"layers": shallow.classifier.n_layers})


def partner_of(context: Context) -> Partner | None:
    """The heads on lower layers; without them TF-IDF; None without either."""
    if (plan := RungFolder(context.folder / SHALLOW).plan()) is not None:
        return Partner(SHALLOW, plan["layers"])
    words = context.results.get(TfidfRung.name)
    if words is None or words.size is None:
        return None
    return Partner(TfidfRung.name, 0)


def multiplied(context: Context, scores: Scores) -> Multiplied | None:
    """Multiply a rung by its partner, with the weights of least loss; None without a partner."""
    partner = partner_of(context)
    return None if partner is None else multiplied_by(context, scores, partner.scores(context))


def multiplied_by(
    context: Context, scores: Scores, others: Scores, *, share: float | None = None
) -> Multiplied | None:
    """Multiply a rung by others' scores; None if no row has both.

    Args:
        context: has the labels.
        scores, others: (R, C), of the rung and of its partner.
        share: of the rung, by logits of the same spread; then only a temperature is fitted. None
            for the weights of least loss.
    """
    both = np.flatnonzero(measured_rows(scores) & measured_rows(others))
    if not len(both):
        return None
    labels = [*(context.train.labels or ()), *(context.splits.dev.labels or ())]
    gold = np.asarray(cast(Sequence[int], labels))[both]
    of_rung, of_partner = (part[both].astype(np.float64) for part in (scores, others))
    if share is None:
        found = weighted_product({"rung": of_rung, "partner": of_partner}, gold)
        weights = found.weights.get("rung", 0.0), found.weights.get("partner", 0.0)
    else:
        units = share / spread(of_rung), (1 - share) / spread(of_partner)
        found = weighted_product({"rung": units[0] * of_rung + units[1] * of_partner}, gold)
        weights = found.weights["rung"] * units[0], found.weights["rung"] * units[1]
    log_probs = context.empty_scores()
    log_probs[both] = found.log_probs
    return Multiplied(log_probs, *weights)
