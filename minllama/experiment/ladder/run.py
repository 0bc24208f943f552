"""Run the ladder of an experiment; `minllama.experiment.train` calls it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from minllama.experiment.experiment import Experiment
from minllama.experiment.frozen import in_frame
from minllama.experiment.ladder.budget import Budget
from minllama.experiment.ladder.climb import Climbed, climb
from minllama.experiment.ladder.rung import Context
from minllama.experiment.ladder.scoring import scoring_of
from minllama.experiment.ladder.state import LADDER
from minllama.experiment.reporter import Reporter
from minllama.experiment.splits import Splits
from minllama.model.llama import Llama
from minllama.tokenizer.tokenizer import Tokenizer

__all__ = ["Climbed", "run_ladder"]


def run_ladder(
    experiment: Experiment,
    splits: Splits,
    llama: Llama,
    tokenizer: Tokenizer,
    *,
    settings: dict[str, Any],
    budget: Budget,
    resume: bool,
    reporter: Reporter,
) -> Climbed:
    """Try what there is time for, and choose a classifier.

    Args:
        experiment: of the method auto.
        splits: its data; test is not looked at.
        llama, tokenizer: the base, without adapters.
        settings: that must be the same to resume.
        budget: of the run.
        resume: an interrupted run is resumed.
        reporter: receives messages.

    Raises:
        MinllamaError: anything that the user can fix.
    """
    context = Context(
        experiment,
        splits,
        llama,
        tokenizer,
        reporter,
        budget,
        Path(experiment.output) / LADDER,
        # A resumed run may have more time, and prefer something else.
        {name: value for name, value in settings.items() if name != "ladder"},
        scoring_of([splits.train, splits.dev], experiment.selecting_metric),
    )
    if context.reads_experts:  # all rungs then read the same prompts
        context.experiment = replace(experiment, prompt=in_frame(experiment.prompt))
    return climb(context, resume=resume)
