"""Answer questions on a state: score their options, take the prior out, compare.

A server of decisions calls it, and library users. Questions are computed after the shared tokens of
the state, alone or where company changes no bit of a value; options in the order of their values.
So neither the order of questions nor that of options nor other questions change an answer.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minllama.classification.base import Classifier, evaluated
from minllama.classification.decisions.prompts import DecisionPrompts
from minllama.classification.decisions.questions import Answer, Question
from minllama.classification.prompts import EncodedPrompt
from minllama.classification.zero_shot import CONTENT_FREE
from minllama.engine.choose import KeptEngine
from minllama.engine.scheduler import Scheduler
from minllama.engine.scoring import ScoreRequest
from minllama.errors import DataError, MinllamaError
from minllama.model.llama import Llama
from minllama.model.mode import evaluating
from minllama.tokenizer.tokenizer import Tokenizer

MAX_PRIORS = 1024  # questions whose priors are kept

Scores = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class DecisionRequest(ScoreRequest):
    """A `ScoreRequest` whose result does not depend on what else is computed."""

    @cached_property
    def group(self) -> Hashable:
        return DecisionRequest, len(self.continuations)

    @property
    def is_exact(self) -> bool:
        """It is; see `EvaluationRequest.is_exact`."""
        return True


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question's prompt, and the prompts of its prior."""

    question: Question
    prompt: EncodedPrompt
    content_free: tuple[EncodedPrompt, ...]


class DecisionPlan:
    """What has to be computed for the answers to questions on a state; made by `DecisionModel`.

    Attributes:
        requests: for a scheduler, in any order and company.
    """

    def __init__(self, model: "DecisionModel", asked: Sequence[_Asked], n_shared: int) -> None:
        self._model, self._asked = model, asked
        self.requests: list[DecisionRequest] = [
            DecisionRequest(
                ids=each.prompt.ids,
                continuations=each.prompt.continuations,
                shared_len=n_shared,
                name="a question with its state",
            )
            for each in asked
        ]
        # In order of first use. Those that are known are kept, since the model may forget them.
        priors = {each.content_free: model.prior(each.content_free) for each in asked}
        self._priors = {key: prior for key, prior in priors.items() if prior is not None}
        self._unknown = [key for key, prior in priors.items() if prior is None and key]
        for prompts in self._unknown:
            self.requests += [
                DecisionRequest(ids=p.ids, continuations=p.continuations, shared_len=n)
                for p, n in zip(prompts, model.shared_lens(prompts), strict=True)
            ]

    def answers(self, results: Sequence[Tensor]) -> list[Answer]:
        """The answers in the questions' order, from the result of each request."""
        scores = [np.asarray(result.double().cpu().numpy()) for result in results]
        start = len(self._asked)
        for prompts in self._unknown:
            some = np.stack(scores[start : start + len(prompts)])
            self._priors[prompts] = self._model.add_prior(prompts, some)
            start += len(prompts)
        return [self._answer(i, scores[i]) for i in range(len(self._asked))]

    def _answer(self, number: int, scores: Scores) -> Answer:
        asked, question = self._asked[number], self._asked[number].question
        logits = scores
        if asked.content_free:
            logits = scores - self._model.prior_strength * self._priors[asked.content_free]
        p = np.exp(_log_softmax(logits))
        p /= p.sum()
        probabilities = [0.0] * len(question.options)
        for i, value in zip(question.in_order, p.tolist(), strict=True):
            probabilities[i] = value
        return Answer(
            question,
            tuple(probabilities),
            label_mass(scores, asked.prompt.continuations),
            "label-words",
            n_tokens=len(asked.prompt),
            n_shared=len(self.requests[number].prefix),
        )


