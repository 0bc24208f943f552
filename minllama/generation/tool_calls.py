"""Tool calls: tools in prompts, a constraint to calls, and calls parsed from replies.

Two forms of calls are known. Models of Hermes' kind (Qwen, SmolLM) write
`<tool_call>{"name": .., "arguments": {..}}</tool_call>` among text, Llama 3 writes
`{"name": .., "parameters": {..}}` as a whole reply. Conversations and a server call this module.
Nothing in a reply is run.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minllama.engine.sequence import Constraint
from minllama.errors import MinllamaError, OptionError
from minllama.text import shown
from minllama.tokenizer.chat_template import Message
from minllama.tokenizer.tokenizer import Tokenizer

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")  # of a function, as in OpenAI's API
NO_PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}
# As templates write JSON; free white space would trap small models.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Attributes:
        name: letters, digits, _ and -, at most 64.
        description: what it does.
        parameters: the JSON schema of its arguments, which are an object.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: NO_PARAMETERS)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise OptionError(
                f"a tool's name has 1 to 64 of a-z, A-Z, 0-9, _ and -, unlike {shown(self.name)}"
            )
        if not isinstance(self.description, str):
            raise OptionError(f"tool {self.name}: the description must be a string")
        if not isinstance(self.parameters, Mapping):
            raise OptionError(f"tool {self.name}: parameters must be a JSON schema, an object")
        if self.parameters.get("type", "object") != "object":
            raise OptionError(f"tool {self.name}: parameters must be a schema of type object")

    @property
    def definition(self) -> dict[str, Any]:
        """The tool in OpenAI's format, which templates read."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }
        return {"type": "function", "function": function}


def tools_of(definitions: Any) -> list[Tool]:
    """Tools by their definitions: `{"type": "function", "function": {"name": .., ..}}` each.

    Raises:
        OptionError: one is not a definition, or two have one name.
    """
    if not isinstance(definitions, Sequence) or isinstance(definitions, str | bytes):
        raise OptionError("tools must be a list of definitions")
    found: dict[str, Tool] = {}
    for place, definition in enumerate(definitions):
        function = definition.get("function") if isinstance(definition, Mapping) else None
        if not isinstance(function, Mapping) or definition.get("type") != "function":
            raise OptionError(f'tools[{place}] must be {{"type": "function", "function": ..}}')
        given = {
            name: function[name]
            for name in ("description", "parameters")
            if function.get(name) is not None
        }
        tool = Tool(function.get("name", ""), **given)
        if tool.name in found:
            raise OptionError(f"tools[{place}]: there is a tool {tool.name} before it")
        found[tool.name] = tool
    return list(found.values())


class ToolCall(NamedTuple):
    """A call that a model requests.

    Attributes:
        name: of the function; the model may have made it up.
        arguments: an object, in JSON.
    """

    name: str
    arguments: str


class CallForm(NamedTuple):
    """How a model writes a call.

    Attributes:
        begin: text before the JSON.
        end: text after it.
        arguments: the name of the field with the arguments.
        between: what separates two calls; None where a reply has one only.
    """

    begin: str
    end: str
    arguments: str
    between: str | None

    def written(self, name: str, arguments: str) -> str:
        """A call as the model writes it, with arguments in JSON."""
        return f'{self.begin}{{"name": "{name}", "{self.arguments}": {arguments}}}{self.end}'


HERMES = CallForm("<tool_call>\n", "\n</tool_call>", "arguments", "\n")
LLAMA_3 = CallForm("", "", "parameters", None)


def call_form(template: str) -> CallForm:
    """The call format of a chat template (in Jinja); Hermes' if it has none."""
    writes_json = re.search(r"""["']parameters\\?["']\s*:|<\|python_tag\|>""", template)
    return LLAMA_3 if "<tool_call>" not in template and writes_json else HERMES


# Prompts


