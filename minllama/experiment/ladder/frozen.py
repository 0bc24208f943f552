"""The rung of a frozen model: a head on features that are computed once."""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from minllama.classification import LlamaEmbeddingClassifier, LlamaExpertsClassifier
from minllama.classification.features import MAX_ROWS, Features, fit_head
from minllama.classification.frozen import fit_frozen
from minllama.data import Dataset
from minllama.engine.states import Choice
from minllama.evaluation.tfidf import Logits
from minllama.experiment.build import choices_of, with_more_layers
from minllama.experiment.frozen import label_words
from minllama.experiment.heads import HeadFitting, Reading, Selected, head_fitting
from minllama.experiment.ladder.budget import SAFETY
from minllama.experiment.ladder.partner import keep_shallow
from minllama.experiment.ladder.rung import Context, Measured
from minllama.experiment.ladder.scoring import Scores
from minllama.text import duration

FEWEST_ROWS = 200  # with less time than these take, a head is not worth fitting
SHARE = 0.5  # of the time left that reading texts may take; fits take the rest
# Fits of a choice of layer and pooling: three folds each, and some more of the best few.
FITS_OF_A_CHOICE, FURTHER_FITS = 3, 45


class FrozenRung:
    """A linear head on the layer and pooling that are best in cross-validation."""

    name, title = "frozen", "frozen heads"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._options = context.experiment.classifier

    def obstacle(self) -> str | None:
        return None

    def estimate(self) -> float:
        """Of a head on all rows, or on as many as the time allows."""
        context = self._context
        tokens = context.n_tokens(context.train) * self._n_rows() / len(context.train)
        return (tokens + context.n_tokens(context.splits.dev)) * context.seconds_per_token

    def plan(self) -> str:
        n, n_all = self._n_rows(), len(self._context.train)
        some = f" for {n:,} of {n_all:,} training texts" if n < n_all else ""
        return f"about {duration(self.estimate())} to read texts{some}, and as long again to fit"

    def _n_rows(self) -> int:
        """How many training texts can be read."""
        context = self._context
        n = len(context.train)
        each = context.n_tokens(context.train) / n * context.seconds_per_token
        # Dev is read by the heads of all layers, and by those of the lower half.
        of_dev = 1.5 * context.n_tokens(context.splits.dev) * context.seconds_per_token
        left = max(context.budget.left - SAFETY * of_dev, 0) * SHARE / SAFETY
        most = min(n, MAX_ROWS, max(FEWEST_ROWS, math.floor(left / max(each, 1e-12))))
        return n if most >= n else most

    def run(self) -> Measured:
        if self._context.reads_experts:
            return self._experts()
        return self._one_head()

    def _experts(self) -> Measured:
        """Several layers and poolings, and TF-IDF beside, as cross-validation chooses."""
        context, began = self._context, self._context.budget.clock()
        train = context.train
        fitting = head_fitting(train, balanced=context.task.balanced, seed=context.seed)
        rows = np.asarray(fitting.some_rows(self._n_rows()))
        some = train.select(rows)
        found = fit_frozen(
            LlamaExpertsClassifier(
                *(context.llama, context.tokenizer, train.label_names, ()),
                prompt=context.experiment.prompt,
            ),
            some.texts,
            cast(Sequence[int], some.labels),
            context.task,
            label_words=label_words(self._options, train.label_names),
            folds=[np.flatnonzero(np.isin(rows, fold)) for fold in context.folds],
            with_shallow=True,
            words=self._words(rows),
            progress=context.reporter.advance("reading the training texts", len(some)),
            report=context.reporter.message,
        )
        assert found.shallow is not None
        keep_shallow(context, found.shallow, rows[found.rows])
        scores = context.empty_scores()
        scores[rows[found.rows]] = found.log_probs
        speed = context.measure_dev(found.classifier, scores)
        seconds = context.budget.clock() - began
        made = found.classifier
        return Measured(scores, self._how(some), seconds, speed, made, seconds_to_refit=seconds)

    def _words(self, rows: NDArray[np.int64]) -> dict[float, Logits] | None:
        """What TF-IDF says of some rows, if it is known of all of them."""
        words = {c: z[rows] for c, z in (self._context.words or {}).items()}
        return words if words and not any(np.isnan(z).any() for z in words.values()) else None

    def _how(self, some: Dataset) -> str:
        """How it was measured, in a few words."""
        context = self._context
        how = f"{len(context.folds)}-fold cross-validation, and dev"
        if context.train.has_numbers:
            how = "dev"
        if len(some) < len(context.train):
            how += f"; {len(some):,} of {len(context.train):,} training texts"
        return how

    def _one_head(self) -> Measured:
        context, began = self._context, self._context.budget.clock()
        balanced = context.experiment.training.class_weights == "balanced"
        fitting = head_fitting(context.train, balanced=balanced, seed=context.seed)
        rows = fitting.some_rows(self._n_rows())
        some = context.train.select(rows)
        features, selected = self._selected(fitting, some)
        context.starting = selected
        classifier = self._built(fitting, selected.choice)
        has_bias = classifier.score.bias is not None
        head = fitting.fit(features[selected.choice], some, selected.penalty, bias=has_bias)
        head.put_into(classifier.score)
        classifier.shortened |= context.reader.shortened
        scores = context.empty_scores()
        if not context.train.has_numbers:
            self._cross_validate(features[selected.choice], some, rows, selected, scores)
        speed = context.measure_dev(classifier, scores)
        kept = with_more_layers(selected.choice, context.llama)
        context.features = {c: features[c] for c in (selected.choice, kept) if c in features}
        context.feature_rows = rows
        seconds = context.budget.clock() - began
        how = self._how(some)
        return Measured(scores, how, seconds, speed, classifier, seconds_to_refit=seconds)

    def _selected(self, fitting: HeadFitting, some: Dataset) -> tuple[Features, Selected]:
        context = self._context
        report = context.reporter.advance("reading the training texts", len(some))
        by = Reading(context.reader, report, context.reporter.message)
        choices = choices_of(context.llama, self._options)
        later = [with_more_layers(choice, context.llama) for choice in choices]
        began = context.budget.clock()
        features = fitting.read(some, sorted({*choices, *later}), by)
        tokens = context.n_tokens(context.train) * len(some) / len(context.train)
        context.learn_rate(tokens, context.budget.clock() - began)
        choices = [choice for choice in choices if choice in features]
        if not context.train.has_numbers:
            choices = self._affordable(features, choices, some)
        selected = fitting.select({choice: features[choice] for choice in choices}, some)
        (layer, pooling), penalty = selected.choice, selected.penalty
        n_layers = context.llama.config.n_layers
        context.reporter.message(
            f"layer {layer} of {n_layers}, {pooling}, penalty {penalty:g}: {selected.merit}"
        )
        return features, selected

    def _affordable(self, features: Features, choices: list[Choice], some: Dataset) -> list[Choice]:
        """As many of the choices as can be compared in the time: every second layer, and so on."""
        context = self._context
        began = context.budget.clock()
        assert some.labels is not None
        fit_head(features[choices[len(choices) // 2]], some.labels, context.task)
        each = (context.budget.clock() - began) / torch.get_num_threads()

        def seconds(n: int) -> float:
            return (n * FITS_OF_A_CHOICE + FURTHER_FITS) * each

        layers = sorted({layer for layer, _ in choices})
        step = 1
        while not context.budget.allows(seconds(len(choices))) and step < len(layers):
            step *= 2
            kept = set(layers[len(layers) // 2 % step :: step])
            choices = [choice for choice in choices if choice[0] in kept]
        return choices

    def _built(self, fitting: HeadFitting, choice: Choice) -> LlamaEmbeddingClassifier:
        layer, pooling = choice
        context = self._context
        return LlamaEmbeddingClassifier(
            context.llama,
            context.tokenizer,
            pooling=pooling,
            layer=layer,
            dropout=self._options.dropout,
            prompt=context.experiment.prompt,
            **fitting.head(context.llama, choice),
        )

    def _cross_validate(
        self,
        features: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]",
        some: Dataset,
        rows: Sequence[int],
        selected: Selected,
        scores: Scores,
    ) -> None:
        """Scores of the rows by heads that were not fitted to them."""
        labels, numbers = some.labels, np.asarray(rows)
        assert labels is not None
        for fold in self._context.folds:
            is_held_out = np.isin(numbers, fold)
            fitted_to = np.flatnonzero(~is_held_out)
            if not is_held_out.any() or not len(fitted_to):
                continue
            weight, bias = fit_head(
                features[fitted_to],
                [labels[i] for i in fitted_to.tolist()],
                self._context.task,
                penalty=selected.penalty,
            )
            scores[numbers[is_held_out]] = features[is_held_out] @ weight.T + bias