class DecisionModel:
    """A language model that answers questions by the likelihood of label words.

    The logit of an option is log p(its words | state, question), less the log of the mean
    probability that it has among the options where the state says nothing (contextual calibration,
    Zhao et al. 2021, sec. 5). Not calibrated on data: a probability is no frequency.

    One thread at a time may call `answer`; several may `plan`.

    Args:
        llama: the language model, causal.
        tokenizer: its tokenizer; with a chat template, questions are a user's message.
        prior_strength: how much of the prior is taken out; 0 for nothing.

    Raises:
        MinllamaError: the model is bidirectional, or its chat template cannot be used.
    """

    def __init__(self, llama: Llama, tokenizer: Tokenizer, *, prior_strength: float = 1.0) -> None:
        if not llama.config.causal:
            raise MinllamaError("decisions need a causal model, not a bidirectional one")
        self.llama, self.prior_strength = llama, prior_strength
        self.prompts = DecisionPrompts(tokenizer, llama.config.context_len)
        self._content_free_prompts = [self.prompts.on(state) for state in CONTENT_FREE]
        self._priors: OrderedDict[tuple[EncodedPrompt, ...], Scores] = OrderedDict()
        self._engine = KeptEngine()
        self._lock = threading.Lock()  # of the priors

    def answer(self, state: str, questions: Sequence[Question]) -> list[Answer]:
        """The answers to questions on a state, in their order.

        All prompts are encoded before one is computed, and the state's tokens are computed once.

        Raises:
            ContextError: a question and the state do not fit into the context; says both lengths.
            MinllamaError: a text cannot be encoded.
        """
        plan = self.plan(state, questions)
        results: dict[int, Tensor] = {}
        with evaluating(self.llama), torch.inference_mode():
            scheduler = Scheduler(self._engine.of(self.llama))
            for indices, some in evaluated(scheduler, plan.requests):
                results.update(zip(indices, some, strict=True))
        return plan.answers([results[i] for i in range(len(plan.requests))])

    def plan(self, state: str, questions: Sequence[Question]) -> DecisionPlan:
        """What a scheduler must compute for the answers, for one that has other work, too.

        Raises:
            MinllamaError: as `answer`.
        """
        if not isinstance(state, str):
            raise DataError("a state must be a string; `as_text` makes one of JSON")
        prompts = self.prompts.on(state)
        asked = [
            _Asked(question, prompts.encode(question), self._content_free(question))
            for question in questions
        ]
        shared = prompts.shared
        n = len(shared)
        is_shared = all(a.prompt.ids[:n] == shared and len(a.prompt) > n for a in asked)
        return DecisionPlan(self, asked, n if is_shared else 0)

    def _content_free(self, question: Question) -> tuple[EncodedPrompt, ...]:
        if not self.prior_strength:
            return ()
        return tuple(prompts.encode(question) for prompts in self._content_free_prompts)

    def shared_lens(self, content_free: tuple[EncodedPrompt, ...]) -> list[int]:
        """How many tokens each content-free prompt shares with those of other questions."""
        shared = [prompts.shared for prompts in self._content_free_prompts]
        pairs = zip(content_free, shared, strict=True)
        return [
            len(ids) if p.ids[: len(ids)] == ids and len(p) > len(ids) else 0 for p, ids in pairs
        ]

    def prior(self, content_free: tuple[EncodedPrompt, ...]) -> Scores | None:
        """Log of the options' mean probability over content-free states, (C,); None if unknown."""
        with self._lock:
            if content_free in self._priors:
                self._priors.move_to_end(content_free)
            return self._priors.get(content_free)

    def add_prior(self, content_free: tuple[EncodedPrompt, ...], scores: Scores) -> Scores:
        """Keep the `prior` of content-free prompts, whose scores are (F, C), and return it."""
        log_p = _log_softmax(scores)
        prior: Scores = np.logaddexp.reduce(log_p, axis=0) - math.log(len(log_p))
        with self._lock:
            self._priors[content_free] = prior
            while len(self._priors) > MAX_PRIORS:
                self._priors.popitem(last=False)
        return prior


def label_mass(scores: Scores, continuations: Sequence[tuple[int, ...]]) -> float:
    """How likely an answer begins with any of the options, from 0 to 1.

    What begins with `good enough` begins with `good`, and is counted once.
    """
    given = set(continuations)
    apart = [not any(ids[:end] in given for end in range(1, len(ids))) for ids in continuations]
    return min(1.0, float(np.exp(scores[np.array(apart)]).sum()))


def answer_by_classifier(classifier: Classifier, state: str, question: Question) -> Answer | None:
    """The answer of a trained classifier, if the options are among its labels; None otherwise.

    Its probabilities are those that it predicts, divided by the sum over the options. What the
    instructions ask is not read: the classifier knows one question.

    Raises:
        MinllamaError: the classifier cannot read the text.
    """
    if not fits_labels(classifier, question):
        return None
    p = classifier.predict_proba([state])[0].astype(np.float64)
    return answer_from(classifier, p, question, len(classifier.encode(state)))


def fits_labels(classifier: Classifier, question: Question) -> bool:
    """Whether a classifier can answer: all options are among its labels, of which one is right."""
    if classifier.scale is not None or classifier.multi_label or question.kind == "predicate":
        return False
    values = [option.value for option in question.options]
    return all(isinstance(value, str) and value in classifier.labels for value in values)


def answer_from(
    classifier: Classifier, p: Scores, question: Question, n_tokens: int
) -> Answer | None:
    """An answer from the probabilities of a classifier's labels, (C,), to a question that fits.

    None where none of the options is possible.
    """
    values = [option.value for option in question.options]
    some = p[[classifier.labels.index(str(value)) for value in values]]
    # Summed in an order of their own, so that the options' order changes no bit.
    mass = float(np.sort(some).sum())
    if not mass > 0:
        return None
    probabilities = tuple((some / mass).tolist())
    return Answer(question, probabilities, min(1.0, mass), "classifier", n_tokens=n_tokens)


def _log_softmax(scores: Scores) -> Scores:
    return np.asarray(scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True))
