"""Save a classifier in a folder atomically, and load it unchanged or refuse it.

- `classifier.json`: the manifest: labels, prompt, pooling, calibration, the base model and its
  fingerprint, digests of the next files and of itself, the settings of its training.
- `head.safetensors`: the head, with the labels of its rows.
- `vocabulary.json`: the terms of TF-IDF, if it is a part of the classifier.
- `adapter_config.json`, `adapter_model.safetensors`: LoRA, in PEFT's files.
- or `config.json`, `model.safetensors` and the tokenizer: a complete model.
- `README.md`: a model card.

Nothing in it is executed, and no default replaces a missing value: what is missing or changed is an
error.
"""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minllama.atomic import atomic_folder, sha256_of
from minllama.checkpoints.huggingface import WEIGHT_FILES, write_files
from minllama.checkpoints.open import open_checkpoint, read_tokenizer
from minllama.checkpoints.peft import WEIGHTS_FILE
from minllama.checkpoints.peft_config import CONFIG_FILE
from minllama.checkpoints.resolve import canonical_name, folder_of, source_of
from minllama.checkpoints.weight_format import resolve_weight_format, warn_if_slow
from minllama.classification.base import Classifier
from minllama.classification.embedding import LlamaEmbeddingClassifier
from minllama.classification.experts import LlamaExpertsClassifier
from minllama.classification.storage.base_model import (
    BaseModels,
    Identity,
    identity_of,
    identity_of_source,
    load_same,
)
from minllama.classification.storage.fingerprint import base_tensors, tokenizer_digest
from minllama.classification.storage.head import (
    HEAD_FILE,
    VOCABULARY_FILE,
    check_digest,
    read_head,
    read_tfidf,
    write_head,
)
from minllama.classification.storage.manifest import (
    CLASSIFIER_FILE,
    build,
    check_unchanged,
    describe,
    described_by,
    read_checked,
    read_description,
    write_description,
)
from minllama.classification.storage.model_card import model_card
from minllama.classification.storage.transformers_folder import (
    is_sequence_classifier,
    load_sequence_classifier,
)
from minllama.errors import CheckpointError, MinllamaError, OptionError, naming
from minllama.kernels.hardware import usable_device
from minllama.lora import adapter_names, lora_layers, merge_lora, remove_lora_wrapper
from minllama.lora.peft_files import FILES as ADAPTER_FILES
from minllama.lora.peft_files import load_adapter, write_adapter
from minllama.model.llama import Llama
from minllama.model.mode import evaluating
from minllama.options import PromptOptions
from minllama.options.loading import LoadOptions
from minllama.quantization.modules import replace_by_dense
from minllama.tokenizer.huggingface import FILES as TOKENIZER_FILES
from minllama.tokenizer.tokenizer import Tokenizer

CARD_FILE = "README.md"
OWN_FILES = (CLASSIFIER_FILE, HEAD_FILE, VOCABULARY_FILE, CARD_FILE, *ADAPTER_FILES)


def save_classifier(
    classifier: Classifier,
    folder: str | os.PathLike[str],
    *,
    tokenizer: str | None = None,
    training: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    verdicts: Mapping[str, str] | None = None,
    also: Callable[[Path], object] | None = None,
    removes: Collection[str] = (),
) -> None:
    """Save a classifier atomically; other files in the folder are kept.

    A base model that equals its checkpoint is referenced, not copied, and only its adapter is
    saved. A fully trained model, or one created in memory, is saved as well.

    Args:
        classifier: of any kind.
        folder: the target.
        tokenizer: the tokenizer's file or folder, if it is not the checkpoint's own; None for its
            own record.
        training: settings of its training, for the manifest and model card.
        metrics: split -> metric -> value, for the model card.
        verdicts: split -> a summary of the metrics, for the model card.
        also: writes additional files into the folder that it receives, in the same atomic step.
        removes: names of files to remove from the folder in this step.

    Raises:
        MinllamaError: the folder cannot be written, several adapters are active or one only partly,
            or an adapter's base model is not in a file.
    """
    tokenizer = tokenizer or _tokenizer_elsewhere(classifier)
    if tokenizer is not None:
        tokenizer = canonical_name(tokenizer)  # it is opened from elsewhere too
    llama, adapter = classifier.llama, _adapter_to_save(classifier.llama)
    identity = _identity_to_name(classifier, tokenizer, adapter)
    is_own = identity is None
    has_model = is_own or _holds_model(Path(folder), llama)

    def replaces(name: str) -> bool:
        return name in removes or _is_ours(name, with_model=has_model)

    with atomic_folder(folder, replaces=replaces) as staging:
        if identity is None:
            identity = _write_model(staging, classifier)
        _write_parts(staging, classifier, adapter)
        content = describe(
            classifier,
            identity,
            weights="full" if is_own else "base" if adapter is None else "adapter",
            tokenizer=tokenizer,
            training=training or {},
        )
        content["sha256"] = _digests(staging)
        write_description(staging / CLASSIFIER_FILE, content)
        name = Path(folder).resolve().name
        card = model_card(classifier, content, metrics or {}, name=name, verdicts=verdicts)
        (staging / CARD_FILE).write_text(card, encoding="utf-8", errors="backslashreplace")
        if also is not None:
            also(staging)


