"""Claims about `echo` with log-probabilities: they are those of a full forward pass."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from minllama.generation.api import generate
from minllama.options import GenerationOptions
from minllama.server.run import HttpServer

PROMPTS = ["Once upon a time", "The quick brown fox jumps", "é😀 x"]


@pytest.fixture(scope="module")
def client(server: HttpServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ids_of(server: HttpServer, text: str) -> list[int]:
    ids: list[int] = server.service.registry.get("tiny").tokenizer.encode(text)
    return ids


@torch.inference_mode()
def log_probs(server: HttpServer, ids: list[int]) -> torch.Tensor:
    """Of each next token, (T, V), by a plain forward pass."""
    llama = server.service.registry.get("tiny").llama
    return llama(torch.tensor([ids]), logits="all").logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("as_ids", [True, False])
@pytest.mark.parametrize("top", [0, 1, 3])
def test_log_probabilities_of_a_prompt_are_the_models(
    server: HttpServer, client: openai.OpenAI, prompt: str, as_ids: bool, top: int
) -> None:
    ids = ids_of(server, prompt)
    made = client.completions.create(
        model="tiny",
        prompt=ids if as_ids else prompt,
        echo=True,
        logprobs=top,
        max_tokens=2,
        temperature=0,
    ).choices[0]
    found = made.logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.text_offset is not None
    assert len(found.token_logprobs) == len(found.top_logprobs) == len(ids) + 2
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    expected = log_probs(server, ids)
    own = [expected[i, token].item() for i, token in enumerate(ids[1:])]
    assert found.token_logprobs[1 : len(ids)] == pytest.approx(own, abs=1e-4)
    for i, likely in enumerate(found.top_logprobs[1 : len(ids)]):
        assert max(likely.values()) == pytest.approx(
            max(expected[i].max().item() if top else own[i], own[i]), abs=1e-4
        )
    (whole,) = generate(
        server.service.registry.get("tiny").llama,
        server.service.registry.get("tiny").tokenizer,
        [ids],
        GenerationOptions(max_new_tokens=2, logprobs=top, prompt_logprobs=True),
    )
    assert made.text == prompt + whole.text
    assert whole.logprobs is not None
    assert whole.prompt_logprobs is not None
    every = [*whole.prompt_logprobs, *whole.logprobs]
    assert found.token_logprobs[1:] == pytest.approx([t.logprob for t in every[1:]], abs=1e-4)
    offsets = [*(t.offset for t in whole.prompt_logprobs)]
    offsets += [len(prompt) + token.offset for token in whole.logprobs]
    assert found.text_offset == offsets


def test_offsets_of_tokens_are_their_places_in_the_text(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model="tiny", prompt=PROMPTS[0], echo=True, logprobs=0, max_tokens=3, temperature=0
    ).choices[0]
    found = made.logprobs
    assert found is not None
    for token, offset in zip(found.tokens or (), found.text_offset or (), strict=True):
        assert made.text.startswith(token, offset)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_prompt_alone_is_echoed(
    server: HttpServer, client: openai.OpenAI, is_streamed: bool
) -> None:
    options: dict[str, Any] = {"prompt": PROMPTS, "max_tokens": 0, "echo": True}
    made = client.completions.create(model="tiny", logprobs=1, stream=is_streamed, **options)
    choices = [c for part in (made if is_streamed else [made]) for c in part.choices]
    assert [choice.text for choice in choices] == PROMPTS
    assert [choice.finish_reason for choice in choices] == ["length"] * 3
    for choice, prompt in zip(choices, PROMPTS, strict=True):
        assert len(choice.logprobs.token_logprobs) == len(ids_of(server, prompt))
    plain = client.completions.create(model="tiny", **options)
    assert [choice.text for choice in plain.choices] == PROMPTS
    assert plain.choices[0].logprobs is None
    assert plain.usage is not None
    assert plain.usage.completion_tokens == 0
    assert plain.usage.prompt_tokens == sum(len(ids_of(server, p)) for p in PROMPTS)


def test_a_stream_begins_with_the_prompt(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "prompt": PROMPTS[:2],
        "n": 2,
        "echo": True,
        "logprobs": 2,
        "max_tokens": 4,
        "temperature": 1.0,
        "seed": 5,
    }
    whole = client.completions.create(**options)
    texts, logprobs = [""] * 4, [[] for _ in range(4)]  # type: ignore[var-annotated]
    for chunk in client.completions.create(**options, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        if choice.logprobs is not None:
            logprobs[choice.index] += choice.logprobs.token_logprobs
    assert texts == [choice.text for choice in whole.choices]
    for choice, found in zip(whole.choices, logprobs, strict=True):
        assert choice.logprobs is not None
        assert found[0] is None
        assert found[1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-4)  # type: ignore[index]


def test_one_token_has_no_log_probability(server: HttpServer) -> None:
    body = {"prompt": [5], "echo": True, "logprobs": 1, "max_tokens": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["logprobs"]["token_logprobs"] == [None]


def test_an_evaluation_harness_is_answered(server: HttpServer) -> None:
    # What lm-evaluation-harness sends, and what it reads of the answers.
    contexts = [ids_of(server, text) for text in PROMPTS]
    tails = [ids_of(server, text) for text in (" there", " over", " y z")]
    body = {
        "model": "tiny",
        "prompt": [a + b for a, b in zip(contexts, tails, strict=True)],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    answer = httpx.post(f"{server.url}/v1/completions", json=body).json()
    for choice, context, tail in zip(answer["choices"], contexts, tails, strict=True):
        expected = log_probs(server, context + tail)[len(context) - 1 : -1]
        total = sum(expected[i, token].item() for i, token in enumerate(tail))
        own = choice["logprobs"]["token_logprobs"][len(context) : -1]
        assert sum(own) == pytest.approx(total, abs=1e-3)
        top = choice["logprobs"]["top_logprobs"][len(context) : -1]
        is_greedy = [p == max(likely.values()) for p, likely in zip(own, top, strict=True)]
        assert is_greedy == [bool(expected[i].argmax() == t) for i, t in enumerate(tail)]
