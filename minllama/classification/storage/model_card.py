"""Write the model card of a saved classifier: description, usage, evaluation, training.

Follows Mitchell et al. 2019 in Hugging Face's format: a README.md with YAML front matter.
"""

import json
from collections.abc import Mapping
from typing import Any

from minllama.classification.base import Classifier
from minllama.classification.embedding import LlamaEmbeddingClassifier
from minllama.classification.storage.manifest import experts_in_words
from minllama.classification.zero_shot import LlamaZeroShotClassifier
from minllama.evaluation.thresholds import one_line

KINDS = {
    "base": "the unchanged base model",
    "adapter": "low-rank adapters (LoRA, in PEFT's files) beside the frozen base model",
    "full": "a complete model with all weights in this folder",
}


def model_card(
    classifier: Classifier,
    content: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, float]],
    *,
    name: str,
    verdicts: Mapping[str, str] | None = None,
) -> str:
    """README.md, from the content of classifier.json.

    Args:
        classifier: to describe.
        content: that of classifier.json.
        metrics: split -> metric -> value.
        name: of the folder.
        verdicts: split -> a summary of the metrics in a sentence or two.
    """
    base = content["base"]["model"]
    lines = ["---", "library_name: minllama", "pipeline_tag: text-classification"]
    if base and not base.startswith("/") and base != "default":
        lines.append(f"base_model: {json.dumps(base)}")
    lines += ["---", "", f"# {name}", "", _sentence(classifier, content), ""]
    lines += ["## Use", "", "```bash"]
    lines += [f'minllama classify {name} --text "..."', "```", "", "```python"]
    lines += ["from minllama import load_classifier", ""]
    method = "predict_proba" if classifier.scale is None else "predict"
    lines += [f'load_classifier("{name}").{method}(["..."])', "```", ""]
    lines += ["## Description", "", *_facts(classifier, content), ""]
    if metrics:
        lines += ["## Evaluation", "", *_table(metrics), ""]
        for split, verdict in (verdicts or {}).items():
            lines += [f"{_one_line(split)}: {_one_line(verdict)}", ""]
        lines += [
            "For details see `metrics.json` and `report.html`, if they are in this folder.",
            "",
        ]
    if content["training"]:
        lines += ["## Training", "", "```json"]
        lines += [json.dumps(content["training"], indent=2, default=str), "```", ""]
    lines += ["## Limitations", "", _limits(classifier), ""]
    return "\n".join(lines)


def _sentence(classifier: Classifier, content: Mapping[str, Any]) -> str:
    if classifier.scale is not None:
        return f"Predicts a number for a text. It is {KINDS[content['weights']]}."
    how_many = "any number of" if classifier.multi_label else "one of"
    return (
        f"Assigns {how_many} {len(classifier.labels)} labels to a text. It is "
        f"{KINDS[content['weights']]}."
    )


def _facts(classifier: Classifier, content: Mapping[str, Any]) -> list[str]:
    facts = {
        "labels": ", ".join(f"`{_one_line(label)}`" for label in classifier.labels),
        "base model": f"`{content['base']['model'] or 'in this folder'}`",
        "prompt": f"`{_one_line(str(content['prompt']['prompt']))}`",
        "weights in": f"`{content['base']['quantize'] or content['base']['dtype']}`",
        "temperature": f"{classifier.temperature:.4g}",
    }
    if (scale := classifier.scale) is not None:
        del facts["labels"], facts["temperature"]
        name = f"`{_one_line(classifier.labels[0])}`"
        facts["number"] = f"{name}, {scale.mean:.6g} on average in training, +- {scale.std:.4g}"
    elif classifier.multi_label or classifier.positive is not None:
        facts["predicted"] = f"`{_one_line(_threshold(classifier))}`"
    if isinstance(classifier, LlamaZeroShotClassifier):
        words = ", ".join(f"`{_one_line(word)}`" for word in content["label_words"])
        facts["label words"] = words
        facts["score"] = f"`{classifier.score_name}`"
        facts["examples in the prompt"] = str(len(content["shots"]))
    elif content["kind"] == "experts":
        n_layers = classifier.llama.config.n_layers
        facts["layers used"] = f"{classifier.n_layers} of {n_layers}"
        facts["experts"] = experts_in_words(content)
    else:
        n_layers = classifier.llama.config.n_layers
        facts["layers used"] = f"{content['layer']} of {n_layers}"
        facts["pooling"] = f"`{content['pooling']}`"
        if content["weights"] == "adapter":
            facts["head"] = _where_head_is(classifier)
    return [f"- {name}: {value}" for name, value in facts.items()]


def _threshold(classifier: Classifier) -> str:
    if classifier.decision is not None:
        return one_line(classifier.decision, classifier.labels)
    return (
        "each label with a probability of at least 0.5"
        if classifier.multi_label
        else "the more likely class"
    )


def _where_head_is(classifier: Classifier) -> str:
    assert isinstance(classifier, LlamaEmbeddingClassifier)
    if reason := classifier.unlike_transformers:
        return (
            f"only in `head.safetensors`, because {reason}, which PEFT's files cannot represent: "
            "PEFT loads the adapter as one of a language model"
        )
    return (
        "also in PEFT's file (`score`, task SEQ_CLS): on transformers' "
        "LlamaForSequenceClassification, PEFT computes the same logits from the prompt's token "
        "ids, before the temperature"
    )


def _table(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    names = list(dict.fromkeys(name for split in metrics.values() for name in split))
    rows = [f"| split | {' | '.join(name.replace('_', ' ') for name in names)} |"]
    rows.append("| --- " * (len(names) + 1) + "|")
    for split, values in metrics.items():
        cells = [f"{values[name]:.4f}" if name in values else "" for name in names]
        rows.append(f"| {split} | {' | '.join(cells)} |")
    return rows


def _limits(classifier: Classifier) -> str:
    if classifier.scale is not None:
        return (
            "It predicts a number for any input, even in another language or of another kind, "
            "and also outside the range of its training data."
        )
    return (
        "It predicts only the labels above, for any input, even in another language or of "
        "another kind. "
        + (
            "Its probabilities were calibrated on texts like those of its evaluation."
            if classifier.is_calibrated
            else "Its probabilities are not calibrated."
        )
    )


def _one_line(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1].replace("`", "'")