def _tokenizer_elsewhere(classifier: Classifier) -> str | None:
    """The tokenizer's path, if it is separate."""
    source: str | None = getattr(classifier.tokenizer, "source", None)
    model = classifier.llama.source
    if source is None or source == model or source_of(source) is None or model is None:
        return None
    try:
        own = open_checkpoint(source_of(model)).vocabulary
        read_tokenizer(source)
    except MinllamaError:  # of a checkpoint in another format, or gone since
        return None
    words = classifier.tokenizer.vocabulary
    return None if own is not None and tokenizer_digest(own) == tokenizer_digest(words) else source


def _adapter_to_save(llama: Llama) -> str | None:
    """The active adapter; None without one.

    Raises:
        MinllamaError: several are active, or one only partly, which PEFT's files cannot represent.
    """
    layers = lora_layers(llama).values()
    active = sorted({name for layer in layers for name in layer.active})
    if not active:
        return None
    if len(active) > 1:
        raise MinllamaError(
            f"several adapters are active ({', '.join(active)}), but only one can be saved; "
            "select it with set_adapters(), or merge them with merge_classifier()"
        )
    (name,) = active
    if any(layer.active != {name: 1.0} for layer in layers if name in layer.adapters):
        raise MinllamaError(
            f"the adapter {name!r} is active with a weight other than 1, or only in some layers, "
            f"which its files cannot represent; call set_adapters(model, {name!r}) for full "
            "weight, or merge_classifier() to keep its current effect"
        )
    return name


def _identity_to_name(
    classifier: Classifier, tokenizer: str | None, adapter: str | None
) -> Identity | None:
    """The fingerprint of the classifier's base checkpoint; None without one.

    Raises:
        MinllamaError: there is none, and an adapter's files do not contain the base.
    """
    try:
        return identity_of_source(classifier.llama, classifier.tokenizer, tokenizer)
    except MinllamaError as error:
        if adapter is None:
            return None
        raise MinllamaError(
            f"the adapter's base model is not in a file: {error}; save it with save_pretrained() "
            "and load it from there, or merge the adapter"
        ) from error


def _write_model(staging: Path, classifier: Classifier) -> Identity:
    """Write the complete model, without adapters, and return the names of its files."""
    vocabulary = getattr(classifier.tokenizer, "vocabulary", None)
    # Their files have no word for looking ahead; classifier.json says it.
    config = classifier.llama.config.replace(causal=True)
    write_files(staging, config, base_tensors(classifier.llama), vocabulary=vocabulary)
    return identity_of(open_checkpoint(staging))


def _write_parts(staging: Path, classifier: Classifier, adapter: str | None) -> None:
    """Write head and adapter, where there are such."""
    head = None
    if isinstance(classifier, LlamaEmbeddingClassifier):
        if classifier.unlike_transformers is None:
            head = classifier.score.weight
        write_head(staging, classifier)
    elif isinstance(classifier, LlamaExpertsClassifier):
        write_head(staging, classifier)
    if adapter is not None:
        llama = classifier.llama
        source = None if llama.source is None else source_of(llama.source)
        write_adapter(staging, llama, adapter_name=adapter, base_model_name=source, head=head)


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that a classifier.json vouches for."""
    files = (folder / name for name in (HEAD_FILE, VOCABULARY_FILE, CONFIG_FILE, WEIGHTS_FILE))
    return {path.name: sha256_of(path) for path in files if path.is_file()}


def _holds_model(folder: Path, llama: Llama) -> bool:
    """Whether an earlier classifier left a model of its own, and it is not this one's base."""
    try:
        weights = read_description(folder / CLASSIFIER_FILE).get("weights")
    except CheckpointError:
        return False
    is_base = llama.source is not None and os.path.realpath(llama.source) == os.path.realpath(
        folder
    )
    return weights == "full" and not is_base


