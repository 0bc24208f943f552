"""Convert GGUF's `tokenizer.*` fields to a vocabulary.

The fields have the meaning of llama.cpp (src/llama-vocab.cpp). Takes them as plain Python values;
`minllama.checkpoints.gguf` calls it.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from minllama.errors import TokenizerError
from minllama.tokenizer import byte_level, sentencepiece_form, tokenizers_form
from minllama.tokenizer.gguf_export import (
    BYTE_LEVEL,
    ENDS,
    LATER_ENDS,
    MODEL,
    PIECES,
    PREFIX,
    TEMPLATE,
    TOKEN_FIELDS,
    to_gguf,
)
from minllama.tokenizer.vocabulary import MAX_VOCAB_SIZE, TokenType, Vocabulary

__all__ = ["from_gguf", "to_gguf"]

NONE = ("none", "no_vocab")  # how a GGUF file marks that it has no vocabulary


def from_gguf(fields: Mapping[str, Any], where: str | os.PathLike[str]) -> Vocabulary | None:
    """The vocabulary in a GGUF file's fields; `None` where it has none.

    Args:
        fields: key -> plain Python value (str, int, float, bool, list), all of the file's.
        where: the file, for error messages.

    Raises:
        TokenizerError: a field is missing or damaged, or the kind of tokenizer or pre-tokenizer is
            unknown.
    """
    model = fields.get(MODEL)
    if model is None or model in NONE:
        return None
    if model not in (PIECES, BYTE_LEVEL):
        raise TokenizerError(
            f"{where}: unknown tokenizer {model!r}; known: {PIECES!r} (SentencePiece) and "
            f"{BYTE_LEVEL!r} (byte-level BPE)"
        )
    reader = _Fields(fields, str(where))
    tokens = reader.strings("tokens")
    types = reader.types(len(tokens))
    pre = reader.string("pre", "default") if model == BYTE_LEVEL else ""
    # By default, llama.cpp prepends BOS for pieces and some byte-level kinds.
    kind = byte_level.PRE_TOKENIZERS.get(byte_level.ALIASES.get(str(pre), str(pre)))
    begins = model == PIECES or (kind is not None and kind.add_bos)
    vocabulary = Vocabulary(
        storage_format="tokenizers",
        data=b"",
        origin=f"GGUF {model}" + (f" ({pre})" if pre else ""),
        bos_id=reader.token("bos", _control(model, types, 1)),
        eos_id=reader.token("eos", _control(model, types, 2)),
        pad_id=reader.token("padding"),
        add_bos=reader.flag("add_bos_token", begins),
        add_eos=reader.flag("add_eos_token", False),
        chat_template=reader.string(TEMPLATE, None),
        chat_templates=reader.templates(),
        named_tokens={
            name: tokens[token_id]
            for name, key in TOKEN_FIELDS.items()
            if (token_id := reader.token(key)) is not None
        },
    )
    bos_id, eos_id = vocabulary.bos_id, vocabulary.eos_id
    stop_ids = _stop_ids(reader, tokens, types, eos_id)
    for token_id in (bos_id, eos_id, *stop_ids):
        # Some converters leave them ordinary; text must not become them all the same.
        if token_id is not None and types[token_id] != TokenType.UNKNOWN:
            types[token_id] = TokenType.CONTROL
    build = _pieces if model == PIECES else _byte_level
    return dataclasses.replace(
        vocabulary,
        storage_format="sentencepiece" if model == PIECES else "tokenizers",
        data=build(reader, tokens, types, vocabulary),
        add_bos=vocabulary.add_bos and bos_id is not None,
        add_eos=vocabulary.add_eos and eos_id is not None,
        stop_ids=stop_ids,
    )


def _stop_ids(
    reader: "_Fields", tokens: list[str], types: list[int], eos_id: int | None
) -> tuple[int, ...]:
    """Tokens besides `eos_id` that end a text: those that the fields name, and known ones."""
    usable = (TokenType.NORMAL, TokenType.CONTROL, TokenType.USER_DEFINED)
    ends = {*ENDS, *LATER_ENDS}
    usual = (i for i, text in enumerate(tokens) if text in ends and types[i] in usable)
    further = dict.fromkeys((reader.token("eot"), reader.token("eom"), *usual))
    return tuple(i for i in further if i is not None and i != eos_id)


def _control(model: str, types: list[int], token_id: int) -> int | None:
    """llama.cpp's default of a SentencePiece-like file, if it is a control token there."""
    is_control = token_id < len(types) and types[token_id] == TokenType.CONTROL
    return token_id if model == PIECES and is_control else None


