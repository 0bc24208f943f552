"""The options of an experiment, as one value that is checked on construction."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minllama.checkpoints.weight_format import HALF_PRECISION_NAMES
from minllama.errors import OptionError
from minllama.experiment.build import AUTO, TRAINED
from minllama.options import (
    VALUE_METRICS,
    ClassifierOptions,
    DataOptions,
    LoRAOptions,
    PromptOptions,
    TrainingOptions,
)
from minllama.options.evaluation import ReportOptions, ThresholdOptions
from minllama.options.ladder import LadderOptions
from minllama.options.loading import LoadOptions
from minllama.quantization.modules import check_quantize
from minllama.training.objective import check_metric


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The options of an experiment.

    Attributes:
        train, dev, test: sources of labeled texts.
        output: the folder of the classifier and its report.
        model, tokenizer: sources of the base model; None for the default.
        dtype, device: None for the method's and machine's default.
        quantize: one of `QUANTIZE` for frozen weights, None for dense weights, "auto" for the
            fastest with this file and machine.
        data, prompt, classifier, ladder, lora, training, threshold, report: options.
        llama_changes: fields of LlamaConfig, such as `dropout`.
    """

    train: str
    output: Path
    dev: str | None = None
    test: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    dtype: str | None = None
    device: str | None = None
    quantize: str | None = "auto"
    data: DataOptions = field(default_factory=DataOptions)
    prompt: PromptOptions = field(default_factory=PromptOptions)
    classifier: ClassifierOptions = field(default_factory=ClassifierOptions)
    ladder: LadderOptions = field(default_factory=LadderOptions)
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    threshold: ThresholdOptions = field(default_factory=ThresholdOptions)
    report: ReportOptions = field(default_factory=ReportOptions)
    llama_changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_head(self) -> bool:
        """Whether a head is trained, not label words."""
        return self.classifier.method != "zero-shot" and self.classifier.objective != "label-words"

    @property
    def loading(self) -> LoadOptions:
        """How the base model is opened."""
        return LoadOptions(
            dtype=self.dtype,
            device=self.device,
            quantize=self.quantize,
            tokenizer=self.tokenizer,
        )

    @property
    def regression(self) -> bool:
        """Whether labels are numbers."""
        return self.classifier.objective == "regression"

    @property
    def headline(self) -> str:
        """The metric that the report's verdict is about."""
        uses_metric = self.classifier.method in (*TRAINED, AUTO)
        return self.report.headline or (self.training.metric if uses_metric else "accuracy")

    @property
    def selecting_metric(self) -> str:
        """The metric that selects weights, or a rung of the ladder."""
        is_default = self.training.metric == TrainingOptions.metric
        return VALUE_METRICS[0] if self.regression and is_default else self.training.metric

    def __post_init__(self) -> None:
        is_default = self.training.metric == TrainingOptions.metric
        if not (self.regression and is_default):  # the default means rmse for regression
            check_metric(self.training.metric, regression=self.regression)
        if self.classifier.method == "full" and self.dtype in HALF_PRECISION_NAMES:
            raise OptionError(
                f"full training takes steps too small for {self.dtype}; omit --dtype to use "
                "float32 weights (multiplied in bfloat16 where the hardware is fast at it)"
            )
        if self.quantize == "auto":
            return
        check_quantize(self.quantize)
        if self.quantize is not None and self.classifier.method == "full":
            raise OptionError(
                f"full training cannot update {self.quantize} weights; omit --quantize, or use "
                "--method lora"
            )
