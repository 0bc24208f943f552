"""Which options take effect with which method and objective; refuses options without effect."""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from minllama.distributed.sharding import check_parallel
from minllama.errors import OptionError
from minllama.experiment.build import AUTO, TRAINED
from minllama.experiment.experiment import Experiment
from minllama.options import CORRECTED, LoRAOptions, TrainingOptions, ZeroShotOptions, names_of
from minllama.options.evaluation import ReportOptions, ThresholdOptions
from minllama.options.ladder import LadderOptions


class Use(NamedTuple):
    """The purpose of some options.

    Attributes:
        names: of the options.
        purpose: in command-line terms.
        applies: whether it applies to an experiment.
    """

    names: tuple[str, ...]
    purpose: str
    applies: Callable[[Experiment], bool]


def check_uses(experiment: Experiment, given: Collection[str] | None = None) -> None:
    """Refuse options that would change nothing, all of them in one line.

    Args:
        experiment: with all its options.
        given: names of the options given; None for those that differ from their defaults.

    Raises:
        OptionError: lists each with its purpose.
    """
    chosen = set(_changed(experiment) if given is None else given)
    unused: dict[str, list[str]] = {}
    for use in USES:
        unused_here = [name for name in use.names if name in chosen]
        if unused_here and not use.applies(experiment):
            unused.setdefault(use.purpose, []).extend(
                "--" + n.replace("_", "-") for n in unused_here
            )
            chosen -= set(unused_here)  # the first reason is enough
    if not unused:
        return
    options = experiment.classifier
    is_stated = options.method in (*TRAINED, AUTO) or options.objective == "regression"
    objective = f" --objective {options.objective}" if is_stated else ""
    reasons = (f"{', '.join(flags)} (for {purpose})" for purpose, flags in unused.items())
    raise OptionError(
        f"--method {options.method}{objective} does not use {', '.join(reasons)}; omit these "
        "options, or choose a method that uses them"
    )


def check_processes(experiment: Experiment, size: int) -> None:
    """Refuse what several processes cannot do together.

    Args:
        experiment: with all its options.
        size: the number of processes.

    Raises:
        OptionError: says what to do instead.
    """
    check_parallel(experiment.training.parallel, size)
    if size == 1:
        return
    if _is_auto(experiment):
        raise OptionError(
            f"--method auto chooses by the time that methods take, in one process; with {size}, "
            "give --method frozen, lora, full or zero-shot"
        )
    if "-" in (experiment.train, experiment.dev, experiment.test):
        raise OptionError(
            f"{size} processes cannot all read standard input; name a file that all can read"
        )


def _changed(experiment: Experiment) -> Iterator[str]:
    groups = experiment.classifier, experiment.ladder, experiment.lora, experiment.training
    for group in (*groups, experiment.threshold, experiment.report):
        for field in dataclasses.fields(group):
            if getattr(group, field.name) != field.default:
                yield field.name


def _is_trained(experiment: Experiment) -> bool:
    return experiment.classifier.method in TRAINED


def _is_auto(experiment: Experiment) -> bool:
    return experiment.classifier.method == AUTO


def _may_be_trained(experiment: Experiment) -> bool:
    return _is_trained(experiment) or _is_auto(experiment)


def _has_words(experiment: Experiment) -> bool:
    options = experiment.classifier
    return options.method == "zero-shot" or options.objective == "label-words"


def _may_have_words(experiment: Experiment) -> bool:
    return _has_words(experiment) or (_is_auto(experiment) and _has_classes(experiment))


def _trains_head(experiment: Experiment) -> bool:
    return _may_be_trained(experiment) and not _has_words(experiment)


def _has_classes(experiment: Experiment) -> bool:
    return experiment.classifier.objective != "regression"


OF_HEADS = ("layer", "pooling")
OF_CLASSES = (
    *("class_weights", "ordinal", "per_class", "no_calibration"),
    *names_of(ThresholdOptions),
    *names_of(ReportOptions),
)
USED_WITHOUT_STEPS = ("class_weights", "seed")  # for fitting heads, and for all random draws
# With auto, dev compares rungs, so it selects no weights within one; and there is one process.
OF_LONG_RUNS = ("patience", "keep", "evals_per_epoch", "tensorboard", "parallel")

USES = (
    Use(names_of(LadderOptions), "--method auto", _is_auto),
    Use(OF_LONG_RUNS, "--method lora or full", lambda experiment: not _is_auto(experiment)),
    Use(
        names_of(ZeroShotOptions),
        "--method zero-shot or --objective label-words",
        _may_have_words,
    ),
    Use(
        ("prior_strength",),
        f"--score {', '.join(CORRECTED[:-1])} or {CORRECTED[-1]}",
        lambda experiment: experiment.classifier.score in CORRECTED,
    ),
    Use(
        ("objective",),
        "--method lora or full",
        lambda experiment: (
            experiment.classifier.method != "zero-shot"
            or experiment.classifier.objective == "label-words"  # zero-shot implies label words
        ),
    ),
    Use(OF_CLASSES, "classes: without --objective regression", _has_classes),
    Use(
        OF_HEADS,
        "heads: --method frozen, or lora or full with --objective head",
        lambda experiment: not _has_words(experiment),
    ),
    Use(
        ("dropout", "head_lr"),
        "--method lora or full with --objective head",
        _trains_head,
    ),
    Use(
        ("dev_fraction",),
        "a run without --dev",
        lambda experiment: experiment.dev is None,
    ),
    Use(
        ("class_weights",),
        "--method frozen, lora or full",
        lambda experiment: experiment.classifier.method != "zero-shot",
    ),
    Use(
        ("metric",),
        "--keep best or --patience",
        lambda e: not _is_trained(e) or e.training.keep == "best" or e.training.patience > 0,
    ),
    Use(
        tuple(name for name in names_of(TrainingOptions) if name not in USED_WITHOUT_STEPS),
        "--method lora or full",
        _may_be_trained,
    ),
    Use(
        names_of(LoRAOptions),
        "--method lora",
        lambda experiment: experiment.classifier.method in ("lora", AUTO),
    ),
)
