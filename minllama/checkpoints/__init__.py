"""Files on disk <-> (LlamaConfig, named tensors, vocabulary).

One module for each format; here a path, a folder or a Hugging Face id is recognised by its content
and opened. Knows nothing of what a model does with its tensors.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from minllama.checkpoints.base import Checkpoint, LazyTensor
from minllama.checkpoints.gguf import (
    is_gguf,
    read_gguf,
    read_gguf_vocabulary,
    write_gguf,
)
from minllama.checkpoints.huggingface import is_huggingface, read_huggingface, write_huggingface
from minllama.checkpoints.llama2c import (
    is_llama2c_bin,
    is_torch_checkpoint,
    read_llama2c_bin,
    read_torch_checkpoint,
    write_llama2c_bin,
)
from minllama.checkpoints.meta import is_meta, read_meta
from minllama.checkpoints.source import canonical_name, resolve_source
from minllama.errors import CheckpointError, TokenizerError
from minllama.vocabulary import Vocabulary, load_vocabulary

__all__ = [
    "Checkpoint",
    "LazyTensor",
    "open_checkpoint",
    "read_tokenizer",
    "write_gguf",
    "write_huggingface",
    "write_llama2c_bin",
]

Format = tuple[Callable[[Path], bool], Callable[[Path], Checkpoint]]

FOLDERS: tuple[Format, ...] = ((is_huggingface, read_huggingface), (is_meta, read_meta))
FILES: tuple[Format, ...] = (
    (is_gguf, read_gguf),
    (is_torch_checkpoint, read_torch_checkpoint),
    (is_llama2c_bin, read_llama2c_bin),
)


def open_checkpoint(
    source: str | os.PathLike[str] | None = None,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Open a checkpoint; headers are read, weights are not, nor is its own vocabulary.

    Args:
        source: a file, a folder or a Hugging Face id; None for the embedded default model.
        tokenizer: file or folder of the tokenizer, or of a checkpoint that has one, where it does
            not lie in or beside the checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, of an unknown format, or not a Llama.
        TokenizerError: the tokenizer that was named apart is damaged.
    """
    path = resolve_source(source)
    try:
        checkpoint = _reader(path)(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if tokenizer is not None:
        vocabulary = read_tokenizer(tokenizer)
        checkpoint = dataclasses.replace(
            checkpoint, read_vocabulary=lambda: vocabulary, tokenizer=canonical_name(tokenizer)
        )
    return dataclasses.replace(checkpoint, source=canonical_name(source))


def read_tokenizer(source: str | os.PathLike[str]) -> Vocabulary:
    """The vocabulary of a file or folder: a tokenizer's own, or a GGUF file's.

    Raises:
        CheckpointError: a GGUF file is cut off or damaged.
        TokenizerError: none is there, or it is damaged.
    """
    path = Path(source)
    if not is_gguf(path):
        return load_vocabulary(path)
    vocabulary = read_gguf_vocabulary(path)
    if vocabulary is None:
        raise TokenizerError(f"{path}: a GGUF file without a tokenizer; name another one's")
    return vocabulary


def _reader(path: Path) -> Callable[[Path], Checkpoint]:
    if path.is_dir():
        for recognises, read in FOLDERS:
            if recognises(path):
                return read
        raise CheckpointError(
            f"{path}: neither config.json (Hugging Face) nor params.json (Meta) is in this folder; "
            "name the file or the folder of a checkpoint"
        )
    if not path.is_file():  # a pipe or a device, which a program may have meant by /dev/stdin
        raise CheckpointError(
            f"{path}: neither a file nor a folder; save the checkpoint and name its path"
        )
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty; download it again")
    for recognises, read in FILES:
        if recognises(path):
            return read
    # A part of a folder's checkpoint stands for the folder.
    for recognises, read in FOLDERS:
        if recognises(path.parent):
            return lambda file: read(file.parent)
    raise CheckpointError(
        f"{path}: not a checkpoint in a format that minllama reads "
        "(Hugging Face, GGUF, Meta, llama2.c)"
    )
