"""Claims about `/classify` and `/predict`: their numbers are the library's."""

import asyncio
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from minllama.classification import LlamaZeroShotClassifier, load_classifier
from minllama.classification.base import Classifier
from minllama.classification.explain import explain
from minllama.server.run import HttpServer
from tests.server.heads import LABELS, write_heads
from tests.server.running import running

TEXTS = ["a fine film", "dull", "it drags on and on and on", "x", "what a mess: three hours"]
KINDS = ("head", "two", "many", "numbers", "words", "experts")


@pytest.fixture(scope="module")
def heads(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_heads(tmp_path_factory.mktemp("heads"), base)


@pytest.fixture(scope="module")
def served(base: Path, heads: dict[str, Path]) -> Iterator[HttpServer]:
    with running({"base": base, **heads}, requests_per_second=0) as server:
        yield server


@pytest.fixture(scope="module")
def library(heads: dict[str, Path]) -> dict[str, Classifier]:
    return {
        name: load_classifier(path, device="cpu", dtype="float32") for name, path in heads.items()
    }


def post(server: HttpServer, path: str = "/classify", **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def classify(server: HttpServer, **body: Any) -> dict[str, Any]:
    answer = post(server, **body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def probs(found: Mapping[str, Any]) -> np.ndarray:
    return np.array([entry["probs"] for entry in found["data"]])


@pytest.mark.parametrize("kind", ["head", "two", "words", "experts"])
def test_probabilities_are_the_librarys(
    served: HttpServer, library: dict[str, Classifier], kind: str
) -> None:
    classifier = library[kind]
    found = classify(served, model=kind, input=TEXTS)
    assert probs(found) == pytest.approx(classifier.predict_proba(TEXTS), abs=2e-6)
    assert [entry["label"] for entry in found["data"]] == classifier.predict(TEXTS)
    assert [entry["index"] for entry in found["data"]] == list(range(len(TEXTS)))
    assert {entry["num_classes"] for entry in found["data"]} == {len(classifier.labels)}
    assert found["x_classes"] == list(classifier.labels)
    assert (found["object"], found["model"], found["x_method"]) == ("list", kind, "classifier")
    n_tokens = sum(len(classifier.encode(text)) for text in TEXTS)
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["total_tokens"]) == (n_tokens, n_tokens)
    assert usage["completion_tokens"] == 0
    raw = classify(served, model=kind, input=TEXTS, use_activation=False)
    assert probs(raw) == pytest.approx(classifier.predict_logits(TEXTS), abs=2e-5)
    assert [entry["label"] for entry in raw["data"]] == classifier.predict(TEXTS)


@pytest.mark.parametrize("kind", KINDS)
def test_one_text_alone_is_the_librarys_to_the_bit(
    served: HttpServer, library: dict[str, Classifier], kind: str
) -> None:
    classifier = library[kind]
    for text in TEXTS:
        (entry,) = classify(served, model=kind, input=text, use_activation=False)["data"]
        assert entry["probs"] == classifier.predict_logits([text])[0].tolist()


def test_several_labels_a_text(served: HttpServer, library: dict[str, Classifier]) -> None:
    classifier = library["many"]
    found = classify(served, model="many", input=TEXTS)
    expected = classifier.predict_proba(TEXTS)
    assert probs(found) == pytest.approx(expected, abs=2e-6)
    for entry, chosen in zip(found["data"], classifier.predict(TEXTS), strict=True):
        assert entry["x_labels"] == list(chosen)
        likely = {label: entry["probs"][LABELS.index(label)] for label in chosen}
        assert entry["label"] == (max(likely, key=likely.__getitem__) if likely else None)
    assert len({len(entry["x_labels"]) for entry in found["data"]}) > 1


def test_a_regression_gives_numbers(served: HttpServer, library: dict[str, Classifier]) -> None:
    found = classify(served, model="numbers", input=TEXTS)
    assert probs(found)[:, 0] == pytest.approx(library["numbers"].predict_values(TEXTS), abs=1e-5)
    assert {(e["label"], e["num_classes"]) for e in found["data"]} == {(None, 1)}
    assert found["x_calibration"] is None
    listed = post(served, "/predict", model="numbers", inputs=TEXTS[0]).json()
    assert [entry["label"] for entry in listed] == ["stars"]
    assert listed[0]["score"] == pytest.approx(found["data"][0]["probs"][0], abs=1e-4)


def test_what_is_known_of_the_calibration(served: HttpServer) -> None:
    found = classify(served, model="head", input="x")["x_calibration"]
    assert found == {
        "is_calibrated": True,
        "temperature": 1.7,
        "n_texts": 40,
        "ece": 0.09,
        "ece_split": "test",
        "ece_n_texts": 60,
    }
    assert classify(served, model="experts", input="x")["x_calibration"]["is_calibrated"] is True
    unknown = classify(served, model="two", input="x")["x_calibration"]
    assert unknown["is_calibrated"] is False
    assert unknown["ece"] is None


@pytest.mark.parametrize("score", ["sum", "token-mean", "byte-mean", "pmi", "contextual"])
def test_label_words_on_a_language_model(served: HttpServer, score: str) -> None:
    model = served.service.registry.get("base")
    own = LlamaZeroShotClassifier(
        model.llama, model.tokenizer, ["bad", "very good"], "It is {text}, so", score=score
    )
    body = {"labels": ["bad", "very good"], "prompt": "It is {text}, so", "score": score}
    found = classify(served, input=TEXTS, **body)
    assert found["model"] == "base"
    assert found["x_method"] == "label-words"
    assert probs(found) == pytest.approx(own.predict_proba(TEXTS), abs=2e-6)
    raw = classify(served, input=TEXTS, use_activation=False, **body)
    assert probs(raw) == pytest.approx(own.predict_logits(TEXTS), abs=2e-5)
    if score == "sum":
        mass = [entry["x_label_mass"] for entry in found["data"]]
        assert mass == pytest.approx(np.exp(own.predict_logits(TEXTS)).sum(-1), rel=1e-4)


def test_ids_are_whole_prompts(served: HttpServer, library: dict[str, Classifier]) -> None:
    classifier = library["two"]
    ids = [list(classifier.encode(text).ids) for text in TEXTS]
    expected = classifier.predict_proba(TEXTS)
    assert probs(classify(served, model="two", input=ids)) == pytest.approx(expected, abs=2e-6)
    one = classify(served, model="two", input=ids[0])
    assert probs(one) == pytest.approx(expected[:1], abs=2e-6)
    words = library["words"]
    whole = [list(words.encode(text).ids) for text in TEXTS]
    found = classify(served, model="words", input=whole)
    assert probs(found) == pytest.approx(words.predict_proba(TEXTS), abs=2e-6)


def test_words_are_read_from_texts_alone(
    served: HttpServer, library: dict[str, Classifier]
) -> None:
    classifier = library["experts"]
    ids = list(classifier.encode(TEXTS[0]).ids)
    refused = post(served, model="experts", input=ids)
    assert refused.status_code == 400
    assert "give texts, not token ids" in refused.json()["error"]["message"]
    expected = classifier.predict_proba(TEXTS)
    frame = {"add_special_tokens": False, "truncate_prompt_tokens": 50}
    found = classify(served, model="experts", input=TEXTS, **frame)
    assert probs(found) == pytest.approx(expected, abs=2e-6)
    long = "a fine mess " * 90
    cut = classify(served, model="experts", input=long, truncate_prompt_tokens=-1)
    assert probs(cut) == pytest.approx(classifier.predict_proba([long]), abs=2e-6)
    listed = post(served, "/predict", inputs=[[text] for text in TEXTS], model="experts").json()
    for entries, row in zip(listed, expected, strict=True):
        assert [e["score"] for e in entries] == pytest.approx(sorted(row, reverse=True), abs=2e-6)


def test_long_texts(served: HttpServer, library: dict[str, Classifier]) -> None:
    long = "one two three four five six seven eight nine ten " * 30
    refused = post(served, model="head", input=["x", long])
    assert refused.status_code == 400
    error = refused.json()["error"]
    n_tokens = len(served.service.registry.get("base").tokenizer.encode(long))
    assert str(n_tokens) in error["message"]
    assert "128" in error["message"]
    assert (error["param"], error["code"]) == ("input.1", "context_length_exceeded")
    # The library truncates; a classifier that was trained on shorter texts always does.
    everything = classify(served, model="head", input=long, truncate_prompt_tokens=-1)
    expected = library["head"].predict_proba([long])
    assert probs(everything) == pytest.approx(expected, abs=2e-6)
    assert everything["data"][0]["x_truncated"] is True
    trained = classify(served, model="two", input=long)
    assert probs(trained) == pytest.approx(library["two"].predict_proba([long]), abs=2e-6)
    assert trained["usage"]["prompt_tokens"] <= 24
    ten = copy.copy(library["head"].template)
    for side, keeps_end in (("right", False), ("left", True)):
        ten.max_len, ten.keep_end = 10, keeps_end
        some = {"truncate_prompt_tokens": 10, "truncation_side": side, "use_activation": False}
        found = classify(served, model="head", input=long, **some)
        logits = library["head"].predict_encoded([ten.encode(long)])
        assert probs(found) == pytest.approx(logits, abs=2e-5)
    ids = [[*range(1, 100)], [5]]
    end = classify(served, model="head", input=ids, truncate_prompt_tokens=7)
    same = classify(served, model="head", input=[[*range(93, 100)], [5]])
    assert probs(end) == pytest.approx(probs(same), abs=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_explanations_are_the_librarys(
    served: HttpServer, library: dict[str, Classifier], kind: str
) -> None:
    found = classify(served, model=kind, input=TEXTS[:3], explain=True)
    plain = classify(served, model=kind, input=TEXTS[:3])
    assert probs(found) == pytest.approx(probs(plain), abs=1e-5)
    assert found["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
    for text, entry in zip(TEXTS, found["data"], strict=False):
        expected = explain(library[kind], text).to_dict()
        explained = entry["x_explanation"]
        assert explained["words"] == expected["words"]
        for ours, theirs in zip(explained["targets"], expected["targets"], strict=True):
            assert ours["label"] == theirs["label"]
            pairs = list(zip(ours["effects"], theirs["effects"], strict=True))
            assert [one is None for one, _ in pairs] == [other is None for _, other in pairs]
            known = [pair for pair in pairs if None not in pair]
            assert [p[0] for p in known] == pytest.approx([p[1] for p in known], abs=1e-4)


def test_a_label_may_be_explained_by_few_words(served: HttpServer) -> None:
    asked = {"target": "good", "max_words": 2}
    (entry,) = classify(served, model="head", input=TEXTS[2], explain=asked)["data"]
    explained = entry["x_explanation"]
    assert [target["label"] for target in explained["targets"]] == ["good"]
    assert len(explained["words"]) == 2
    body = {"labels": ["a", "b"], "score": "contextual", "explain": {"target": "b"}}
    words = classify(served, model="base", input=TEXTS[0], **body)["data"][0]["x_explanation"]
    assert [target["label"] for target in words["targets"]] == ["b"]


def test_texts_of_several_requests_are_read_together(
    served: HttpServer, library: dict[str, Classifier]
) -> None:
    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            bodies = [{"model": "head", "input": text} for text in TEXTS * 8]
            return await asyncio.gather(*(client.post("/classify", json=body) for body in bodies))

    metrics = served.service.metrics
    before = metrics.evaluated_texts._value.get()
    batches = sum(bucket.get() for bucket in metrics.evaluation_batch._buckets)
    answers = asyncio.run(ask())
    expected = library["head"].predict_proba(TEXTS * 8)
    found = np.array([answer.json()["data"][0]["probs"] for answer in answers])
    assert found == pytest.approx(expected, abs=2e-6)
    assert metrics.evaluated_texts._value.get() - before == len(answers)
    now = sum(bucket.get() for bucket in metrics.evaluation_batch._buckets)
    assert now - batches < len(answers)


def test_predictions_in_tei_s_form(served: HttpServer, library: dict[str, Classifier]) -> None:
    classifier = library["head"]
    single = post(served, "/predict", inputs=TEXTS[0], model="head").json()
    assert [entry["score"] for entry in single] == sorted(
        (entry["score"] for entry in single), reverse=True
    )
    expected = dict(zip(LABELS, classifier.predict_proba(TEXTS[:1])[0].tolist(), strict=True))
    assert {e["label"]: e["score"] for e in single} == pytest.approx(expected, abs=1e-6)
    batch = post(served, "/predict", inputs=[[TEXTS[0]], [TEXTS[1], "b"]], raw_scores=True)
    logits = classifier.predict_logits([TEXTS[0], f"{TEXTS[1]}\nb"])
    assert len(batch.json()) == 2
    for entries, row in zip(batch.json(), logits.tolist(), strict=True):
        found = {entry["label"]: entry["score"] for entry in entries}
        assert found == pytest.approx(dict(zip(LABELS, row, strict=True)), abs=2e-5)
    pair = post(served, "/predict", inputs=[TEXTS[1], "b"], raw_scores=True).json()
    assert [entry["label"] for entry in pair] == [entry["label"] for entry in batch.json()[1]]
    assert isinstance(pair[0]["score"], float)
    long = "one two three " * 100
    cut = post(served, "/predict", inputs=long, truncate=True, truncation_direction="Left")
    assert cut.status_code == 200
    other = post(served, "/predict", inputs=long, truncate=True, truncation_direction="right")
    assert other.json() != cut.json()


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"inputs": ""}, 400, "empty"),
        ({"inputs": []}, 422, "validation"),
        ({"inputs": ["a", "b", "c"]}, 422, "validation"),
        ({"inputs": [["a", "b", "c"]]}, 422, "validation"),
        ({"inputs": [[]]}, 422, "validation"),
        ({"inputs": ["a", ["b"]]}, 422, "validation"),
        ({"inputs": 3}, 422, "validation"),
        ({}, 422, "validation"),
        ({"inputs": "a", "truncate": "yes"}, 422, "validation"),
        ({"inputs": "a", "truncation_direction": "up"}, 422, "validation"),
        ({"inputs": "word " * 300}, 413, "validation"),
        ({"inputs": [["a"]] * 2049}, 413, "validation"),
        ({"inputs": "a", "model": "base"}, 424, "backend"),
        ({"inputs": "a", "model": "other"}, 404, "validation"),
    ],
)
def test_errors_in_tei_s_form(
    served: HttpServer, body: dict[str, Any], status: int, kind: str
) -> None:
    answer = post(served, "/predict", **body)
    assert (answer.status_code, answer.json()["error_type"]) == (status, kind)
    assert set(answer.json()) == {"error", "error_type"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["x", ""]}, "input.1"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": [1, "x"]}, None),
        ({"input": [True]}, None),
        ({"input": [-1]}, None),
        ({"input": [2**31]}, None),
        ({"input": [49152]}, "input"),
        ({"input": {"a": 1}}, None),
        ({"input": None}, None),
        ({}, "input"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "x", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"input": "x", "truncate_prompt_tokens": 1.5}, "truncate_prompt_tokens"),
        ({"input": "x", "truncate_prompt_tokens": True}, "truncate_prompt_tokens"),
        ({"input": "x", "truncation_side": "up"}, "truncation_side"),
        ({"input": "x", "use_activation": 1}, "use_activation"),
        ({"input": "x", "model": ["head"]}, "model"),
        ({"input": "x", "explain": 1}, None),
        ({"input": [1], "explain": True}, "explain"),
        ({"input": "x", "explain": True, "truncate_prompt_tokens": 3}, "explain"),
        ({"input": "x", "explain": {"target": "none"}}, None),
        ({"input": "x", "explain": {"max_words": 0}}, None),
        ({"input": ["a b c d"] * 600, "explain": True}, "explain"),
        ({"input": "x", "model": "head", "labels": ["a", "b"]}, "labels"),
        ({"input": "x", "model": "head", "prompt": "{text}"}, "prompt"),
        ({"input": "x", "model": "base"}, "labels"),
        ({"input": "x", "labels": ["a"]}, "labels"),
        ({"input": "x", "labels": ["a", "a"]}, None),
        ({"input": "x", "labels": ["a", " "]}, None),
        ({"input": "x", "labels": ["a", "b" * 2000]}, "labels"),
        ({"input": "x", "labels": [str(i) for i in range(256)]}, "labels"),
        ({"input": "x", "labels": ["a", "b"], "prompt": "no place"}, None),
        ({"input": "x", "labels": ["a", "b"], "prompt": "{text}", "score": "pmi"}, None),
        ({"input": "x", "labels": ["a", "b"], "score": "batch"}, "score"),
        ({"input": "x", "labels": ["a", "b"], "prior_strength": 3}, "prior_strength"),
        ({"input": "x", "labels": ["a", "b"], "label_words": ["a"]}, None),
        ({"input": "x", "labels": ["a", "b"], "prompt": "word " * 200 + "{text}"}, None),
        ({"input": "x", "labels": ["a", "b"], "truncate_prompt_tokens": 2}, None),
    ],
)
def test_what_is_wrong_is_named(
    served: HttpServer, body: dict[str, Any], param: str | None
) -> None:
    answer = post(served, **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"] == param
