"""The decode loop: prompts of token ids, continued token by token.

Knows nothing of texts and tokenizers, nor how logits are computed, which is the engine's business.
"""

import operator
import random
import reprlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from minllama.engine.base import Engine
from minllama.engine.choose import engine_for
from minllama.errors import ContextError, MinllamaError, OptionError
from minllama.generation.sampling import check_chosen, choose_tokens
from minllama.generation.speculative import PromptLookup
from minllama.model.config import LlamaConfig
from minllama.model.kv_cache import KVCache
from minllama.model.llama import Llama
from minllama.options import GenerationOptions

_ROOM = 512
ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
BYTES = (bytes, bytearray, memoryview)
DECODE_BYTES = "; decode bytes first: prompt.decode()"

FinishReason = Literal["stop", "length"]


class Constraint(Protocol):
    """What one row may still become; `minllama.generation.constraints` makes them."""

    def forbid(self, logits: Tensor) -> None:
        """Set the logits (V,) of tokens that may not come next to -inf, in place."""

    def accept(self, token_id: int) -> None:
        """Take note of the token that was chosen."""

    def is_complete(self) -> bool:
        """Whether nothing can follow any more."""


class Token(NamedTuple):
    """One token of one row.

    Attributes:
        row: index of the row: prompt * n + sample.
        id: the token; None where the row ended with none, at the end of the context.
        logprob: its log-probability under the model (natural logarithm, before penalties,
            temperature and filters); None unless asked for.
        alternatives: the likeliest tokens and their log-probabilities, as many as asked for.
        finish_reason: why the row ends with it: `stop` (id is a stop id) or `length`.
    """

    row: int
    id: int | None
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


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


