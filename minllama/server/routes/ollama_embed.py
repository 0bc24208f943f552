"""Ollama's `/api/embed`, and its older `/api/embeddings`: texts to vectors."""

import time
from typing import Any

from fastapi import Request
from pydantic import Field

from minllama.server.inputs import ALL
from minllama.server.ollama_fields import named_model, nanoseconds
from minllama.server.routes.embeddings import Embedded, EmbeddingsBody, embed
from minllama.server.routing import Body, service_of
from minllama.server.routing import router as make_router

router = make_router()


class EmbedBody(Body):
    """Texts; longer ones than the context are truncated, unless they are not to be."""

    model: str = Field(min_length=1, max_length=512)
    input: str | list[str]
    truncate: bool | None = None
    dimensions: int | None = Field(None, ge=1, lt=2**31)
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None


class OldEmbedBody(Body):
    """A text."""

    model: str = Field(min_length=1, max_length=512)
    prompt: str
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None


@router.post("/api/embed")
async def embed_texts(request: Request, body: EmbedBody) -> dict[str, Any]:
    """A vector of length 1 of each text."""
    began = time.perf_counter()
    vectors: list[Any] = []
    n_tokens = 0
    service = service_of(request)
    service.check_accepting()
    if body.input != []:
        cuts = body.truncate is not False
        found = await _embedded(
            request, body.model, body.input, cuts=cuts, dimensions=body.dimensions
        )
        vectors, n_tokens = found.vectors, found.n_tokens
    return {
        "model": body.model,
        "embeddings": vectors,
        "total_duration": nanoseconds(time.perf_counter() - began),
        "load_duration": 0,
        "prompt_eval_count": n_tokens,
    }


@router.post("/api/embeddings")
async def embed_text(request: Request, body: OldEmbedBody) -> dict[str, Any]:
    """A vector of one text."""
    service_of(request).check_accepting()
    if not body.prompt:  # asks only for the model to be loaded
        return {"embedding": []}
    found = await _embedded(request, body.model, body.prompt, cuts=True)
    return {"embedding": found.vectors[0]}


async def _embedded(
    request: Request,
    name: str,
    texts: str | list[str],
    *,
    cuts: bool,
    dimensions: int | None = None,
) -> Embedded:
    model = named_model(service_of(request), name)
    asked = EmbeddingsBody.model_validate(
        {
            "model": model.id,
            "input": texts,
            "truncate_prompt_tokens": ALL if cuts else None,
            "truncation_side": "right" if cuts else None,
            "dimensions": dimensions,
            "encoding_format": "float",
        }
    )
    return await embed(request, model, asked)
