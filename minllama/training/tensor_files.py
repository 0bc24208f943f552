"""Tensors of a checkpoint in safetensors: whole, or rows of them in a file of each process.

A file with rows has the header of `torch.distributed.checkpoint.HuggingFaceStorageWriter`, whose
reader opens it, too. `minllama.training.run_checkpoint` calls it.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minllama.distributed.gradients import Rows

SHARDING_INFO, SAVED_OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
DCP_VERSION = "1.0"


def file_name(kind: str, rank: int = 0, size: int = 1) -> str:
    """The file of one kind of tensors, such as `weights`, of one of `size` processes."""
    part = f"-{rank + 1:05}-of-{size:05}" if size > 1 else ""
    return f"{kind}{part}.safetensors"


def files_of(kind: str, names: Iterable[str]) -> list[str]:
    """The files of one kind, whole or of all processes, among others."""
    pattern = re.compile(rf"{re.escape(kind)}(-\d{{5}}-of-\d{{5}})?\.safetensors")
    return sorted(name for name in names if pattern.fullmatch(name))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], rows: Mapping[str, Rows] | None = None
) -> None:
    """Write tensors to a file, and to the disk.

    Args:
        path: of the file.
        tensors: by name.
        rows: which rows of a tensor these are; None if all are whole. Tensors without rows are left
            out.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = None
    if rows is not None:
        on_cpu = {name: tensor for name, tensor in on_cpu.items() if tensor.numel()}
        offsets = {
            name: {SAVED_OFFSETS: [rows[name].start] + [0] * (tensor.dim() - 1)}
            for name, tensor in on_cpu.items()
        }
        metadata = {
            SHARDING_INFO: json.dumps(offsets),
            "DCP_VERSION": DCP_VERSION,
            "format": "pt",
        }
    try:
        save_file(on_cpu, path, metadata)
    except SafetensorError as error:  # of a full disk
        raise OSError(str(error)) from error
    # By who has written it: others may have no more than its name yet, on a network drive.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_tensors(
    paths: Sequence[Path], rows_of: Callable[[str], Rows | None] = lambda name: None
) -> dict[str, Tensor]:
    """Read tensors, or some rows of them, from the files of one or several processes.

    Args:
        paths: of the files.
        rows_of: the rows of a tensor to read; None for all.

    Raises:
        ValueError: rows are missing, or there are two of one.
        OSError, KeyError, TypeError, SafetensorError: a file is damaged.
    """
    from safetensors import safe_open

    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for path in paths:
        # safe_open maps the file, and reads of it what is sliced.
        with safe_open(path, framework="pt") as file:
            starts = _starts(file, path)
            for name, start in starts.items():
                pieces.setdefault(name, []).append((start, _rows(file, name, start, rows_of(name))))
    return {name: _joined(name, found, rows_of(name)) for name, found in pieces.items()}


def _starts(file: Any, path: Path) -> dict[str, int]:
    """The first row of each tensor in a file."""
    names = list(file.keys())
    header = (file.metadata() or {}).get(SHARDING_INFO)
    if header is None:
        return dict.fromkeys(names, 0)
    try:
        offsets = json.loads(header)
        return {name: int(offsets[name][SAVED_OFFSETS][0]) for name in names}
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name} does not say which rows it has") from error


def _rows(file: Any, name: str, start: int, wanted: Rows | None) -> Tensor:
    """The wanted rows that a file has of a tensor; `start` is its first."""
    if wanted is None:
        return torch.clone(file.get_tensor(name))
    piece = file.get_slice(name)
    n = int(piece.get_shape()[0]) if piece.get_shape() else 0
    first, last = (min(max(row - start, 0), n) for row in (wanted.start, wanted.stop))
    return torch.clone(piece[first:last])


def _joined(name: str, pieces: list[tuple[int, Tensor]], wanted: Rows | None) -> Tensor:
    """The pieces of a tensor as one, in the order of their rows."""
    start = 0 if wanted is None else wanted.start
    if wanted is None and len(pieces) == 1 and pieces[0][0] == 0:
        return pieces[0][1]  # whole, and perhaps of no dimension
    chosen = [
        (max(begin, start), piece)
        for begin, piece in sorted(pieces, key=lambda pair: pair[0])
        if len(piece)
    ]
    row = start
    for begin, piece in chosen:
        if begin != row:
            raise ValueError(f"{name} has no or several rows {min(begin, row)}")
        row += len(piece)
    if wanted is not None and row != wanted.stop:
        raise ValueError(f"{name} has no row {row}")
    if not chosen:
        return pieces[0][1]
    return torch.cat([piece for _, piece in chosen]) if len(chosen) > 1 else chosen[0][1]
