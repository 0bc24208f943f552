"""Continue a batch of prompts of token ids, token by token, until all have ended.

Uses a scheduler (`minllama.engine.scheduler`), and chooses tokens as options state.
Texts, stop strings and streams are those of `minllama.generation.api`.
"""

import operator
import random
import reprlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import Tensor

from minllama.engine.base import Engine
from minllama.engine.choose import engine_for
from minllama.engine.scheduler import Scheduler
from minllama.engine.sequence import Constraint, Request, Sampler, Token
from minllama.engine.sequence import Sequence as SequenceState
from minllama.errors import MinllamaError, OptionError
from minllama.generation.sampling import choose_tokens
from minllama.generation.speculative import PromptLookup
from minllama.model.kv_cache import KVCache
from minllama.model.llama import Llama
from minllama.options import GenerationOptions
from minllama.options.generation import SamplingOptions

BYTES = (bytes, bytearray, memoryview)
DECODE_BYTES = "; decode bytes first: prompt.decode()"


@dataclass
class Timings:
    """Tokens and seconds of a generation's two phases."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens read per second."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first, which the prefill gives."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class OptionsSampler:
    """Chooses tokens by options; sequences with equal options are sampled together.

    Attributes:
        options: how to choose; the seed is not looked at.
    """

    options: SamplingOptions

    @classmethod
    def of(cls, options: SamplingOptions) -> "OptionsSampler":
        """The sampler for these options; other options are ignored."""
        names = {option.name for option in fields(SamplingOptions)} - {"seed"}
        return cls(SamplingOptions(**{name: getattr(options, name) for name in names}))

    def __call__(self, logits: Tensor, sequences: list[SequenceState], /) -> Tensor:
        """(B, V) logits of B sequences to (B,) ids, on the device."""
        options = self.options
        draws = [s.draws.random() for s in sequences] if options.temperature else []
        histories = [s.ids for s in sequences] if options.repetition_penalty != 1.0 else []
        counts = options.frequency_penalty or options.presence_penalty
        generated = [s.ids[len(s.request.ids) :] for s in sequences] if counts else []
        return choose_tokens(logits, options, draws, histories, generated)


def request_of(
    ids: list[int],
    options: GenerationOptions,
    *,
    stop_ids: Collection[int] = (),
    n_tokens: int | None = None,
    make_constraint: Callable[[], Constraint] | None = None,
    sampler: Sampler | None = None,
    seed: str | None = None,
    salt: str = "",
    name: str = "the prompt",
) -> Request:
    """A request to a scheduler from options; arguments as for `Decoder` and `Request`.

    Args:
        ids: token ids of the prompt.
        options: how to choose and when to end.
        stop_ids: tokens that end a sequence, as for `Decoder`.
        seed: None draws what a `Decoder` of this prompt alone draws.

    Raises:
        OptionError: `options.stop_token_ids` or `options.logit_bias` holds a text, or the latter an
            id beyond `n_tokens`, or there are both draft tokens, which foretell the most likely
            ones, and a sampler.
    """
    _check_biases(options, n_tokens)
    most_drafts = options.prompt_lookup
    if most_drafts and sampler is not None:
        raise OptionError("prompt_lookup is for the most likely tokens alone; leave out sampler")
    if seed is None:
        number = random.SystemRandom().getrandbits(64) if options.seed is None else options.seed
        seed = f"{number}/0"
    return Request(
        ids=ids,
        sampler=OptionsSampler.of(options) if sampler is None else sampler,
        max_new_tokens=options.max_new_tokens,
        n=options.n,
        seed=seed,
        stop_ids=_all_stop_ids(options, stop_ids),
        n_tokens=n_tokens,
        logprobs=options.logprobs,
        make_constraint=make_constraint,
        make_drafter=partial(PromptLookup, most_drafts) if most_drafts else None,
        salt=salt,
        name=name,
    )


class Decoder:
    """Continues a batch of prompts; iterating gives each step's tokens.

    Prompts of different lengths share the batch and get the tokens that they would get alone (in
    half precision but for near ties: there a product's rounding depends on how many rows it has).
    The n samples of a prompt share its prefill. A row that ends leaves the batch at once.

    Args:
        model: gives the logits; or an engine that is open for it.
        prompts: token ids; none may be empty.
        options: how to choose and when to end.
        stop_ids: tokens that end a row, unless `options.ignore_eos`; those of
            `options.stop_token_ids` do in any case, which must be ids here.
        cache: for one prompt whose beginning it already holds; it is continued in place, and grown
            where it is too small.
        n_tokens: only ids below this are chosen, where the model's vocabulary is padded beyond the
            tokenizer's; None for all.
        make_constraint: gives each row a constraint of its own.
        sampler: any callable from logits (B, V) and the B sequences to token ids (B,), which takes
            the place of what `options` says on sampling (see `minllama.engine.sequence.Sampler`).

    Attributes:
        timings: tokens and seconds so far.
        scheduler: what runs the batch.

    Raises:
        MinllamaError: a prompt is empty or longer than the context, or the cache is not of its
            beginning; nothing has been computed.
        OptionError: as `request_of` does.
    """

    def __init__(
        self,
        model: Llama | Engine,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        *,
        stop_ids: Collection[int] = (),
        cache: KVCache | None = None,
        n_tokens: int | None = None,
        make_constraint: Callable[[], Constraint] | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        engine = engine_for(model) if isinstance(model, Llama) else model
        _check_biases(options, engine.config.vocab_size)
        listed = [token_ids(prompt) for prompt in prompts]
        self.stop_ids = _all_stop_ids(options, stop_ids)
        self.timings = Timings()
        self.scheduler = Scheduler(engine)
        self._sequences: list[SequenceState] = []
        seed = random.SystemRandom().getrandbits(64) if options.seed is None else options.seed
        # With a seed, equal prompts draw what each would draw alone.
        distinct = options.seed is None
        requests = [
            request_of(
                ids,
                options,
                stop_ids=stop_ids,
                n_tokens=n_tokens,
                make_constraint=make_constraint,
                sampler=sampler,
                seed=f"{seed}/{number if distinct else 0}",
                name=f"prompt {number + 1} of {len(listed)}" if len(listed) > 1 else "the prompt",
            )
            for number, ids in enumerate(listed)
        ]
        if cache is not None:
            for request in requests:
                request.check(engine.config)
            _check_cache(cache, listed, options.n)
        for request in requests:
            self._sequences += self.scheduler.add(request, cache=cache)

    def finish(self, row: int) -> None:
        """Remove a row from the batch before its next token, since it is complete."""
        self.scheduler.cancel(self._sequences[row])

    def __iter__(self) -> Iterator[list[Token]]:
        """Yield the new token of every row that is not finished, until all are."""
        scheduler, timings = self.scheduler, self.timings
        while scheduler.is_busy:
            start = time.perf_counter()
            tokens = scheduler.step()
            seconds = time.perf_counter() - start
            if timings.prefill_seconds:
                timings.decode_seconds += seconds
                timings.decode_tokens += len(tokens)
            elif scheduler.prefill_tokens:
                timings.prefill_seconds = seconds
                timings.prefill_tokens = scheduler.prefill_tokens
            for token in tokens:
                if token.finish_reason == "error":
                    error = self._sequences[token.row].error
                    assert error is not None
                    raise error
            yield tokens


def token_ids(prompt: Iterable[int]) -> list[int]:
    """A prompt's ids as a list of plain integers.

    Raises:
        MinllamaError: it is not a sequence of integers.
    """
    listed = plain_list(prompt)
    try:
        if isinstance(listed, (*BYTES, str, Mapping, Set)):
            raise TypeError
        return [_token_id(token_id) for token_id in listed]
    except TypeError as error:
        raise MinllamaError(
            f"a prompt is a text or a list of token ids, not {reprlib.repr(prompt)}"
            + (DECODE_BYTES if isinstance(listed, BYTES) else "")
        ) from error


def plain_list(value: Any) -> Any:
    """The Python numbers in an array or a tensor; anything else unchanged."""
    has_numbers = hasattr(value, "tolist") and not isinstance(value, BYTES)
    return value.tolist() if has_numbers else value


def _token_id(value: Any) -> int:
    value = plain_list(value)
    if isinstance(value, bool):  # integers in Python, like bytes, but not intended as ids
        raise TypeError
    return int(operator.index(value))


def _all_stop_ids(options: GenerationOptions, stop_ids: Collection[int]) -> frozenset[int]:
    """The ids that end a sequence.

    Raises:
        OptionError: `stop_token_ids` holds the text of a token, which needs a tokenizer.
    """
    further = options.stop_token_ids
    if names := [token for token in further if isinstance(token, str)]:
        raise OptionError(f"stop_token_ids: {names[0]!r} is a text; give its id here")
    ends = () if options.ignore_eos else stop_ids
    return frozenset((*ends, *(token for token in further if isinstance(token, int))))


def _check_biases(options: GenerationOptions, n_tokens: int | None) -> None:
    """Refuse biases of ids outside the vocabulary.

    Raises:
        OptionError: there is the text of a token, which needs a tokenizer, or an unknown id.
    """
    for token, _ in options.logit_bias:
        if isinstance(token, str):
            raise OptionError(f"logit_bias: {reprlib.repr(token)} is a text; give its id here")
        if n_tokens is not None and token >= n_tokens:
            raise OptionError(f"logit_bias holds {token}, and the ids are 0 to {n_tokens - 1}")


def _check_cache(cache: KVCache, prompts: Sequence[Sequence[int]], n: int) -> None:
    if cache.batch_size != 1 or len(prompts) != 1 or n != 1:
        raise MinllamaError(
            f"a cache that is continued is of one prompt and one sample, not of {cache.batch_size} "
            f"rows for {len(prompts)} prompts of {n} samples"
        )
    if cache.max_len >= len(prompts[0]):
        raise MinllamaError(
            f"the cache holds {cache.max_len} tokens, and must be shorter than the prompt of "
            f"{len(prompts[0])}: at least its last token is to be read; truncate the cache"
        )
