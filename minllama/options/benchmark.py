"""Options of `minllama bench`: what is measured, and how often."""

from dataclasses import dataclass
from typing import ClassVar

from minllama.errors import OptionError
from minllama.options.base import CheckedOptions, Range, option
from minllama.options.loading import DTYPES
from minllama.options.training import QUANTIZE

FORMATS = ("auto", *QUANTIZE, *DTYPES)
TESTS = ("prefill", "decode", "context", "batch", "scoring", "training")


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(CheckedOptions):
    """What to measure; see `minllama.benchmark`."""

    group: ClassVar[str] = "Benchmark"

    tests: str = option(
        ",".join(TESTS),
        "what to measure, separated by commas: reading a prompt (prefill), tokens behind a short "
        "prompt (decode) and behind long ones (context), of several sequences at once (batch), "
        "label words of texts (scoring), and steps of LoRA (training)",
        common=True,
    )
    formats: str = option(
        "",
        "weight formats to measure beside one another, separated by commas, instead of that of "
        "--quantize and --dtype: stored, int8, int4, or float32, bfloat16, float16 for dense "
        "weights, or auto",
        common=True,
    )
    repetitions: int = option(
        5, "measurements of each, of which the median is shown", within=Range(1), common=True
    )
    prompt_tokens: int = option(512, "length of the prompt that prefill reads", within=Range(1))
    new_tokens: int = option(64, "tokens that decoding makes", within=Range(2))
    contexts: str = option("512,4096", "lengths of context, separated by commas")
    batch_size: int = option(16, "sequences that are decoded at once", within=Range(2))

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.chosen_tests if name not in TESTS]
        if unknown or not self.chosen_tests:
            raise OptionError(f"tests must be some of {', '.join(TESTS)}, not {self.tests!r}")
        unknown = [name for name in self.chosen_formats if name not in FORMATS]
        if unknown:
            raise OptionError(f"formats must be some of {', '.join(FORMATS)}, not {self.formats!r}")
        if "context" in self.chosen_tests and not self.context_lengths:
            raise OptionError(f"contexts must be integers above 0, not {self.contexts!r}")

    @property
    def chosen_tests(self) -> tuple[str, ...]:
        return _names_in(self.tests)

    @property
    def chosen_formats(self) -> tuple[str, ...]:
        """The weight formats; none for the one in which the model is loaded."""
        return _names_in(self.formats)

    @property
    def context_lengths(self) -> tuple[int, ...]:
        """The lengths of context; none if one is not an integer above 0."""
        parts = [part.strip() for part in self.contexts.split(",")]
        are_numbers = all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts)
        lengths = tuple(map(int, parts)) if are_numbers else ()
        return lengths if all(lengths) else ()


def _names_in(text: str) -> tuple[str, ...]:
    """Names that are separated by commas, each once."""
    return tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
