"""Classification over a service: prompts to scores, for routes of every protocol."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from fastapi import Request
from numpy.typing import NDArray

from minllama.classification.base import Classifier, probabilities
from minllama.classification.prompts import EncodedPrompt
from minllama.classification.zero_shot import LlamaZeroShotClassifier
from minllama.evaluation.metrics import predictions
from minllama.server.jobs import Job
from minllama.server.registry import ServedModel
from minllama.server.routing import answer, partition, service_of


@dataclass(frozen=True)
class Scored:
    """What a classifier says of N texts.

    Attributes:
        classifier: that was asked.
        logits: (N, C), float32, before the temperature; those of `Classifier.predict_logits`.
        prompts: that were read.
        job: that has read them.
    """

    classifier: Classifier
    logits: NDArray[np.float32]
    prompts: Sequence[EncodedPrompt]
    job: Job

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """(N, C), after the temperature."""
        classifier = self.classifier
        return probabilities(
            self.logits, classifier.temperature, multi_label=classifier.multi_label
        )

    @property
    def values(self) -> NDArray[np.float64]:
        """(N,) numbers of a regression, in the unit of its targets."""
        assert self.classifier.scale is not None
        return self.classifier.scale.values(self.logits[:, 0])

    @property
    def chosen(self) -> list[tuple[str, ...]]:
        """The labels that are predicted of each text, by the classifier's thresholds."""
        classifier = self.classifier
        rows = predictions(
            self.probabilities,
            multi_label=classifier.multi_label,
            thresholds=classifier.decision,
        )
        return [tuple(classifier.labels[i] for i in np.flatnonzero(row)) for row in rows]

    @property
    def n_tokens(self) -> int:
        """Tokens of the prompts."""
        return sum(map(len, self.prompts))

    @property
    def n_cached(self) -> int:
        """Those of them that were not read again, since others had them too."""
        return sum(map(self.job.cached_tokens, range(len(self.prompts))))


async def score(
    request: Request, model: ServedModel, classifier: Classifier, prompts: Sequence[EncodedPrompt]
) -> Scored:
    """Let a classifier read prompts, together with what others ask of the same model.

    What a zero-shot classifier takes off as the prior is read with them.

    Args:
        request: whose client may go away.
        model: that stands below the classifier.
        classifier: a served one, or one of label words made for this request.
        prompts: at least one.

    Raises:
        RequestError: the queue is full, or the server is ending.
        MinllamaError: a prompt cannot be read.
    """
    salt, service = partition(request), service_of(request)
    standing: list[EncodedPrompt] = []
    if isinstance(classifier, LlamaZeroShotClassifier) and classifier.prior is None:
        standing = await service.in_thread(_standing, classifier)
    every = [*prompts, *standing]
    shared = classifier.shared_ids(len(every))
    requests = [
        replace(classifier.request_of(prompt, shared=shared), salt=salt) for prompt in every
    ]
    job = service.submit(model, requests)
    results = await answer(request, job, job.results())
    logits = await service.in_thread(partial(_logits, classifier, prompts, standing, results))
    return Scored(classifier, logits, prompts, job)


def _standing(classifier: LlamaZeroShotClassifier) -> list[EncodedPrompt]:
    return [classifier.template.encode(text) for text in classifier.prior_texts()]


@torch.inference_mode()
def _logits(
    classifier: Classifier,
    prompts: Sequence[EncodedPrompt],
    standing: Sequence[EncodedPrompt],
    results: Sequence[Any],
) -> NDArray[np.float32]:
    if standing:
        assert isinstance(classifier, LlamaZeroShotClassifier)
        classifier.set_prior(torch.stack(list(results[len(prompts) :])))
    logits = classifier.logits_of(prompts, results[: len(prompts)])
    return np.asarray(logits.float().cpu().numpy())


def usage_of(scored: Scored) -> dict[str, Any]:
    """What a request has cost, in OpenAI's words."""
    cached = scored.n_cached
    return {
        "prompt_tokens": scored.n_tokens,
        "total_tokens": scored.n_tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": cached} if cached else None,
    }