@dataclass
class _Row:
    """One text that is being continued."""

    index: int
    ids: list[int]
    room: int  # new tokens that it may still get
    draws: random.Random
    constraint: Constraint | None


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
        distinct_rows: with a seed, equal prompts draw different samples; otherwise each gets what
            it would get alone.

    Attributes:
        timings: tokens and seconds so far.

    Raises:
        MinllamaError: a prompt is empty or longer than the context, or the cache is not of its
            beginning; nothing has been computed.
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
        distinct_rows: bool = False,
    ) -> None:
        self.engine = engine_for(model) if isinstance(model, Llama) else model
        self.options = options
        self.prompts = [token_ids(prompt) for prompt in prompts]
        ends = () if options.ignore_eos else stop_ids
        self.stop_ids = frozenset((*ends, *_further_stop_ids(options)))
        self.timings = Timings()
        self._cache = cache
        self._finished: set[int] = set()
        self._n_tokens = n_tokens
        self._lookup = PromptLookup(options.prompt_lookup) if options.prompt_lookup else None
        self._drafts: list[int] = []
        self._device = self.engine.device  # which to ask for takes some time
        self._runs_ahead = _pays_to_run_ahead(self._device)
        _check_prompts(self.prompts, self.engine.config)
        if cache is not None:
            _check_cache(cache, self.prompts, options.n)
        context_len = self.engine.config.context_len
        seed = random.SystemRandom().getrandbits(64) if options.seed is None else options.seed
        distinct_rows = distinct_rows or options.seed is None
        self._active = [
            _Row(
                index=prompt * options.n + sample,
                ids=list(ids),
                room=min(options.max_new_tokens, context_len - len(ids)),
                draws=random.Random(f"{seed}/{prompt if distinct_rows else 0}/{sample}"),
                constraint=make_constraint() if make_constraint else None,
            )
            for prompt, ids in enumerate(self.prompts)
            for sample in range(options.n)
        ]
        self._owned = cache  # by who gave it, and may look at it between two tokens

    def finish(self, row: int) -> None:
        """Take a row out of the batch before its next token: it has all that it needs."""
        self._finished.add(row)

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[Token]]:
        """Yield the new token of every row that is not finished, until all are."""
        full = [
            Token(row.index, None, finish_reason="length") for row in self._active if not row.room
        ]
        if full:
            self._active = [row for row in self._active if row.room]
            yield full
        if not self._active:
            return
        start = time.perf_counter()
        logits = self._prefill()
        while self._active:
            tokens, ahead = self._next(logits)
            now = time.perf_counter()
            if self.timings.prefill_seconds == 0.0:
                self.timings.prefill_seconds = now - start
            else:
                self.timings.decode_seconds += now - start
                self.timings.decode_tokens += len(tokens)
            self._finished.update(token.row for token in tokens if token.finish_reason)
            owned = self._owned if ahead is not None else None
            if owned is not None:  # as always, who owns it finds its last token not read yet
                owned.truncate(len(self._active[0].ids) - 1)
            yield tokens
            kept = self._drop_finished()
            if self._active:
                start = time.perf_counter()
                if ahead is None:
                    logits = self._step()
                else:
                    logits = ahead if len(kept) == len(ahead) else ahead[kept]
                if owned is not None:
                    owned.advance([1])

    def _next(self, logits: Tensor) -> tuple[list[Token], Tensor | None]:
        """The tokens that follow, and the logits after them where they were read meanwhile.

        A GPU reads what it has chosen while the choice is on its way here, where waiting for it and
        asking again would leave the GPU idle.
        """
        if not self._may_run_ahead():
            return self._choose(logits), None
        chosen = self._chosen(logits)
        arriving = _Arriving(chosen)
        ahead = self._step(chosen)
        return self._accept_all(arriving.ids()), ahead

    def _may_run_ahead(self) -> bool:
        """Whether the next tokens can be read before anybody here has seen them."""
        options, rows = self.options, self._active
        return (
            self._runs_ahead
            and self.timings.prefill_seconds > 0  # the first token waits for nothing else
            and all(row.room > 1 and row.constraint is None for row in rows)
            and self._lookup is None
            and options.logprobs is None
            and options.repetition_penalty == 1.0
        )

    def _prefill(self) -> Tensor:
        """Read the prompts; (rows, V) logits of what follows them."""
        n = self.options.n
        prompts = [row.ids for row in self._active[::n]]
        cache = self._cache
        longest = max(map(len, prompts))
        if cache is None:
            capacity = self._capacity(longest) if n == 1 else longest
            cache = self.engine.new_cache(len(prompts), capacity)
        elif cache.capacity < longest:
            cache.grow(self._capacity(longest))
        new = [ids[known:] for ids, known in zip(prompts, cache.lengths, strict=True)]
        ids, mask = _right_padded(new, self._device)
        logits = self.engine.forward(ids, cache, attention_mask=mask).logits
        assert logits is not None
        self.timings.prefill_tokens = sum(map(len, new))
        if n > 1:
            cache = cache.repeated(n, self._capacity(longest))
            logits = logits.repeat_interleave(n, dim=0)
        self._cache = cache
        return logits

    def _capacity(self, filled: int) -> int:
        """Slots for some more tokens than are filled: most texts end long before their limit."""
        # The last token of a row is never read again, so it needs no slot.
        most = max(len(row.ids) + row.room - 1 for row in self._active)
        return min(most, 2 * filled + _ROOM)

    def _step(self, chosen: Tensor | None = None) -> Tensor:
        """Read each row's newest token; (rows, V) logits of what follows.

        An only row's drafts are read behind it: (1 + drafts, V).

        Args:
            chosen: (rows,), the newest tokens where they are on the device only.
        """
        assert self._cache is not None
        self._drafts = self._drafted() if chosen is None else []
        filled, new_len = self._cache.max_len, 1 + len(self._drafts)
        if filled + new_len > self._cache.capacity:
            self._cache.grow(self._capacity(filled))
        if chosen is None:
            newest = [[row.ids[-1], *self._drafts] for row in self._active]
            ids = torch.tensor(newest, device=self._device)
        else:
            ids = chosen.clamp(min=0).unsqueeze(-1)  # -1 is refused when it arrives
        which: Literal["all", "last"] = "all" if self._drafts else "last"
        logits = self.engine.forward(ids, self._cache, logits=which).logits
        assert logits is not None
        return logits.squeeze(0) if self._drafts else logits

    def _drafted(self) -> list[int]:
        """What an only row may go on with, by its own text; nothing is read that has no room."""
        if self._lookup is None or len(self._active) != 1 or len(self.prompts) != 1:
            return []
        (row,) = self._active
        return self._lookup.draft(row.ids, row.room - 1)

    def _choose(self, logits: Tensor) -> list[Token]:
        rows, options = self._active, self.options
        if self._drafts:
            return self._choose_drafted(self._known(logits))
        constraints = [(i, row.constraint) for i, row in enumerate(rows) if row.constraint]
        if constraints:
            logits = logits.clone()
        logprobs = None if options.logprobs is None else self._known(logits).float().log_softmax(-1)
        for slot, constraint in constraints:
            constraint.forbid(self._known(logits)[slot])
        return self._accept_all(self._chosen(logits).tolist(), logprobs)

    def _known(self, logits: Tensor) -> Tensor:
        """Without the padding of the model's vocabulary."""
        return logits if self._n_tokens is None else logits[:, : self._n_tokens]

    def _chosen(self, logits: Tensor) -> Tensor:
        """(rows,) tokens, on the device."""
        rows, options = self._active, self.options
        draws = [row.draws.random() for row in rows] if options.temperature else []
        histories = [row.ids for row in rows] if options.repetition_penalty != 1.0 else []
        return choose_tokens(self._known(logits), options, draws, histories)

    def _accept_all(self, ids: list[int], logprobs: Tensor | None = None) -> list[Token]:
        check_chosen(ids)
        return [
            self._accept(row, token_id, None if logprobs is None else logprobs[slot])
            for slot, (row, token_id) in enumerate(zip(self._active, ids, strict=True))
        ]

    def _choose_drafted(self, logits: Tensor) -> list[Token]:
        """The likeliest tokens of the only row: as many as its drafts foretold, and one more."""
        assert self._cache is not None
        (row,) = self._active
        tokens: list[Token] = []
        for place, token_id in enumerate(logits.argmax(-1).tolist()):
            tokens.append(self._accept(row, token_id, None))
            if tokens[-1].finish_reason or self._drafts[place : place + 1] != [token_id]:
                break
        # What was read of wrong drafts is forgotten; as always, the last token is not read yet.
        self._cache.truncate(len(row.ids) - 1)
        return tokens

    def _accept(self, row: _Row, token_id: int, logprobs: Tensor | None) -> Token:
        row.ids.append(token_id)
        row.room -= 1
        if row.constraint is not None:
            row.constraint.accept(token_id)
        reason: FinishReason | None = None
        # A constraint that is met ends a row even where end tokens do not.
        done = row.constraint is not None and row.constraint.is_complete()
        if token_id in self.stop_ids or done:
            reason = "stop"
        elif row.room == 0:
            reason = "length"
        if logprobs is None:
            return Token(row.index, token_id, finish_reason=reason)
        values, ids = logprobs.topk(min(self.options.logprobs or 0, len(logprobs)))
        alternatives = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Token(row.index, token_id, logprobs[token_id].item(), alternatives, reason)

    def _drop_finished(self) -> list[int]:
        """Take rows that have ended out of the batch; which slots the rows that stay had."""
        kept = list(range(len(self._active)))
        for slot in reversed(range(len(self._active))):
            if self._active[slot].index in self._finished:
                # As the cache does it: the last row moves into the gap.
                last, moved = self._active.pop(), kept.pop()
                if slot < len(self._active):
                    self._active[slot], kept[slot] = last, moved
                if self._active and self._cache is not None:  # an only row stays, for its owner
                    self._cache.drop_row(slot)
        return kept


