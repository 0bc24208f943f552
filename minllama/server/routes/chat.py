"""OpenAI's `/v1/chat/completions`: messages and tools to a reply."""

import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from minllama.generation.sequence_text import TokenLogprob
from minllama.generation.tool_calls import ToolCall
from minllama.options import GenerationOptions
from minllama.server.chat_turn import Part, Turn, begin_turn, chosen_tools, plain_content
from minllama.server.errors import RequestError
from minllama.server.openai_fields import (
    SamplingFields,
    alternatives_of,
    new_id,
    schema_text,
    shown_logprob,
    usage_in_event,
    usage_of,
)
from minllama.server.registry import ServedModel
from minllama.server.routing import (
    JSON_OR_EVENTS,
    Body,
    answer,
    check_range,
    event_stream,
    log_texts,
    partition,
    refuse_fields,
    service_of,
    sse,
)
from minllama.server.routing import router as make_router
from minllama.server.service import Service
from minllama.server.texts import generation_options
from minllama.tokenizer.tokenizer import Tokenizer

router = make_router()

ANY_OBJECT = '{"type": "object"}'


class Function(Body):
    """A function of a call; arguments are JSON in a string."""

    name: str = Field(max_length=64)
    arguments: str = ""


class Call(Body):
    """A call that the assistant has made before."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(Body):
    """A message; contents may be lists of parts, of which only texts are read."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    def plain(self, place: int) -> dict[str, Any]:
        """It with a text as content, for a template."""
        content = plain_content(self.content, f"messages.{place}.content")
        if content is None and not (self.role == "assistant" and self.tool_calls):
            raise RequestError(
                f"messages.{place}.content is missing", param=f"messages.{place}.content"
            )
        roles = {"developer": "system", "function": "tool"}  # templates know the older words
        plain: dict[str, Any] = {"role": roles.get(self.role, self.role), "content": content}
        if self.tool_calls:
            plain["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        for name in ("name", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                plain[name] = value
        return plain


class ChatBody(SamplingFields):
    """A request; what OpenAI's has besides is not looked at, unless it would change the reply."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, lt=2**31)
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: list[str] | None = None
    chat_template: Any = None
    chat_template_kwargs: Any = None

    def check_supported(self) -> None:
        """Refuse what would change the reply and is not done here.

        Raises:
            RequestError: there is such a field.
        """
        remedies = {
            "functions": "use tools",
            "function_call": "use tool_choice",
            "audio": "replies are texts",
            "chat_template": "the template is the model's own",
            "chat_template_kwargs": "the template is the model's own",
        }
        refuse_fields(self, remedies)
        if self.modalities and self.modalities != ["text"]:
            raise RequestError("modalities: replies are texts", param="modalities")


@router.post("/v1/chat/completions", response_model=None, responses=JSON_OR_EVENTS)
async def chat(request: Request, body: ChatBody) -> Response:
    """Reply to messages."""
    service = service_of(request)
    service.check_accepting()
    model = service.registry.get(body.model).generative()
    body.check_supported()
    options = _options(service, model, body)
    tools = chosen_tools(
        service, body.tools, body.tool_choice, is_parallel=body.parallel_tool_calls
    )
    messages = [message.plain(place) for place, message in enumerate(body.messages)]
    turn = await begin_turn(service, model, messages, options, tools=tools, salt=partition(request))
    log_texts(request, messages=messages)
    shape = _Shape(model, body)
    if body.stream:
        return event_stream(_events(shape, turn, body), turn.texts.job)
    parts = await answer(request, turn.texts.job, turn.whole())
    log_texts(request, answer=[part.text for part in parts])
    choices = [shape.choice(part) for part in parts]
    return JSONResponse({**shape.head(), "choices": choices, "usage": usage_of(turn.texts)})


def _options(service: Service, model: ServedModel, body: ChatBody) -> GenerationOptions:
    given, limits = body.given(service, model), service.options
    check_range("max_completion_tokens", body.max_completion_tokens, 1, limits.max_tokens)
    check_range("top_logprobs", body.top_logprobs, 0, limits.max_logprobs)
    if body.max_tokens == 0:
        raise RequestError("max_tokens must be 1 or more", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    schema = response_schema(body.response_format, limits.max_schema_bytes)
    if schema is not None and given["regex"] is not None:
        raise RequestError(
            "response_format and guided_regex exclude each other", param="guided_regex"
        )
    most = body.max_completion_tokens or body.max_tokens
    given |= {
        "max_new_tokens": most,
        "json_schema": schema,
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
    }
    room = min(model.context_len, limits.max_tokens)
    return generation_options(model, given, max_new_tokens=room)


def response_schema(given: dict[str, Any] | None, most: int) -> str | None:
    """The JSON schema of a `response_format`, as text; None where the reply is free.

    OpenAI's form is `{"type": "json_schema", "json_schema": {"name", "schema"}}`; llama.cpp's,
    which has `schema` beside `type`, is taken too.

    Raises:
        RequestError: it is of another form, or too large.
    """
    if given is None or given.get("type") == "text":
        return None
    kind, schema = given.get("type"), given.get("schema")
    if kind == "json_object" and schema is None:
        return ANY_OBJECT
    if kind == "json_schema" and schema is None:
        wrapped = given.get("json_schema")
        schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
    if kind not in ("json_object", "json_schema"):
        raise RequestError(
            "response_format.type must be text, json_object or json_schema",
            param="response_format.type",
        )
    if not isinstance(schema, dict | bool):
        raise RequestError(
            "response_format.json_schema.schema must be a JSON schema, an object",
            param="response_format.json_schema.schema",
        )
    return schema_text("response_format", json.dumps(schema), most)


class _Shape:
    """The parts of one request's answer."""

    def __init__(self, model: ServedModel, body: ChatBody) -> None:
        self._tokenizer, self._name = model.tokenizer, body.model or model.id
        self._id, self._created = new_id("chatcmpl"), int(time.time())
        self._has_logprobs = bool(body.logprobs)

    def head(self, kind: str = "chat.completion") -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._name,
            "system_fingerprint": None,
        }

    def choice(self, part: Part) -> dict[str, Any]:
        """A whole sample."""
        message: dict[str, Any] = {"role": "assistant", "content": part.text, "refusal": None}
        if part.calls:
            message["content"] = part.text or None
            message["tool_calls"] = [_call(call) for call in part.calls]
        return {
            "index": part.row,
            "message": message,
            "logprobs": self.logprobs(part.logprobs),
            "finish_reason": part.finish_reason,
        }

    def delta(
        self,
        row: int,
        delta: dict[str, Any],
        reason: str | None = None,
        logprobs: Sequence[TokenLogprob] = (),
    ) -> dict[str, Any]:
        """A choice of a chunk."""
        shown = self.logprobs(logprobs) if logprobs else None
        return {"index": row, "delta": delta, "logprobs": shown, "finish_reason": reason}

    def logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        return {"content": logprobs_of(tokens, self._tokenizer), "refusal": None}


