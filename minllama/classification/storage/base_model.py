"""Identify a classifier's base model, and open the same one or refuse another.

Loading and saving a classifier call it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minllama.checkpoints.load import load_with
from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.resolve import source_of
from minllama.checkpoints.state_dict import listed
from minllama.checkpoints.types import Checkpoint
from minllama.checkpoints.weight_format import WeightFormat
from minllama.classification.storage.fingerprint import (
    WeightsDigest,
    comparable_config,
    config_changes,
    tokenizer_digest,
    weights_digest,
    weights_digest_of_source,
)
from minllama.errors import CheckpointError, MinllamaError
from minllama.model.llama import Llama
from minllama.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Identity:
    """The fingerprint of a base model, as in classifier.json.

    Attributes:
        weights: digest of all weights.
        config: from its checkpoint.
        tokenizer: digest of the tokenizer; None without one.
    """

    weights: str
    config: Mapping[str, Any]
    tokenizer: str | None

    def __post_init__(self) -> None:
        if not isinstance(self.config, Mapping):
            raise TypeError("the config of the base is not an object")


def identity_of(checkpoint: Checkpoint) -> Identity:
    """The fingerprint of a checkpoint; reads all of its weights."""
    return Identity(
        weights_digest(checkpoint),
        comparable_config(checkpoint.config),
        _tokenizer_of(checkpoint),
    )


def identity_of_source(llama: Llama, words: Tokenizer, tokenizer: str | None) -> Identity:
    """The fingerprint of a model's checkpoint, after comparing it with the model.

    Args:
        llama: the model; adapters do not count.
        words: its tokenizer.
        tokenizer: its path, if it is not the checkpoint's own.

    Raises:
        MinllamaError: the checkpoint does not exist (any more), or has another model or tokenizer.
    """
    if llama.source is None:
        raise MinllamaError("it was made or merged in memory")
    checkpoint = open_checkpoint(source_of(llama.source), tokenizer=tokenizer).without_head()
    path, vocabulary = checkpoint.path, getattr(words, "vocabulary", None)
    stored = comparable_config(checkpoint.config)
    if changes := config_changes(stored, comparable_config(llama.config)):
        raise MinllamaError(f"it differs from the one in {path}: {listed(changes)}")
    of_words = None if vocabulary is None else tokenizer_digest(vocabulary)
    if of_words != _tokenizer_of(checkpoint):
        raise MinllamaError(f"its tokenizer differs from that of {tokenizer or path}")
    weights = weights_digest_of_source(llama, checkpoint)
    if weights is None:
        raise MinllamaError(f"its weights differ from those in {path}")
    return Identity(weights, stored, of_words)


def load_same(
    checkpoint: Checkpoint,
    expected: Identity,
    weights: WeightFormat,
    *,
    causal: bool,
) -> Llama:
    """Load a checkpoint's model, which must have that fingerprint.

    The stored weights are compared, whatever the weight format in use.

    Raises:
        CheckpointError: it is another model; the message lists the differences.
    """
    checkpoint = checkpoint.without_head()
    changes = config_changes(expected.config, comparable_config(checkpoint.config))
    if _tokenizer_of(checkpoint) != expected.tokenizer:
        changes.append("its tokenizer differs")
    if not changes:
        digest = WeightsDigest(checkpoint)
        llama = load_with(Llama, digest.checkpoint, weights, causal=causal)
        if digest.hexdigest() == expected.weights:
            return llama
        changes.append("its weights differ")
    raise CheckpointError(
        f"{checkpoint.path} is not the classifier's base model: {listed(changes)}; restore that "
        "model, or train the classifier again"
    )


def _tokenizer_of(checkpoint: Checkpoint) -> str | None:
    return None if checkpoint.vocabulary is None else tokenizer_digest(checkpoint.vocabulary)
