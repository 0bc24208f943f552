"""Vocabularies in the forms they are stored in, and from one form to another.

A `Vocabulary` is what a checkpoint knows of its tokenizer: one of three serialized forms that a
library reads, and the ids and flags beside it. Knows nothing of models and imports no torch; turning
text into ids is `minllama.tokenizer`'s business.
"""

from dataclasses import dataclass
from typing import Literal

Form = Literal["sentencepiece", "tokenizers", "tiktoken"]


@dataclass(frozen=True)
class Vocabulary:
    """One tokenizer, serialized, and what its checkpoint says about it.

    Attributes:
        form: which library reads `data`: a SentencePiece ModelProto, a `tokenizer.json`, or
            tiktoken's lines of base64 token and rank (Llama 3's `tokenizer.model`).
        data: the serialized vocabulary.
        origin: where it came from, for people: `tokenizer.json`, `GGUF gpt2 (smollm)`.
        bos_id: id of the token that begins a text; `None` where there is none.
        eos_id: id of the token that ends a text.
        pad_id: id that the checkpoint declares for padding; `None` where it declares none.
        stop_ids: further ids that end a generation, such as the end of a chat turn.
        add_bos: texts are encoded with `bos_id` in front unless the caller says otherwise.
        add_eos: texts are encoded with `eos_id` behind unless the caller says otherwise.
        chat_template: Jinja source that renders messages; `None` where there is none.
    """

    form: Form
    data: bytes
    origin: str
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None
