"""Load sequence classifiers of transformers and PEFT as a `LlamaEmbeddingClassifier`.

Supports a folder of `LlamaForSequenceClassification`, and a PEFT adapter for it (task SEQ_CLS) with
its base model. Their head is linear without bias, on the last non-padding token after all layers.
`minllama.classification.storage.save_load` calls it.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from minllama.checkpoints.huggingface import declared_head
from minllama.checkpoints.huggingface_head import (
    HEAD_BIAS,
    HEAD_WEIGHT,
    REGRESSION,
    SEQUENCE_CLASSIFIER,
    SEVERAL_LABELS,
    SequenceHead,
)
from minllama.checkpoints.load import load_with
from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.peft_config import CLASSIFICATION, CONFIG_FILE, read_adapter_config
from minllama.checkpoints.types import Checkpoint
from minllama.checkpoints.weight_format import resolve_weight_format, warn_if_slow
from minllama.classification.embedding import LlamaEmbeddingClassifier
from minllama.classification.storage.base_model import BaseModels
from minllama.errors import CheckpointError, MinllamaError, OptionError, naming
from minllama.evaluation.regression import TargetScale
from minllama.lora.peft_files import load_adapter
from minllama.model.llama import Llama
from minllama.options.loading import LoadOptions
from minllama.tokenizer.load import find_vocabulary
from minllama.tokenizer.tokenizer import Tokenizer


def _llama_of(
    checkpoint: Checkpoint,
    options: LoadOptions,
    bases: BaseModels | None,
    *,
    to_change: bool = False,
) -> Llama:
    """The Llama below a head; in the dtype that suits the device where nothing is said."""
    warn_if_slow(options.dtype, options.device)
    below = checkpoint.without_head()
    weights = resolve_weight_format(below, options)
    if bases is None:
        return load_with(Llama, below, weights)
    return bases.load(below, weights, to_change=to_change)[0]


def is_sequence_classifier(folder: Path) -> bool:
    """Whether a folder holds an adapter of PEFT's, or else a model of Hugging Face's."""
    return any((folder / name).is_file() for name in (CONFIG_FILE, "config.json"))


def load_sequence_classifier(
    folder: Path, options: LoadOptions, bases: BaseModels | None = None
) -> LlamaEmbeddingClassifier:
    """Open a sequence classifier that transformers or PEFT wrote, in evaluation mode.

    `bases` are models that have been loaded already, which it may stand on.

    Raises:
        MinllamaError: it is of another kind, damaged, or has no tokenizer.
    """
    if (folder / CONFIG_FILE).is_file():
        return _load_adapter_classifier(folder, options, bases)
    if options.base is not None:
        raise OptionError(
            f"{folder}: contains all of its weights and needs no base; omit --base {options.base}"
        )
    checkpoint = open_checkpoint(folder, tokenizer=options.tokenizer)
    if checkpoint.head is None:
        raise CheckpointError(
            f"{folder}: a language model (LlamaForCausalLM), not a classifier; train one with "
            "`minllama train --model`, or give labels with `minllama classify --labels`"
        )
    weight = _stored_head(checkpoint)
    words = _words_of(checkpoint, SEQUENCE_CLASSIFIER)
    llama = _llama_of(checkpoint, options, bases)
    with naming(folder / "config.json"):
        return _made(llama, words, checkpoint.head, weight)


def _load_adapter_classifier(
    folder: Path, options: LoadOptions, bases: BaseModels | None
) -> LlamaEmbeddingClassifier:
    config = read_adapter_config(folder)
    if not config.has_head:
        raise CheckpointError(
            f"{folder}: a PEFT adapter of task {config.task_type}, without a classification "
            f"head; only task {CLASSIFICATION} is supported"
        )
    source = options.base or config.base_model_name
    if source is None:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: no base_model_name_or_path; name the base model with --base"
        )
    try:
        checkpoint = open_checkpoint(source, tokenizer=options.tokenizer)
    except MinllamaError as error:
        raise CheckpointError(
            f"{folder}: its base model cannot be opened: {error}; if it has moved, name it with "
            "--base"
        ) from error
    words = _words_beside(folder, options) or _words_of(
        checkpoint, f"PEFT {CLASSIFICATION} adapter"
    )
    llama = _llama_of(checkpoint, options, bases, to_change=True)
    weight = load_adapter(llama, folder).head
    assert weight is not None, "an adapter with a head has its tensor"
    head = _head_of_base(checkpoint, len(weight))
    with naming(folder):
        return _made(llama, words, head, weight)


def _words_beside(folder: Path, options: LoadOptions) -> Tokenizer | None:
    """The tokenizer beside an adapter, unless another one is given."""
    vocabulary = None if options.tokenizer is not None else find_vocabulary(folder)
    if vocabulary is None:
        return None
    tokenizer = Tokenizer(vocabulary)
    tokenizer.source = os.path.realpath(folder)
    return tokenizer


def _head_of_base(checkpoint: Checkpoint, n_outputs: int) -> SequenceHead:
    """What the base's config.json says of a head that an adapter brings.

    PEFT keeps no names: they are the base's where it has as many, as when transformers opens both.
    """
    said = declared_head(checkpoint.path)
    if said.labels is not None and len(said.labels) != n_outputs:
        return SequenceHead(None, None, said.pad_id)
    return said


def _stored_head(checkpoint: Checkpoint) -> Tensor:
    """(C, D), float32."""
    path, dim = checkpoint.path, checkpoint.config.dim
    stored = checkpoint.tensors.get(HEAD_WEIGHT)
    if stored is None or len(stored.shape) != 2 or stored.shape[1] != dim or not stored.shape[0]:
        found = "is missing" if stored is None else f"is of shape {stored.shape}"
        raise CheckpointError(
            f"{path}: a {SEQUENCE_CLASSIFIER} whose {HEAD_WEIGHT} {found}, not (labels, {dim}); "
            "the file is incomplete: download it again"
        )
    if HEAD_BIAS in checkpoint.tensors:
        raise CheckpointError(
            f"{path}: a {SEQUENCE_CLASSIFIER} with a {HEAD_BIAS}, which transformers ignores; "
            "remove it from the file to get the same logits"
        )
    weight = stored.load().float()
    if not weight.isfinite().all():
        raise CheckpointError(
            f"{path}: {HEAD_WEIGHT} has NaN or infinite values; its training diverged, or the "
            "file is damaged"
        )
    return weight


def _words_of(checkpoint: Checkpoint, what: str) -> Tokenizer:
    if checkpoint.vocabulary is None:
        raise CheckpointError(
            f"{checkpoint.path}: a sequence classifier ({what}) without a tokenizer in or beside "
            "it; name its file or folder with --tokenizer"
        )
    return Tokenizer.from_checkpoint(checkpoint)


def _made(
    llama: Llama, words: Tokenizer, head: SequenceHead, weight: Tensor
) -> LlamaEmbeddingClassifier:
    n_outputs = len(weight)
    labels, problem = head.labels_of(n_outputs), head.problem_of(n_outputs)
    with torch.random.fork_rng(devices=[]):  # the caller's seed must not notice
        classifier = LlamaEmbeddingClassifier(
            llama.requires_grad_(False),
            words,
            labels,
            "last",
            multi_label=problem == SEVERAL_LABELS,
            scale=TargetScale() if problem == REGRESSION else None,
            pad_id=head.pad_id,
            tokenizer_eos=True,
        )
    classifier.score.weight.data.copy_(weight)
    return classifier.eval()
