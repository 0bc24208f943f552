"""Interleave the measurements of a benchmark, so that what disturbs one disturbs all alike."""

import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

from minllama.benchmark import measurements
from minllama.benchmark.machine import describe_machine
from minllama.benchmark.results import BenchmarkResult, Measurement
from minllama.checkpoints.load import load_with
from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.types import Checkpoint
from minllama.checkpoints.weight_format import WeightFormat, resolve_weight_format
from minllama.errors import MinllamaError
from minllama.lora import remove_lora_wrapper
from minllama.model.llama import Llama
from minllama.options import LoRAOptions, TrainingOptions
from minllama.options.benchmark import BenchmarkOptions
from minllama.options.loading import DTYPES, LoadOptions
from minllama.tokenizer.tokenizer import Tokenizer

SHORT_PROMPT = 12  # tokens
SCORED_TEXTS = 96
LEARNING_RATE = 3e-4
OF_TEXTS = ("scoring", "training")  # tests that need a tokenizer

Work = Callable[[], float]


class _Test:
    """One row: its work, and what it measured."""

    def __init__(self, name: str, unit: str, work: Work | str) -> None:
        self.name, self.unit, self.work = name, unit, work
        self.values: list[float] = []

    def result(self) -> Measurement:
        note = self.work if isinstance(self.work, str) else ""
        return Measurement(self.name, self.unit, tuple(self.values), note)


def run_benchmark(
    model: str | None = None,
    loading: LoadOptions | None = None,
    options: BenchmarkOptions | None = None,
    *,
    report: Callable[[str], None] = lambda line: None,
) -> BenchmarkResult:
    """Measure a model on this machine.

    Args:
        model: file, folder or Hugging Face id; None for the embedded one.
        loading: how to load it; by default as `minllama generate` does.
        options: what to measure.
        report: receives the name of what is measured next.

    Raises:
        MinllamaError: the model cannot be opened.
    """
    loading, options = loading or LoadOptions(quantize="auto"), options or BenchmarkOptions()
    began = datetime.now(UTC).astimezone().isoformat(timespec="seconds")
    checkpoint = open_checkpoint(model, tokenizer=loading.tokenizer, base=loading.base)
    checkpoint.check_language_model()
    formats = options.chosen_formats
    loadings = [_in_format(loading, name) for name in formats] or [loading]
    # Before a model is read: a format may not be there for this file.
    resolved = [resolve_weight_format(checkpoint, one) for one in loadings]
    tests = []
    for number, (one, weights) in enumerate(zip(loadings, resolved, strict=True)):
        suffix = f", {formats[number]}" if formats else ""
        tests += _tests_of(checkpoint, one, weights, options, suffix)
    _measure(tests, options.repetitions, report)
    return BenchmarkResult(
        str(checkpoint.path),
        ", ".join(map(described_weights, resolved)),
        describe_machine(resolved[0].device),
        tuple(test.result() for test in tests),
        peak_memory(),
        began,
    )


def _in_format(loading: LoadOptions, name: str) -> LoadOptions:
    """How a model is loaded in one of `FORMATS`."""
    if name in DTYPES:
        return replace(loading, dtype=name, quantize="none")
    return replace(loading, dtype=None, quantize=name)


def _tests_of(
    checkpoint: Checkpoint,
    loading: LoadOptions,
    weights: WeightFormat,
    options: BenchmarkOptions,
    suffix: str,
) -> list[_Test]:
    """The tests of a model in one weight format; `suffix` is appended to their names."""
    llama = load_with(Llama, checkpoint, weights)
    tests = _of_generation(llama, options)
    if any(name in OF_TEXTS for name in options.chosen_tests):
        to_read = resolve_weight_format(checkpoint, loading, "read")
        reader = llama if to_read == weights else load_with(Llama, checkpoint, to_read)
        tests += _of_texts(reader, Tokenizer.from_checkpoint(checkpoint), options)
    for test in tests:
        test.name += suffix
    return tests


