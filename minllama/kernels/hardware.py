"""What this machine is fast at: the only place that decides by its processor or GPU.

The environment variable MINLLAMA_CPU overrides the processor's capabilities, so that decisions
based on them can be tested on any machine: an instruction level (`portable`, `avx2` or `avx512`,
the last with VNNI), then `bf16`, `amx` or `fp16` for arithmetic that counts as fast.
`MINLLAMA_CPU=avx512,bf16` is a Zen 4, `avx2` a Zen 3, `avx512,amx` a Xeon with AMX, which has bf16
as well. A level above the processor's is refused, since its instructions would not run; the others
are preferences, and torch emulates what is missing.
"""

import functools
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from minllama.errors import MinllamaError, OptionError

VARIABLE = "MINLLAMA_CPU"
LEVELS = ("portable", "AVX2", "AVX-512 VNNI")
LEVEL_WORDS = ("portable", "avx2", "avx512")
# Torch's names for each word; a CPU with AMX also has bfloat16 in vector registers.
FEATURE_WORDS = {
    "bf16": frozenset({"avx512_bf16"}),
    "amx": frozenset({"avx512_bf16", "amx_bf16"}),
    "fp16": frozenset({"avx512_fp16"}),
}


@dataclass(frozen=True)
class Capabilities:
    """The capabilities that MINLLAMA_CPU sets.

    Attributes:
        level: index into LEVELS.
        features: instructions beyond it that are to count as there, as torch names them.
    """

    level: int
    features: frozenset[str]


@functools.cache
def stated() -> Capabilities | None:
    """The capabilities in MINLLAMA_CPU; None if it is not set.

    Raises:
        OptionError: it contains an unknown word.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    level, *features = (word.strip().lower() for word in text.split(","))
    if level not in LEVEL_WORDS or not FEATURE_WORDS.keys() >= set(features):
        raise OptionError(
            f"{VARIABLE} must be one of {', '.join(LEVEL_WORDS)}, then any of "
            f"{', '.join(FEATURE_WORDS)}, separated by commas, not {text!r}"
        )
    instructions = frozenset().union(*(FEATURE_WORDS[word] for word in features))
    return Capabilities(LEVEL_WORDS.index(level), instructions)


def level_of(best: int) -> int:
    """The index into LEVELS to use if this CPU and the compiled library support up to `best`.

    Raises:
        OptionError: MINLLAMA_CPU states a higher one.
    """
    assumed = stated()
    if assumed is None:
        return best
    if assumed.level > best:
        raise OptionError(
            f"{VARIABLE} states {LEVEL_WORDS[assumed.level]}, which this processor or minllama's "
            f"compiled code does not support; use at most {LEVEL_WORDS[best]}"
        )
    return assumed.level


def cpu_can(*names: str) -> bool:
    """Whether the CPU has any of these instructions, as torch names them, and torch uses them."""
    assumed = stated()
    if assumed is not None:
        return not assumed.features.isdisjoint(names)
    # Torch's functions for CPU features differ between its versions.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities:
        return any(capabilities.get(name, False) for name in names)
    checks = {
        "avx512_bf16": "_is_avx512_bf16_supported",
        "amx_bf16": "_is_amx_tile_supported",
        "amx_fp16": "_is_amx_fp16_supported",
    }
    return any(getattr(torch.cpu, checks.get(name, ""), bool)() for name in names)


def has_amx(dtype: torch.dtype) -> bool:
    """Whether the CPU has matrix instructions (AMX) for a half precision."""
    names = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}
    return dtype in names and cpu_can(names[dtype])


def fast_bfloat16(device: torch.device | str) -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32 ones.

    A CPU does with AVX512-BF16, AMX or ARM's BF16; without, torch emulates it at a fraction of the
    speed. An NVIDIA GPU does from compute capability 8.0 (Ampere) on.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    return cpu_can("avx512_bf16", "amx_bf16", "bf16")


def fast_float16_on_cpu() -> bool:
    """Whether the CPU multiplies float16 matrices faster than float32 ones."""
    return cpu_can("avx512_fp16", "amx_fp16", "fp16_arith")  # the last is ARM's


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device of that name; None for a GPU if there is one.

    Raises:
        MinllamaError: this machine or torch build does not have it.
    """
    if device is None:
        return default_device()
    try:
        torch.zeros((), device=device).item()  # the meta device has tensors without numbers
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:  # torch raises either where CUDA is absent
        raise MinllamaError(
            f"device {str(device)!r} is not usable on this machine "
            f"({str(error).splitlines()[0][:120]}); use one that it has of cpu, cuda and mps"
        ) from error


