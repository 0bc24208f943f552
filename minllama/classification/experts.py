"""Classify with a product of frozen experts: linear heads on several layers, and TF-IDF.

Their logits are added, so all heads are one linear layer over the vectors of all layers and
poolings side by side. `minllama.classification.frozen` fits it.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minllama.classification.base import Classifier, as_prompt, checked_labels, make_template
from minllama.classification.beside_base import BesideBaseRequest, pooled_beside_base
from minllama.classification.embedding import check_layer
from minllama.classification.prompts import EncodedPrompt
from minllama.engine.packing import layer_states
from minllama.engine.states import Choice, StatesRequest, pooled_layers
from minllama.errors import MinllamaError
from minllama.evaluation.tfidf import TfidfModel
from minllama.model.inputs import padded
from minllama.model.llama import Llama
from minllama.options import POOLINGS, PromptOptions
from minllama.tokenizer.tokenizer import Tokenizer


class LlamaExpertsClassifier(Classifier):
    """Linear heads over vectors of several layers and poolings, and over TF-IDF of the text.

    Beside adapters that changed the lower layers, heads may also read the base without them, which
    takes a second forward pass.

    Args:
        llama: causal or bidirectional.
        tokenizer: its tokenizer.
        labels: names of the C classes.
        choices: pairs of a number of layers and a pooling; layers above the deepest never run.
            Without any, TF-IDF decides alone.
        base_choices: the same, read with the adapters disabled, beside `choices`; K pairs in all.
        tfidf: its logits are added; None for none.
        prompt: a template with `{text}`, or prompt options; None for the plain text. TF-IDF reads
            the text that is in the prompt, without the prompt.

    Attributes:
        score: the heads, Linear(K D, C) in float32, first those on the base; zero until they are
            fitted.

    Raises:
        MinllamaError: labels or choices cannot be.
    """

    def __init__(
        self,
        llama: Llama,
        tokenizer: Tokenizer,
        labels: Sequence[str],
        choices: Sequence[Choice],
        *,
        base_choices: Sequence[Choice] = (),
        tfidf: TfidfModel | None = None,
        prompt: str | PromptOptions | None = None,
    ) -> None:
        options = as_prompt(prompt, "{text}", tokenizer)
        labels = checked_labels(labels)
        super().__init__(
            llama,
            tokenizer,
            labels,
            multi_label=False,
            template=make_template(options, llama, tokenizer, names=labels),
            prompt=options,
        )
        self.choices = checked_choices(llama, choices)
        self.base_choices = checked_choices(llama, base_choices)
        if self.base_choices and not self.choices:
            raise MinllamaError("base_choices are for heads beside those on adapters: give choices")
        self.tfidf = tfidf
        n_vectors = len(self.choices) + len(self.base_choices)
        width = max(1, n_vectors) * llama.config.dim
        self.score = nn.Linear(width, len(self.labels), device=llama.device)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    @property
    def reads_words(self) -> bool:
        """See `Classifier.reads_words`."""
        return self.tfidf is not None

    @property
    def n_layers(self) -> int:
        return max(layer for layer, _ in (*self.base_choices, *self._read))

    @property
    def _read(self) -> tuple[Choice, ...]:
        """What is read; where TF-IDF decides alone, embeddings, which cost nothing."""
        return self.choices or ((0, "mean"),)

    def compute_logits(self, prompts: Sequence[EncodedPrompt]) -> Tensor:
        """(B, C), float32; see `Classifier.compute_logits`."""
        ids, mask = padded([prompt.ids for prompt in prompts])
        device = self.llama.device
        ids, mask = ids.to(device), None if mask is None else mask.to(device)
        if self.base_choices:
            choices = self.base_choices, self._read
            of_base, own = pooled_beside_base(self.llama, ids, mask, *choices)
            return self._logits(prompts, torch.cat([*of_base, *own], -1))
        states = enumerate(layer_states(self.llama, ids, attention_mask=mask))
        vectors = pooled_layers(self.llama, states, mask, self._read)
        return self._logits(prompts, torch.cat(vectors, -1))

    def request_of(self, prompt: EncodedPrompt, *, shared: tuple[int, ...] = ()) -> StatesRequest:
        """See `Classifier.request_of`."""
        if self.base_choices:
            return BesideBaseRequest(
                ids=prompt.ids, choices=self._read, base_choices=self.base_choices
            )
        return StatesRequest(ids=prompt.ids, choices=self._read)

    def logits_of(
        self, prompts: Sequence[EncodedPrompt], results: Sequence[list[Tensor]]
    ) -> Tensor:
        """(B, C), float32; see `Classifier.logits_of`."""
        return self._logits(prompts, torch.stack([torch.cat(vectors) for vectors in results]))

    def _logits(self, prompts: Sequence[EncodedPrompt], vectors: Tensor) -> Tensor:
        weight, bias = self.score.weight, self.score.bias
        logits = F.linear(vectors, weight.float(), bias.float())  # after `.to(bfloat16)`, too
        if self.tfidf is None:
            return logits
        texts = [prompt.text for prompt in prompts if prompt.text is not None]
        if len(texts) < len(prompts):
            raise MinllamaError("this classifier reads words beside the model: give texts, not ids")
        return logits + torch.from_numpy(self.tfidf.logits(texts)).to(logits.device)


def checked_choices(llama: Llama, choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Check pairs of a number of layers and a pooling.

    Raises:
        MinllamaError: one is given twice, or there is no such layer or pooling.
    """
    for layer, pooling in choices:
        check_layer(llama, layer)
        if pooling not in POOLINGS:
            raise MinllamaError(f"pooling must be one of {', '.join(POOLINGS)}, not {pooling!r}")
    if len(set(choices)) < len(choices):
        raise MinllamaError("a layer with its pooling is given twice; give each once")
    return tuple((layer, pooling) for layer, pooling in choices)


def scaled(model: TfidfModel, factor: float) -> TfidfModel:
    """A TF-IDF model with logits that are `factor` times as large, rounded as on disk."""
    weight = (model.weight * factor).astype(np.float16).astype(np.float32)
    return replace(model, weight=weight, bias=(model.bias * factor).astype(np.float32))
