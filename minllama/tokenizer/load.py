"""Load the vocabulary at a path, recognized by content.

A file is a SentencePiece model, a tokenizer.json, tiktoken's ranks or llama2.c's tokenizer.bin; a
folder is Hugging Face's, Meta's or llama2.c's.
"""

import os
from pathlib import Path

from minllama.errors import TokenizerError
from minllama.tokenizer import huggingface, llama2c, sentencepiece_form, tiktoken_form
from minllama.tokenizer.huggingface import TOKENIZER_JSON, TOKENIZER_MODEL
from minllama.tokenizer.vocabulary import Vocabulary

# The first that exists counts: a tokenizer.json contains tokens that were added later.
NAMES = (TOKENIZER_JSON, TOKENIZER_MODEL, "tokenizer.bin")
_MAX_BYTES = 2**26  # twice the largest known vocabulary


def load_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """The vocabulary in a file or folder.

    Raises:
        TokenizerError: it is missing or damaged.
    """
    path = Path(path)
    try:
        is_folder = path.is_dir()
    except OSError as error:  # a name too long, or no permission
        raise TokenizerError(f"{path}: {error.strerror}; name a tokenizer's path") from error
    if is_folder:
        vocabulary = find_vocabulary(path)
        if vocabulary is None:
            raise TokenizerError(
                f"{path}: no tokenizer in this folder; known: {_supported_formats()}"
            )
        return vocabulary
    if not path.is_file():
        raise TokenizerError(f"{path}: no such file or folder; name a tokenizer's")
    return _load_file(path)


def find_vocabulary(folder: str | os.PathLike[str]) -> Vocabulary | None:
    """The vocabulary in a folder; None without one.

    Raises:
        TokenizerError: it is damaged.
    """
    folder = Path(folder)
    for name in NAMES:
        if (folder / name).is_file():
            return huggingface.with_settings(_load_file(folder / name), folder)
    return None


def _load_file(path: Path) -> Vocabulary:
    try:
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                raise TokenizerError(
                    f"{path} is a GGUF file; open it with Tokenizer.from_pretrained or --tokenizer"
                )
        if path.stat().st_size > _MAX_BYTES:
            raise TokenizerError(
                f"{path}: too large to be a tokenizer; known: {_supported_formats()}"
            )
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror or error})") from error
    where = str(path)
    if not data.strip():
        raise TokenizerError(f"{path}: the file is empty; download it again")
    if data.lstrip()[:1] == b"{":
        return huggingface.from_tokenizer_json(data, where)
    if tiktoken_form.is_ranks(data):
        return tiktoken_form.from_ranks(data, where)
    if llama2c.is_llama2c_bin(data):
        return llama2c.from_llama2c_bin(data, where)
    try:
        return sentencepiece_form.from_model(data, where)
    except TokenizerError as error:
        raise TokenizerError(
            f"{path}: not a tokenizer, or damaged; known: {_supported_formats()}"
        ) from error


def _supported_formats() -> str:
    return f"{TOKENIZER_JSON}, {TOKENIZER_MODEL} (SentencePiece, tiktoken), tokenizer.bin"
