"""The rung that multiplies what LoRA learned with what TF-IDF knows; nothing is trained for it."""

from typing import cast

import torch

from minllama.classification import LlamaEmbeddingClassifier, LlamaExpertsClassifier
from minllama.classification.experts import scaled
from minllama.experiment.ladder.candidate import load_candidate
from minllama.experiment.ladder.lora import LoRARung, restore_base
from minllama.experiment.ladder.rung import Context, Measured, NotThisTime
from minllama.experiment.ladder.state import RungFolder
from minllama.experiment.ladder.tfidf import TfidfRung, with_words


class ProductRung:
    """The product of LoRA's head and TF-IDF, with weights of least loss on rows left out."""

    name, title = "lora-tfidf", "LoRA with a head, TF-IDF"

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
        trained = context.results.get(LoRARung.name)
        found = with_words(context, trained.scores) if trained and trained.size else None
        if trained is None or found is None:
            raise NotThisTime("it needs both, and there is no classifier of one")
        if not (found.of_rung and found.of_words):
            raise NotThisTime("one of the two adds nothing to the other")
        classifier = self._made(found.of_rung, found.of_words)
        speed = context.measure_dev(classifier, found.scores)
        seconds = context.budget.clock() - began
        how = "the same rows as LoRA; took: beyond the two"
        return Measured(found.scores, how, seconds, speed, classifier)

    def _made(self, of_lora: float, of_words: float) -> LlamaExpertsClassifier:
        """Both classifiers as one, on the adapters that are loaded for it."""
        context = self._context
        words = self._opened(TfidfRung.name)
        assert isinstance(words, LlamaExpertsClassifier)
        assert words.tfidf is not None
        restore_base(context.llama)
        trained = self._opened(LoRARung.name)
        assert isinstance(trained, LlamaEmbeddingClassifier)
        total = of_lora + of_words
        tfidf = scaled(words.tfidf, of_words / total / words.temperature)
        classifier = LlamaExpertsClassifier(
            *(context.llama, context.tokenizer, trained.labels, [(trained.layer, trained.pooling)]),
            tfidf=tfidf,
            prompt=trained.prompt,
        )
        classifier.temperature = 1 / total
        classifier.shortened |= context.reader.shortened
        share, head = of_lora / total, trained.score
        with torch.no_grad():
            classifier.score.weight.copy_(head.weight * share)
            if head.bias is not None:
                classifier.score.bias.copy_(head.bias * share)
        return classifier

    def _opened(self, name: str) -> LlamaEmbeddingClassifier | LlamaExpertsClassifier:
        context = self._context
        folder = RungFolder(context.folder / name).classifier
        opened = load_candidate(folder, context.llama, context.tokenizer)
        return cast(LlamaEmbeddingClassifier | LlamaExpertsClassifier, opened)
