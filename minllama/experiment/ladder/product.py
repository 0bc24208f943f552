"""The rung that multiplies LoRA's head with heads on lower layers and TF-IDF; both are fitted."""

from typing import cast

import torch

from minllama.classification import LlamaEmbeddingClassifier, LlamaExpertsClassifier
from minllama.classification.experts import scaled
from minllama.experiment.ladder.candidate import load_candidate
from minllama.experiment.ladder.lora import LoRARung, restore_base
from minllama.experiment.ladder.partner import Partner, multiplied, partner_of
from minllama.experiment.ladder.rung import Context, Measured, NotThisTime
from minllama.experiment.ladder.state import RungFolder
from minllama.experiment.ladder.tfidf import TfidfRung


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

    def _made(self, partner: Partner, of_lora: float, of_partner: float) -> LlamaExpertsClassifier:
        """Both classifiers as one, on the adapters that are loaded for it."""
        context = self._context
        lower = self._opened(partner.name)
        assert isinstance(lower, LlamaExpertsClassifier)
        restore_base(context.llama)
        trained = self._opened(LoRARung.name)
        assert isinstance(trained, LlamaEmbeddingClassifier)
        total = of_lora + of_partner
        of_heads, of_trained = of_partner / total / lower.temperature, of_lora / total
        choices = [*lower.choices, (trained.layer, trained.pooling)]
        classifier = LlamaExpertsClassifier(
            *(context.llama, context.tokenizer, trained.labels, choices),
            tfidf=None if lower.tfidf is None else scaled(lower.tfidf, of_heads),
            prompt=trained.prompt,
        )
        classifier.temperature = 1 / total
        classifier.shortened |= context.reader.shortened
        weights = [trained.score.weight * of_trained]
        if lower.choices:
            weights.insert(0, lower.score.weight * of_heads)
        with torch.no_grad():
            classifier.score.weight.copy_(torch.cat(weights, 1))
            if lower.choices:
                classifier.score.bias.add_(lower.score.bias * of_heads)
            if trained.score.bias is not None:
                classifier.score.bias.add_(trained.score.bias * of_trained)
        return classifier

    def _opened(self, name: str) -> LlamaEmbeddingClassifier | LlamaExpertsClassifier:
        context = self._context
        folder = RungFolder(context.folder / name).classifier
        opened = load_candidate(folder, context.llama, context.tokenizer)
        return cast(LlamaEmbeddingClassifier | LlamaExpertsClassifier, opened)
