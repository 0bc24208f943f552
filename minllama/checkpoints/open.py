"""Open a checkpoint: a path, folder or Hugging Face id, recognized by content.

`open_checkpoint` returns a `Checkpoint` (config, lazy tensors, vocabulary); there is one module per
format. `Llama.from_pretrained`, the tokenizer and all commands call it.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from minllama.checkpoints.gguf import (
    gguf_models,
    is_gguf,
    read_gguf,
    read_gguf_vocabulary,
    write_gguf,
)
from minllama.checkpoints.huggingface import (
    has_weights,
    is_huggingface,
    read_huggingface,
    write_huggingface,
)
from minllama.checkpoints.huggingface_config import config_from_huggingface
from minllama.checkpoints.json_object import read_object
from minllama.checkpoints.llama2c import (
    is_llama2c_bin,
    is_torch_checkpoint,
    read_llama2c_bin,
    read_torch_checkpoint,
    write_llama2c_bin,
)
from minllama.checkpoints.meta import is_meta, read_meta
from minllama.checkpoints.peft import PICKLED_FILE, WEIGHTS_FILE, is_adapter, with_adapter
from minllama.checkpoints.peft_config import CONFIG_FILE, read_adapter_config
from minllama.checkpoints.resolve import (
    canonical_name,
    resolve_config,
    resolve_source,
    source_of,
)
from minllama.checkpoints.types import Checkpoint, LazyTensor
from minllama.errors import CheckpointError, TokenizerError, naming
from minllama.model.config import LlamaConfig
from minllama.text import first_few
from minllama.tokenizer.load import find_vocabulary, load_vocabulary
from minllama.tokenizer.vocabulary import Vocabulary

__all__ = [
    "Checkpoint",
    "LazyTensor",
    "open_checkpoint",
    "read_tokenizer",
    "write_gguf",
    "write_huggingface",
    "write_llama2c_bin",
]

CLASSIFIER_FILE = "classifier.json"

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
    base: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Open a checkpoint; headers are read, weights are not, nor is its own vocabulary.

    Args:
        source: a file, a folder or a Hugging Face id; None for the embedded default model. A PEFT
            adapter's folder is merged into its base.
        tokenizer: file or folder of the tokenizer, or of a checkpoint that has one, if it is not in
            or beside the checkpoint.
        base: the base model of an adapter, if its adapter_config.json names none or it has moved.

    Raises:
        CheckpointError: it is missing, damaged, of an unknown format, or not a Llama.
        TokenizerError: the given tokenizer is damaged.
    """
    path = resolve_source(source)
    folder = _adapter_folder(path)
    if base is not None and folder is None:
        raise CheckpointError(f"{path}: not a PEFT adapter, so it has no base; omit --base")
    try:
        if folder is not None:
            checkpoint = with_adapter(open_base(folder, base), folder)
        else:
            checkpoint = _reader(path)(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if tokenizer is not None:
        vocabulary = read_tokenizer(tokenizer)
        checkpoint = dataclasses.replace(
            checkpoint, read_vocabulary=lambda: vocabulary, tokenizer=canonical_name(tokenizer)
        )
    return dataclasses.replace(checkpoint, source=canonical_name(source))


def open_config(source: str | os.PathLike[str] | None = None) -> LlamaConfig:
    """The config of a checkpoint, whose weights need not be there.

    Args:
        source: as for `open_checkpoint`; also a config.json, or a folder with one and no weights.
            Of a Hugging Face id only that file is downloaded.

    Raises:
        CheckpointError: it is missing, damaged, of an unknown format, or not a Llama.
    """
    path = resolve_config(source)
    if path.is_dir() and is_huggingface(path) and not has_weights(path) and not gguf_models(path):
        path /= "config.json"
    if path.suffix == ".json" and path.is_file():
        with naming(path):
            return config_from_huggingface(read_object(path))
    return open_checkpoint(source).config


def read_tokenizer(source: str | os.PathLike[str]) -> Vocabulary:
    """The vocabulary of a file or folder: a tokenizer's own, or a GGUF file's.

    A folder without a tokenizer but with one GGUF file means that file.

    Raises:
        CheckpointError: a GGUF file is truncated or damaged.
        TokenizerError: it is missing or damaged.
    """
    path = Path(source)
    if path.is_dir() and find_vocabulary(path) is None and (models := gguf_models(path)):
        path = _only_one(path, models)
    if not is_gguf(path):
        return load_vocabulary(path)
    vocabulary = read_gguf_vocabulary(path)
    if vocabulary is None:
        raise TokenizerError(f"{path}: this GGUF file has no tokenizer; name another file")
    return vocabulary


def vocabulary_of(source: str | os.PathLike[str] | None) -> Vocabulary | None:
    """The vocabulary of a checkpoint, or of a file or folder that is only a tokenizer.

    Raises:
        CheckpointError: there is no such checkpoint.
        TokenizerError: its tokenizer is damaged.
    """
    try:
        return open_checkpoint(source).vocabulary
    except CheckpointError:
        vocabulary = None if source is None else _lone_vocabulary(Path(source))
        if vocabulary is None:
            raise
        return vocabulary


def _lone_vocabulary(path: Path) -> Vocabulary | None:
    """The vocabulary in a folder or file that is not a checkpoint, `None` without one."""
    if path.is_dir():
        # For a folder that is neither, the checkpoint's error is more specific.
        is_one = find_vocabulary(path) is not None or bool(gguf_models(path))
    else:
        is_one = is_gguf(path)
    with contextlib.suppress(CheckpointError, *(() if is_one else (TokenizerError,))):
        return read_tokenizer(path)
    return None


def _adapter_folder(path: Path) -> Path | None:
    """The PEFT adapter's folder that `path` is, or that contains it; None for anything else.

    As in transformers, an adapter takes precedence over a whole model in the same folder.
    """
    names = (CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE)
    folder = path if path.is_dir() else path.parent if path.name in names else None
    if folder is None or not is_adapter(folder):
        return None
    if (folder / CLASSIFIER_FILE).is_file():
        raise CheckpointError(
            f"{path}: a classifier, not a generative model; use minllama classify or evaluate, "
            "or convert it to a complete model (minllama merge)"
        )
    return folder


def open_base(folder: Path, base: str | os.PathLike[str] | None = None) -> Checkpoint:
    """The model that an adapter is for: the named one, or that of its adapter_config.json.

    Raises:
        CheckpointError: there is none, or it cannot be opened.
    """
    name = base if base is not None else read_adapter_config(folder).base_model_name
    remedy = "name it with --base (base= in Python)"
    if not name:
        raise CheckpointError(f"{folder}: {CONFIG_FILE} names no base model; {remedy}")
    sibling = folder / name
    try:
        if base is None and not Path(name).exists() and sibling.exists():
            path = sibling
        else:
            path = resolve_source(source_of(os.fspath(name)))
        is_itself = path.is_dir() and path.resolve() == folder.resolve()
        if not is_itself and _adapter_folder(path) is not None:
            raise CheckpointError("it is an adapter itself; merge it first (minllama convert)")
        return _reader(path)(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: its base model {os.fspath(name)!r} cannot be opened ({error}); {remedy}"
        ) from error


def _reader(path: Path) -> Callable[[Path], Checkpoint]:
    if path.is_dir():
        return _reader_of_folder(path)
    if not path.is_file():  # a pipe or a device, such as /dev/stdin
        raise CheckpointError(
            f"{path}: neither a file nor a folder; save the checkpoint and name its path"
        )
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty; download it again")
    for recognizes, read in FILES:
        if recognizes(path):
            return read
    # One file of a folder's checkpoint opens the folder.
    for recognizes, read in FOLDERS:
        if recognizes(path.parent):
            return lambda file: read(file.parent)
    raise CheckpointError(
        f"{path}: not a checkpoint format that minllama reads (Hugging Face, GGUF, Meta, llama2.c)"
    )


def _reader_of_folder(path: Path) -> Callable[[Path], Checkpoint]:
    models = gguf_models(path)
    for recognizes, read in FOLDERS:
        # Folders of GGUF files often contain the config.json of the original model.
        if recognizes(path) and not (models and read is read_huggingface and not has_weights(path)):
            return read
    if not models:
        raise CheckpointError(
            f"{path}: the folder contains neither config.json (Hugging Face), params.json (Meta) "
            "nor a .gguf file; name a checkpoint's file or folder"
        )
    model = _only_one(path, models)
    return lambda folder: read_gguf(model)


def _only_one(folder: Path, models: list[Path]) -> Path:
    if len(models) > 1:
        names = first_few((model.name for model in models), 20)
        raise CheckpointError(f"{folder}: contains several GGUF files; name one of {names}")
    return models[0]
