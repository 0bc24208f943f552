"""Byte-level BPE (Radford et al. 2019): its alphabet, and the pre-tokenizers that GGUF names.

GPT-2 spells a token's bytes as printable characters; a pre-tokenizer cuts a text into the words
inside which pairs are merged. Knows nothing of GGUF's other fields, nor of folders.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from minllama.errors import TokenizerError
from minllama.vocabulary.base import TokenType
from minllama.vocabulary.tokenizers_form import Json, added_token, bpe_model, components, document

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

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class PreTokenizer(NamedTuple):
    """One of GGUF's `tokenizer.ggml.pre`.

    Attributes:
        component: the same as the `pre_tokenizer` of a tokenizer.json.
        ignore_merges: a word that is a token is that token, whatever the merges say.
    """

    component: Json
    ignore_merges: bool = False


def _split(pattern: str) -> Json:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _bytes(*, use_regex: bool) -> Json:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _sequence(*parts: Json) -> Json:
    return {"type": "Sequence", "pretokenizers": list(parts)}


PRE_TOKENIZERS = {
    "smollm": PreTokenizer(
        _sequence({"type": "Digits", "individual_digits": True}, _bytes(use_regex=True))
    ),
    "llama-bpe": PreTokenizer(
        _sequence(_split(LLAMA3_PATTERN), _bytes(use_regex=False)), ignore_merges=True
    ),
    "gpt-2": PreTokenizer(_bytes(use_regex=True)),
    # llama.cpp's choice for files that name none: punctuation alone, then GPT-2's words, and
    # digits in threes.
    "default": PreTokenizer(
        _sequence(
            _split(r"[\p{P}\$\+<=>\^~\|]+"),
            _split(GPT2_PATTERN),
            _split(r"\p{N}+"),
            _split(r"[0-9][0-9][0-9]"),
            _bytes(use_regex=False),
        )
    ),
}

# Other names that files have for them, in llama.cpp as well.
ALIASES = dict.fromkeys(("llama3", "llama-v3", "falcon3"), "llama-bpe")


def spell(token: bytes) -> str:
    """The bytes of a token, as the vocabulary spells them: b" the" is `Ġthe`."""
    return token.decode("latin-1").translate(_TO_CHARS)


def unspell(token: str) -> bytes:
    """The bytes that a spelling stands for; with a character outside the alphabet, its own text."""
    try:
        return token.translate(_TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


def build(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str, where: str
) -> Json:
    """The content of a tokenizer.json for a byte-level vocabulary.

    Args:
        tokens: in the order of their ids, spelt in GPT-2's alphabet; control and user-defined ones
            as they are.
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
            f"{where}: unknown pre-tokenizer {pre!r}; known are {', '.join(PRE_TOKENIZERS)}"
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
        decoder=_bytes(use_regex=True),
        model=bpe_model(vocab, merges, ignore_merges=PRE_TOKENIZERS[pre].ignore_merges),
    )


def pre_tokenizer_name(raw: Json, where: str) -> str:
    """Which of PRE_TOKENIZERS the content of a tokenizer.json has.

    Raises:
        TokenizerError: none of them, or it treats the text in a way that GGUF has no field for.
    """
    component = raw.get("pre_tokenizer")
    meaning = _meaning(component)
    name = next(
        (n for n, pre in PRE_TOKENIZERS.items() if _meaning(pre.component) == meaning), None
    )
    if name is None:
        raise TokenizerError(
            f"{where}: its pre_tokenizer is none that GGUF has a name for; "
            f"known are {', '.join(PRE_TOKENIZERS)}"
        )
    if raw.get("normalizer"):
        raise TokenizerError(f"{where}: it normalizes the text, which GGUF has no field for")
    if bool(raw["model"].get("ignore_merges")) != PRE_TOKENIZERS[name].ignore_merges:
        raise TokenizerError(
            f"{where}: it cuts words as {name} does, and differs from it in ignore_merges"
        )
    return name


def _meaning(component: Any) -> list[Json]:
    """What a pre_tokenizer does, without what only affects offsets or restates defaults."""
    parts = [dict(part) for part in components(component, "pretokenizers")]
    for part in parts:
        part.pop("trim_offsets", None)
        if part["type"] == "ByteLevel":
            part.setdefault("use_regex", True)  # absent in older files
    return parts
