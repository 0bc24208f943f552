"""The rung of TF-IDF and logistic regression: what words alone tell, in seconds."""

from typing import cast

import numpy as np
from numpy.typing import NDArray

from minllama.classification import LlamaExpertsClassifier
from minllama.classification.calibration import fit_temperature
from minllama.classification.features import parallel_fits
from minllama.evaluation.tfidf import INVERSE_PENALTIES, Logits, fit_tfidf, out_of_fold_logits
from minllama.experiment.ladder.rung import Context, Measured
from minllama.text import duration


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
        return self._first[1] * (len(context.folds) + 1)

    def plan(self) -> str:
        return f"about {duration(self.estimate())}"

    def run(self) -> Measured:
        context, train = self._context, self._context.train
        began = context.budget.clock()
        self.estimate()  # computes the first fold
        assert self._first is not None
        first, seconds = self._first
        others = self._of_folds(context.folds[1:])
        gold = np.asarray(cast(list[int], train.labels))
        # Rows of other folds are zero in each of the two.
        logits = {c: first[c] + others[c] for c in INVERSE_PENALTIES}
        best = max(INVERSE_PENALTIES, key=lambda c: (logits[c].argmax(1) == gold).sum())
        of_best = logits[best].astype(np.float32)
        temperature = fit_temperature(of_best, gold.tolist())
        texts, target = self._texts(), context.task.target(gold.tolist())
        model = fit_tfidf(texts, target, context.task, best)
        classifier = LlamaExpertsClassifier(
            *(context.llama, context.tokenizer, train.label_names, ()),
            tfidf=model,
            prompt=context.experiment.prompt,
        )
        classifier.temperature = temperature
        context.words = logits
        scores = context.empty_scores()
        scores[: len(train)] = of_best / temperature
        speed = context.measure_dev(classifier, scores)
        seconds += context.budget.clock() - began
        how = f"{len(context.folds)}-fold cross-validation, and dev"
        return Measured(scores, how, seconds, speed, classifier)

    def _of_folds(self, folds: list[NDArray[np.int64]]) -> dict[float, Logits]:
        task, labels = self._context.task, self._context.train.labels
        assert labels is not None
        texts, gold = self._texts(), task.target(labels)
        with parallel_fits() as pool:
            parts = [
                pool.submit(out_of_fold_logits, texts, gold, task, folds, (inverse,))
                for inverse in INVERSE_PENALTIES
            ]
            found = [part.result() for part in parts]
        return {inverse: logits for part in found for inverse, logits in part.items()}

    def _texts(self) -> list[str]:
        """What is read of each text: what a Llama reads of it, too."""
        reader = self._context.reader
        return [reader.encode(text).text or "" for text in self._context.train.texts]
