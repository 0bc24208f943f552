"""Train and evaluate a classifier from files of labeled texts, as the commands do.

`splits` reads and checks the data, `build` creates and trains the classifier, `evaluate` compares
it with baselines, `option_rules` decides which options take effect, and `train` runs all of it.
Nothing here parses arguments or prints.
"""

from minllama.experiment.evaluate import evaluate_classifier
from minllama.experiment.experiment import Experiment
from minllama.experiment.option_rules import check_uses
from minllama.experiment.reporter import Reporter
from minllama.experiment.splits import Splits, load_splits
from minllama.experiment.train import Outcome, check_libraries, run_experiment

__all__ = [
    "Experiment",
    "Outcome",
    "Reporter",
    "Splits",
    "check_libraries",
    "check_uses",
    "evaluate_classifier",
    "load_splits",
    "run_experiment",
]
