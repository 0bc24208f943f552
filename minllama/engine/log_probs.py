"""Log-probabilities of a text's own tokens, each given those before it."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from minllama.engine.base import Engine
from minllama.engine.evaluation import Chunks, EvaluationRequest
from minllama.engine.packing import hidden_states
from minllama.engine.scoring import MAX_LOGITS
from minllama.errors import MinllamaError
from minllama.model.config import LlamaConfig
from minllama.model.inputs import padded
from minllama.model.kv_cache import KVCache


class TokenLogProb(NamedTuple):
    """How likely a model found one token.

    Attributes:
        logprob: of the token, a natural logarithm.
        alternatives: the most likely tokens and their log-probabilities, as many as requested.
    """

    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class LogProbsRequest(EvaluationRequest):
    """How likely each token of a text was; the result is a `TokenLogProb` for each.

    Attributes:
        start: index of the first token whose log-probability is reported, at least 1, since nothing
            comes before the first token, and above `shared_len`.
        top: alternatives to report.
        n_tokens: only ids below this count, where the model's vocabulary is padded beyond the
            tokenizer's; None for all.
    """

    start: int = 1
    top: int = 0
    n_tokens: int | None = None

    @cached_property
    def group(self) -> Hashable:
        return LogProbsRequest, self.n_tokens

    def check(self, config: LlamaConfig) -> None:
        """See `EvaluationRequest.check`.

        Raises:
            MinllamaError: also if nothing precedes the first token that is reported.
        """
        super().check(config)
        if not self.shared_len < self.start <= len(self.ids):
            raise MinllamaError(
                f"start must be above the {self.shared_len} shared tokens and at most "
                f"{len(self.ids)}, the tokens of {self.name}, not {self.start}"
            )

    def compute(
        self, engine: Engine, requests: "Sequence[LogProbsRequest]", cache: KVCache | None
    ) -> Sequence[list[TokenLogProb]]:
        """See `EvaluationRequest.compute`."""
        known = 0 if cache is None else cache.max_len
        ids, mask = padded([request.ids[known:] for request in requests], engine.device)
        starts = range(0, ids.numel(), ids.shape[1])
        spans = [
            range(start + request.start - 1 - known, start + len(request.ids) - 1 - known)
            for start, request in zip(starts, requests, strict=True)
        ]
        selected = torch.tensor([place for span in spans for place in span], device=engine.device)
        found: list[TokenLogProb] = []
        if selected.numel():
            h = hidden_states(
                engine.llama, engine.config.n_layers, ids, mask, cache=cache, selected=selected
            )
            targets = [token for request in requests for token in request.ids[request.start :]]
            found = self._read(engine, h, targets, max(request.top for request in requests))
        results, begin = [], 0
        for request, span in zip(requests, spans, strict=True):
            some = found[begin : begin + len(span)]
            results.append(
                [token._replace(alternatives=token.alternatives[: request.top]) for token in some]
            )
            begin += len(span)
        return results

    def in_chunks(self, engine: Engine, cache: KVCache) -> Chunks:
        """See `EvaluationRequest.in_chunks`."""
        found: list[TokenLogProb] = []
        allowed = yield 0
        while (begin := cache.lengths[0]) < len(self.ids):
            engine.snapshot.check()
            ids = torch.tensor([self.ids[begin : begin + allowed]], device=engine.device)
            end = begin + ids.shape[1]
            first = max(begin, self.start - 1)  # the first that predicts a token that is reported
            targets = list(self.ids[first + 1 : end + 1])
            selected = torch.arange(first - begin, first - begin + len(targets))
            h = hidden_states(
                engine.llama,
                engine.config.n_layers,
                ids,
                cache=cache,
                selected=selected.to(engine.device) if targets else None,
            )
            if targets:
                found += self._read(engine, h, targets, self.top)
            cache.advance([end - begin])
            allowed = yield end - begin
        return found

    def _read(
        self, engine: Engine, h: Tensor, targets: Sequence[int], top: int
    ) -> list[TokenLogProb]:
        """What N hidden states before the last norm, (N, D), predict."""
        found: list[TokenLogProb] = []
        for some, ids in zip(
            engine.llama.norm(h).split(MAX_LOGITS),
            torch.tensor(targets, device=engine.device).split(MAX_LOGITS),
            strict=True,
        ):
            logits = engine.llama.compute_logits(some)[:, : self.n_tokens].float()
            log_probs = logits.log_softmax(-1)
            values, best = log_probs.topk(min(top, log_probs.shape[1]))
            own = log_probs.gather(1, ids.unsqueeze(-1)).squeeze(-1)
            found += [
                TokenLogProb(one, tuple(zip(*alternatives, strict=True)))
                for one, alternatives in zip(
                    own.tolist(), zip(best.tolist(), values.tolist(), strict=True), strict=True
                )
            ]
        return found
