"""Turn questions on a state into prompts with label continuations.

The state is first and all questions on it share its tokens; a question's words come after it. No
prompt lists the options, since a small model repeats lists rather than choosing from them
(docs/decisions.md has the measurements); it has descriptions, in an order of their own.
"""

import re
from collections.abc import Callable

from minllama.classification.decisions.questions import Option, Question
from minllama.classification.prompts import PLACEHOLDER, EncodedPrompt
from minllama.engine.prefix_cache import common_length
from minllama.errors import ContextError, MinllamaError
from minllama.generation.conversation import chat_template
from minllama.tokenizer.tokenizer import Tokenizer

LABEL = chr(ord(PLACEHOLDER) + 1)
ASKED = {
    "predicate": "Is this true?",
    "choice": "Which of these is right?",
    "score": "Which level is right?",
}
PROBE = "?"  # stands for any question, where only what follows it matters
END_CHARS = 400  # of a state, before a question
SAME = 8  # tokens that are equal where two texts have begun to be encoded alike

_Continuations = tuple[int, tuple[tuple[int, ...], ...]]


class DecisionPrompts:
    """The frame of all questions: a user's message in the model's chat, or text without one.

    Args:
        tokenizer: of the model.
        max_len: the most tokens of a prompt and an option.
    """

    def __init__(self, tokenizer: Tokenizer, max_len: int) -> None:
        self.tokenizer, self.max_len = tokenizer, max_len
        self._frame: str | None = None
        self._masked: dict[str, str] = {}
        self._last: tuple[tuple[str, ...], _Continuations] | None = None
        if getattr(tokenizer, "chat_template", None) is not None:
            messages = [{"role": "user", "content": PLACEHOLDER}]
            template = chat_template(tokenizer)
            frame, self._masked = template.render_masked(messages, tokenizer.special_tokens)
            if frame.count(PLACEHOLDER) != 1:
                raise MinllamaError("the chat template does not show the user's message once")
            self._frame = frame

    def on(self, state: str) -> "StatePrompts":
        """Prompts of questions on a state, of which only the ends are encoded for each."""
        return StatePrompts(self, state)

    def encode(self, state: str, question: Question) -> EncodedPrompt:
        """The prompt, and the continuation of each option in the order `question.in_order`.

        Raises:
            ContextError: it is too long.
            TokenizerError: it cannot be encoded.
        """
        return self._encode(question, lambda asked: self._ids(state, asked, ""))

    def _encode(
        self, question: Question, prompt_ids: Callable[[str], tuple[int, ...]]
    ) -> EncodedPrompt:
        for is_numbered in (False, True):
            words = label_words(question, is_numbered=is_numbered)
            prompt = prompt_ids(asked_text(question, is_numbered=is_numbered))
            n_back, continuations = self._continuations(tuple(words))
            if all(continuations) and len(set(continuations)) == len(words):
                break
        else:
            raise MinllamaError("the tokenizer has no different tokens for numbers")
        shared = len(prompt) - n_back
        length = shared + max(map(len, continuations))
        if length > self.max_len:
            raise ContextError(
                f"a question and its state have {length:,} tokens, but the limit is "
                f"{self.max_len:,}; shorten them"
            )
        return EncodedPrompt(prompt[:shared], continuations)

    def _continuations(self, words: tuple[str, ...]) -> _Continuations:
        """How many of a prompt's last tokens belong to the options, and what follows for each.

        What follows depends on the prompt's end only, which is the same for all questions.
        """
        last = self._last  # of the same question, mostly, on another state
        if last is not None and last[0] == words:
            return last[1]
        prompt = self._ids("", PROBE, "")
        whole = [self._ids("", PROBE, word) for word in words]
        shared = min(common_length(prompt, ids) for ids in whole)
        found = len(prompt) - shared, tuple(ids[shared:] for ids in whole)
        self._last = words, found
        return found

    def shared_ids(self, state: str) -> tuple[int, ...]:
        """The ids that prompts on this state begin with, whatever is asked."""
        one, other = (self._ids(state, probe, "") for probe in ("0", "x"))
        # The last id may depend on how the question begins.
        return one[: max(0, common_length(one, other) - 1)]

    def _ids(self, state: str, asked: str, label: str) -> tuple[int, ...]:
        if self._frame is None:
            text = f"Text: {state}\n\nQuestion: {asked}\nAnswer:"
            return tuple(self.tokenizer.encode(f"{text} {label}" if label else text, eos=False))
        masked = {**self._masked, PLACEHOLDER: f"{state}\n\n{asked}"}
        if not label:
            return tuple(self.tokenizer.encode_chat(self._frame, masked))
        return tuple(self.tokenizer.encode_chat(self._frame + LABEL, {**masked, LABEL: label}))


class StatePrompts:
    """Prompts of questions on one state, which is encoded once; made by `DecisionPrompts.on`.

    A question's tokens are those of a prompt with the state's last words alone, from where both
    have the same tokens.

    Attributes:
        shared: the ids that all of them begin with.
    """

    def __init__(self, prompts: DecisionPrompts, state: str) -> None:
        self._prompts, self._state = prompts, state
        self.shared = prompts.shared_ids(state)
        # From the first white space of it on, which no token goes across.
        self._end = re.sub(r"^\S*", "", state[-END_CHARS:]) if len(state) > END_CHARS else state
        self._end_ids = prompts.shared_ids(self._end)
        is_same = self.shared[-SAME:] == self._end_ids[-SAME:]
        self._is_cut = self._end != state and is_same and len(self._end_ids) >= SAME

    def encode(self, question: Question) -> EncodedPrompt:
        """As `DecisionPrompts.encode`."""
        return self._prompts._encode(question, self._ids)

    def _ids(self, asked: str) -> tuple[int, ...]:
        if self._is_cut:
            n = len(self._end_ids)
            short = self._prompts._ids(self._end, asked, "")
            if short[:n] == self._end_ids:
                return self.shared + short[n:]
        return self._prompts._ids(self._state, asked, "")


def asked_text(question: Question, *, is_numbered: bool = False) -> str:
    """A question in words, with the descriptions of its options."""
    options = [question.options[i] for i in question.in_order]
    lines = [question.instructions.strip() or ASKED[question.kind]]
    words = label_words(question, is_numbered=is_numbered)
    for option, word in zip(options, words, strict=True):
        meaning = " ".join((option.description or "").split())
        if is_numbered:
            meaning = f"{_word(option)} {meaning}".strip()
        if meaning:
            lines.append(f"{word}: {meaning}")
    return "\n".join(lines)


def label_words(question: Question, *, is_numbered: bool = False) -> list[str]:
    """What the model would say for each option, in the order `question.in_order`.

    The value, or Yes and No for booleans; numbers from 1 if values are blank or not different.
    """
    words = [_word(question.options[i]) for i in question.in_order]
    if is_numbered or not all(words) or len(set(words)) < len(words):
        return [str(number) for number in range(1, len(words) + 1)]
    return words


def _word(option: Option) -> str:
    if isinstance(option.value, bool):
        return "Yes" if option.value else "No"
    return " ".join(option.value.split())
