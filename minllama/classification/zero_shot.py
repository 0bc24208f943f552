"""Classify by label words: how likely is each label as continuation of the prompt?

Without training it is a zero-shot classifier; its scores are logits, so prompt-based fine-tuning
trains it as well (Schick & Schuetze 2021; Gao et al. 2021).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from minllama.classification.base import Classifier, as_prompt, checked_labels, make_template
from minllama.classification.prompts import EncodedPrompt
from minllama.data.texts import checked_texts
from minllama.engine.scoring import ScoreRequest, compute_label_scores
from minllama.errors import MinllamaError
from minllama.model.llama import Llama
from minllama.options import CORRECTED, SCORES, PromptOptions
from minllama.tokenizer.tokenizer import Tokenizer

Score = Literal["sum", "token-mean", "byte-mean", "pmi", "contextual", "batch"]
DEFAULT_PROMPT = "Text: {text}\nCategory:"
CONTENT_FREE = ("N/A", "[MASK]", "")  # the three of Zhao et al. 2021, sec. 5


class LlamaZeroShotClassifier(Classifier):
    """log p(label | prompt), summed over all tokens of each label, and corrected as `score` says.

    - `sum`: as it is. Labels of more tokens tend to be less likely, and one that begins with
      another's tokens always is: `good enough` never wins against `good`.
    - `token-mean`, `byte-mean`: divided by the label's tokens, or by its bytes in UTF-8.
    - `pmi`: less log p(label | the prompt without a text), the domain-conditional pointwise mutual
      information (Holtzman et al. 2021, eq. 3).
    - `contextual`: less the log of the labels' mean probability for texts without content
      (contextual calibration, Zhao et al. 2021, sec. 5).
    - `batch`: less the log of their mean probability over unlabeled texts of the task, given to
      `fit_prior` (batch calibration, Zhou et al. 2023, sec. 3.2).

    The last three take off `prior_strength` times that much (the gamma of Zhou et al. 2023, sec.
    3.3): 1 makes all labels equally likely on the whole, 0 leaves the score as it is.

    What prompts begin with is kept from call to call, so one thread at a time may predict.

    Args:
        llama: the language model.
        tokenizer: its tokenizer.
        labels: C names of classes.
        prompt: a template with `{text}` (and perhaps `{labels}`), or all options of a prompt.
        label_words: C strings that stand for the labels in the prompt; None for the names.
        score: one of those above.
        prior_strength: of the correction, for the last three.
        shots: pairs of a text and its label's word, shown before each text.

    Attributes:
        prior: (C,) float32, what `pmi`, `contextual` and `batch` take off at strength 1; None
            before it is known.

    Raises:
        MinllamaError: labels, words or prompt cannot be used together, or the score is unknown.
    """

    def __init__(
        self,
        llama: Llama,
        tokenizer: Tokenizer,
        labels: Sequence[str],
        prompt: str | PromptOptions | None = None,
        *,
        label_words: Sequence[str] | None = None,
        score: Score = "sum",
        prior_strength: float = 1.0,
        shots: Sequence[tuple[str, str]] = (),
    ) -> None:
        if not llama.config.causal:
            raise MinllamaError(
                "a zero-shot classifier needs a causal model, not a bidirectional one"
            )
        if score not in SCORES:
            raise MinllamaError(f"score must be one of {', '.join(SCORES)}, not {score!r}")
        labels = checked_labels(labels)
        self_words = checked_labels(labels if label_words is None else label_words)
        if len(self_words) != len(labels):
            raise MinllamaError(
                f"{len(labels)} labels ({', '.join(labels)}) need as many label words, "
                f"not {len(self_words)} ({', '.join(self_words)})"
            )
        options = as_prompt(prompt, DEFAULT_PROMPT, tokenizer)
        template = make_template(options, llama, tokenizer, labels=self_words, shots=shots)
        super().__init__(
            llama, tokenizer, labels, multi_label=False, template=template, prompt=options
        )
        self.label_words = self_words
        self.score: Score = score
        self.prior_strength = prior_strength
        self.shots = tuple(shots)
        self.prior: Tensor | None = None

    @property
    def n_layers(self) -> int:
        return self.llama.config.n_layers

    def compute_logits(self, prompts: Sequence[EncodedPrompt]) -> Tensor:
        """(B, C) float32: the corrected scores; see `Classifier.compute_logits`.

        Raises:
            MinllamaError: the score is `batch` and `fit_prior` has not been called.
        """
        requests = [self.request_of(prompt) for prompt in prompts]
        return self.logits_of(prompts, compute_label_scores(self.llama, requests))

    def request_of(self, prompt: EncodedPrompt, *, shared: tuple[int, ...] = ()) -> ScoreRequest:
        """See `Classifier.request_of`."""
        n = len(shared)
        is_shared = n < len(prompt) and prompt.ids[:n] == shared
        return ScoreRequest(
            ids=prompt.ids,
            continuations=prompt.continuations,
            shared_len=n if is_shared else 0,
        )

    def logits_of(
        self, prompts: Sequence[EncodedPrompt], results: Sequence[Tensor] | Tensor
    ) -> Tensor:
        """(B, C) float32: label scores, per token or byte if `score` says so, and corrected.

        Raises:
            MinllamaError: as `compute_logits`.
        """
        scores = results if isinstance(results, Tensor) else torch.stack(list(results))
        if self.score == "token-mean":
            lengths = [[len(ids) for ids in prompt.continuations] for prompt in prompts]
            scores = scores / torch.tensor(lengths, device=scores.device)
        elif self.score == "byte-mean":
            n_bytes = [len(word.encode()) for word in self.label_words]
            scores = scores / torch.tensor(n_bytes, device=scores.device)
        if self.score not in CORRECTED:
            return scores
        if self.prior is None:
            self.fit_prior()
        assert self.prior is not None
        return scores - self.prior_strength * self.prior.to(scores.device)

    @property
    def score_name(self) -> str:
        """The score, with the strength of its correction where that is not 1."""
        is_partial = self.score in CORRECTED and self.prior_strength != 1
        return f"{self.score} (strength {self.prior_strength:g})" if is_partial else self.score

    def fit_prior(self, texts: Sequence[str] = ()) -> None:
        """Find what the score takes off; done at need, but for `batch`, which needs texts.

        Args:
            texts: of the task, without labels, for `batch`: some hundred are plenty.

        Raises:
            MinllamaError: there are none, or one is no string.
        """
        texts = checked_texts(texts)
        if self.score not in CORRECTED:
            return
        standing = self.prior_texts(texts)
        prior, self.prior = self.prior, torch.zeros(len(self.labels))
        try:
            scores = torch.from_numpy(self.predict_logits(standing))  # (texts, C), not corrected
        except BaseException:
            self.prior = prior
            raise
        self.set_prior(scores)

    def prior_texts(self, texts: Sequence[str] = ()) -> tuple[str, ...]:
        """The texts whose scores tell what the score takes off; none where it takes off nothing.

        Raises:
            MinllamaError: as `fit_prior`.
        """
        texts = checked_texts(texts)
        if self.score == "batch" and not texts:
            raise MinllamaError(
                "the score 'batch' needs texts of the task to estimate the label prior; call "
                "fit_prior(texts), or choose another score"
            )
        if self.score in ("pmi", "contextual") and not self.template.encode("").ids:
            raise MinllamaError(
                f"the score {self.score!r} needs a prompt with words around the text, not "
                f"{self.prompt.prompt!r}; add some, or choose another score"
            )
        of_score = {"pmi": ("",), "contextual": CONTENT_FREE, "batch": tuple(texts)}
        return of_score.get(self.score, ())

    def set_prior(self, scores: Tensor) -> None:
        """Take off what the label scores of the `prior_texts` say, (texts, C)."""
        if self.score == "pmi":
            self.prior = scores[0]
        else:
            # The log of the mean probability: float32 has none below e^-104, and its log no end.
            log_probabilities = scores.log_softmax(-1)
            self.prior = log_probabilities.logsumexp(0) - math.log(len(log_probabilities))

    def shared_ids(self, n_texts: int) -> tuple[int, ...]:
        """See `Classifier.shared_ids`."""
        # The last id may depend on how the text begins.
        return self.template.encode_constant()[:-1] if n_texts > 1 else ()

    def _prepare(self, n_texts: int) -> tuple[int, ...]:
        if self.score in CORRECTED and self.prior is None:
            self.fit_prior()
        return self.shared_ids(n_texts)
