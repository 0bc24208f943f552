"""Claims about `/v1/embeddings`, by the `openai` client."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from minllama.engine.states import pooled_states
from minllama.server.run import HttpServer
from tests.server.heads import write_heads
from tests.server.running import running

TEXTS = ["Once upon a time", "x", "The quick brown fox jumps over it"]


@pytest.fixture(scope="module")
def served(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    heads = write_heads(tmp_path_factory.mktemp("heads"), base)
    with running({"base": base, "two": heads["two"], "experts": heads["experts"]}) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: HttpServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(server: HttpServer, text: str, layer: int, pooling: Any) -> np.ndarray:
    model = server.service.registry.get("base")
    ids = torch.tensor([model.tokenizer.encode(text)])
    with torch.no_grad():
        return pooled_states(model.llama, ids, None, layer, pooling)[0].numpy()


@pytest.mark.parametrize("form", ["float", "base64", None])
def test_vectors_are_of_length_one(served: HttpServer, client: openai.OpenAI, form: Any) -> None:
    options = {} if form is None else {"encoding_format": form}
    found = client.embeddings.create(model="base", input=TEXTS, **options)
    for text, entry in zip(TEXTS, found.data, strict=True):
        own = expected(served, text, 2, "mean")
        vector = entry.embedding
        if form == "base64":  # asked for by name, it is left as it is
            vector = np.frombuffer(base64.b64decode(vector), dtype="<f4")
        assert vector == pytest.approx(own / np.linalg.norm(own), abs=1e-5)
    n_tokens = sum(len(served.service.registry.get("base").tokenizer.encode(t)) for t in TEXTS)
    assert found.usage.prompt_tokens == found.usage.total_tokens == n_tokens
    assert [entry.index for entry in found.data] == [0, 1, 2]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("pooling", ["last", "mean", "weighted-mean"])
def test_a_layer_and_a_pooling_may_be_chosen(
    served: HttpServer, client: openai.OpenAI, layer: int, pooling: str
) -> None:
    extra = {"x_layer": layer, "x_pooling": pooling, "x_normalize": False}
    found = client.embeddings.create(model="base", input=TEXTS[2], extra_body=extra)
    own = expected(served, TEXTS[2], layer, pooling)
    assert found.data[0].embedding == pytest.approx(own, abs=1e-5)


def test_ids_are_read_as_they_are(served: HttpServer, client: openai.OpenAI) -> None:
    ids = [served.service.registry.get("base").tokenizer.encode(text) for text in TEXTS]
    texts = client.embeddings.create(model="base", input=TEXTS)
    for given in (ids, ids[2]):
        found = client.embeddings.create(model="base", input=given)
        assert found.data[-1].embedding == pytest.approx(texts.data[-1].embedding, abs=1e-6)


def test_a_classifier_gives_what_its_head_reads(served: HttpServer, client: openai.OpenAI) -> None:
    classifier: Any = served.service.registry.get("two").classifier
    extra = {"x_normalize": False}
    found = client.embeddings.create(model="two", input=TEXTS, extra_body=extra)
    vectors = torch.tensor([entry.embedding for entry in found.data])
    with torch.no_grad():
        logits = classifier.score(vectors).numpy()
    assert logits == pytest.approx(classifier.predict_logits(TEXTS), abs=1e-4)
    several = client.embeddings.create(model="experts", input=TEXTS[0])
    own = {"x_layer": 2, "x_pooling": "last"}
    chosen = client.embeddings.create(model="experts", input=TEXTS[0], extra_body=own)
    assert several.data[0].embedding == chosen.data[0].embedding
    other = client.embeddings.create(model="base", input=TEXTS[0])
    assert several.data[0].embedding != other.data[0].embedding


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": "x", "x_layer": 3}, "x_layer"),
        ({"input": "x", "x_layer": -1}, "x_layer"),
        ({"input": "x", "x_layer": True}, "x_layer"),
        ({"input": "x", "x_pooling": "max"}, "x_pooling"),
        ({"input": "x", "dimensions": 3}, "dimensions"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": "word " * 300}, "input"),
        ({"input": [49152]}, "input"),
    ],
)
def test_what_is_wrong_is_named(served: HttpServer, body: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{served.url}/v1/embeddings", json={"model": "base", **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_the_dimension_that_there_is_may_be_named(client: openai.OpenAI) -> None:
    found = client.embeddings.create(model="base", input="x", dimensions=32)
    assert len(found.data[0].embedding) == 32
