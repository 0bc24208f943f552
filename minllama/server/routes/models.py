"""The list of models, for clients of OpenAI and of System One at once."""

from typing import Any

from fastapi import Request

from minllama.server.registry import ServedModel
from minllama.server.routing import router as make_router
from minllama.server.routing import service_of

router = make_router()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """What is served, under the keys of both protocols."""
    models = list(service_of(request).registry.models.values())
    return {
        "object": "list",
        "data": [_entry(model) for model in models],
        "models": [
            {"name": m.id, "description": m.description, "release_date": m.released} for m in models
        ],
    }


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> dict[str, Any]:
    """One model."""
    return _entry(service_of(request).registry.get(model))


def _entry(model: ServedModel) -> dict[str, Any]:
    entry = {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "minllama",
        "max_model_len": model.context_len,
        "x_kind": model.kind,
    }
    if model.classifier is not None:
        return {**entry, "x_classes": list(model.classifier.labels)}
    return {**entry, "x_has_chat_template": model.tokenizer.chat_template is not None}
