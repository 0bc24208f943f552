"""Encode and decode with a vocabulary: text to ids by its library, ids to bytes by a table.

One class for each stored form, all with the same interface. `minllama.tokenizer.tokenizer` adds BOS
and EOS.
"""

import abc
import contextlib
import json
import re
import secrets
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from minllama.errors import TokenizerError
from minllama.tokenizer import byte_level, tiktoken_form, tokenizers_form
from minllama.tokenizer.added_tokens import AddedToken, AddedTokens, Span
from minllama.tokenizer.sentencepiece_form import SPACE, parse_model
from minllama.tokenizer.vocabulary import (
    MAX_VOCAB_SIZE,
    StorageFormat,
    TokenFlags,
    TokenType,
    Vocabulary,
)

# Meta's limits for tiktoken (llama3/tokenizer.py): longer texts, and longer runs without or of
# nothing but white space, overflow its regular expressions. Cut at the same places, ids are equal.
TIKTOKEN_MAX_CHARS = 400_000
TIKTOKEN_MAX_RUN = 25_000
_MAX_REASON_CHARS = 200
_RUN = re.compile(r"\s+|\S+")

# Characters from which a text is encoded as a batch of one: `tokenizers` lets other threads run
# during a batch, and not during one text, which at a megabyte takes seconds.
LONG_TEXT = 10_000


class Codec(abc.ABC):
    """Text <-> ids for one vocabulary.

    Attributes:
        tokens: id -> its bytes; for special tokens, those of their text.
        special: text -> id of tokens that are only parsed on request.
        space_ids: ids whose first byte, a space, belongs to the tokenizer and not to the text
            where they come first; empty for vocabularies that put no space there.
        spaces_stretches: that space also follows special tokens, not only where a whole
            text begins.
    """

    tokens: list[bytes]
    special: dict[str, int]
    space_ids: frozenset[int] = frozenset()
    spaces_stretches: bool = True

    @abc.abstractmethod
    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """Ids of `text`, none of them special; `first`: it is the beginning, not after a token."""

    @abc.abstractmethod
    def find_special(self, text: str) -> Iterator[Span]:
        """The special tokens in `text`, and the stretches between them, in order."""

    def encode_special(self, text: str) -> list[int]:
        """Ids of `text`, in which the texts of special tokens are these tokens."""
        return self.encode_masked(text, text)

    def encode_masked(self, text: str, shown: str) -> list[int]:
        """Ids of `text`, whose special tokens are where `shown`, of the same length, has them."""
        ids: list[int] = []
        for begin, end, token_id in self.find_special(shown):
            if token_id is not None:
                ids.append(token_id)
            else:
                ids += self.encode(text[begin:end], first=begin == 0)
        return ids


def open_codec(vocabulary: Vocabulary) -> Codec:
    """The codec for a vocabulary's form.

    Raises:
        TokenizerError: the vocabulary is damaged.
    """
    codecs: dict[StorageFormat, Callable[[Vocabulary], Codec]] = {
        "sentencepiece": _SentencePieceCodec,
        "tokenizers": _TokenizersCodec,
        "tiktoken": _TiktokenCodec,
    }
    return codecs[vocabulary.storage_format](vocabulary)


