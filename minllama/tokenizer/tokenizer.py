"""Convert between text and token ids, for every storage format of vocabularies.

Adds BOS and EOS, parses special tokens only on request, and decodes tokens at once or one by
one.
"""

import codecs
import operator
import os
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from minllama.atomic import atomic_folder
from minllama.errors import TokenizerError
from minllama.tokenizer.added_tokens import hidden
from minllama.tokenizer.codecs import Codec, open_codec
from minllama.tokenizer.huggingface import FILES, stated_vocab_size, to_files
from minllama.tokenizer.size import check_fits
from minllama.tokenizer.vocabulary import Vocabulary


class Tokenizer:
    """The tokenizer of one vocabulary.

    Attributes:
        vocabulary: the one it was built from.
        vocab_size: number of tokens; the ids are those below it.
        bos_id: id of the BOS token; `None` without one.
        eos_id: id of the token that ends a text.
        pad_id: an id for padding: the checkpoint's own if it is a special token, else `eos_id`,
            else another special token; never one of plain text. `None` without special tokens.
        stop_ids: the ids that end a generation, `eos_id` and further ones.
        add_bos: whether `encode` prepends BOS by default.
        add_eos: whether `encode` appends EOS by default.
        chat_template: Jinja source that renders messages; `None` without one.
        special_tokens: text -> id of the tokens that plain text never becomes.
        source: where it was loaded from separately, as a `canonical_name`; None for a checkpoint's
            own tokenizer, and for one created in memory.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Build the tokenizer; raises TokenizerError if the vocabulary is damaged."""
        self.vocabulary = vocabulary
        self.source: str | None = None
        self._codec = open_codec(vocabulary)
        self.vocab_size = len(self._codec.tokens)
        self.special_tokens = dict(self._codec.special)
        self._special_ids = frozenset(self.special_tokens.values())
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        ends = (self.eos_id, *vocabulary.stop_ids)
        self.stop_ids = frozenset(i for i in ends if i is not None)
        for name, token_id in (("BOS", self.bos_id), *(("end", i) for i in self.stop_ids)):
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise TokenizerError(
                    f"{vocabulary.origin}: its {name} token has the id {token_id}, but there are "
                    f"{self.vocab_size} tokens"
                )
        self.pad_id = self._choose_pad_id()
        self.add_bos = vocabulary.add_bos and self.bos_id is not None
        self.add_eos = vocabulary.add_eos and self.eos_id is not None
        self.chat_template = vocabulary.chat_template

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str] | None = None) -> Self:
        """The tokenizer of a checkpoint, or of a file or folder that is only a tokenizer.

        Args:
            source: a file, a folder or a Hugging Face id; `None` for the embedded default model.

        Raises:
            CheckpointError: there is no such checkpoint.
            TokenizerError: it has no tokenizer, or a damaged one.
        """
        # Files are read above this package, and only when a tokenizer is loaded.
        checkpoints = import_module("minllama.checkpoints.open")
        vocabulary = checkpoints.vocabulary_of(source)
        if vocabulary is None:
            raise TokenizerError(
                f"{source}: no tokenizer in or beside this checkpoint; name the tokenizer's file "
                "or folder"
            )
        try:
            tokenizer = cls(vocabulary)
        except TokenizerError as error:
            if source is None:
                raise
            raise TokenizerError(f"{source}: {error}") from error
        tokenizer.source = checkpoints.canonical_name(source)
        return tokenizer

    @classmethod
    def from_checkpoint(cls, checkpoint: Any) -> Self:
        """The tokenizer that an open `minllama.Checkpoint` has.

        Raises:
            TokenizerError: it has no tokenizer, or a damaged one.
        """
        try:
            vocabulary = checkpoint.vocabulary
        except TokenizerError as error:
            raise TokenizerError(f"{error}; or name another one with --tokenizer") from error
        if vocabulary is None:
            raise TokenizerError(
                f"{checkpoint.path}: no tokenizer in or beside the model; "
                "name its file or folder with --tokenizer"
            )
        tokenizer = cls(vocabulary)
        tokenizer.source = checkpoint.tokenizer
        return tokenizer

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files of a Hugging Face folder, atomically.

        They replace those of another tokenizer; other files in the folder are kept.

        Raises:
            MinllamaError: the folder cannot be written, or contains a model with fewer tokens.
        """
        files = to_files(self.vocabulary)
        vocab_size = stated_vocab_size(Path(folder))
        if vocab_size is not None:
            check_fits(self.vocab_size, vocab_size, str(folder))
        with atomic_folder(folder, replaces=FILES.__contains__) as path:
            for name, content in files.items():
                (path / name).write_bytes(content)

    def encode(
        self,
        text: str,
        *,
        bos: bool | None = None,
        eos: bool | None = None,
        max_len: int | None = None,
        special: bool = False,
    ) -> list[int]:
        """Ids of `text`.

        Args:
            text: any text without lone surrogates.
            bos: prepend BOS; `None` for the checkpoint's default.
            eos: append EOS; `None` for the checkpoint's default.
            max_len: maximum number of ids, including BOS and EOS, which stay when the text is
                truncated.
            special: parse special tokens in the text, such as `<|im_start|>`; otherwise they are
                plain text.

        Raises:
            TokenizerError: `text` is not a string or has a lone surrogate, the vocabulary lacks the
                token of `bos` or `eos`, or max_len is too small for them.
        """
        _check_text(text)
        prefix = self._boundary_token(self.bos_id, self.add_bos if bos is None else bos, "begins")
        suffix = self._boundary_token(self.eos_id, self.add_eos if eos is None else eos, "ends")
        ids = self._codec.encode_special(text) if special else self._codec.encode(text)
        if max_len is not None:
            max_text_len = max_len - len(prefix) - len(suffix)
            if max_text_len < 0:
                n_special = len(prefix) + len(suffix)
                raise TokenizerError(f"max_len must be at least {n_special}, for BOS and EOS")
            del ids[max_text_len:]
        return prefix + ids + suffix

    def encode_batch(
        self,
        texts: Iterable[str],
        *,
        bos: bool | None = None,
        eos: bool | None = None,
        max_len: int | None = None,
        special: bool = False,
    ) -> list[list[int]]:
        """Ids of each text; see `encode`."""
        if isinstance(texts, str):
            raise TokenizerError("encode_batch takes a list of texts, not one; use encode")
        return [
            self.encode(text, bos=bos, eos=eos, max_len=max_len, special=special) for text in texts
        ]

    def encode_chat(self, rendered: str, masked: Mapping[str, str]) -> list[int]:
        """Ids of a rendered chat, without a further BOS or EOS.

        Args:
            rendered: a chat template's output; special tokens in it are parsed.
            masked: placeholder in `rendered` -> the user's text, which stays plain text even if it
                looks like a special token.

        Raises:
            TokenizerError: as in `encode`.
        """
        if not masked:
            return self.encode(rendered, bos=False, eos=False, special=True)
        for text in (rendered, *masked.values()):
            _check_text(text)
        # The longest first: one placeholder may be a prefix of another.
        placeholders = sorted(masked, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, placeholders)))
        # Users' text is hidden while the template's special tokens are found: these, and all
        # text that is not next to users' text, get the same ids regardless of it.
        text = pattern.sub(lambda match: masked[match[0]], rendered)
        shown = pattern.sub(lambda match: hidden(masked[match[0]], self.special_tokens), rendered)
        return self._codec.encode_masked(text, shown)

    def decode(
        self, ids: Iterable[int], *, skip_special: bool = True, continuation: bool = False
    ) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: of tokens, in order.
            skip_special: leave special tokens out.
            continuation: the ids continue a text, so that a leading space is kept.

        Raises:
            TokenizerError: an id is out of range.
        """
        decoder = StreamDecoder(self._codec, skip_special=skip_special, continuation=continuation)
        return decoder.push_all(ids) + decoder.flush()

    def stream_decoder(
        self, *, continuation: bool = True, skip_special: bool = True
    ) -> "StreamDecoder":
        """A decoder that takes ids one by one; arguments as in `decode`."""
        return StreamDecoder(self._codec, skip_special=skip_special, continuation=continuation)

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token: a text of fewer tokens than n has at most n times as many."""
        return max(len(self.token_bytes(token_id)) for token_id in range(self.vocab_size))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; of a special token, those of its text."""
        return self._codec.tokens[_checked_id(token_id, self.vocab_size)]

    def token_text(self, token_id: int) -> str:
        """One token for display: its text, with U+FFFD for parts of characters."""
        return self.token_bytes(token_id).decode(errors="replace")

    def _boundary_token(self, token_id: int | None, requested: bool, verb: str) -> list[int]:
        if not requested:
            return []
        if token_id is None:
            raise TokenizerError(
                f"{self.vocabulary.origin}: this vocabulary has no token that {verb} a text"
            )
        return [token_id]

    def _choose_pad_id(self) -> int | None:
        for token_id in (self.vocabulary.pad_id, self.eos_id):
            if token_id in self._special_ids:
                return token_id
        return min(self._special_ids, default=None)


