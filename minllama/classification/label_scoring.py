"""Score labels as continuations of a prompt: the chain rule over tokens, in one forward pass.

The labels of a prompt share its computation. They form a trie, appended to the prompt: a token that
several labels start with is computed once, and an attention mask lets each token attend to the
prompt and its own ancestors only. A label's last token is only predicted, never computed, so labels
of one token add nothing to the cost of the prompt. `minllama.classification.zero_shot` calls it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minllama.classification.prompts import EncodedPrompt
from minllama.engine.choose import engine_for
from minllama.engine.packing import hidden_states
from minllama.model.inputs import padded
from minllama.model.kv_cache import KVCache
from minllama.model.llama import Llama
from minllama.quantization.modules import rows_of

MIN_SHARED_LEN = 16  # a shorter common beginning is not worth a cache of its own
MAX_LOGITS = 256  # rows of logits over the vocabulary at a time: 50 MB of float32 at 49,152 tokens


class SharedPrefix:
    """The shared prefix of all prompts (an instruction, few-shot examples), computed once.

    Valid for the current weights: create a new one after they change.

    Args:
        llama: the model, causal.
        ids: of the prefix; it is not kept if shorter than MIN_SHARED_LEN.
    """

    def __init__(self, llama: Llama, ids: Sequence[int]) -> None:
        worthwhile = len(ids) >= MIN_SHARED_LEN and llama.config.causal
        self.ids = tuple(ids) if worthwhile else ()
        self._llama = llama
        self._one_row: KVCache | None = None
        self._rows: KVCache | None = None

    def fits(self, prompts: Sequence[EncodedPrompt]) -> bool:
        """Whether all prompts start with it and are longer."""
        n = len(self.ids)
        return n > 0 and all(p.ids[:n] == self.ids and len(p) > n for p in prompts)

    def cache(self, batch_size: int, new_len: int) -> KVCache:
        """A cache of `batch_size` sequences with the prefix, and space for `new_len` more tokens.

        It is reused for all batches: what the last one wrote after the prefix is truncated.
        """
        n = len(self.ids)
        if self._one_row is None:
            self._one_row = self._llama.new_cache(1, n)
            ids = torch.tensor([self.ids], device=self._llama.device)
            engine_for(self._llama).forward(ids, self._one_row, logits=None)
        if self._rows is None or len(self._rows.keys[0]) < batch_size:
            capacity = max(n + new_len, 0 if self._rows is None else self._rows.capacity)
            self._rows = self._one_row.repeated(batch_size, capacity)
        self._rows.lengths = [n] * batch_size
        self._rows.grow(n + new_len)
        return self._rows

    def forget_rows(self) -> None:
        """Truncate the cache to the prefix."""
        self._rows = None


def compute_label_scores(
    llama: Llama, prompts: Sequence[EncodedPrompt], prefix: SharedPrefix | None = None
) -> Tensor:
    """Log p(label | prompt) of each label: the sum over its tokens, in nats.

    Args:
        llama: receives gradients, unless a prefix is given.
        prompts: B of them, each with the continuations of C labels.
        prefix: precomputed; used if all prompts start with it.

    Returns:
        (B, C), float32.
    """
    cached_len = len(prefix.ids) if prefix is not None and prefix.fits(prompts) else 0
    layout = _Layout(prompts, cached_len)
    device = llama.device
    cache = None
    if cached_len:
        assert prefix is not None
        cache = prefix.cache(len(prompts), layout.ids.shape[1])
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
    log_probs = chosen - normalizers[tokens[:, 0]]
    n_labels = len(prompts[0].continuations)
    scores = log_probs.new_zeros(len(prompts) * n_labels).index_add(0, tokens[:, 2], log_probs)
    return scores.view(-1, n_labels)  # (B, C)


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
    """

    def __init__(self, prompts: Sequence[EncodedPrompt], cached_len: int) -> None:
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
        starts = [len(prompt) - cached_len for prompt in prompts]  # slot of each row's first node
        if any(trie.ids for trie in of_row):
            self.mask, self.positions = _tree_view(of_row, starts, self.ids.shape[1], cached_len)
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


def _tree_view(
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
