"""Generate texts from prompts, whole or streamed.

Encodes prompts, decodes them by `minllama.generation.decode`, and converts tokens to text
(`minllama.generation.sequence_text`). The commands and users call it.
"""

import dataclasses
import reprlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from minllama.engine.base import Engine
from minllama.engine.evaluation import Evaluation
from minllama.engine.log_probs import LogProbsRequest, TokenLogProb
from minllama.engine.sequence import Constraint, Request, Sampler
from minllama.errors import ContextError, MinllamaError, OptionError
from minllama.generation.decode import (
    BYTES,
    DECODE_BYTES,
    Decoder,
    plain_list,
    request_of,
    token_ids,
)
from minllama.generation.sequence_text import Generation, Piece, SequenceText, prompt_logprobs
from minllama.model.kv_cache import KVCache
from minllama.model.llama import Llama
from minllama.options import GenerationOptions
from minllama.tokenizer.tokenizer import Tokenizer

Prompt = str | Sequence[int]


class TextStream:
    """Generates piece by piece while it is iterated; afterwards `results` has the whole texts.

    Args:
        model: continues the prompts.
        tokenizer: of the same checkpoint.
        prompts: texts, or token ids where the caller has encoded them.
        options: how to choose and when to end.
        cache: for one prompt whose beginning it already holds (see `Decoder`).
        sampler: any callable that chooses tokens instead of `options` (see `Decoder`).

    Attributes:
        results: one for each row, prompt * n + sample.
        timings: tokens and seconds.

    Raises:
        MinllamaError: a prompt is empty or longer than the context, or an option is wrong; nothing
            has been computed.
    """

    def __init__(
        self,
        model: Llama | Engine,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        options: GenerationOptions,
        *,
        cache: KVCache | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        context_len = model.config.context_len
        prompt_ids = [
            encode_prompt(p, tokenizer, context_len, special=options.special)
            if isinstance(p, str)
            else token_ids(p)
            for p in prompts
        ]
        options = _by_ids(tokenizer, options)
        if options.prompt_logprobs and cache is not None:
            raise OptionError("prompt_logprobs reads all of a prompt; omit it, or cache")
        self._tokenizer, self._options = tokenizer, options
        self._decoder = Decoder(
            model,
            prompt_ids,
            options,
            stop_ids=tokenizer.stop_ids,
            cache=cache,
            n_tokens=tokenizer.vocab_size,
            make_constraint=_constraints(tokenizer, options, model.config.vocab_size),
            sampler=sampler,
        )
        self.timings = self._decoder.timings
        self._of_prompts: list[Evaluation] = []
        if options.prompt_logprobs:
            self._of_prompts = [
                self._decoder.scheduler.evaluate(
                    LogProbsRequest(
                        ids=tuple(ids), top=options.logprobs or 0, n_tokens=tokenizer.vocab_size
                    )
                )
                for ids in prompt_ids
            ]
        self._texts = [
            SequenceText(tokenizer, ids, options, stop_ids=self._decoder.stop_ids)
            for ids in prompt_ids
            for _ in range(options.n)
        ]
        self.results = [text.result for text in self._texts]

    def plain_text(self, row: int) -> str:
        """The text of a row so far, without special tokens even where they are shown."""
        return self._texts[row].plain

    def __iter__(self) -> Iterator[Piece]:
        for step in self._decoder:
            for token in step:
                text = self._texts[token.row]
                # A step may add several tokens to a row, and a stop string end it before the last.
                if not text.has_ended:
                    piece = text.feed(token)
                    if piece.finish_reason is not None:
                        self._decoder.finish(token.row)
                    yield piece
        for number, evaluation in enumerate(self._of_prompts):
            self._report_prompt(number, evaluation.result)

    def _report_prompt(self, number: int, logprobs: list[TokenLogProb]) -> None:
        """Give the samples of a prompt the log-probabilities of its tokens."""
        n = self._options.n
        for result in self.results[number * n : (number + 1) * n]:
            result.prompt_logprobs = prompt_logprobs(
                self._tokenizer,
                result.prompt_ids,
                logprobs,
                skip_special=self._options.skip_special_tokens,
            )


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Prompt | Sequence[Prompt],
    options: GenerationOptions | None = None,
    *,
    sampler: Sampler | None = None,
    **changes: Any,
) -> list[Generation]:
    """Continue one prompt or several.

    Args:
        model: continues the prompts.
        tokenizer: of the same checkpoint.
        prompts: a text, token ids, or a sequence of either; they share one batch, and each gets the
            tokens that it would get alone (in half precision but for near ties).
        options: how to choose and when to end; None for the defaults.
        sampler: any callable from logits (B, V) and the B sequences to token ids (B,), which takes
            the place of temperature and what belongs to it (see `Decoder`).
        changes: single options by name, on top of `options`.

    Returns:
        One Generation for each sample of each prompt, in order.

    Raises:
        MinllamaError: a prompt is empty or longer than the context, or an option is wrong.
    """
    stream = TextStream(
        model, tokenizer, _as_list(prompts), _options(options, changes), sampler=sampler
    )
    for _ in stream:
        pass
    return stream.results


def stream(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Prompt | Sequence[Prompt],
    options: GenerationOptions | None = None,
    *,
    sampler: Sampler | None = None,
    **changes: Any,
) -> TextStream:
    """As `generate`, but piece by piece: iterate over the returned stream."""
    return TextStream(
        model, tokenizer, _as_list(prompts), _options(options, changes), sampler=sampler
    )


