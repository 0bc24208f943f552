"""OpenAI's `/v1/completions`: prompts as texts or token ids, continued."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from minllama.engine.log_probs import LogProbsRequest, TokenLogProb
from minllama.generation.sequence_text import TokenLogprob
from minllama.options import GenerationOptions
from minllama.server.errors import RequestError
from minllama.server.openai_fields import (
    SamplingFields,
    TokenId,
    check_ids,
    new_id,
    shown_logprob,
    shown_token,
    usage_of,
)
from minllama.server.registry import ServedModel
from minllama.server.routing import (
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

COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
_Columns = dict[str, list[Any]]
MAX_NEW_TOKENS = 16  # OpenAI's, where a request does not say


class CompletionBody(SamplingFields):
    """A request; what OpenAI's has besides is not looked at."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    logprobs: int | None = Field(None, ge=0, lt=2**31)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, lt=2**31)
    suffix: str | None = None


@router.post("/v1/completions", response_model=None)
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
    shape = _Shape(model, body, options, prompts)
    if body.echo and body.logprobs is not None:
        await shape.score_prompts(request, model)
    if body.max_tokens == 0:
        return shape.prompts_alone()
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
    if body.max_tokens == 0 and (not body.echo or body.stream):
        message = "max_tokens must be 1 or more, or 0 with echo and without stream"
        raise RequestError(message, param="max_tokens")
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


class _Shape:
    """The parts of one request's answer."""

    def __init__(
        self,
        model: ServedModel,
        body: CompletionBody,
        options: GenerationOptions,
        prompts: list[list[int]],
    ) -> None:
        self._tokenizer, self._name = model.tokenizer, body.model or model.id
        self._id, self._created = new_id("cmpl"), int(time.time())
        self._logprobs, self._n, self._prompts = options.logprobs, options.n, prompts
        self._echoed, self._of_prompts = [""] * len(prompts), list[_Columns]()
        self._are_texts = isinstance(body.prompt, str) or isinstance(body.prompt[0], str)
        if body.echo:
            texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
            self._echoed = [
                str(texts[i])
                if self._are_texts
                else model.tokenizer.decode(ids, skip_special=False)
                for i, ids in enumerate(prompts)
            ]

    async def score_prompts(self, request: Request, model: ServedModel) -> None:
        """Ask how likely the tokens of the prompts are, for `choice` to tell."""
        top, n_tokens = self._logprobs or 0, self._tokenizer.vocab_size
        salt = partition(request)
        requests = [
            LogProbsRequest(ids=tuple(ids), top=top, n_tokens=n_tokens, salt=salt)
            for ids in self._prompts
        ]
        job = service_of(request).submit(model, requests)
        for ids, found in zip(
            self._prompts, await answer(request, job, job.results()), strict=True
        ):
            self._of_prompts.append(self._columns(ids, found))

    def _columns(self, ids: list[int], found: Sequence[TokenLogProb]) -> "_Columns":
        """Log-probabilities of a prompt; nothing is said of its first token."""
        decoder = self._tokenizer.stream_decoder(continuation=False, skip_special=self._are_texts)
        columns: _Columns = {name: [] for name in COLUMNS}
        offset = 0
        for token_id, expected in zip(ids, (None, *found), strict=True):
            token = shown_token(self._tokenizer.token_bytes(token_id))
            columns["tokens"].append(token)
            columns["text_offset"].append(offset)
            offset += len(decoder.push(token_id))
            if expected is None:
                columns["token_logprobs"].append(None)
                columns["top_logprobs"].append(None)
                continue
            columns["token_logprobs"].append(shown_logprob(expected.logprob))
            top = likely_tokens(expected.alternatives, self._tokenizer)
            top.setdefault(token, shown_logprob(expected.logprob))
            columns["top_logprobs"].append(top)
        return columns

    def prompts_alone(self) -> JSONResponse:
        """The answer where nothing is to be generated."""
        rows = range(len(self._prompts) * self._n)
        choices = [self.choice(row, "", "length", (), is_first=True) for row in rows]
        n_tokens = sum(map(len, self._prompts))
        usage = {"prompt_tokens": n_tokens, "completion_tokens": 0, "total_tokens": n_tokens}
        return JSONResponse({**self.head(), "choices": choices, "usage": usage})

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
        prompt = row // self._n
        before, shown = self._echoed[prompt], None
        if self._logprobs is not None and logprobs is not None:
            shown = logprobs_of(logprobs, self._tokenizer, len(before))
            if self._of_prompts and is_first:
                of_prompt = self._of_prompts[prompt]
                shown = {name: [*of_prompt[name], *shown[name]] for name in COLUMNS}
        return {
            "index": row,
            "text": before + text if is_first else text,
            "logprobs": shown,
            "finish_reason": reason,
        }


def logprobs_of(tokens: Sequence[TokenLogprob], tokenizer: Tokenizer, offset: int = 0) -> _Columns:
    """Log-probabilities in the form of completions.

    Args:
        tokens: in order.
        tokenizer: of the model.
        offset: of the generated text in the choice's text.
    """
    top = []
    for token in tokens:
        likely = likely_tokens(token.alternatives, tokenizer)
        likely.setdefault(shown_token(token.bytes), shown_logprob(token.logprob))
        top.append(likely)
    return {
        "tokens": [shown_token(token.bytes) for token in tokens],
        "token_logprobs": [shown_logprob(token.logprob) for token in tokens],
        "top_logprobs": top,
        "text_offset": [offset + token.offset for token in tokens],
    }


def likely_tokens(
    alternatives: Sequence[tuple[int, float]], tokenizer: Tokenizer
) -> dict[str, float]:
    """Alternatives by their texts; of tokens that look alike the most likely one."""
    found: dict[str, float] = {}
    for token_id, logprob in alternatives:
        found.setdefault(shown_token(tokenizer.token_bytes(token_id)), shown_logprob(logprob))
    return found


async def _events(shape: _Shape, texts: Texts, body: CompletionBody) -> AsyncIterator[bytes]:
    begun: set[int] = set()
    head = {**shape.head(), **({"usage": None} if body.has_usage else {})}
    async for pieces in texts.pieces():
        for piece in pieces:
            is_first = piece.row not in begun
            if not (piece.text or piece.finish_reason or piece.logprobs or is_first):
                continue
            begun.add(piece.row)
            choice = shape.choice(
                piece.row, piece.text, piece.finish_reason, piece.logprobs, is_first=is_first
            )
            yield sse({**head, "choices": [choice]})
    if body.has_usage:
        yield sse({**head, "choices": [], "usage": usage_of(texts)})
    yield b"data: [DONE]\n\n"
