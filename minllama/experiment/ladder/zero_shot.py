"""The rung without training: how likely are the labels' names as words after a text?"""

import json
from dataclasses import replace
from functools import cached_property

from minllama.classification import LlamaZeroShotClassifier
from minllama.classification.label_words import words_of_labels
from minllama.data import Dataset
from minllama.experiment.build import make_zero_shot
from minllama.experiment.heads import random_order
from minllama.experiment.ladder.rung import MOST_TIMED, Context, Measured, NotThisTime, seconds_each
from minllama.options import ZeroShotOptions
from minllama.text import duration

MOST_LABELS = 20  # more take a pass each, and are rarely told apart by their names alone
MOST_ROWS = 125  # of each split, which are enough to see whether it is any good
PRIOR_ROWS = 75  # texts from which the labels' prior is learned
SHARE = 0.15  # of the time left that it may take: heads that are fitted are better as a rule


def label_word_obstacle(context: Context) -> str | None:
    """Why labels cannot be scored as words; None if they can."""
    train, options = context.train, context.experiment.classifier
    if train.has_numbers:
        return "labels are numbers"
    if train.multi_label:
        return "texts have several labels"
    if not context.llama.config.causal:
        return "label words need a causal model"
    if len(train.label_names) > MOST_LABELS:
        return f"{len(train.label_names)} labels; their names are tried for up to {MOST_LABELS}"
    if options.label_words is None and words_of_labels(train.label_names) is None:
        return "the label names are not words; --label-words gives some"
    return None


def label_word_options(context: Context) -> ZeroShotOptions:
    """How label words are scored: by the options, where given."""
    options = context.experiment.classifier
    words = options.label_words
    if words is None:
        words = json.dumps(words_of_labels(context.train.label_names))
    score = "batch" if options.score == ZeroShotOptions.score else options.score
    return ZeroShotOptions(label_words=words, score=score, prior_strength=options.prior_strength)


class ZeroShotRung:
    """Label words without training, less their prior over some unlabeled training texts."""

    name, title = "zero-shot", "zero-shot label words"

    def __init__(self, context: Context) -> None:
        self._context = context

    def obstacle(self) -> str | None:
        return label_word_obstacle(self._context)

    @cached_property
    def _seconds_per_text(self) -> float:
        context = self._context
        uncorrected = replace(label_word_options(context), score="sum")
        classifier = self._made(uncorrected, None)
        rows = random_order(context.train, context.seed)[:MOST_TIMED]
        texts = [context.train.texts[row] for row in rows]
        classifier.predict_logits(texts[:1])

        def score(start: int, end: int) -> int:
            return len(classifier.predict_logits(texts[start:end]))

        return seconds_each(score, len(texts), context.budget.clock)

    def estimate(self) -> float:
        n_rows = sum(map(len, self._rows())) + min(PRIOR_ROWS, len(self._context.train))
        return n_rows * self._seconds_per_text

    def plan(self) -> str:
        return f"about {duration(self.estimate())}"

    def run(self) -> Measured:
        context, (of_train, of_dev) = self._context, self._rows()
        if self.estimate() > SHARE * context.budget.left:
            raise NotThisTime(
                f"it takes about {duration(self.estimate())}, time that a head makes better use of"
            )
        train, dev = context.train, context.splits.dev
        began = context.budget.clock()
        some = train.select(of_train[:PRIOR_ROWS])
        classifier = self._made(label_word_options(context), some)
        ready = context.budget.clock()
        texts = [train.texts[row] for row in of_train] + [dev.texts[row] for row in of_dev]
        scores = context.empty_scores()
        rows = of_train + [len(train) + row for row in of_dev]
        scores[rows] = classifier.predict_logits(texts)
        now = context.budget.clock()
        return Measured(
            scores,
            "nothing is fitted to labels; some of the rows of train and dev",
            now - began,
            len(texts) / max(now - ready, 1e-6),
            classifier,
        )

    def _rows(self) -> tuple[list[int], list[int]]:
        """Rows of train and of dev, drawn at random."""
        context = self._context
        splits = context.train, context.splits.dev
        of_train, of_dev = (
            random_order(split, context.seed)[:MOST_ROWS].tolist() for split in splits
        )
        return of_train, of_dev

    def _made(self, options: ZeroShotOptions, train: Dataset | None) -> LlamaZeroShotClassifier:
        context = self._context
        return make_zero_shot(
            context.llama,
            context.tokenizer,
            context.train.label_names,
            context.experiment.prompt,
            options,
            train=train,
            seed=context.seed,
        )
