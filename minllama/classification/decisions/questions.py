"""What can be asked of a state, and what comes back: types without a model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from minllama.errors import DataError
from minllama.text import shown

Kind = Literal["predicate", "choice", "score"]
Value = str | bool
MAX_OPTIONS = 255


@dataclass(frozen=True, slots=True)
class Option:
    """One possible answer.

    Attributes:
        value: of a choice, a string or a boolean (`True` and `"True"` differ); the label of a level
            of a score; True or False of a predicate.
        description: when it applies; None for no more than the value says.
    """

    value: Value
    description: str | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A question with a closed list of answers; made by `predicate`, `choice` or `score`.

    Attributes:
        kind: `predicate` (is it true?), `choice` (which one?) or `score` (which level?).
        instructions: the question in words; may be empty if descriptions say enough.
        options: 2 to 255 different ones; the levels of a score from lowest to highest; of a
            predicate True, then False.
    """

    kind: Kind
    instructions: str
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        if self.kind not in ("predicate", "choice", "score"):
            raise DataError(f"a question is a predicate, choice or score, not {shown(self.kind)}")
        if not isinstance(self.instructions, str):
            raise DataError(f"instructions must be a string, not {shown(self.instructions)}")
        if not 2 <= len(self.options) <= MAX_OPTIONS:
            raise DataError(
                f"a {self.kind} needs 2 to {MAX_OPTIONS} options, not {len(self.options)}"
            )
        kinds = (str, bool) if self.kind == "choice" else (str,)
        seen = set()
        for option in self.options:
            if self.kind != "predicate" and type(option.value) not in kinds:
                raise DataError(f"the option {shown(option.value)} is not a {_listed(kinds)}")
            if not isinstance(option.description, str | None):
                raise DataError(f"the description {shown(option.description)} is not a string")
            if (key := _typed(option.value)) in seen:
                raise DataError(f"the option {shown(option.value)} is given twice")
            seen.add(key)
        if self.kind == "predicate" and [o.value for o in self.options] != [True, False]:
            raise DataError("the options of a predicate are True and False")

    @classmethod
    def predicate(
        cls, instructions: str, *, true: str | None = None, false: str | None = None
    ) -> Self:
        """Is it true? `true` and `false` describe when it is, and when not."""
        return cls("predicate", instructions, (Option(True, true), Option(False, false)))

    @classmethod
    def choice(
        cls, instructions: str, options: Sequence[Value | Option] | Mapping[str, str | None]
    ) -> Self:
        """Which of these? Values, options, or a mapping from values to descriptions."""
        return cls("choice", instructions, _options(options))

    @classmethod
    def score(cls, instructions: str, levels: Sequence[str | Option]) -> Self:
        """Which level? From the lowest, 0, to the highest."""
        return cls("score", instructions, _options(levels))

    @property
    def in_order(self) -> list[int]:
        """Numbers of the options in an order that does not depend on the one they are given in.

        That of their values; levels have an order of their own, which means something.
        """
        if self.kind == "choice":
            return sorted(range(len(self.options)), key=lambda i: _typed(self.options[i].value))
        return list(range(len(self.options)))


def _options(given: Any) -> tuple[Option, ...]:
    if isinstance(given, str):
        raise DataError(f"options must be a list, not the string {shown(given)}")
    if isinstance(given, Mapping):
        return tuple(Option(value, description) for value, description in given.items())
    return tuple(option if isinstance(option, Option) else Option(option) for option in given)


def _typed(value: Any) -> tuple[bool, str]:
    return isinstance(value, bool), str(value)


def _listed(kinds: tuple[type, ...]) -> str:
    return " or ".join({str: "string", bool: "boolean"}[kind] for kind in kinds)


@dataclass(frozen=True, slots=True)
class Answer:
    """The probabilities of a question's options.

    Attributes:
        question: that was asked.
        probabilities: of its options, in its order; they sum to one.
        label_mass: how likely any of the options was at all, before they were compared with one
            another: near 0, the model would rather have said something else. For a classifier, the
            probability of those of its classes that are options.
        method: `label-words`, or `classifier` for a trained head.
        n_tokens: of the prompt.
        n_shared: those of them that all questions on the state share, computed once.
    """

    question: Question
    probabilities: tuple[float, ...]
    label_mass: float
    method: Literal["label-words", "classifier"]
    n_tokens: int = 0
    n_shared: int = 0

    @property
    def probability(self) -> float:
        """Of the first option: that a predicate is true."""
        return self.probabilities[0]

    @property
    def best(self) -> int:
        """Number of the most likely option; of equals the first in the order of their values."""
        return max(self.question.in_order, key=lambda i: self.probabilities[i])

    @property
    def choice(self) -> Value:
        """The most likely option's value."""
        return self.question.options[self.best].value

    @property
    def score(self) -> float:
        """The expected level: the sum of i * p_i over levels 0 to n - 1."""
        return sum(i * p for i, p in enumerate(self.probabilities))

    @property
    def confidence(self) -> float:
        """Of a score `score_confidence`, otherwise `choice_confidence`."""
        if self.question.kind == "score":
            return score_confidence(self.probabilities)
        return choice_confidence(self.probabilities)


def choice_confidence(probabilities: Sequence[float]) -> float:
    """(max p - 1/n) / (1 - 1/n): 0 for all equal, 1 for a certain choice (System One)."""
    n = len(probabilities)
    if n < 2:
        return 1.0
    return min(1.0, max(0.0, (max(probabilities) - 1 / n) / (1 - 1 / n)))


def score_confidence(probabilities: Sequence[float]) -> float:
    """max(0, 1 - sum_i p_i |i - mode| / u), u = mean_i |i - (n - 1) / 2| (System One).

    The mode is the most likely level, of equals the lowest.
    """
    n = len(probabilities)
    if n < 2:
        return 1.0
    mode = max(range(n), key=lambda i: probabilities[i])
    spread = sum(p * abs(i - mode) for i, p in enumerate(probabilities))
    return max(0.0, 1 - spread / (sum(abs(i - (n - 1) / 2) for i in range(n)) / n))


def as_text(content: Any) -> str:
    """A state or instructions as text: a string as it is, anything else as JSON in one line.

    Raises:
        DataError: it is no JSON.
    """
    if isinstance(content, str):
        return content
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{shown(content)} is neither a string nor JSON") from error