def with_tools(
    template: str, messages: Sequence[Message], tools: Sequence[Tool]
) -> tuple[list[Message], dict[str, Any]]:
    """Messages and variables for a template, with or without support for tools.

    A template gets arguments as objects, not as the text that OpenAI's API has. One that does not
    know of `tools` gets them described in the system message, one that does not know of
    `tool_calls` gets calls and results as text, in Hermes' form.

    Args:
        template: in Jinja.
        messages: in OpenAI's shape.
        tools: that may be called.
    """
    result = list(messages)
    if not re.search(r"\btool_calls\b", template):
        result = [_as_text(message) for message in result]
    else:
        result = [_with_objects(message) for message in result]
    if not tools:
        return result, {}
    if re.search(r"\btools\b", template):
        return result, {"tools": [tool.definition for tool in tools]}
    text = _instructions(tools)
    first = result[0] if result else None
    if isinstance(first, Mapping) and first.get("role") == "system":
        if isinstance(first.get("content"), str):
            text = f"{first['content']}\n\n{text}"
        result = result[1:]
    return [{"role": "system", "content": text}, *result], {}


def _instructions(tools: Sequence[Tool]) -> str:
    listed = "\n".join(json.dumps(tool.definition, ensure_ascii=False) for tool in tools)
    call = HERMES.written("NAME", "{..}")
    return (
        "You can call functions. Their definitions are JSON objects between <tools> and </tools>:\n"
        f"<tools>\n{listed}\n</tools>\n\n"
        f"To call one, reply with its name and arguments in this form:\n{call}"
    )


def _calls_of(message: Any) -> list[Mapping[str, Any]]:
    """The functions of a message's calls."""
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    listed = calls if isinstance(calls, list) else []
    functions = [call.get("function") for call in listed if isinstance(call, Mapping)]
    return [function for function in functions if isinstance(function, Mapping)]


def _with_objects(message: Message) -> Message:
    """A message whose calls have their arguments as objects."""
    if not _calls_of(message):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            call = {**call, "function": {**function, "arguments": _arguments_of(function)}}
        calls.append(call)
    return {**message, "tool_calls": calls}


def _arguments_of(function: Mapping[str, Any]) -> Any:
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        parsed = json.loads(arguments, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _as_text(message: Any) -> Any:
    """A message for a template that supports neither calls nor results.

    Raises:
        MinllamaError: the arguments of a call are no JSON.
    """
    if not isinstance(message, Mapping):
        return message  # the template's own check refuses it
    content = message.get("content")
    if message.get("role") == "tool" and isinstance(content, str):
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = []
    for function in _calls_of(message):
        try:
            arguments = _dumped(_arguments_of(function))
        except (TypeError, ValueError, RecursionError) as error:
            raise MinllamaError("messages: the arguments of a tool call are no JSON") from error
        calls.append(HERMES.written(str(function.get("name")), arguments))
    if not calls:
        return message
    text = "\n".join([content, *calls] if isinstance(content, str) and content else calls)
    other_fields = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**other_fields, "content": text}


# Constraint


