"""Llama 3's `tokenizer.model`: tiktoken's lines of base64 token and rank.

The special tokens are not in the file but in Meta's code, so they are here: 256 after the ranks,
with the names of Llama 3.1, which renamed reserved ones of Llama 3 (same ids).
"""

import base64
import binascii
import re

from minllama.errors import TokenizerError
from minllama.tokenizer import byte_level
from minllama.tokenizer.bounds import long_pieces
from minllama.tokenizer.tokenizers_form import Json, added_token
from minllama.tokenizer.vocabulary import MAX_VOCAB_SIZE, Vocabulary

N_SPECIAL_TOKENS = 256
_NAMED = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
_FIRST_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)")


def is_ranks(data: bytes) -> bool:
    """Whether `data` begins as a file of tiktoken does."""
    return _FIRST_LINE.match(data) is not None


def special_tokens(n_ranks: int) -> dict[str, int]:
    """Text -> id of Llama 3's special tokens, after `n_ranks` ordinary ones."""
    reserved = range(2, 2 + N_SPECIAL_TOKENS - len(_NAMED))
    texts = [*_NAMED, *(f"<|reserved_special_token_{i}|>" for i in reserved)]
    return {text: n_ranks + i for i, text in enumerate(texts)}


def parse_ranks(data: bytes, where: str) -> dict[bytes, int]:
    """Token -> rank, which is its id; lowest (best) first.

    Raises:
        TokenizerError: a line is damaged, the ranks are not 0, 1, 2, ..., or a byte is no token.
    """
    ranks = {}
    for line_number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(
                f"{where}: line {line_number} is not a base64 token and its rank; download the "
                "file again"
            ) from error
        if line_number > MAX_VOCAB_SIZE:
            raise TokenizerError(f"{where}: more lines than the limit for a vocabulary")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(
            f"{where}: {len(ranks)} tokens, but their ranks are not 0 to {len(ranks) - 1}; "
            "download the file again"
        )
    if (excess := long_pieces(map(len, ranks))) is not None:
        raise TokenizerError(f"{where}: {excess}; use the tokenizer of another source")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise TokenizerError(f"{where}: no token for the byte 0x{missing[0]:02X}")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def from_ranks(data: bytes, where: str) -> Vocabulary:
    """The vocabulary of a Llama 3 `tokenizer.model`."""
    ids = special_tokens(len(parse_ranks(data, where)))
    return Vocabulary(
        storage_format="tiktoken",
        data=data,
        origin="tiktoken (Llama 3)",
        bos_id=ids["<|begin_of_text|>"],
        eos_id=ids["<|end_of_text|>"],
        pad_id=ids["<|finetune_right_pad_id|>"],
        stop_ids=(ids["<|eom_id|>"], ids["<|eot_id|>"]),
        add_bos=True,
    )


def to_tokenizers(data: bytes, where: str) -> Json:
    """The same tokenizer as the content of a `tokenizer.json`.

    tiktoken joins any two neighbors that make a token, the lowest rank first, so the merges are
    all ways to cut each token into two.
    """
    ranks = parse_ranks(data, where)
    spelled = {token: byte_level.spell(token) for token in ranks}
    merges = [
        (spelled[token[:i]], spelled[token[i:]])
        for token in ranks
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    special = special_tokens(len(ranks))
    return byte_level.document_of(
        [added_token(i, text, special=True) for text, i in special.items()],
        "llama-bpe",
        {spelled[token]: rank for token, rank in ranks.items()},
        merges,
    )