class StreamDecoder:
    """Decode ids one by one: the joined pieces equal `decode` of all ids.

    Buffers the bytes of incomplete characters. Created by `Tokenizer.stream_decoder`.
    """

    def __init__(self, codec: Codec, *, skip_special: bool, continuation: bool) -> None:
        self._tokens = codec.tokens
        self._special_ids = frozenset(codec.special.values())
        self._skip_special = skip_special
        self._space_ids = codec.space_ids
        self._spaces_stretches = codec.spaces_stretches
        self._at_start = not continuation
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; often none.

        Raises:
            TokenizerError: the id is out of range.
        """
        return self.push_all((token_id,))

    def push_all(self, ids: Iterable[int]) -> str:
        """As `push`, for several tokens at once."""
        return self._utf8.decode(b"".join(map(self._bytes_of, ids)))

    def flush(self) -> str:
        """The rest at the end: U+FFFD for an incomplete character."""
        return self._utf8.decode(b"", final=True)

    def _bytes_of(self, token_id: int) -> bytes:
        token_id = _checked_id(token_id, len(self._tokens))
        if token_id in self._special_ids:
            if self._skip_special:
                return b""
            self._at_start &= self._spaces_stretches
            return self._tokens[token_id]
        if self._at_start:
            self._at_start = False
            if token_id in self._space_ids:
                return self._tokens[token_id][1:]
        return self._tokens[token_id]


def _checked_id(token_id: int, vocab_size: int) -> int:
    try:
        index = operator.index(token_id)
    except TypeError:
        raise TokenizerError(f"a token id must be an integer, not {token_id!r}") from None
    if not 0 <= index < vocab_size:
        raise TokenizerError(f"token id {index} is out of range; there are {vocab_size} tokens")
    return index


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"text must be a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text contains a lone surrogate (U+{ord(text[error.start]):04X}) at character "
            f"{error.start}; decode it correctly"
        ) from None
