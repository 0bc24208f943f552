"""Build prompts: a text in its template as token ids, and the labels that may follow.

Both classifiers call it; it needs only a tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from minllama.errors import ContextError, MinllamaError
from minllama.generation.conversation import chat_template as find_template
from minllama.tokenizer.chat_template import ChatTemplate
from minllama.tokenizer.tokenizer import Tokenizer

PLACEHOLDER = "\ue0f0"
"""Placeholder of the text in a template: a private-use character, which no template contains."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """One text in its prompt, encoded.

    Attributes:
        ids: the prompt's token ids, up to where the labels diverge.
        continuations: for each label, the ids that follow; empty if no labels are scored.
        is_shortened: whether the text was truncated to fit.
        n_read: how many characters of a truncated text it has; None for a whole text.
        text: what it has of the text; None for a prompt that was given as ids.
    """

    ids: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...] = ()
    is_shortened: bool = field(default=False, repr=False, compare=False)
    n_read: int | None = field(default=None, repr=False, compare=False)
    text: str | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.ids)


class PromptTemplate:
    """The frame around a text: `Review: {text}` and the like, in plain text or as a chat.

    Braces other than those of `{text}` and `{labels}` are text.

    Args:
        template: contains `{text}` once, and optionally `{labels}`.
        tokenizer: of the model that reads the prompt.
        labels: the label strings that may follow; joined by commas, they replace `{labels}`.
        names: replace `{labels}` if no labels follow.
        shots: pairs of a text and its label string, which come first, separated by empty lines.
        chat: the frame is a user's message in the model's chat template, and the label its answer.
        system: the system message of that chat.
        chat_template: the name of one of the model's chat templates, or one in Jinja; None for its
            default.
        max_len: the most tokens of prompt and label together.
        keep_end: truncate texts at their beginning instead of their end.
        eos: append EOS to a prompt without chat template; None for the tokenizer's default.

    Raises:
        MinllamaError: the template lacks `{text}`, or the model has no chat template, or none of
            that name.
    """

    def __init__(
        self,
        template: str,
        tokenizer: Tokenizer,
        *,
        labels: Sequence[str] = (),
        names: Sequence[str] = (),
        shots: Sequence[tuple[str, str]] = (),
        chat: bool = False,
        system: str | None = None,
        chat_template: str | None = None,
        max_len: int,
        keep_end: bool = False,
        eos: bool | None = False,
    ) -> None:
        if template.count("{text}") != 1:
            raise MinllamaError(f"a prompt must contain {{text}} exactly once: {template!r}")
        listed = labels or names
        if "{labels}" in template and not listed:
            raise MinllamaError(f"there are no labels for {{labels}}: {template!r}")
        if system is not None and not chat:
            raise MinllamaError("a system message needs chat")
        self.template, self.tokenizer, self.labels = template, tokenizer, tuple(labels)
        self.max_len, self.keep_end, self.chat = max_len, keep_end, chat
        self.eos = eos
        # Split first: a label may itself contain {text}, which is then not a placeholder.
        before, after = (
            part.replace("{labels}", ", ".join(listed)) for part in template.split("{text}")
        )
        # A space separates a prompt from its label, unless the prompt ends with one of its own.
        self.separator = "" if chat or after[-1:].isspace() else " "
        self._masked: dict[str, str] = {}
        if chat:
            rendering = find_template(tokenizer, chat_template)
            self._frame = self._rendered_chat(rendering, before, after, shots, system)
        else:
            shown = [before + text + after + self.separator + label for text, label in shots]
            self._masked = {chr(ord(PLACEHOLDER) + 1): "".join(shot + "\n\n" for shot in shown)}
            self._frame = chr(ord(PLACEHOLDER) + 1) + before + PLACEHOLDER + after

    def encode(self, text: str) -> EncodedPrompt:
        """The prompt around `text`, with each label's continuation if there are labels.

        Prompt and label are tokenized together, so that merges across their boundary are correct:
        the shared ids end where the first label diverges. A text that makes the prompt longer than
        `max_len` is truncated; the template never is.

        Raises:
            ContextError: the template alone is too long.
            MinllamaError: a label adds no token, or two labels have the same tokens.
            TokenizerError: the text cannot be encoded.
        """
        encoded = self._encode(text)
        if _full_len(encoded) <= self.max_len:
            return encoded
        frame_len = _full_len(self._encode(""))
        if frame_len > self.max_len:
            raise ContextError(
                f"the prompt has {frame_len} tokens without any text, but the limit is "
                f"{self.max_len}; shorten it, or use fewer examples"
            )
        # The longest part that fits: fewer characters are hardly ever more tokens. The result is
        # one that was tried.
        fits, too_long, best = 0, len(text), self._encode("")
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            tried = self._encode(text[-middle:] if self.keep_end else text[:middle])
            if _full_len(tried) <= self.max_len:
                fits, best = middle, tried
            else:
                too_long = middle
        return replace(best, is_shortened=True, n_read=fits)

    def encode_constant(self) -> tuple[int, ...]:
        """The ids before the text, which all prompts share, except perhaps the last one."""
        one, other = self._ids("0", ""), self._ids("x", "")
        return one[: _common_len([one, other])]

    def _encode(self, text: str) -> EncodedPrompt:
        prompt = self._ids(text, "")
        if not self.labels:
            return EncodedPrompt(prompt, text=text)
        whole = [self._ids(text, self.separator + label) for label in self.labels]
        shared = _common_len([prompt, *whole])
        continuations = tuple(ids[shared:] for ids in whole)
        for label, ids in zip(self.labels, continuations, strict=True):
            if not ids or not label.strip():
                raise MinllamaError(f"the label {label!r} adds no token to the prompt")
        if len(set(continuations)) < len(continuations):
            raise MinllamaError(f"two labels have the same tokens: {', '.join(self.labels)}")
        return EncodedPrompt(prompt[:shared], continuations, text=text)

    def _ids(self, text: str, label: str) -> tuple[int, ...]:
        if self.chat:
            masked = {**self._masked, PLACEHOLDER: text}
            if label:
                masked[chr(ord(PLACEHOLDER) + 1)] = label
                rendered = self._frame + chr(ord(PLACEHOLDER) + 1)
            else:
                rendered = self._frame
            return tuple(self.tokenizer.encode_chat(rendered, masked))
        parts = {**self._masked, PLACEHOLDER: text}
        frame = "".join(parts.get(character, character) for character in self._frame)
        return tuple(self.tokenizer.encode(frame + label, eos=self.eos))

    def _rendered_chat(
        self,
        template: ChatTemplate,
        before: str,
        after: str,
        shots: Sequence[tuple[str, str]],
        system: str | None,
    ) -> str:
        messages = [] if system is None else [{"role": "system", "content": system}]
        for text, label in shots:
            messages.append({"role": "user", "content": before + text + after})
            messages.append({"role": "assistant", "content": label})
        messages.append({"role": "user", "content": before + PLACEHOLDER + after})
        rendered, self._masked = template.render_masked(messages, self.tokenizer.special_tokens)
        if rendered.count(PLACEHOLDER) != 1:
            raise MinllamaError("the chat template does not show the user's message once")
        return rendered


def _full_len(encoded: EncodedPrompt) -> int:
    return len(encoded) + max(map(len, encoded.continuations), default=0)


def _common_len(sequences: Sequence[Sequence[int]]) -> int:
    shortest = min(map(len, sequences))
    for place in range(shortest):
        if len({ids[place] for ids in sequences}) > 1:
            return place
    return shortest
