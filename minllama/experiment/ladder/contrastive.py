"""The rung for few rows a class: contrastive tuning, and a head on it beside the frozen heads.

Every pair of texts teaches adapters something, where single texts are too few for a loss of their
classes. What they learn is multiplied with the frozen heads, which read the base without them.
"""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from minllama.classification import LlamaEmbeddingClassifier, LlamaExpertsClassifier
from minllama.classification.discriminant import Discriminant, HeadKind
from minllama.classification.features import extract_features
from minllama.classification.frozen import FEW_ROWS
from minllama.engine.states import Choice
from minllama.experiment.build import make_trainable
from minllama.experiment.ladder.candidate import load_candidate
from minllama.experiment.ladder.frozen import FrozenRung
from minllama.experiment.ladder.lora import FEW_PER_CLASS, restore_base
from minllama.experiment.ladder.partner import Multiplied, multiplied_by
from minllama.experiment.ladder.product import TrainedHead, product_of
from minllama.experiment.ladder.rung import Context, Measured, NotThisTime
from minllama.experiment.ladder.scoring import Scores
from minllama.experiment.ladder.state import RungFolder
from minllama.experiment.ladder.tfidf import TfidfRung
from minllama.text import duration
from minllama.training.contrastive import BATCH, STEPS, tune

FIRST, DEPTH = 1 / 2, 0.8  # of the stack, where adapters begin and the head reads
SHRINKAGE = 0.7  # of the head: texts that were tuned on are closer together than others
# Of the tuned head beside the frozen ones, by logits of the same spread, where there are too few
# rows to fit weights; chosen on training rows of the suite (docs/lora-study.md).
SHARE = 0.3
TIMES_READING = 3  # a step takes about as many times as long as reading its texts


