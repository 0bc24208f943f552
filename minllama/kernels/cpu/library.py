"""Load the compiled library, choose its instruction level, and call its functions."""

import ctypes
import functools
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from minllama.errors import MinllamaError
from minllama.kernels.cpu.structs import STRUCTS, described
from minllama.kernels.hardware import level_of


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None if the package was installed without a C++ compiler."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_step{suffix}")
        if path.exists():
            try:
                found = ctypes.CDLL(str(path))
            except OSError:  # built for another system
                return None
            if not _is_of_this_version(found):
                warnings.warn(
                    f"{path.name} was compiled from another version of minllama and is ignored, "
                    "which is slower; reinstall the package (in a source tree: make native)",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return None
            _use_torchs_threads(found)
            return found
    return None


@functools.cache
def best_level() -> int:
    """Index into `hardware.LEVELS` of the best instructions that this CPU and the library share.

    Raises:
        OptionError: MINLLAMA_CPU states a higher level.
    """
    found = library()
    return level_of(0 if found is None else int(found.minllama_best_level()))


@functools.cache
def amx_works() -> bool:
    """Whether compiled code can use this processor's matrix instructions (AMX)."""
    found = library()
    return found is not None and bool(found.minllama_has_amx())


def call(
    name: str, *arguments: ctypes.Structure, level: int | None = None, threads: int | None = None
) -> None:
    """Call a function of the library.

    Args:
        name: without its prefix.
        arguments: the structs to pass, by reference.
        level: index into `hardware.LEVELS`; None for the best.
        threads: how many compute; None for as many as torch uses.

    Raises:
        MinllamaError: there is no memory left for it.
    """
    found = library()
    assert found is not None
    count = ctypes.c_int64(torch.get_num_threads() if threads is None else threads)
    level = best_level() if level is None else level
    if getattr(found, f"minllama_{name}")(*map(ctypes.byref, arguments), count, level):
        raise MinllamaError("out of memory; use fewer or shorter texts per batch")


def _is_of_this_version(found: ctypes.CDLL) -> bool:
    """Whether its structs have the fields of `minllama.kernels.cpu.structs`."""
    try:
        fields = found.minllama_fields
    except AttributeError:  # an older library
        return False
    fields.restype = ctypes.c_char_p
    description: bytes = fields()
    return description.decode() == "".join(map(described, STRUCTS))


def _use_torchs_threads(found: ctypes.CDLL) -> None:
    """Use the threads of the OpenMP library that torch has loaded, if it is GNU's."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        functions = [ctypes.cast(getattr(torch_cpu, name), ctypes.c_void_p) for name in names]
    except (OSError, AttributeError):
        return  # another system, or another OpenMP: the library then starts threads of its own
    found.minllama_use_openmp(*functions)
