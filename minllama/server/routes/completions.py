"""OpenAI's `/v1/completions`: prompts as texts or token ids, continued."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from minllama.engine.log_probs import LogProbsRequest
from minllama.generation.sequence_text import PromptLogprob, TokenLogprob, prompt_logprobs
from minllama.options import GenerationOptions
from minllama.server.errors import RequestError
from minllama.server.openai_fields import (
    SamplingFields,
    TokenId,
    alternatives_of,
    check_ids,
    new_id,
    shown_logprob,
    shown_token,
    usage_in_event,
    usage_in_tokens,
    usage_of,
)
from minllama.server.registry import ServedModel
from minllama.server.routing import (
    JSON_OR_EVENTS,
    answer,
    check_count,
    check_range,
    event_stream,
    log_texts,
    partition,
    service_of,
    sse,
)
from minllama.server.routing import router as make_router
from minllama.server.service import Service
from minllama.server.texts import Texts, check_length, encode, generate, generation_options
from minllama.tokenizer.tokenizer import Tokenizer

router = make_router()

MAX_NEW_TOKENS = 16  # OpenAI's, where a request does not say
DONE = b"data: [DONE]\n\n"


class CompletionBody(SamplingFields):
    """A request; what OpenAI's has besides is not looked at."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    logprobs: int | None = Field(None, ge=0, lt=2**31)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, lt=2**31)
    suffix: str | None = None


@router.post("/v1/completions", response_model=None, responses=JSON_OR_EVENTS)
async def completions(request: Request, body: CompletionBody) -> Response:
    """Continue one prompt, or several."""
    service = service_of(request)
    service.check_accepting()
    model = service.registry.get(body.model).generative()
    options = _options(service, model, body)
    prompts = await _prompts(service, model, body)
    n_texts = len(prompts) * options.n
    check_count("prompt", n_texts, service.options.max_inputs)
    log_texts(request, prompt=body.prompt)
    echoed = await _echoed(request, model, body, prompts) if body.echo else None
    shape = _Shape(model, body, options, echoed)
    if body.max_tokens == 0:
        return _only_echoed(shape, body, prompts, options.n)
    texts = await generate(service, model, prompts, options, salt=partition(request))
    if body.stream:
        return event_stream(_events(shape, texts, body), texts.job)
    results = await answer(request, texts.job, texts.whole())
    log_texts(request, answer=[result.text for result in results])
    choices = [
        shape.choice(row, result.text, result.finish_reason, result.logprobs, is_first=True)
        for row, result in enumerate(results)
    ]
    return JSONResponse({**shape.head(), "choices": choices, "usage": usage_of(texts)})


def _options(service: Service, model: ServedModel, body: CompletionBody) -> GenerationOptions:
    given = body.given(service, model)
    check_range("logprobs", body.logprobs, 0, service.options.max_logprobs)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("best_of must equal n: every text is returned", param="best_of")
    if body.suffix:
        raise RequestError("suffix is not possible: text is only continued", param="suffix")
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens must be 1 or more, unless echo is true", param="max_tokens")
    given |= {"max_new_tokens": body.max_tokens or None, "logprobs": body.logprobs}
    return generation_options(model, given, max_new_tokens=MAX_NEW_TOKENS)


