"""The rungs that train low-rank adapters: under a head, or under label words."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minllama.classification import LlamaEmbeddingClassifier
from minllama.classification.base import Classifier
from minllama.classification.features import FIRST_PENALTY, extract_features
from minllama.data import Dataset
from minllama.engine.frozen_states import FrozenStates, states_fit
from minllama.experiment.build import (
    STARTING_TEXTS,
    make_trainable,
    make_zero_shot,
    training_options,
    with_more_layers,
)
from minllama.experiment.heads import Selected, head_fitting
from minllama.experiment.ladder.epochs import LEAST_PART, TrainingTimes, most_epochs
from minllama.experiment.ladder.frozen import FrozenRung
from minllama.experiment.ladder.partner import multiplied, partner_of
from minllama.experiment.ladder.rung import ENOUGH_SECONDS, Context, Measured, NotThisTime
from minllama.experiment.ladder.scoring import Scores
from minllama.experiment.ladder.state import WHOLE, RungFolder
from minllama.experiment.ladder.zero_shot import label_word_obstacle, label_word_options
from minllama.lora import lora_layers, remove_lora_wrapper
from minllama.model.llama import Llama
from minllama.options import TrainingOptions
from minllama.options.training import EPOCHS
from minllama.text import duration
from minllama.training.progress import Progress
from minllama.training.trainer import fit

TIMED_STEPS = 6  # at most, of which the first, that warms up, does not count
TIMES_READING = 2  # a step takes at least this many times as long as reading its texts
# Of the stack below the head, beside several frozen heads. The prompt's last token has read all of
# it; means, which were as good for frozen heads, were worse in training (docs/lora-study.md).
DEPTH = 0.75
UPPER_RATE = 1e-3  # of adapters above the stack's half
FEW_PER_CLASS = 24  # training texts a class up to which label words are trained as well


class LoRARung:
    """Adapters and a head, which begins where the frozen head is; as many epochs as time allows.

    It is measured on dev, and, while time allows, on folds of the training rows, for each of which
    another one is trained on the other folds. If it is worse there, it is not trained on all rows.
    """

    name, title = "lora", "LoRA with a head"
    has_partner = True  # by which the next rung multiplies it

    def __init__(self, context: Context) -> None:
        self._context = context
        self._folder = RungFolder(context.folder / self.name)
        self._tokens_per_second: dict[Hashable, float] = {}  # by the layers that run and learn
        self._speed: float | None = None  # texts per second of what was trained on a fold
        self._states: FrozenStates | None = None  # of all training texts

    def obstacle(self) -> str | None:
        return None

    def estimate(self) -> float:
        return self._times().least

    def plan(self) -> str:
        epochs, times = self._options.epochs, self._times()
        an_epoch = f"about {duration(times.epoch)} an epoch"
        if not self._context.budget.allows(times.epoch + times.to_read_dev):
            return f"{an_epoch}, so on as many of the training texts as time allows"
        return (
            f"{an_epoch}, up to {epochs} as time allows, and again for parts of the training rows, "
            "to measure it"
        )

    @property
    def _options(self) -> TrainingOptions:
        given = self._context.experiment.training
        options = training_options(given, "lora", regression=self._has_numbers)
        options = replace(options, epochs=most_epochs(given.epochs, self._context.n_outputs))
        # Adapters of a few layers have a quarter of the parameters, and need a higher rate.
        return (
            replace(options, lr=UPPER_RATE) if given.lr is None and self._first_layer else options
        )

    @property
    def _has_numbers(self) -> bool:
        return self._context.train.has_numbers

    def run(self) -> Measured:
        context = self._context
        began = context.budget.clock()
        plan = self._folder.plan() or self._new_plan()
        scores = self._folder.scores(context.empty_scores())
        for number in range(plan["folds"]):
            fold = context.folds[number]
            if np.isnan(scores[fold]).any():
                scores[fold] = self._of_fold(number, fold, plan["epochs"])
                self._folder.save_scores(scores)
        how = "1 epoch" if plan["epochs"] == 1 else f"{plan['epochs']} epochs"
        part = None
        if plan["rows"] < len(context.train):
            how += f" of {plan['rows']:,} of the {len(context.train):,} training texts"
            part = context.some_rows(plan["rows"])
        if plan["folds"]:
            how += f"; {plan['folds']} of {len(context.folds)} folds of cross-validation"
        if plan["folds"] and self._is_worse(scores):
            seconds = context.budget.clock() - began
            notes = ["worse in cross-validation, so it was not trained on all training texts"]
            return Measured(scores, how, seconds, self._speed, None, notes=notes)
        notes = []
        classifier = self._trained(WHOLE, part, plan["epochs"], notes)
        speed = context.measure_dev(classifier, scores)
        how += ", and dev" if plan["folds"] else "; dev"
        seconds = context.budget.clock() - began
        return Measured(scores, how, seconds, speed, classifier, notes=notes)

    def refitted(self, known: "LoRARung") -> Classifier:
        """The classifier of `run`, trained on all rows of this rung's ladder.

        Args:
            known: this rung of another ladder, which has run; its number of epochs is taken.
        """
        plan = known._folder.plan()
        assert plan is not None
        return self._trained(WHOLE, None, plan["epochs"], [])

    def _new_plan(self) -> dict[str, int]:
        """As many epochs as the time allows, and then as many folds.

        Raises:
            NotThisTime: not even one epoch of a part of the rows fits.
        """
        times, budget = self._times(), self._context.budget
        plan = times.plan(budget, self._options.epochs or EPOCHS)
        if plan is None:
            raise NotThisTime(
                f"it takes about {duration(times.least)}, and {budget.left_in_words}; "
                f"--minutes {budget.minutes_for(times.least)} would do"
            )
        self._folder.save_plan(plan._asdict())
        return plan._asdict()

    def _times(self) -> TrainingTimes:
        context = self._context
        return TrainingTimes(
            epoch=self._seconds_of_epoch(),
            n_train=len(context.train),
            to_read_train=self._seconds_to_read(context.train),
            to_read_dev=self._seconds_to_read(context.splits.dev),
            n_dev=len(context.splits.dev),
            fold_sizes=[len(fold) for fold in context.folds],
            once=0.0 if self._states is not None else self._seconds_of_states(),
        )

    @property
    def _keeps_states(self) -> bool:
        """Whether the layers below the adapters run once for all trainings."""
        llama = self._context.llama
        is_same_again = self._first_layer > 0 and llama.config.dropout == 0
        return is_same_again and states_fit(llama, self._n_tokens)

    def _seconds_of_states(self) -> float:
        if not self._keeps_states:
            return 0.0
        share = self._first_layer / self._context.llama.config.n_layers
        return share * self._n_tokens * self._context.seconds_per_token

    def _begin_above(self, classifier: Classifier, texts: Sequence[str]) -> None:
        """Let a training begin with what the layers below the adapters make of texts."""
        if not (self._keeps_states and isinstance(classifier, LlamaEmbeddingClassifier)):
            return
        prompts = [classifier.encode(text).ids for text in texts]
        classifier.frozen_states = FrozenStates(self._context.llama, prompts, self._first_layer)

    def _is_worse(self, scores: Scores) -> bool:
        """Whether an earlier rung is better on the folds by more than one standard error.

        Better than this rung alone, and than its product with its partner, and not worse by its
        log-loss, of which a part of the rows tells more.
        """
        scoring, others = self._context.scoring, self._context.results.values()
        found = [scores]
        if self.has_partner and (product := multiplied(self._context, scores)) is not None:
            found.append(product.scores)

        def is_beaten(one: Scores) -> bool:
            for other in others:
                gain = scoring.gain(one, other.scores)
                is_worse = gain.rows and gain.value < -gain.error
                if is_worse and scoring.loss_gain(one, other.scores).value <= 0:
                    return True
            return False

        return all(map(is_beaten, found))

    def _of_fold(self, number: int, fold: NDArray[np.int64], epochs: int) -> Scores:
        train = self._context.train
        others = np.setdiff1d(np.arange(len(train)), fold)
        cut: list[str] = []
        try:
            classifier = self._trained(f"fold{number}", others, epochs, cut)
            if cut:
                raise NotThisTime(f"while it was measured {cut[0]}", was_begun=True)
            began = self._context.budget.clock()
            scores = classifier.predict_logits([train.texts[row] for row in fold])
            self._speed = len(fold) / max(self._context.budget.clock() - began, 1e-6)
            return scores
        finally:
            restore_base(self._context.llama)

    def _trained(
        self, name: str, rows: NDArray[np.int64] | None, epochs: int, notes: list[str]
    ) -> Classifier:
        """Train on some rows, or on all; if the time is up, what there is then, with a note."""
        context = self._context
        restore_base(context.llama)
        torch.manual_seed(context.seed)
        known = range(len(context.train)) if rows is None else rows.tolist()
        classifier, train = self._started(known)
        self._make_trainable(classifier)
        options = replace(self._options, epochs=epochs, keep="last", patience=0)
        progress = _UntilTime(context, self._seconds_to_read(context.splits.dev))
        head = classifier.score if isinstance(classifier, LlamaEmbeddingClassifier) else None
        if isinstance(classifier, LlamaEmbeddingClassifier):
            if self._states is None:
                # Of folds, all texts, for the next one has others of them.
                texts = train.texts if name == WHOLE else context.train.texts
                self._begin_above(classifier, texts)
                self._states = classifier.frozen_states
            classifier.frozen_states = self._states
        try:
            fit(
                classifier,
                train,
                None,
                options,
                folder=self._folder.run(name),
                resume=True,
                head_parameters=[] if head is None else list(head.parameters()),
                progress=progress,
                settings=context.settings,
            )
        except _TimeIsUpError as error:
            notes.append(str(error))
        except KeyboardInterrupt:
            restore_base(context.llama)
            raise
        if isinstance(classifier, LlamaEmbeddingClassifier):
            classifier.frozen_states = None
        return classifier

    def _started(self, rows: Sequence[int]) -> tuple[Classifier, Dataset]:
        """A classifier to train, and the texts to train it on: those of some rows."""
        context, options = self._context, self._context.experiment.classifier
        selected = self._starting()
        choice = selected.choice
        if options.layer == "auto" and not context.reads_experts:
            choice = with_more_layers(choice, context.llama)
        train = context.train.select(rows)
        balanced = context.experiment.training.class_weights == "balanced"
        fitting = head_fitting(context.train, balanced=balanced, seed=context.seed)
        classifier = LlamaEmbeddingClassifier(
            context.llama,
            context.tokenizer,
            pooling=choice[1],
            layer=choice[0],
            dropout=options.dropout,
            prompt=context.experiment.prompt,
            **fitting.head(context.llama, choice),
        )
        if choice not in context.features:
            order = np.random.default_rng(context.seed).permutation(len(context.train))
            some = sorted(order[:STARTING_TEXTS].tolist())
            texts = [context.train.texts[row] for row in some]
            context.features = extract_features(classifier, texts, [choice])
            context.feature_rows = some
        allowed = rows if isinstance(rows, range) else set(rows)
        places = [i for i, row in enumerate(context.feature_rows) if row in allowed]
        if places:
            known = context.train.select([context.feature_rows[i] for i in places])
            has_bias = classifier.score.bias is not None
            vectors = context.features[choice][places]
            head = fitting.fit(vectors, known, selected.penalty, bias=has_bias)
            head.put_into(classifier.score)
        return classifier, train

    def _starting(self) -> Selected:
        """The frozen head's layer, pooling and penalty, or what usually is one of the best."""
        context, options = self._context, self._context.experiment.classifier
        n_layers = context.llama.config.n_layers
        if context.reads_experts:
            return Selected((math.ceil(DEPTH * n_layers), "last"), FIRST_PENALTY, "a rule")
        if context.starting is not None:
            return context.starting
        layer = {"auto": max(1, 3 * n_layers // 5), "all": n_layers}.get(options.layer)
        layer = int(options.layer) if layer is None else layer
        pooling: Any = "mean" if options.pooling == "auto" else options.pooling
        return Selected((layer, pooling), FIRST_PENALTY, "a guess")

    @property
    def _first_layer(self) -> int:
        """The lowest layer with adapters, so that its partner reads what it was fitted to."""
        context = self._context
        if not self.has_partner or not context.reads_experts:
            return 0
        partner = partner_of(context)
        if FrozenRung.name in context.results:
            return 0 if partner is None else partner.n_layers
        return context.llama.config.n_layers // 2  # as far as can be told yet

    def _make_trainable(self, classifier: Classifier) -> None:
        lora = self._context.experiment.lora
        make_trainable(classifier, "lora", lora, first_layer=self._first_layer)

    @cached_property
    def _n_tokens(self) -> float:
        return self._context.n_tokens(self._context.train)

    def _seconds_to_read(self, split: Dataset) -> float:
        context = self._context
        return context.n_tokens(split) * context.seconds_per_token

    def _seconds_of_epoch(self) -> float:
        """By some steps, whose changes are thrown away; where it is out of reach, by reading."""
        context = self._context
        layers = self._starting().choice[0], self._first_layer
        at_least = TIMES_READING * self._n_tokens * context.seconds_per_token
        of_part = at_least * min(1.0, LEAST_PART / len(context.train))
        if of_part > max(context.budget.left, 0) and layers not in self._tokens_per_second:
            return at_least
        if layers not in self._tokens_per_second:
            clock = _StepTimes(context.budget.clock)
            restore_base(context.llama)
            n = TIMED_STEPS * self._options.batch_size * self._options.gradient_accumulation
            order = np.random.default_rng(context.seed).permutation(len(context.train))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(context.seed)
                classifier, train = self._started(sorted(order[:n].tolist()))
                self._make_trainable(classifier)
                self._begin_above(classifier, train.texts)
                options = replace(self._options, epochs=1, keep="last", patience=0)
                try:
                    fit(classifier, train, None, options, progress=clock)
                except _TimeIsUpError:
                    pass  # enough steps were timed
                finally:
                    restore_base(context.llama)
            self._tokens_per_second[layers] = clock.tokens_per_second
        return self._n_tokens / self._tokens_per_second[layers]


class LabelWordsRung(LoRARung):
    """Adapters that train the scores of label words, for few rows (Gao et al. 2021)."""

    name, title = "label-words", "LoRA with label words"
    has_partner = False

    def obstacle(self) -> str | None:
        train = self._context.train
        if reason := label_word_obstacle(self._context):
            return reason
        if len(train) > FEW_PER_CLASS * len(train.label_names):
            return f"for up to {FEW_PER_CLASS} training texts a class"
        return None

    def _started(self, rows: Sequence[int]) -> tuple[Classifier, Dataset]:
        context = self._context
        train = context.train.select(rows)
        classifier = make_zero_shot(
            context.llama,
            context.tokenizer,
            context.train.label_names,
            context.experiment.prompt,
            label_word_options(context),
            train=train,
            seed=context.seed,
        )
        return classifier, train


def restore_base(llama: Llama) -> None:
    """The model as it was before adapters were added."""
    if lora_layers(llama):
        remove_lora_wrapper(llama, merge=False)
    llama.requires_grad_(False)


class _TimeIsUpError(Exception):
    """Training is ended before its last step."""


class _UntilTime:
    """Shows progress, and ends training when the time is up."""

    def __init__(self, context: Context, needed_after: float) -> None:
        self._budget, self._needed = context.budget, needed_after
        self._inner: Progress | None = context.reporter.progress()
        self._total = 0

    def begin(self, step: int, total_steps: int) -> None:
        self._total = total_steps
        if self._inner is not None:
            self._inner.begin(step, total_steps)

    def advance(self, row: Mapping[str, Any]) -> None:
        if self._inner is not None:
            self._inner.advance(row)
        if row["step"] < self._total and self._budget.left < self._needed:
            raise _TimeIsUpError(
                f"the time was up after step {row['step']} of {self._total}, so it was stopped"
            )

    def end(self) -> None:
        if self._inner is not None:
            self._inner.end()


class _StepTimes:
    """The rate of a training's first steps; ends it when they took ENOUGH_SECONDS."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._rates = clock, list[float]()

    def begin(self, step: int, total_steps: int) -> None:
        self._began = self._clock()

    def advance(self, row: Mapping[str, Any]) -> None:
        self._rates.append(row["tokens_per_second"])
        if len(self._rates) > 1 and self._clock() - self._began > ENOUGH_SECONDS:
            raise _TimeIsUpError

    def end(self) -> None:
        pass

    @property
    def tokens_per_second(self) -> float:
        """The median, without the first step if there are others."""
        rates = sorted(self._rates[1:] or self._rates)
        return rates[len(rates) // 2]
