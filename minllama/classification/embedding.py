"""Classify with a linear head on a text's hidden states; also regression."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minllama.classification.base import Classifier, as_prompt, checked_labels, make_template
from minllama.classification.prompts import EncodedPrompt
from minllama.engine.frozen_states import FrozenStates
from minllama.engine.states import Pooling, StatesRequest, pooled_states
from minllama.errors import MinllamaError
from minllama.evaluation.regression import TargetScale
from minllama.model.attention_layout import check_inputs, last_tokens
from minllama.model.inputs import padded
from minllama.model.llama import Llama
from minllama.options import POOLINGS, PromptOptions
from minllama.tokenizer.tokenizer import Tokenizer


class LlamaEmbeddingClassifier(Classifier):
    """A linear head over one vector of each text.

    The vector is the hidden state of the text's last token, or a mean over its tokens, after the
    last layer or an earlier one, whose states are often more informative. Hidden states are
    normalized first: by the model's own norm after the last layer, by their root mean square after
    others.

    Args:
        llama: causal or bidirectional.
        tokenizer: its tokenizer.
        id2label: names of the C classes, by number or in order.
        pooling: `last` token, `mean` of all tokens, or `weighted-mean`, in which a token at
            position t weighs t (Muennighoff 2022, eq. 2).
        layer: number of layers to run, 1 to n_layers; None for all.
        dropout: probability of dropping an element of the vector in training.
        multi_label: a text may have any number of classes.
        bias: the head has one.
        prompt: a template with `{text}`, or prompt options; None for the plain text.
        scale: of the output of a regression head; None for classes.
        pad_id: the pooling `last` skips tokens with this id at the end of a text, as transformers
            does with `pad_token_id`; None for none.
        tokenizer_eos: add EOS if the tokenizer does by default; otherwise no EOS.

    Attributes:
        score: the head, Linear(D, C) in float32; initialized with Normal(0, 0.02) and zero.
        frozen_states: of texts to train on, from which `compute_logits` goes on; None to begin with
            the embeddings.

    Raises:
        MinllamaError: labels, pooling or layer cannot be.
    """

    def __init__(
        self,
        llama: Llama,
        tokenizer: Tokenizer,
        id2label: Mapping[int, str] | Sequence[str],
        pooling: Pooling = "last",
        *,
        layer: int | None = None,
        dropout: float = 0.0,
        multi_label: bool = False,
        bias: bool = False,
        prompt: str | PromptOptions | None = None,
        scale: TargetScale | None = None,
        pad_id: int | None = None,
        tokenizer_eos: bool = False,
    ) -> None:
        if pooling not in POOLINGS:
            raise MinllamaError(f"pooling must be one of {', '.join(POOLINGS)}, not {pooling!r}")
        options = as_prompt(prompt, "{text}", tokenizer)
        labels = _names(id2label)
        if scale is not None and (multi_label or len(labels) != 1):
            raise MinllamaError("a regression head has one output, with one name")
        frame = make_template(
            *(options, llama, tokenizer),
            names=checked_labels(labels),
            eos=None if tokenizer_eos else False,
        )
        super().__init__(
            llama,
            tokenizer,
            labels,
            multi_label=multi_label,
            template=frame,
            prompt=options,
        )
        self.scale, self.pad_id, self.tokenizer_eos = scale, pad_id, tokenizer_eos
        self.layer = check_layer(llama, layer)
        self.pooling: Pooling = pooling
        self.frozen_states: FrozenStates | None = None
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(llama.config.dim, len(self.labels), bias=bias, device=llama.device)
        nn.init.normal_(self.score.weight, std=0.02)
        if bias:
            nn.init.zeros_(self.score.bias)

    @property
    def n_layers(self) -> int:
        return self.layer

    @property
    def reads_output(self) -> bool:
        return False

    @property
    def unlike_transformers(self) -> str | None:
        """Why transformers' LlamaForSequenceClassification computes other logits for the same ids.

        None if it computes the same, before the temperature.
        """
        if reason := unlike_transformers(self.llama, self.layer, self.pooling):
            return reason
        if self.scale not in (None, TargetScale()):
            return "its targets were standardized, which adds a bias"
        has_bias = self.score.bias is not None and bool(self.score.bias.any())
        return "its head has a bias" if has_bias else None

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.labels))

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Log-probabilities of the classes.

        Args:
            ids: (B, T).
            attention_mask: (B, T), true at real tokens, padding on either side; None if all are
                real.

        Returns:
            (B, C), float32: log-softmax, or log-sigmoid where `multi_label`; (B, 1), values, where
            a regression.
        """
        logits = self._head(self.compute_embeddings(ids, attention_mask))
        if self.scale is not None:
            return self.scale.mean + self.scale.std * logits
        return F.logsigmoid(logits) if self.multi_label else F.log_softmax(logits, dim=-1)

    def compute_logits(self, prompts: Sequence[EncodedPrompt]) -> Tensor:
        """(B, C), float32; see `Classifier.compute_logits`."""
        texts = [prompt.ids for prompt in prompts]
        start = None if self.frozen_states is None else self.frozen_states.start(texts)
        ids, mask = padded(texts)
        device = self.llama.device
        mask = None if mask is None else mask.to(device)
        return self._head(self.compute_embeddings(ids.to(device), mask, start=start))

    def request_of(self, prompt: EncodedPrompt, *, shared: tuple[int, ...] = ()) -> StatesRequest:
        """See `Classifier.request_of`."""
        return StatesRequest(
            ids=prompt.ids, choices=((self.layer, self.pooling),), last=self._last(prompt.ids)
        )

    def logits_of(
        self, prompts: Sequence[EncodedPrompt], results: Sequence[list[Tensor]]
    ) -> Tensor:
        """(B, C), float32; see `Classifier.logits_of`."""
        return self._head(torch.stack([vector for (vector,) in results]))

    def _last(self, ids: Sequence[int]) -> int:
        """Index of the token that the pooling `last` takes; see `_read_by_head`."""
        read = [place for place, token_id in enumerate(ids) if token_id != self.pad_id]
        return read[-1] if read else 0

    def compute_embeddings(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        start: tuple[int, Tensor] | None = None,
    ) -> Tensor:
        """The vector of each text, before dropout and head: (B, T) -> (B, D), float32.

        Args:
            ids, attention_mask: as for `forward`.
            start: a number of layers and the states (B, T, D) after them, from which to go on.

        Raises:
            MinllamaError: a sequence has no real token.
        """
        check_inputs(ids, attention_mask, self.llama.config.vocab_size)
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise MinllamaError("a head needs an attention_mask of shape (B, T)")
            attention_mask = attention_mask.bool()
            if not attention_mask.any(-1).all():
                raise MinllamaError("attention_mask has a sequence without tokens to classify")
        at = None
        if self.pooling == "last":
            at = last_tokens(ids, _read_by_head(ids, attention_mask, self.pad_id))
        return pooled_states(
            self.llama, ids, attention_mask, self.layer, self.pooling, at=at, start=start
        )

    def _head(self, embeddings: Tensor) -> Tensor:
        # After `.to(bfloat16)`, too, embeddings are float32.
        logits: Tensor = self.score(self.dropout(embeddings).to(self.score.weight.dtype))
        return logits.float()


