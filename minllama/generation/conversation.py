"""A conversation with a model: its messages, and the next answers.

Each answer reads only what is new since the last one: the cache of keys and values is kept, and cut
back to where the new prompt departs from the old.
"""

import reprlib
from collections.abc import Generator, Sequence

from minllama.engine.base import Engine
from minllama.engine.choose import engine_for
from minllama.engine.prefix_cache import common_length
from minllama.errors import MinllamaError
from minllama.generation.api import TextStream, check_can_fit
from minllama.generation.sequence_text import Piece
from minllama.generation.tool_calls import Tool, with_tools
from minllama.model.kv_cache import KVCache
from minllama.model.llama import Llama
from minllama.options import GenerationOptions
from minllama.tokenizer.chat_template import ChatTemplate, Message
from minllama.tokenizer.tokenizer import Tokenizer

MAX_LISTED = 20  # names of templates in a message


class Conversation:
    """Messages and answers between a user and a model.

    Args:
        model: answers.
        tokenizer: of the same checkpoint; it must have a chat template.
        options: how answers are generated.
        system: instructions before all messages; None for the template's own.
        template: the name of one of the tokenizer's templates, or one of your own, in Jinja;
            None for the tokenizer's default.

    Attributes:
        messages: {"role": ..., "content": ...} each, in order.
        stream: the latest answer's TextStream, for its timings; None before the first.

    Raises:
        MinllamaError: the checkpoint has no chat template, or none of that name.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        options: GenerationOptions,
        *,
        system: str | None = None,
        template: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.template = chat_template(tokenizer, template)
        self._system = [{"role": "system", "content": system}] if system is not None else []
        self.stream: TextStream | None = None
        self._cache: KVCache | None = None
        self._engine: Engine | None = None
        self._read_ids: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Clear the history; the system message stays."""
        self.messages = list(self._system)

    def answer(self, text: str) -> Generator[Piece, None, None]:
        """Add a message, and yield the answer piece by piece.

        An answer that is not iterated to its end is stored as far as it was generated.

        Raises:
            MinllamaError: `text` is no string, or the conversation is longer than the context; it
                is as it was before.
        """
        if not isinstance(text, str):
            raise MinllamaError(f"what is said is a text, not {reprlib.repr(text)}")
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt_ids = encode_messages(
            self.template, self.tokenizer, messages, self.model.config.context_len
        )
        stream = TextStream(
            self._open_engine(),
            self.tokenizer,
            [prompt_ids],
            self.options,
            cache=self._cache_for(prompt_ids),
        )
        self.messages, self.stream = messages, stream
        result = stream.results[0]
        try:
            yield from stream
        finally:
            assert self._cache is not None
            self._read_ids = (prompt_ids + result.token_ids)[: self._cache.max_len]
            self._cache.truncate(len(self._read_ids))
            # Special tokens are only for display: a template would render them as text.
            self.messages.append({"role": "assistant", "content": stream.plain_text(0)})

    def _open_engine(self) -> Engine:
        """The engine; if the model has changed, a new one with an empty cache."""
        if self._engine is None or not self._engine.snapshot.is_current():
            self._engine, self._cache, self._read_ids = engine_for(self.model), None, []
        return self._engine

    def _cache_for(self, prompt_ids: list[int]) -> KVCache:
        """A cache of the tokens that the prompt shares with the last text."""
        if self._cache is None:
            capacity = min(len(prompt_ids), self.model.config.context_len)
            self._cache = self._open_engine().new_cache(1, capacity)
        # The last token of the prompt is always read: its logits begin the answer.
        self._cache.truncate(min(common_length(self._read_ids, prompt_ids), len(prompt_ids) - 1))
        return self._cache


def chat_template(tokenizer: Tokenizer, choice: str | None = None) -> ChatTemplate:
    """The chat template of a tokenizer, with the special tokens that it may write.

    Args:
        tokenizer: of the model.
        choice: a template's name, where the tokenizer has several, or a template of your own, in
            Jinja; None for the tokenizer's default.

    Raises:
        MinllamaError: it has none, or none of that name.
    """
    source = template_source(tokenizer, choice)
    texts = {token_id: text for text, token_id in tokenizer.special_tokens.items()}
    tokens = {
        name: texts[token_id]
        for name in ("bos", "eos")
        if (token_id := getattr(tokenizer, f"{name}_id")) in texts
    }
    tokens = {f"{name}_token": text for name, text in tokens.items()}
    named = tokenizer.vocabulary.named_tokens
    return ChatTemplate(source, special_tokens={**tokens, **named})


def template_source(tokenizer: Tokenizer, choice: str | None = None) -> str:
    """The chat template in Jinja that `chat_template` renders with.

    Raises:
        MinllamaError: as there.
    """
    named = dict(tokenizer.vocabulary.chat_templates)
    if tokenizer.chat_template is not None:
        named["default"] = tokenizer.chat_template
    source = named.get("default" if choice is None else choice)
    if source is None and choice is not None and "{" in choice:
        source = choice
    if source is None:
        raise MinllamaError(_no_template(choice, sorted(named)))
    return source


def _no_template(choice: str | None, names: list[str]) -> str:
    if not names:
        return (
            "this model has no chat template; it continues text: use `minllama generate`, name a "
            "template with --chat-template, or take a model that was trained to chat"
        )
    listed = ", ".join(reprlib.repr(name) for name in names[:MAX_LISTED])
    listed += f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    if choice is None:
        return (
            f"this model has chat templates called {listed}, and none is its default; choose one "
            "by --chat-template NAME"
        )
    return (
        f"no chat template is called {reprlib.repr(choice)}; this model has {listed}, and a "
        "template's own text holds {{ }} or {% %}"
    )


def encode_messages(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    context_len: int,
    *,
    tools: Sequence[Tool] = (),
    add_generation_prompt: bool = True,
) -> list[int]:
    """The token ids of a prompt of messages, up to where the answer begins.

    The template's special tokens are meant as such; the same characters inside a message are text.

    Args:
        template: of the model.
        tokenizer: of the model.
        messages: in order; tool calls and their results may be among them, in OpenAI's shape.
        context_len: of the model.
        tools: that the model may call (see `minllama.generation.tool_calls`).
        add_generation_prompt: end with what opens the answer; otherwise with the last message.

    Raises:
        MinllamaError: the template refuses the messages; they are far too long for the context.
    """
    messages, variables = with_tools(template.source, messages, tools)
    rendered, masked = template.render_masked(
        messages,
        tokenizer.special_tokens,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    check_can_fit(rendered, tokenizer, context_len)
    return tokenizer.encode_chat(rendered, masked)
