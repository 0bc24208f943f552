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
    """What a model must be to be the same one, as classifier.json holds it.

    Attributes:
        weights: the digest of all its numbers.
        config: all that its checkpoint says of it.
        tokenizer: the digest of what makes ids of a text; None where it has none.
    """

    weights: str
    config: Mapping[str, Any]
    tokenizer: str | None

    def __post_init__(self) -> None:
        if not isinstance(self.config, Mapping):
            raise TypeError("the config of the base is not an object")


def identity_of(checkpoint: Checkpoint) -> Identity:
    """The identity of a checkpoint; all of its numbers are read."""
    return Identity(
        weights_digest(checkpoint),
        comparable_config(checkpoint.config),
        _tokenizer_of(checkpoint),
    )


def identity_of_source(llama: Llama, words: Tokenizer, tokenizer: str | None) -> Identity:
    """The identity of the checkpoint that a model came from, which is compared with the model.

    Args:
        llama: the model; adapters do not count.
        words: its tokenizer.
        tokenizer: the path that it was read from, where it is not the checkpoint's own.

    Raises:
        MinllamaError: there is no such checkpoint (any more), or it holds another model or another
            tokenizer.
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
    """The model of a checkpoint, which must be of that identity.

    Whatever form it is to have, what is stored is compared, so each is checked alike.

    Raises:
        CheckpointError: it is another model; all that differs is told.
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
