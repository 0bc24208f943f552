"""Fit a product of frozen experts: which layers, poolings and TF-IDF tell classes apart.

Features of several layers and poolings are computed in one forward pass over the texts. Each gives
a discriminant analysis, words and characters a logistic regression, and cross-validation on the
training texts alone decides which of them are multiplied, with what weights. Rows that a fold
leaves out are predicted by heads that were not fitted to them, so the product is calibrated as
well. `minllama train --method frozen` calls `fit_frozen`.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from minllama.classification import discriminant
from minllama.classification.discriminant import Discriminant, HeadKind
from minllama.classification.experts import LlamaExpertsClassifier, scaled
from minllama.classification.features import (
    MAX_ROWS,
    Features,
    extract_features,
    parallel_fits,
    single_threaded_fits,
    stratified_folds,
)
from minllama.classification.label_words import label_head, label_rows
from minllama.classification.products import (
    MOST_EXPERTS,
    Product,
    choose_experts,
    even_product,
    is_clearly_better,
)
from minllama.data.task import Task
from minllama.distributed.ranks import current
from minllama.engine.states import Choice, Pooling
from minllama.evaluation import tfidf

SEARCH_TEXTS = 2500  # that run through all layers; the others through the chosen ones
N_LAYERS = 8  # of which features are compared, evenly over the stack
SEARCH_SHRINKAGES = (0.1, 0.4, 0.7)
# Classes that may be ordered, as stars are, get ordinal heads beside the others, of one shrinkage:
# those that cross-validation chose on SST-5. An order that means nothing is not chosen.
ORDINAL_SHRINKAGE = 0.1
FEWEST_ORDERED, MOST_ORDERED = 3, 10
FEW_ROWS = 150  # on fewer, all experts count alike
# Parts of the stack beyond which a layer must earn its time.
DEPTHS = (0.5, 0.75, 1.0)

Folds = Sequence[NDArray[np.int64]]
Matrix = NDArray[np.float64]


class Expert(NamedTuple):
    """A head: on the features of a choice, or on TF-IDF, with its regularization.

    Attributes:
        choice: layer and pooling; None for TF-IDF.
        strength: the shrinkage of a discriminant analysis; scikit-learn's C beside TF-IDF.
        is_label_words: the head scores the labels' words, and is fitted to no label.
        is_ordinal: the head takes the classes for ordered.
    """

    choice: Choice | None
    strength: float
    is_label_words: bool = False
    is_ordinal: bool = False

    @property
    def layer(self) -> int:
        return 0 if self.choice is None else self.choice[0]

    def __str__(self) -> str:
        if self.is_label_words:
            return "label words"
        if self.choice is None:
            return "TF-IDF"
        return f"layer {self.choice[0]} {self.choice[1]}" + (" ordinal" if self.is_ordinal else "")


@dataclass(frozen=True)
class FrozenFit:
    """A fitted classifier and what is known about it.

    Attributes:
        classifier: fitted to all texts.
        experts: those that it consists of, with their weights, which sum to 1. The temperature of
            the classifier is what calibrates it.
        rows: (M,), the training texts that cross-validation predicted: all, or MAX_ROWS of them.
        log_probs: (M, C), of these texts by heads that were not fitted to them, calibrated.
        accuracy: of these predictions.
        tfidf_accuracy: that of TF-IDF alone, with its best penalty.
        seconds: the whole took.
        shallow: the same of the best product of heads on the lower half of the layers, which stay
            valid where adapters change the upper ones; None if not fitted.
    """

    classifier: LlamaExpertsClassifier
    experts: Mapping[Expert, float]
    rows: NDArray[np.int64]
    log_probs: Matrix
    accuracy: float
    tfidf_accuracy: float
    seconds: float
    shallow: "Shallow | None"


class Shallow(NamedTuple):
    """A fitted classifier, and what it says of texts that it was not fitted to: (M, C)."""

    classifier: LlamaExpertsClassifier
    log_probs: Matrix


def fit_frozen(
    reader: LlamaExpertsClassifier,
    texts: Sequence[str],
    labels: Sequence[int],
    task: Task,
    *,
    folds: Folds | None = None,
    words: Mapping[float, Matrix] | None = None,
    label_words: Sequence[str] | None = None,
    with_shallow: bool = False,
    progress: Callable[[int], None] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> FrozenFit:
    """Choose experts by cross-validation, and fit them to all texts.

    Args:
        reader: its Llama, prompt and labels are used.
        texts, labels: N training texts and their classes.
        task: what the labels are; not for several labels a text.
        folds: rows that are left out together, each row in one; None for five stratified ones.
            With more than MAX_ROWS texts only the rows of the folds take part in comparisons.
        words: `tfidf.out_of_fold_logits` of these texts and folds; None to compute it.
        label_words: that stand for the labels after the prompt, and are one more expert; None
            where the labels are no words.
        with_shallow: fit heads on the lower half of the layers as well.
        progress: receives the number of texts just completed.
        report: receives messages about the choice.

    Raises:
        MinllamaError: a text cannot be read, or scikit-learn is missing.
    """
    assert not task.multi_label
    started = time.perf_counter()
    gold = task.target(labels)
    folds = _some_folds(gold, task.seed) if folds is None else folds
    rows = np.sort(np.concatenate(list(folds)))
    label_weights = None if label_words is None else label_rows(reader, label_words)
    search = _Search(reader, texts, gold, task, label_weights, progress, words)
    product = search.product(folds, rows)
    with single_threaded_fits():
        classifier = search.fitted(product.weights)
        shallow = search.fitted_shallow() if with_shallow else None
    total = sum(product.weights.values())
    shares = {expert: weight / total for expert, weight in product.weights.items()}
    right = product.log_probs.argmax(1) == gold[rows].argmax(1)
    found = FrozenFit(
        classifier,
        shares,
        rows,
        product.log_probs,
        float(right.mean()),
        search.tfidf_accuracy,
        time.perf_counter() - started,
        shallow,
    )
    report(_message(found))
    return found


def _some_folds(gold: NDArray[np.bool_], seed: int) -> Folds:
    """Five stratified folds of all rows, or of MAX_ROWS of them."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(gold))[:MAX_ROWS])
    return [rows[fold] for fold in stratified_folds(gold[rows], seed)]


