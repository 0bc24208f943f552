"""Build the frozen classifier of an experiment that reads several layers, and words beside them.

`minllama.experiment.train` calls it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from minllama.classification.experts import LlamaExpertsClassifier
from minllama.classification.frozen import fit_frozen
from minllama.classification.label_words import words_of_labels
from minllama.data import Dataset
from minllama.data.task import Task
from minllama.experiment.build import label_words_of
from minllama.experiment.experiment import Experiment
from minllama.experiment.reporter import Reporter
from minllama.experiment.splits import Splits
from minllama.model.llama import Llama
from minllama.options import ClassifierOptions, PromptOptions
from minllama.tokenizer.tokenizer import Tokenizer

# The last token's state is then what the text amounts to (Jiang et al. 2024, sec. 3.1), and label
# words follow. Chosen on training rows, of eight (docs/benchmarks.md).
FRAME = 'This text: "{text}" means in one word: "'
FEWEST_ROWS = 8  # of which folds say something
FEWEST_OF_A_CLASS = 2  # so that a class is not unknown to the fold that has its only row


def reads_experts(train: Dataset, options: ClassifierOptions) -> bool:
    """Whether a frozen classifier reads several layers, and words beside them.

    It has one head where a layer or a pooling is selected, a text has several labels or a number,
    or there are too few texts to choose by.
    """
    if options.method != "frozen" or train.multi_label or train.has_numbers:
        return False
    if options.layer != "auto" or options.pooling != "auto" or len(train) < FEWEST_ROWS:
        return False
    counts = [0] * len(train.label_names)
    for label in cast(Sequence[int], train.labels):
        counts[label] += 1
    return min(counts) >= FEWEST_OF_A_CLASS


def in_frame(prompt: PromptOptions) -> PromptOptions:
    """The prompt of several heads where none is given."""
    return prompt if prompt.prompt or prompt.chat else replace(prompt, prompt=FRAME)


def label_words(options: ClassifierOptions, labels: Sequence[str]) -> Sequence[str] | None:
    """Words that stand for the labels after a prompt: given ones, or their names; None without.

    Raises:
        MinllamaError: the option gives words for other labels.
    """
    if options.label_words is not None:
        return label_words_of(options.label_words, labels)
    words = words_of_labels(labels)
    return None if words is None else [words[label] for label in labels]


def make_experts(
    experiment: Experiment,
    splits: Splits,
    llama: Llama,
    tokenizer: Tokenizer,
    reporter: Reporter,
) -> LlamaExpertsClassifier:
    """The product of experts that cross-validation on the training texts chooses."""
    training, train = experiment.training, splits.train
    prompt = in_frame(experiment.prompt)
    reader = LlamaExpertsClassifier(llama, tokenizer, train.label_names, (), prompt=prompt)
    task = Task.of(train, balanced=training.class_weights == "balanced", seed=training.seed)
    found = fit_frozen(
        reader,
        train.texts,
        cast(Sequence[int], train.labels),
        task,
        label_words=label_words(experiment.classifier, train.label_names),
        progress=reporter.advance("reading the training texts", len(train)),
        report=reporter.message,
    )
    return found.classifier