def files_to_replace(folder: Path, *, is_own: bool) -> list[str]:
    """The names of files in a folder that saving a classifier replaces.

    Args:
        folder: may not exist.
        is_own: its weights are saved as well.
    """
    if not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if _is_ours(name, with_model=is_own)]


def is_classifier_file(name: str) -> bool:
    """Whether a file of that name belongs to a classifier in a folder, ours or transformers'."""
    return _is_ours(name, with_model=True)


def _is_ours(name: str, *, with_model: bool) -> bool:
    """Whether a file of a classifier's folder is one that a save writes, or an older one wrote."""
    return name in OWN_FILES or (with_model and _is_model_file(name))


def _is_model_file(name: str) -> bool:
    return bool(WEIGHT_FILES.fullmatch(name)) or name in ("config.json", *TOKENIZER_FILES)


def load_classifier(
    folder: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantize: str | None = None,
) -> Classifier:
    """Read a classifier that `save_classifier` wrote, in evaluation mode.

    Or one of transformers (`LlamaForSequenceClassification`) or of PEFT (task SEQ_CLS), whose
    base is in the dtype that suits the device where none is given.

    Args:
        folder: that of classifier.json; or transformers' or PEFT's; or a Hugging Face id.
        model: where the base model is now, if it is not where the classifier says.
        tokenizer: the same of its tokenizer, if that is not the model's own.
        dtype: of the base's weights; None for that of the training, which gives the same numbers,
            unless this machine only emulates it.
        device: None for a GPU if there is one.
        quantize: "int8", "int4" or "stored" for a base in so many bits, "none" for numbers in the
            dtype, "auto" for what reads texts fastest here; None for what it was in training.

    Raises:
        MinllamaError: a file is missing, damaged or changed, or the base model is another one.
    """
    options = LoadOptions(
        dtype=dtype, device=device, quantize=quantize, base=model, tokenizer=tokenizer
    )
    return load_classifier_with(folder, options)


def load_classifier_with(
    folder: str | os.PathLike[str], options: LoadOptions, bases: BaseModels | None = None
) -> Classifier:
    """Read a classifier in a folder; see `load_classifier`.

    Args:
        folder: as there.
        options: as there.
        bases: models that have been loaded already, which it may stand on; None for none.
    """
    folder, model = folder_of(folder), options.base
    path = folder / CLASSIFIER_FILE
    if _is_foreign(folder):
        return load_sequence_classifier(path.parent, options, bases)
    content = read_checked(path)
    base, weights, digests = content["base"], content["weights"], content["sha256"]
    with described_by(path):
        labels, prompt = content["labels"], PromptOptions(**content["prompt"])
        if weights == "full" and model is not None:
            raise OptionError(
                f"{folder}: contains all of its weights and needs no base; omit --base {model}"
            )
        source = path.parent if weights == "full" else (model or source_of(base["model"]))
        identity = Identity(**base["identity"])
    device, source_of_words = usable_device(options.device), options.tokenizer or base["tokenizer"]
    warn_if_slow(options.dtype, device)
    options = replace(options, device=device, tokenizer=source_of_words)
    llama, words = _open_base(path, source, content, identity, options, bases)
    if weights == "adapter":
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            check_digest(path.parent / name, digests.get(name))
        load_adapter(llama, path.parent)
    llama.requires_grad_(False)
    with described_by(path):
        classifier = build(content, llama, words, labels, prompt)
    if isinstance(classifier, LlamaEmbeddingClassifier):
        read_head(path.parent, classifier, digests.get(HEAD_FILE))
    elif isinstance(classifier, LlamaExpertsClassifier):
        read_head(path.parent, classifier, digests.get(HEAD_FILE))
        if content["tfidf"]:
            digest = digests.get(VOCABULARY_FILE)
            classifier.tfidf = read_tfidf(path.parent, len(labels), digest)
    check_unchanged(path, content)  # last, for the others say what it is that differs
    classifier.digest = content["sha256"][CLASSIFIER_FILE]
    return classifier.eval()


