"""Options of classifiers: method, objective, how label words are scored, how texts are pooled."""

from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

from minllama.errors import OptionError
from minllama.options.base import CheckedOptions, Range, option

# The table of metrics is in a package above this one, and as light to import.
_registry = import_module("minllama.evaluation.registry")
CLASS_METRICS: tuple[str, ...] = _registry.selecting(regression=False)
VALUE_METRICS: tuple[str, ...] = _registry.selecting(regression=True)
HEADLINES: tuple[str, ...] = _registry.headlines()
METHODS = ("auto", "zero-shot", "frozen", "lora", "full")
OBJECTIVES = ("head", "label-words", "regression")
SCORES = ("sum", "token-mean", "byte-mean", "pmi", "contextual", "batch")
CORRECTED = ("pmi", "contextual", "batch")  # the scores that subtract a prior
POOLINGS = ("last", "mean", "weighted-mean")


@dataclass(frozen=True, kw_only=True)
class ZeroShotOptions(CheckedOptions):
    """How label words are scored; see `minllama.classification.zero_shot`."""

    group: ClassVar[str] = "Method"

    label_words: str | None = option(
        None,
        "words to score for the labels, in the labels' order, separated by commas (quote a word "
        "that contains a comma), or as JSON: a list, or {label: word}",
    )
    score: str = option(
        "sum",
        "score of a label: its log-probability (sum), that per token or byte (token-mean, "
        "byte-mean), or that minus the label's prior, estimated without a text (pmi), from "
        "content-free texts (contextual) or from texts of the task (batch)",
        choices=SCORES,
    )
    prior_strength: float = option(
        1.0,
        "fraction of the prior to subtract with pmi, contextual and batch",
        within=Range(0, 2),
    )
    shots: int = option(
        0,
        "number of training examples to show before each text, balanced over the classes",
        within=Range(0, 1000),
        group="Prompt",
    )


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(CheckedOptions):
    """Whether and how finely predictions are explained; see `minllama.classification.explain`."""

    group: ClassVar[str] = "Output"

    explain: bool = option(
        False,
        "show how much leaving out each word lowers the probability of the predicted label (or "
        "the predicted number); each word costs as much as another text",
    )
    max_words: int = option(
        100,
        "with --explain, the most words of a text to leave out one by one; in a longer text, "
        "neighboring words are left out together",
        within=Range(1, 10_000),
    )


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(ZeroShotOptions):
    """Which kind of classifier to train, and how; see `minllama.experiment`."""

    method: str = option(
        "auto",
        "what to train: nothing (zero-shot), a head on fixed features (frozen), low-rank "
        "adapters (lora), or all weights (full); auto tries what --minutes allows, and takes the "
        "best",
        choices=METHODS,
        common=True,
    )
    objective: str = option(
        "head",
        "what predicts: a new linear head, the scores of label words (best with few examples), "
        "or a head for numeric labels, trained on the mean squared error (regression)",
        choices=OBJECTIVES,
    )
    layer: str = option(
        "auto", "number of layers to run: an integer, all, or auto for the best in cross-validation"
    )
    pooling: str = option(
        "auto",
        "which hidden states form a text's vector: its last token's, or a mean over all tokens; "
        "auto for the best in cross-validation",
        choices=("auto", *POOLINGS),
    )
    dropout: float = option(
        0.1,
        "probability of zeroing an element of the text's vector during training",
        within=Range(0, 1),
    )
    bidirectional: bool = option(False, "let each token attend to later ones too; needs a head")
    dev_fraction: float | None = option(
        None,
        "fraction of the training file to hold out as dev split when there is no --dev (default a "
        "tenth, but at most 1,000 rows)",
        within=Range(0, 0.9, low_open=True),
        group="Data",
    )
    per_class: int = option(
        0,
        "train on at most this many examples of each class; 0 for all",
        within=Range(0),
        group="Data",
    )
    no_calibration: bool = option(False, "do not calibrate the probabilities")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer not in ("auto", "all") and not self.layer.isdecimal():
            raise OptionError(f"layer must be an integer, all or auto, not {self.layer!r}")
        if self.method == "auto" and self.objective == "label-words":
            object.__setattr__(self, "method", "lora")  # nothing else trains them as well
        if self.method == "frozen" and self.objective == "label-words":
            raise OptionError("frozen fits a head; use lora or full with label-words")
        if self.method == "zero-shot" and self.objective == "regression":
            raise OptionError(
                "regression needs a head, and zero-shot has none; use --method frozen, lora or full"
            )
        if self.bidirectional and (self.method == "zero-shot" or self.objective == "label-words"):
            raise OptionError("bidirectional needs a head: label words are scored as continuations")
        if self.shots and not (self.method == "zero-shot" or self.objective == "label-words"):
            raise OptionError("shots needs --method zero-shot or --objective label-words")