def _measure(tests: list[_Test], repetitions: int, report: Callable[[str], None]) -> None:
    """Run them interleaved."""
    for repetition in range(repetitions + 1):
        for test in tests:
            if isinstance(test.work, str):
                continue
            times = f"{repetition} of {repetitions}" if repetition else "first, not counted"
            report(f"{test.name} ({times})")
            value = test.work()
            if repetition:  # what is compiled, mapped or allocated once is no part of it
                test.values.append(value)


def described_weights(weights: WeightFormat) -> str:
    """Such as `stored`, `bfloat16` or `stored, int8 activations`."""
    name = weights.quantize or str(weights.dtype).removeprefix("torch.")
    is_default = weights.activations == WeightFormat.activations
    return name if is_default else f"{name}, {weights.activations} activations"


def _of_generation(llama: Llama, options: BenchmarkOptions) -> list[_Test]:
    """Reading and decoding."""
    chosen, new = options.chosen_tests, options.new_tokens
    vocab_size, context_len = llama.config.vocab_size, llama.config.context_len

    def prompt(length: int, seed: int = 0) -> list[int]:
        return measurements.random_prompt(vocab_size, length, seed)

    def work(needs: int, rate: Callable[..., float], *arguments: object) -> Work | str:
        if needs > context_len:
            return f"needs {needs:,} tokens, and the model has {context_len:,}"
        return partial(rate, llama, *arguments)

    tests, decode = [], measurements.decode_rate
    if "prefill" in chosen:
        n = options.prompt_tokens
        reads = work(n, measurements.prefill_rate, prompt(n))
        tests.append(_Test(f"prefill, {n:,} tokens", "tokens/s", reads))
    short = SHORT_PROMPT
    if "decode" in chosen:
        makes = work(short + new, decode, [prompt(short)], new)
        tests.append(_Test("decode, short prompt", "tokens/s", makes))
    if "context" in chosen:
        for n in options.context_lengths:
            makes = work(n + new, decode, [prompt(n)], new)
            tests.append(_Test(f"decode behind {n:,} tokens", "tokens/s", makes))
    if "batch" in chosen:
        n = options.batch_size
        makes = work(short + new, decode, [prompt(short, seed) for seed in range(n)], new)
        tests.append(_Test(f"decode, {n} sequences", "tokens/s in all", makes))
    return tests


def _of_texts(llama: Llama, tokenizer: Tokenizer, options: BenchmarkOptions) -> list[_Test]:
    """Scoring and training, of a model that is opened as `classify` and `train` open it."""
    tests = []
    if "scoring" in options.chosen_tests:
        name, work = "zero-shot, five labels", _tried(partial(_scoring, llama, tokenizer))
        tests.append(_Test(name, "texts/s", work))
    if "training" in options.chosen_tests:
        work = _tried(partial(_training, llama, tokenizer))
        batch = measurements.TRAINING_BATCH
        tests.append(_Test(f"LoRA, batches of {batch}", "examples/s", work))
    return tests


def _scoring(llama: Llama, tokenizer: Tokenizer) -> Work:
    classifier = measurements.zero_shot(llama, tokenizer)
    return partial(measurements.scoring_rate, classifier, measurements.texts(SCORED_TEXTS))


def _training(llama: Llama, tokenizer: Tokenizer) -> Work:
    batch, steps = measurements.TRAINING_BATCH, measurements.TRAINING_STEPS
    some = measurements.texts(batch * steps)
    options = TrainingOptions(epochs=1, batch_size=batch, lr=LEARNING_RATE)

    def rate() -> float:
        classifier = measurements.trained(llama, tokenizer, LoRAOptions())
        try:
            return measurements.training_rate(classifier, some, options)
        finally:
            remove_lora_wrapper(llama, merge=False)
            llama.requires_grad_(False)

    return rate


def _tried(make: Callable[[], Work]) -> Work | str:
    """The work, or why it cannot be done with this model."""
    try:
        return make()
    except MinllamaError as error:
        return str(error)


def peak_memory() -> int | None:
    """The most bytes that this process had in memory; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
