"""Claims about `/v1/decisions` and `/v1/systemone`, by the clients that ask them."""

import itertools
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from minllama.classification import load_classifier
from minllama.classification.decisions import DecisionModel, Question
from minllama.server.run import HttpServer
from tests.server.heads import LABELS, write_heads
from tests.server.running import running

STATE = "The lid broke on the first day, and nobody answers the phone."
KEYS = ("first-key", "second-key")
PREDICATE = {"type": "predicate", "instructions": "Is it a complaint?", "name": "complaint"}
CHOICE = {
    "type": "choice",
    "instructions": "Which team?",
    "choices": [
        {"value": "billing", "description": "money"},
        {"value": "shipping"},
        {"value": True},
        {"value": "True"},
    ],
}
SCORE = {
    "type": "score",
    "instructions": "How angry?",
    "levels": [{"label": "calm"}, {"label": "angry", "description": "loud"}, {"label": "furious"}],
    "name": "anger",
}
QUESTIONS: list[Any] = [PREDICATE, CHOICE, SCORE]
OURS = [
    Question.predicate("Is it a complaint?"),
    Question.choice(
        "Which team?", {"billing": "money", "shipping": None, True: None, "True": None}
    ),
    Question.score("How angry?", ["calm", "angry", "furious"]),
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Path:
    """The tiny model with room for 255 options."""
    from tests.tiny import write_base

    return write_base(tmp_path_factory.mktemp("wide"), default_model, 8192)


@pytest.fixture(scope="module")
def served(
    wide: Path, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HttpServer]:
    heads = write_heads(tmp_path_factory.mktemp("heads"), base)
    sources = {"wide": wide, **{name: heads[name] for name in ("head", "many", "experts")}}
    with running(sources, requests_per_second=0) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: HttpServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(server: HttpServer, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=120)


def decide(server: HttpServer, **body: Any) -> list[dict[str, Any]]:
    answer = post(server, "/v1/decisions", **{"model": "wide", **body})
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["answers"]
    return found


def systemone(server: HttpServer, questions: Any, **body: Any) -> httpx.Response:
    given = {"model": "jev-latest", "state": STATE, "questions": questions, **body}
    return httpx.post(f"{server.url}/v1/systemone", json=given, timeout=120)


@pytest.mark.parametrize("has_key", [False, True])
def test_every_requirement_of_jevcompat(wide: Path, has_key: bool) -> None:
    from jevcompat.runner import run

    keys = KEYS if has_key else ()
    with running({"wide": wide}, keys=keys) as server:
        report = run(server.url, key=KEYS[0] if has_key else None)
    failed = {r.id: [str(f.message) for f in r.findings] for r in report.results if r.findings}
    assert not failed
    skipped = {result.id for result in report.results if result.status == "skip"}
    without = {"auth.bearer", "auth.missing", "auth.invalid"}
    assert skipped == ({"auth.ignored-when-off"} if has_key else without)
    assert report.conformant
    assert len(report.results) == 48


def test_answers_are_the_librarys(served: HttpServer, client: openai.OpenAI) -> None:
    found = client.decisions.create(model="wide", input=STATE, questions=QUESTIONS)
    model = served.service.registry.get("wide")
    expected = DecisionModel(model.llama, model.tokenizer).answer(STATE, OURS)
    predicate, choice, score = found.answers
    assert predicate.type == "predicate"
    assert (predicate.name, predicate.probability) == ("complaint", expected[0].probability)
    assert choice.type == "choice"
    assert choice.name is None
    assert [each.value for each in choice.probabilities] == ["billing", "shipping", True, "True"]
    listed = [each.probability for each in choice.probabilities]
    assert listed == list(expected[1].probabilities)
    assert choice.choice == choice.probabilities[int(np.argmax(listed))].value
    assert choice.confidence == expected[1].confidence
    assert score.type == "score"
    assert [(p.label, p.value) for p in score.probabilities] == [
        ("calm", 0),
        ("angry", 1),
        ("furious", 2),
    ]
    levels = [p.probability for p in score.probabilities]
    assert score.score == pytest.approx(levels[1] + 2 * levels[2])
    extra = predicate.model_extra or {}
    assert extra["x_method"] == "label-words"
    assert extra["x_label_mass"] == expected[0].label_mass
    assert extra["x_calibration"]["is_calibrated"] is False
    assert found.model == "wide"
    n_tokens = expected[0].n_shared + sum(a.n_tokens - a.n_shared for a in expected[:2])
    usage = found.usage
    assert usage.input_tokens > n_tokens
    assert usage.total_tokens == usage.input_tokens
    assert usage.output_tokens == usage.output_tokens_details.reasoning_tokens == 0


def test_what_was_read_before_is_told_and_changes_nothing(served: HttpServer) -> None:
    body = {"model": "wide", "input": "Once more: " + STATE, "questions": QUESTIONS}
    first, again = (post(served, "/v1/decisions", **body).json() for _ in range(2))
    assert first["answers"] == again["answers"]
    told = [answer["usage"]["input_tokens_details"] for answer in (first, again)]
    assert told[0]["cached_tokens"] == 0
    assert told[0]["cache_write_tokens"] == told[1]["cached_tokens"] > 16
    assert told[1]["cache_write_tokens"] == 0
    other = post(served, "/v1/decisions", prompt_cache_key="another", **body).json()
    assert other["usage"]["input_tokens_details"]["cached_tokens"] == 0
    assert other["answers"] == first["answers"]


def test_no_order_and_no_company_changes_a_bit(served: HttpServer) -> None:
    alone = {id(q): decide(served, input=STATE, questions=[q])[0] for q in QUESTIONS}
    for order in itertools.permutations(QUESTIONS):
        for question, answer in zip(
            order, decide(served, input=STATE, questions=order), strict=True
        ):
            assert answer == alone[id(question)]
    by_value = {
        str(type(p["value"])) + str(p["value"]): p for p in alone[id(CHOICE)]["probabilities"]
    }
    draw = random.Random(0)
    for _ in range(6):
        choices = draw.sample(CHOICE["choices"], 4)
        (answer,) = decide(served, input=STATE, questions=[{**CHOICE, "choices": choices}])
        assert answer["choice"] == alone[id(CHOICE)]["choice"]
        assert answer["confidence"] == alone[id(CHOICE)]["confidence"]
        for found in answer["probabilities"]:
            assert by_value[str(type(found["value"])) + str(found["value"])] == found


def test_other_requests_change_no_bit(wide: Path) -> None:
    """Chats run and other texts are classified meanwhile, and the state is read in chunks."""
    import asyncio

    body = {"model": "wide", "input": STATE * 60, "questions": QUESTIONS}

    async def ask(url: str, *, is_busy: bool) -> Any:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            others = []
            if is_busy:
                for i in range(6):
                    chat = {"prompt": f"{i} times", "max_tokens": 60, "ignore_eos": True}
                    others.append(client.post("/v1/completions", json=chat))
                    label = {"input": STATE * (i + 1), "labels": ["a", "b"]}
                    others.append(client.post("/classify", json=label))
            tasks = [asyncio.ensure_future(other) for other in others]
            await asyncio.sleep(0.05 if is_busy else 0)
            found = await client.post("/v1/decisions", json=body)
            for answer in await asyncio.gather(*tasks):
                assert answer.status_code == 200
            return found.json()["answers"]

    answers = []
    for is_busy in (False, True):
        with running({"wide": wide}, token_budget=96, max_sequences=8) as server:
            answers.append(asyncio.run(ask(server.url, is_busy=is_busy)))
    assert answers[0] == answers[1]


def test_400_questions_cost_one_reading_of_the_state(
    served: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = served.service.registry.get("wide")
    layer, n_read = model.llama.layers[0], 0
    forward = type(layer).forward

    def counted(self: Any, h: Any, *args: Any, **options: Any) -> Any:
        nonlocal n_read
        if self is layer:
            n_read += h.shape[0] * h.shape[1]
        return forward(self, h, *args, **options)

    engine_forward = model.engine.forward

    def engine_counted(ids: Any, *args: Any, **options: Any) -> Any:
        nonlocal n_read
        before = n_read
        result = engine_forward(ids, *args, **options)
        n_read = max(n_read, before + ids.numel())  # whether it runs the layers' code or its own
        return result

    monkeypatch.setattr(type(layer), "forward", counted)
    monkeypatch.setattr(model.engine, "forward", engine_counted)
    state = STATE * 40
    questions = [{"type": "predicate", "instructions": f"Is {i} in it?"} for i in range(400)]
    body = {"model": "wide", "input": state, "questions": questions}
    n_state = len(model.tokenizer.encode(state))
    usage = post(served, "/v1/decisions", **body).json()["usage"]
    assert n_state < usage["input_tokens"] < n_state + 400 * 40
    # The prior of each question is that of three short states.
    assert n_read < n_state + 400 * 40 * 4
    n_read = 0
    again = post(served, "/v1/decisions", **body).json()
    assert len(again["answers"]) == 400
    assert again["usage"]["input_tokens_details"]["cached_tokens"] > n_state - 10
    assert n_read < 400 * 40


def test_a_classifier_answers_about_its_labels(served: HttpServer) -> None:
    path = served.service.registry._sources["head"]
    classifier = load_classifier(str(path), device="cpu", dtype="float32")
    values = [{"value": label} for label in reversed(LABELS)]
    asked = {"type": "choice", "instructions": "How is it?", "choices": values}
    levels = {"type": "score", "instructions": "?", "levels": [{"label": x} for x in LABELS[:2]]}
    questions = [asked, PREDICATE, levels]
    choice, refusal, score = decide(served, model="head", input="a fine film", questions=questions)
    expected = classifier.predict_proba(["a fine film"])[0]
    found = {p["value"]: p["probability"] for p in choice["probabilities"]}
    assert found == pytest.approx(dict(zip(LABELS, expected.tolist(), strict=True)), abs=1e-6)
    assert choice["x_method"] == "classifier"
    assert choice["x_calibration"]["ece"] == 0.09
    assert (refusal["type"], refusal["name"]) == ("refusal", "complaint")
    assert "bad, good, so-so" in refusal["x_reason"]
    assert score["x_label_mass"] == pytest.approx(float(expected[:2].sum()), abs=1e-6)
    assert score["score"] == pytest.approx(float(expected[1] / expected[:2].sum()), abs=1e-6)
    for model, question in (("head", PREDICATE), ("many", asked)):
        answer = post(served, "/v1/decisions", model=model, input="x", questions=[question])
        assert answer.status_code == 400
    criteria = dict.fromkeys(LABELS)
    one = systemone(served, {"q": {"type": "choice", "criteria": criteria}}, model="head")
    assert one.json()["answers"]["q"]["x_method"] == "classifier"
    noul = {"type": "noul", "instructions": "Is it?"}
    assert systemone(served, {"q": noul}, model="head").status_code == 422


def test_experts_answer_about_their_labels(served: HttpServer) -> None:
    path = served.service.registry._sources["experts"]
    classifier = load_classifier(str(path), device="cpu", dtype="float32")
    asked = {"type": "choice", "instructions": "?", "choices": [{"value": x} for x in LABELS]}
    (choice,) = decide(served, model="experts", input="a fine film", questions=[asked])
    expected = classifier.predict_proba(["a fine film"])[0]
    found = [p["probability"] for p in choice["probabilities"]]
    assert found == pytest.approx(expected.tolist(), abs=1e-6)
    assert choice["x_calibration"]["is_calibrated"] is True


def test_inputs_of_items(served: HttpServer, client: openai.OpenAI) -> None:
    items: list[Any] = [
        {"role": "system", "content": "A shop."},
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "Where is it?"},
                {"type": "input_json", "data": {"order": [4471, None]}},
            ],
        },
        {"type": "function_call", "name": "find", "arguments": '{"n": 1}', "call_id": "c1"},
        {"type": "function_call_output", "call_id": "c1", "output": "lost"},
        {"type": "custom_tool_call", "name": "sql", "input": "select", "call_id": "c2"},
        {
            "type": "custom_tool_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "none"}],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "output_text", "text": "Sorry."},
                {"type": "refusal", "refusal": "No."},
            ],
        },
    ]
    text = (
        'system: A shop.\nuser: Where is it?\n{"order": [4471, null]}\n'
        'assistant calls find: {"n": 1}\nfind returns: lost\nassistant calls sql: select\n'
        "sql returns: none\nassistant: Sorry.\nNo."
    )
    found = client.decisions.create(model="wide", input=items, questions=QUESTIONS)
    same = client.decisions.create(model="wide", input=text, questions=QUESTIONS)
    assert found.answers == same.answers


