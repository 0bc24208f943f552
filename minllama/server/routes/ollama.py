"""Ollama's `/api/generate` and `/api/chat`: lines of JSON, or one object."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from minllama.generation.api import encode_prompt
from minllama.generation.tool_calls import ToolCall
from minllama.options import GenerationOptions
from minllama.server.chat_turn import Part, Tools, Turn, begin_turn, chosen_tools
from minllama.server.errors import RequestError
from minllama.server.ollama_fields import OllamaBody, figures, model_of, timestamp
from minllama.server.openai_fields import TokenId, check_ids
from minllama.server.registry import ServedModel
from minllama.server.routes.chat import logprobs_of
from minllama.server.routing import (
    JSON_OR_LINES,
    Body,
    answer,
    line_stream,
    log_texts,
    ndjson,
    partition,
    refuse_fields,
    service_of,
)
from minllama.server.routing import router as make_router
from minllama.server.service import Service
from minllama.server.texts import check_length, encode_chat, generate

router = make_router()


class GenerateBody(OllamaBody):
    """A text to reply to, or, where it is raw, to continue."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    context: list[TokenId] | None = None
    suffix: str | None = None
    template: str | None = None
    images: Any = None

    def check_supported(self) -> None:
        """Refuse what would change the text and is not done here.

        Raises:
            RequestError: there is such a field.
        """
        remedies = {
            "suffix": "text is only continued",
            "template": "the template is the model's own; raw: true reads a prompt as it is",
            "images": "only texts are read",
        }
        refuse_fields(self, remedies)
        if self.raw and (self.system or self.context):
            raise RequestError("raw excludes system and context: a raw prompt holds all of it")


class Function(Body):
    """A function that the model has called; its arguments are an object."""

    name: str = Field(max_length=64)
    arguments: dict[str, Any] | str | None = None


class Call(Body):
    """A call that the model has made."""

    id: str | None = None
    function: Function


class OllamaMessage(Body):
    """A message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Any = None
    tool_calls: list[Call] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None

    def plain(self, place: int) -> dict[str, Any]:
        """It in OpenAI's shape, for a template."""
        if self.images:
            param = f"messages.{place}.images"
            raise RequestError(f"{param} is not supported: only texts are read", param=param)
        role = "system" if self.role == "developer" else self.role
        plain: dict[str, Any] = {"role": role, "content": self.content or ""}
        if self.tool_calls:
            plain["tool_calls"] = [
                {"type": "function", **call.model_dump(exclude_none=True)}
                for call in self.tool_calls
            ]
        others = {
            "name": self.tool_name,
            "tool_call_id": self.tool_call_id,
            "thinking": self.thinking,
        }
        plain |= {name: value for name, value in others.items() if value is not None}
        return plain


class ChatBody(OllamaBody):
    """Messages to reply to."""

    messages: list[OllamaMessage] | None = None
    tools: list[dict[str, Any]] | None = None


@router.post("/api/generate", response_model=None, responses=JSON_OR_LINES)
async def generate_text(request: Request, body: GenerateBody) -> Response:
    """Reply to a prompt, or continue it."""
    began, service = time.perf_counter(), service_of(request)
    service.check_accepting()
    model = model_of(service, body.model)
    body.check_supported()
    options = body.generation_options(service, model)
    shape = _Shape(model, body, began, is_chat=False)
    if not body.prompt and not body.system:
        return _loaded(shape, body)
    ids = await _prompt_ids(service, model, body)
    texts = await generate(
        *(service, model, [ids], options), salt=partition(request), schema_name="format"
    )
    log_texts(request, prompt=body.prompt)
    return await _answer(request, shape, Turn(texts, Tools()), body)


@router.post("/api/chat", response_model=None, responses=JSON_OR_LINES)
async def chat(request: Request, body: ChatBody) -> Response:
    """Reply to messages."""
    began, service = time.perf_counter(), service_of(request)
    service.check_accepting()
    model = model_of(service, body.model)
    options: GenerationOptions = body.generation_options(service, model)
    tools = chosen_tools(service, body.tools)
    shape = _Shape(model, body, began, is_chat=True)
    if not body.messages:
        return _loaded(shape, body)
    messages = [message.plain(place) for place, message in enumerate(body.messages)]
    turn = await begin_turn(
        *(service, model, messages, options),
        tools=tools,
        salt=partition(request),
        schema_name="format",
    )
    log_texts(request, messages=messages)
    return await _answer(request, shape, turn, body)


