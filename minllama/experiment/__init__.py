"""From files of labeled texts to an evaluated classifier in a folder: what the doors call.

`splits` reads and checks the data, `fitting` makes and trains the classifier, `measuring`
evaluates it beside its baselines, `uses` tells which options take effect, `run` does all of it.
Nothing here parses arguments or prints.
"""

from minllama.experiment.evaluate import evaluate_classifier
from minllama.experiment.option_rules import check_uses
from minllama.experiment.reporter import Say
from minllama.experiment.splits import Splits, load_splits
from minllama.experiment.train import Experiment, Outcome, check_libraries, run_experiment

__all__ = [
    "Experiment",
    "Outcome",
    "Say",
    "Splits",
    "check_libraries",
    "check_uses",
    "evaluate_classifier",
    "load_splits",
    "run_experiment",
]
