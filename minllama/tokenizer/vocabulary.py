"""A checkpoint's vocabulary, in its storage format.

The other modules of this package convert files and formats to a `Vocabulary` and back.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

StorageFormat = Literal["sentencepiece", "tokenizers", "tiktoken"]

# Several times the largest known vocabulary; an id above it means damage, and a table of that
# length would take absurd memory.
MAX_VOCAB_SIZE = 2**22


class TokenType(enum.IntEnum):
    """The type of a token, with SentencePiece's numbers, which GGUF also uses."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class TokenFlags(NamedTuple):
    """How an added token is found in a text, in Hugging Face's terms.

    Attributes:
        lstrip: it includes the white space before it.
        rstrip: it includes the white space after it.
        single_word: it matches only without an adjacent letter or digit.
    """

    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class ListedToken(NamedTuple):
    """A token that a file lists in addition to a vocabulary.

    Attributes:
        token_id: its id.
        text: its text.
        special: plain text never becomes it.
        flags: how it is matched; None if not given.
        normalized: it is matched in the normalized text; None if not given.
    """

    token_id: int
    text: str
    special: bool = False
    flags: TokenFlags | None = None
    normalized: bool | None = None


@dataclass(frozen=True)
class Vocabulary:
    """One serialized tokenizer, and its settings in the checkpoint.

    Attributes:
        storage_format: of `data`: a SentencePiece ModelProto, a `tokenizer.json`, or tiktoken's
            lines of base64 token and rank (Llama 3's `tokenizer.model`).
        data: the serialized vocabulary.
        origin: its source, for messages: `tokenizer.json`, `GGUF gpt2 (smollm)`.
        bos_id: id of the BOS token; `None` without one.
        eos_id: id of the token that ends a text.
        pad_id: the checkpoint's id for padding; `None` without one.
        stop_ids: further ids that end a generation, such as the end of a chat turn.
        add_bos: whether texts are encoded with `bos_id` in front by default.
        add_eos: whether texts are encoded with `eos_id` at the end by default.
        chat_template: Jinja source that renders messages; `None` without one.
        chat_templates: name -> source of further templates to choose from.
        named_tokens: name -> text of the tokens that templates may write (`unk_token`), or a list
            of texts; an empty text if the checkpoint states that there is none.
        flags: id -> flags of the added tokens that have any, for SentencePiece models, which cannot
            store them; a tokenizer.json has its own.
        legacy: a SentencePiece model puts its space in front of each stretch of text between added
            tokens; otherwise only in front of a whole text that begins with none (transformers'
            `legacy`).
    """

    storage_format: StorageFormat
    data: bytes
    origin: str
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None
    chat_templates: Mapping[str, str] = field(default_factory=dict, hash=False)
    named_tokens: Mapping[str, str | list[str]] = field(default_factory=dict, hash=False)
    flags: tuple[tuple[int, TokenFlags], ...] = ()
    legacy: bool = True
