"""What kind of classifier is made, and by which scores."""

from dataclasses import dataclass

from minllama.errors import OptionError
from minllama.options.base import CheckedOptions, Range, option

CLASS_METRICS = ("accuracy", "macro_f1", "log_loss")
VALUE_METRICS = ("rmse", "mae", "r2", "pearson", "spearman")  # of numbers
METHODS = ("zero-shot", "frozen", "lora", "full")
OBJECTIVES = ("head", "label-words", "regression")
SCORES = ("sum", "token-mean", "byte-mean", "pmi", "contextual", "batch")
CORRECTED = ("pmi", "contextual", "batch")  # the scores of which something is taken off
POOLINGS = ("last", "mean", "weighted-mean")


@dataclass(frozen=True, kw_only=True)
class ZeroShotOptions(CheckedOptions):
    """How label words are scored; see `minllama.classification.zero_shot`."""

    label_words: str | None = option(
        None,
        "words that stand for the labels, in their order, separated by commas (in quotes where one "
        "holds a comma), or as JSON: a list, or {label: word}",
    )
    score: str = option(
        "sum",
        "log-probability of a label: as it is (sum), per token or byte, or corrected (pmi, "
        "contextual; batch by texts of the task)",
        choices=SCORES,
    )
    prior_strength: float = option(
        1.0,
        "how much of the correction of pmi, contextual and batch to make",
        within=Range(0, 2),
    )
    shots: int = option(
        0,
        "how many training examples to show before each text, spread over the classes",
        within=Range(0, 1000),
    )


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(ZeroShotOptions):
    """What kind of classifier is made, and how; see `minllama.experiment`."""

    method: str = option(
        "lora",
        "what is trained: nothing (zero-shot), a head on fixed features (frozen), low-rank "
        "adapters (lora), or all weights (full)",
        choices=METHODS,
    )
    objective: str = option(
        "head",
        "a new linear head, or the scores of label-words (best with few examples); or regression: "
        "a head for labels that are numbers, by mean squared error",
        choices=OBJECTIVES,
    )
    layer: str = option(
        "auto", "how many layers run: a number, all, or auto for what cross-validation finds best"
    )
    pooling: str = option(
        "auto",
        "the vector of a text: of its last token, or a mean of all; auto by cross-validation",
        choices=("auto", *POOLINGS),
    )
    dropout: float = option(
        0.1, "probability of dropping an element of that vector in training", within=Range(0, 1)
    )
    bidirectional: bool = option(False, "let each token look ahead, too; with a head only")
    dev_fraction: float = option(
        0.1,
        "share of the training file to evaluate on, without --dev",
        within=Range(0, 0.9, low_open=True),
    )
    per_class: int = option(
        0, "learn from this many examples of each class only; 0 from all", within=Range(0)
    )
    no_calibration: bool = option(False, "leave the probabilities as they come")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer not in ("auto", "all") and not self.layer.isdecimal():
            raise OptionError(f"layer must be a number, all or auto, not {self.layer!r}")
        if self.method == "frozen" and self.objective == "label-words":
            raise OptionError("frozen fits a head; label-words are trained with lora or full")
        if self.method == "zero-shot" and self.objective == "regression":
            raise OptionError(
                "zero-shot scores label words, and a number needs a head; use --method frozen, "
                "lora or full"
            )
        if self.bidirectional and (self.method == "zero-shot" or self.objective == "label-words"):
            raise OptionError("bidirectional needs a head: label words are continuations")
        if self.shots and not (self.method == "zero-shot" or self.objective == "label-words"):
            raise OptionError("shots belong into the prompts of zero-shot or label-words")
