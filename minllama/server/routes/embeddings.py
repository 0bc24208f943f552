"""OpenAI's `/v1/embeddings`: texts to vectors, of a chosen layer and pooling.

Without a choice they are of the last layer, the mean over a text's tokens, and of length 1: what
suits a language model that was not trained for embeddings. A classifier gives the vectors that its
head reads: its layer, its pooling, its prompt. Of several heads it is the first of the deepest.
"""

import base64
from typing import Any, Literal, NamedTuple, get_args

import torch
from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import Field

from minllama.classification.embedding import LlamaEmbeddingClassifier
from minllama.classification.experts import LlamaExpertsClassifier
from minllama.classification.prompts import PromptTemplate
from minllama.engine.states import Choice, Pooling, StatesRequest
from minllama.server.errors import RequestError, out_of_range
from minllama.server.inputs import Reading, encode_inputs
from minllama.server.registry import ServedModel
from minllama.server.routes.classify import ReadingFields
from minllama.server.routing import answer, log_texts, partition, service_of
from minllama.server.routing import router as make_router

router = make_router()

DEFAULT_POOLING: Pooling = "mean"
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


class EmbeddingsBody(ReadingFields):
    """A request; what OpenAI's has besides is not looked at."""

    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, lt=2**31)
    x_layer: int | None = Field(None, ge=0, lt=2**31)
    x_pooling: Pooling | None = None
    x_normalize: bool = True


class Embedded(NamedTuple):
    """Texts as vectors.

    Attributes:
        vectors: of each text, numbers or base64 as requested.
        n_tokens: of all texts.
        layer, pooling: that they are of.
    """

    vectors: list[Any]
    n_tokens: int
    layer: int
    pooling: Pooling


@router.post("/v1/embeddings", response_model=None)
async def embeddings(request: Request, body: EmbeddingsBody) -> JSONResponse:
    """A vector of each text."""
    service = service_of(request)
    service.check_accepting()
    model = service.registry.get(body.model)
    found = await embed(request, model, body)
    return JSONResponse(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": vector}
                for i, vector in enumerate(found.vectors)
            ],
            "model": body.model or model.id,
            "usage": {"prompt_tokens": found.n_tokens, "total_tokens": found.n_tokens},
            "x_layer": found.layer,
            "x_pooling": found.pooling,
        }
    )


async def embed(request: Request, model: ServedModel, body: EmbeddingsBody) -> Embedded:
    """The vectors of a request; for routes of other protocols too.

    Raises:
        MinllamaError: an input cannot be read, a choice is not possible, or the queue is full.
    """
    service = service_of(request)
    config, salt = model.llama.config, partition(request)
    own_layer, own_pooling = _own_choice(model)
    layer = own_layer if body.x_layer is None else body.x_layer
    if layer > config.n_layers:
        raise out_of_range("x_layer", layer, f"between 0 and {config.n_layers}")
    if body.dimensions not in (None, config.dim):
        raise RequestError(
            f"dimensions: vectors of this model have {config.dim}, and shortened ones would mean "
            "nothing; omit it",
            param="dimensions",
        )
    pooling = body.x_pooling or own_pooling
    prompts = await encode_inputs(service, model, body.inputs(service), _reading(model, body))
    log_texts(request, input=body.input)
    choices = ((layer, pooling),)
    head = model.classifier if isinstance(model.classifier, LlamaEmbeddingClassifier) else None
    if head is None:
        requests = [StatesRequest(ids=p.ids, choices=choices, salt=salt) for p in prompts]
    else:
        # The head says which token is a text's last one.
        last = [getattr(head.request_of(p), "last", None) for p in prompts]
        requests = [
            StatesRequest(ids=p.ids, choices=choices, last=at, salt=salt)
            for p, at in zip(prompts, last, strict=True)
        ]
    job = service.submit(model, requests)
    results = await answer(request, job, job.results())
    shown = await service.in_thread(_shown, results, body)
    return Embedded(shown, sum(map(len, prompts)), layer, pooling)


def _own_choice(model: ServedModel) -> Choice:
    """What is read where a request names no layer and no pooling."""
    classifier = model.classifier
    if isinstance(classifier, LlamaEmbeddingClassifier):
        return classifier.layer, classifier.pooling
    if isinstance(classifier, LlamaExpertsClassifier) and classifier.choices:
        return max(classifier.choices, key=lambda choice: choice[0])
    return model.llama.config.n_layers, DEFAULT_POOLING


def _reading(model: ServedModel, body: EmbeddingsBody) -> Reading:
    """A classifier's prompt around each text, or the texts as they are."""
    if model.classifier is not None:
        return body.reading(model.classifier)
    side = body.truncation_side
    return Reading(
        PromptTemplate("{text}", model.tokenizer, max_len=model.context_len),
        body.truncate_prompt_tokens,
        None if side is None else side == "left",
        has_special=body.add_special_tokens,
    )


@torch.inference_mode()
def _shown(results: list[list[torch.Tensor]], body: EmbeddingsBody) -> list[Any]:
    """Vectors as numbers, or as little-endian float32 in base64, which OpenAI's client asks for."""
    vectors = torch.stack([vector for (vector,) in results]).float()
    if body.x_normalize:
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
    rows = vectors.cpu().numpy().astype("<f4")
    if body.encoding_format == "base64":
        return [base64.b64encode(row.tobytes()).decode() for row in rows]
    listed: list[Any] = rows.tolist()
    return listed
