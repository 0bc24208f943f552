"""Read and write `classifier.json`, the manifest of a saved classifier.

`minllama.classification.storage.save_load` calls it, and reads weights, adapters and heads itself.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from minllama.atomic import sha256_of
from minllama.classification.base import Classifier
from minllama.classification.embedding import LlamaEmbeddingClassifier
from minllama.classification.experts import LlamaExpertsClassifier
from minllama.classification.storage import schema
from minllama.classification.storage.base_model import Identity
from minllama.classification.zero_shot import LlamaZeroShotClassifier
from minllama.engine.states import Choice
from minllama.errors import CheckpointError, MinllamaError
from minllama.evaluation.regression import TargetScale
from minllama.evaluation.thresholds import DEFAULT, one_line, read, saved
from minllama.model.llama import Llama
from minllama.options import PromptOptions
from minllama.text import VERSION, read_json
from minllama.tokenizer.tokenizer import Tokenizer

CLASSIFIER_FILE = "classifier.json"
# The second may say `thresholds`, `scale`, `pad_id` and `tokenizer_eos`, which readers of the first
# would ignore. The third may be a product of experts, of which those of the fourth read the base
# without its adapters as well (`base_choices`).
VERSIONS = (1, 2, 3, 4)
WHERE = ("model", "tokenizer")  # keys of `base`
FOR_PEOPLE = ("minllama", "training")


def describe(
    classifier: Classifier,
    identity: Identity,
    *,
    weights: str,
    tokenizer: str | None,
    training: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of `classifier.json`, without the digests of other files."""
    llama = classifier.llama
    content: dict[str, Any] = {
        "format": "minllama classifier",
        "version": VERSIONS[0],
        "minllama": VERSION,
        "labels": list(classifier.labels),
        "multi_label": classifier.multi_label,
        "temperature": classifier.temperature,
        "prompt": dataclasses.asdict(classifier.prompt),
        "causal": llama.config.causal,
        "base": {
            "model": llama.source if weights != "full" else None,
            "tokenizer": tokenizer if weights != "full" else None,
            "dtype": str(llama.dtype).removeprefix("torch."),
            # A model of its own is written in numbers, which are what it computed with.
            "quantize": llama.quantize if weights != "full" else None,
            "identity": dataclasses.asdict(identity),
        },
        "weights": weights,
    }
    if classifier.decision is not None:
        thresholds = saved(classifier.decision, classifier.labels)
        content |= {"version": VERSIONS[1], "thresholds": thresholds}
    if isinstance(classifier, LlamaZeroShotClassifier):
        content["kind"] = "zero-shot"
        content["label_words"] = list(classifier.label_words)
        content["score"] = classifier.score
        content["prior_strength"] = classifier.prior_strength
        content["shots"] = [list(shot) for shot in classifier.shots]
        content["prior"] = None if classifier.prior is None else classifier.prior.tolist()
    elif isinstance(classifier, LlamaExpertsClassifier):
        content |= _experts(classifier)
    else:
        assert isinstance(classifier, LlamaEmbeddingClassifier)
        content["kind"] = "embedding"
        content["pooling"] = classifier.pooling
        content["layer"] = classifier.layer
        content["dropout"] = classifier.dropout.p
        scale = classifier.scale
        further = {
            "scale": None if scale is None else dataclasses.asdict(scale),
            "pad_id": classifier.pad_id,
            "tokenizer_eos": classifier.tokenizer_eos or None,
        }
        if said := {name: value for name, value in further.items() if value is not None}:
            content |= {"version": VERSIONS[1], **said}
    content["training"] = dict(training)
    return content


def _experts(classifier: LlamaExpertsClassifier) -> dict[str, Any]:
    """What the manifest says of a product of experts."""
    content: dict[str, Any] = {"version": VERSIONS[2], "kind": "experts"}
    content["choices"] = [list(choice) for choice in classifier.choices]
    content["tfidf"] = classifier.tfidf is not None
    if classifier.base_choices:
        content["version"] = VERSIONS[3]
        content["base_choices"] = [list(choice) for choice in classifier.base_choices]
    return content