def _message(found: FrozenFit) -> str:
    """What was fitted: experts with their shares; of many that count alike, how many there are."""
    shares, classifier = found.experts, found.classifier
    n_heads = sum(e.choice is not None and not e.is_label_words for e in shares)
    if n_heads > MOST_EXPERTS:
        others = [str(e) for e in shares if e.choice is None or e.is_label_words]
        named = ", ".join([f"{n_heads} heads that count alike", *others])
    else:
        named = ", ".join(f"{expert} x {share:.3g}" for expert, share in shares.items())
    return (
        f"{named}; {classifier.n_layers} of {classifier.llama.config.n_layers} layers: accuracy "
        f"{found.accuracy:.3f} in cross-validation on {len(found.rows):,} training texts, where "
        f"TF-IDF alone has {found.tfidf_accuracy:.3f}"
    )


class _Search:
    """Training texts and the features of them that are known."""

    def __init__(
        self,
        reader: LlamaExpertsClassifier,
        texts: Sequence[str],
        gold: NDArray[np.bool_],
        task: Task,
        label_rows: NDArray[np.float32] | None,
        progress: Callable[[int], None] | None = None,
        words: Mapping[float, Matrix] | None = None,
    ) -> None:
        self._reader, self._texts, self._gold, self._task = reader, texts, gold, task
        self._label_rows, self._progress, self._words = label_rows, progress, words
        self._features: Features = {}  # of all texts
        self.tfidf_accuracy = 0.0
        self.shallow: Product[Expert]  # of heads on the lower half of the layers

    def product(self, folds: Folds, rows: NDArray[np.int64]) -> Product[Expert]:
        """The best product of experts for the rows of the folds, in their order."""
        n_texts, choices = len(self._texts), candidates(self._reader.llama.config.n_layers)
        if n_texts > SEARCH_TEXTS:
            choices = self._searched(choices)
        self._features = self._read(range(n_texts), choices)
        kinds = self._kinds(
            SEARCH_SHRINKAGES if n_texts <= SEARCH_TEXTS else discriminant.SHRINKAGES
        )

        def chosen() -> tuple[Product[Expert], Product[Expert], float]:
            logits = self._logits(self._features, folds, kinds)
            best = self._best({expert: found[rows] for expert, found in logits.items()}, rows)
            return best, self.shallow, self.tfidf_accuracy

        best, self.shallow, self.tfidf_accuracy = current().first(chosen)
        return best

    def _searched(self, choices: Sequence[Choice]) -> list[Choice]:
        """The choices that a part of the texts finds to be worth reading."""
        order = np.random.default_rng(self._task.seed + 1).permutation(len(self._texts))
        part = np.sort(order[:SEARCH_TEXTS])
        features = self._read(part, choices)
        texts = [self._texts[i] for i in part]
        gold = self._gold[part]
        search = _Search(self._reader, texts, gold, self._task, self._label_rows)
        folds = stratified_folds(gold, self._task.seed)

        def found() -> list[Choice]:
            logits = search._logits(features, folds, self._kinds(SEARCH_SHRINKAGES))
            best = search._best(logits, np.arange(len(part)))
            experts = (*best.weights, *search.shallow.weights)
            return list(dict.fromkeys(e.choice for e in experts if e.choice is not None))

        return current().first(found)

    def _read(self, rows: Sequence[int] | NDArray[np.int64], choices: Sequence[Choice]) -> Features:
        if not choices:
            return {}
        texts = [self._texts[i] for i in rows]
        return extract_features(self._reader, texts, choices, progress=self._progress)

    def _kinds(self, shrinkages: Sequence[float]) -> list[HeadKind]:
        """The heads that are tried on each choice; of a few rows, which count alike, no ordinal."""
        kinds = [HeadKind(shrinkage) for shrinkage in shrinkages]
        may_be_ordered = FEWEST_ORDERED <= self._task.n_classes <= MOST_ORDERED
        if may_be_ordered and len(self._gold) >= FEW_ROWS:
            kinds.append(HeadKind(ORDINAL_SHRINKAGE, is_ordinal=True))
        return kinds

    def _logits(
        self, features: Features, folds: Folds, kinds: Sequence[HeadKind]
    ) -> dict[Expert, Matrix]:
        """Logits (N, C) of each expert for texts that it was not fitted to."""
        gold, task = self._gold, self._task
        with parallel_fits() as pool:
            words = self._words
            if words is None:
                texts = self._read_texts()
                by_words = pool.submit(tfidf.out_of_fold_logits, texts, gold, task, folds)
            by_choice = {
                choice: pool.submit(
                    discriminant.out_of_fold_logits, vectors, gold, task, folds, kinds
                )
                for choice, vectors in features.items()
            }
            found = {
                Expert(choice, kind.shrinkage, is_ordinal=kind.is_ordinal): logits
                for choice, part in by_choice.items()
                for kind, logits in part.result().items()
            }
            words = by_words.result() if words is None else words
        found |= {Expert(None, c): logits for c, logits in words.items()}
        top = self._reader.llama.config.n_layers, "last"
        if self._label_rows is not None and top in features:
            weight, bias = label_head(features[top], self._label_rows)
            found[Expert(top, 0.0, True)] = (features[top] @ weight.T + bias).astype(np.float64)
        return found

    def _read_texts(self) -> list[str]:
        """What words are taken from: the part of each text that the Llama reads, too."""
        return [self._reader.encode(text).text or "" for text in self._texts]

    def _best(self, logits: Mapping[Expert, Matrix], rows: NDArray[np.int64]) -> Product[Expert]:
        """The product of the shallowest layers that is not clearly worse than that of all."""
        gold = self._gold[rows].argmax(1)
        alone = [found for expert, found in logits.items() if expert.choice is None]
        self.tfidf_accuracy = max(float((z.argmax(1) == gold).mean()) for z in alone)
        n_layers = self._reader.llama.config.n_layers

        def below(depth: float) -> Product[Expert]:
            some = {e: z for e, z in logits.items() if e.layer <= depth * n_layers}
            return choose_experts(some, gold)

        self.shallow = below(DEPTHS[0])
        if len(gold) < FEW_ROWS:  # of many experts some are better on these by chance
            return even_product(logits, groups(logits), gold)
        products = [self.shallow, *map(below, DEPTHS[1:])]
        best = min(products, key=lambda product: product.loss)
        return next(p for p in products if not is_clearly_better(best.losses, p.losses))

    def fitted(self, weights: Mapping[Expert, float]) -> LlamaExpertsClassifier:
        """A classifier of these experts with their weights, fitted to all texts.

        Its heads have the weights' shares, and the temperature has their sum.
        """
        total = sum(weights.values())
        classifier = self._fitted({expert: weight / total for expert, weight in weights.items()})
        classifier.temperature = 1 / total
        return classifier

    def fitted_shallow(self) -> Shallow:
        """The best product of heads on the lower half of the layers."""
        return Shallow(self.fitted(self.shallow.weights), self.shallow.log_probs)

    def _fitted(self, weights_of: Mapping[Expert, float]) -> LlamaExpertsClassifier:
        reader = self._reader
        choices, model, weight, bias = current().first(lambda: self._fitted_heads(weights_of))
        classifier = LlamaExpertsClassifier(
            *(reader.llama, reader.tokenizer, reader.labels, choices),
            tfidf=model,
            prompt=reader.prompt,
        )
        classifier.shortened |= reader.shortened
        if weight is not None:
            classifier.score.weight.data.copy_(torch.from_numpy(weight))
            classifier.score.bias.data.copy_(torch.from_numpy(bias))
        return classifier

    def _fitted_heads(self, weights_of: Mapping[Expert, float]) -> "_Heads":
        gold, task = self._gold, self._task
        of_choice: dict[Choice, list[tuple[HeadKind, float]]] = {}
        model: tfidf.TfidfModel | None = None
        for expert, weight in weights_of.items():
            if expert.choice is not None:
                heads = of_choice.setdefault(expert.choice, [])
                if not expert.is_label_words:
                    heads.append((HeadKind(expert.strength, expert.is_ordinal), weight))
        words = {e.strength: w for e, w in weights_of.items() if e.choice is None}
        if words:
            texts = self._read_texts()
            models = [
                scaled(tfidf.fit_tfidf(texts, gold, task, inverse), weight)
                for inverse, weight in words.items()
            ]
            model = sum_of(models)
        weights, bias = [], np.zeros(gold.shape[1], dtype=np.float64)
        for choice, heads in of_choice.items():
            features, parts = self._features[choice], []
            if heads:
                fitted = Discriminant(features, gold, task)
                parts += [(weight, *fitted.head(kind)) for kind, weight in heads]
            if (label_words := Expert(choice, 0.0, True)) in weights_of:
                assert self._label_rows is not None
                parts.append((weights_of[label_words], *label_head(features, self._label_rows)))
            weights.append(sum(factor * w for factor, w, _ in parts))
            bias += sum(factor * b for factor, _, b in parts)
        matrix = np.concatenate(weights, axis=1).astype(np.float32) if weights else None
        return _Heads(list(of_choice), model, matrix, bias.astype(np.float32))


