"""From prompts to texts: generation as people use it, whole or streamed.

Knows nothing of how tokens are computed (`minllama.decoding`) or chosen (`minllama.sampling`); here
they become text, and stop strings end it.
"""

import dataclasses
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minllama.cache import KVCache
from minllama.decoding import Constraint, Decoder, FinishReason, Token, token_ids
from minllama.errors import ContextError, MinllamaError, OptionError
from minllama.llama import Llama
from minllama.options import GenerationOptions
from minllama.tokenizer import StreamDecoder, Tokenizer

Prompt = str | Sequence[int]


class Piece(NamedTuple):
    """A bit of text of one row, as it is generated.

    Attributes:
        row: index of the row: prompt * n + sample.
        text: whole characters; may be empty where a token ends within one, or where it might be
            the beginning of a stop string.
        finish_reason: set on a row's last piece: `stop` or `length`.
    """

    row: int
    text: str
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """One generated token's log-probability, and the likeliest alternatives'."""

    id: int
    text: str
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass
class Generation:
    """One finished text.

    Attributes:
        prompt_ids: what was continued.
        text: the continuation, without the stop string or stop token that ended it.
        token_ids: the tokens that were generated, without the stop token.
        finish_reason: `stop` (an end token, a stop string) or `length` (max_new_tokens, or the end
            of the context).
        logprobs: of each of `token_ids`; None unless asked for.
    """

    prompt_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    logprobs: list[TokenLogprob] | None = None


class TextStream:
    """Generates while it is iterated, piece by piece; `results` holds the whole texts then.

    Args:
        model: continues the prompts.
        tokenizer: of the same checkpoint.
        prompts: texts, or token ids where the caller has encoded them.
        options: how to choose and when to end.
        cache: for one prompt whose beginning it already holds (see `Decoder`).

    Attributes:
        results: one for each row, prompt * n + sample.
        timings: tokens and seconds.

    Raises:
        MinllamaError: a prompt is empty or longer than the context, or an option is wrong; nothing
            has been computed.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        options: GenerationOptions,
        *,
        cache: KVCache | None = None,
    ) -> None:
        context_len = model.config.context_len
        prompt_ids = [
            encode_prompt(p, tokenizer, context_len) if isinstance(p, str) else token_ids(p)
            for p in prompts
        ]
        self._tokenizer = tokenizer
        self._decoder = Decoder(
            model,
            prompt_ids,
            options,
            stop_ids=tokenizer.stop_ids,
            cache=cache,
            n_tokens=tokenizer.vocab_size,
            make_constraint=_constraints(tokenizer, options, model.config.vocab_size),
        )
        self.timings = self._decoder.timings
        self.results = [
            Generation(list(ids), logprobs=None if options.logprobs is None else [])
            for ids in prompt_ids
            for _ in range(options.n)
        ]
        self._texts = [
            _RowText(tokenizer.stream_decoder(continuation=True), options.stop)
            for _ in self.results
        ]

    def __iter__(self) -> Iterator[Piece]:
        for step in self._decoder:
            for token in step:
                # A step may give a row several tokens, and a stop string end it before the last.
                if not self._texts[token.row].stopped:
                    yield self._piece(token)

    def _piece(self, token: Token) -> Piece:
        result, text = self.results[token.row], self._texts[token.row]
        new, reason = "", token.finish_reason
        if token.id is not None and token.id not in self._decoder.stop_ids:
            result.token_ids.append(token.id)
            if result.logprobs is not None and token.logprob is not None:
                shown = self._tokenizer.token_text(token.id)
                result.logprobs.append(
                    TokenLogprob(token.id, shown, token.logprob, token.alternatives)
                )
            new = text.push(token.id)
        if reason is not None and not text.stopped:
            new += text.flush()
        if text.stopped:
            reason = "stop"
            self._decoder.finish(token.row)
        result.text += new
        if reason is not None:
            result.finish_reason = reason
        return Piece(token.row, new, reason)


class _RowText:
    """Tokens to text for one row, held back where it may be the beginning of a stop string."""

    def __init__(self, decoder: StreamDecoder, stop: tuple[str, ...]) -> None:
        self._decoder, self._stop = decoder, stop
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        return self._scan(self._decoder.push(token_id))

    def flush(self) -> str:
        """What is left when the row has ended."""
        text = self._scan(self._decoder.flush())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _scan(self, text: str) -> str:
        text = self._held + text
        ends = [found for stop in self._stop if (found := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Prompt | Sequence[Prompt],
    options: GenerationOptions | None = None,
    **changes: Any,
) -> list[Generation]:
    """Continue one prompt or several.

    Args:
        model: continues the prompts.
        tokenizer: of the same checkpoint.
        prompts: a text, token ids, or a sequence of either; they share one batch, and each gets the
            tokens that it would get alone (in half precision but for near ties).
        options: how to choose and when to end; None for the defaults.
        changes: single options by name, on top of `options`.

    Returns:
        One Generation for each sample of each prompt, in order.

    Raises:
        MinllamaError: a prompt is empty or longer than the context, or an option is wrong.
    """
    stream = TextStream(model, tokenizer, _as_list(prompts), _options(options, changes))
    for _ in stream:
        pass
    return stream.results


def stream(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Prompt | Sequence[Prompt],
    options: GenerationOptions | None = None,
    **changes: Any,
) -> TextStream:
    """As `generate`, but piece by piece: iterate over what it returns."""
    return TextStream(model, tokenizer, _as_list(prompts), _options(options, changes))


def check_can_fit(text: str, tokenizer: Tokenizer, context_len: int) -> None:
    """Refuse a text so long that no way to split it into tokens would fit the context.

    Megabytes that are to be refused anyway are not taken apart first, in minutes and gigabytes.
    One that is only somewhat too long passes: `Decoder` counts its tokens.

    Raises:
        ContextError: it is that long.
    """
    if len(text) <= context_len:
        return
    longest = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
    if len(text) > context_len * longest:
        raise ContextError(
            f"the prompt has {len(text)} characters, more than a context of {context_len} "
            "tokens can hold; shorten it"
        )


def encode_prompt(text: str, tokenizer: Tokenizer, context_len: int) -> list[int]:
    """Ids of a prompt.

    Raises:
        ContextError: it is far too long (see `check_can_fit`).
        TokenizerError: it cannot be encoded.
    """
    check_can_fit(text, tokenizer, context_len)
    return tokenizer.encode(text)


def _options(options: GenerationOptions | None, changes: dict[str, Any]) -> GenerationOptions:
    known = {field.name for field in dataclasses.fields(GenerationOptions)}
    if unknown := sorted(set(changes) - known):
        raise OptionError(
            f"unknown option {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    return dataclasses.replace(options or GenerationOptions(), **changes)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if hasattr(prompts, "tolist"):  # a tensor or an array of ids
        prompts = prompts.tolist()
    if not isinstance(prompts, Sequence):
        raise MinllamaError(
            f"prompts are a text, token ids or a list of either, not {reprlib.repr(prompts)}"
        )
    if len(prompts) and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]  # one prompt as ids
    return list(prompts)  # type: ignore[arg-type]


def _constraints(
    tokenizer: Tokenizer, options: GenerationOptions, vocab_size: int
) -> Callable[[], Constraint] | None:
    if options.json_schema is None and options.regex is None:
        return None
    from minllama.constraint import constraint_maker

    return constraint_maker(tokenizer, options, vocab_size)