def test_a_question_too_long_for_the_context_is_declined(served: HttpServer) -> None:
    long = {"type": "predicate", "instructions": "word " * 8200, "name": "long"}
    fine, declined = decide(served, input=STATE, questions=[PREDICATE, long])
    assert fine == decide(served, input=STATE, questions=[PREDICATE])[0]
    assert (declined["type"], declined["name"]) == ("refusal", "long")
    assert "8,192" in declined["x_reason"]
    answer = post(served, "/v1/decisions", model="wide", input="word " * 9000, questions=QUESTIONS)
    assert answer.status_code == 400
    assert "8,192" in answer.json()["error"]["message"]
    huge = post(served, "/v1/decisions", model="wide", input="x" * 7_000_000, questions=QUESTIONS)
    assert huge.status_code == 400


def nested(depth: int) -> Any:
    return {"a": nested(depth - 1)} if depth > 1 else {"a": 1}


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"questions": []}, "questions"),
        ({"questions": [PREDICATE] * 401}, "questions"),
        ({"questions": None}, "questions"),
        ({"questions": [{**PREDICATE, "type": "noul"}]}, None),
        ({"questions": [{"type": "predicate"}]}, None),
        ({"questions": [{**PREDICATE, "name": 3}]}, None),
        ({"questions": [{**PREDICATE, "instructions": [IMAGE]}]}, "questions.0.instructions.0"),
        ({"questions": [{**CHOICE, "choices": [{"value": "a"}]}]}, "questions.0.choices"),
        ({"questions": [{**CHOICE, "choices": [{"value": "a"}] * 2}]}, "questions.0.choices"),
        (
            {"questions": [{**CHOICE, "choices": [{"value": str(i)} for i in range(256)]}]},
            "questions.0.choices",
        ),
        ({"questions": [{**CHOICE, "choices": [{"value": 1}, {"value": "a"}]}]}, None),
        ({"questions": [{**CHOICE, "choices": [{"value": None}, {"value": "a"}]}]}, None),
        ({"questions": [{**SCORE, "levels": [{"label": "a"}]}]}, "questions.0.levels"),
        ({"questions": [{**SCORE, "levels": [{"label": True}, {"label": "a"}]}]}, None),
        ({"input": 3}, None),
        ({"input": []}, "input"),
        ({"input": [{"content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"role": "tool", "content": "x"}]}, None),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input.0.content.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, None),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.call_id"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]},
            "input.0.call_id",
        ),
        (
            {
                "input": [
                    {"type": "custom_tool_call", "name": "f", "input": "x", "call_id": "c"},
                    {"type": "function_call_output", "call_id": "c", "output": "x"},
                ]
            },
            "input.1.call_id",
        ),
        *(
            (
                {"input": [{"role": "user", "content": [{"type": "input_json", "data": data}]}]},
                "input.0.content.0.data",
            )
            for data in (nested(33), 3, "x", [1], None, {"a": [0] * 10_001}, {"a": "x" * 270_000})
        ),
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"prompt_cache_options": {"ttl": "1h"}}, None),
    ],
)
def test_what_is_wrong_is_named(
    served: HttpServer, change: dict[str, Any], param: str | None
) -> None:
    body = {"model": "wide", "input": STATE, "questions": QUESTIONS, **change}
    answer = post(served, "/v1/decisions", **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"] == param


def test_json_within_the_limits_is_read(served: HttpServer) -> None:
    for data in (nested(32), [{"a": 1}, {}], {}, []):
        content = [{"type": "input_json", "data": data}]
        decide(served, input=[{"role": "user", "content": content}], questions=[PREDICATE])


def test_the_client_of_system_one(served: HttpServer) -> None:
    from typesafe_sdk import Choice, Noul, Score, TypeSafeClient

    questions = {
        "refund": Noul(instructions="Is it a complaint?", criteria={"true": "They are unhappy"}),
        "team": Choice(instructions="Which?", criteria={"billing": {"about": "money"}, "x": None}),
        "anger": Score(instructions="How angry?", criteria=["calm", "angry"]),
    }
    with TypeSafeClient(api_key="none", base_url=served.url, timeout=60) as client:
        found = client.system_one(state={"text": STATE}, questions=questions)
        names = [model.name for model in client.models.list().models]
    assert names == ["wide", "head", "many", "experts"]
    assert 0 <= found.nouls["refund"].noul <= 1
    assert found.choices["team"].choice in ("billing", "x")
    assert found.scores["anger"].legend == {0: "calm", 1: "angry"}


def test_system_one_s_long_levels_are_numbered(served: HttpServer) -> None:
    levels = ["It can wait for some weeks, and nobody would notice", "Today, or they will leave us"]
    answer = systemone(served, {"q": {"type": "score", "criteria": levels}}).json()["answers"]["q"]
    model = served.service.registry.get("wide")
    from minllama.classification.decisions import Option

    own = Question.score("", [Option("0", levels[0]), Option("1", levels[1])])
    (expected,) = DecisionModel(model.llama, model.tokenizer).answer(STATE, [own])
    assert list(answer["probabilities"].values()) == list(expected.probabilities)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"questions": {}}, ["body", "questions"]),
        ({"questions": {"": {"type": "noul", "instructions": "x"}}}, ["body", "questions", ""]),
        (
            {"questions": {"a.b": {"type": "noul"}}},
            ["body", "questions", "a.b", "noul", "criteria"],
        ),
        *(
            (
                {"questions": {name: {"type": "noul", "criteria": 3}}},
                ["body", "questions", name, "noul", "criteria"],
            )
            for name in ("q", "0", "Tone")
        ),
        ({"questions": {"q": {"type": "box", "instructions": "x"}}}, None),
        ({"questions": {"q": {"type": "score", "criteria": ["a", "a"]}}}, None),
        ({"questions": {"q": {"type": "score", "criteria": []}}}, None),
        ({"questions": {"q": {"type": "choice", "criteria": {"a": 1, "b": 2}}}}, None),
        ({"questions": {str(i): {"type": "noul", "instructions": "x"} for i in range(401)}}, None),
        ({"questions": []}, None),
        ({"state": None}, None),
        ({"state": 3}, None),
        ({"state": "word " * 9000}, None),
        ({"assets": {"a": {"type": "image"}}}, ["body", "assets"]),
        ({"model": None}, ["body", "model"]),
    ],
)
def test_what_is_wrong_in_system_one_s_form(
    served: HttpServer, change: dict[str, Any], place: list[str] | None
) -> None:
    questions = {"q": {"type": "noul", "instructions": "Is it?"}}
    answer = systemone(
        served,
        change.get("questions", questions),
        **{name: value for name, value in change.items() if name != "questions"},
    )
    assert answer.status_code == 422, answer.text
    (detail,) = answer.json()["detail"]
    assert set(detail) == {"loc", "msg", "type"}
    assert detail["loc"][0] == "body"
    if place is not None:
        assert detail["loc"] == place


