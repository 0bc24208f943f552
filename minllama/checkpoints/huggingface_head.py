"""Read the classification head's settings from a Hugging Face config.json.

Supports `LlamaForSequenceClassification`; other heads are refused by name.
`minllama.checkpoints.huggingface` calls it and stores the result in the checkpoint.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from minllama.errors import MinllamaError

SEQUENCE_CLASSIFIER = "LlamaForSequenceClassification"
HEAD_WEIGHT, HEAD_BIAS = "score.weight", "score.bias"
OTHER_HEADS = {
    "LlamaForTokenClassification": "classifies each token",
    "LlamaForQuestionAnswering": "finds the start and end of an answer",
}
REGRESSION, ONE_LABEL, SEVERAL_LABELS = (
    "regression",
    "single_label_classification",
    "multi_label_classification",
)
PROBLEM_TYPES = (REGRESSION, ONE_LABEL, SEVERAL_LABELS)


@dataclass(frozen=True)
class SequenceHead:
    """The settings of a sequence classifier's head in config.json.

    Attributes:
        labels: names of its outputs, in order; None if not given (LABEL_0 ...).
        problem_type: one of PROBLEM_TYPES; None if not given.
        pad_id: the id whose last run in a sequence is padding; None for none.
    """

    labels: tuple[str, ...] | None
    problem_type: str | None
    pad_id: int | None

    def labels_of(self, n_outputs: int) -> tuple[str, ...]:
        """The names of a head's outputs.

        Raises:
            MinllamaError: there are not as many.
        """
        if self.labels is None:
            return tuple(f"LABEL_{i}" for i in range(n_outputs))
        if len(self.labels) != n_outputs:
            raise MinllamaError(
                f"id2label names {len(self.labels)} labels, but {HEAD_WEIGHT} has {n_outputs} "
                "rows; one is from another model: download both again"
            )
        return self.labels

    def problem_of(self, n_outputs: int) -> str:
        """The problem type; derived from the outputs if not given.

        One output is a number then, as transformers' loss has it.

        Raises:
            MinllamaError: a number of several outputs.
        """
        if self.problem_type is None:
            return REGRESSION if n_outputs == 1 else ONE_LABEL
        if self.problem_type == REGRESSION and n_outputs > 1:
            raise MinllamaError(
                f"problem_type is {REGRESSION!r} with {n_outputs} outputs, but a regression has "
                "one; keep one row of score.weight"
            )
        return self.problem_type


def head_from_huggingface(raw: Mapping[str, Any], tensors: Collection[str]) -> SequenceHead | None:
    """The head according to config.json and the tensors' names; None for a language model.

    Args:
        raw: the content of config.json.
        tensors: the names in the weight files.

    Raises:
        MinllamaError: the kind of head is not supported, or its settings are damaged.
    """
    architecture = _architecture(raw)
    if architecture in OTHER_HEADS:
        raise MinllamaError(
            f"a {architecture}, which {OTHER_HEADS[architecture]}; minllama runs language models "
            f"(LlamaForCausalLM) and sequence classifiers ({SEQUENCE_CLASSIFIER})"
        )
    has_head = HEAD_WEIGHT in tensors
    has_words = "lm_head.weight" in tensors
    if architecture != SEQUENCE_CLASSIFIER and (not has_head or has_words):
        return None  # the loader reports a score next to a language model's head
    if architecture not in (SEQUENCE_CLASSIFIER, "LlamaForCausalLM", "LlamaModel", None):
        raise MinllamaError(
            f"a {architecture}, whose head is unknown; minllama runs language models "
            f"(LlamaForCausalLM) and sequence classifiers ({SEQUENCE_CLASSIFIER})"
        )
    if not has_head and has_words:
        return None
    return head_settings(raw)


def head_settings(raw: Mapping[str, Any]) -> SequenceHead:
    """The head settings in config.json, whether there is a head or not.

    Raises:
        MinllamaError: it is damaged.
    """
    return SequenceHead(_labels(raw), _problem_type(raw), _pad_id(raw))


def head_to_huggingface(
    labels: Collection[str], problem_type: str, pad_id: int | None
) -> dict[str, Any]:
    """The settings of a sequence classifier's head in config.json."""
    return {
        "architectures": [SEQUENCE_CLASSIFIER],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": problem_type,
        "pad_token_id": pad_id,
    }


def _architecture(raw: Mapping[str, Any]) -> str | None:
    names = raw.get("architectures")
    first = names[0] if isinstance(names, list) and names else names
    return first if isinstance(first, str) else None


def _labels(raw: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = raw.get("id2label")
    if not names:
        return None
    if not isinstance(names, dict):
        raise MinllamaError(f"id2label must be an object, not {names!r}"[:200])
    by_id = {int(key): name for key, name in names.items() if re.fullmatch("[0-9]{1,9}", key)}
    if sorted(by_id) != list(range(len(names))):
        raise MinllamaError(f"id2label must name the labels 0 to {len(names) - 1}")
    if not all(isinstance(name, str | int | float) for name in by_id.values()):
        raise MinllamaError("id2label must contain strings only")
    return tuple(str(by_id[i]) for i in range(len(names)))


def _problem_type(raw: Mapping[str, Any]) -> str | None:
    problem_type = raw.get("problem_type")
    if problem_type is not None and problem_type not in PROBLEM_TYPES:
        raise MinllamaError(
            f"problem_type is {problem_type!r}; known are {', '.join(PROBLEM_TYPES)}"[:200]
        )
    return problem_type


def _pad_id(raw: Mapping[str, Any]) -> int | None:
    pad_id = raw.get("pad_token_id")
    if pad_id is not None and not (type(pad_id) is int and abs(pad_id) < 2**31):
        raise MinllamaError(f"pad_token_id must be an integer, not {pad_id!r}"[:200])
    return pad_id
