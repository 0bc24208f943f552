"""Convert one sequence's tokens to pieces of text and to the whole result.

The caller who runs sequences feeds it their tokens: `minllama.generation.api`, a server.
"""

import builtins
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from minllama.engine.sequence import FinishReason, Token
from minllama.generation.stop_strings import RowText
from minllama.options import GenerationOptions
from minllama.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class PromptLogprob:
    """The log-probability of a token of a prompt, and the most likely alternatives'.

    Attributes:
        id: the token.
        text: for display, with U+FFFD for incomplete characters.
        logprob: natural logarithm of its probability, before bias, penalties and all else; None for
            the first token of a prompt, which nothing foretells.
        alternatives: ids of the most likely tokens and their log-probabilities.
        bytes: the token's exact bytes; joined with those of its neighbors they are UTF-8.
        offset: where it begins in the text of the generation or of the prompt, in characters;
            tokens that share a character have the same, those of a stop string are beyond the end.
    """

    id: int
    text: str
    logprob: float | None
    alternatives: tuple[tuple[int, float], ...] = ()
    bytes: builtins.bytes = b""
    offset: int = 0


@dataclass(frozen=True)
class TokenLogprob(PromptLogprob):
    """The log-probability of a generated token, which always has one."""

    logprob: float


class Piece(NamedTuple):
    """A piece of one row's text, as it is generated.

    Attributes:
        row: index of the row: prompt * n + sample.
        text: whole characters; may be empty where a token ends within one, or where it might be
            the beginning of a stop string.
        finish_reason: set on a row's last piece: `stop` or `length`.
        logprobs: of the tokens that came with it, where they are requested. Their text may come
            with a later piece, or never, where a stop string ends it.
    """

    row: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass
class Generation:
    """One finished text.

    Attributes:
        prompt_ids: what was continued.
        text: the continuation, without the stop string or stop token that ended it.
        token_ids: the tokens that were generated, without the stop token (an end token, one of
            `stop_token_ids`, or a special token that is a stop string as a whole); those of any
            other stop string are among them.
        finish_reason: `stop` (a stop token, a stop string) or `length` (max_new_tokens, or the end
            of the context).
        logprobs: of each of `token_ids`; None unless requested.
        prompt_logprobs: of each of `prompt_ids`; None unless requested, and until all is generated.
    """

    prompt_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[PromptLogprob] | None = None


class SequenceText:
    """The text of one sequence, which grows by its tokens and ends before a stop string.

    The pieces, joined, are the result's text: whole characters, without special tokens where they
    are not shown, and without what a stop string has ended.

    Args:
        tokenizer: of the model that generates.
        prompt_ids: what the sequence continues.
        options: `stop`, `skip_special_tokens` and `logprobs` count.
        stop_ids: tokens that end a sequence and are no text (`Request.stop_ids`).

    Attributes:
        result: what there is so far.
        has_ended: nothing follows. Where no token said so (`Token.finish_reason`), a stop string
            has ended it, and the sequence is to be cancelled.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        options: GenerationOptions,
        *,
        stop_ids: Collection[int] = (),
    ) -> None:
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._text = RowText(tokenizer, options.stop, skip_special=options.skip_special_tokens)
        self.result = Generation(
            list(prompt_ids), logprobs=None if options.logprobs is None else []
        )
        self.has_ended = False

    @property
    def plain(self) -> str:
        """The text so far, without special tokens even where they are shown."""
        return self._text.plain

    def feed(self, token: Token) -> Piece:
        """The text that this token adds; empty once the text has ended."""
        if self.has_ended:
            return Piece(token.row, "")
        new, reason = "", token.finish_reason
        logprobs: tuple[TokenLogprob, ...] = ()
        ends = token.id in self._stop_ids
        if token.id is not None and not ends:
            self.result.token_ids.append(token.id)
            new = self._text.push(token.id)
            logprobs = self._logprobs(token)
        if reason is not None and not self._text.stopped:
            new += self._text.end(token.id if ends else None)
        return Piece(token.row, *self._grown(new, reason), logprobs)

    def finish(self, row: int = 0) -> Piece:
        """End a text that the caller ended: return the text held back, with reason `length`."""
        if self.has_ended:
            return Piece(row, "")
        return Piece(row, *self._grown(self._text.end(), "length"))

    def _grown(self, new: str, reason: FinishReason | None) -> tuple[str, FinishReason | None]:
        reason = "stop" if self._text.stopped else reason
        self.result.text += new
        if reason is not None:
            self.result.finish_reason, self.has_ended = reason, True
        return new, reason

    def _logprobs(self, token: Token) -> tuple[TokenLogprob, ...]:
        if self.result.logprobs is None or token.id is None or token.logprob is None:
            return ()
        spelled, shown = _spelled(self._tokenizer, token.id)
        token_logprob = TokenLogprob(
            token.id, shown, token.logprob, token.alternatives, spelled, self._text.offset
        )
        self.result.logprobs.append(token_logprob)
        return (token_logprob,)


def prompt_logprobs(
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    token_logprobs: Sequence[tuple[float, tuple[tuple[int, float], ...]]],
    *,
    skip_special: bool = True,
) -> list[PromptLogprob]:
    """The log-probabilities of a prompt's tokens, as those of a generation.

    Args:
        tokenizer: of the model.
        prompt_ids: of the prompt.
        token_logprobs: of each token but the first, its log-probability and alternatives
            (`minllama.engine.log_probs`).
        skip_special: the text in which offsets are is `tokenizer.decode(prompt_ids)` with this.
    """
    decoder = tokenizer.stream_decoder(skip_special=skip_special, continuation=False)
    result, offset = [], 0
    for token_id, (logprob, alternatives) in zip(
        prompt_ids, [(None, ()), *token_logprobs], strict=True
    ):
        spelled, shown = _spelled(tokenizer, token_id)
        result.append(PromptLogprob(token_id, shown, logprob, alternatives, spelled, offset))
        offset += len(decoder.push(token_id))
    return result


def _spelled(tokenizer: Tokenizer, token_id: int) -> tuple[builtins.bytes, str]:
    """A token's bytes and its text."""
    spelled = tokenizer.token_bytes(token_id)
    return spelled, spelled.decode(errors="replace")
