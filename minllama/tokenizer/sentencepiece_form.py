"""Build, read and convert SentencePiece models (Kudo and Richardson 2018).

The protobuf message is the library's own, so that the result is what `sentencepiece` would save.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from minllama.errors import TokenizerError
from minllama.tokenizer.bounds import MAX_GROWTH, charsmap_growth, long_pieces
from minllama.tokenizer.tokenizers_form import added_token, bpe_model, document
from minllama.tokenizer.vocabulary import MAX_VOCAB_SIZE, ListedToken, TokenType, Vocabulary

SPACE = "▁"  # U+2581, SentencePiece's spelling of a space
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
BPE = 2  # TrainerSpec.ModelType


class Piece(NamedTuple):
    """One token of a SentencePiece model, spelled as there (`▁the`, `<0x0A>`)."""

    text: str
    score: float
    type: int


def build_model(
    pieces: Sequence[Piece],
    *,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool = False,
    bos_id: int | None,
    eos_id: int | None,
    where: str,
) -> bytes:
    """A serialized BPE ModelProto of `pieces`, without any normalization of the text.

    Args:
        pieces: in the order of their ids; exactly one is of type UNKNOWN.
        add_dummy_prefix: a text is encoded as if a space stood before it.
        remove_extra_whitespaces: runs of spaces count as one, and those at the ends as none.
        bos_id: id of the token that begins a text.
        eos_id: id of the token that ends one.
        where: the source of the pieces, for error messages.

    Raises:
        TokenizerError: SentencePiece could not read such a model.
    """
    _check_pieces(pieces, where)
    model = _empty_model()
    unk_id = next(i for i, piece in enumerate(pieces) if piece.type == TokenType.UNKNOWN)
    for text, score, kind in pieces:
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type = BPE
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.byte_fallback = any(piece.type == TokenType.BYTE for piece in pieces)
    for name, token_id in (("unk", unk_id), ("bos", bos_id), ("eos", eos_id), ("pad", None)):
        setattr(model.trainer_spec, f"{name}_id", -1 if token_id is None else token_id)
        if token_id is not None:
            setattr(model.trainer_spec, f"{name}_piece", pieces[token_id].text)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    model.normalizer_spec.remove_extra_whitespaces = remove_extra_whitespaces
    return bytes(model.SerializeToString())


def parse_model(data: bytes, where: str) -> Any:
    """The ModelProto in `data`; raises TokenizerError if it is not one."""
    from google.protobuf.message import DecodeError

    model = _empty_model()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise TokenizerError(
            f"{where}: not a SentencePiece model ({error}); download the file again"
        ) from error
    if not model.pieces:
        raise TokenizerError(
            f"{where}: a SentencePiece model without pieces; download the file again"
        )
    if charsmap_growth(model.normalizer_spec.precompiled_charsmap) > MAX_GROWTH:
        raise TokenizerError(
            f"{where}: its normalizer makes a text more than {MAX_GROWTH} times as long; use the "
            "tokenizer of another source"
        )
    # protobuf returns bytes for text that is not UTF-8.
    for i, piece in enumerate(model.pieces):
        if not piece.piece or not isinstance(piece.piece, str):
            raise TokenizerError(
                f"{where}: piece {i} is empty or not UTF-8; download the file again"
            )
    if (excess := long_pieces(len(piece.piece) for piece in model.pieces)) is not None:
        raise TokenizerError(f"{where}: {excess}; use the tokenizer of another source")
    # The library has a parser of its own, which takes some damaged types for this one.
    unknown = sum(piece.type == TokenType.UNKNOWN for piece in model.pieces)
    if unknown != 1:
        raise TokenizerError(
            f"{where}: {unknown} unknown tokens, where a SentencePiece model has exactly one; "
            "download the file again"
        )
    return model


def pieces_of(model: Any) -> list[Piece]:
    """The pieces of a ModelProto, in the order of their ids."""
    return [Piece(piece.piece, piece.score, piece.type) for piece in model.pieces]


def from_model(data: bytes, where: str) -> Vocabulary:
    """The vocabulary of a `tokenizer.model` file; Llama's convention is BOS in front, no EOS."""
    model = parse_model(data, where)
    spec = model.trainer_spec

    def declared(name: str) -> int | None:
        # The library finds these tokens by their text; the ids are only the trainer's request.
        text = getattr(spec, f"{name}_piece")
        for i, piece in enumerate(model.pieces):
            if piece.piece == text and piece.type == TokenType.CONTROL:
                return i
        return None

    bos_id = declared("bos")
    return Vocabulary(
        storage_format="sentencepiece",
        data=data,
        origin="SentencePiece",
        bos_id=bos_id,
        eos_id=declared("eos"),
        pad_id=declared("pad") if spec.pad_id >= 0 else None,
        add_bos=bos_id is not None,
    )


