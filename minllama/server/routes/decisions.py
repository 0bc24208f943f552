"""OpenAI's `POST /v1/decisions`: questions about an input, answered with probabilities."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import Field, StrictBool, StrictStr

from minllama.classification.decisions.questions import Answer, Option, Question, as_text
from minllama.errors import MinllamaError
from minllama.server.deciding import Decided, decide
from minllama.server.errors import RequestError
from minllama.server.routing import Body, check_count, log_texts, service_of
from minllama.server.routing import router as make_router

router = make_router()

# OpenAI's limits of a part of JSON.
MAX_DEPTH, MAX_VALUES, MAX_BYTES = 32, 10_000, 256 * 1024
IMAGE = "images cannot be read by this model; describe it in words"


class Part(Body):
    """A part of a content: text or JSON; images are refused."""

    type: Literal["input_text", "input_json", "input_image", "output_text", "refusal"]
    text: str | None = None
    data: Any = None
    refusal: str | None = None


class Item(Body):
    """A message, a call of a tool, or what one has given."""

    type: Literal[
        "message",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
    ] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[Part] | None = None
    name: str | None = Field(None, max_length=1024)
    call_id: str | None = Field(None, max_length=1024)
    arguments: str | None = None
    input: str | None = None
    output: str | list[Part] | None = None


class Choice(Body):
    """An option; strings and booleans of the same text are two."""

    value: StrictStr | StrictBool
    description: str | None = None


class Level(Body):
    """A level of a score, from the lowest to the highest."""

    label: str
    description: str | None = None


class _Asked(Body):
    instructions: str | list[Part]
    name: str | None = Field(None, max_length=1024)


class PredicateQuestion(_Asked):
    """How likely is it that a statement is true?"""

    type: Literal["predicate"]


class ChoiceQuestion(_Asked):
    """Which of some values?"""

    type: Literal["choice"]
    choices: list[Choice]


class ScoreQuestion(_Asked):
    """Which of some levels?"""

    type: Literal["score"]
    levels: list[Level]


AnyQuestion = Annotated[
    PredicateQuestion | ChoiceQuestion | ScoreQuestion, Field(discriminator="type")
]


class CacheOptions(Body):
    """Taken note of: a state is always read once, and kept as long as there is space."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m"] | None = None


class DecisionsBody(Body):
    """A request."""

    model: str = Field(max_length=512)
    input: str | list[Item]
    questions: list[AnyQuestion]
    prompt_cache_key: str | None = Field(None, max_length=1024)
    prompt_cache_options: CacheOptions | None = None
    safety_identifier: str | None = Field(None, max_length=1024)


@router.post("/v1/decisions", response_model=None)
async def decisions(request: Request, body: DecisionsBody) -> JSONResponse:
    """Answer questions about an input, in their order."""
    service = service_of(request)
    service.check_accepting()
    model = service.registry.get(body.model)
    check_count("questions", len(body.questions), service.options.max_questions)
    state = body.input if isinstance(body.input, str) else input_text(body.input)
    questions = [
        _question(asked, f"questions.{i}", service.options.max_choices)
        for i, asked in enumerate(body.questions)
    ]
    log_texts(request, input=state)
    decided = await decide(request, model, state, questions, body.prompt_cache_key or "")
    answers = [
        _answer(found, asked.name, decided)
        for found, asked in zip(decided.answers, body.questions, strict=True)
    ]
    log_texts(request, answer=answers)
    return JSONResponse({"answers": answers, "model": body.model, "usage": _usage(decided)})


def input_text(items: Sequence[Item]) -> str:
    """Messages and calls as one text, an item after the other.

    Raises:
        RequestError: an item lacks what it is made of, or there is an image, or the output of a
            call that is not there.
    """
    if not items:
        raise RequestError("input must have at least 1 item, or be a string", param="input")
    calls: dict[str, tuple[str, str]] = {}  # id -> kind and name of the tool
    lines = []
    for i, item in enumerate(items):
        place = f"input.{i}"
        if item.type == "message":
            role = _given(item.role, f"{place}.role")
            lines.append(f"{role}: {_content(item.content, f'{place}.content')}")
            continue
        call_id = _given(item.call_id, f"{place}.call_id")
        kind = item.type.removesuffix("_output")
        if kind == item.type:
            name = _given(item.name, f"{place}.name")
            field = "arguments" if kind == "function_call" else "input"
            said = _given(getattr(item, field), f"{place}.{field}")
            calls[call_id] = kind, name
            lines.append(f"assistant calls {name}: {said}")
            continue
        found = calls.get(call_id, ("", ""))
        if found[0] != kind:
            raise RequestError(
                f"{place}.call_id names no {kind} before it", param=f"{place}.call_id"
            )
        lines.append(f"{found[1]} returns: {_content(item.output, f'{place}.output')}")
    return "\n".join(lines)