def weight_format_in_training(folder: str | os.PathLike[str]) -> str:
    """The word for `quantize` that gives a saved classifier's base the bits that it was trained in.

    Raises:
        CheckpointError: there is no classifier.
    """
    if _is_foreign(folder):
        return "none"
    base = read_description(Path(folder) / CLASSIFIER_FILE).get("base")
    found = base.get("quantize") if isinstance(base, Mapping) else None
    return found if isinstance(found, str) else "none"


def classifier_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings that a saved classifier came about with, as they were given to its save.

    Raises:
        CheckpointError: there is no classifier.
    """
    if _is_foreign(folder):
        return {"made by": "transformers or PEFT"}
    training = read_description(Path(folder) / CLASSIFIER_FILE).get("training")
    return dict(training) if isinstance(training, dict) else {}


def _is_foreign(folder: str | os.PathLike[str]) -> bool:
    """Whether a classifier is in transformers' files and not in ours."""
    has_own = any((Path(folder) / name).is_file() for name in (CLASSIFIER_FILE, HEAD_FILE))
    return not has_own and is_sequence_classifier(Path(folder))


SAMPLE = (
    "yes",
    "no, I do not think so",
    "It took me a while, but in the end I was glad I had come.",
)


def merge_classifier(classifier: Classifier, *, dtype: torch.dtype | None = None) -> float:
    """Make the adapter of a classifier part of its weights; it can then stand alone.

    A base in fewer bits becomes the float32 numbers that these stand for: the adapter was trained
    beside them, not beside what they were rounded from.

    Args:
        classifier: changed in place.
        dtype: of the merged model; None for what it is, and float32 for a base in fewer bits.

    Returns:
        The largest change of a logit on a few sample texts: of merged weights that are rounded, and
        of activations that were, beside a base in fewer bits.

    Raises:
        MinllamaError: it has no adapter, it reads the base without it as well, or the merged
            weights are not finite.
    """
    if not adapter_names(classifier.llama):
        raise MinllamaError("the classifier has no adapter to merge; use it unchanged")
    if isinstance(classifier, LlamaExpertsClassifier) and classifier.base_choices:
        raise MinllamaError(
            "the classifier reads its base with and without the adapter, which merged weights "
            "cannot; use it unchanged"
        )
    llama = classifier.llama
    prompts = [classifier.encode(text) for text in SAMPLE]
    with evaluating(classifier), torch.no_grad():
        before = classifier.compute_logits(prompts)
        if replace_by_dense(llama):
            llama.float()
            llama.quantize = None
        merge_lora(classifier)
        remove_lora_wrapper(llama)
        if dtype is not None:
            llama.to(dtype)
        llama.source = None  # these weights are in no file yet
        return float((classifier.compute_logits(prompts) - before).abs().max())


def _open_base(
    path: Path,
    source: Any,
    content: Mapping[str, Any],
    identity: Identity,
    options: LoadOptions,
    bases: BaseModels | None,
) -> tuple[Llama, Tokenizer]:
    try:
        checkpoint = open_checkpoint(source, tokenizer=options.tokenizer)
        has_words = checkpoint.vocabulary is not None
    except MinllamaError as error:
        remedy = "; if it has moved, name it with --base" if content["weights"] != "full" else ""
        remedy += ", its tokenizer with --tokenizer" if remedy and options.tokenizer else ""
        raise CheckpointError(
            f"{path}: its base model cannot be opened: {error}{remedy}"
        ) from error
    if not has_words:
        raise CheckpointError(f"{checkpoint.path}: no tokenizer, but {path} needs one")
    with described_by(path):
        trained_on = content["base"]["dtype"], content["base"].get("quantize")
        weights = resolve_weight_format(checkpoint, options, "read", trained_on=trained_on)
    with naming(path):
        llama = load_same(
            *(checkpoint, identity, weights),
            causal=bool(content["causal"]),
            bases=bases,
            to_change=content["weights"] == "adapter",
        )
    return llama, Tokenizer.from_checkpoint(checkpoint)
