"""Byte-level BPE (Radford et al. 2019): its alphabet, and vocabularies spelled in it.

GPT-2 spells a token's bytes as printable characters. `minllama.tokenizer.pre_tokenizers` has the
patterns that split a text into words. The GGUF reader and writer call it.
"""

from collections.abc import Sequence
from typing import Any

from minllama.errors import TokenizerError
from minllama.tokenizer.pre_tokenizers import (
    ALIASES,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    PRE_TOKENIZERS,
    split,
    to_bytes,
)
from minllama.tokenizer.tokenizers_form import Json, added_token, bpe_model, components, document
from minllama.tokenizer.vocabulary import TokenType

__all__ = [
    "ALIASES",
    "BYTE_CHARS",
    "GPT2_PATTERN",
    "LLAMA3_PATTERN",
    "PRE_TOKENIZERS",
    "build",
    "document_of",
    "pre_tokenizer_name",
    "spell",
    "unspell",
]

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
# Bytes that print as themselves in Latin-1 keep that character; the others follow from U+0100.
BYTE_CHARS = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(0x100 + i) for i, byte in enumerate(_OTHERS)
}
_NOT_LATIN1 = 0x100  # characters outside the alphabet, which `unspell` cannot encode then
_TO_LATIN1 = dict.fromkeys(range(256), _NOT_LATIN1) | {
    ord(char): byte for byte, char in BYTE_CHARS.items()
}
_TO_CHARS = dict(BYTE_CHARS)


def spell(token: bytes) -> str:
    """The bytes of a token, as the vocabulary spells them: b" the" is `Ġthe`."""
    return token.decode("latin-1").translate(_TO_CHARS)


def unspell(token: str) -> bytes:
    """The bytes that a spelling encodes; with a character outside the alphabet, its own text."""
    try:
        return token.translate(_TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


def build(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str, where: str
) -> Json:
    """The content of a tokenizer.json for a byte-level vocabulary.

    Args:
        tokens: in the order of their ids, in GPT-2's alphabet; control and user-defined tokens
            unchanged.
        types: a TokenType for each.
        merges: pairs of tokens with a space between, best first.
        pre: one of PRE_TOKENIZERS, or of ALIASES.
        where: the source, for error messages.

    Raises:
        TokenizerError: two tokens are the same, or the pre-tokenizer is unknown.
    """
    pre = ALIASES.get(pre, pre)
    if pre not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"{where}: unknown pre-tokenizer {pre!r}; known: {', '.join(PRE_TOKENIZERS)}"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(i for i, token in enumerate(tokens) if vocab[token] != i)
        raise TokenizerError(
            f"{where}: tokens {twice} and {vocab[tokens[twice]]} are both {tokens[twice]!r}"
        )
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    added = [
        added_token(i, tokens[i], special=kind in special)
        for i, kind in enumerate(types)
        if kind in special or kind == TokenType.USER_DEFINED
    ]
    return document_of(added, pre, vocab, merges)


def document_of(
    added_tokens: list[Json],
    pre: str,
    vocab: dict[str, int],
    merges: Sequence[str | tuple[str, str]],
) -> Json:
    """The content of a tokenizer.json: token -> id in `vocab`, pairs in `merges`, best first."""
    return document(
        added_tokens=added_tokens,
        normalizer=None,
        pre_tokenizer=PRE_TOKENIZERS[pre].component,
        decoder=to_bytes(use_regex=True),
        model=bpe_model(vocab, merges, ignore_merges=PRE_TOKENIZERS[pre].ignore_merges),
    )


def pre_tokenizer_name(raw: Json, where: str) -> str:
    """Which of PRE_TOKENIZERS the content of a tokenizer.json has.

    Raises:
        TokenizerError: none of them, or it treats the text in a way that GGUF has no field for.
    """
    meaning = _meaning(raw.get("pre_tokenizer"))
    names = [name for name, pre in PRE_TOKENIZERS.items() if _meaning(pre.component) == meaning]
    if not names:
        raise TokenizerError(
            f"{where}: GGUF has no name for its pre_tokenizer; known: {', '.join(PRE_TOKENIZERS)}"
        )
    if raw.get("normalizer"):
        raise TokenizerError(f"{where}: it normalizes text, which GGUF cannot represent")
    ignores = bool(raw["model"].get("ignore_merges"))
    for name in names:
        if PRE_TOKENIZERS[name].ignore_merges == ignores:
            return name
    raise TokenizerError(f"{where}: it splits words like {names[0]}, but differs in ignore_merges")


def _meaning(component: Any) -> list[Json]:
    """What a pre_tokenizer does, the same for components that do the same."""
    meaning = []
    for part in components(component, "pretokenizers"):
        canonical = dict(part)
        canonical.pop("trim_offsets", None)  # which only matters to offsets
        if part["type"] == "Digits":
            canonical = split(r"\p{N}" if part.get("individual_digits") else r"\p{N}+")
        elif part["type"] == "ByteLevel" and canonical.pop(
            "use_regex", True
        ):  # absent in older files
            if not part.get("add_prefix_space", True):
                meaning.append(split(GPT2_PATTERN))
            else:
                canonical["use_regex"] = True
        meaning.append(canonical)
    return meaning
