"""Classifiers of each kind on one tiny base, saved as if they had been trained."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from minllama.classification import (
    LlamaEmbeddingClassifier,
    LlamaExpertsClassifier,
    LlamaZeroShotClassifier,
)
from minllama.classification.base import Classifier
from minllama.evaluation.regression import TargetScale
from minllama.evaluation.tfidf import TfidfModel, Vocabulary
from minllama.model.llama import Llama
from minllama.options import PromptOptions
from minllama.tokenizer.tokenizer import Tokenizer

LABELS = ("bad", "good", "so-so")
TERMS = ("fine", "a fine", "film", "dull", "mess", "# on ", "#dra", "#fil", "what a")
DEV = {"evaluation": {"count": 40, "calibration_error": 0.07}}
TEST = {"evaluation": {"count": 60, "calibration_error": 0.09}}


def experts(base: Path, terms: Sequence[str] = TERMS) -> LlamaExpertsClassifier:
    """Heads on both layers, and TF-IDF, with weights by chance."""
    llama = Llama.from_pretrained(base, device="cpu", dtype="float32")
    random = np.random.default_rng(3)
    weight = random.normal(size=(len(terms), len(LABELS))).astype(np.float16).astype(np.float32)
    vocabulary = Vocabulary(
        {term: column for column, term in enumerate(terms)}, np.ones(len(terms), dtype=np.float32)
    )
    classifier = LlamaExpertsClassifier(
        *(llama, Tokenizer.from_pretrained(base), LABELS, [(1, "mean"), (2, "last")]),
        tfidf=TfidfModel(vocabulary, weight, np.zeros(len(LABELS), dtype=np.float32)),
        prompt="Review: {text}\nIt was",
    )
    generator = torch.Generator().manual_seed(7)
    classifier.score.weight.data.normal_(std=1.0, generator=generator)
    classifier.temperature = 1.3
    return classifier.eval()


def write_heads(folder: Path, base: Path) -> dict[str, Path]:
    """Folders of a classifier of each kind: heads, label words, experts."""
    llama = Llama.from_pretrained(base, device="cpu", dtype="float32")
    words = Tokenizer.from_pretrained(base)
    torch.manual_seed(5)
    frame = PromptOptions(prompt="Review: {text}\nIt was", max_len=24)
    two = LlamaEmbeddingClassifier(llama, words, LABELS[:2], prompt=frame, bias=True)
    two.threshold = 0.9
    kinds: dict[str, Classifier] = {
        "head": LlamaEmbeddingClassifier(llama, words, LABELS, "mean", layer=1, bias=True),
        "two": two,
        "many": LlamaEmbeddingClassifier(llama, words, LABELS, multi_label=True, bias=True),
        "numbers": LlamaEmbeddingClassifier(
            llama, words, ["stars"], bias=True, scale=TargetScale(3.0, 1.5)
        ),
        "words": LlamaZeroShotClassifier(llama, words, LABELS, score="contextual"),
        "experts": experts(base),
    }
    for name, classifier in kinds.items():
        if isinstance(classifier, LlamaEmbeddingClassifier):
            classifier.score.weight.data.normal_(std=1.0)
        if name == "head":
            classifier.temperature = 1.7
        if isinstance(classifier, LlamaZeroShotClassifier):
            classifier.fit_prior()
        classifier.save_pretrained(folder / name)
    metrics = {"splits": {"dev": DEV, "test": TEST}}
    (folder / "head" / "metrics.json").write_text(json.dumps(metrics))
    return {name: folder / name for name in kinds}