def logprobs_of(tokens: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Log-probabilities in the form of chats."""

    def entry(spelled: bytes, logprob: float) -> dict[str, Any]:
        text = spelled.decode(errors="replace")
        return {"token": text, "logprob": shown_logprob(logprob), "bytes": list(spelled)}

    return [
        {
            **entry(token.bytes, token.logprob),
            "top_logprobs": [entry(*each) for each in alternatives_of(token, tokenizer)],
        }
        for token in tokens
    ]


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": new_id("call"), "type": "function", "function": function}


async def _events(shape: _Shape, turn: Turn, body: ChatBody) -> AsyncIterator[bytes]:
    head = shape.head("chat.completion.chunk")

    def chunk(*args: Any) -> bytes:
        usage = usage_in_event(body, turn.texts)
        return sse({**head, **usage, "choices": [shape.delta(*args)]})

    begun: set[int] = set()
    async for part in turn.parts():
        if part.row not in begun:
            begun.add(part.row)
            yield chunk(part.row, {"role": "assistant", "content": ""})
        if part.text or part.logprobs:
            yield chunk(part.row, {"content": part.text}, None, part.logprobs)
        for number, call in enumerate(part.calls):
            for delta in call_deltas(number, call):
                yield chunk(part.row, {"tool_calls": [delta]})
        if part.finish_reason is not None:
            yield chunk(part.row, {}, part.finish_reason)
    if body.has_usage:
        yield sse({**head, "choices": [], "usage": usage_of(turn.texts)})
    yield b"data: [DONE]\n\n"


def call_deltas(number: int, call: ToolCall) -> list[dict[str, Any]]:
    """A call as OpenAI streams it: its name, then its arguments."""
    whole = _call(call)
    first = {**whole, "index": number, "function": {"name": call.name, "arguments": ""}}
    return [first, {"index": number, "function": {"arguments": call.arguments}}]
