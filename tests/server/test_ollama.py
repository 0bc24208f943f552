"""Claims about Ollama's API, by the `ollama` client: its texts are the library's."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import pytest

from minllama.generation.api import generate
from minllama.generation.conversation import chat_template, encode_messages
from minllama.options import GenerationOptions
from minllama.server.run import HttpServer
from tests.server.running import running

TALK = [{"role": "user", "content": "Say something"}]
GREEDY = {"temperature": 0, "num_predict": 7}


def pick(side: str) -> str:
    """Pick a side.

    Args:
        side: left or right.
    """
    return side


TOOL = {
    "type": "function",
    "function": {
        "name": "pick",
        "description": "Pick one.",
        "parameters": {
            "type": "object",
            "properties": {"side": {"type": "string", "enum": ["left", "right"]}},
            "required": ["side"],
        },
    },
}


@pytest.fixture(scope="module")
def client(server: HttpServer) -> Iterator[ollama.Client]:
    with ollama.Client(server.url) as client:
        yield client


@pytest.fixture(autouse=True)
def _no_other_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    monkeypatch.delenv("OLLAMA_API_KEY", raising=False)


def texts_of(server: HttpServer, prompt: Any, **options: Any) -> Any:
    """What the library generates."""
    model = server.service.registry.get("tiny")
    return generate(model.llama, model.tokenizer, [prompt], GenerationOptions(**options))[0]


def chat_ids(server: HttpServer, messages: Any) -> list[int]:
    model = server.service.registry.get("tiny")
    template = chat_template(model.tokenizer)
    return encode_messages(template, model.tokenizer, messages, model.context_len)


def test_texts_are_the_librarys(server: HttpServer, client: ollama.Client) -> None:
    made = client.generate("tiny", "Say something", system="Be brief.", options=GREEDY)
    system = {"role": "system", "content": "Be brief."}
    ids = chat_ids(server, [system, *TALK])
    expected = texts_of(server, ids, max_new_tokens=7)
    assert made.response == expected.text
    assert (made.done, made.done_reason) == (True, "length")
    assert (made.prompt_eval_count, made.eval_count) == (len(ids), 7)
    durations = (made.total_duration, made.load_duration, made.eval_duration)
    assert all(isinstance(n, int) and n >= 0 for n in durations)
    assert made.total_duration >= (made.eval_duration or 0)  # type: ignore[operator]
    assert made.model == "tiny"


def test_raw_prompts_are_read_as_they_are(server: HttpServer, client: ollama.Client) -> None:
    made = client.generate("tiny", "Once upon a time", raw=True, options=GREEDY)
    assert made.response == texts_of(server, "Once upon a time", max_new_tokens=7).text
    assert made.context is None
    rendered = "<|im_start|>user\nSay something<|im_end|>\n<|im_start|>assistant\n"
    own = client.generate("tiny", rendered, raw=True, options=GREEDY)
    assert own.response == texts_of(server, rendered, max_new_tokens=7, special=True).text


def test_options_are_those_of_the_library(server: HttpServer, client: ollama.Client) -> None:
    options = {
        "temperature": 0.9,
        "top_k": 5,
        "top_p": 0.8,
        "min_p": 0.01,
        "seed": 11,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
    }
    made = client.generate(
        "tiny", "x", raw=True, options={**options, "repeat_penalty": 1.2, "num_predict": 9}
    )
    expected = texts_of(server, "x", max_new_tokens=9, repetition_penalty=1.2, **options)
    assert made.response == expected.text
    assert made.done_reason == expected.finish_reason


def test_what_a_request_does_not_say_is_as_in_ollama(
    server: HttpServer, client: ollama.Client
) -> None:
    made = client.generate("tiny", "x", raw=True, options={"seed": 3, "num_predict": 9})
    said = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
    assert made.response == texts_of(server, "x", max_new_tokens=9, seed=3, **said).text


@pytest.mark.parametrize("n", [-1, -2, None])
def test_a_text_without_a_limit_ends_with_the_context(base: Path, n: int | None) -> None:
    with running({"tiny": base}) as server, ollama.Client(server.url) as client:
        made = client.generate("tiny", "x", raw=True, options={"temperature": 0, "num_predict": n})
        context_len = server.service.registry.get("tiny").context_len
        assert (made.prompt_eval_count or 0) + (made.eval_count or 0) in (
            context_len,
            context_len + 1,
        )
        assert made.done_reason == "length"


def test_a_stream_is_the_whole(server: HttpServer, client: ollama.Client) -> None:
    options = {"temperature": 1.0, "seed": 4, "num_predict": 12}
    whole = client.generate("tiny", "Say", options=options)
    parts = list(client.generate("tiny", "Say", options=options, stream=True))
    assert "".join(part.response or "" for part in parts) == whole.response
    assert [part.done for part in parts[:-1]] == [False] * (len(parts) - 1)
    assert (parts[-1].done, parts[-1].done_reason) == (True, whole.done_reason)
    assert parts[-1].eval_count == whole.eval_count
    assert parts[-1].context == whole.context


def test_streams_are_lines_of_json_and_the_default(server: HttpServer) -> None:
    answer = httpx.post(
        f"{server.url}/api/generate",
        json={"model": "tiny", "prompt": "x", "options": {"num_predict": 3}},
    )
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert lines[-1]["done"] is True
    assert all("response" in line for line in lines)


def test_chats_are_the_librarys(server: HttpServer, client: ollama.Client) -> None:
    talk = [*TALK, {"role": "assistant", "content": "Something."}, *TALK]
    made = client.chat("tiny", talk, options=GREEDY)
    expected = texts_of(server, chat_ids(server, talk), max_new_tokens=7)
    assert made.message.role == "assistant"
    assert made.message.content == expected.text
    parts = list(client.chat("tiny", talk, options=GREEDY, stream=True))
    assert "".join(part.message.content or "" for part in parts) == expected.text
    assert [part.done for part in parts].count(True) == 1
    assert parts[-1].done


def test_stop_strings_end_a_text(server: HttpServer, client: ollama.Client) -> None:
    whole = texts_of(server, "Once upon a time", max_new_tokens=24).text
    stop = whole[8:13]
    for given in ([stop], [stop, "never there"]):
        options = {"temperature": 0, "num_predict": 24, "stop": given}
        made = client.generate("tiny", "Once upon a time", raw=True, options=options)
        assert made.response == whole[: whole.find(stop)]
        assert made.done_reason == "stop"


def test_a_context_is_continued(server: HttpServer, client: ollama.Client) -> None:
    first = client.generate("tiny", "Say something", options=GREEDY)
    ids = chat_ids(server, TALK)
    said = texts_of(server, ids, max_new_tokens=7)
    assert list(first.context or ()) == ids + said.token_ids
    again = client.generate("tiny", "Go on", context=first.context, options=GREEDY)
    more = chat_ids(server, [{"role": "user", "content": "Go on"}])
    expected = texts_of(server, ids + said.token_ids + more, max_new_tokens=7)
    assert again.response == expected.text


def test_texts_are_held_to_a_format(client: ollama.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"is_good": {"type": "boolean"}},
        "required": ["is_good"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    options = {"seed": 1, "num_predict": 80, "temperature": 1.0}
    made = client.chat("tiny", TALK, format=schema, options=options)
    assert list(json.loads(made.message.content or "")) == ["is_good"]
    text = client.generate("tiny", "Say", format=schema, options=options).response
    assert list(json.loads(text or "")) == ["is_good"]
    free = client.generate("tiny", "Say", format="json", options=options).response
    assert (free or "").lstrip().startswith("{")
    plain = client.generate("tiny", "Say", format="", options=GREEDY).response
    assert plain == client.generate("tiny", "Say", options=GREEDY).response


def test_log_probabilities_are_the_librarys(server: HttpServer, client: ollama.Client) -> None:
    expected = texts_of(server, chat_ids(server, TALK), max_new_tokens=5, logprobs=2)
    options = {"temperature": 0, "num_predict": 5}
    made = client.chat("tiny", TALK, logprobs=True, top_logprobs=2, options=options)
    assert expected.logprobs is not None
    found = [token.logprob for token in made.logprobs or ()]
    assert found == pytest.approx([token.logprob for token in expected.logprobs], abs=1e-4)
    assert all(len(token.top_logprobs or ()) == 2 for token in made.logprobs or ())
    stream = client.chat("tiny", TALK, logprobs=True, top_logprobs=2, options=options, stream=True)
    assert [t.token for part in stream for t in part.logprobs or ()] == [
        token.text for token in expected.logprobs
    ]


def test_calls_have_their_arguments_as_objects() -> None:
    from minllama.generation.tool_calls import ToolCall
    from minllama.server.routes.ollama import _call

    call = _call(1, ToolCall("pick", '{"side": "left"}'))
    parsed = ollama.Message.ToolCall(**call)
    assert parsed.function.name == "pick"
    assert parsed.function.arguments == {"side": "left"}


@pytest.mark.parametrize("is_streamed", [True, False])
def test_calls_come_as_calls(
    server: HttpServer,
    client: ollama.Client,
    is_streamed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from minllama.server.routes import ollama as route

    chosen = route.chosen_tools
    # Ollama has no way to force a call, which a random model does not make by itself.
    monkeypatch.setattr(
        route, "chosen_tools", lambda service, tools: chosen(service, tools, "required")
    )
    options = {"seed": 2, "temperature": 1.0, "num_predict": 200}
    made = client.chat("tiny", TALK, tools=[TOOL], options=options, stream=is_streamed)
    parts = list(made) if is_streamed else [made]
    (call,) = [c for part in parts for c in part.message.tool_calls or ()]
    assert call.function.name == "pick"
    assert call.function.arguments["side"] in ("left", "right")
    assert parts[-1].done_reason == "stop"
    assert not any(part.message.content for part in parts)


def test_functions_calls_and_their_results_are_read(
    server: HttpServer, client: ollama.Client
) -> None:
    call = {"function": {"name": "pick", "arguments": {"side": "left"}}}
    talk: list[Any] = [
        *TALK,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "left", "tool_name": "pick"},
    ]
    made = client.chat("tiny", talk, tools=[pick], options=GREEDY)
    assert made.done
    as_openai = [
        *TALK,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "pick", "arguments": '{"side": "left"}'}}
            ],
        },
        {"role": "tool", "content": "left", "name": "pick"},
    ]
    alone = client.chat("tiny", talk, options=GREEDY)
    expected = texts_of(server, chat_ids(server, as_openai), max_new_tokens=7)
    assert alone.message.content == expected.text


def test_an_empty_prompt_loads_the_model(client: ollama.Client) -> None:
    made = client.generate("tiny")
    assert (made.response, made.done, made.done_reason) == ("", True, "load")
    assert client.generate("tiny", keep_alive=0).done_reason == "unload"
    talk = client.chat("tiny", [])
    assert (talk.message.content, talk.done_reason) == ("", "load")
    assert [part.done_reason for part in client.chat("tiny", [], stream=True)] == ["load"]


def test_models_are_listed_and_described(server: HttpServer, client: ollama.Client) -> None:
    (listed,) = client.list().models
    assert listed.model == "tiny"
    assert listed.size == sum(
        p.nbytes for p in server.service.registry.get("tiny").llama.parameters()
    )
    assert listed.details is not None
    assert (listed.details.family, listed.details.quantization_level) == ("llama", "F32")
    (loaded,) = client.ps().models
    assert (loaded.model, loaded.digest, loaded.context_length) == ("tiny", listed.digest, 1024)
    found = client.show("tiny")
    config = server.service.registry.get("tiny").llama.config
    assert found.modelinfo is not None
    assert found.modelinfo["llama.context_length"] == 1024
    assert found.modelinfo["llama.block_count"] == config.n_layers
    assert found.capabilities == ["completion", "tools"]
    assert found.template
    assert httpx.get(f"{server.url}/api/version").json()["version"]
    for path in ("/", "/api/tags", "/api/version"):
        assert httpx.head(server.url + path).status_code == 200


def test_names_may_have_a_tag(client: ollama.Client) -> None:
    made = client.generate("tiny:latest", "x", options=GREEDY)
    assert made.model == "tiny:latest"
    assert made.response == client.generate("tiny", "x", options=GREEDY).response
    assert client.show("tiny:latest").details
    with pytest.raises(ollama.ResponseError) as caught:
        client.generate("tiny:7b", "x")
    assert caught.value.status_code == 404


def test_the_async_client_is_answered(server: HttpServer, client: ollama.Client) -> None:
    async def run() -> tuple[Any, list[Any]]:
        async with ollama.AsyncClient(server.url) as one:
            whole = one.chat("tiny", TALK, options=GREEDY)
            stream = await one.chat("tiny", TALK, options=GREEDY, stream=True)
            return await whole, [part async for part in stream]

    whole, parts = asyncio.run(run())
    assert whole.message.content == client.chat("tiny", TALK, options=GREEDY).message.content
    assert "".join(part.message.content for part in parts) == whole.message.content


def test_a_model_without_a_template_continues_text(base: Path) -> None:
    with running({"tiny": base}) as server, ollama.Client(server.url) as client:
        model = server.service.registry.get("tiny")
        model.tokenizer.chat_template = None
        made = client.generate("tiny", "Once upon a time", options=GREEDY)
        assert made.response == texts_of(server, "Once upon a time", max_new_tokens=7).text
        assert client.show("tiny").capabilities == ["completion"]
        for ask in (
            lambda: client.generate("tiny", "x", system="y"),
            lambda: client.chat("tiny", TALK),
        ):
            with pytest.raises(ollama.ResponseError, match="template") as caught:
                ask()
            assert caught.value.status_code == 400


def test_texts_become_vectors(server: HttpServer, client: ollama.Client) -> None:
    texts = ["Once upon a time", "é😀"]
    made = client.embed("tiny", texts)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as other:
        expected = other.embeddings.create(model="tiny", input=texts, encoding_format="float")
    for found, same in zip(made.embeddings, expected.data, strict=True):
        assert list(found) == pytest.approx(same.embedding, abs=1e-5)
        assert sum(value**2 for value in found) == pytest.approx(1, abs=1e-4)
    assert made.prompt_eval_count == expected.usage.prompt_tokens
    assert len(client.embed("tiny:latest", texts[0]).embeddings) == 1
    assert client.embed("tiny", []).embeddings == []
    old = client.embeddings("tiny", texts[0]).embedding
    assert list(old) == pytest.approx(made.embeddings[0], abs=1e-5)
    assert client.embeddings("tiny", "").embedding == []
    long = "word " * 3000
    assert client.embed("tiny", long).prompt_eval_count == 1024
    for wrong in ({"input": long, "truncate": False}, {"input": "x", "dimensions": 3}):
        with pytest.raises(ollama.ResponseError) as caught:
            client.embed("tiny", **wrong)
        assert caught.value.status_code == 400


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("model", {"model": ""}),
    ("model", {"model": 1}),
    ("model", {"model": None}),
    ("options", {"options": []}),
    ("temperature", {"options": {"temperature": -1}}),
    ("temperature", {"options": {"temperature": True}}),
    ("temperature", {"options": {"temperature": "1"}}),
    ("top_p", {"options": {"top_p": 1.5}}),
    ("seed", {"options": {"seed": 2**63}}),
    ("num_predict", {"options": {"num_predict": 2**31}}),
    ("num_predict", {"options": {"num_predict": 2**30}}),
    ("num_predict", {"options": {"num_predict": 1.5}}),
    ("stop", {"options": {"stop": [""]}}),
    ("stop", {"options": {"stop": ["x"] * 17}}),
    ("mirostat", {"options": {"mirostat": 2}}),
    ("tfs_z", {"options": {"tfs_z": 0.5}}),
    ("repeat_last_n", {"options": {"repeat_penalty": 1.1, "repeat_last_n": 64}}),
    ("stream", {"stream": "no"}),
    ("format", {"format": "yaml"}),
    ("format", {"format": {"type": "nothing"}}),
    ("format", {"format": {"$ref": "http://127.0.0.1/x"}}),
    ("format", {"format": {"enum": ["x" * 70_000]}}),
    ("think", {"think": True}),
    ("think", {"think": "high"}),
    ("keep_alive", {"keep_alive": "soon"}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
]
WRONG_TEXTS: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": 1}),
    ("images", {"images": ["aGVsbG8="]}),
    ("suffix", {"suffix": "end"}),
    ("template", {"template": "{{ .Prompt }}"}),
    ("context", {"context": [-1]}),
    ("context", {"context": [49152]}),
    ("raw", {"raw": True, "system": "x"}),
    ("tokens", {"prompt": "word " * 3000}),
    ("characters", {"prompt": "word " * 30_000}),
    ("tokens", {"context": [5] * 2000}),
]
WRONG_CHATS: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": "hello"}),
    ("role", {"messages": [{"role": "king", "content": "x"}]}),
    ("role", {"messages": [{"content": "x"}]}),
    ("content", {"messages": [{"role": "user", "content": 1}]}),
    ("images", {"messages": [{"role": "user", "content": "x", "images": ["aGVsbG8="]}]}),
    ("tool_calls", {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}),
    ("tools", {"tools": [{"type": "function"}]}),
    ("tools", {"tools": [TOOL] * 129}),
]


@pytest.mark.parametrize(
    ("path", "word", "change"),
    [("/api/generate", *each) for each in (*WRONG, *WRONG_TEXTS)]
    + [("/api/chat", *each) for each in (*WRONG, *WRONG_CHATS)],
)
def test_what_is_wrong_is_named(
    server: HttpServer, path: str, word: str, change: dict[str, Any]
) -> None:
    body = {"model": "tiny", "prompt": "x", "messages": TALK, **change}
    answer = httpx.post(server.url + path, json=body, timeout=30)
    assert answer.status_code == 400, answer.text
    assert list(answer.json()) == ["error"]
    assert word in answer.json()["error"]


def test_errors_reach_the_client(client: ollama.Client) -> None:
    for is_streamed in (False, True):
        with pytest.raises(ollama.ResponseError, match="images") as caught:
            list(client.generate("tiny", "x", images=[b"hello"], stream=is_streamed))
        assert caught.value.status_code == 400
        assert "{" not in caught.value.error
    with pytest.raises(ollama.ResponseError) as missing:
        client.show("other")
    assert missing.value.status_code == 404


def test_what_others_send_at_start_is_answered(base: Path) -> None:
    options = {"cors_origin": ("https://page.example",)}
    with running({"tiny": base}, keys=("the-key",), **options) as server:
        asks = {"Origin": "https://page.example", "Access-Control-Request-Method": "GET"}
        for path in ("/v1/models", "//v1//models", "/api/tags", "//api/tags"):
            answer = httpx.options(server.url + path, headers=asks)
            assert answer.status_code == 200
            assert answer.headers["Access-Control-Allow-Origin"] == "https://page.example"
        for path in ("//v1/models", "/v1//models", "//api/tags", "/api//version", "/api/ps/"):
            assert httpx.get(server.url + path).status_code == 401
            answer = httpx.get(server.url + path, headers={"Authorization": "Bearer the-key"})
            assert answer.status_code == 200, path
        refused = httpx.get(f"{server.url}/api/tags")
        assert isinstance(refused.json()["error"], str)
        with ollama.Client(server.url, headers={"Authorization": "Bearer the-key"}) as client:
            assert client.list().models[0].model == "tiny"


def test_an_error_in_the_midst_is_the_last_line(
    server: HttpServer, client: ollama.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = server.service.registry.get("tiny")
    forward, calls = model.engine.forward, []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 5:
            raise RuntimeError("secret of the inside")
        return forward(*args, **options)

    monkeypatch.setattr(model.engine, "forward", failing)
    options = {"temperature": 0, "num_predict": 50}
    stream = client.generate("tiny", "Say something else", options=options, stream=True)
    with pytest.raises(ollama.ResponseError, match="internal error") as caught:
        list(stream)
    assert "secret" not in str(caught.value)