class _Arriving:
    """Whole numbers on their way from the device, for which only who wants them waits."""

    def __init__(self, numbers: Tensor) -> None:
        self._event = None
        self._numbers = numbers
        if numbers.is_cuda:
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(numbers.device))

    def ids(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        found: list[int] = self._numbers.tolist()
        return found


def _pays_to_run_ahead(device: torch.device) -> bool:
    """Whether it computes by itself, so that it may go on while its choice is on its way here."""
    return device.type == "cuda"


def token_ids(prompt: Iterable[int]) -> list[int]:
    """A prompt's ids as a list of plain integers.

    Raises:
        MinllamaError: it is not a sequence of whole numbers.
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
    """The Python numbers in an array or a tensor; anything else as it is."""
    has_numbers = hasattr(value, "tolist") and not isinstance(value, BYTES)
    return value.tolist() if has_numbers else value


def _token_id(value: Any) -> int:
    value = plain_list(value)
    if isinstance(value, bool):  # whole numbers to Python, as bytes are, and not meant as ids
        raise TypeError
    return int(operator.index(value))


def _further_stop_ids(options: GenerationOptions) -> list[int]:
    """The ids in `stop_token_ids`.

    Raises:
        OptionError: it holds the text of a token, which needs a tokenizer.
    """
    if names := [token for token in options.stop_token_ids if isinstance(token, str)]:
        raise OptionError(f"stop_token_ids: {names[0]!r} is a text; give its id here")
    return [token for token in options.stop_token_ids if isinstance(token, int)]


def _check_prompts(prompts: Sequence[Sequence[int]], config: LlamaConfig) -> None:
    for number, ids in enumerate(prompts):
        which = f"prompt {number + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
        if not ids:
            raise MinllamaError(f"{which} is empty; give at least one token to continue")
        if len(ids) > config.context_len:
            raise ContextError(
                f"{which} has {len(ids)} tokens and the model's context is {config.context_len}; "
                "shorten it"
            )
        if not all(0 <= token_id < config.vocab_size for token_id in ids):
            bad = next(i for i in ids if not 0 <= i < config.vocab_size)
            raise MinllamaError(
                f"{which} holds the token id {bad}, and the model knows 0 to "
                f"{config.vocab_size - 1}; its tokenizer is of another model"
            )


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


def _right_padded(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """(B, T) ids with zeros behind shorter rows, and the mask of real ones; None if all are."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    if all(len(row) == longest for row in rows):
        return ids, None
    lens = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(longest, device=device) < lens.unsqueeze(-1)