def _given(value: str | None, place: str) -> str:
    if value is None:
        raise RequestError(f"{place} is missing", param=place)
    return value


def _content(content: str | Sequence[Part] | None, place: str) -> str:
    """A content as text; JSON in one line."""
    if content is None or isinstance(content, str):
        return _given(content, place)
    texts = []
    for i, part in enumerate(content):
        where = f"{place}.{i}"
        if part.type == "input_image":
            raise RequestError(f"{where}: {IMAGE}", param=where)
        if part.type == "input_json":
            check_json(part.data, f"{where}.data")
            texts.append(as_text(part.data))
        elif part.type == "refusal":
            texts.append(_given(part.refusal, f"{where}.refusal"))
        else:
            texts.append(_given(part.text, f"{where}.text"))
    return "\n".join(texts)


def check_json(data: Any, place: str) -> None:
    """Refuse a part of JSON beyond OpenAI's limits.

    Raises:
        RequestError: it is no object nor a list of objects, or too deep or too large.
    """
    is_list = isinstance(data, list) and all(isinstance(entry, Mapping) for entry in data)
    if not (isinstance(data, Mapping) or is_list):
        raise RequestError(f"{place} must be an object, or a list of objects", param=place)
    n_values, level = 0, [data]
    for depth in range(MAX_DEPTH + 2):
        n_values += len(level)
        if n_values > MAX_VALUES:
            raise RequestError(f"{place} has more than {MAX_VALUES:,} values", param=place)
        within: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                within += value.values()
            elif isinstance(value, list):
                within += value
        if depth >= MAX_DEPTH and any(isinstance(value, Mapping | list) for value in level):
            raise RequestError(f"{place} is nested more than {MAX_DEPTH} levels deep", param=place)
        level = within
    compact = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    if (n_bytes := len(compact.encode())) > MAX_BYTES:
        raise RequestError(
            f"{place} has {n_bytes:,} bytes, at most {MAX_BYTES:,} are possible", param=place
        )


def _question(asked: AnyQuestion, place: str, most: int) -> Question:
    instructions = _content(asked.instructions, f"{place}.instructions")
    try:
        if isinstance(asked, PredicateQuestion):
            return Question.predicate(instructions)
        if isinstance(asked, ChoiceQuestion):
            place = f"{place}.choices"
            check_count(place, len(asked.choices), most, 2)
            options = [Option(choice.value, choice.description) for choice in asked.choices]
            return Question.choice(instructions, options)
        place = f"{place}.levels"
        check_count(place, len(asked.levels), most, 2)
        levels = [Option(level.label, level.description) for level in asked.levels]
        return Question.score(instructions, levels)
    except RequestError:
        raise
    except MinllamaError as error:
        raise RequestError(f"{place}: {error}", param=place) from error


def _answer(found: Answer | str, name: str | None, decided: Decided) -> dict[str, Any]:
    if isinstance(found, str):
        return {"type": "refusal", "name": name, "x_reason": found}
    question = found.question
    answer: dict[str, Any] = {"type": question.kind, "name": name}
    pairs = list(zip(question.options, found.probabilities, strict=True))
    if question.kind == "predicate":
        answer["probability"] = found.probability
    elif question.kind == "choice":
        answer |= {
            "choice": found.choice,
            "confidence": found.confidence,
            "probabilities": [{"value": o.value, "probability": p} for o, p in pairs],
        }
    else:
        answer |= {
            "score": found.score,
            "confidence": found.confidence,
            "probabilities": [
                {"label": o.value, "value": i, "probability": p} for i, (o, p) in enumerate(pairs)
            ],
        }
    return answer | decided.said_of(found)


def _usage(decided: Decided) -> dict[str, Any]:
    """Tokens that were read: the state counts once, and what precedes its questions not."""
    return {
        "input_tokens": decided.n_tokens,
        "input_tokens_details": {
            "cached_tokens": decided.n_cached,
            "cache_write_tokens": decided.n_shared - decided.n_cached,
        },
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": decided.n_tokens,
    }
