"""Build the frozen classifier of an experiment that reads several layers, and words beside them.

`minllama.experiment.train` calls it.
"""

from typing import cast

from minllama.classification.experts import LlamaExpertsClassifier
from minllama.classification.frozen import fit_frozen
from minllama.data import Dataset
from minllama.data.task import Task
from minllama.experiment.experiment import Experiment
from minllama.experiment.reporter import Reporter
from minllama.experiment.splits import Splits
from minllama.model.llama import Llama
from minllama.options import ClassifierOptions
from minllama.tokenizer.tokenizer import Tokenizer

FEWEST_ROWS = 20  # of which five folds say something
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
    for label in cast(list[int], train.labels):
        counts[label] += 1
    return min(counts) >= FEWEST_OF_A_CLASS


def make_experts(
    experiment: Experiment,
    splits: Splits,
    llama: Llama,
    tokenizer: Tokenizer,
    reporter: Reporter,
) -> LlamaExpertsClassifier:
    """The product of experts that cross-validation on the training texts chooses."""
    training, train = experiment.training, splits.train
    reader = LlamaExpertsClassifier(
        llama, tokenizer, train.label_names, (), prompt=experiment.prompt
    )
    task = Task.of(train, balanced=training.class_weights == "balanced", seed=training.seed)
    found = fit_frozen(
        reader,
        train.texts,
        cast(list[int], train.labels),
        task,
        progress=reporter.advance("reading the training texts", len(train)),
        report=reporter.message,
    )
    return found.classifier
