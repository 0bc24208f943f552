"""What the rungs of `--method auto` have in common: their data, and the result of one."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from minllama.classification.base import Classifier, evaluated
from minllama.classification.embedding import LlamaEmbeddingClassifier
from minllama.classification.features import FOLDS, MAX_ROWS, Features, stratified_folds
from minllama.data import Dataset
from minllama.data.task import Task
from minllama.engine.states import StatesRequest
from minllama.evaluation.baselines import MOST_TEXTS, SECONDS_A_TEXT
from minllama.evaluation.tfidf import Logits
from minllama.experiment.experiment import Experiment
from minllama.experiment.frozen import reads_experts
from minllama.experiment.heads import Selected, head_fitting, random_order
from minllama.experiment.ladder.budget import REPORT_SECONDS, Budget
from minllama.experiment.ladder.scoring import Scores, Scoring
from minllama.experiment.reporter import Reporter
from minllama.experiment.splits import Splits
from minllama.model.llama import Llama
from minllama.tokenizer.tokenizer import Tokenizer

SAMPLE = 500  # texts whose mean length stands for a split's
MOST_TIMED = 512  # texts that are read to measure a rate; fewer if they take
ENOUGH_SECONDS = 2.0
LEAST_TIMED = 2  # batches, since one may be disturbed
# Of a first batch; fewer at once are slower, above all on a busy machine.
FIRST_BATCH, FIRST_TOKENS = 32, 1024
WARM_UP = 2  # texts that are read before


@dataclass
class Measured:
    """The result of a rung.

    Attributes:
        scores: (R, C) of the rows of train, then dev, by classifiers that were not fitted to the
            row; NaN where not measured.
        how: in a few words, how the scores came about.
        seconds: that it took.
        texts_per_second: of its classifier, here.
        classifier: None where it cannot be saved, or is not worth finishing; the first note says
            why.
        size: bytes of its files, beside the base model's; None until saved.
        seconds_to_refit: about how long it takes to fit its classifier to held-out rows, too; None
            where that is not done, since it would be trained for minutes.
        notes: for the report.
    """

    scores: Scores
    how: str
    seconds: float
    texts_per_second: float | None
    classifier: Classifier | None
    size: int | None = None
    seconds_to_refit: float | None = None
    notes: list[str] = field(default_factory=list)


class NotThisTime(Exception):  # it is no error
    """A rung gives no result; the message says why.

    Args:
        reason: in a phrase.
        was_begun: it was given up, not skipped.
    """

    def __init__(self, reason: str, *, was_begun: bool = False) -> None:
        super().__init__(reason)
        self.was_begun = was_begun


class Rung(Protocol):
    """One way to get a classifier.

    Attributes:
        name: of its files.
        title: for display.
    """

    name: str
    title: str

    def obstacle(self) -> str | None:
        """Why it cannot be done with these data; None if it can."""

    def estimate(self) -> float:
        """The fewest seconds that it takes, as far as first batches tell."""

    def plan(self) -> str:
        """How long it takes, for people."""

    def run(self) -> Measured:
        """Fit and measure it.

        Raises:
            NotThisTime: the time was up, or it is not worth finishing.
        """


@dataclass
class Context:
    """What rungs share.

    Attributes:
        experiment, splits, llama, tokenizer, reporter: of the run.
        budget: its time.
        folder: where rungs keep what a resumed run needs.
        settings: of the run, by which a checkpoint is known to be of the same.
        scoring: compares rungs.
        starting: layer, pooling and penalty of the best single head; None before it is known.
        features: of some training texts, for heads that training starts from.
        feature_rows: the rows of the training split that they are of.
        words: logits (N, C) of the training texts by TF-IDF that was not fitted to them, for each
            penalty, NaN where they are not compared; None before they are known.
        results: of earlier rungs, by name.
    """

    experiment: Experiment
    splits: Splits
    llama: Llama
    tokenizer: Tokenizer
    reporter: Reporter
    budget: Budget
    folder: Path
    settings: dict[str, Any]
    scoring: Scoring
    starting: Selected | None = None
    features: Features = field(default_factory=dict)
    feature_rows: Sequence[int] = ()
    words: Mapping[float, Logits] | None = None
    results: dict[str, Measured] = field(default_factory=dict)

    @property
    def train(self) -> Dataset:
        return self.splits.train

    @property
    def seed(self) -> int:
        return self.experiment.training.seed

    @cached_property
    def task(self) -> Task:
        """Of classes."""
        balanced = self.experiment.training.class_weights == "balanced"
        return Task.of(self.train, balanced=balanced, seed=self.seed)

    @cached_property
    def folds(self) -> list[NDArray[np.int64]]:
        """The training rows in stratified folds, the same for all rungs; of numbers random ones."""
        if self.train.has_numbers:
            order = np.asarray(random_order(self.train, self.seed))
            return [np.sort(part) for part in np.array_split(order, FOLDS)]
        assert self.train.labels is not None
        return stratified_folds(self.task.target(self.train.labels), self.seed)

    @cached_property
    def compared_rows(self) -> NDArray[np.int64]:
        """The training rows of a cross-validation of words: all, or of very many some."""
        n = len(self.train)
        if n <= MAX_ROWS or self.train.has_numbers:
            return np.arange(n)
        return self.some_rows(MAX_ROWS // 2)

    def some_rows(self, n: int) -> NDArray[np.int64]:
        """About `n` training rows, drawn at random, with some of each class."""
        if self.train.has_numbers:
            return np.sort(np.asarray(random_order(self.train, self.seed)[:n]))
        balanced = self.experiment.training.class_weights == "balanced"
        fitting = head_fitting(self.train, balanced=balanced, seed=self.seed)
        return np.asarray(fitting.some_rows(n))

    @property
    def reads_experts(self) -> bool:
        """Whether its frozen classifier reads several layers, and words beside them."""
        options = replace(self.experiment.classifier, method="frozen")
        return reads_experts(self.train, options)

    @property
    def n_outputs(self) -> int:
        return 1 if self.train.has_numbers else len(self.train.label_names)

    def empty_scores(self) -> Scores:
        """(R, C) NaN."""
        n_rows = len(self.train) + len(self.splits.dev)
        return np.full((n_rows, self.n_outputs), np.nan, dtype=np.float32)

    @property
    def dev_rows(self) -> slice:
        """The rows of dev among all."""
        return slice(len(self.train), None)

    def measure_dev(self, classifier: Classifier, scores: Scores) -> float:
        """Put the scores of dev into their rows, calibrated; returns texts per second."""
        texts = self.splits.dev.texts
        began = self.budget.clock()
        scores[self.dev_rows] = classifier.predict_logits(texts) / classifier.temperature
        return len(texts) / max(self.budget.clock() - began, 1e-6)

    @cached_property
    def reader(self) -> LlamaEmbeddingClassifier:
        """Encodes texts in the prompt; its head and layer do not matter."""
        outputs = self.train.label_names or ["value"]
        return LlamaEmbeddingClassifier(
            self.llama, self.tokenizer, outputs, prompt=self.experiment.prompt
        )

    def n_tokens(self, split: Dataset | None) -> float:
        """About how many tokens all texts of a split have."""
        if split is None or not len(split):
            return 0.0
        rows = random_order(split, self.seed)[:SAMPLE]
        lengths = [len(self.reader.encode(split.texts[row])) for row in rows]
        return sum(lengths) / len(lengths) * len(split)

    def learn_rate(self, tokens: float, seconds: float) -> None:
        """Believe what many texts took, more than first batches."""
        self.seconds_per_token = seconds / max(tokens, 1)
        self.keep_time_for_report()

    @cached_property
    def seconds_per_token(self) -> float:
        """To read texts through all layers, measured on some of them."""
        rows = random_order(self.train, self.seed)
        n_layers = self.llama.config.n_layers
        requests = [
            StatesRequest(ids=prompt.ids, choices=((n_layers, "mean"),))
            for prompt in (self.reader.encode(self.train.texts[row]) for row in rows[:MOST_TIMED])
        ]
        with self.reader.steady() as scheduler, torch.inference_mode():
            list(evaluated(scheduler, requests[:WARM_UP]))

            def read(start: int, end: int) -> int:
                list(evaluated(scheduler, requests[start:end]))
                return sum(request.length for request in requests[start:end])

            mean = sum(request.length for request in requests) / len(requests)
            first = max(FIRST_BATCH, math.ceil(FIRST_TOKENS / mean))
            return seconds_each(read, len(requests), self.budget.clock, first)

    @cached_property
    def _tokens_to_report(self) -> float:
        """About how many the texts of dev and test have."""
        return self.n_tokens(self.splits.dev) + self.n_tokens(self.splits.test)

    def keep_time_for_report(self) -> None:
        """Reserve the time of the report's predictions and baselines, and of a last fit."""
        tokens = self._tokens_to_report
        of_baselines = min(len(self.train), MOST_TEXTS) * SECONDS_A_TEXT
        self.budget.reserve = REPORT_SECONDS + of_baselines + tokens * self.seconds_per_token
        if self.splits.whole is not None:
            self.budget.reserve += sum(r.seconds_to_refit or 0 for r in self.results.values())


def seconds_each(
    work: Callable[[int, int], float], n: int, clock: Callable[[], float], first: int = FIRST_BATCH
) -> float:
    """Seconds for a unit of work, measured on first batches until they took ENOUGH_SECONDS.

    The least of the batches' rates, since what disturbs one makes it slower.

    Args:
        work: does the items from one index to another; returns how many units that was.
        n: items that there are.
        clock: returns seconds.
        first: items of the first batch; the next has twice as many, and so on, while they are fast.
    """
    began, done, size, rates = clock(), 0, first, list[float]()
    while done < n and (len(rates) < LEAST_TIMED or clock() - began < ENOUGH_SECONDS):
        started, size = clock(), min(size, n - done)
        units = work(done, done + size)
        rates.append((clock() - started) / max(units, 1e-9))
        done += size
        if clock() - began < ENOUGH_SECONDS:
            size *= 2
    return min(rates)