def default_dtype(device: torch.device | str) -> torch.dtype:
    """float32 on a CPU, which often emulates bfloat16; bfloat16 on a GPU.

    But float16 on older NVIDIA GPUs, which only emulate bfloat16.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return torch.float32
    is_old = device.type == "cuda" and not fast_bfloat16(device)
    return torch.float16 if is_old else torch.bfloat16


# ------------------------------------------------------------------ which kernel serves what

CALIBRATE = "MINLLAMA_CALIBRATE"  # 0: nothing is measured
PORTABLE, AVX2, AVX512 = range(len(LEVELS))
UNLIMITED = math.inf


@dataclass(frozen=True)
class Choice:
    """Up to which size minllama's compiled code computes; beyond it, torch does.

    Of quantized products in bfloat16: up to which size they are of integers.

    Attributes:
        limit: the largest size that compiled code serves.
        unit: of the limit.
        reason: instruction sets, or what was measured.
    """

    limit: float
    unit: str
    reason: str

    @property
    def size(self) -> str:
        """Such as `up to 128 rows`."""
        if self.limit == UNLIMITED:
            return f"any number of {self.unit}"
        return f"up to {self.limit:,.0f} {self.unit}"


# What `choice` decides: its name in the order in which `minllama info` shows it, and the unit.
CHOICES = {
    "quantized": ("quantized products", "rows"),
    "quantized pass": ("quantized passes with a cache", "tokens"),
    "dense step": ("dense decode steps", "sequences"),
    "dense pass": ("other dense passes with a cache", "tokens"),
    "dense": ("products of float32", "rows"),
    "upcast": ("products of half precision", "rows"),
    "attention": ("attention of whole texts", "tokens"),
    "attention trained": ("attention with gradients", "tokens"),
}
OF_PASSES = ("quantized pass", "dense step", "dense pass")
OF_MATRICES = ("quantized", *OF_PASSES)  # where torch has its own
DENSE = ("dense step", "dense pass", "dense")
# Beside vector instructions for bfloat16, measured on two cores of Zen 4 in whole passes.
BFLOAT16 = {"dense step": 24, "dense pass": 32}
# Where neither the level nor other instructions decide: measured on two cores each, of Zen 3 (AVX2)
# and Zen 4 (AVX-512), in whole passes.
LARGE = "torch's products of large matrices are faster beyond"
RULES = {
    "dense step": (128, LARGE),
    "dense pass": (64, LARGE),
    "dense": (16, LARGE),
    "upcast": (16, "more rows pay for a whole matrix in float32"),
    "attention": (64, "torch's is faster for longer texts"),
    "attention trained": (512, "torch's backward pass is faster for longer texts"),
}


@functools.cache
def choice(name: str, level: int, dtype: torch.dtype = torch.float32) -> Choice:
    """Which kernel computes something on this processor: the one table of such decisions.

    Args:
        name: one of CHOICES.
        level: index into LEVELS of the instructions that compiled code uses.
        dtype: of the computation.
    """
    _, unit = CHOICES[name]
    kind = str(dtype).removeprefix("torch.")
    if name in OF_MATRICES and level == PORTABLE:
        return Choice(32, unit, "without vector instructions, torch's products are faster")
    if name in OF_MATRICES and dtype == torch.bfloat16 and (least := amx_from(level)):
        if name in OF_PASSES:
            return Choice(UNLIMITED, unit, "AMX multiplies bfloat16 where there are many rows")
        return Choice(least - 1, unit, "in integers; more rows in bfloat16, by AMX")
    if name in OF_MATRICES and has_amx(dtype):
        return Choice(32, unit, f"AMX multiplies {kind} faster than vectors multiply")
    if name in BFLOAT16 and dtype == torch.bfloat16 and fast_bfloat16("cpu"):
        return Choice(BFLOAT16[name], unit, "the processor multiplies bfloat16, beyond faster")
    if name == "quantized" and dtype == torch.bfloat16 and fast_bfloat16("cpu"):
        rule = Choice(192, unit, "the processor multiplies bfloat16, which pays for many")
        return _measured("quantized bfloat16", rule)
    if name in ("quantized", "quantized pass"):
        return Choice(UNLIMITED, unit, f"{LEVELS[level]} multiplies integers faster than {kind}")
    if level >= AVX2 and name == "upcast":
        return Choice(UNLIMITED, unit, "weights are upcast while they are multiplied")
    if level >= AVX2 and name in DENSE and not (dtype == torch.float16 and fast_float16_on_cpu()):
        rule = Choice(UNLIMITED, unit, f"{LEVELS[level]} multiplies float32 at its full rate")
        # Not of passes, which are more than products, nor of half precision, which torch upcasts.
        return _measured("dense", rule) if name == "dense" else rule
    if name == "attention" and level == AVX2:
        return Choice(512, unit, "torch has nothing beyond AVX2 here, either")
    limit, reason = RULES[name]
    return Choice(limit, unit, reason)


def _measured(name: str, rule: Choice) -> Choice:
    """The limit that a calibration of this machine found; the rule where nothing is measured."""
    found = calibration().get(name)
    if found is None:
        return rule
    slower = "at none of the sizes" if found == UNLIMITED else "beyond"
    kind = "float32" if name == "dense" else "bfloat16"
    return Choice(found, rule.unit, f"measured here: torch's {kind} products win {slower}")


@functools.cache
def calibration() -> Mapping[str, float]:
    """The limits that were measured on this machine.

    Measured once, in less than a second, and kept in the user's cache folder for this processor,
    number of threads and version of minllama and torch. Empty where MINLLAMA_CPU states a
    processor, MINLLAMA_CALIBRATE is 0, there is no compiled code, or instruction sets decide.
    """
    if stated() is not None or os.environ.get(CALIBRATE, "").strip() == "0":
        return {}
    # Imported late: it is above this module, since it multiplies.
    found: Mapping[str, float] = import_module("minllama.kernels.cpu.calibration").limits()
    return found


# Rows; measured on two cores of a Xeon (Sapphire Rapids). Beside quantized weights, fewer are
# multiplied exactly, as integers.
AMX_FROM, AMX_FROM_QUANTIZED = 9, 33


@functools.cache
def amx_from(level: int, *, is_quantized: bool = True) -> int:
    """From how many rows on compiled code multiplies bfloat16 by matrix instructions; 0 for never.

    Args:
        level: index into LEVELS of the instructions that compiled code uses.
        is_quantized: whether the weights are.
    """
    if level < AVX512 or not has_amx(torch.bfloat16):
        return 0
    # Where MINLLAMA_CPU states AMX, compiled code emulates what is missing.
    if stated() is None and not import_module("minllama.kernels.cpu.library").amx_works():
        return 0
    return AMX_FROM_QUANTIZED if is_quantized else AMX_FROM


SUMS_FROM = 32  # rows; measured on Zen 5, where 24 in a pass are 2% slower


@functools.cache
def sums_from(level: int) -> int:
    """From how many rows on quantized products take Winograd's inner products; 0 for never.

    These have half of the products, for more additions (`kernels/cpu/src/winograd.inc`). AMD's
    processors with AVX-512 add in four pipes and multiply in two; Intel's do both in two.

    Args:
        level: index into LEVELS of the instructions that compiled code uses.
    """
    assumed = stated()
    if assumed is None:
        is_zen = "AMD" in processor()
    else:  # as MINLLAMA_CPU states a Zen 4
        is_zen = cpu_can("avx512_bf16") and not cpu_can("amx_bf16")
    return SUMS_FROM if level == AVX512 and is_zen else 0


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()