def _byte_level(
    reader: "_Fields", tokens: list[str], types: list[int], vocabulary: Vocabulary
) -> bytes:
    pre = reader.string("pre", "default")
    # The gguf package leaves an empty list out.
    merges = reader.strings("merges") if reader.has("merges") else []
    raw = byte_level.build(tokens, types, merges, str(pre), reader.where)
    prefix = vocabulary.bos_id if vocabulary.add_bos else None
    suffix = vocabulary.eos_id if vocabulary.add_eos else None
    return tokenizers_form.dump(tokenizers_form.with_template(raw, prefix, suffix))


def _pieces(
    reader: "_Fields", tokens: list[str], types: list[int], vocabulary: Vocabulary
) -> bytes:
    scores = reader.scores(len(tokens))
    unknown = [i for i, kind in enumerate(types) if kind == TokenType.UNKNOWN]
    named = [0] if tokens[0] == "<unk>" else []
    unk_id = reader.token("unknown", next(iter(unknown + named), None))
    for token_id in unknown:
        types[token_id] = TokenType.CONTROL
    if unk_id is not None:
        types[unk_id] = TokenType.UNKNOWN  # SentencePiece has exactly one
    return sentencepiece_form.build_model(
        [sentencepiece_form.Piece(*piece) for piece in zip(tokens, scores, types, strict=True)],
        add_dummy_prefix=reader.flag("add_space_prefix", True),
        remove_extra_whitespaces=reader.flag("remove_extra_whitespaces", False),
        bos_id=vocabulary.bos_id,
        eos_id=vocabulary.eos_id,
        where=reader.where,
    )


class _Fields:
    """Typed access to the fields below `tokenizer.ggml.`; a TokenizerError where one is damaged."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self._fields = fields
        self.where = where
        self._n_tokens = 0

    def _mistyped(self, key: str, expected_type: str) -> TokenizerError:
        return TokenizerError(
            f"{self.where}: {key} is not {expected_type}; download the file again"
        )

    def has(self, name: str) -> bool:
        return PREFIX + name in self._fields

    def string(self, name: str, default: str | None) -> str | None:
        key = name if name == TEMPLATE else PREFIX + name
        value = self._fields.get(key, default)
        if value is not None and not isinstance(value, str):
            raise self._mistyped(key, "a string")
        return value

    def templates(self) -> dict[str, str]:
        """Name -> source of the chat templates that have one."""
        begins = TEMPLATE + "."
        named = {key: value for key, value in self._fields.items() if key.startswith(begins)}
        for key, value in named.items():
            if not isinstance(value, str):
                raise self._mistyped(key, "a string")
        return {key.removeprefix(begins): value for key, value in named.items()}

    def flag(self, name: str, default: bool) -> bool:
        value = self._fields.get(PREFIX + name, default)
        if not isinstance(value, bool):
            raise self._mistyped(PREFIX + name, "true or false")
        return value

    def strings(self, name: str) -> list[str]:
        value = self._fields.get(PREFIX + name)
        if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
            raise self._mistyped(PREFIX + name, "a list of strings")
        if name == "tokens":
            if not 0 < len(value) <= MAX_VOCAB_SIZE:
                raise TokenizerError(f"{self.where}: a vocabulary of {len(value)} tokens")
            self._n_tokens = len(value)
        return list(value)

    def types(self, n_tokens: int) -> list[int]:
        values = self._token_values("token_type", n_tokens, TokenType.NORMAL)
        # Some files have type 0, undefined, for all tokens.
        return [int(value) or TokenType.NORMAL for value in values]

    def scores(self, n_tokens: int) -> list[float]:
        return self._token_values("scores", n_tokens, None)

    def _token_values(self, name: str, n_tokens: int, default: int | None) -> list[float]:
        values = self._fields.get(PREFIX + name)
        if values is None and default is not None:
            return [default] * n_tokens
        if not isinstance(values, Sequence) or len(values) != n_tokens:
            raise self._mistyped(PREFIX + name, f"a list of {n_tokens} numbers, one for each token")
        if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            raise self._mistyped(PREFIX + name, "a list of finite numbers")
        return list(values)

    def token(self, name: str, default: int | None = None) -> int | None:
        """The id in `{name}_token_id`; as in llama.cpp, one out of range counts as not given."""
        value = self._fields.get(f"{PREFIX}{name}_token_id", default)
        if type(value) is not int or not 0 <= value < self._n_tokens:
            value = default
        return value if value is not None and value < self._n_tokens else None