class _Heads(NamedTuple):
    """What a classifier is made of: its choices, TF-IDF, weight (C, K D) and bias (C,)."""

    choices: list[Choice]
    tfidf: tfidf.TfidfModel | None
    weight: NDArray[np.float32] | None
    bias: NDArray[np.float32]


def groups(experts: Iterable[Expert]) -> list[list[list[Expert]]]:
    """Experts that count alike: all heads of one shrinkage, TF-IDF, and label words."""
    heads: dict[float, list[Expert]] = {}
    words, labels = list[list[Expert]](), list[list[Expert]]()
    for expert in experts:
        if expert.is_label_words:
            labels.append([expert])
        elif expert.choice is None:
            words.append([expert])
        else:
            heads.setdefault(expert.strength, []).append(expert)
    return [group for group in (list(heads.values()), words, labels) if group]


def sum_of(models: Sequence[tfidf.TfidfModel]) -> tfidf.TfidfModel:
    """One model with the sum of the logits of models with the same vocabulary."""
    weight = sum(model.weight for model in models)
    bias = sum(model.bias for model in models)
    total = tfidf.TfidfModel(models[0].vocabulary, np.asarray(weight), np.asarray(bias))
    return scaled(total, 1.0)


def candidates(n_layers: int) -> list[Choice]:
    """Layers, evenly over the stack, and poolings; a last token has read enough past its half."""
    layers = sorted({max(1, round(n_layers * i / N_LAYERS)) for i in range(1, N_LAYERS + 1)})
    means: tuple[Pooling, ...] = ("mean", "weighted-mean")
    found: list[Choice] = [(layer, pooling) for layer in layers for pooling in means]
    return found + [(layer, "last") for layer in layers if 2 * layer > n_layers]