def build(
    content: Mapping[str, Any],
    llama: Llama,
    words: Tokenizer,
    labels: list[str],
    prompt: PromptOptions,
) -> Classifier:
    """Build the described classifier; the values of a head are loaded later.

    Raises:
        KeyError, TypeError, ValueError, MinllamaError: the description is damaged; see
            `described_by`.
    """
    classifier: Classifier
    if content["kind"] == "zero-shot":
        classifier = LlamaZeroShotClassifier(
            llama,
            words,
            labels,
            prompt,
            label_words=content["label_words"],
            score=content["score"],
            prior_strength=float(content["prior_strength"]),
            shots=[(str(text), str(label)) for text, label in content["shots"]],
        )
        if content["prior"] is not None:
            prior = torch.tensor(content["prior"], dtype=torch.float32)
            if prior.shape != (len(labels),) or not prior.isfinite().all():
                raise ValueError(f"prior must be {len(labels)} numbers")
            classifier.prior = prior
    elif content["kind"] == "experts":
        own, of_base = map(_choices, (content["choices"], content.get("base_choices") or ()))
        classifier = LlamaExpertsClassifier(
            *(llama, words, labels, own), base_choices=of_base, prompt=prompt
        )
    else:
        scale, pad_id = content.get("scale"), content.get("pad_id")
        with torch.random.fork_rng(devices=[]):  # the caller's seed must not notice
            classifier = LlamaEmbeddingClassifier(
                llama,
                words,
                labels,
                content["pooling"],
                layer=content["layer"],
                dropout=content["dropout"],
                multi_label=bool(content["multi_label"]),
                bias=True,
                prompt=prompt,
                scale=None if scale is None else TargetScale(**scale),
                pad_id=pad_id,
                tokenizer_eos=bool(content.get("tokenizer_eos")),
            )
    classifier.temperature = _positive(content["temperature"])
    if (thresholds := content.get("thresholds")) is not None:
        if classifier.scale is not None:
            raise ValueError("thresholds are for classes, scale is for numbers")
        classifier.decision = read(thresholds, labels, multi_label=classifier.multi_label)
    return classifier


def _choices(pairs: Iterable[Any]) -> list[Choice]:
    return [(layer, pooling) for layer, pooling in pairs]


def in_words(path: Path) -> list[tuple[str, str]]:
    """The content of classifier.json as pairs of name and value, for display.

    Raises:
        CheckpointError: it is missing, damaged, changed, or from another version.
    """
    content = read_description(path)
    with described_by(path):
        labels = [str(label) for label in content["labels"]]
        base, many = content["base"], bool(content["multi_label"])
        how = f"head on layer {content.get('layer')}, {content.get('pooling')} pooling"
        if content["kind"] == "experts":
            how = experts_in_words(content)
        elif content["kind"] == "zero-shot":
            how = f"label words {', '.join(map(str, content['label_words']))}; {content['score']}"
        gives = f"{'any number' if many else 'one'} of {len(labels)} labels"
        has_numbers = content.get("scale") is not None
        lines = [
            ("classifier", str(path.parent)),
            ("gives", "a number per text" if has_numbers else gives),
            ("labels", ", ".join(labels)),
            ("by", how),
            ("base", str(base["model"] or "default") if content["weights"] != "full" else "own"),
            ("weights", f"{content['weights']}, base in {base['quantize'] or base['dtype']}"),
            ("prompt", _prompt(content["prompt"])),
        ]
        temperature = f"{_positive(content['temperature']):.4g}"
        if not has_numbers:
            lines.append(("temperature", temperature))
            lines.append(("predicted", _predicted(content.get("thresholds"), labels, many)))
        if not isinstance(content["sha256"], dict):
            raise TypeError("sha256 is not valid")
    check_unchanged(path, content)  # last, for the others say what it is that differs
    return lines


