"""Save and load a classifier's head, with the labels of its rows.

Also computes the digests by which `classifier.json` identifies the files beside it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minllama.atomic import sha256_of
from minllama.checkpoints.huggingface import read_safetensors
from minllama.classification.embedding import LlamaEmbeddingClassifier
from minllama.classification.storage.manifest import CLASSIFIER_FILE
from minllama.errors import CheckpointError

HEAD_FILE = "head.safetensors"


def write_head(folder: Path, classifier: LlamaEmbeddingClassifier) -> None:
    """Write the head."""
    from safetensors.torch import save

    score = classifier.score
    bias = torch.zeros(len(classifier.labels)) if score.bias is None else score.bias
    tensors = {"score.weight": _on_disk(score.weight), "score.bias": _on_disk(bias)}
    metadata = {"labels": json.dumps(list(classifier.labels))}
    (folder / HEAD_FILE).write_bytes(save(tensors, metadata))


def read_head(folder: Path, classifier: LlamaEmbeddingClassifier, digest: Any) -> None:
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