def call_constraint(
    tokenizer: Tokenizer,
    tools: Sequence[Tool],
    form: CallForm,
    vocab_size: int,
    *,
    parallel: bool = False,
    required: bool = True,
) -> Callable[[], Constraint]:
    """A maker of constraints to a call of one of these tools, with arguments by its schema.

    Args:
        tokenizer: of the model.
        tools: one that is forced, or all where any may be called.
        form: as the model writes calls.
        vocab_size: of the model.
        parallel: several calls may follow one another, where the form has that.
        required: the reply is a call and nothing else. Otherwise it is free until it begins a call,
            which the form must have a word for; keywords of a schema that cannot be followed are
            then left out.

    Raises:
        MinllamaError: llguidance is not installed.
        OptionError: there is no tool, or a schema is not valid or cannot be followed.
    """
    from minllama.generation.constraints import grammar_maker

    if not tools:
        raise OptionError("a tool is required, and there is none; give tools")
    opener, guidance = "", COMPACT
    if required:
        several = parallel and form.between is not None
        more = f" ({_literal(form.between or '', tokenizer)} call)*" if several else ""
        rules = [f"start: call{more}"]
    else:
        opener, guidance = form.begin.strip(), {**COMPACT, "lenient": True}
        rules = _free_rules(opener, tokenizer, several=form.between is not None)
    rules.append("call: " + " | ".join(f"call_{place}" for place in range(len(tools))))
    for place, tool in enumerate(tools):
        begin, end = form.written(tool.name, "\0").removeprefix(opener).split("\0")
        parts = (_literal(begin, tokenizer), f"args_{place}", _literal(end, tokenizer))
        rules.append(f"call_{place}: {' '.join(parts)}")
        schema = {"type": "object", **tool.parameters, "x-guidance": guidance}
        try:
            rules.append(f"args_{place}: %json {json.dumps(schema, allow_nan=False)}")
        except (TypeError, ValueError, RecursionError) as error:
            raise OptionError(f"tool {tool.name}: its parameters are no JSON schema") from error
    name = f"the schema of tool {tools[0].name}" if len(tools) == 1 else "tools"
    try:
        return grammar_maker(tokenizer, "\n".join(rules) + "\n", vocab_size, name)
    except OptionError:
        for tool in tools if len(tools) > 1 else ():  # report the error of the invalid one
            call_constraint(tokenizer, [tool], form, vocab_size, required=required)
        raise


def _free_rules(opener: str, tokenizer: Tokenizer, *, several: bool) -> list[str]:
    """Rules of a text in which a call follows each opener; `call` is left to be defined.

    Raises:
        OptionError: the form has no opener.
    """
    if not opener:
        raise OptionError("calls of this form cannot be told from text; require one")
    special = tokenizer.special_tokens.get(opener)
    if special is not None:
        opened = f"opened: TEXT <[{special}]>"
    else:
        opened = f"opened[lazy]: TEXT {json.dumps(opener)}"
    repeated = "(opened call)*" if several else "(opened call)?"
    return [f"start: {repeated} rest", "rest: TEXT", "TEXT: /(.|\\n)*/", opened]


def _literal(text: str, tokenizer: Tokenizer) -> str:
    """A text in the grammar's syntax; special tokens in it are these tokens."""
    special = tokenizer.special_tokens
    pattern = "|".join(map(re.escape, sorted(filter(None, special), key=len, reverse=True)))
    parts = re.split(f"({pattern})", text) if pattern else [text]
    return " ".join(
        f"<[{special[part]}]>" if part in special else json.dumps(part) for part in parts if part
    )


# Replies

_CLOSERS = {"<tool_call>": "</tool_call>", "<|python_tag|>": "", "[TOOL_CALLS]": ""}
_OPENER = re.compile("|".join(map(re.escape, _CLOSERS)))
_JSON = re.compile(r"\s*(\{|\[\s*\{|```json\s)")
_MAYBE_JSON = re.compile(r"\s*(\[\s*|`{0,3}|```(j|js|jso|json))$")  # so far
_BETWEEN = re.compile(r"(?:[\s;,]|```(?:json)?)*")


