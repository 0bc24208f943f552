"""Claims about tokenizing over HTTP: the ids are transformers', in vLLM's shapes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from minllama.checkpoints.huggingface import write_huggingface
from minllama.checkpoints.open import open_checkpoint
from minllama.server.run import HttpServer
from tests.server.running import running
from tests.tiny import our_model

TEXTS = ["Once upon a time", "", " x ", "é😀\n\n\tend", "<|im_end|> is text or not", "a" * 3000]


@pytest.fixture(scope="module")
def reference(long_base: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(long_base)


def post(server: HttpServer, path: str, **body: Any) -> Any:
    answer = httpx.post(server.url + path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("has_ends", [True, False])
def test_ids_are_those_of_transformers(
    server: HttpServer, reference: Any, text: str, has_ends: bool
) -> None:
    made = post(server, "/tokenize", prompt=text, add_special_tokens=has_ends)
    assert made["tokens"] == reference.encode(text, add_special_tokens=has_ends)
    assert made["count"] == len(made["tokens"])
    assert made["max_model_len"] == 1024
    assert made["token_strs"] is None
    assert post(server, "/detokenize", tokens=made["tokens"]) == {"prompt": text}


def test_special_tokens_may_stay_text(server: HttpServer) -> None:
    tokenizer = server.service.registry.get("tiny").tokenizer
    made = post(server, "/tokenize", prompt="<|im_end|>", parse_special=False)
    assert made["tokens"] == tokenizer.encode("<|im_end|>")
    assert tokenizer.eos_id not in made["tokens"]


@pytest.mark.parametrize("opens", [True, False])
def test_messages_are_rendered_as_in_transformers(
    server: HttpServer, reference: Any, opens: bool
) -> None:
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say something"},
        {"role": "assistant", "content": "Something."},
    ]
    made = post(server, "/tokenize", messages=talk, add_generation_prompt=opens)
    text = reference.apply_chat_template(talk, tokenize=False, add_generation_prompt=opens)
    assert made["tokens"] == reference.encode(text, add_special_tokens=False)
    hostile = [{"role": "user", "content": "<|im_end|>"}]
    ids = post(server, "/tokenize", messages=hostile)["tokens"]
    assert ids.count(reference.convert_tokens_to_ids("<|im_end|>")) == 2


def test_a_chat_reads_as_many_tokens(server: HttpServer) -> None:
    talk = [{"role": "user", "content": "Say something"}]
    count = post(server, "/tokenize", messages=talk)["count"]
    made = post(server, "/v1/chat/completions", messages=talk, max_tokens=1)
    assert made["usage"]["prompt_tokens"] == count


def test_tokens_are_spelled(server: HttpServer) -> None:
    made = post(server, "/tokenize", prompt="ab é😀", return_token_strs=True)
    parts = [part for part in made["token_strs"] if not part.startswith("bytes:")]
    assert "".join(parts) == "ab é"
    assert len(made["token_strs"]) == made["count"]


def test_a_beginning_of_text_stands_there_once(tmp_path: Path, default_model: Path) -> None:
    vocabulary = open_checkpoint(default_model).vocabulary
    assert vocabulary is not None
    vocabulary = replace(vocabulary, add_bos=True)
    model = our_model(vocab_size=49152, max_seq_len=128)
    write_huggingface(tmp_path, model.config, model.state_dict(), vocabulary=vocabulary)
    with running({"tiny": tmp_path}) as server:
        words = server.service.registry.get("tiny").tokenizer
        ids = words.encode("hello")
        assert ids[0] == words.bos_id
        begin = words.token_text(words.bos_id)
        for text, has_ends, expected in (
            ("hello", True, ids),
            ("hello", False, ids[1:]),
            (f"{begin}hello", True, ids),
            (f"{begin}hello", False, ids),
        ):
            made = post(server, "/tokenize", prompt=text, add_special_tokens=has_ends)
            assert made["tokens"] == expected


def test_the_tokenizer_is_described(server: HttpServer, reference: Any) -> None:
    found = httpx.get(f"{server.url}/tokenizer_info").json()
    for name in ("bos_token", "eos_token", "bos_token_id", "eos_token_id", "chat_template"):
        assert found[name] == getattr(reference, name)
    assert found["vocab_size"] == len(reference)
    assert found["model_max_length"] == 1024
    missing = httpx.get(f"{server.url}/tokenizer_info", params={"model": "other"})
    assert missing.status_code == 404


WRONG: list[tuple[str, str | None, dict[str, Any]]] = [
    ("/tokenize", "prompt", {}),
    ("/tokenize", "prompt", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}),
    ("/tokenize", "prompt", {"prompt": 1}),
    ("/tokenize", "prompt", {"prompt": ["x"]}),
    ("/tokenize", "messages", {"messages": []}),
    ("/tokenize", "messages.0.role", {"messages": [{"role": "king", "content": "x"}]}),
    ("/tokenize", "add_special_tokens", {"prompt": "x", "add_special_tokens": 1}),
    ("/tokenize", "chat_template", {"prompt": "x", "chat_template": "{{ 1 }}"}),
    (
        "/tokenize",
        "continue_final_message",
        {"messages": [{"role": "user", "content": "x"}], "continue_final_message": True},
    ),
    ("/tokenize", None, {"prompt": "word " * 700_000}),
    ("/detokenize", "tokens", {}),
    ("/detokenize", "tokens", {"tokens": [49152]}),
    ("/detokenize", "tokens.0", {"tokens": [-1]}),
    ("/detokenize", "tokens.0", {"tokens": [True]}),
    ("/detokenize", "tokens.1", {"tokens": [1, 1.5]}),
    ("/detokenize", "tokens", {"tokens": "x"}),
]


@pytest.mark.parametrize(("path", "param", "body"), WRONG)
def test_what_is_wrong_is_named(
    server: HttpServer, path: str, param: str | None, body: dict[str, Any]
) -> None:
    answer = httpx.post(server.url + path, json=body, timeout=30)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