class ContrastiveRung:
    """Tuned and measured on folds of the training rows, then tuned on all of them."""

    name, title = "contrastive", "contrastive LoRA"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._folder = RungFolder(context.folder / self.name / "alone")  # without frozen heads
        self._may_stop = True

    def obstacle(self) -> str | None:
        train = self._context.train
        if reason := TfidfRung(self._context).obstacle():
            return reason
        if not self._context.reads_experts:
            return "it stands beside several frozen heads"
        if len(train) > FEW_PER_CLASS * len(train.label_names):
            return f"for up to {FEW_PER_CLASS} training texts a class"
        return None

    def estimate(self) -> float:
        context = self._context
        of_train, n_trainings = context.n_tokens(context.train), len(context.folds) + 1
        of_steps = STEPS * of_train * min(1.0, BATCH / len(context.train))
        of_training = TIMES_READING * of_steps + of_train
        of_dev = 2 * context.n_tokens(context.splits.dev)
        return (n_trainings * of_training + of_dev) * context.seconds_per_token

    def plan(self) -> str:
        return f"about {duration(self.estimate())}"

    def run(self) -> Measured:
        """See `Rung.run`."""
        context, began = self._context, self._context.budget.clock()
        frozen = context.results.get(FrozenRung.name)
        if frozen is None or frozen.size is None:
            raise NotThisTime("it needs the frozen heads, and there are none")
        scores = self._folder.scores(context.empty_scores())
        folds = [fold for fold in context.folds if np.isnan(scores[fold]).any()]
        for n_done, fold in enumerate(folds):
            self._check_time(n_done, len(folds) + 1 - n_done, began)
            scores[fold] = self._of_fold(fold)
            self._folder.save_scores(scores)
        found = self._multiplied(scores)
        if found is None or not (found.of_rung and found.of_partner):
            raise NotThisTime("one of the two adds nothing to the other", was_begun=True)
        classifier = self._made(found)
        speed = context.measure_dev(classifier, found.scores)
        how = f"{len(context.folds)}-fold cross-validation, and dev"
        seconds = context.budget.clock() - began
        once = seconds / (len(context.folds) + 1)
        return Measured(found.scores, how, seconds, speed, classifier, seconds_to_refit=once)

    def refitted(self, known: "ContrastiveRung") -> LlamaExpertsClassifier:
        """The classifier that `run` makes, tuned on all rows of this rung's ladder.

        Args:
            known: this rung of another ladder, which has run; its weights are taken.
        """
        found = known._multiplied(known._folder.scores(known._context.empty_scores()))
        assert found is not None
        self._may_stop = False  # half of it is no use, and there was time when it began
        return self._made(found)

    def _multiplied(self, scores: Scores) -> Multiplied | None:
        """The tuned heads' scores, multiplied with those of the frozen heads."""
        context = self._context
        share = SHARE if len(context.train) < FEW_ROWS else None
        frozen = context.results[FrozenRung.name]
        return multiplied_by(context, scores, frozen.scores, share=share)

    def _check_time(self, n_done: int, n_left: int, began: float) -> None:
        """Raise NotThisTime if the trainings that are left take longer than those that are done."""
        budget = self._context.budget
        needed = (budget.clock() - began) / n_done * n_left if n_done else 0.0
        if needed > budget.left:
            raise NotThisTime(
                f"{n_left} more trainings take about {duration(needed)}, and "
                f"{budget.left_in_words}",
                was_begun=True,
            )

    def _stop_in_time(self, step: int) -> None:
        if self._may_stop and step < STEPS and self._context.budget.left < 0:
            raise NotThisTime(f"the time was up after step {step} of {STEPS}", was_begun=True)

    def _of_fold(self, fold: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores (F, C) of a fold's rows, by a head that was tuned and fitted on the others."""
        train = self._context.train
        others = np.setdiff1d(np.arange(len(train)), fold)
        try:
            reader, head = self._tuned(others)
            texts = [train.texts[row] for row in fold]
            vectors = torch.from_numpy(extract_features(reader, texts, [head.choice])[head.choice])
            assert head.bias is not None
            scores: NDArray[np.float32] = (vectors @ head.weight.T + head.bias).numpy()
            return scores
        finally:
            restore_base(self._context.llama)

    def _tuned(self, rows: NDArray[np.int64]) -> tuple[LlamaEmbeddingClassifier, TrainedHead]:
        """Adapters on the model, tuned on some rows, and a head that was fitted to them."""
        context, train = self._context, self._context.train
        restore_base(context.llama)
        reader = LlamaEmbeddingClassifier(
            context.llama,
            context.tokenizer,
            train.label_names,
            pooling="last",
            layer=self._choice[0],
            prompt=context.experiment.prompt,
        )
        torch.manual_seed(context.seed)
        first = math.ceil(FIRST * context.llama.config.n_layers)
        first = min(first, self._choice[0] - 1)
        make_trainable(reader, "lora", context.experiment.lora, first_layer=first)
        texts = [train.texts[row] for row in rows]
        prompts = [reader.encode(text).ids for text in texts]
        labels = np.asarray(cast(Sequence[int], train.labels))[rows]
        tune(
            *(context.llama, prompts, labels, self._choice),
            seed=context.seed,
            progress=self._stop_in_time,
        )
        context.llama.requires_grad_(False)
        vectors = extract_features(reader, texts, [self._choice])[self._choice]
        gold = context.task.target(labels.tolist())
        weight, bias = Discriminant(vectors, gold, context.task).head(HeadKind(SHRINKAGE))
        return reader, TrainedHead(torch.from_numpy(weight), torch.from_numpy(bias), self._choice)

    @property
    def _choice(self) -> Choice:
        return max(1, round(DEPTH * self._context.llama.config.n_layers)), "last"

    def _made(self, found: Multiplied) -> LlamaExpertsClassifier:
        """The product, tuned on all training rows."""
        context = self._context
        _, head = self._tuned(np.arange(len(context.train)))
        folder = RungFolder(context.folder / FrozenRung.name).classifier
        frozen = load_candidate(folder, context.llama, context.tokenizer)
        assert isinstance(frozen, LlamaExpertsClassifier)
        weights = found.of_partner, found.of_rung
        return product_of(context, frozen, head, *weights, is_unchanged=False)
