"""OpenAI's `/v1/responses`: text and items to a reply, whole or as events; nothing is kept."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from minllama.options import GenerationOptions
from minllama.server.chat_turn import Part, Turn, begin_turn, chosen_tools
from minllama.server.errors import RequestError
from minllama.server.openai_fields import SamplingFields
from minllama.server.registry import ServedModel
from minllama.server.response_events import ResponseEvents, response_usage, status_of
from minllama.server.response_items import (
    Item,
    chat_choice,
    chat_tools,
    format_schema,
    messages_of,
)
from minllama.server.routes.chat import logprobs_of
from minllama.server.routing import (
    JSON_OR_EVENTS,
    Stream,
    answer,
    check_range,
    log_texts,
    partition,
    refuse_fields,
    service_of,
)
from minllama.server.routing import router as make_router
from minllama.server.service import Service
from minllama.server.texts import generation_options

router = make_router()

LOGPROBS = "message.output_text.logprobs"
# What `include` may name; of reasoning there is none, and agents ask for it in any case.
INCLUDED = frozenset({LOGPROBS, "reasoning.encrypted_content"})
KEPT = "responses are not kept on this server; send the whole conversation as input"


class ResponsesBody(SamplingFields):
    """A request; what OpenAI's has besides is not looked at, unless it would change the reply."""

    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    top_logprobs: int | None = Field(None, ge=0, lt=2**31)
    include: list[str] | None = None
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None
    truncation: str | None = None
    max_tool_calls: int | None = None

    def check_supported(self) -> None:
        """Refuse what would change the reply and is not done here.

        Raises:
            RequestError: there is such a field.
        """
        remedies = {
            "store": KEPT,
            "previous_response_id": KEPT,
            "conversation": KEPT,
            "background": "replies come with their request",
            "prompt": "prompts are not kept here; send their text",
            "max_tokens": "use max_output_tokens",
        }
        refuse_fields(self, remedies, allowed=(None, False))
        if self.n not in (None, 1):
            raise RequestError("n must be 1: a response is one reply", param="n")
        if self.truncation not in (None, "disabled"):
            raise RequestError(
                "truncation must be disabled: input is never cut", param="truncation"
            )
        if self.include and set(self.include) - INCLUDED:
            raise RequestError(f"include may hold {LOGPROBS} only", param="include")

    @property
    def has_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)


@router.post("/v1/responses", response_model=None, responses=JSON_OR_EVENTS)
async def responses(request: Request, body: ResponsesBody) -> Response:
    """Reply to text, or to items."""
    service = service_of(request)
    service.check_accepting()
    model = service.registry.get(body.model).generative()
    body.check_supported()
    options = _options(service, model, body)
    choice, definitions = chat_choice(body.tool_choice, chat_tools(body.tools))
    tools = chosen_tools(service, definitions, choice, is_parallel=body.parallel_tool_calls)
    messages = messages_of(body.input, body.instructions)
    turn = await begin_turn(
        *(service, model, messages, options),
        tools=tools,
        salt=partition(request),
        schema_name="text.format",
    )
    log_texts(request, messages=messages)
    events = ResponseEvents(_echoed(model, body, options))
    if body.stream:
        return Stream(
            _events(events, turn, model, body), [turn.texts.job], format_error=events.fail
        )
    (part,) = await answer(request, turn.texts.job, turn.whole())
    log_texts(request, answer=part.text)
    for _ in events.add(part, _logprobs(part, model, body)):
        pass
    usage = response_usage(turn.texts)
    return JSONResponse(events.response(status_of(part), usage=usage))


def _options(service: Service, model: ServedModel, body: ResponsesBody) -> GenerationOptions:
    given, limits = body.given(service, model), service.options
    check_range("max_output_tokens", body.max_output_tokens, 1, limits.max_tokens)
    check_range("top_logprobs", body.top_logprobs, 0, limits.max_logprobs)
    schema = format_schema(body.text, limits.max_schema_bytes)
    if schema is not None and given["regex"] is not None:
        raise RequestError("text.format and guided_regex exclude each other", param="guided_regex")
    given |= {
        "max_new_tokens": body.max_output_tokens,
        "json_schema": schema,
        "logprobs": (body.top_logprobs or 0) if body.has_logprobs else None,
    }
    room = min(model.context_len, limits.max_tokens)
    return generation_options(model, given, max_new_tokens=room)


def _echoed(model: ServedModel, body: ResponsesBody, options: GenerationOptions) -> dict[str, Any]:
    """What a response repeats of its request."""
    form = (body.text or {}).get("format") or {"type": "text"}
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": body.model or model.id,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": options.temperature,
        "text": {"format": form},
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": options.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _logprobs(part: Part, model: ServedModel, body: ResponsesBody) -> list[Any]:
    return logprobs_of(part.logprobs, model.tokenizer) if body.has_logprobs else []


async def _events(
    events: ResponseEvents, turn: Turn, model: ServedModel, body: ResponsesBody
) -> AsyncIterator[bytes]:
    for event in events.begin():
        yield event
    async for part in turn.parts():
        for event in events.add(part, _logprobs(part, model, body)):
            yield event
        if part.finish_reason is not None:
            yield events.end(part, response_usage(turn.texts))