class _SentencePieceCodec(Codec):
    """Each stretch of a text between added tokens is a text of its own, with its space in front.

    As in llama.cpp, Meta's code and transformers' `legacy` mode, whose other mode
    (`legacy: false`) puts a space before the whole text only, unless that begins with one.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        model = parse_model(vocabulary.data, vocabulary.origin)
        flags = dict(vocabulary.flags)
        self.tokens, self.special, space_ids, added = [], {}, [], []
        for i, piece in enumerate(model.pieces):
            if piece.type == TokenType.BYTE:
                if not _BYTE.fullmatch(piece.piece):
                    raise TokenizerError(
                        f"{vocabulary.origin}: the byte token {piece.piece!r} is not a byte; "
                        "download the file again"
                    )
                self.tokens.append(_byte_of(piece.piece))
                continue
            text = piece.piece.replace(SPACE, " ")
            if piece.type in (TokenType.CONTROL, TokenType.UNKNOWN):
                self.special[piece.piece] = i
            elif piece.type == TokenType.USER_DEFINED:
                texts = {piece.piece, text}
                added += [AddedToken(t, i, flags.get(i, TokenFlags())) for t in texts]
                piece.type = TokenType.CONTROL  # found by us: the library never makes it of text
            elif piece.piece.startswith(SPACE):
                space_ids.append(i)
            self.tokens.append(text.encode())
        special = [AddedToken(t, i, flags.get(i, TokenFlags())) for t, i in self.special.items()]
        self._added, self._all = AddedTokens(added), AddedTokens([*added, *special])
        self._has_added, self.spaces_stretches = bool(added), vocabulary.legacy
        self._processor = _processor(model, vocabulary)
        self._without_space = self._processor
        if model.normalizer_spec.add_dummy_prefix:
            self.space_ids = frozenset(space_ids)
            if not vocabulary.legacy:
                model.normalizer_spec.add_dummy_prefix = False
                self._without_space = _processor(model, vocabulary)

    def find_special(self, text: str) -> Iterator[Span]:
        return self._all.split(text)

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        if not self._has_added:
            return self._encode_stretch(text, first)
        ids: list[int] = []
        for begin, end, token_id in self._added.split(text):
            if token_id is not None:
                ids.append(token_id)
            else:
                ids += self._encode_stretch(text[begin:end], first and begin == 0)
        return ids

    def _encode_stretch(self, text: str, first: bool) -> list[int]:
        spaced = self.spaces_stretches or (first and not text.startswith((" ", SPACE)))
        return list((self._processor if spaced else self._without_space).encode(text))


def _processor(model: Any, vocabulary: Vocabulary) -> Any:
    from sentencepiece import SentencePieceProcessor

    with _library_errors(vocabulary):
        return SentencePieceProcessor(model_proto=model.SerializeToString())


class _TokenizersCodec(Codec):
    """Goes by its tokenizer.json; BOS and EOS of its template are left out."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._plain = self._open(special=False)
        kind = tokenizers_form.decoder_kind(_state(self._plain.decoder), vocabulary.origin)
        pre_tokenizer = json.dumps(_state(self._plain.pre_tokenizer))
        self.spaces_stretches = '"prepend_scheme": "first"' not in pre_tokenizer
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
        if first or self.spaces_stretches:
            return list(self._encoding(self._plain, text).ids)
        ids: list[int] = self._encoding(self._continuation_tokenizer, self._front + text).ids
        return ids[1:]

    def encode_special(self, text: str) -> list[int]:
        return list(self._encoding(self._parsing, text).ids)

    def find_special(self, text: str) -> Iterator[Span]:
        # By the library: where its added tokens are hangs on their flags and on its normalizer.
        encoding = self._encoding(self._finder, text)
        done = 0
        for index, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            token = self._added[index]
            if token.get("special"):
                if begin > done:
                    yield Span(done, begin, None)
                yield Span(begin, end, token["id"])
                done = end
        if done < len(text):
            yield Span(done, len(text), None)

    def _encoding(self, tokenizer: Any, text: str) -> Any:
        with _library_errors(self._vocabulary):
            if len(text) < LONG_TEXT:
                return tokenizer.encode(text, add_special_tokens=False)
            return tokenizer.encode_batch([text], add_special_tokens=False)[0]

    @cached_property
    def _parsing(self) -> Any:
        """The tokenizer that takes the texts of special tokens for these."""
        return self._open(special=True)

    @cached_property
    def _raw(self) -> tokenizers_form.Json:
        return tokenizers_form.parse(self._vocabulary.data, self._vocabulary.origin)

    @cached_property
    def _added(self) -> list[tokenizers_form.Json]:
        return list({token["content"]: token for token in self._raw["added_tokens"]}.values())

    @cached_property
    def _finder(self) -> Any:
        """A tokenizer of the added tokens only; their ids are positions in `_added`."""
        added = [token | {"id": i} for i, token in enumerate(self._added)]
        raw = self._raw | {"added_tokens": added, "pre_tokenizer": None}
        raw["model"] = {"type": "BPE", "vocab": {}, "merges": []}
        return self._open(special=True, data=tokenizers_form.dump(raw))

    @cached_property
    def _continuation_tokenizer(self) -> Any:
        """The tokenizer for text after a special token, which `_front` represents.

        `_front` is an added token that no text contains, so that the library treats what follows.
        """
        from tokenizers import AddedToken as TheirToken

        tokenizer = self._open(special=False)
        tokenizer.add_tokens([TheirToken(self._front, normalized=False)])
        return tokenizer

    @cached_property
    def _front(self) -> str:
        return f"\U0010fffd{secrets.token_hex(16)}\U0010fffd"

    def _open(self, *, special: bool, data: bytes | None = None) -> Any:
        from tokenizers import Tokenizer

        with _library_errors(self._vocabulary):
            tokenizer = Tokenizer.from_str((data or self._vocabulary.data).decode())
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
        self._added = AddedTokens(AddedToken(*item) for item in self.special.items())

    def find_special(self, text: str) -> Iterator[Span]:
        return self._added.split(text)

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


def _state(component: Any) -> Any:
    """A component of the library as its part of the tokenizer.json, which is its pickled state."""
    return None if component is None else json.loads(component.__getstate__())


def _unspell_piece(text: str) -> bytes:
    return _byte_of(text) if _BYTE.fullmatch(text) else text.replace(SPACE, " ").encode()


_BYTE = re.compile("<0x[0-9A-F]{2}>")


def _byte_of(piece: str) -> bytes:
    return bytes([int(piece[3:5], 16)])


@contextlib.contextmanager
def _library_errors(vocabulary: Vocabulary) -> Iterator[None]:
    """Report a library's error about a damaged vocabulary as one line."""
    try:
        yield
    except BaseException as error:
        # The libraries raise nothing more specific; a panic of Rust's is not even an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:_MAX_REASON_CHARS]
        raise TokenizerError(
            f"{vocabulary.origin}: damaged tokenizer ({reason}); download the file again"
        ) from error