def with_added_pieces(
    data: bytes, added: Iterable[ListedToken], special: Collection[str], where: str
) -> tuple[bytes, dict[str, int]]:
    """The model in `data` with further tokens, which Hugging Face folders list separately.

    Args:
        data: a serialized ModelProto.
        added: the listed tokens; those that are ordinary pieces of the model are found as a whole
            from now on.
        special: texts of tokens that no plain text may become; the unknown ones are passed over.
        where: the source, for error messages.

    Returns:
        The serialized model, unchanged if nothing is new to it, and text -> id of its tokens.

    Raises:
        TokenizerError: the ids leave a gap, or contradict the model's own.
    """
    model = parse_model(data, where)
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    for token_id, text, is_special, *_ in sorted(added):
        if ids.get(text, token_id) != token_id:
            raise TokenizerError(
                f"{where}: the added token {text!r} has the id {token_id}, "
                f"and {ids[text]} in the model"
            )
        kind = TokenType.CONTROL if is_special or text in special else TokenType.USER_DEFINED
        if text in ids:
            if model.pieces[token_id].type in (TokenType.NORMAL, TokenType.UNUSED):
                model.pieces[token_id].type = kind
            continue
        if token_id != len(model.pieces):
            raise TokenizerError(
                f"{where}: the added token {text!r} has the id {token_id}; the next free id is "
                f"{len(model.pieces)}"
            )
        model.pieces.add(piece=text, score=0.0, type=kind)
        ids[text] = token_id
    for text in special:
        if text in ids and model.pieces[ids[text]].type not in (TokenType.UNKNOWN, TokenType.BYTE):
            model.pieces[ids[text]].type = TokenType.CONTROL
    changed = model != parse_model(data, where)
    return (bytes(model.SerializeToString()) if changed else data), ids


def with_space_in_front(data: bytes, add_space: bool, where: str) -> bytes:
    """The model in `data` with a space in front of each text, or without one."""
    model = parse_model(data, where)
    if model.normalizer_spec.add_dummy_prefix == add_space:
        return data
    model.normalizer_spec.add_dummy_prefix = add_space
    return bytes(model.SerializeToString())


def to_tokenizers(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """The same tokenizer as the content of a `tokenizer.json`; None if that cannot be exact.

    Not exact are: models other than BPE, text normalization, user-defined pieces with a space,
    unused pieces that take part in merges, pieces with a character that is no piece itself, and
    pieces of equal scores, runs of spaces aside.
    """
    model = parse_model(vocabulary.data, vocabulary.origin)
    pieces, flags = pieces_of(model), dict(vocabulary.flags)
    spec, normalizer = model.trainer_spec, model.normalizer_spec
    if (
        spec.model_type != BPE
        or spec.treat_whitespace_as_suffix
        or normalizer.precompiled_charsmap
        or normalizer.remove_extra_whitespaces
        or not normalizer.escape_whitespaces
        # Found where the text has either character.
        or any(p.type == TokenType.USER_DEFINED and SPACE in p.text for p in pieces)
    ):
        return None
    merges = _merges(pieces)
    if merges is None:
        return None
    added = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    spaced = normalizer.add_dummy_prefix
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return document(
        added_tokens=[
            added_token(i, text, special=kind != TokenType.USER_DEFINED, flags=flags.get(i))
            for i, (text, _, kind) in enumerate(pieces)
            if kind in added
        ],
        **_space_components(spaced=spaced, legacy=vocabulary.legacy),
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *(strip if spaced else []),
            ],
        },
        model=bpe_model(
            {piece.text: i for i, piece in enumerate(pieces)},
            merges,
            unk_token=next(piece.text for piece in pieces if piece.type == TokenType.UNKNOWN),
            byte_fallback=spec.byte_fallback,
        ),
    )


