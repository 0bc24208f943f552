"""Export a `LlamaEmbeddingClassifier` to a folder for transformers' LlamaForSequenceClassification.

That class has only a linear head without bias on the last token of the last layer: whatever else a
classifier has is folded into the head's weights, or refused. `minllama merge` calls it.
"""

import dataclasses
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from minllama.atomic import atomic_folder
from minllama.checkpoints.huggingface import write_files
from minllama.checkpoints.huggingface_head import (
    HEAD_WEIGHT,
    ONE_LABEL,
    REGRESSION,
    SEQUENCE_CLASSIFIER,
    SEVERAL_LABELS,
    head_to_huggingface,
)
from minllama.classification.base import Classifier
from minllama.classification.embedding import LlamaEmbeddingClassifier, unlike_transformers
from minllama.classification.experts import LlamaExpertsClassifier
from minllama.classification.storage.fingerprint import base_tensors
from minllama.classification.storage.save_load import CARD_FILE, is_classifier_file
from minllama.errors import MinllamaError
from minllama.evaluation.thresholds import DEFAULT, one_line
from minllama.lora import adapter_names
from minllama.tokenizer.vocabulary import Vocabulary

SAMPLES = ("yes", "It took me a while.", "2")  # texts of which the last token is looked at


def check_exportable(classifier: Classifier) -> LlamaEmbeddingClassifier:
    """The classifier, if transformers can compute it.

    Raises:
        MinllamaError: it has what LlamaForSequenceClassification has no place for.
    """
    if reason := _why_not(classifier):
        remedy = (
            "train one with --pooling last --layer all and without --bidirectional"
            if classifier.scale is None
            else "use it with minllama"
        )
        # Experts stand on a base without an adapter: there is nothing to merge.
        has_several = isinstance(classifier, LlamaExpertsClassifier)
        other = "use this one with minllama" if has_several else "merge without --to"
        raise MinllamaError(
            f"{SEQUENCE_CLASSIFIER} cannot represent this classifier: {reason}; {remedy}, or "
            f"{other}"
        )
    assert isinstance(classifier, LlamaEmbeddingClassifier)
    return classifier


def _why_not(classifier: Classifier) -> str | None:
    if isinstance(classifier, LlamaExpertsClassifier):
        return "it reads several layers, or words beside them"
    if not isinstance(classifier, LlamaEmbeddingClassifier):
        return "it scores label words and has no head"
    if reason := unlike_transformers(classifier.llama, classifier.layer, classifier.pooling):
        return reason
    bias = classifier.score.bias
    if classifier.scale is not None:
        offset = classifier.scale.mean
        offset += classifier.scale.std * (0.0 if bias is None else bias.item())
        # An output is a product with what RMSNorm leaves, where no element is constant: no weight
        # could add the same number to each.
        if offset == 0:
            return None
        return f"its logits have an offset of {offset:g}, but {HEAD_WEIGHT} has no bias"
    if bias is None or not bias.any():
        return None
    is_shift = not classifier.multi_label and len(bias.unique()) == 1
    return None if is_shift else "its head has a bias"  # one that moves all logits alike moves none


def save_for_transformers(
    classifier: Classifier,
    folder: str | os.PathLike[str],
    *,
    also: Callable[[Path], object] | None = None,
    removes: Collection[str] = (),
) -> list[str]:
    """Write a folder of LlamaForSequenceClassification: weights, labels, tokenizer, a card.

    Its logits are the classifier's divided by the temperature, and so its probabilities the same;
    those of a regression are its values. The folder appears whole or not at all; other files in it
    are kept, but for those of a classifier of ours.

    Args:
        classifier: without an adapter (`merge_classifier`).
        folder: the target.
        also: writes additional files into the folder that it receives, in the same atomic step.
        removes: names of files to remove from the folder in this step.

    Returns:
        What a person should hear, a line each.

    Raises:
        MinllamaError: it cannot be computed there, or the folder cannot be written.
    """
    classifier = check_exportable(classifier)
    if adapter_names(classifier.llama):
        raise MinllamaError("the classifier has an adapter; merge it first (merge_classifier)")
    words = _words_for(classifier)
    config, tensors = classifier.llama.config, dict(base_tensors(classifier.llama))
    # No logits of tokens are computed there, so there is no matrix for them.
    tensors.pop("output.weight", None)
    problem = SEVERAL_LABELS if classifier.multi_label else ONE_LABEL
    settings = head_to_huggingface(
        classifier.labels, problem if classifier.scale is None else REGRESSION, words.pad_id
    )
    notes = _notes(classifier, words)

    def replaces(name: str) -> bool:
        return name in removes or is_classifier_file(name)

    with atomic_folder(folder, replaces=replaces) as staging:
        write_files(
            staging,
            config.replace(tie_embeddings=True, dropout=0.0),
            tensors,
            vocabulary=words.vocabulary,
            head={HEAD_WEIGHT: _folded(classifier)},
            settings=settings,
        )
        card = _card(classifier, notes, name=Path(folder).resolve().name)
        (staging / CARD_FILE).write_text(card, encoding="utf-8", errors="backslashreplace")
        if also is not None:
            also(staging)
    return notes


