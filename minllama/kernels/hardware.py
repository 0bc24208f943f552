"""What this machine is fast at: the only place that decides by its processor or GPU.

The environment variable MINLLAMA_CPU overrides the processor's capabilities, so that decisions
based on them can be tested on any machine: an instruction level (`portable`, `avx2` or `avx512`,
the last with VNNI), then `bf16`, `amx` or `fp16` for arithmetic that counts as fast.
`MINLLAMA_CPU=avx512,bf16` is a Zen 4, `avx2` a Zen 3, `avx512,amx` a Xeon with AMX, which has bf16
as well. A level above the processor's is refused, since its instructions would not run; the others
are preferences, and torch emulates what is missing.
"""

import functools
import os
from dataclasses import dataclass
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