async def _prompt_ids(service: Service, model: ServedModel, body: GenerateBody) -> list[int]:
    """Token ids of a prompt: in the model's template, unless it is raw or there is none.

    What a raw prompt spells of special tokens are these: its writer stands in for the template.
    """
    text, words = body.prompt or "", model.tokenizer
    if body.raw or words.chat_template is None:
        if body.system:
            raise RequestError(f"{model.id} has no chat template, and so no system", param="system")
        ids = await service.in_thread(
            *(encode_prompt, text, words, model.context_len), special=bool(body.raw)
        )
    else:
        messages = [{"role": "user", "content": text}]
        if body.system:
            messages.insert(0, {"role": "system", "content": body.system})
        ids = await encode_chat(service, model, messages)
    if body.context:
        check_ids("context", body.context, model)
        begins = ids[:1] == [words.bos_id] and words.add_bos
        ids = body.context + ids[begins:]
    check_length(service, model, len(ids))
    return ids


def _loaded(shape: "_Shape", body: OllamaBody) -> Response:
    """The answer to an empty prompt, which asks only for the model to be loaded, or given up."""
    reason = "unload" if body.unloads else "load"
    content = {**shape.piece(Part(0)), "done": True, "done_reason": reason}
    if not body.is_streamed:
        return JSONResponse(content)
    return Response(ndjson(content), media_type="application/x-ndjson")


async def _answer(request: Request, shape: "_Shape", turn: Turn, body: OllamaBody) -> Response:
    if body.is_streamed:
        return line_stream(_lines(shape, turn), turn.texts.job)
    (part,) = await answer(request, turn.texts.job, turn.whole())
    log_texts(request, answer=part.text)
    return JSONResponse({**shape.piece(part), **shape.end(turn, part)})


async def _lines(shape: "_Shape", turn: Turn) -> AsyncIterator[bytes]:
    async for part in turn.parts():
        if part.text or part.calls or part.logprobs:
            yield ndjson({**shape.piece(part), "done": False})
        if part.finish_reason is not None:
            yield ndjson({**shape.piece(Part(0)), **shape.end(turn, part)})


class _Shape:
    """The parts of one request's answer."""

    def __init__(
        self, model: ServedModel, body: OllamaBody, began: float, *, is_chat: bool
    ) -> None:
        self._model, self._body = model, body
        self._began, self._is_chat = began, is_chat

    def piece(self, part: Part) -> dict[str, Any]:
        """A bit of the answer, or all of it."""
        content: dict[str, Any] = {"model": self._body.model, "created_at": timestamp()}
        if self._is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": part.text}
            if part.calls:
                message["tool_calls"] = [_call(i, call) for i, call in enumerate(part.calls)]
            content["message"] = message
        else:
            content["response"] = part.text
        if part.logprobs:
            content["logprobs"] = logprobs_of(part.logprobs, self._model.tokenizer)
        return content

    def end(self, turn: Turn, part: Part) -> dict[str, Any]:
        """What stands beside the last bit."""
        reason = "length" if part.finish_reason == "length" else "stop"
        content: dict[str, Any] = {"done": True, "done_reason": reason}
        if isinstance(self._body, GenerateBody) and not self._body.raw:
            content["context"] = self._context(turn, reason)
        return {**content, **figures(turn.texts, self._began)}

    def _context(self, turn: Turn, reason: str) -> list[int]:
        """All tokens so far, for a next request to continue."""
        result, eos = turn.texts.results[0], self._model.tokenizer.eos_id
        has_ended = reason == "stop" and eos is not None
        return [*result.prompt_ids, *result.token_ids, *([eos] if has_ended else [])]  # type: ignore[list-item]


def _call(number: int, call: ToolCall) -> dict[str, Any]:
    function = {"index": number, "name": call.name, "arguments": json.loads(call.arguments)}
    return {"function": function}
