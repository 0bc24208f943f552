"""Turn questions on a state into prompts with label continuations.

The state is first and all questions on it share its tokens; a question's words come after it. No
prompt lists the options, since a small model repeats lists rather than choosing from them
(docs/decisions.md has the measurements); it has descriptions, in an order of their own.
"""

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
CONTENT_FREE = ("N/A", "[MASK]", "")  # the three of Zhao et al. 2021, sec. 5


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
        if getattr(tokenizer, "chat_template", None) is not None:
            messages = [{"role": "user", "content": PLACEHOLDER}]
            template = chat_template(tokenizer)
            frame, self._masked = template.render_masked(messages, tokenizer.special_tokens)
            if frame.count(PLACEHOLDER) != 1:
                raise MinllamaError("the chat template does not show the user's message once")
            self._frame = frame

    def encode(self, state: str, question: Question) -> EncodedPrompt:
        """The prompt, and the continuation of each option in the order `question.in_order`.

        Raises:
            ContextError: it is too long.
            TokenizerError: it cannot be encoded.
        """
        for is_numbered in (False, True):
            words = label_words(question, is_numbered=is_numbered)
            asked = asked_text(question, is_numbered=is_numbered)
            prompt = self._ids(state, asked, "")
            whole = [self._ids(state, asked, word) for word in words]
            shared = min(common_length(prompt, ids) for ids in whole)
            continuations = tuple(ids[shared:] for ids in whole)
            if all(continuations) and len(set(continuations)) == len(words):
                break
        else:
            raise MinllamaError("the tokenizer has no different tokens for numbers")
        length = shared + max(map(len, continuations))
        if length > self.max_len:
            raise ContextError(
                f"a question and its state have {length:,} tokens, but the limit is "
                f"{self.max_len:,}; shorten them"
            )
        return EncodedPrompt(prompt[:shared], continuations)

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
