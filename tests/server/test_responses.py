"""Claims about OpenAI's Responses API, by the `openai` client: its replies are the library's."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest

from minllama.generation.api import generate
from minllama.generation.conversation import chat_template, encode_messages
from minllama.options import GenerationOptions
from minllama.server.run import HttpServer

TOOL: dict[str, Any] = {
    "type": "function",
    "name": "pick",
    "description": "Pick one.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"side": {"enum": ["left", "right"]}},
        "required": ["side"],
        "additionalProperties": False,
    },
}
OTHER = {"type": "function", "name": "other", "parameters": None, "strict": False}
TALK = [{"role": "user", "content": "Say something"}]


@pytest.fixture(scope="module")
def client(server: HttpServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def reply_of(server: HttpServer, messages: Any, **options: Any) -> Any:
    """What the library replies."""
    model = server.service.registry.get("tiny")
    ids = encode_messages(
        chat_template(model.tokenizer), model.tokenizer, messages, model.context_len
    )
    return generate(model.llama, model.tokenizer, [ids], GenerationOptions(**options))[0]


def test_replies_are_the_librarys(server: HttpServer, client: openai.OpenAI) -> None:
    made = client.responses.create(
        model="tiny",
        input="Say something",
        instructions="Be brief.",
        temperature=0,
        max_output_tokens=7,
        metadata={"a": "b"},
    )
    expected = reply_of(
        server, [{"role": "system", "content": "Be brief."}, *TALK], max_new_tokens=7
    )
    assert made.output_text == expected.text
    assert made.id.startswith("resp_")
    assert made.status == "incomplete"
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"
    assert (made.object, made.instructions, made.metadata) == ("response", "Be brief.", {"a": "b"})
    (item,) = made.output
    assert item.type == "message"
    assert (item.role, item.status) == ("assistant", "incomplete")
    assert made.usage is not None
    assert made.usage.input_tokens == len(expected.prompt_ids)
    assert made.usage.output_tokens == 7
    assert made.usage.total_tokens == len(expected.prompt_ids) + 7


@pytest.mark.parametrize(
    "given",
    [
        TALK,
        [{"type": "message", "role": "user", "content": "Say something"}],
        [{"role": "user", "content": [{"type": "input_text", "text": "Say something"}]}],
        [{"type": "reasoning", "id": "rs_1", "summary": []}, *TALK],
    ],
)
def test_input_may_be_items(server: HttpServer, client: openai.OpenAI, given: Any) -> None:
    options: dict[str, Any] = {"seed": 3, "temperature": 1.0, "top_p": 0.9}
    made = client.responses.create(
        model="tiny",
        input=given,
        temperature=1.0,
        top_p=0.9,
        max_output_tokens=6,
        extra_body={"seed": 3},
    )
    assert made.output_text == reply_of(server, TALK, max_new_tokens=6, **options).text


def test_calls_and_outputs_are_read_as_in_chats(server: HttpServer, client: openai.OpenAI) -> None:
    items: list[Any] = [
        *TALK,
        {"role": "assistant", "content": [{"type": "output_text", "text": "Well."}]},
        {"type": "function_call", "call_id": "c1", "name": "pick", "arguments": '{"side": "left"}'},
        {
            "type": "function_call",
            "call_id": "c2",
            "name": "pick",
            "arguments": '{"side": "right"}',
        },
        {"type": "function_call_output", "call_id": "c1", "output": "done"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "done too"}],
        },
    ]
    calls = [
        {
            "id": f"c{number}",
            "type": "function",
            "function": {"name": "pick", "arguments": f'{{"side": "{side}"}}'},
        }
        for number, side in ((1, "left"), (2, "right"))
    ]
    messages: list[Any] = [
        *TALK,
        {"role": "assistant", "content": "Well.", "tool_calls": calls},
        {"role": "tool", "content": "done", "tool_call_id": "c1", "name": "pick"},
        {"role": "tool", "content": "done too", "tool_call_id": "c2", "name": "pick"},
    ]
    made = client.responses.create(model="tiny", input=items, temperature=0, max_output_tokens=6)
    talk = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=6
    )
    assert made.output_text == talk.choices[0].message.content
    assert made.usage is not None
    assert talk.usage is not None
    assert made.usage.input_tokens == talk.usage.prompt_tokens


def test_a_stream_is_the_whole(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "input": "Say something",
        "temperature": 1.0,
        "max_output_tokens": 9,
        "top_logprobs": 2,
        "include": ["message.output_text.logprobs"],
        "extra_body": {"seed": 4},
    }
    whole = client.responses.create(**options)
    events = list(client.responses.create(**options, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    n_deltas = kinds.count("response.output_text.delta")
    assert n_deltas > 1
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * n_deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == whole.output_text
    assert last.response.usage is not None
    assert whole.usage is not None
    assert last.response.usage.output_tokens == whole.usage.output_tokens
    assert len({e.item_id for e in deltas} | {last.response.output[0].id}) == 1
    (part,) = whole.output[0].content  # type: ignore[union-attr]
    found = [token.logprob for token in part.logprobs]  # type: ignore[union-attr]
    streamed = [token.logprob for event in deltas for token in event.logprobs]
    assert streamed == pytest.approx(found, abs=1e-4)
    assert all(len(token.top_logprobs) == 2 for token in part.logprobs)  # type: ignore[union-attr]


def until_done(client: openai.OpenAI, **options: Any) -> dict[str, Any]:
    """Options with which a reply ends by itself: it is held to a short format."""
    form = {
        "type": "json_schema",
        "name": "x",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"is_good": {"type": "boolean"}},
            "required": ["is_good"],
            "additionalProperties": False,
            "x-guidance": {"whitespace_flexible": False},
        },
    }
    return {"model": "tiny", "input": "Say", "text": {"format": form}, **options}


def test_replies_are_held_to_a_schema(client: openai.OpenAI) -> None:
    options = until_done(client, max_output_tokens=80, extra_body={"seed": 1})
    made = client.responses.create(**options)
    assert made.status == "completed"
    assert list(json.loads(made.output_text)) == ["is_good"]
    with client.responses.stream(**options) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert final.output_text == made.output_text

    class Answer(pydantic.BaseModel):
        is_good: bool

    parsed = client.responses.parse(
        model="tiny", input="Say", text_format=Answer, extra_body={"seed": 1}, temperature=0
    )
    assert parsed.status == "incomplete" or isinstance(parsed.output_parsed, Answer)


@pytest.mark.parametrize(
    ("choice", "tools"),
    [
        ("required", [TOOL]),
        ({"type": "function", "name": "pick"}, [OTHER, TOOL]),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "pick"}],
            },
            [OTHER, TOOL],
        ),
    ],
)
def test_calls_come_as_items(client: openai.OpenAI, choice: Any, tools: Any) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "input": "Go",
        "tools": tools,
        "tool_choice": choice,
        "top_logprobs": 1,
        "extra_body": {"seed": 2},
    }
    made = client.responses.create(**options)
    assert made.status == "completed"
    (call,) = made.output
    assert call.type == "function_call"
    assert (call.name, call.status) == ("pick", "completed")
    assert call.call_id.startswith("call_")
    assert json.loads(call.arguments)["side"] in ("left", "right")
    with client.responses.stream(**options) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert final.output[0].arguments == call.arguments  # type: ignore[union-attr]


def test_a_talk_goes_on_with_what_was_replied(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_output_tokens": 5, "temperature": 0}
    first = client.responses.create(
        input="Say", store=False, include=["reasoning.encrypted_content"], **asked
    )
    talk: list[Any] = [{"role": "user", "content": "Say"}, *first.output, *TALK]
    second = client.responses.create(input=talk, **asked)
    messages: list[Any] = [
        {"role": "user", "content": "Say"},
        {"role": "assistant", "content": first.output_text},
        *TALK,
    ]
    same = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=5, temperature=0
    )
    assert second.output_text == same.choices[0].message.content


def test_the_async_client_is_answered(server: HttpServer, client: openai.OpenAI) -> None:
    options = until_done(client, max_output_tokens=80, extra_body={"seed": 1})

    async def run() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as own:
            whole = await own.responses.create(**options)
            async with own.responses.stream(**options) as stream:
                final = await stream.get_final_response()
            return whole.output_text, final.output_text

    whole, streamed = asyncio.run(run())
    assert whole == streamed


def test_an_error_in_the_midst_is_an_event(
    server: HttpServer, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = server.service.registry.get("tiny")
    forward, calls = model.engine.forward, []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("secret of the inside")
        return forward(*args, **options)

    monkeypatch.setattr(model.engine, "forward", failing)
    stream = client.responses.create(
        model="tiny", input="Say something else", max_output_tokens=50, stream=True, temperature=0
    )
    events = list(stream)
    last = events[-1]
    assert last.type == "response.failed"
    assert last.sequence_number == len(events) - 1
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert last.response.error.code == "server_error"
    assert "secret" not in last.response.error.message


WRONG: list[tuple[str | None, dict[str, Any]]] = [
    ("input", {"input": None}),
    ("input", {"input": 1}),
    ("input", {"input": []}),
    ("input.0.role", {"input": [{"role": "king", "content": "x"}]}),
    ("input.0.role", {"input": [{"content": "x"}]}),
    ("input.0.content", {"input": [{"role": "user"}]}),
    ("input.0.type", {"input": [{"type": "item_reference", "id": "x"}]}),
    (
        "input.0.content.0.type",
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
    ),
    ("input.0.call_id", {"input": [{"type": "function_call", "name": "x", "arguments": "{}"}]}),
    ("input.0.output", {"input": [{"type": "function_call_output", "call_id": "x"}]}),
    ("store", {"store": True}),
    ("previous_response_id", {"previous_response_id": "resp_1"}),
    ("conversation", {"conversation": "conv_1"}),
    ("background", {"background": True}),
    ("prompt", {"prompt": {"id": "x"}}),
    ("max_tokens", {"max_tokens": 5}),
    ("truncation", {"truncation": "auto"}),
    ("n", {"n": 2}),
    ("include", {"include": ["file_search_call.results"]}),
    ("max_output_tokens", {"max_output_tokens": 0}),
    ("max_output_tokens", {"max_output_tokens": True}),
    ("max_output_tokens", {"max_output_tokens": 2**31 - 1}),
    ("temperature", {"temperature": 3}),
    ("top_logprobs", {"top_logprobs": 21}),
    ("tools.0.type", {"tools": [{"type": "web_search"}]}),
    ("tools", {"tools": [{"type": "function"}]}),
    ("tools", {"tools": [{"type": "function", "name": f"f{i}"} for i in range(129)]}),
    ("tools", {"tools": [{"type": "function", "name": "f", "parameters": {"type": "string"}}]}),
    ("tool_choice", {"tools": [TOOL], "tool_choice": "maybe"}),
    ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "web_search"}}),
    ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "function", "name": "no"}}),
    ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "function"}}),
    (
        "tool_choice.tools",
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "tools": [{"name": "no"}]}},
    ),
    ("text.format", {"text": {"format": 1}}),
    ("text.format.type", {"text": {"format": {"type": "yaml"}}}),
    ("text.format.schema", {"text": {"format": {"type": "json_schema", "name": "x"}}}),
    ("text.format", {"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}),
    ("metadata.a", {"metadata": {"a": 1}}),
    ("model", {"model": 1}),
    (None, {"input": "word " * 3000}),
]


@pytest.mark.parametrize(("param", "change"), WRONG)
def test_what_is_wrong_is_named(
    server: HttpServer, param: str | None, change: dict[str, Any]
) -> None:
    body = {"model": "tiny", "input": "x", "max_output_tokens": 2, **change}
    answer = httpx.post(f"{server.url}/v1/responses", json=body, timeout=30)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param is None or param.split(".")[0].removesuffix("s") in error["message"]
