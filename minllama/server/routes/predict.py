"""text-embeddings-inference's `/predict`: texts to the scores of a classifier's labels, falling."""

from typing import Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import Field

from minllama.server.classifying import Scored, score
from minllama.server.errors import EMPTY, RequestError
from minllama.server.inputs import ALL, Reading, encode_inputs
from minllama.server.registry import ServedModel
from minllama.server.routing import Body, log_texts, service_of
from minllama.server.routing import router as make_router
from minllama.server.service import Service

router = make_router()


class PredictBody(Body):
    """A request: a text, a pair of texts, or a list of lists of one or two texts.

    `model` is ours; without it the first classifier answers.
    """

    inputs: str | list[str] | list[list[str]]
    truncate: bool | None = None
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = None
    raw_scores: bool = False
    model: str | None = Field(None, max_length=512)


@router.post(
    "/predict",
    response_model=None,
    responses={
        422: {"description": "A text cannot be read, or the request is not as it must be."},
        424: {"description": "The model is no classifier."},
    },
)
async def predict(request: Request, body: PredictBody) -> JSONResponse:
    """Scores of labels: a list for one text or one pair, a list of lists for several."""
    service = service_of(request)
    service.check_accepting()
    model = _model(service, body)
    assert model.classifier is not None
    classifier = model.classifier
    texts, is_batch = _texts(service, body)
    is_cut = body.truncate or (body.truncate is None and classifier.prompt.max_len is not None)
    side = body.truncation_direction
    reading = Reading(
        classifier.template,
        ALL if is_cut else None,
        None if side is None else side.lower() == "left",
        undo_treebank=classifier.prompt.undo_treebank,
        param="inputs",
    )
    prompts = await encode_inputs(service, model, texts, reading)
    log_texts(request, inputs=body.inputs)
    scored = await score(request, model, classifier, prompts)
    found = _predictions(scored, is_raw=body.raw_scores)
    log_texts(request, answer=found)
    return JSONResponse(found if is_batch else found[0])


def _model(service: Service, body: PredictBody) -> ServedModel:
    registry = service.registry
    if body.model is not None:
        model = registry.get(body.model)
    else:
        model = registry.first("classifier") or registry.get()
    if model.classifier is None:
        raise RequestError(
            f"{model.id} is a language model, not a classifier; /classify takes labels for it",
            status=424,
            param="model",
        )
    return model


def _texts(service: Service, body: PredictBody) -> tuple[list[str], bool]:
    """The texts, a pair as one of two lines, and whether they were given as a batch."""
    given = body.inputs
    is_batch = isinstance(given, list) and bool(given) and isinstance(given[0], list)
    listed: list[Any] = list(given) if is_batch else [[given] if isinstance(given, str) else given]
    most = service.options.max_inputs
    if len(listed) > most:
        raise RequestError(
            f"inputs: a batch of {len(listed)}, and at most {most} are possible",
            status=413,
            param="inputs",
        )
    for parts in listed:
        if not 1 <= len(parts) <= 2:
            raise RequestError(
                "inputs must be a text, a pair of texts, or a list of lists of one or two texts",
                status=422,
                param="inputs",
            )
        if not any(parts):
            message = "inputs must not be empty"
            raise RequestError(message, status=400, param="inputs", code=EMPTY)
    return ["\n".join(parts) for parts in listed], is_batch


def _predictions(scored: Scored, *, is_raw: bool) -> list[list[dict[str, Any]]]:
    """Of each text its labels, the most likely first; of a regression its number."""
    labels = scored.classifier.labels
    if is_raw:
        rows = scored.logits.tolist()
    elif scored.classifier.scale is not None:
        rows = [[float(value)] for value in scored.values]
    else:
        rows = scored.probabilities.tolist()
    return [
        sorted(
            ({"score": value, "label": label} for label, value in zip(labels, row, strict=True)),
            key=lambda entry: -entry["score"],
        )
        for row in rows
    ]
