"""Score labels as continuations of a prompt: the chain rule over tokens, in one forward pass.

The labels of a prompt share its computation. They form a trie, appended to the prompt: a token that
several labels start with is computed once, and an attention mask lets each token attend to the
prompt and its own ancestors only. A label's last token is only predicted, never computed, so labels
of one token add nothing to the cost of the prompt. A scheduler answers `ScoreRequest`s;
training calls `compute_label_scores`, with gradients.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minllama.engine.base import Engine, TokenTree
from minllama.engine.evaluation import Chunks, EvaluationRequest, read_into
from minllama.engine.packing import hidden_states
from minllama.model.inputs import padded
from minllama.model.kv_cache import KVCache
from minllama.model.llama import Llama
from minllama.quantization.modules import rows_of

MAX_LOGITS = 256  # rows of logits over the vocabulary at a time: 50 MB of float32 at 49,152 tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreRequest(EvaluationRequest):
    """Log p(label | text) of each label; the result is (C,), float32, in nats.

    Attributes:
        continuations: token ids of each of C labels.
    """

    continuations: tuple[tuple[int, ...], ...]

    @cached_property
    def length(self) -> int:
        """The prompt's tokens, and those of the labels that are computed."""
        inner = {label[:end] for label in self.continuations for end in range(1, len(label))}
        return len(self.ids) + len(inner)

    @cached_property
    def group(self) -> Hashable:
        return ScoreRequest, len(self.continuations)

    def compute(
        self, engine: Engine, requests: "Sequence[ScoreRequest]", cache: KVCache | None
    ) -> Sequence[Tensor]:
        """See `EvaluationRequest.compute`."""
        return list(_scores(engine, requests, cache))

    def in_chunks(self, engine: Engine, cache: KVCache) -> Chunks:
        """See `EvaluationRequest.in_chunks`; labels are computed after the prompt's last token."""
        yield from read_into(engine, self.ids[:-1], cache)
        return _scores(engine, [self], cache)[0]


def _scores(engine: Engine, requests: Sequence[ScoreRequest], cache: KVCache | None) -> Tensor:
    """`compute_label_scores`, or, of exact requests, the same with bits that company never changes.

    Which of them depends on the engine and on a request alone.
    """
    if requests[0].is_exact and engine.is_batch_invariant:
        return _batch_invariant_scores(engine, requests, cache)
    return compute_label_scores(engine.llama, requests, cache)


def _batch_invariant_scores(
    engine: Engine, requests: Sequence[ScoreRequest], cache: KVCache | None
) -> Tensor:
    cached_len = 0 if cache is None else cache.max_len
    layout = _Layout(requests, cached_len)
    batch, length = layout.ids.shape
    if cache is None:
        cache = KVCache(engine.config, batch, length, dtype=engine.llama.dtype)
    columns = torch.arange(length)
    slots = (cached_len + columns).unsqueeze(0)
    positions = slots if layout.positions is None else layout.positions
    lens = torch.tensor([request.length - cached_len for request in requests])
    depth = max(max(map(len, request.continuations)) for request in requests)
    seen = (slots + 1).repeat(batch, 1)
    ancestors = torch.full((batch, length, max(depth - 1, 1)), -1)
    for row, (request, trie) in enumerate(zip(requests, layout.tries, strict=True)):
        start = len(request.ids) - cached_len
        seen[row, start:] = len(request.ids)
        for node, sees in enumerate(trie.sees):
            found = sees.nonzero().squeeze(-1) + len(request.ids)
            ancestors[row, start + node, : len(found)] = found
    tree = TokenTree(slots, seen, ancestors)
    mask = columns < lens.unsqueeze(-1)
    logits = engine.tree_logits(layout.ids, positions, mask, tree, cache, layout.queries)
    # A row at a time: sums over several are added up in another order than over one.
    normalizers = torch.stack([row.logsumexp(-1) for row in logits])
    return layout.summed(logits[layout.tokens[:, 0], layout.tokens[:, 1]], normalizers)


def compute_label_scores(
    llama: Llama, requests: Sequence[ScoreRequest], cache: KVCache | None = None
) -> Tensor:
    """Log p(label | prompt) of each label: the sum over its tokens, in nats.

    Args:
        llama: receives gradients, unless a cache is given.
        requests: B of them, each with C continuations.
        cache: of B rows of equal length, which hold the first tokens of each prompt, but not all;
            what is written after them is not kept.

    Returns:
        (B, C), float32.
    """
    layout = _Layout(requests, 0 if cache is None else cache.max_len)
    device = llama.device
    h = hidden_states(
        llama,
        len(llama.layers),
        layout.ids.to(device),
        attention_mask=None if layout.mask is None else layout.mask.to(device),
        positions=None if layout.positions is None else layout.positions.to(device),
        cache=cache,
        selected=layout.queries.to(device),
    )
    hidden = llama.norm(h)  # (M, D): where a token of a label is predicted
    parts = [llama.compute_logits(h).float().logsumexp(-1) for h in hidden.split(MAX_LOGITS)]
    normalizers = torch.cat(parts)  # (M,)
    tokens = layout.tokens.to(device)  # (K, 3)
    chosen = _token_logits(llama, hidden[tokens[:, 0]], tokens[:, 1])  # (K,)
    return layout.summed(chosen, normalizers)


