"""What LoRA is multiplied by: heads on layers below the adapters and TF-IDF, or TF-IDF alone.

Adapters change what the layers above them compute. Heads on lower layers stay what they were fitted
to be, and one forward pass serves both.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from minllama.classification.frozen import Shallow
from minllama.classification.products import weighted_product
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
    if partner is None:
        return None
    others = partner.scores(context)
    both = np.flatnonzero(measured_rows(scores) & measured_rows(others))
    if not len(both):
        return None
    labels = [*(context.train.labels or ()), *(context.splits.dev.labels or ())]
    parts = {
        "rung": scores[both].astype(np.float64),
        "partner": others[both].astype(np.float64),
    }
    found = weighted_product(parts, np.asarray(cast(Sequence[int], labels))[both])
    product = context.empty_scores()
    product[both] = found.log_probs
    weights = found.weights
    return Multiplied(product, weights.get("rung", 0.0), weights.get("partner", 0.0))
