"""Option dataclasses: name, default, range and meaning of each option, defined once.

Those of thresholds and reports are in `minllama.options.evaluation`.
"""

from minllama.options.base import CheckedOptions, Range, group_of, names_of, option
from minllama.options.classification import (
    CLASS_METRICS,
    CORRECTED,
    METHODS,
    OBJECTIVES,
    POOLINGS,
    SCORES,
    VALUE_METRICS,
    ClassifierOptions,
    ExplainOptions,
    ZeroShotOptions,
)
from minllama.options.data import (
    DATA_FORMATS,
    OUTPUT_ENDINGS,
    OUTPUT_FORMATS,
    DataOptions,
    PromptOptions,
)
from minllama.options.generation import GenerationOptions, SamplingOptions
from minllama.options.training import ACTIVATIONS, QUANTIZE, LoRAOptions, TrainingOptions

__all__ = [
    "ACTIVATIONS",
    "CLASS_METRICS",
    "CORRECTED",
    "DATA_FORMATS",
    "METHODS",
    "OBJECTIVES",
    "OUTPUT_ENDINGS",
    "OUTPUT_FORMATS",
    "POOLINGS",
    "QUANTIZE",
    "SCORES",
    "VALUE_METRICS",
    "CheckedOptions",
    "ClassifierOptions",
    "DataOptions",
    "ExplainOptions",
    "GenerationOptions",
    "LoRAOptions",
    "PromptOptions",
    "Range",
    "SamplingOptions",
    "TrainingOptions",
    "ZeroShotOptions",
    "group_of",
    "names_of",
    "option",
]
