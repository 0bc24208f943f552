"""Files that `torch.save` wrote, read without trusting them.

A pickle is a program: it is run by torch's restricted unpickler, which builds tensors and plain
Python values and nothing else. Knows nothing of models or of what the values mean.
"""

import math
import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minllama.errors import CheckpointError

ZIP_MAGIC = b"PK\x03\x04"
# torch.save before 1.6, and plain pickles: opcode PROTO and a protocol number.
PICKLE_MAGICS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))


def is_torch_file(path: Path) -> bool:
    """Whether the file begins as torch.save's do; reading it may still show that it is damaged."""
    with path.open("rb") as file:
        return _is_magic(file.read(4))


def _is_magic(start: bytes) -> bool:
    """Whether four bytes are the first of such a file.

    No opcode is NUL: 80 02 00 00 is the width 640 in a file of llama2.c's.
    """
    return start == ZIP_MAGIC or (start[:2] in PICKLE_MAGICS and start[2:3] != b"\0")


def load_torch_file(path: Path) -> dict[str, Any]:
    """The dict in a file that `torch.save` wrote; its tensors are on the CPU, memory-mapped.

    Files from before torch 1.6 cannot be mapped and are read into memory.

    Raises:
        CheckpointError: the file is missing, empty, cut off or damaged; its pickle calls for code;
            it holds something other than a dict with string keys.
    """
    try:
        # Opening a pipe would wait for its writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a regular file, so it cannot be mapped")
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if not magic:
        raise CheckpointError(f"{path} is empty; fetch it again")
    if not _is_magic(magic):
        raise CheckpointError(f"{path} is not a file that torch.save wrote")
    is_zip = magic == ZIP_MAGIC
    if is_zip:
        _check_zip(path)
    values = _unpickle(path, mmap=is_zip)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise CheckpointError(
            f"{path} holds a {type(values).__name__}, not a state dict (names -> tensors)"
        )
    return values


def dense_tensors(values: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The entries of a state dict from `path`, once each is known to be a tensor kept in full.

    A hostile file can give a tensor a huge shape over few bytes, or over bytes that it lacks.

    Raises:
        CheckpointError: an entry is no tensor, not dense, or larger than what the file keeps of it.
    """
    file_bytes = path.stat().st_size
    for name, value in values.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise CheckpointError(f"{path}: {name!r} is of type {kind}, not a tensor")
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise CheckpointError(f"{path}: the tensor {name!r} is not a plain dense tensor")
        held = value.untyped_storage().nbytes()
        if math.prod(value.shape) * value.element_size() > held or held > file_bytes:
            raise CheckpointError(
                f"{path}: the tensor {name!r} of shape {tuple(value.shape)} is larger than what "
                "the file keeps of it; the file is damaged"
            )
    return {name: value.detach() for name, value in values.items()}


def _check_zip(path: Path) -> None:
    """What torch's own zip reader would crash over, warn about or map wrongly."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is cut off or damaged (a zip with no readable directory); fetch it again"
        ) from error
    names = [entry.filename.rpartition("/")[2] for entry in entries]
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path} was refused: it is TorchScript, which is code; save the state dict instead"
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} is a zip archive, but not one that torch.save wrote")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{path} was compressed after torch.save wrote it, so it cannot be mapped into memory; "
            "save it again with torch.save"
        )


def _unpickle(path: Path, mmap: bool) -> Any:
    with warnings.catch_warnings():
        # Raised for every protocol but 2; what the unpickler cannot read is an error anyway.
        warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
        # Sparse tensors are refused afterwards, by name.
        warnings.filterwarnings("ignore", "Sparse invariant checks", UserWarning)
        try:
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(_refusal(path, str(error))) from error
        except Exception as error:
            # A damaged pickle can fail as anything: KeyError, EOFError, UnicodeDecodeError, ...
            reason = (str(error).splitlines() or [""])[0][:120]
            raise CheckpointError(
                f"{path} is cut off or damaged ({type(error).__name__}: {reason}); fetch it again"
            ) from error


def _refusal(path: Path, message: str) -> str:
    if called := re.search(r"GLOBAL ([\w.]+)", message):
        return (
            f"{path} was refused: its pickle calls {called[1]}, and a pickle that calls more than "
            "torch's own tensors can run any code; ask for the weights as safetensors"
        )
    reason = message.partition("WeightsUnpickler error:")[2].strip().splitlines() or ["damaged"]
    return (
        f"{path} was refused: its pickle is not one that torch's safe unpickler reads "
        f"({reason[0][:120]}); ask for the weights as safetensors"
    )