def experts_in_words(content: Mapping[str, Any]) -> str:
    """The experts of a manifest, for display."""
    heads = [f"layer {layer} {pooling}" for layer, pooling in content["choices"]]
    of_base = content.get("base_choices") or ()
    heads += [f"layer {layer} {pooling} of the base" for layer, pooling in of_base]
    return "heads on " + ", ".join([*heads, *(["TF-IDF"] if content["tfidf"] else [])])


def _prompt(options: Mapping[str, Any]) -> str:
    """The prompt template, for display."""
    said = json.dumps(options["prompt"], ensure_ascii=False)
    if not options.get("chat"):
        return said
    own = options.get("chat_template") is not None
    return f"{said} in {'a custom chat template' if own else 'a chat'}"


def _predicted(thresholds: Any, labels: list[str], multi_label: bool) -> str:
    """The thresholds, for display."""
    if thresholds is not None:
        return one_line(read(thresholds, labels, multi_label=multi_label), labels)
    if multi_label:
        return f"threshold {DEFAULT:g} for each label"
    return (
        f"threshold {DEFAULT:g} for {labels[1]!r}" if len(labels) == 2 else "the most likely class"
    )


def write_description(path: Path, content: Mapping[str, Any]) -> None:
    """Write classifier.json, with digests of itself and the other files."""
    own = {CLASSIFIER_FILE: _digest(content)}
    content = {**content, "sha256": {**content["sha256"], **own}}
    text = json.dumps(content, indent=2, ensure_ascii=True, allow_nan=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")


def read_description(path: Path) -> dict[str, Any]:
    """Read classifier.json.

    Raises:
        CheckpointError: it is missing, damaged, or from another version.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent}: no {CLASSIFIER_FILE}; name a classifier's folder that `minllama "
            "train` or save_pretrained() wrote"
        )
    try:
        content = read_json(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); restore the original file") from error
    if not isinstance(content, dict) or content.get("version") not in VERSIONS:
        raise CheckpointError(
            f"{path}: not a classifier of version {' or '.join(map(str, VERSIONS))}; use the "
            "minllama that wrote it"
        )
    return content


def read_checked(path: Path) -> dict[str, Any]:
    """As `read_description`, once each field is known to be of the right type and range.

    Raises:
        CheckpointError: it is missing, damaged, or from another version.
    """
    content = read_description(path)
    with described_by(path):
        schema.check(content)
    return content


def check_unchanged(path: Path, content: Mapping[str, Any]) -> None:
    """Raise CheckpointError if classifier.json was changed after it was saved."""
    if content["sha256"].get(CLASSIFIER_FILE) != _digest(content):
        raise CheckpointError(
            f"{path}: changed after it was saved (its SHA-256 differs); restore the original, or "
            "train the classifier again"
        )


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, independent of the JSON's layout.

    Excluded is what does not affect results: the base's location, which may change, and notes.
    """
    base = {key: content["base"][key] for key in content["base"] if key not in WHERE}
    others = {name: sha for name, sha in content["sha256"].items() if name != CLASSIFIER_FILE}
    said = {key: content[key] for key in content if key not in FOR_PEOPLE}
    text = json.dumps({**said, "base": base, "sha256": others}, sort_keys=True)
    return sha256_of(text)


class described_by:
    """Convert errors in a manifest to one line that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, KeyError):
            raise CheckpointError(f"{self._path}: {error} is missing; restore it") from error
        if isinstance(error, MinllamaError):
            raise CheckpointError(f"{self._path}: {error}") from error
        if isinstance(error, TypeError | ValueError | AttributeError):
            line = str(error).splitlines()[0]
            raise CheckpointError(f"{self._path}: {line}; restore the original file") from error


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError(f"temperature must be above 0, not {value!r}")
    return number