def _folded(classifier: LlamaEmbeddingClassifier) -> Tensor:
    """The head's weight, (C, D) in float32, with the temperature or the scale in it."""
    weight = classifier.score.weight.detach().double().cpu()
    if classifier.scale is not None:
        return (weight * classifier.scale.std).float()
    return (weight / classifier.temperature).float()


class _Words(NamedTuple):
    """The tokenizer as it is written, and the id that pads."""

    vocabulary: Vocabulary | None
    pad_id: int | None


def _words_for(classifier: LlamaEmbeddingClassifier) -> _Words:
    """The tokenizer that gives the classifier's ids, and an id for padding that ends no text."""
    tokenizer = classifier.tokenizer
    vocabulary: Vocabulary | None = getattr(tokenizer, "vocabulary", None)
    pad_id = classifier.pad_id
    if pad_id is None:
        last = {classifier.encode(text).ids[-1] for text in SAMPLES}
        special = sorted(getattr(tokenizer, "special_tokens", {}).values())
        candidates = (getattr(tokenizer, "pad_id", None), *special)
        usable = (i for i in candidates if i is not None and i not in last)
        pad_id = next((i for i in usable if i < classifier.llama.config.vocab_size), None)
    if vocabulary is not None:
        add_eos = vocabulary.add_eos and classifier.tokenizer_eos
        vocabulary = dataclasses.replace(vocabulary, pad_id=pad_id, add_eos=add_eos)
    return _Words(vocabulary, pad_id)


def _notes(classifier: LlamaEmbeddingClassifier, words: _Words) -> list[str]:
    """What is not in the files, or is in them in another way."""
    notes, prompt = [], classifier.prompt
    if classifier.temperature != 1 and classifier.scale is None:
        notes.append(
            f"the logits include the temperature {classifier.temperature:.4g}, which is folded "
            "into the head"
        )
    if set(classifier.thresholds.values()) - {DEFAULT}:
        assert classifier.decision is not None
        instead = "gives only scores" if classifier.multi_label else "names the most likely class"
        notes.append(
            f"{one_line(classifier.decision, classifier.labels, every=True)}: cannot be stored "
            f"in the files; apply it to the probabilities, since transformers {instead}"
        )
    if prompt.chat or prompt.prompt != "{text}":
        chat = "the chat template" if prompt.chat_template is None else "its custom chat template"
        how = f"in {chat}, without a further BOS" if prompt.chat else "as it is"
        notes.append(
            f"texts must first be put into the prompt {prompt.prompt!r} ({how}), which "
            "transformers does not do"
        )
    if prompt.undo_treebank:
        notes.append("treebank tokenization must be undone first")
    limit = classifier.template.max_len
    if limit < classifier.llama.config.context_len:
        notes.append(
            f"texts were truncated to {limit} tokens; give the tokenizer max_length={limit}"
        )
    if words.pad_id is None:
        notes.append("the vocabulary has no padding token, so use a batch size of 1")
    return notes


def _card(classifier: LlamaEmbeddingClassifier, notes: list[str], *, name: str) -> str:
    """README.md."""
    what = "a number per text" if classifier.scale is not None else "labels for texts"
    lines = ["---", "library_name: transformers", "pipeline_tag: text-classification", "---", ""]
    lines += [f"# {name}", "", f"A {SEQUENCE_CLASSIFIER} that predicts {what}.", "", "```python"]
    lines += ["from transformers import pipeline", ""]
    lines += [f'pipeline("text-classification", "{name}")("...")', "```", ""]
    lines += [f"- {note}" for note in notes]
    return "\n".join(lines) + "\n"