def _read_by_head(ids: Tensor, mask: Tensor | None, pad_id: int | None) -> Tensor | None:
    """Which tokens the pooling `last` chooses among: real ones that are not `pad_id`.

    In a text of only such tokens, the first one, as in transformers. None for all.
    """
    if pad_id is None:
        return mask
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    chosen = real & (ids != pad_id)
    first = real & (real.cumsum(-1) == 1)
    return torch.where(chosen.any(-1, keepdim=True), chosen, first)


def unlike_transformers(llama: Llama, layer: int, pooling: Pooling) -> str | None:
    """Why transformers' LlamaForSequenceClassification pools differently; None if it does not.

    Its head is on the last token after all layers, and has no bias.
    """
    if pooling != "last":
        return f"its pooling is {pooling}"
    if layer != llama.config.n_layers:
        return f"it runs {layer} of {llama.config.n_layers} layers"
    return None if llama.config.causal else "its attention is bidirectional"


def check_layer(llama: Llama, layer: int | None) -> int:
    """Check the number of layers to run; None means all."""
    n_layers = llama.config.n_layers
    if layer is None:
        return n_layers
    if not 1 <= layer <= n_layers:
        raise MinllamaError(f"layer must be 1 to {n_layers}, the model's layers, not {layer}")
    return layer


def _names(id2label: Mapping[int, str] | Sequence[str]) -> Sequence[str]:
    if not isinstance(id2label, Mapping):
        return id2label
    if sorted(id2label) != list(range(len(id2label))):
        raise MinllamaError(
            f"id2label must name the classes 0 to {len(id2label) - 1}, not {sorted(id2label)}"
        )
    return [id2label[i] for i in range(len(id2label))]