async def _prompts(service: Service, model: ServedModel, body: CompletionBody) -> list[list[int]]:
    """Token ids of each prompt."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [await encode(service, model, prompt)]
    check_count("prompt", len(prompt), max(service.options.max_inputs, model.context_len))
    listed: Sequence[Any] = prompt
    if isinstance(prompt[0], int):
        listed = [prompt]
    check_count("prompt", len(listed), service.options.max_inputs)
    found = []
    for entry in listed:
        if isinstance(entry, str):
            found.append(await encode(service, model, entry))
        else:
            check_ids("prompt", entry, model)
            check_length(service, model, len(entry))
            found.append(list(entry))
    return found


class _Echo(NamedTuple):
    """A prompt that stands before its continuations.

    Attributes:
        text: of it.
        logprobs: of its tokens, where they are requested.
    """

    text: str
    logprobs: Sequence[PromptLogprob] = ()


async def _echoed(
    request: Request, model: ServedModel, body: CompletionBody, prompts: list[list[int]]
) -> list[_Echo]:
    """The prompts as they are echoed, and how likely their tokens were.

    Raises:
        MinllamaError: a token has no text; the queue is full, or the server is ending.
    """
    service, words = service_of(request), model.tokenizer
    texts = [_text_of(ids, body.prompt, i, words) for i, ids in enumerate(prompts)]
    if body.logprobs is None:
        return [_Echo(text) for text in texts]
    requests = [
        LogProbsRequest(
            ids=tuple(ids),
            top=body.logprobs,
            n_tokens=words.vocab_size,
            salt=partition(request),
            name="the prompt",
        )
        for ids in prompts
    ]
    job = service.submit(model, requests)
    found = await answer(request, job, job.results())
    return [
        _Echo(text, prompt_logprobs(words, ids, some, skip_special=_is_text(body.prompt, i)))
        for i, (text, ids, some) in enumerate(zip(texts, prompts, found, strict=True))
    ]


def _only_echoed(
    shape: "_Shape", body: CompletionBody, prompts: list[list[int]], n: int
) -> Response:
    """The answer to a request for no new tokens."""
    rows = range(len(prompts) * n)
    choices = [shape.choice(row, "", "length", (), is_first=True) for row in rows]
    n_tokens = sum(map(len, prompts))
    content = {**shape.head(), "choices": choices, "usage": usage_in_tokens(n_tokens)}
    if not body.stream:
        return JSONResponse(content)
    if not body.has_usage:
        del content["usage"]
    return Response(sse(content) + DONE, media_type="text/event-stream")


class _Shape:
    """The parts of one request's answer."""

    def __init__(
        self,
        model: ServedModel,
        body: CompletionBody,
        options: GenerationOptions,
        echoed: list[_Echo] | None,
    ) -> None:
        self._tokenizer, self._name = model.tokenizer, body.model or model.id
        self._id, self._created = new_id("cmpl"), int(time.time())
        self._logprobs, self._n = options.logprobs, options.n
        self._echoed = echoed

    def head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._name,
            "system_fingerprint": None,
        }

    def choice(
        self,
        row: int,
        text: str,
        reason: str | None,
        logprobs: Sequence[TokenLogprob] | None,
        *,
        is_first: bool,
    ) -> dict[str, Any]:
        """A choice, whole or a part of it."""
        echo = _Echo("") if self._echoed is None else self._echoed[row // self._n]
        shown = None
        if self._logprobs is not None and logprobs is not None:
            shown = logprobs_of(logprobs, self._tokenizer, len(echo.text))
            if is_first and echo.logprobs:
                of_prompt = logprobs_of(echo.logprobs, self._tokenizer)
                shown = {name: [*of_prompt[name], *shown[name]] for name in shown}
        return {
            "index": row,
            "text": echo.text + text if is_first else text,
            "logprobs": shown,
            "finish_reason": reason,
        }


def _is_text(prompt: Any, number: int) -> bool:
    """Whether a prompt was given as text, not as token ids."""
    return isinstance(prompt, str) or isinstance(prompt[number], str)


def _text_of(ids: list[int], prompt: Any, number: int, tokenizer: Tokenizer) -> str:
    """A prompt as it was given, or what its ids spell."""
    if _is_text(prompt, number):
        return prompt if isinstance(prompt, str) else str(prompt[number])
    return tokenizer.decode(ids, skip_special=False)


def logprobs_of(
    tokens: Sequence[PromptLogprob], tokenizer: Tokenizer, offset: int = 0
) -> dict[str, list[Any]]:
    """Log-probabilities in the form of completions; null for a token that nothing foretells.

    Args:
        tokens: in order.
        tokenizer: of the model.
        offset: of their text in the choice's text.
    """
    top: list[dict[str, float] | None] = []
    for token in tokens:
        if token.logprob is None:
            top.append(None)
            continue
        likely = {shown_token(spelled): p for spelled, p in alternatives_of(token, tokenizer)}
        likely.setdefault(shown_token(token.bytes), shown_logprob(token.logprob))
        top.append(likely)
    return {
        "tokens": [shown_token(token.bytes) for token in tokens],
        "token_logprobs": [
            None if token.logprob is None else shown_logprob(token.logprob) for token in tokens
        ],
        "top_logprobs": top,
        "text_offset": [offset + token.offset for token in tokens],
    }


async def _events(shape: _Shape, texts: Texts, body: CompletionBody) -> AsyncIterator[bytes]:
    begun: set[int] = set()
    head = shape.head()
    async for pieces in texts.pieces():
        for piece in pieces:
            is_first = piece.row not in begun
            if not (piece.text or piece.finish_reason or piece.logprobs or is_first):
                continue
            begun.add(piece.row)
            choice = shape.choice(
                piece.row, piece.text, piece.finish_reason, piece.logprobs, is_first=is_first
            )
            yield sse({**head, **usage_in_event(body, texts), "choices": [choice]})
    if body.has_usage:
        yield sse({**head, "choices": [], "usage": usage_of(texts)})
    yield DONE
