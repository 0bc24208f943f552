"""The rung that multiplies LoRA's head with heads on lower layers and TF-IDF; both are fitted."""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from minllama.classification import LlamaEmbeddingClassifier, LlamaExpertsClassifier
from minllama.classification.experts import scaled
from minllama.engine.states import Choice
from minllama.experiment.ladder.candidate import load_candidate
from minllama.experiment.ladder.lora import LoRARung, restore_base
from minllama.experiment.ladder.partner import Partner, multiplied, partner_of
from minllama.experiment.ladder.rung import Context, Measured, NotThisTime
from minllama.experiment.ladder.state import RungFolder
from minllama.experiment.ladder.tfidf import TfidfRung


class TrainedHead(NamedTuple):
    """A head on adapters: weight (C, D), bias (C,) or None, and what it reads."""

    weight: Tensor
    bias: Tensor | None
    choice: Choice


def product_of(
    context: Context,
    frozen: LlamaExpertsClassifier,
    trained: TrainedHead,
    of_frozen: float,
    of_trained: float,
    *,
    is_unchanged: bool,
) -> LlamaExpertsClassifier:
    """A frozen classifier and a head on adapters as one classifier, on the adapters.

    Args:
        context: its model has the adapters.
        frozen: fitted to the base.
        trained: the head.
        of_frozen, of_trained: what calibrated logits are multiplied by.
        is_unchanged: the layers that the frozen heads read have no adapters, so that one forward
            pass serves both.
    """
    total = of_frozen + of_trained
    of_heads, of_own = of_frozen / total / frozen.temperature, of_trained / total
    shared = frozen.choices if is_unchanged else ()
    classifier = LlamaExpertsClassifier(
        *(context.llama, context.tokenizer, frozen.labels, [*shared, trained.choice]),
        base_choices=() if is_unchanged else frozen.choices,
        tfidf=None if frozen.tfidf is None else scaled(frozen.tfidf, of_heads),
        prompt=frozen.prompt,
    )
    classifier.temperature = 1 / total
    classifier.shortened |= context.reader.shortened
    weights = [trained.weight * of_own]
    if frozen.choices:
        weights.insert(0, frozen.score.weight * of_heads)
    with torch.no_grad():
        classifier.score.weight.copy_(torch.cat(weights, 1))
        if frozen.choices:
            classifier.score.bias.add_(frozen.score.bias * of_heads)
        if trained.bias is not None:
            classifier.score.bias.add_(trained.bias * of_own)
    return classifier


class ProductRung:
    """The product of LoRA's head and its partner, with weights of least loss on rows left out."""

    name, title = "product", "LoRA and frozen heads"

    def __init__(self, context: Context) -> None:
        self._context = context

    def obstacle(self) -> str | None:
        return TfidfRung(self._context).obstacle()

    def estimate(self) -> float:
        """Of dev, which its classifier reads; all else is there."""
        context = self._context
        return context.n_tokens(context.splits.dev) * context.seconds_per_token

    def plan(self) -> str:
        return "a few seconds, after the two"

    def run(self) -> Measured:
        context, began = self._context, self._context.budget.clock()
        trained, partner = context.results.get(LoRARung.name), partner_of(context)
        if trained is None or trained.size is None or partner is None:
            raise NotThisTime("it needs both, and there is no classifier of one")
        found = multiplied(context, trained.scores)
        if found is None or not (found.of_rung and found.of_partner):
            raise NotThisTime("one of the two adds nothing to the other")
        classifier = self._made(partner, found.of_rung, found.of_partner)
        speed = context.measure_dev(classifier, found.scores)
        seconds = context.budget.clock() - began
        how = "the same rows as LoRA; took: beyond the two"
        return Measured(found.scores, how, seconds, speed, classifier)

    def refitted(self, known: "ProductRung") -> LlamaExpertsClassifier:
        """The product of this rung's ladder.

        Args:
            known: this rung of another ladder, which has run; its weights are taken.
        """
        context, partner = known._context, partner_of(self._context)
        found = multiplied(context, context.results[LoRARung.name].scores)
        assert found is not None
        assert partner is not None
        return self._made(partner, found.of_rung, found.of_partner)

    def _made(self, partner: Partner, of_lora: float, of_partner: float) -> LlamaExpertsClassifier:
        """Both classifiers as one, on the adapters that are loaded for it."""
        context = self._context
        lower = self._opened(partner.name)
        assert isinstance(lower, LlamaExpertsClassifier)
        restore_base(context.llama)
        trained = self._opened(LoRARung.name)
        assert isinstance(trained, LlamaEmbeddingClassifier)
        head = TrainedHead(
            trained.score.weight, trained.score.bias, (trained.layer, trained.pooling)
        )
        return product_of(context, lower, head, of_partner, of_lora, is_unchanged=True)

    def _opened(self, name: str) -> LlamaEmbeddingClassifier | LlamaExpertsClassifier:
        context = self._context
        folder = RungFolder(context.folder / name).classifier
        opened = load_candidate(folder, context.llama, context.tokenizer)
        return cast(LlamaEmbeddingClassifier | LlamaExpertsClassifier, opened)
