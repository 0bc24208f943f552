"""Save and load a classifier's head, with the labels of its rows, and its TF-IDF.

Also computes the digests by which `classifier.json` identifies the files beside it.
"""

import json
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from minllama.atomic import sha256_of
from minllama.checkpoints.huggingface import read_safetensors
from minllama.classification.embedding import LlamaEmbeddingClassifier
from minllama.classification.experts import LlamaExpertsClassifier
from minllama.classification.storage.manifest import CLASSIFIER_FILE
from minllama.errors import CheckpointError
from minllama.evaluation.tfidf import TfidfModel, Vocabulary
from minllama.text import read_json

HEAD_FILE = "head.safetensors"
VOCABULARY_FILE = "vocabulary.json"  # the terms of TF-IDF, in the order of its weights
# Far more than the most terms that TF-IDF keeps, words of unspaced scripts as long as sentences.
MAX_VOCABULARY_BYTES = 2**29
MAX_VOCABULARY_ENTRIES = 2**22  # counted by commas and brackets, which terms have, too
NOT_FINITE = "has NaN or infinite values; restore the original file"

WithHead: TypeAlias = LlamaEmbeddingClassifier | LlamaExpertsClassifier


def write_head(folder: Path, classifier: WithHead) -> None:
    """Write the head, and TF-IDF's terms and weights if it has some."""
    from safetensors.torch import save

    score = classifier.score
    bias = torch.zeros(len(classifier.labels)) if score.bias is None else score.bias
    tensors = {"score.weight": _on_disk(score.weight), "score.bias": _on_disk(bias)}
    if isinstance(classifier, LlamaExpertsClassifier) and classifier.tfidf is not None:
        model = classifier.tfidf
        terms = sorted(model.vocabulary.index, key=model.vocabulary.index.__getitem__)
        text = json.dumps(terms, ensure_ascii=True)
        (folder / VOCABULARY_FILE).write_text(text + "\n", encoding="utf-8")
        # Its values were rounded so when they were fitted.
        tensors["tfidf.weight"] = torch.from_numpy(model.weight).half()
        tensors["tfidf.bias"] = torch.from_numpy(model.bias)
        tensors["tfidf.idf"] = torch.from_numpy(model.vocabulary.idf)
    metadata = {"labels": json.dumps(list(classifier.labels))}
    (folder / HEAD_FILE).write_bytes(save(tensors, metadata))


def read_tfidf(folder: Path, n_labels: int, digest: Any) -> TfidfModel:
    """Load the saved TF-IDF of a head whose own digest `read_head` checks.

    Raises:
        CheckpointError: a file is missing, changed, or does not fit the other.
    """
    path = folder / VOCABULARY_FILE
    check_digest(path, digest)
    try:
        terms = read_json(path, max_bytes=MAX_VOCABULARY_BYTES, max_entries=MAX_VOCABULARY_ENTRIES)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); restore it") from error
    if not isinstance(terms, list) or not all(isinstance(term, str) for term in terms):
        raise CheckpointError(f"{path}: not a list of terms; restore the original file")
    index = {term: column for column, term in enumerate(terms)}
    if len(index) < len(terms):
        raise CheckpointError(f"{path}: a duplicate term; restore the original file")
    stored = dict(read_safetensors(folder / HEAD_FILE))
    shapes = {"weight": (len(terms), n_labels), "bias": (n_labels,), "idf": (len(terms),)}
    tensors: dict[str, Any] = {}
    for name, shape in shapes.items():
        lazy = stored.get(f"tfidf.{name}")
        if lazy is None or lazy.shape != shape:
            raise CheckpointError(
                f"{folder / HEAD_FILE}: tfidf.{name} must be of shape {shape}, not "
                f"{None if lazy is None else lazy.shape}; restore the original file"
            )
        tensors[name] = np.asarray(lazy.load().float().numpy(), dtype=np.float32)
        if not np.isfinite(tensors[name]).all():
            raise CheckpointError(f"{folder / HEAD_FILE}: tfidf.{name} {NOT_FINITE}")
    vocabulary = Vocabulary(index, tensors["idf"])
    return TfidfModel(vocabulary, tensors["weight"], tensors["bias"])


def read_head(folder: Path, classifier: WithHead, digest: Any) -> None:
    """Load the saved head into the classifier.

    Raises:
        CheckpointError: the file is missing, changed, or for other labels.
    """
    from safetensors import safe_open

    path = folder / HEAD_FILE
    check_digest(path, digest)
    stored = dict(read_safetensors(path))
    with safe_open(path, "pt") as file:
        names = (file.metadata() or {}).get("labels")
    if names != json.dumps(list(classifier.labels)):
        raise CheckpointError(
            f"{path}: its rows are for the labels {names}, but {CLASSIFIER_FILE} has "
            f"{json.dumps(list(classifier.labels))}; restore the original files"
        )
    for name, parameter in classifier.score.named_parameters():
        lazy = stored.get(f"score.{name}")
        if lazy is None or lazy.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{path}: score.{name} must be of shape {tuple(parameter.shape)}, not "
                f"{None if lazy is None else lazy.shape}; restore the original file"
            )
        parameter.data.copy_(lazy.load())
        if not parameter.isfinite().all():
            raise CheckpointError(f"{path}: score.{name} {NOT_FINITE}")


def check_digest(path: Path, digest: Any) -> None:
    """Raise CheckpointError if a file is missing, or has another SHA-256."""
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing; restore the original folder")
    if sha256_of(path) != digest:
        raise CheckpointError(
            f"{path}: was not saved with {CLASSIFIER_FILE} (its SHA-256 differs); restore the "
            "original folder"
        )


def _on_disk(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous()
