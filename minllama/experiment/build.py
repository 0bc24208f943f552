"""Build and train a classifier, by method and objective."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from minllama.atomic import atomic_file
from minllama.classification import LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from minllama.classification.base import Classifier
from minllama.classification.embedding import check_layer
from minllama.classification.features import (
    MAX_ROWS,
    Features,
    candidate_choices,
    extract_features,
)
from minllama.classification.zero_shot import Score
from minllama.data import Dataset, sample_balanced
from minllama.data.label_names import checked_names, names_of_option, words_by_label
from minllama.distributed.ranks import current
from minllama.engine.states import Choice, Pooling
from minllama.errors import CheckpointError, OptionError
from minllama.experiment.heads import HeadFitting, Reading, Selected, head_fitting, random_order
from minllama.experiment.reporter import Reporter
from minllama.lora import add_lora_wrapper
from minllama.model.llama import Llama
from minllama.options import (
    VALUE_METRICS,
    ClassifierOptions,
    LoRAOptions,
    PromptOptions,
    TrainingOptions,
    ZeroShotOptions,
)
from minllama.options.training import EPOCHS
from minllama.text import listed, shown
from minllama.tokenizer.tokenizer import Tokenizer

AUTO = "auto"  # the method that tries others
TRAINED = ("lora", "full")  # methods that train with gradients
# By method: adapters start from zero and tolerate higher rates than pretrained weights.
LEARNING_RATES = {"lora": 3e-4, "full": 2e-5}
HEAD_LEARNING_RATE = 1e-3
PRIOR_TEXTS = 500  # unlabelled training texts from which the score `batch` learns
# Texts on which a run that trains more than a head chooses its layer and where its head starts.
STARTING_TEXTS = 3000
# Training adapts layers: a few more than those with the best frozen features.
LAYERS_TO_LEARN = 7  # divides n_layers: 4 of 30
LAYER_FILE = "layer.json"


def label_words_of(text: str | None, labels: Sequence[str]) -> tuple[str, ...]:
    """The words of `--label-words` in the order of the labels.

    Args:
        text: separated by commas and quoted as in CSV, a JSON list, or a JSON object {label: word}.
        labels: the names of the classes.

    Raises:
        OptionError: there are not as many as labels, or they are not strings.
    """
    if text is None:
        return tuple(labels)
    label_words = words_by_label(text)
    if label_words is not None:
        if set(label_words) != set(labels):
            raise OptionError(
                f"label_words has words for {listed(label_words)}, but the labels are "
                f"{listed(labels)}; give a word for each of them"
            )
        where = f"label_words {shown(text)}"
        return tuple(checked_names([label_words[label].strip() for label in labels], where))
    words = tuple(names_of_option(text, "label_words"))
    if len(words) != len(labels):
        raise OptionError(
            f"label_words has {len(words)} words ({', '.join(words)}) for {len(labels)} labels "
            f"({', '.join(labels)}); give one per label, in this order"
        )
    return words


def make_zero_shot(
    llama: Llama,
    tokenizer: Tokenizer,
    labels: Sequence[str],
    prompt: PromptOptions,
    options: ZeroShotOptions,
    *,
    train: Dataset | None = None,
    seed: int = 0,
) -> LlamaZeroShotClassifier:
    """A zero-shot classifier, with examples and prior from training texts if needed.

    Raises:
        MinllamaError: options contradict one another, or need a training file that is missing.
    """
    words = label_words_of(options.label_words, labels)
    shots: list[tuple[str, str]] = []
    if options.shots:
        if train is None:
            raise OptionError("shots need a training file")
        drawn = sample_balanced(train, options.shots, seed)
        shots = [
            (text, words[label])
            for text, label in zip(drawn.texts, cast(Sequence[int], drawn.labels), strict=True)
        ]
    classifier = LlamaZeroShotClassifier(
        llama,
        tokenizer,
        labels,
        prompt,
        label_words=words,
        score=cast(Score, options.score),
        prior_strength=options.prior_strength,
        shots=shots,
    )
    if train is not None:
        shown = {text for text, _ in shots}  # whose prompts would contain their own answer
        texts = sample_texts(train, PRIOR_TEXTS, seed)
        classifier.fit_prior([text for text in texts if text not in shown] or texts)
    return classifier


def without_shots(train: Dataset, shots: Sequence[tuple[str, str]]) -> Dataset:
    """The training texts without the examples in prompts, whose answers would be copied.

    Raises:
        OptionError: nothing is.
    """
    if not shots:
        return train
    shown = {text for text, _ in shots}
    rows = [i for i, text in enumerate(train.texts) if text not in shown]
    if not rows:
        raise OptionError(
            f"{train.source}: all texts are shown in prompts, so none is left to train on; use "
            "fewer shots"
        )
    return replace(train.select(rows), notices=train.notices)


def sample_texts(dataset: Dataset, n: int, seed: int) -> list[str]:
    """Up to `n` texts, drawn without regard to their labels."""
    return [dataset.texts[i] for i in sorted(random_order(dataset, seed)[:n])]


def make_head(
    llama: Llama,
    tokenizer: Tokenizer,
    train: Dataset,
    prompt: PromptOptions,
    options: ClassifierOptions,
    *,
    balanced: bool,
    seed: int,
    reporter: Reporter,
    folder: Path | None = None,
) -> LlamaEmbeddingClassifier:
    """A classifier with a head fitted on frozen features, on the best layer if requested.

    For `frozen` that is all; `lora` and `full` continue from there: a fitted head keeps the first
    gradients from distorting good features (Kumar et al. 2022).

    Args:
        balanced: classes have equal weight in the fit.
        seed: of folds and draws.
        reporter: receives messages about progress and choices.
        folder: of a resumable run: the choice is written there, and read if it exists. The head is
            then not fitted again: the run's checkpoint has it.
    """
    fitting = head_fitting(train, balanced=balanced, seed=seed)

    def built(choice: Choice) -> LlamaEmbeddingClassifier:
        layer, pooling = choice
        return LlamaEmbeddingClassifier(
            llama,
            tokenizer,
            pooling=pooling,
            layer=layer,
            dropout=options.dropout,
            prompt=prompt,
            **fitting.head(llama, choice),
        )

    ranks = current()
    if folder is not None and (known := ranks.first(lambda: _read_choice(folder))):
        return built(known)
    classifier = _fitted(built, llama, fitting, train, options, reporter)
    if folder is not None:
        choice = classifier.layer, classifier.pooling
        ranks.first(lambda: _write_choice(folder, choice))
    return classifier


def _fitted(
    built: Callable[[Choice], LlamaEmbeddingClassifier],
    llama: Llama,
    fitting: HeadFitting,
    train: Dataset,
    options: ClassifierOptions,
    reporter: Reporter,
) -> LlamaEmbeddingClassifier:
    """A classifier on the layer and pooling that are best on training texts, its head fitted."""
    is_final = options.method == "frozen"
    grows = options.layer == "auto" and not is_final
    some = train.select(fitting.some_rows(MAX_ROWS if is_final else STARTING_TEXTS))
    reader = built(choices_of(llama, options)[0])
    report = reporter.advance("reading the training texts", len(some))
    by = Reading(reader, report, reporter.message)
    features, selected = _selected(fitting, some, by, options, grows=grows)
    reporter.message(_in_words(selected, llama))
    choice = with_more_layers(selected.choice, llama) if grows else selected.choice
    if grows:
        reporter.message(f"training with {choice[0]} layers")
    classifier = built(choice)
    if is_final and len(some) < len(train):
        report = reporter.advance("reading all of them", len(train))
        some, features = train, extract_features(classifier, train.texts, [choice], progress=report)
    has_bias = classifier.score.bias is not None
    fitted = current().first(
        lambda: fitting.fit(features[choice], some, selected.penalty, bias=has_bias)
    )
    fitted.put_into(classifier.score)
    classifier.shortened |= reader.shortened
    return classifier


def _in_words(selected: Selected, llama: Llama) -> str:
    (layer, pooling), penalty = selected.choice, selected.penalty
    return (
        f"layer {layer} of {llama.config.n_layers}, {pooling}, penalty {penalty:g}: "
        f"{selected.merit}"
    )


def _selected(
    fitting: HeadFitting, some: Dataset, by: Reading, options: ClassifierOptions, *, grows: bool
) -> tuple[Features, Selected]:
    """The features of some texts, and the best choice for them.

    Args:
        fitting: compares the choices.
        some: the texts.
        by: how they are read.
        options: limit the choice.
        grows: layers may be added to the best one.
    """
    llama = by.reader.llama
    choices = choices_of(llama, options)
    if options.method == "frozen":
        features = fitting.read(some, choices, by)
    else:  # STARTING_TEXTS are too few for a layer search
        later = [with_more_layers(choice, llama) for choice in choices] if grows else []
        read = {*choices, *later}
        features = extract_features(by.reader, some.texts, read, progress=by.progress)
    compared = {choice: features[choice] for choice in choices if choice in features}
    return features, current().first(lambda: fitting.select(compared, some))


def with_more_layers(choice: Choice, llama: Llama) -> Choice:
    """The choice for a run that trains the layers of its features."""
    layer, pooling = choice
    n_layers = llama.config.n_layers
    return min(n_layers, layer + n_layers // LAYERS_TO_LEARN), pooling


def choices_of(llama: Llama, options: ClassifierOptions) -> list[Choice]:
    """The layers and poolings to compare."""
    pooling = None if options.pooling == "auto" else cast(Pooling, options.pooling)
    choices = candidate_choices(llama.config.n_layers, pooling)
    if options.layer == "auto":
        return choices
    layer = check_layer(llama, None if options.layer == "all" else int(options.layer))
    return sorted({(layer, pooling) for _, pooling in choices})


def most_layers(llama: Llama, options: ClassifierOptions) -> int:
    """An upper bound on the layers that a classifier will run, before the choice."""
    if options.objective == "label-words":
        return llama.config.n_layers
    deepest = max(choices_of(llama, options))
    return (with_more_layers(deepest, llama) if options.layer == "auto" else deepest)[0]


def _read_choice(folder: Path) -> Choice | None:
    path = folder / LAYER_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        return int(content["layer"]), cast(Pooling, str(content["pooling"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); start again with --force") from error


def _write_choice(folder: Path, choice: Choice) -> None:
    with atomic_file(folder / LAYER_FILE) as path:
        path.write_text(json.dumps({"layer": choice[0], "pooling": choice[1]}) + "\n")


def make_trainable(
    classifier: Classifier, method: str, lora: LoRAOptions, *, first_layer: int = 0
) -> list[str]:
    """Enable gradients for exactly the parameters that the method trains.

    Returns:
        The names of the LoRA layers; empty for `full`.
    """
    llama = classifier.llama
    if method == "full":
        llama.requires_grad_(True)
        for layer in llama.layers[classifier.n_layers :]:
            layer.requires_grad_(False)
        # Layers that do not run get no gradients, and would only enlarge checkpoints.
        if classifier.n_layers < len(llama.layers):
            llama.norm.requires_grad_(False)
        if not classifier.reads_output and llama.output is not None:
            llama.output.requires_grad_(False)
        return []
    return add_lora_wrapper(
        llama,
        lora.target_modules,
        lora.r,
        lora.lora_alpha,
        lora.lora_dropout,
        lora.use_rslora,
        lora.use_dora,
        layers_to_transform=range(first_layer, classifier.n_layers),
    )


def training_options(
    options: TrainingOptions, method: str, *, regression: bool = False
) -> TrainingOptions:
    """The options with the default epochs, learning rates and metric of method and objective."""
    changes: dict[str, Any] = {}
    if regression and options.metric == TrainingOptions.metric:
        changes["metric"] = VALUE_METRICS[0]
    if options.lr is None:
        changes["lr"] = LEARNING_RATES[method]
    if options.head_lr is None:
        changes["head_lr"] = HEAD_LEARNING_RATE
    if options.epochs is None:
        changes["epochs"] = EPOCHS
    return replace(options, **changes)