def _token_logits(llama: Llama, hidden: Tensor, ids: Tensor) -> Tensor:
    """The logit of one token at each hidden state: (..., D) and (...) -> (...), float32.

    Computed in float32 whatever the weights' dtype: bfloat16's resolution for logits of 16 to 32 is
    an eighth, often more than the difference between two labels.
    """
    head = llama.tok_embeddings if llama.output is None else llama.output
    return (hidden.float() * rows_of(head, ids).float()).sum(-1)


@dataclass(frozen=True)
class _Trie:
    """The tokens of some labels but for each one's last, parents before children.

    Attributes:
        ids: N token ids.
        depths: N, from 0.
        sees: (N, N), true where a token may attend: to its ancestors and itself.
        queries: for each label the nodes that predict its tokens; -1 is the prompt's last token.
    """

    ids: tuple[int, ...]
    depths: tuple[int, ...]
    sees: Tensor
    queries: tuple[tuple[int, ...], ...]


def _trie(continuations: tuple[tuple[int, ...], ...]) -> _Trie:
    node_of: dict[tuple[int, ...], int] = {(): -1}
    ids: list[int] = []
    depths: list[int] = []
    ancestors: list[list[int]] = []
    for label in continuations:
        for end in range(1, len(label)):
            if label[:end] not in node_of:
                parent = node_of[label[: end - 1]]
                node_of[label[:end]] = len(ids)
                ancestors.append(([] if parent < 0 else ancestors[parent]) + [len(ids)])
                ids.append(label[end - 1])
                depths.append(end - 1)
    sees = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for node, seen in enumerate(ancestors):
        sees[node, seen] = True
    queries = tuple(
        tuple(node_of[label[:end]] for end in range(len(label))) for label in continuations
    )
    return _Trie(tuple(ids), tuple(depths), sees, queries)


class _Layout:
    """Prompts and their tries as the tensors of one forward pass, padded on the right.

    Attributes:
        ids: (B, T).
        mask: (B, T), or (B, T, T) with trie nodes; None without padding.
        positions: (B, T) with a (B, T, T) mask; else None.
        queries: (M,), flat indices of the tokens that predict a label's token.
        tokens: (K, 3): for each token of each label its query, its id, and sequence * C + label.
        tries: of each row.
    """

    def __init__(self, prompts: Sequence[ScoreRequest], cached_len: int) -> None:
        tries: dict[tuple[tuple[int, ...], ...], _Trie] = {}
        for prompt in prompts:
            if prompt.continuations not in tries:
                tries[prompt.continuations] = _trie(prompt.continuations)
        of_row = [tries[prompt.continuations] for prompt in prompts]
        rows = [
            prompt.ids[cached_len:] + trie.ids for prompt, trie in zip(prompts, of_row, strict=True)
        ]
        self.ids, padding = padded(rows)
        self.mask, self.positions = padding, None
        starts = [
            len(prompt.ids) - cached_len for prompt in prompts
        ]  # slot of each row's first node
        if any(trie.ids for trie in of_row):
            self.mask, self.positions = _tree_layout(of_row, starts, self.ids.shape[1], cached_len)
        queries: list[int] = []
        tokens: list[tuple[int, int, int]] = []
        n_labels = len(prompts[0].continuations)
        for row, (prompt, trie) in enumerate(zip(prompts, of_row, strict=True)):
            first = len(queries)
            last = row * self.ids.shape[1] + starts[row] - 1  # of the prompt's tokens
            queries += range(last, last + 1 + len(trie.ids))
            for label, (ids, nodes) in enumerate(
                zip(prompt.continuations, trie.queries, strict=True)
            ):
                cell = row * n_labels + label
                tokens += [
                    (first + 1 + node, id_, cell) for id_, node in zip(ids, nodes, strict=True)
                ]
        self.queries, self.tokens = torch.tensor(queries), torch.tensor(tokens)
        self.tries, self._shape = of_row, (len(prompts), n_labels)

    def summed(self, logits: Tensor, normalizers: Tensor) -> Tensor:
        """(K,) logits of the labels' tokens, less (M,) normalizers, to scores of labels (B, C)."""
        tokens = self.tokens.to(logits.device)
        log_probs = logits - normalizers[tokens[:, 0]]
        scores = log_probs.new_zeros(math.prod(self._shape))
        return scores.index_add(0, tokens[:, 2], log_probs).view(self._shape)


def _tree_layout(
    tries: Sequence[_Trie], starts: Sequence[int], length: int, cached_len: int
) -> tuple[Tensor, Tensor]:
    """The (B, T, T) mask and the (B, T) positions of prompts followed by trie nodes."""
    sees = torch.ones(length, length, dtype=torch.bool).tril().repeat(len(tries), 1, 1)
    positions = torch.arange(length).repeat(len(tries), 1)
    for row, (trie, start) in enumerate(zip(tries, starts, strict=True)):
        end = start + len(trie.ids)
        sees[row, start:end, start:end] = trie.sees
        positions[row, start:end] = start + torch.tensor(trie.depths, dtype=torch.long)
        # Padding needs a position in the context too, and the row's end is one.
        positions[row, end:] = start
    return sees, positions + cached_len