def test_other_errors_in_system_one_s_form(served: HttpServer, wide: Path) -> None:
    noul = {"q": {"type": "noul", "instructions": "Is it?"}}
    unknown = systemone(served, noul, model="other")
    assert unknown.status_code == 404
    assert unknown.json()["detail"]["error_type"] == "not_found"
    broken = httpx.post(f"{served.url}/v1/systemone", content=b'{"model": ')
    assert broken.status_code == 422
    assert json.loads(broken.text)["detail"][0]["loc"] == ["body"]


def test_a_client_that_goes_away_leaves_nothing(
    served: HttpServer, caplog: pytest.LogCaptureFixture
) -> None:
    questions = [{"type": "predicate", "instructions": f"Is number {i} in it?"} for i in range(400)]
    body = {"model": "wide", "input": "word " * 4000, "questions": questions}
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{served.url}/v1/decisions", json=body, timeout=0.3)
    worker = served.service._worker
    for _ in range(600):
        all_jobs = worker._of_engine.values()
        if not (served.service.n_in_flight or any(jobs.scheduler.is_busy for jobs in all_jobs)):
            break
        time.sleep(0.05)
    assert served.service.n_in_flight == 0
    assert not any(jobs.left or jobs.evaluations or jobs.scheduler.is_busy for jobs in all_jobs)
    assert not any("a request failed" in record.message for record in caplog.records)
