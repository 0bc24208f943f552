"""The rung of TF-IDF and logistic regression: what words alone tell, in seconds."""

from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from minllama.classification import LlamaExpertsClassifier
from minllama.classification.calibration import fit_temperature
from minllama.classification.features import parallel_fits
from minllama.evaluation.tfidf import (
    INVERSE_PENALTIES,
    MOST_TEXTS,
    Logits,
    fit_tfidf,
    out_of_fold_logits,
)
from minllama.experiment.heads import random_order
from minllama.experiment.ladder.rung import Context, Measured
from minllama.text import duration

SHARE = 0.25  # of the time left that the last fit may take, where there are very many texts


class TfidfRung:
    """Logistic regression on TF-IDF of words and characters, its penalty by cross-validation."""

    name, title = "tfidf", "TF-IDF"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._first: tuple[dict[float, Logits], float] | None = None  # a fold, and its seconds

    def obstacle(self) -> str | None:
        train = self._context.train
        if train.has_numbers:
            return "labels are numbers"
        return "texts have several labels" if train.multi_label else None

    def estimate(self) -> float:
        context = self._context
        if self._first is None:
            began = context.budget.clock()
            logits = self._of_folds(context.folds[:1])
            self._first = logits, context.budget.clock() - began
        return (
            self._first[1] * len(context.folds) + self._seconds_to_fit_a_text() * self._n_fitted()
        )

    def _seconds_to_fit_a_text(self) -> float:
        """By the fits of a fold, one for each penalty."""
        assert self._first is not None
        fits = max(1, len(INVERSE_PENALTIES) / torch.get_num_threads())
        share = 1 - 1 / len(self._context.folds)
        return self._first[1] / fits / (share * len(self._context.compared_rows))

    def _n_fitted(self) -> int:
        """How many training texts it is fitted to in the end."""
        n, rows = len(self._context.train), self._context.compared_rows
        if len(rows) == n:
            return n
        most = int(max(self._context.budget.left, 0) * SHARE / self._seconds_to_fit_a_text())
        return min(n, MOST_TEXTS, max(len(rows), most))

    def plan(self) -> str:
        return f"about {duration(self.estimate())}"

    def run(self) -> Measured:
        context, train = self._context, self._context.train
        began = context.budget.clock()
        self.estimate()  # computes the first fold
        assert self._first is not None
        first, seconds = self._first
        others = self._of_folds(context.folds[1:])
        labels, rows = cast(Sequence[int], train.labels), context.compared_rows
        gold = np.asarray(labels)[rows]
        # Rows of other folds are zero in each of the two.
        logits = {c: first[c] + others[c] for c in INVERSE_PENALTIES}
        best = max(INVERSE_PENALTIES, key=lambda c: (logits[c].argmax(1) == gold).sum())
        of_best = logits[best].astype(np.float32)
        temperature = fit_temperature(of_best, gold.tolist())
        n_fitted = self._n_fitted()
        fitted = sorted(random_order(train, context.seed)[:n_fitted])
        target = context.task.target([labels[row] for row in fitted])
        model = fit_tfidf(self._texts(fitted), target, context.task, best)
        classifier = LlamaExpertsClassifier(
            *(context.llama, context.tokenizer, train.label_names, ()),
            tfidf=model,
            prompt=context.experiment.prompt,
        )
        classifier.temperature = temperature
        context.words = {c: self._of_all(z) for c, z in logits.items()}
        scores = context.empty_scores()
        scores[rows] = of_best / temperature
        speed = context.measure_dev(classifier, scores)
        seconds += context.budget.clock() - began
        how = f"{len(context.folds)}-fold cross-validation, and dev"
        if len(rows) < len(train):
            how += f"; {len(rows):,} of {len(train):,} training texts, fitted to {n_fitted:,}"
        return Measured(scores, how, seconds, speed, classifier, seconds_to_refit=seconds)

    def _of_all(self, logits: Logits) -> Logits:
        """(N, C) of all training texts, NaN where they are not compared."""
        train = self._context.train
        found = np.full((len(train), logits.shape[1]), np.nan)
        found[self._context.compared_rows] = logits
        return found

    def _of_folds(self, folds: list[NDArray[np.int64]]) -> dict[float, Logits]:
        """Logits of the compared rows, in their order; zero outside of the folds."""
        context, rows = self._context, self._context.compared_rows
        labels = cast(Sequence[int], context.train.labels)
        texts = self._texts(rows)
        gold = context.task.target([labels[row] for row in rows])
        places = [np.flatnonzero(np.isin(rows, fold)) for fold in folds]
        with parallel_fits() as pool:
            parts = [
                pool.submit(out_of_fold_logits, texts, gold, context.task, places, (inverse,))
                for inverse in INVERSE_PENALTIES
            ]
            found = [part.result() for part in parts]
        return {inverse: logits for part in found for inverse, logits in part.items()}

    def _texts(self, rows: Iterable[int]) -> list[str]:
        """What is read of some texts: what a Llama reads of them, too."""
        reader, texts = self._context.reader, self._context.train.texts
        return [reader.encode(texts[row]).text or "" for row in rows]
