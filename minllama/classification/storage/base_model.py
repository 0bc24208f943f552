"""Identify a classifier's base model, and open the same one or refuse another.

Loading and saving a classifier call it.
"""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
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


class BaseModels:
    """Base models that are read once, for all adapters and classifiers that stand on them."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, WeightFormat], tuple[Llama, str]] = {}
        self._causal: dict[tuple[str, WeightFormat, bool], Llama] = {}

    def load(
        self,
        checkpoint: Checkpoint,
        weights: WeightFormat,
        *,
        causal: bool | None = None,
        to_change: bool = False,
    ) -> tuple[Llama, str]:
        """A checkpoint's model, and the digest of its weights.

        Args:
            checkpoint: of a language model, or without its head.
            weights: their format.
            causal: None for what the config says.
            to_change: its modules are going to be replaced, by adapters for example: the caller
                gets modules of its own, which share the tensors.
        """
        causal = checkpoint.config.causal if causal is None else causal
        key = os.path.realpath(checkpoint.path), replace(weights, is_chosen=False)
        if key not in self._loaded:
            digest = WeightsDigest(checkpoint)
            llama = load_with(Llama, digest.checkpoint, key[1], causal=causal)
            self._loaded[key] = llama, digest.hexdigest()
            self._causal[(*key, causal)] = llama
        first, hexdigest = self._loaded[key]
        if (*key, causal) not in self._causal:
            other = self._causal[(*key, causal)] = with_shared_tensors(first)
            other.config = first.config.replace(causal=causal)
        llama = self._causal[(*key, causal)]
        return with_shared_tensors(llama) if to_change else llama, hexdigest

    def loaded_formats(self, checkpoint: Checkpoint) -> list[WeightFormat]:
        """The formats in which a checkpoint has been loaded so far."""
        path = os.path.realpath(checkpoint.path)
        return [weights for loaded, weights in self._loaded if loaded == path]


def with_shared_tensors(llama: Llama) -> Llama:
    """A copy of a model's modules, whose parameters and buffers are those of the model itself."""
    tensors = (*llama.parameters(), *llama.buffers())
    return copy.deepcopy(llama, {id(tensor): tensor for tensor in tensors})


def load_same(
    checkpoint: Checkpoint,
    expected: Identity,
    weights: WeightFormat,
    *,
    causal: bool,
    bases: BaseModels | None = None,
    to_change: bool = False,
) -> Llama:
    """Load a checkpoint's model, which must have that fingerprint.

    The stored weights are compared, whatever the weight format in use.

    Args:
        checkpoint: of the model.
        expected: its fingerprint.
        weights: the format to load it in.
        causal: whether tokens see only earlier ones.
        bases: models that have been loaded already; None for none.
        to_change: as for `BaseModels.load`.

    Raises:
        CheckpointError: it is another model; the message lists the differences.
    """
    checkpoint = checkpoint.without_head()
    changes = config_changes(expected.config, comparable_config(checkpoint.config))
    if _tokenizer_of(checkpoint) != expected.tokenizer:
        changes.append("its tokenizer differs")
    if not changes:
        bases = bases or BaseModels()
        llama, digest = bases.load(checkpoint, weights, causal=causal, to_change=to_change)
        if digest == expected.weights:
            return llama
        changes.append("its weights differ")
    raise CheckpointError(
        f"{checkpoint.path} is not the classifier's base model: {listed(changes)}; restore that "
        "model, or train the classifier again"
    )


def _tokenizer_of(checkpoint: Checkpoint) -> str | None:
    return None if checkpoint.vocabulary is None else tokenizer_digest(checkpoint.vocabulary)
