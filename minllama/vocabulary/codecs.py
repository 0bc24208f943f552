"""A vocabulary at work: text -> ids by the library that reads its form, and id -> bytes by a table.

One class for each form, all with the same face. Knows nothing of BOS, EOS and lengths: what a text
gets around it is `minllama.tokenizer`'s business.
"""

import abc
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from minllama.errors import TokenizerError
from minllama.vocabulary import byte_level, tiktoken_form, tokenizers_form
from minllama.vocabulary.base import MAX_VOCAB_SIZE, Form, TokenType, Vocabulary
from minllama.vocabulary.sentencepiece_form import SPACE, parse_model

# Meta's limits for tiktoken (llama3/tokenizer.py): longer texts, and longer runs without or of
# nothing but white space, overflow its regular expressions. Cut at the same places, ids are equal.
TIKTOKEN_MAX_CHARS = 400_000
TIKTOKEN_MAX_RUN = 25_000
_MAX_REASON_CHARS = 200
_RUN = re.compile(r"\s+|\S+")


class Codec(abc.ABC):
    """Text <-> ids for one vocabulary.

    Attributes:
        tokens: id -> the bytes that it stands for; of special tokens, those of their text.
        special: text -> id of the tokens that a text becomes only when asked.
        space_ids: ids whose first byte, a space, belongs to the tokenizer and not to the text
            where they come first; empty for vocabularies that put no space there.
    """

    tokens: list[bytes]
    special: dict[str, int]
    space_ids: frozenset[int] = frozenset()

    @abc.abstractmethod
    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """Ids of `text`, none of them special; `first`: it is the beginning, not after a token."""

    def encode_special(self, text: str) -> list[int]:
        """Ids of `text`, in which the texts of special tokens are these tokens."""
        ids: list[int] = []
        for i, (part, token_id) in enumerate(self.split_special(text)):
            if token_id is not None:
                ids.append(token_id)
            elif part:
                ids += self.encode(part, first=i == 0)
        return ids

    def split_special(self, text: str) -> Iterator[tuple[str, int | None]]:
        """The parts of `text` in order: plain text and `None`, or a special token and its id."""
        end = 0
        for match in self._special_pattern.finditer(text):
            yield text[end : match.start()], None
            yield match[0], self.special[match[0]]
            end = match.end()
        yield text[end:], None

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        # The longest first, as tokenizers match them.
        texts = sorted(self.special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def open_codec(vocabulary: Vocabulary) -> Codec:
    """The codec for a vocabulary's form.

    Raises:
        TokenizerError: the vocabulary is damaged.
    """
    codecs: dict[Form, Callable[[Vocabulary], Codec]] = {
        "sentencepiece": _SentencePieceCodec,
        "tokenizers": _TokenizersCodec,
        "tiktoken": _TiktokenCodec,
    }
    return codecs[vocabulary.form](vocabulary)


class _SentencePieceCodec(Codec):
    """Puts a space before a text and, as Meta's code and llama.cpp do, behind special tokens."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from sentencepiece import SentencePieceProcessor

        model = parse_model(vocabulary.data, vocabulary.origin)
        with _library_errors(vocabulary):
            self._processor = SentencePieceProcessor(model_proto=vocabulary.data)
        self.tokens, self.special, space_ids = [], {}, []
        for i, piece in enumerate(model.pieces):
            if piece.type == TokenType.BYTE:
                self.tokens.append(_byte_of(piece.piece))
                continue
            if piece.type in (TokenType.CONTROL, TokenType.UNKNOWN):
                self.special[piece.piece] = i
            elif piece.piece.startswith(SPACE):
                space_ids.append(i)
            self.tokens.append(piece.piece.replace(SPACE, " ").encode())
        if model.normalizer_spec.add_dummy_prefix:
            self.space_ids = frozenset(space_ids)

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        return list(self._processor.encode(text))


class _TokenizersCodec(Codec):
    """Goes by its tokenizer.json; BOS and EOS of its template are left out."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._plain = self._open(special=False)
        # A component's pickled state is its part of the tokenizer.json.
        decoder = self._plain.decoder
        state = None if decoder is None else json.loads(decoder.__getstate__())
        kind = tokenizers_form.decoder_kind(state, vocabulary.origin)
        added = self._plain.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        ids = self._plain.get_vocab(with_added_tokens=True)
        n_tokens = max(ids.values(), default=-1) + 1
        if n_tokens > MAX_VOCAB_SIZE:
            raise TokenizerError(f"{vocabulary.origin}: a token has the id {n_tokens - 1}")
        self.tokens = [b""] * n_tokens
        space_ids = []
        unspell = byte_level.unspell if kind.byte_level else _unspell_piece
        for text, i in ids.items():
            if i in added:
                self.tokens[i] = text.encode()
                continue
            self.tokens[i] = unspell(text)
            if kind.strips_space and text.startswith(SPACE):
                space_ids.append(i)
        self.space_ids = frozenset(space_ids)

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        return self._ids(self._plain if first else self._behind, text)

    def encode_special(self, text: str) -> list[int]:
        # Not by our own parts: its special tokens may take in the spaces around them.
        return self._ids(self._parsing, text)

    def _ids(self, tokenizer: Any, text: str) -> list[int]:
        with _library_errors(self._vocabulary):
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _parsing(self) -> Any:
        """The tokenizer that takes the texts of special tokens for these."""
        return self._open(special=True)

    @cached_property
    def _behind(self) -> Any:
        """The tokenizer for text behind a special token, where that makes a difference."""
        from tokenizers.pre_tokenizers import Metaspace

        if getattr(self._plain.pre_tokenizer, "prepend_scheme", None) != "first":
            return self._plain
        tokenizer = self._open(special=False)
        old = tokenizer.pre_tokenizer
        tokenizer.pre_tokenizer = Metaspace(
            old.replacement, prepend_scheme="never", split=old.split
        )
        return tokenizer

    def _open(self, *, special: bool) -> Any:
        from tokenizers import Tokenizer

        with _library_errors(self._vocabulary):
            tokenizer = Tokenizer.from_str(self._vocabulary.data.decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = not special
        return tokenizer


class _TiktokenCodec(Codec):
    """Llama 3's pattern and special tokens around the ranks."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from tiktoken import Encoding

        ranks = tiktoken_form.parse_ranks(vocabulary.data, vocabulary.origin)
        self.special = tiktoken_form.special_tokens(len(ranks))
        self.tokens = [*ranks, *(text.encode() for text in self.special)]
        self._encoding = Encoding(
            name="llama3",
            pat_str=byte_level.LLAMA3_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special,
        )

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        ids: list[int] = []
        for chunk in _tiktoken_chunks(text):
            ids += self._encoding.encode_ordinary(chunk)
        return ids


def _tiktoken_chunks(text: str) -> Iterator[str]:
    for begin in range(0, len(text), TIKTOKEN_MAX_CHARS):
        part = text[begin : begin + TIKTOKEN_MAX_CHARS]
        done = 0
        if len(part) > TIKTOKEN_MAX_RUN:
            for run in _RUN.finditer(part):
                for cut in range(run.start() + TIKTOKEN_MAX_RUN, run.end(), TIKTOKEN_MAX_RUN):
                    yield part[done:cut]
                    done = cut
        yield part[done:]


def _unspell_piece(text: str) -> bytes:
    return _byte_of(text) if _BYTE.fullmatch(text) else text.replace(SPACE, " ").encode()


_BYTE = re.compile("<0x[0-9A-F]{2}>")


def _byte_of(piece: str) -> bytes:
    return bytes([int(piece[3:5], 16)])


@contextlib.contextmanager
def _library_errors(vocabulary: Vocabulary) -> Iterator[None]:
    """What a library says of a damaged vocabulary, in one line of ours."""
    try:
        yield
    except BaseException as error:
        # The libraries raise nothing more specific; a panic of Rust's is not even an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:_MAX_REASON_CHARS]
        raise TokenizerError(
            f"{vocabulary.origin}: damaged tokenizer ({reason}); get the file again"
        ) from error
