"""vLLM's `/classify`: texts to labels and probabilities, by a trained classifier or by label words.

Fields that vLLM does not have: `labels`, `label_words`, `prompt`, `score` and `prior_strength` for
label words on a language model, `explain`, and answers beginning with `x_`.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from pydantic import Field

from minllama.classification.base import Classifier
from minllama.classification.decisions.decide import label_mass
from minllama.classification.explain import ExplanationPlan, plan
from minllama.classification.zero_shot import LlamaZeroShotClassifier
from minllama.options import ExplainOptions
from minllama.server.classifying import Scored, score, usage_of
from minllama.server.errors import RequestError
from minllama.server.inputs import ALL, Ids, Reading, as_list, encode_inputs
from minllama.server.openai_fields import TokenId, new_id
from minllama.server.registry import ServedModel
from minllama.server.routing import Body, check_count, log_texts, service_of
from minllama.server.routing import router as make_router
from minllama.server.service import Service

router = make_router()

MAX_EXPLAINED_CHARS = 2**16
MAX_LABEL_CHARS = 1024
Score = Literal["sum", "token-mean", "byte-mean", "pmi", "contextual"]


class ReadingFields(Body):
    """Fields of what is to be read, in vLLM's words."""

    model: str | None = Field(None, max_length=512)
    input: str | list[str] | list[TokenId] | list[list[TokenId]]
    truncate_prompt_tokens: int | None = Field(None, ge=ALL, lt=2**31)
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool = True

    def inputs(self, service: Service) -> Sequence[str | Ids]:
        """The texts or token ids.

        Raises:
            RequestError: there are none, or too many.
        """
        inputs = as_list(self.input)
        check_count("input", len(inputs), service.options.max_inputs)
        if self.truncate_prompt_tokens == 0:
            raise RequestError(
                "truncate_prompt_tokens must be -1 or at least 1", param="truncate_prompt_tokens"
            )
        return inputs

    def reading(self, classifier: Classifier) -> Reading:
        """How a classifier reads them; one that was trained on truncated texts goes on so."""
        most = self.truncate_prompt_tokens
        if most is None and classifier.prompt.max_len is not None:
            most = ALL
        side = self.truncation_side
        return Reading(
            classifier.template,
            most,
            None if side is None else side == "left",
            undo_treebank=classifier.prompt.undo_treebank,
            has_special=self.add_special_tokens,
        )


class ExplainFields(Body):
    """What is to be explained: a label (the predicted one), by how many words at most."""

    target: str | None = None
    max_words: int = Field(default=ExplainOptions.max_words, ge=1, le=10_000)


class ClassifyBody(ReadingFields):
    """A request; what vLLM's has besides is not looked at."""

    explain: bool | ExplainFields = False

    use_activation: bool | None = None
    activation: bool | None = None
    softmax: bool | None = None
    labels: list[str] | None = None
    label_words: list[str] | None = None
    prompt: str | None = Field(None, max_length=2**16)
    score: Score | None = None
    prior_strength: float | None = Field(None, ge=0, le=2)

    @property
    def gives_probabilities(self) -> bool:
        """By `use_activation`, or by one of its older names."""
        given = (self.use_activation, self.activation, self.softmax)
        return next((value for value in given if value is not None), True)


@router.post("/classify", response_model=None)
@router.post("/v1/classify", response_model=None)
async def classify(request: Request, body: ClassifyBody) -> JSONResponse:
    """Labels and probabilities of one text, or of several."""
    service = service_of(request)
    service.check_accepting()
    model, classifier = await _classifier(service, body)
    inputs = body.inputs(service)
    if classifier.reads_words and not all(isinstance(given, str) for given in inputs):
        raise RequestError(
            f"{model.id} reads words beside token ids: give texts, not token ids", param="input"
        )
    prompts = await encode_inputs(service, model, inputs, body.reading(classifier))
    log_texts(request, input=body.input)
    plans = await _plans(service, classifier, inputs, body)
    if plans:
        prompts = [prompt for plan in plans for prompt in plan.prompts]
    scored = await score(request, model, classifier, prompts)
    usage = usage_of(scored)
    explanations = []
    if plans:
        ends = list(accumulate(len(plan.prompts) for plan in plans))
        parts = np.split(scored.logits, ends[:-1])
        explanations = await service.in_thread(_explained, plans, parts)
        starts = [0, *ends[:-1]]
        prompts = [prompts[start] for start in starts]
        scored = replace(scored, logits=scored.logits[starts], prompts=prompts)
    data = _data(scored, gives_probabilities=body.gives_probabilities)
    for entry, explanation in zip(data, explanations, strict=bool(plans)):
        entry["x_explanation"] = explanation
    log_texts(request, answer=[entry["label"] for entry in data])
    is_trained = model.classifier is not None
    return JSONResponse(
        {
            "id": new_id("classify"),
            "object": "list",
            "created": int(time.time()),
            "model": body.model or model.id,
            "data": data,
            "usage": usage,
            "x_classes": list(classifier.labels),
            "x_method": "classifier" if is_trained else "label-words",
            "x_calibration": model.calibration if is_trained else {"is_calibrated": False},
        }
    )


