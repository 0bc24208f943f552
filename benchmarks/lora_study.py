"""Settings of LoRA compared on training rows of small public sets; docs/lora-study.md has results.

    python benchmarks/lora_study.py [--sets irony,banking] [--epochs 3] [--lr 1e-3] [--r 8]
        [--first-layer 15] [--layer 23] [--pooling last] [--dropout 0.1] [--lora-dropout 0]
        [--bidirectional] [--seed 0] [--results FILE]

Four fifths of a set's training rows are fitted to, the fifth left out is measured; test files are
not opened. A row of the result has LoRA alone, the frozen heads of all layers and of the lower
half, and their products, whose weights are fitted on other rows left out.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from suite import SETS, SUITE

from minllama.checkpoints.load import load_with
from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.weight_format import resolve_weight_format
from minllama.classification import LlamaEmbeddingClassifier, LlamaExpertsClassifier
from minllama.classification.features import FIRST_PENALTY, extract_features, stratified_folds
from minllama.classification.frozen import fit_frozen
from minllama.classification.products import log_softmax, weighted_product
from minllama.data import Dataset, load_dataset
from minllama.data.task import Task
from minllama.engine.states import Pooling
from minllama.experiment.build import make_trainable, training_options
from minllama.experiment.frozen import FRAME, label_words
from minllama.experiment.heads import head_fitting
from minllama.lora import remove_lora_wrapper
from minllama.model.llama import Llama
from minllama.options import (
    POOLINGS,
    ClassifierOptions,
    DataOptions,
    LoRAOptions,
    PromptOptions,
    TrainingOptions,
)
from minllama.options.loading import LoadOptions
from minllama.tokenizer.tokenizer import Tokenizer
from minllama.training.trainer import fit

Logits = NDArray[np.float64]
PARTS = 5  # of the rows left out, of which four fit a product's weights for the fifth


class Parts(NamedTuple):
    """Rows to fit, and rows that were left out."""

    fitted: Dataset
    left_out: Dataset


def main() -> None:
    options = _options()
    llama, tokenizer = _opened(causal=not options.bidirectional)
    for name in options.sets.split(","):
        file = SUITE / f"{name}-train.csv"
        if not file.is_file():
            print(f"{name}: left out, since {file} is not there")
            continue
        parts = _parts(load_dataset(str(file), DataOptions()))
        began = time.perf_counter()
        logits = {"lora": _lora(llama, tokenizer, parts, options)}
        seconds = time.perf_counter() - began
        if not options.bidirectional:
            logits |= _frozen(llama, tokenizer, parts)
        gold = np.asarray(parts.left_out.labels)
        row: dict[str, Any] = {"set": name, "rows": len(gold), "seconds": round(seconds)}
        row |= {system: _measured({system: z}, gold) for system, z in logits.items()}
        for frozen in ("frozen", "lower half"):
            if frozen in logits:
                both = {system: logits[system] for system in ("lora", frozen)}
                row[f"lora x {frozen}"] = _measured(both, gold)
        print(json.dumps(row), flush=True)
        if options.results is not None:
            with options.results.open("a") as lines:
                lines.write(json.dumps(row | {"options": _plain(options)}) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--first-layer", type=int, default=15)
    parser.add_argument("--layer", type=int, default=23, help="that the head reads")
    parser.add_argument("--pooling", choices=POOLINGS, default="last")
    parser.add_argument("--dropout", type=float, default=0.1, help="before the head")
    parser.add_argument("--lora-dropout", type=float, default=0.0)
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="a file of JSON lines to add to")
    return parser.parse_args()


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name != "results"}


def _opened(*, causal: bool) -> tuple[Llama, Tokenizer]:
    checkpoint = open_checkpoint(None).without_head()
    changes = {} if causal else {"causal": False}
    weights = resolve_weight_format(checkpoint, LoadOptions(), "read")
    llama = load_with(Llama, checkpoint, weights, **changes)
    return llama.requires_grad_(False), Tokenizer.from_checkpoint(checkpoint)


def _parts(rows: Dataset) -> Parts:
    left_out = stratified_folds(_task(rows).target(rows.labels or ()), 0)[0]
    fitted = np.setdiff1d(np.arange(len(rows)), left_out)
    return Parts(rows.select(fitted.tolist()), rows.select(left_out.tolist()))


def _task(rows: Dataset) -> Task:
    return Task.of(rows, seed=0)


def _lora(llama: Llama, tokenizer: Tokenizer, parts: Parts, options: argparse.Namespace) -> Logits:
    """Logits (N, C) of the rows left out, by adapters and a head that starts where it is fitted."""
    torch.manual_seed(options.seed)
    choice = options.layer, cast(Pooling, options.pooling)
    fitting = head_fitting(parts.fitted, balanced=False, seed=0)
    classifier = LlamaEmbeddingClassifier(
        *(llama, tokenizer),
        pooling=choice[1],
        layer=choice[0],
        dropout=options.dropout,
        prompt=PromptOptions(prompt=FRAME),
        **fitting.head(llama, choice),
    )
    vectors = extract_features(classifier, parts.fitted.texts, [choice])[choice]
    has_bias = classifier.score.bias is not None
    head = fitting.fit(vectors, parts.fitted, FIRST_PENALTY, bias=has_bias)
    head.put_into(classifier.score)
    adapters = LoRAOptions(r=options.r, lora_alpha=2 * options.r, lora_dropout=options.lora_dropout)
    make_trainable(classifier, "lora", adapters, first_layer=options.first_layer)
    given = TrainingOptions(epochs=options.epochs, lr=options.lr, keep="last", seed=options.seed)
    fit(
        classifier,
        parts.fitted,
        None,
        training_options(given, "lora"),
        head_parameters=list(classifier.score.parameters()),
    )
    logits = classifier.predict_logits(parts.left_out.texts).astype(np.float64)
    remove_lora_wrapper(llama, merge=False)
    llama.requires_grad_(False)
    return logits


def _frozen(llama: Llama, tokenizer: Tokenizer, parts: Parts) -> dict[str, Logits]:
    """Logits of the frozen heads, of all layers and of the lower half of them."""
    names = parts.fitted.label_names
    found = fit_frozen(
        LlamaExpertsClassifier(llama, tokenizer, names, (), prompt=FRAME),
        parts.fitted.texts,
        cast(Sequence[int], parts.fitted.labels),
        _task(parts.fitted),
        label_words=label_words(ClassifierOptions(method="frozen"), names),
        with_shallow=True,
    )
    assert found.shallow is not None
    classifiers = {"frozen": found.classifier, "lower half": found.shallow.classifier}
    texts = parts.left_out.texts
    return {name: one.predict_logits(texts).astype(np.float64) for name, one in classifiers.items()}


def _measured(systems: Mapping[str, Logits], gold: NDArray[np.int64]) -> list[float]:
    """Accuracy, and log-loss in nats, of the product of systems, each with a weight."""
    n, log_probs = len(gold), np.zeros_like(next(iter(systems.values())))
    for part in np.array_split(np.random.default_rng(1).permutation(n), PARTS):
        others = np.setdiff1d(np.arange(n), part)
        weights = weighted_product({k: z[others] for k, z in systems.items()}, gold[others]).weights
        mixed = sum(w * log_softmax(systems[name][part]) for name, w in weights.items())
        log_probs[part] = log_softmax(np.asarray(mixed))
    right = float((log_probs.argmax(1) == gold).mean())
    loss = float(-log_probs[np.arange(n), gold].mean())
    assert math.isfinite(loss)
    return [round(right, 4), round(loss, 4)]


if __name__ == "__main__":
    main()
