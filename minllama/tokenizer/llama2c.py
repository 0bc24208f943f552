"""Read llama2.c's `tokenizer.bin` as a vocabulary.

The file is an abridged SentencePiece vocabulary (llama2.c's tokenizer.py, `export`): an int32, the
longest token's length; then for each token a float32 score, an int32 length, and its bytes, with
plain spaces.
"""

import math
import os
import struct

from minllama.errors import TokenizerError
from minllama.tokenizer.sentencepiece_form import BYTE_PIECES, SPACE, Piece, build_model
from minllama.tokenizer.vocabulary import MAX_VOCAB_SIZE, TokenType, Vocabulary

UNK_ID, BOS_ID, EOS_ID, FIRST_BYTE_ID = 0, 1, 2, 3  # Llama 2's, which are constants in run.c
_SPECIAL = ("<unk>", "<s>", "</s>")  # the export writes the last two between line breaks

_MAX_TOKEN_BYTES = 2**16
_HEAD = struct.Struct("<i")
_TOKEN = struct.Struct("<fi")


def is_llama2c_bin(data: bytes) -> bool:
    """Whether `data` is a tokenizer.bin from beginning to end."""
    try:
        return len(_tokens(data, "")) > FIRST_BYTE_ID + len(BYTE_PIECES)
    except TokenizerError:
        return False


def from_llama2c_bin(data: bytes, where: str | os.PathLike[str]) -> Vocabulary:
    """The vocabulary in the bytes of a tokenizer.bin.

    Raises:
        TokenizerError: it is truncated or damaged.
    """
    pieces = []
    for i, (text, score) in enumerate(_tokens(data, str(where))):
        kind = TokenType.NORMAL
        if i < len(_SPECIAL):
            if text.strip("\n") != _SPECIAL[i]:
                raise TokenizerError(f"{where}: token {i} is {text!r}, not {_SPECIAL[i]}")
            text, kind = _SPECIAL[i], TokenType.UNKNOWN if i == UNK_ID else TokenType.CONTROL
        elif i < FIRST_BYTE_ID + len(BYTE_PIECES):
            kind = TokenType.BYTE
        pieces.append(Piece(text.replace(" ", SPACE), score, kind))
    model = build_model(
        pieces, add_dummy_prefix=True, bos_id=BOS_ID, eos_id=EOS_ID, where=str(where)
    )
    return Vocabulary(
        storage_format="sentencepiece",
        data=model,
        origin="llama2.c tokenizer.bin",
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        add_bos=True,
    )


def _tokens(data: bytes, where: str) -> list[tuple[str, float]]:
    """Text and score of each token, in the order of their ids."""

    def damaged(problem: str) -> TokenizerError:
        return TokenizerError(
            f"{where}: not a complete tokenizer.bin ({problem}); download the file again"
        )

    if len(data) < _HEAD.size:
        raise damaged(f"{len(data)} bytes")
    (longest,) = _HEAD.unpack_from(data)
    if not 0 < longest <= _MAX_TOKEN_BYTES:
        raise damaged(f"its longest token allegedly has {longest} bytes")
    tokens: list[tuple[str, float]] = []
    offset = _HEAD.size
    while offset < len(data):
        if len(tokens) == MAX_VOCAB_SIZE:
            raise damaged(f"more than {MAX_VOCAB_SIZE} tokens")
        if offset + _TOKEN.size > len(data):
            raise damaged(f"truncated in token {len(tokens)}")
        score, n_bytes = _TOKEN.unpack_from(data, offset)
        offset += _TOKEN.size
        if not 0 < n_bytes <= longest or not math.isfinite(score):
            raise damaged(f"token {len(tokens)} has {n_bytes} bytes and the score {score}")
        text = data[offset : offset + n_bytes]
        if len(text) < n_bytes:
            raise damaged(f"truncated in token {len(tokens)}")
        offset += n_bytes
        try:
            tokens.append((text.decode(), score))
        except UnicodeDecodeError:
            raise damaged(f"token {len(tokens)} is not UTF-8") from None
    return tokens
