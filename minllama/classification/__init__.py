"""Classifiers over a Llama: by the likelihood of label words, or by heads on its hidden states.

`base` is what both share; `label_scores` computes likelihoods, `features` and `calibration` fit
what needs no gradient, `files` keeps a classifier in a folder with its `card`, `identity`
tells whether the base is the same.
"""

from minllama.classification.base import Classifier
from minllama.classification.embedding import LlamaEmbeddingClassifier
from minllama.classification.experts import LlamaExpertsClassifier
from minllama.classification.storage.save_load import load_classifier, save_classifier
from minllama.classification.zero_shot import LlamaZeroShotClassifier

__all__ = [
    "Classifier",
    "LlamaEmbeddingClassifier",
    "LlamaExpertsClassifier",
    "LlamaZeroShotClassifier",
    "load_classifier",
    "save_classifier",
]