class ReplyReader:
    """Convert a streamed reply to text that can be shown at once, and to calls at the end.

    What may be a call is held back to the end, and what is none is text, unchanged.

    Args:
        names: of the tools. A reply that is JSON, without tags, is a call only of one of them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._held, self._blanks = "", ""  # white space comes in long runs, which are scanned once
        self._is_at_start, self._may_be_call = True, False

    def feed(self, text: str) -> str:
        """Add a piece; returns the part of the reply that is certainly text."""
        if not text or text.isspace():
            self._blanks += text
            return ""
        self._held, self._blanks = self._held + self._blanks + text, ""
        if self._may_be_call:
            return ""
        if self._is_at_start and _JSON.match(self._held):
            self._may_be_call = True
            return ""
        if opener := _OPENER.search(self._held):
            self._may_be_call = True
            return self._take(opener.start())
        if self._is_at_start and _MAYBE_JSON.match(self._held):
            return ""
        overlaps = (_overlap(self._held, opener) for opener in _CLOSERS)
        return self._take(len(self._held) - max(overlaps))

    def _take(self, end: int) -> str:
        """Remove the first characters of the held text, but for white space at their end."""
        end = len(self._held[:end].rstrip())
        text, self._held = self._held[:end], self._held[end:]
        self._is_at_start = self._is_at_start and not text
        return text

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest of the text, and the calls; without calls, all of the held text."""
        held, self._held, self._blanks = self._held + self._blanks, "", ""
        found = _tagged(held)
        calls = [call for part in found if isinstance(part, list) for call in part]
        if not calls and self._is_at_start:
            start = _BETWEEN.match(held)
            assert start is not None
            calls, end = _calls_at(held, start.end())
            if any(call.name not in self._names for call in calls):
                calls = []
            found = [held[end:]]
        if not calls:
            return held, []
        texts = [part.strip() for part in found if isinstance(part, str)]
        rest = "\n".join(filter(None, texts))
        return ("\n" + rest if rest and not self._is_at_start else rest), calls


def read_reply(text: str, names: Sequence[str]) -> tuple[str, list[ToolCall]]:
    """A whole reply as text and calls; see `ReplyReader`."""
    reader = ReplyReader(names)
    shown_first = reader.feed(text)
    rest, calls = reader.finish()
    return shown_first + rest, calls


def _overlap(text: str, opener: str) -> int:
    """The number of last characters that may begin an opening tag."""
    longest = min(len(text), len(opener) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(opener[:n])), 0)


def _tagged(text: str) -> list[str | list[ToolCall]]:
    """Texts, and between them the calls after opening tags; anything else remains text."""
    found: list[str | list[ToolCall]] = []
    done = 0
    opener = _OPENER.search(text)
    while opener is not None:
        calls, end = _calls_at(text, opener.end())
        if calls:
            found += [text[done : opener.start()], calls]
            closer = _CLOSERS[opener[0]]
            done = end + len(closer) if text.startswith(closer, end) else end
        opener = _OPENER.search(text, max(done, opener.end()))
    return [*found, text[done:]]


def _calls_at(text: str, place: int) -> tuple[list[ToolCall], int]:
    """The calls whose JSON begins at an offset, consecutive ones included, and their end."""
    calls: list[ToolCall] = []
    decoder = json.JSONDecoder(parse_constant=_refuse)
    while True:
        gap = _BETWEEN.match(text, place)
        assert gap is not None
        try:
            value, end = decoder.raw_decode(text, gap.end())
            calls += list(_calls_in(value))
        except (ValueError, RecursionError):
            return calls, gap.end() if calls else place
        place = end


def _calls_in(value: Any) -> Iterator[ToolCall]:
    """The calls that a JSON value represents.

    Raises:
        ValueError: something in it is no call.
    """
    if isinstance(value, list) and value:
        for item in value:
            yield from _calls_in(item)
        return
    function = value.get("function") if isinstance(value, dict) else None
    call = function if isinstance(function, dict) else value
    name = call.get("name") if isinstance(call, dict) else None
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError("no call")
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        arguments = json.loads(arguments, parse_constant=_refuse)
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise ValueError("no arguments")
    yield ToolCall(name, _dumped(arguments))


def _refuse(constant: str) -> Any:
    raise ValueError(constant)  # NaN and infinity, which JSON lacks


def _dumped(value: Any) -> str:
    """JSON that can be encoded as UTF-8.

    Raises:
        ValueError: it contains NaN or infinity.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate remains an escape
        return json.dumps(value, allow_nan=False)
    return text
