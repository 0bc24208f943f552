"""Measure, once per machine, where instruction sets do not decide which kernel is faster.

`minllama.kernels.hardware` asks for the limits and has the rules that hold without them. They are
kept in a file for each processor, number of threads and version, which is safe to delete:
`calibration-*.json` in the user's cache folder.
"""

import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from minllama.atomic import atomic_file
from minllama.errors import MinllamaError
from minllama.kernels.cpu import ops
from minllama.kernels.cpu.library import best_level, library
from minllama.kernels.cpu.linear import matmul
from minllama.kernels.hardware import AVX2, fast_bfloat16, has_amx, processor
from minllama.text import VERSION, read_json

FORM = 3  # of the file; raised where kernels have become faster, too
MAX_BYTES = 100_000
# What is compared; `hardware.choice` asks for it by these names.
QUANTIZED_BFLOAT16 = "quantized bfloat16"
DENSE = "dense"
OUT, IN = 1536, 576  # of a matrix that stays in a near cache, as a layer's do between two texts
SIZES = (32, 48, 64, 96, 128, 192, 256, 384, 512)  # rows
ROUNDS = 7
MOST_SECONDS = 0.4  # of one comparison; then the rest of its rounds is left out
MARGIN = 1.05  # a kernel that is faster by less is not preferred


def limits() -> Mapping[str, float]:
    """The measured limits of this machine, by the names that `hardware` gives them.

    Empty for none.
    """
    if library() is None or best_level() < AVX2:
        return {}
    names = list(measured_names())
    key = _machine()
    path = cache_folder() / f"calibration-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    found = _read(path, key, names)
    if found is None:
        found = measure(names)
        _write(path, key, found)
    return found


def measured_names() -> Iterator[str]:
    """What instruction sets do not decide on this machine."""
    yield DENSE
    if fast_bfloat16("cpu") and not has_amx(torch.bfloat16):
        yield QUANTIZED_BFLOAT16


def measure(names: Iterable[str]) -> dict[str, float]:
    """Up to how many rows compiled code is faster than torch's products, each by its name."""
    with torch.inference_mode():
        return {name: COMPARED[name]() for name in names}


def _quantized_limit() -> float:
    """Integers, beside dequantizing and products of bfloat16."""
    weight, inputs = _Matrix(), _inputs()
    integers = {n: partial(ops.quantized_matmul, weight, x) for n, x in inputs.items()}
    products = {n: partial(_dequantized, weight, x.bfloat16()) for n, x in inputs.items()}
    return _limit(integers, products)


def _dense_limit() -> float:
    """Products of float32 in compiled code and in torch."""
    weight, inputs = torch.randn(OUT, IN, generator=_generator(), device="cpu"), _inputs()
    compiled = {n: partial(ops.dense_matmul, weight, x) for n, x in inputs.items()}
    products = {n: partial(F.linear, x, weight) for n, x in inputs.items()}
    return _limit(compiled, products)


COMPARED = {QUANTIZED_BFLOAT16: _quantized_limit, DENSE: _dense_limit}


def _inputs() -> dict[int, torch.Tensor]:
    generator = _generator()
    return {n: torch.randn(n, IN, generator=generator, device="cpu") for n in SIZES}


def _generator() -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(0)


Works = Mapping[int, Callable[[], object]]


def _limit(compiled: Works, products: Works) -> float:
    """The largest of `SIZES` up to which torch's products are not faster; 16 for none."""
    ours = dict.fromkeys(SIZES, math.inf)
    theirs = dict(ours)
    began = time.perf_counter()
    for done in range(ROUNDS):  # interleaved: what disturbs one disturbs all alike
        for n in SIZES:
            ours[n] = min(ours[n], _seconds(compiled[n]))
            theirs[n] = min(theirs[n], _seconds(products[n]))
        if done and time.perf_counter() - began > MOST_SECONDS:
            break
    is_slower = {n: ours[n] > MARGIN * theirs[n] for n in SIZES}
    # Two sizes one after the other, since one alone may have been disturbed each time.
    pairs = pairwise((*SIZES, SIZES[-1]))
    slower = [n for n, larger in pairs if is_slower[n] and is_slower[larger]]
    if not slower:
        return math.inf
    # The largest size below which all are faster; sizes in between are theirs, too.
    smaller = [n for n in SIZES if n < slower[0]]
    return smaller[-1] if smaller else 16


def cache_folder() -> Path:
    """The folder for files that can be made again, as each system has it."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path(os.path.expanduser("~"), "AppData", "Local")
    elif sys.platform == "darwin":
        base = Path(os.path.expanduser("~"), "Library", "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~"), ".cache")
    return Path(base) / "minllama"


class _Matrix:
    """A quantized matrix of 4 bits, of arbitrary values; see `QuantizedMatrix`."""

    bits, activation_bits, in_features, out_features = 4, 16, IN, OUT

    def __init__(self) -> None:
        shape = (OUT // 16, IN // 32, 4, 16, 4)
        self.quants = torch.randint(0, 256, shape, generator=_generator(), device="cpu").byte()
        self.scales = torch.full((OUT // 16, IN // 32, 16), 0.01, device="cpu").half()
        self.mins: torch.Tensor | None = -8 * self.scales

    def rows(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        raise NotImplementedError  # only products are measured


def _dequantized(weight: _Matrix, x: torch.Tensor) -> torch.Tensor:
    return matmul(x, ops.dequantize_transposed(weight, x.dtype))


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _machine() -> str:
    threads = torch.get_num_threads()
    return f"{processor()}; {threads} threads; torch {torch.__version__}; minllama {VERSION}"


def _read(path: Path, key: str, names: Iterable[str]) -> dict[str, float] | None:
    """What was measured; None if there is no such file, or not of this machine and version."""
    try:
        content = read_json(path, max_bytes=MAX_BYTES)
        if content["form"] != FORM or content["machine"] != key:
            return None
        values = {name: content["limits"][name] for name in names}
        found = {name: math.inf if v is None else float(v) for name, v in values.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return found if {*found.values()} <= {16, *SIZES, math.inf} else None


def _write(path: Path, key: str, found: Mapping[str, float]) -> None:
    """Keep what was measured; without a writable folder it is measured again in each process."""
    limits = {name: None if limit == math.inf else limit for name, limit in found.items()}
    content = {"form": FORM, "machine": key, "limits": limits}
    with contextlib.suppress(OSError, MinllamaError, RuntimeError):  # no home folder, read-only
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
