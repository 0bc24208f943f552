"""A classifier that is small enough to be trained in a test, and texts to train it on.

Imports no transformers: processes that are killed start with it.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minllama.classification.prompts import EncodedPrompt
from minllama.data import Dataset
from minllama.model.config import LlamaConfig
from minllama.model.llama import Llama

LABELS = ("bad", "good", "so-so")
CONFIG = LlamaConfig(
    dim=16, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=24, vocab_size=61, max_seq_len=64
)


class TinyClassifier(nn.Module):
    """A head on the last token's state; the embeddings and the first layer are frozen."""

    def __init__(
        self,
        labels: Sequence[str] = LABELS,
        *,
        multi_label: bool = False,
        dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.labels, self.multi_label = tuple(labels), multi_label
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.llama = Llama(CONFIG.replace(dropout=dropout))
            self.score = nn.Linear(CONFIG.dim, len(self.labels))
        self.llama.tok_embeddings.requires_grad_(False)
        self.llama.layers[0].requires_grad_(False)
        assert self.llama.output is not None
        self.llama.output.requires_grad_(False)
        self.eval()

    def encode(self, text: str) -> EncodedPrompt:
        return EncodedPrompt(tuple(ord(character) % 61 for character in text))

    def compute_logits(self, prompts: Sequence[EncodedPrompt]) -> Tensor:
        length = max(map(len, prompts))
        ids = torch.tensor([[*p.ids, *[0] * (length - len(p))] for p in prompts])
        lengths = torch.tensor([len(p) for p in prompts])
        mask = torch.arange(length) < lengths.unsqueeze(-1)
        hidden = self.llama(ids, attention_mask=mask, logits=None).hidden
        logits: Tensor = self.score(hidden[torch.arange(len(prompts)), lengths - 1])
        return logits

    @torch.no_grad()
    def predict_proba(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.eval()
        logits = self.compute_logits([self.encode(text) for text in texts]).float()
        probabilities = logits.sigmoid() if self.multi_label else logits.softmax(-1)
        return np.asarray(probabilities.numpy(), dtype=np.float32)


def make_dataset(n: int = 22, seed: int = 0, *, multi_label: bool = False) -> Dataset:
    """Texts of 1 to 20 letters; which letters they are made of tells their classes."""
    chosen = random.Random(seed)
    texts, labels = [], []
    for _ in range(n):
        # Few of the last class, so that class weights matter.
        label = chosen.choices(range(3), weights=(5, 4, 1))[0]
        letters = ("abcdef", "ghijkl", "mnopqr")[label]
        texts.append("".join(chosen.choices(letters + "xyz", k=chosen.randint(1, 20))))
        others = tuple(i for i in range(3) if i == label or chosen.random() < 0.2)
        labels.append(others if multi_label else label)
    return Dataset(texts, labels, list(LABELS), f"texts {seed}", multi_label)  # type: ignore[arg-type]


def trained(classifier: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that are trained."""
    return {n: p.detach().clone() for n, p in classifier.named_parameters() if p.requires_grad}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are alike bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
