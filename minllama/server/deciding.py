"""Decisions over a service: questions on a state to answers, for routes of every protocol.

The method is the library's, `minllama.classification.decisions`. Questions are computed after the
state, which all questions on it share, and those of several requests together where that changes
no bit of an answer.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from fastapi import Request

from minllama.classification.base import Classifier
from minllama.classification.decisions.decide import (
    DecisionModel,
    DecisionPlan,
    answer_from,
    fits_labels,
)
from minllama.classification.decisions.questions import Answer, Question
from minllama.errors import ContextError
from minllama.generation.api import check_can_fit
from minllama.server.classifying import score
from minllama.server.errors import TOO_LONG, RequestError
from minllama.server.inputs import ALL, Reading, encode_inputs
from minllama.server.registry import ServedModel
from minllama.server.routing import answer, partition, service_of

MOST_OWNERS = 64  # of whose questions a model keeps the priors

_lock = threading.Lock()  # of the models' deciders


@dataclass(frozen=True)
class Decided:
    """Answers to questions on one state.

    Attributes:
        answers: to each question; or the reason why there is none.
        n_tokens: that were to be read: the state once, and what each question has beyond it.
        n_cached: those of them that had been read before.
        n_shared: of the state.
        calibration: of the probabilities; see `minllama.server.calibration`.
    """

    answers: list[Answer | str]
    n_tokens: int
    n_cached: int
    n_shared: int
    calibration: Mapping[str, Any]

    def said_of(self, found: Answer) -> dict[str, Any]:
        """What protocols have no names for."""
        return {
            "x_method": found.method,
            "x_label_mass": found.label_mass,
            "x_calibration": self.calibration,
        }


async def decide(
    request: Request,
    model: ServedModel,
    state: str,
    questions: Sequence[Question],
    cache_key: str = "",
) -> Decided:
    """Answer questions on a state, by a classifier's head or by label words.

    Args:
        request: whose client may go away.
        model: that was named.
        state: what the questions are about.
        questions: in order.
        cache_key: only requests with the same one share what was read.

    Raises:
        RequestError: none of the questions can be answered.
        MinllamaError: the state or a question cannot be read.
    """
    if model.classifier is not None:
        return await _by_classifier(request, model, model.classifier, state, questions)
    salt = f"{partition(request)}/decisions/{cache_key}"
    service = service_of(request)
    plan, refused = await service.in_thread(_plan, model, salt, state, questions)
    requests = [replace(each, salt=salt) for each in plan.requests]
    job = service.submit(model, requests)
    results = await answer(request, job, job.results())
    answered: list[Answer] = await service.in_thread(plan.answers, results)
    n_own = sum(found.n_tokens - found.n_shared for found in answered)
    n_shared = max(found.n_shared for found in answered)
    n_cached = min(job.cached_tokens(number) for number in range(len(answered)))
    waiting = iter(answered)
    return Decided(
        [refused.get(i) or next(waiting) for i in range(len(questions))],
        n_shared + n_own,
        n_cached,
        n_shared,
        {"is_calibrated": False, "n_texts": None, "ece": None},
    )


def _plan(
    model: ServedModel, salt: str, state: str, questions: Sequence[Question]
) -> tuple[DecisionPlan, dict[int, str]]:
    """What to compute, and why there is no answer to some questions, by their numbers."""
    check_can_fit(state, model.tokenizer, model.context_len)
    decider = _decider(model, salt)
    with torch.inference_mode():
        try:
            return decider.plan(state, questions), {}
        except ContextError:
            refused: dict[int, str] = {}
            kept, prompts = [], decider.prompts.on(state)
            for number, question in enumerate(questions):
                try:
                    prompts.encode(question)
                    kept.append(question)
                except ContextError as error:
                    refused[number] = str(error)
            if not kept:
                raise RequestError(refused[0], code=TOO_LONG, param="input") from None
            return decider.plan(state, kept), refused


def _decider(model: ServedModel, salt: str) -> DecisionModel:
    """A model's, with priors of questions that others cannot find out."""
    of_model = model.deciders
    with _lock:
        if salt not in of_model:
            of_model[salt] = DecisionModel(model.llama, model.tokenizer)
        of_model.move_to_end(salt)
        while len(of_model) > MOST_OWNERS:
            of_model.popitem(last=False)
        return of_model[salt]


async def _by_classifier(
    request: Request,
    model: ServedModel,
    classifier: Classifier,
    state: str,
    questions: Sequence[Question],
) -> Decided:
    """One reading of the state, for all questions whose options are the classifier's labels."""
    why = (
        f"{model.id} is a classifier, which answers choices and scores among its labels: "
        f"{', '.join(classifier.labels)}"
    )
    fitting = [fits_labels(classifier, question) for question in questions]
    if not any(fitting):
        raise RequestError(f"{why}; name a language model for other questions", param="questions")
    most = None if classifier.prompt.max_len is None else ALL
    reading = Reading(
        classifier.template, most, undo_treebank=classifier.prompt.undo_treebank, param="input"
    )
    prompts = await encode_inputs(service_of(request), model, [state], reading)
    scored = await score(request, model, classifier, prompts)
    p = scored.probabilities[0].astype("float64")
    answers: list[Answer | str] = []
    for question, fits in zip(questions, fitting, strict=True):
        found = answer_from(classifier, p, question, len(prompts[0])) if fits else None
        answers.append(why if found is None else found)
    n_tokens = scored.n_tokens
    calibration = model.calibration or {}
    return Decided(answers, n_tokens, scored.n_cached, n_tokens, calibration)
