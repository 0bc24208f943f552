"""TypeSafe's `POST /v1/systemone`: questions by name about a state, answered with probabilities."""

from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import Field

from minllama.classification.decisions.questions import Answer, Option, Question, as_text
from minllama.errors import MinllamaError
from minllama.server.deciding import Decided, decide
from minllama.server.errors import RequestError, out_of_range
from minllama.server.registry import Registry, ServedModel
from minllama.server.routing import Body, log_texts, service_of
from minllama.server.routing import router as make_router

router = make_router()

LATEST = "jev-latest"  # what the official clients ask for unless told otherwise
MAX_CHOICES, MAX_LEVELS = 255, 10
MAX_WORDS_CHARS = 40  # of a level that is scored by its own words; longer ones by their numbers

Content = str | dict[str, Any] | list[Any]


class NoulCriteria(Body):
    """What counts as yes, and what as no."""

    true: Content | None = None
    false: Content | None = None


class Noul(Body):
    """Is it true?"""

    type: Literal["noul"]
    instructions: Content | None = None
    criteria: NoulCriteria | None = None


class Choice(Body):
    """Which of these names?"""

    type: Literal["choice"]
    instructions: Content | None = None
    criteria: dict[str, Content | None]


class Score(Body):
    """Which of these levels, the lowest first?"""

    type: Literal["score"]
    instructions: Content | None = None
    criteria: list[Content]


class SystemOneBody(Body):
    """A request; unknown fields are not looked at."""

    model: str = Field(max_length=512)
    state: Content
    questions: dict[str, Annotated[Noul | Choice | Score, Field(discriminator="type")]]
    assets: Any = None


@router.post(
    "/v1/systemone",
    response_model=None,
    responses={422: {"description": "The request is not as it must be."}},
)
async def systemone(request: Request, body: SystemOneBody) -> JSONResponse:
    """Answer questions about a state, each under its name."""
    service = service_of(request)
    service.check_accepting()
    model = _model(service.registry, body.model)
    if body.assets:
        raise RequestError("images cannot be read by this model; describe them", param="assets")
    if not 1 <= len(body.questions) <= service.options.max_questions:
        raise out_of_range(
            "questions", len(body.questions), f"1 to {service.options.max_questions} of them"
        )
    questions = {name: _question(name, asked) for name, asked in body.questions.items()}
    state = as_text(body.state)
    log_texts(request, input=state)
    decided = await decide(request, model, state, list(questions.values()))
    answers = {
        name: _answer(name, found, asked, decided)
        for (name, asked), found in zip(body.questions.items(), decided.answers, strict=True)
    }
    log_texts(request, answer=answers)
    usage = {"input_tokens": decided.n_tokens, "output_tokens": 0}
    return JSONResponse(
        {
            "model": model.id,
            "answers": answers,
            "usage": usage,
            "x_cached_tokens": decided.n_cached,
        }
    )


def _model(registry: Registry, name: str) -> ServedModel:
    """The model of a name; the official alias means the first language model."""
    if name == LATEST and name not in registry.models:
        return registry.first("generative") or registry.get()
    return registry.get(name)


def _question(name: str, asked: Noul | Choice | Score) -> Question:
    if not name:
        raise RequestError("the name of a question is empty", place=["questions", name])
    instructions = "" if asked.instructions is None else as_text(asked.instructions)
    criteria = asked.criteria
    place: list[str | int] = ["questions", name, asked.type, "criteria"]
    try:
        if isinstance(asked, Noul):
            true, false = _described(criteria)
            if not instructions.strip() and true is None and false is None:
                raise RequestError("a noul needs instructions or criteria", place=place)
            return Question.predicate(instructions, true=true, false=false)
        assert criteria is not None
        most = MAX_CHOICES if isinstance(asked, Choice) else MAX_LEVELS
        if not 2 <= len(asked.criteria) <= most:
            message = f"criteria must have 2 to {most} entries, not {len(asked.criteria)}"
            raise RequestError(message, place=place)
        if isinstance(asked, Choice):
            options = [Option(key, _text(value)) for key, value in asked.criteria.items()]
            return Question.choice(instructions, options)
        return Question.score(instructions, _levels(asked.criteria))
    except RequestError:
        raise
    except MinllamaError as error:
        raise RequestError(str(error), place=place) from error


def _described(criteria: Any) -> tuple[str | None, str | None]:
    if criteria is None:
        return None, None
    return _text(criteria.true), _text(criteria.false)


def _text(content: Content | None) -> str | None:
    return None if content is None else as_text(content)


def _levels(criteria: list[Content]) -> list[Option]:
    """Levels by their own words where all are short; else by numbers, which they describe."""
    texts = [as_text(level) for level in criteria]
    if all(text.strip() and len(text) <= MAX_WORDS_CHARS for text in texts):
        return [Option(text) for text in texts]
    return [Option(str(number), text) for number, text in enumerate(texts)]


def _answer(
    name: str, found: Answer | str, asked: Noul | Choice | Score, decided: Decided
) -> dict[str, Any]:
    if isinstance(found, str):  # the protocol has no refusals
        raise RequestError(found, place=["questions", name])
    answer: dict[str, Any] = {"type": asked.type}
    if isinstance(asked, Noul):
        answer["noul"] = found.probability
    elif isinstance(asked, Choice):
        answer |= {
            "choice": found.choice,
            "confidence": found.confidence,
            "probabilities": dict(zip(asked.criteria, found.probabilities, strict=True)),
        }
    else:
        answer |= {
            "score": found.score,
            "confidence": found.confidence,
            "legend": {str(i): level for i, level in enumerate(asked.criteria)},
            "probabilities": {str(i): p for i, p in enumerate(found.probabilities)},
        }
    return answer | decided.said_of(found)