def _space_components(*, spaced: bool, legacy: bool) -> dict[str, Any]:
    """The parts of a tokenizer.json that spell spaces, and put one in front."""
    if spaced and not legacy:
        metaspace = {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": "first",
            "split": False,
        }
        return {"normalizer": None, "pre_tokenizer": metaspace}
    prefix = [{"type": "Prepend", "prepend": SPACE}] if spaced else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizer = {"type": "Sequence", "normalizers": [*prefix, replace]}
    return {"normalizer": normalizer, "pre_tokenizer": None}


def splits(text: str, vocab: dict[str, Any]) -> list[tuple[str, str]]:
    """All ways to cut `text` into two that are both in `vocab`."""
    return [
        (text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in vocab and text[i:] in vocab
    ]


def _empty_model() -> Any:
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # generated at import, so unknown to type checkers
    return messages.ModelProto()


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]] | None:
    """The pairs that BPE by score would join, best first; None if pairs cannot express it."""
    scores = {
        piece.text: piece.score
        for piece in pieces
        if piece.type in (TokenType.NORMAL, TokenType.UNUSED)
    }
    ranked = []
    joined: set[float] = set()
    for text, score, kind in pieces:
        if kind == TokenType.UNUSED and splits(text, scores):
            return None
        if kind != TokenType.NORMAL or len(text) == 1:
            continue
        if any(char not in scores for char in text):
            return None
        # Among equal scores SentencePiece joins from the left. For runs of spaces, which all have
        # one, that amounts to growing the longest run first.
        pairs = splits(text, scores)
        if pairs and text.strip(SPACE) and score in joined:
            return None
        if pairs:
            joined.add(score)
        ranked += [(-score, -len(a), -len(b), a, b) for a, b in pairs]
    ranked.sort(key=lambda pair: pair[:3])
    return [(a, b) for *_, a, b in ranked]


def _check_pieces(pieces: Sequence[Piece], where: str) -> None:
    if (excess := long_pieces(len(piece.text) for piece in pieces)) is not None:
        raise TokenizerError(f"{where}: {excess}; use the tokenizer of another source")
    if len(pieces) > MAX_VOCAB_SIZE:
        raise TokenizerError(f"{where}: {len(pieces)} tokens, more than the limit for a vocabulary")
    index_of: dict[str, int] = {}
    for i, (text, score, kind) in enumerate(pieces):
        if not text:
            raise TokenizerError(f"{where}: token {i} is empty")
        if text in index_of:
            raise TokenizerError(f"{where}: tokens {index_of[text]} and {i} are both {text!r}")
        if not math.isfinite(score):
            raise TokenizerError(f"{where}: token {i} ({text!r}) has the score {score}")
        if kind not in TokenType._value2member_map_:
            raise TokenizerError(f"{where}: token {i} ({text!r}) has the unknown type {kind}")
        index_of[text] = i
    unknown = sum(piece.type == TokenType.UNKNOWN for piece in pieces)
    if unknown != 1:
        raise TokenizerError(
            f"{where}: {unknown} unknown tokens, but SentencePiece needs exactly one"
        )
    byte_pieces = {piece.text for piece in pieces if piece.type == TokenType.BYTE}
    if byte_pieces and (odd := byte_pieces ^ set(BYTE_PIECES)):
        raise TokenizerError(
            f"{where}: the byte tokens must be all or none of <0x00> to <0xFF>; see {min(odd)!r}"
        )