def text_request(
    tokenizer: Tokenizer,
    ids: list[int],
    options: GenerationOptions,
    vocab_size: int,
    *,
    make_constraint: Callable[[], Constraint] | None = None,
    sampler: Sampler | None = None,
    seed: str | None = None,
    salt: str = "",
    name: str = "the prompt",
) -> Request:
    """The requests with which a scheduler continues a prompt as `generate` does; for a server.

    `SequenceText(tokenizer, ids, options, stop_ids=request.stop_ids)` makes text of the tokens.

    Args:
        tokenizer: of the model.
        ids: the prompt (see `encode_prompt`).
        options: how to choose and when to end; tokens may be named by their texts.
        vocab_size: of the model, which may be padded beyond the tokenizer's.
        make_constraint: takes the place of `options.json_schema` and `options.regex`.
        sampler, seed, salt, name: as for `request_of`.

    Raises:
        MinllamaError: an option is wrong, or a constraint needs a library that is not there.
    """
    options = _by_ids(tokenizer, options)
    return request_of(
        ids,
        options,
        stop_ids=tokenizer.stop_ids,
        n_tokens=tokenizer.vocab_size,
        make_constraint=make_constraint or _constraints(tokenizer, options, vocab_size),
        sampler=sampler,
        seed=seed,
        salt=salt,
        name=name,
    )


def check_can_fit(text: str, tokenizer: Tokenizer, context_len: int) -> None:
    """Refuse a text so long that no way to split it into tokens would fit the context.

    Megabytes that are to be refused anyway are not tokenized first, which would take minutes and
    gigabytes. One that is only somewhat too long passes: `Decoder` counts its tokens.

    Raises:
        ContextError: it is that long.
    """
    if len(text) <= context_len:
        return
    if len(text) > context_len * tokenizer.longest_token:
        raise ContextError(
            f"the prompt has {len(text)} characters, more than a context of {context_len} "
            "tokens can hold; shorten it"
        )


def encode_prompt(
    text: str, tokenizer: Tokenizer, context_len: int, *, special: bool = False
) -> list[int]:
    """Ids of a prompt.

    Args:
        text: the prompt.
        tokenizer: of the model that will read it.
        context_len: of that model.
        special: special tokens that the text spells are these tokens; one that begins a text is
            then not put in front of itself.

    Raises:
        ContextError: it is far too long (see `check_can_fit`).
        TokenizerError: it cannot be encoded.
    """
    check_can_fit(text, tokenizer, context_len)
    if not special:
        return tokenizer.encode(text)
    begins = tokenizer.encode(text, bos=False, special=True)[:1] == [tokenizer.bos_id]
    return tokenizer.encode(text, bos=False if begins else None, special=True)


def spelled_special(text: str, tokenizer: Tokenizer) -> list[str]:
    """The special tokens that a text spells, in order of first occurrence."""
    offsets = {word: text.find(word) for word in tokenizer.special_tokens if word}
    return sorted(
        (word for word, offset in offsets.items() if offset >= 0), key=lambda w: offsets[w]
    )


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
    listed = plain_list(prompts)
    if isinstance(listed, BYTES) or not isinstance(listed, Sequence):
        raise MinllamaError(
            f"prompts are a text, token ids or a list of either, not {reprlib.repr(prompts)}"
            + (DECODE_BYTES if isinstance(listed, BYTES) else "")
        )
    if not listed:
        raise MinllamaError("there is no prompt; give a text, or at least one token id")
    if all(isinstance(plain_list(part), int) for part in listed):
        return [listed]  # one prompt as ids
    return list(listed)


def _by_ids(tokenizer: Tokenizer, options: GenerationOptions) -> GenerationOptions:
    """The same options, with ids for the tokens that they name by text."""
    return dataclasses.replace(
        options,
        stop_token_ids=_stop_ids(tokenizer, options),
        logit_bias=_biased_ids(tokenizer, options),
    )


def _stop_ids(tokenizer: Tokenizer, options: GenerationOptions) -> tuple[int, ...]:
    """The ids of `stop_token_ids`, and of the special tokens that are stop strings as a whole."""
    special = tokenizer.special_tokens
    remedy = "stop ends at any text"
    named = [
        _checked_id(tokenizer, token, "stop_token_ids (--stop-token)", remedy)
        for token in options.stop_token_ids
    ]
    return tuple(dict.fromkeys(named + [special[text] for text in options.stop if text in special]))


def _biased_ids(tokenizer: Tokenizer, options: GenerationOptions) -> tuple[tuple[int, float], ...]:
    """`logit_bias` with token ids only."""
    name, remedy = "logit_bias (--logit-bias)", "give the ids of its tokens"
    return tuple(
        (_checked_id(tokenizer, token, name, remedy), value) for token, value in options.logit_bias
    )


def _checked_id(tokenizer: Tokenizer, token: int | str, name: str, remedy: str) -> int:
    """The id of a token that an option names by its id or text.

    Raises:
        OptionError: the vocabulary has no such token.
    """
    if isinstance(token, int):
        if token >= tokenizer.vocab_size:
            raise OptionError(
                f"{name} holds {token}, and the tokenizer knows 0 to {tokenizer.vocab_size - 1}"
            )
        return token
    token_id = tokenizer.special_tokens.get(token)
    if token_id is None:
        spelled = token.encode(errors="replace")
        all_ids = range(tokenizer.vocab_size)
        token_id = next((i for i in all_ids if tokenizer.token_bytes(i) == spelled), None)
    if token_id is None:
        raise OptionError(
            f"{name}: {reprlib.repr(token)} is not one token of this vocabulary; {remedy}"
        )
    return token_id


def _constraints(
    tokenizer: Tokenizer, options: GenerationOptions, vocab_size: int
) -> Callable[[], Constraint] | None:
    if options.json_schema is None and options.regex is None:
        return None
    from minllama.generation.constraints import constraint_maker

    return constraint_maker(tokenizer, options, vocab_size)
