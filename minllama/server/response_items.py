"""Requests of OpenAI's Responses API in the shape of chats: items to messages, and tools."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from minllama.server.chat_turn import plain_content
from minllama.server.errors import RequestError
from minllama.server.openai_fields import schema_text
from minllama.server.routing import Body

ANY_OBJECT = '{"type": "object"}'
ROLES = {"developer": "system"}  # templates know the older word
MOST_ITEMS = 4096


class Item(Body):
    """One item of the input: a message, a call that was made, or what came of it."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[dict[str, Any]] | None = None
    call_id: str | None = Field(None, max_length=512)
    name: str | None = Field(None, max_length=64)
    arguments: str | None = None
    output: str | list[dict[str, Any]] | None = None


def messages_of(given: str | Sequence[Item], instructions: str | None) -> list[dict[str, Any]]:
    """The input as messages in the shape of chats.

    Calls that follow one another, or a message of the assistant, are of one message.

    Raises:
        RequestError: an item lacks what its type needs, or holds an image or a file.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if len(given) > MOST_ITEMS:
        raise RequestError(f"input: at most {MOST_ITEMS} items", param="input")
    names: dict[str, str] = {}  # of the calls so far
    for place, item in enumerate(given):
        if item.type == "reasoning":
            continue  # of another model: it was not said
        if item.type == "function_call":
            call = _call(item, place)
            names[call["id"]] = call["function"]["name"]
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif item.type == "function_call_output":
            messages.append(_output(item, place, names))
        else:
            messages.append(_message(item, place))
    if not messages:
        raise RequestError("input holds no message", param="input")
    return messages


def _message(item: Item, place: int) -> dict[str, Any]:
    role = _needed(item.role, f"input.{place}.role")
    param = f"input.{place}.content"
    content = _needed(plain_content(item.content, param), param)
    return {"role": ROLES.get(role, role), "content": content}


def _call(item: Item, place: int) -> dict[str, Any]:
    call_id = _needed(item.call_id, f"input.{place}.call_id")
    name = _needed(item.name, f"input.{place}.name")
    function = {"name": name, "arguments": item.arguments or "{}"}
    return {"id": call_id, "type": "function", "function": function}


def _output(item: Item, place: int, names: Mapping[str, str]) -> dict[str, Any]:
    call_id = _needed(item.call_id, f"input.{place}.call_id")
    param = f"input.{place}.output"
    content = _needed(plain_content(item.output, param), param)
    message = {"role": "tool", "content": content, "tool_call_id": call_id}
    return {**message, "name": names[call_id]} if call_id in names else message


def _needed(value: str | None, param: str) -> str:
    if value is None:
        raise RequestError(f"{param} is missing", param=param)
    return value


def chat_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Functions in the shape of chats.

    Raises:
        RequestError: a tool is no function; there are none that run on this server.
    """
    found = []
    for place, tool in enumerate(tools or ()):
        if tool.get("type") != "function":
            raise RequestError(
                f"tools.{place}.type must be function: no other tools are run here",
                param=f"tools.{place}.type",
            )
        function = {name: tool.get(name) for name in ("name", "description", "parameters")}
        found.append({"type": "function", "function": function})
    return found


def chat_choice(choice: Any, tools: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
    """A `tool_choice` in the shape of chats, and the tools that it leaves.

    Raises:
        RequestError: it is of no known form.
    """
    if not isinstance(choice, Mapping):
        return choice, tools
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}, tools
    listed = choice.get("tools")
    if choice.get("type") == "allowed_tools" and isinstance(listed, list):
        allowed = {
            tool["name"]
            for tool in listed
            if isinstance(tool, Mapping) and isinstance(tool.get("name"), str)
        }
        kept = [tool for tool in tools if tool["function"]["name"] in allowed]
        if len(kept) < len(allowed) or not allowed:
            raise RequestError(
                "tool_choice.tools must name functions of tools", param="tool_choice.tools"
            )
        return choice.get("mode", "auto"), kept
    raise RequestError(
        'tool_choice must be "auto", "none", "required", or an object of type function or '
        "allowed_tools",
        param="tool_choice",
    )


def format_schema(text: Mapping[str, Any] | None, most: int) -> str | None:
    """The JSON schema of `text.format`, as text; None where the reply is free.

    Raises:
        RequestError: it is of another form, or too large.
    """
    form = (text or {}).get("format")
    if form is None:
        return None
    if not isinstance(form, Mapping):
        raise RequestError("text.format must be an object", param="text.format")
    kind, schema = form.get("type"), form.get("schema")
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    if kind != "json_schema":
        raise RequestError(
            "text.format.type must be text, json_object or json_schema", param="text.format.type"
        )
    if not isinstance(schema, dict):
        raise RequestError(
            "text.format.schema must be a JSON schema, an object", param="text.format.schema"
        )
    return schema_text("text.format", json.dumps(schema), most)
