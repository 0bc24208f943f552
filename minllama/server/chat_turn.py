"""One turn of a chat over a service: messages and tools to a reply, and what of it are calls.

Routes of every protocol that has chats use it: they translate their messages into OpenAI's shape.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from minllama.errors import MinllamaError, OptionError
from minllama.generation.sequence_text import Piece, TokenLogprob
from minllama.generation.tool_calls import (
    ReplyReader,
    Tool,
    ToolCall,
    call_constraint,
    call_form,
    tools_of,
)
from minllama.options import GenerationOptions
from minllama.server.errors import RequestError
from minllama.server.registry import ServedModel
from minllama.server.service import Service
from minllama.server.texts import Texts, encode_chat, generate

OPENERS = ("<tool_call>", "<|python_tag|>", "[TOOL_CALLS]")


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Attributes:
        tools: that the model learns of.
        forced: one of which it must call; none where it is free.
        is_parallel: whether it may call several at once, where one is forced.
    """

    tools: tuple[Tool, ...] = ()
    forced: tuple[Tool, ...] = ()
    is_parallel: bool = False

    @property
    def names(self) -> list[str]:
        return [tool.name for tool in self.tools]


def chosen_tools(
    service: Service, definitions: Any, choice: Any = None, *, is_parallel: bool | None = None
) -> Tools:
    """Tools by OpenAI's definitions, and by its `tool_choice`.

    Args:
        service: with its limits.
        definitions: a list of them, or None.
        choice: None, "auto", "none", "required", or the name of a tool by
            `{"type": "function", "function": {"name": ..}}`.
        is_parallel: `parallel_tool_calls`.

    Raises:
        RequestError: a definition or the choice is not valid, or there are too many.
    """
    listed = definitions or []
    if len(listed) > service.options.max_tools:
        raise RequestError(
            f"tools: at most {service.options.max_tools}, not {len(listed)}", param="tools"
        )
    try:
        tools = tuple(tools_of(listed))
    except MinllamaError as error:
        raise RequestError(str(error), param="tools") from error
    name = None
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if choice.get("type") != "function" or not isinstance(name, str):
            raise RequestError(
                'tool_choice must be "auto", "none", "required", or {"type": "function", '
                '"function": {"name": ..}}',
                param="tool_choice",
            )
    elif choice not in (None, "auto", "none", "required"):
        raise RequestError(
            'tool_choice must be "auto", "none", "required" or an object', param="tool_choice"
        )
    if choice == "none":
        return Tools()
    forced: tuple[Tool, ...] = ()
    if name is not None or choice == "required":
        forced = tuple(tool for tool in tools if name in (None, tool.name))
        if not forced:
            raise RequestError(
                "tool_choice names a tool that is not among tools", param="tool_choice"
            )
    # Models that are held to calls and may make several find no end.
    return Tools(tools, forced, is_parallel is True and name is None)


@dataclass
class Part:
    """A bit of a reply, as it comes.

    Attributes:
        row: number of the sample.
        text: to be shown.
        calls: of tools; they come with the end.
        finish_reason: of the last part: `stop`, `length` or `tool_calls`.
        logprobs: of the tokens that came with it.
    """

    row: int
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


class Turn:
    """A reply while it is generated; made by `begin_turn`.

    Attributes:
        texts: what it is read from.
    """

    def __init__(self, texts: Texts, tools: Tools) -> None:
        self.texts = texts
        self._readers: list[ReplyReader | None] = [
            ReplyReader(tools.names) if tools.tools else None for _ in texts.results
        ]

    async def parts(self) -> AsyncIterator[Part]:
        """Bits of the samples, as they come.

        Raises:
            MinllamaError: the request failed, took too long, or the server ends.
        """
        async for pieces in self.texts.pieces():
            for piece in pieces:
                yield self._part(piece)

    async def whole(self) -> list[Part]:
        """Each sample as one part, once all have ended; log-probabilities where requested.

        Raises:
            MinllamaError: as `parts` does.
        """
        found = [Part(row) for row in range(len(self._readers))]
        async for part in self.parts():
            whole = found[part.row]
            whole.text += part.text
            whole.calls += part.calls
            whole.logprobs += part.logprobs
            whole.finish_reason = part.finish_reason
        return found

    def _part(self, piece: Piece) -> Part:
        reader = self._readers[piece.row]
        if reader is None:
            return Part(piece.row, piece.text, [], piece.finish_reason, piece.logprobs)
        text, calls = reader.feed(piece.text), list[ToolCall]()
        reason: str | None = piece.finish_reason
        if reason is not None:
            rest, calls = reader.finish()
            text += rest
            if calls and reason == "stop":
                reason = "tool_calls"
        return Part(piece.row, text, calls, reason, piece.logprobs)


async def begin_turn(
    service: Service,
    model: ServedModel,
    messages: Sequence[Mapping[str, Any]],
    options: GenerationOptions,
    *,
    tools: Tools | None = None,
    salt: str,
    schema_name: str = "response_format",
) -> Turn:
    """Let a model reply to messages.

    Args:
        service: who computes.
        model: which.
        messages: in OpenAI's shape, with contents as texts (see `plain_content`).
        options: how to generate.
        tools: of the request.
        salt: `routing.partition(request)`.
        schema_name: the field that a schema comes from.

    Raises:
        MinllamaError: the messages cannot be rendered, are too long, or a schema is not valid; the
            queue is full, or the server is ending.
    """
    tools = tools or Tools()
    prompt = await encode_chat(service, model, messages, tools.tools)
    make = None
    if tools.tools and any(word in model.tokenizer.special_tokens for word in OPENERS):
        options = replace(options, skip_special_tokens=False)  # calls are found by them
    if tools.forced:
        options = replace(options, json_schema=None, regex=None)
    form = call_form(model.template().source) if tools.tools else None
    is_free = options.json_schema is None and options.regex is None
    if form is not None and is_free and (tools.forced or form.begin):
        try:
            make = await service.in_thread(
                *(call_constraint, model.tokenizer, tools.forced or tools.tools, form),
                model.llama.config.vocab_size,
                parallel=tools.is_parallel,
                required=bool(tools.forced),
                timeout=service.options.schema_seconds,
            )
        except OptionError as error:
            raise RequestError(f"tools: {error}", param="tools") from error
    texts = await generate(
        *(service, model, [prompt], options),
        salt=salt,
        make_constraint=make,
        schema_name=schema_name,
    )
    return Turn(texts, tools)


def plain_content(content: Any, param: str) -> str | None:
    """A message's content as text: as it is, or the texts of its parts, joined.

    Args:
        content: a string, a list of parts (`{"type": "text", "text": ..}`), or None.
        param: where it stands, for errors.

    Raises:
        RequestError: a part is an image, a sound or a file, which is neither read nor fetched.
    """
    if content is None or isinstance(content, str):
        return content
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise RequestError(
                f"{param}.{place}: only parts of type text are read; images, audio and files are "
                "not supported",
                param=f"{param}.{place}.type",
            )
        if not isinstance(text, str):
            raise RequestError(f"{param}.{place}.text must be a string", param=f"{param}.{place}")
        texts.append(text)
    return "\n".join(texts)
