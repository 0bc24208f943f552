"""The scheduler: sequences that join and leave a running batch, step by step.

Each step reads one token of every running sequence, and with what is left of a token budget the
prompts of those that wait. One scheduler serves the library's batches, samples and conversations;
callers add requests and receive tokens; caches stay inside.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from minllama.engine.base import Engine
from minllama.engine.choice import (
    Arriving,
    Choice,
    accepted,
    choice_of,
    choose,
    end_without_token,
    sampled,
)
from minllama.engine.evaluation import Evaluation, EvaluationRequest
from minllama.engine.evaluations import Evaluations
from minllama.engine.prefix_cache import PrefixCache
from minllama.engine.sequence import (
    Request,
    Sequence,
    Token,
    samples_of,
)
from minllama.errors import MinllamaError, OptionError
from minllama.model.inputs import padded
from minllama.model.kv_cache import KVCache

EVALUATION_TOKENS = 1024  # of evaluations in a step in which no sequence has a part
SPARE_TOKENS = 512  # slots of a cache beyond twice its longest sequence


@dataclass
class _Prefill:
    """Prompts that begin together and are read into a cache of their own.

    Attributes:
        samples: of each prompt, which is a row of the cache, its sequences.
        cache: the prompts as far as they were read.
    """

    samples: list[list[Sequence]]
    cache: KVCache


class Scheduler:
    """Continues sequences that come and go, on one engine; not to be used by two threads at once.

    A step reads at most `token_budget` tokens: first the newest token of each running sequence,
    then of the prompts that wait, in order of arrival, as many as the rest allows; a longer prompt
    is read in chunks over several steps, between which running sequences go on. The n samples of a
    prompt share its prefill. A sequence that ends or is cancelled leaves at once, and its memory is
    taken by others or given back. Evaluations of given texts are requests like others: prompts and
    they alternate in coming first if both wait, and the rest of the budget goes to the other.

    A sequence has its own options, and gets the tokens that it would get alone. Its logits are
    computed in other company, and with another budget in other chunks, which changes the last bits
    of a sum: in float32 no token but for ties, in half precision near ties too. With dynamic RoPE
    scaling they depend on the longest sequence of a batch beyond the original context.

    Args:
        engine: computes; its model does not change meanwhile.
        token_budget: tokens to read in a step; None for no bound: all prompts that wait are read in
            one forward pass.
        max_sequences: running at a time; None for no bound but the budget.
        prefix_cache: of this engine, where prompts are to share what others have read; None reads
            each prompt from its start.
        batch_tokens: padded tokens of evaluations to compute together; None for what suits the
            device.

    Attributes:
        prefill_tokens: of prompts, read so far; those found in a prefix cache are not read.
        evaluated: what the last step has answered.

    Raises:
        OptionError: a bound is less than 1.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        token_budget: int | None = None,
        max_sequences: int | None = None,
        prefix_cache: PrefixCache | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        for name, bound in (
            ("token_budget", token_budget),
            ("max_sequences", max_sequences),
            ("batch_tokens", batch_tokens),
        ):
            if bound is not None and bound < 1:
                raise OptionError(f"{name} must be 1 or more, not {bound}")
        self.engine, self.prefix_cache = engine, prefix_cache
        self.prefill_tokens = 0
        self._budget = math.inf if token_budget is None else token_budget
        self._most_running = min(self._budget, max_sequences or math.inf)
        self._device = engine.device
        self._runs_ahead = pays_to_run_ahead(engine.device)
        self._next_index = 0
        self._evaluations = Evaluations(engine, batch_tokens, prefix_cache)
        self._evaluates_first = False
        self.evaluated: list[Evaluation] = []
        self._full: list[Sequence] = []  # their prompts fill the context
        self._waiting: deque[list[Sequence]] = deque()  # the samples of each prompt
        self._prefill: _Prefill | None = None
        self._running: list[Sequence] = []
        self._cache: KVCache | None = None  # a row for each running sequence
        self._logits: Tensor | None = None  # (B, V) of running sequences whose last token was read
        self._drafts: list[int] = []  # draft tokens read after the last token of the only sequence
        self._choice: Choice | None = None  # of the running sequences
        self._n_read = 0  # tokens, in this step
        self._is_lent = False  # the cache is the caller's, who may read it between two steps
        self._is_ahead = False  # a lent cache is shown without its last token

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to do in a step."""
        sequences = self._running or self._waiting or self._full or self._prefill
        return bool(sequences or self._evaluations.waiting)

    @property
    def running(self) -> list[Sequence]:
        """Sequences that get a token in each step."""
        return list(self._running)

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences whose prompts have not been read to the end yet."""
        started = self._prefill.samples if self._prefill else []
        return [sequence for samples in (*started, *self._waiting) for sequence in samples]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, without those of the prefix cache."""
        caches = (self._cache, self._prefill and self._prefill.cache)
        return self._evaluations.nbytes + sum(cache.nbytes for cache in caches if cache)

    def add(self, request: Request, *, cache: KVCache | None = None) -> list[Sequence]:
        """Add a request, which joins in the next step.

        Args:
            request: prompts that were added between the same two steps begin in one forward pass,
                as far as they fit into the token budget.
            cache: of one row, which holds the beginning of the prompt. It is continued in place,
                and grown where it is too small; between two steps it holds all of the sequence but
                the last token. For a scheduler that has nothing else to do until that has ended.

        Returns:
            Its n sequences, with indices in order of adding.

        Raises:
            MinllamaError: the prompt is empty or longer than the context, or there is other work
                beside a cache.
            OptionError: more samples are requested than may run at a time.
        """
        request.check(self.engine.config)
        if request.n > self._most_running:
            raise OptionError(
                f"n = {request.n} samples are more than the {self._most_running} sequences that "
                "may run at a time; ask for fewer"
            )
        if (self.is_busy and cache is not None) or self._is_lent:
            raise MinllamaError("a sequence that continues a caller's cache runs alone")
        samples = samples_of(request, self._next_index, self.engine.config.context_len)
        self._next_index += request.n
        if not samples[0].remaining:
            self._full += samples
        elif cache is None:
            self._waiting.append(samples)
        else:
            self._is_lent, self._prefill = True, _Prefill([list(samples)], cache)
            if cache.capacity < len(request.ids):
                cache.grow(_capacity(samples, len(request.ids)))
        return list(samples)

    def evaluate(self, request: EvaluationRequest) -> Evaluation:
        """Add an evaluation, which joins in the next step.

        Raises:
            MinllamaError: the text is empty, or longer than the context; or a caller's cache is
                being continued.
        """
        request.check(self.engine.config)
        if self._is_lent:
            raise MinllamaError("a sequence that continues a caller's cache runs alone")
        evaluation = Evaluation(request)
        self._evaluations.waiting.append(evaluation)
        return evaluation

    def cancel(self, *entries: Sequence | Evaluation) -> None:
        """Remove sequences at once in whatever state; those that have ended stay unchanged.

        Their keys and values are freed, or stored in the prefix cache if there is one.
        """
        for entry in entries:
            if isinstance(entry, Sequence) and not entry.has_ended:
                self._cancel(entry)
        evaluations = [e for e in entries if isinstance(e, Evaluation) and not e.has_ended]
        if evaluations:
            self._evaluations.cancel(evaluations)

    def _cancel(self, sequence: Sequence) -> None:
        sequence.has_ended = True
        if sequence in self._running:
            self._drop_ended()
            return
        for samples in (self._full, *self._waiting, *self._prefill_samples()):
            if sequence in samples:
                samples.remove(sequence)
        self._waiting = deque(filter(None, self._waiting))
        prefill = self._prefill
        if prefill is None:
            return
        _compact_rows(prefill.samples, prefill.cache, lambda samples: bool(samples))
        if not prefill.samples:
            self._prefill, self._is_lent = None, False

    def _prefill_samples(self) -> list[list[Sequence]]:
        return self._prefill.samples if self._prefill else []

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Read tokens within the budget of one step, and choose a token for each ready sequence.

        Returns:
            One token for each running sequence, and the first of those whose prompts were read to
            the end; several for one whose drafts were right; none where a step could only read a
            part of a prompt. Sequences that end have that in their last token, and have left.

        Raises:
            MinllamaError: the model has changed since the engine was opened.
        """
        self._n_read = 0
        self.evaluated = []
        if self._full:
            full, self._full = self._full, []
            return [end_without_token(sequence, "length") for sequence in full]
        if self._running and self._logits is None:
            # Kept until tokens were chosen, so that a failed step can be repeated.
            self._logits = self._decode()
        elif self._is_ahead and self._cache is not None:
            self._cache.advance([1])
        self._is_ahead = False
        evaluates_first, self._evaluates_first = self._evaluates_first, not self._evaluates_first
        if evaluates_first:
            self._evaluate()
        read = self._read_prompts() if self._waiting or self._prefill else None
        if not evaluates_first:
            self._evaluate()
        tokens = self._next_tokens(can_run_ahead=read is None) if self._running else []
        if read is not None:
            prefill, logits = read
            sequences = [sequence for samples in prefill.samples for sequence in samples]
            tokens += choose(sequences, logits, choice_of(sequences, self._device))
            self._join(sequences, prefill.cache)
        for token in tokens:
            if token.finish_reason is not None:
                self._drop_ended()
                break
        return tokens

    def _evaluate(self) -> None:
        """Answer what the rest of the budget allows."""
        if not self._evaluations.waiting:
            return
        budget = self._budget - self._n_read
        if not (self._running or self._waiting or self._prefill):
            # Nobody waits for a token meanwhile, and larger batches take less time in all.
            budget = max(budget, EVALUATION_TOKENS)
        self.evaluated, n_read = self._evaluations.step(budget)
        self._n_read += n_read

    # Decode steps

    def _decode(self, chosen: Tensor | None = None) -> Tensor:
        """Read each running sequence's newest token; (B, V) logits of what follows.

        Drafts of an only sequence are read after it: (1 + drafts, V).

        Args:
            chosen: (B,), the newest tokens where they are on the device only.
        """
        running, cache = self._running, self._cache
        assert cache is not None
        drafts: list[int] = []
        if chosen is None and len(running) == 1 and running[0].drafter is not None:
            most = min(running[0].remaining, self._budget) - 1
            drafts = running[0].drafter.draft(running[0].ids, int(most))
        self._drafts = drafts
        filled, new_len = cache.max_len, 1 + len(drafts)
        if filled + new_len > cache.capacity:
            cache.grow(_capacity(running, filled))
        if chosen is None:
            newest = [[sequence.ids[-1], *drafts] for sequence in running]
            ids = torch.tensor(newest, device=self._device)
        else:
            ids = chosen.clamp(min=0).unsqueeze(-1)  # -1 is refused when it arrives
        self._n_read += ids.numel()
        which: Literal["all", "last"] = "all" if drafts else "last"
        logits = self.engine.forward(ids, cache, logits=which).logits
        assert logits is not None
        return logits.squeeze(0) if drafts else logits

    def _next_tokens(self, *, can_run_ahead: bool) -> list[Token]:
        """Choose a token for each running sequence from the latest logits.

        A GPU reads what it has chosen while the choice is on its way to the host, where waiting for
        it and coming back would leave the GPU idle.
        """
        running, logits = self._running, self._logits
        assert logits is not None
        if self._choice is None:
            self._choice = choice_of(running, self._device)
        choice = self._choice
        if self._drafts:
            tokens = self._choose_drafted(running[0], logits)
        elif (
            self._runs_ahead
            and can_run_ahead
            and choice.can_run_ahead
            and self._n_read + len(running) <= self._budget
            and all(sequence.remaining > 1 for sequence in running)
        ):
            chosen = sampled(running, logits, choice)
            arriving = Arriving(chosen)
            self._logits = self._decode(chosen)
            ids = arriving.ids()
            tokens = [accepted(s, token_id) for s, token_id in zip(running, ids, strict=True)]
            if self._is_lent:
                assert self._cache is not None
                self._cache.truncate(len(running[0].ids) - 1)
                self._is_ahead = True
            return tokens
        else:
            tokens = choose(running, logits, choice)
        self._logits = None
        return tokens

    def _choose_drafted(self, sequence: Sequence, logits: Tensor) -> list[Token]:
        """The most likely tokens: as many as the drafts predicted, and one more."""
        assert self._cache is not None
        tokens: list[Token] = []
        for place, token_id in enumerate(
            logits[:, : sequence.request.n_tokens].argmax(-1).tolist()
        ):
            tokens.append(accepted(sequence, token_id))
            if sequence.has_ended or self._drafts[place : place + 1] != [token_id]:
                break
        # Wrong drafts are removed from the cache; as always, the last token is not read yet.
        self._cache.truncate(len(sequence.ids) - 1)
        return tokens

    # Prefill

    def _read_prompts(self) -> tuple[_Prefill, Tensor] | None:
        """Read waiting prompts within the budget.

        Returns:
            Those that were read to their end, and the logits, (B, V), of what follows each of their
            samples.
        """
        budget = self._budget - max(self._n_read, len(self._running) + len(self._drafts))
        if budget < 1:
            return None
        if self._prefill is None:
            self._prefill = self._begin(budget)
        prefill = self._prefill
        if prefill is None:
            return None
        cache = prefill.cache
        # Several prompts begin together only if all of them fit.
        most = int(budget) if len(prefill.samples) == 1 and budget != math.inf else None
        new, is_end = [], True
        for samples, n_cached in zip(prefill.samples, cache.lengths, strict=True):
            prompt = samples[0].ids
            end = len(prompt) if most is None else min(n_cached + most, len(prompt))
            is_end = is_end and end == len(prompt)
            new.append(prompt[n_cached:end])
        ids, mask = padded(new, self._device)
        output = self.engine.forward(
            ids, cache, attention_mask=mask, logits="last" if is_end else None
        )
        n_read = sum(map(len, new))
        self.prefill_tokens += n_read
        self._n_read += n_read
        if not is_end:
            return None
        self._prefill = None
        assert output.logits is not None
        return self._for_all_samples(prefill, output.logits)

    def _begin(self, budget: float) -> _Prefill | None:
        """Start the waiting prompts that fit into one forward pass, but at least the first one."""
        started: list[list[Sequence]] = []
        hits: list[tuple[KVCache, int] | None] = []
        max_hit_len = max_new_len = n_tokens = 0
        n_running = len(self._running)
        while self._waiting:
            samples = self._waiting[0]
            prompt, request = samples[0].ids, samples[0].request
            n_running += len(samples)
            if n_running > self._most_running:
                break
            prefixes = self.prefix_cache
            hit = None if prefixes is None else prefixes.find(prompt, request.salt)
            hit_len = hit[1] if hit else 0
            n_tokens += len(prompt) - hit_len
            longest = max(max_hit_len, hit_len) + max(max_new_len, len(prompt) - hit_len)
            # Rows are padded to a common length of cached tokens and to one of new tokens.
            if started and (n_tokens > budget or longest > self.engine.config.context_len):
                break
            max_hit_len, max_new_len = (
                max(max_hit_len, hit_len),
                max(max_new_len, len(prompt) - hit_len),
            )
            started.append(self._waiting.popleft())
            hits.append(hit)
        if not started:
            return None
        capacity = max_hit_len + max_new_len
        if not self._running and all(len(samples) == 1 for samples in started):
            # Becomes the cache of the running sequences.
            capacity = max(capacity, _capacity([s for (s,) in started], capacity))
        cache = self.engine.new_cache(len(started), capacity)
        for row, hit in enumerate(hits):
            if hit is not None:
                cache.load_prefix(row, *hit)
                for sequence in started[row]:
                    sequence.cached_tokens = hit[1]
        return _Prefill(started, cache)

    def _for_all_samples(self, prefill: _Prefill, logits: Tensor) -> tuple[_Prefill, Tensor]:
        """Rows of a cache and of logits for each sample of each prompt."""
        cache = prefill.cache
        if self.prefix_cache is not None:
            for row, samples in enumerate(prefill.samples):
                self.prefix_cache.put(samples[0].ids, cache, row, samples[0].request.salt)
        rows = [row for row, samples in enumerate(prefill.samples) for _ in samples]
        if len(rows) == len(prefill.samples):
            return prefill, logits
        capacity = _capacity((s for samples in prefill.samples for s in samples), cache.max_len)
        prefill.cache = cache.select_rows(rows, capacity)
        return prefill, logits[rows]

    def _join(self, sequences: list[Sequence], cache: KVCache) -> None:
        """Move sequences with prefilled prompts to the running batch."""
        if self._cache is None:
            self._running, self._cache = sequences, cache
        else:
            self._running += sequences
            filled = max(self._cache.max_len, cache.max_len)
            fits = filled < self._cache.capacity
            self._cache.append(cache, 0 if fits else _capacity(self._running, filled))
        self._choice = None

    # The end of a sequence

    def _drop_ended(self) -> None:
        """Remove sequences that have ended from the batch, and free memory."""
        running, cache = self._running, self._cache
        assert cache is not None
        if self.prefix_cache is not None:
            for row, sequence in enumerate(running):
                if sequence.has_ended:
                    self.prefix_cache.put(sequence.ids, cache, row, sequence.request.salt)
        self._choice = None
        if all(sequence.has_ended for sequence in running):
            # The owner of a lent cache finds the last sequence in it.
            self._running, self._cache, self._logits, self._drafts = [], None, None, []
            self._is_lent = self._is_ahead = False
            return
        slots = _compact_rows(running, cache, lambda sequence: not sequence.has_ended)
        if self._logits is not None:
            self._logits = self._logits[slots]
        rows = len(running) if len(running) <= cache.rows // 2 else cache.rows
        capacity = max(_capacity(running, cache.max_len), cache.max_len)
        if capacity > cache.capacity // 2:
            capacity = cache.capacity
        if (rows, capacity) != (cache.rows, cache.capacity):
            cache.resize(rows, capacity)


def _capacity(sequences: Iterable[Sequence], filled: int) -> int:
    """Slots for a few more tokens than are filled: most sequences end long before their limit."""
    # The last token of a sequence is never read, so it needs no slot.
    most = max(len(sequence.ids) + sequence.remaining - 1 for sequence in sequences)
    return min(most, 2 * filled + SPARE_TOKENS)


def _compact_rows(entries: list[Any], cache: KVCache, is_kept: Callable[[Any], bool]) -> list[int]:
    """Drop rows of a cache and their entries in a list; returns the remaining rows' old slots."""
    slots = list(range(len(entries)))
    for slot in reversed(range(len(entries))):
        if not is_kept(entries[slot]):
            # As the cache does it: the last row moves into the gap.
            last, moved = entries.pop(), slots.pop()
            if slot < len(entries):
                entries[slot], slots[slot] = last, moved
            cache.drop_row(slot)
    return slots


def pays_to_run_ahead(device: torch.device) -> bool:
    """Whether the device runs asynchronously, so that it can continue during a copy to the host."""
    return device.type == "cuda"