async def _classifier(service: Service, body: ClassifyBody) -> tuple[ServedModel, Classifier]:
    """The classifier that a request means, or one of its own label words."""
    registry, labels = service.registry, body.labels
    model = registry.get(body.model)
    if body.model is None:
        model = registry.first("classifier" if labels is None else "generative") or model
    if model.classifier is not None:
        for name in ("labels", "label_words", "prompt", "score", "prior_strength"):
            if getattr(body, name) is not None:
                raise RequestError(
                    f"{name} is for a language model; {model.id} is a classifier with labels of "
                    "its own",
                    param=name,
                )
        return model, model.classifier
    if labels is None:
        raise RequestError(
            f"{model.id} is a language model: give labels, or name a classifier", param="labels"
        )
    check_count("labels", len(labels), service.options.max_labels, 2)
    longest = max(map(len, (*labels, *(body.label_words or ()))))
    if longest > MAX_LABEL_CHARS:
        raise RequestError(
            f"labels of at most {MAX_LABEL_CHARS} characters, not {longest}", param="labels"
        )
    made = await service.in_thread(
        LlamaZeroShotClassifier,
        *(model.llama, model.tokenizer, labels, body.prompt),
        label_words=body.label_words,
        score=body.score or "sum",
        prior_strength=1.0 if body.prior_strength is None else body.prior_strength,
    )
    return model, made


async def _plans(
    service: Service, classifier: Classifier, inputs: Sequence[str | Ids], body: ClassifyBody
) -> list[ExplanationPlan]:
    """What has to be read to explain each prediction; nothing where that is not requested."""
    if not body.explain:
        return []
    fields = ExplainFields() if body.explain is True else body.explain
    texts = [given for given in inputs if isinstance(given, str)]
    if len(texts) < len(inputs):
        raise RequestError("explain needs texts, not token ids", param="explain")
    if (longest := max(map(len, texts))) > MAX_EXPLAINED_CHARS:
        raise RequestError(
            f"explain reads texts of at most {MAX_EXPLAINED_CHARS} characters, not {longest}",
            param="explain",
        )
    if body.truncate_prompt_tokens not in (None, ALL) or body.truncation_side is not None:
        raise RequestError(
            "explain reads texts as they are, or truncated by the model's own limit: "
            "truncate_prompt_tokens may be -1",
            param="explain",
        )

    def make() -> list[ExplanationPlan]:
        made = [
            plan(classifier, text, target=fields.target, max_words=fields.max_words)
            for text in texts
        ]
        classifier.shortened.clear()  # a server would remember every text
        return made

    plans = await service.in_thread(make)
    n_prompts, most = sum(len(each.prompts) for each in plans), service.options.max_inputs
    if n_prompts > most:
        raise RequestError(
            f"explain: {n_prompts} texts without a word, and at most {most} are possible; give "
            "fewer texts, or a smaller max_words",
            param="explain",
        )
    return plans


def _explained(
    plans: Sequence[ExplanationPlan], logits: Sequence[NDArray[np.float32]]
) -> list[dict[str, Any]]:
    return [plan.explanation(some).to_dict() for plan, some in zip(plans, logits, strict=True)]


def _data(scored: Scored, *, gives_probabilities: bool) -> list[dict[str, Any]]:
    """An entry for each text.

    Of a classifier with several labels a text `label` is the most likely of those that are
    predicted, and null where none is; of a regression it is null, and `probs` is the number.
    """
    classifier = scored.classifier
    if classifier.scale is not None:
        numbers = scored.values if gives_probabilities else scored.logits[:, 0]
        rows: list[dict[str, Any]] = [
            {"index": i, "label": None, "probs": [float(value)], "num_classes": 1}
            for i, value in enumerate(numbers)
        ]
    else:
        shown = scored.probabilities if gives_probabilities else scored.logits
        rows = []
        for i, (values, chosen) in enumerate(zip(shown.tolist(), scored.chosen, strict=True)):
            by_label = dict(zip(classifier.labels, values, strict=True))
            label = max(chosen, key=by_label.__getitem__, default=None)
            rows.append({"index": i, "label": label, "probs": values, "num_classes": len(values)})
            if classifier.multi_label:
                rows[-1]["x_labels"] = list(chosen)
    for row, prompt in zip(rows, scored.prompts, strict=True):
        if prompt.is_shortened:
            row["x_truncated"] = True
    if isinstance(classifier, LlamaZeroShotClassifier) and classifier.score == "sum":
        for row, scores, prompt in zip(rows, scored.logits, scored.prompts, strict=True):
            row["x_label_mass"] = label_mass(scores.astype("float64"), prompt.continuations)
    return rows
