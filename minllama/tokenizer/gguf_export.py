"""Convert a vocabulary to GGUF's `tokenizer.*` fields, so that llama.cpp gives the same ids.

The inverse of `minllama.tokenizer.gguf`. What GGUF cannot represent is refused.
"""

import json
from collections.abc import Sequence
from typing import Any

from minllama.errors import TokenizerError
from minllama.tokenizer import byte_level, sentencepiece_form, tiktoken_form, tokenizers_form
from minllama.tokenizer.sentencepiece_form import BYTE_PIECES, SPACE, Piece
from minllama.tokenizer.size import check_fits
from minllama.tokenizer.tokenizers_form import Json
from minllama.tokenizer.vocabulary import TokenFlags, TokenType, Vocabulary

PREFIX = "tokenizer.ggml."
MODEL = PREFIX + "model"
TEMPLATE = "tokenizer.chat_template"
TEMPLATES = "tokenizer.chat_templates"  # the names of further ones, each in TEMPLATE.NAME
# Tokens that have a name in a chat template, and none of our fields -> GGUF's word.
TOKEN_FIELDS = {
    "unk_token": "unknown",
    "sep_token": "seperator",  # as GGUF spells it
    "pad_token": "padding",
    "mask_token": "mask",
}
PIECES, BYTE_LEVEL = "llama", "gpt2"  # values of MODEL
# Tokens with these texts end a generation in llama.cpp, regardless of the file's fields.
ENDS = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"),
    *("<|endoftext|>", "<EOT>"),
)
# In later versions of llama.cpp these as well, so that a file had better name them.
LATER_ENDS = (
    *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "[EOS]", "[EOT]", "_<EOT>"),
    *("<\uff5cend\u2581of\u2581sentence\uff5c>", "<|return|>", "<|call|>", "<|calls|>"),
    *("<|flush|>", "<turn|>", "<|tool_response>"),
)


def to_gguf(vocabulary: Vocabulary, vocab_size: int) -> dict[str, Any]:
    """The fields of a GGUF file for `vocabulary`, as plain Python values.

    GGUF has fields for two of its stop_ids (end of turn, end of message); others are lost.

    Args:
        vocabulary: in any form.
        vocab_size: tokens that the model has; unused ones are added up to it.

    Raises:
        TokenizerError: the vocabulary has more tokens than that, or works in a way that GGUF has
            no fields for.
    """
    where = vocabulary.origin
    if vocabulary.storage_format == "sentencepiece":
        fields = _from_model(sentencepiece_form.parse_model(vocabulary.data, where), vocabulary)
    else:
        if vocabulary.storage_format == "tiktoken":
            raw = tiktoken_form.to_tokenizers(vocabulary.data, where)
        else:
            raw = tokenizers_form.parse(vocabulary.data, where)
        _check_added_tokens(raw, where)
        kind = tokenizers_form.decoder_kind(raw.get("decoder"), where)
        fields = (_byte_level if kind.byte_level else _from_pieces)(raw, where)
    tokens = fields[PREFIX + "tokens"]
    check_fits(len(tokens), vocab_size, where)
    padding = range(len(tokens), vocab_size)
    tokens += [f"[PAD{i}]" for i in padding]
    fields[PREFIX + "token_type"] += [int(TokenType.UNUSED) for _ in padding]
    if PREFIX + "scores" in fields:
        fields[PREFIX + "scores"] += [-1e9 for _ in padding]
    return fields | _settings(vocabulary, tokens)


def _settings(vocabulary: Vocabulary, tokens: Sequence[str]) -> dict[str, Any]:
    """The fields other than the tokens themselves."""
    stops = [i for i in vocabulary.stop_ids if i != vocabulary.eos_id]
    # Llama 3 has both; where one has another name, it ends a turn.
    eom_id = next((i for i in stops if "eom" in tokens[i]), None)
    eot_id = next((i for i in stops if "eot" in tokens[i]), None)
    others = [i for i in stops if i not in (eom_id, eot_id) and tokens[i] not in ENDS]
    if eot_id is None and others:
        eot_id = others.pop(0)
    if eom_id is None and others:
        eom_id = others.pop(0)
    ids = {
        "bos": vocabulary.bos_id,
        "eos": vocabulary.eos_id,
        "padding": vocabulary.pad_id,
        "eot": eot_id,
        "eom": eom_id,
    }
    fields: dict[str, Any] = {
        f"{PREFIX}{name}_token_id": token_id
        for name, token_id in ids.items()
        if token_id is not None
    }
    fields[PREFIX + "add_bos_token"] = vocabulary.add_bos
    fields[PREFIX + "add_eos_token"] = vocabulary.add_eos
    for name, word in TOKEN_FIELDS.items():
        text = vocabulary.named_tokens.get(name)
        if text in tokens:
            fields.setdefault(f"{PREFIX}{word}_token_id", tokens.index(text))
    if vocabulary.chat_template is not None:
        fields[TEMPLATE] = vocabulary.chat_template
    if vocabulary.chat_templates:
        fields[TEMPLATES] = list(vocabulary.chat_templates)
        fields |= {f"{TEMPLATE}.{name}": text for name, text in vocabulary.chat_templates.items()}
    return fields


def _check_added_tokens(raw: Json, where: str) -> None:
    """A TokenizerError for an added token whose flags GGUF cannot represent."""
    normalizer = raw.get("normalizer")
    for token in raw["added_tokens"]:
        flag_names = [name for name in TokenFlags._fields if token.get(name)]
        if token.get("normalized") and "Prepend" in json.dumps(normalizer):
            flag_names.append("normalized")
        if flag_names:
            raise _unlike_added_token(where, token["content"], flag_names)


def _unlike_added_token(where: str, text: str, flag_names: Sequence[str]) -> TokenizerError:
    return TokenizerError(
        f"{where}: its added token {text[:80]!r} has {' and '.join(flag_names)}, which GGUF cannot "
        "represent; convert to hf"
    )


def _byte_level(raw: Json, where: str) -> dict[str, Any]:
    pre = byte_level.pre_tokenizer_name(raw, where)
    tokens, types = _tokens(raw)
    return {
        MODEL: BYTE_LEVEL,
        PREFIX + "pre": pre,
        PREFIX + "tokens": tokens,
        PREFIX + "token_type": types,
        PREFIX + "merges": [" ".join(pair) for pair in tokenizers_form.merge_pairs(raw, where)],
    }


def _tokens(raw: Json) -> tuple[list[str], list[int]]:
    """Texts and types of all tokens of a tokenizer.json, in the order of their ids."""
    ids = tokenizers_form.token_ids(raw)
    n_tokens = max(ids.values()) + 1
    tokens = [f"[PAD{i}]" for i in range(n_tokens)]
    types = [int(TokenType.UNUSED)] * n_tokens
    for text, token_id in ids.items():
        tokens[token_id], types[token_id] = text, TokenType.NORMAL
    for token in raw["added_tokens"]:
        special = token.get("special")
        types[token["id"]] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    return tokens, [int(kind) for kind in types]


def _from_model(model: Any, vocabulary: Vocabulary) -> dict[str, Any]:
    where, normalizer = vocabulary.origin, model.normalizer_spec
    if model.trainer_spec.model_type != sentencepiece_form.BPE:
        raise TokenizerError(f"{where}: not a BPE model; only BPE is supported")
    if normalizer.precompiled_charsmap:
        raise TokenizerError(f"{where}: it normalizes text, which GGUF cannot represent")
    for token_id, flags in vocabulary.flags:
        flag_names = [name for name, is_so in flags._asdict().items() if is_so]
        raise _unlike_added_token(where, model.pieces[token_id].piece, flag_names)
    if normalizer.add_dummy_prefix and not vocabulary.legacy:
        raise _unlike_spaces(where, "first", "set legacy to true in its tokenizer_config.json")
    return _piece_fields(
        sentencepiece_form.pieces_of(model),
        add_space_prefix=normalizer.add_dummy_prefix,
        remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
    )


def _unlike_spaces(where: str, scheme: str, remedy: str) -> TokenizerError:
    """Of Metaspace's schemes: llama.cpp puts a space before each text, whatever that begins with.

    `remedy` is the way to a file that does the same; the ids of a text may be others then.
    """
    behavior = {
        "first": "adds a space only before the first text between special tokens",
        "always": "adds no space before a text that starts with one",
    }
    return TokenizerError(
        f"{where}: it {behavior.get(scheme, f'puts spaces by the scheme {scheme[:20]!r}')}, which "
        f"GGUF cannot represent; convert to hf, or {remedy} to get llama.cpp's spaces"
    )


def _from_pieces(raw: Json, where: str) -> dict[str, Any]:
    """Fields for a tokenizer.json whose merges equal SentencePiece's scores."""
    add_space_prefix = _adds_space(raw, where)
    tokens, types = _tokens(raw)
    model = raw["model"]
    in_bytes = [model["vocab"].get(text) for text in BYTE_PIECES if model.get("byte_fallback")]
    for token_id in in_bytes:
        if token_id is not None:
            types[token_id] = int(TokenType.BYTE)
    unk_id = model["vocab"].get(model.get("unk_token"))
    if unk_id is None and in_bytes and None not in in_bytes:
        unk_id = model["vocab"].get("<unk>")  # which no text produces
    if unk_id is None:
        raise TokenizerError(
            f"{where}: it has no unknown token, which GGUF's {PIECES!r} needs; convert to hf"
        )
    types[unk_id] = int(TokenType.UNKNOWN)
    ranks = _piece_ranks(raw, where)
    scores = [-float(ranks.get(text, len(ranks))) for text in tokens]
    pieces = [Piece(*piece) for piece in zip(tokens, scores, types, strict=True)]
    return _piece_fields(pieces, add_space_prefix=add_space_prefix)


def _piece_fields(
    pieces: Sequence[Piece], *, add_space_prefix: bool, remove_extra_whitespaces: bool = False
) -> dict[str, Any]:
    fields: dict[str, Any] = {
        MODEL: PIECES,
        PREFIX + "pre": "default",
        PREFIX + "tokens": [_spelt(piece) for piece in pieces],
        PREFIX + "scores": [float(piece.score) for piece in pieces],
        PREFIX + "token_type": [int(piece.type) for piece in pieces],
        PREFIX + "add_space_prefix": bool(add_space_prefix),
    }
    for i, piece in enumerate(pieces):
        if piece.type == TokenType.UNKNOWN:
            fields[PREFIX + "unknown_token_id"] = i
    if remove_extra_whitespaces:  # for minllama; llama.cpp ignores it for this model
        fields[PREFIX + "remove_extra_whitespaces"] = True
    return fields


def _spelt(piece: Piece) -> str:
    """The text of a piece; llama.cpp looks for user-defined ones in the text as it was written."""
    is_looked_for = piece.type == TokenType.USER_DEFINED
    return piece.text.replace(SPACE, " ") if is_looked_for else piece.text


def _piece_ranks(raw: Json, where: str) -> dict[str, int]:
    """Token -> rank of its first merge; refused if SentencePiece would merge differently.

    SentencePiece joins any two neighbors that make a piece. That is the same as the merges if each
    token's merges are all ways to cut it into two, and follow one another; only among runs of
    spaces, whose scores are equal, the order between tokens does not matter.
    """
    vocab = raw["model"]["vocab"]
    cuts: dict[str, int] = {}
    ranks: dict[str, int] = {}
    last = ""
    for left, right in tokenizers_form.merge_pairs(raw, where):
        text = left + right
        if text != last and text in ranks and text.strip(SPACE):
            raise _not_pieces(where, text)
        ranks.setdefault(text, len(ranks))
        cuts[text] = cuts.get(text, 0) + 1
        last = text
    special = {token["content"] for token in raw["added_tokens"]} | set(BYTE_PIECES)
    ordinary = vocab.keys() - special
    for text in ordinary:
        if len(sentencepiece_form.splits(text, vocab)) != cuts.get(text, 0):
            raise _not_pieces(where, text)
    return ranks


def _not_pieces(where: str, text: str) -> TokenizerError:
    return TokenizerError(
        f"{where}: its merges for {text!r} are not SentencePiece's, so GGUF cannot represent them"
    )


def _adds_space(raw: Json, where: str) -> bool:
    """Whether a space is prepended to a text, whose normalizer only spells spaces.

    Raises:
        TokenizerError: the text is changed, or cut into words, in another way.
    """
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    normalizer, pre_tokenizer = raw.get("normalizer"), raw.get("pre_tokenizer")
    if pre_tokenizer is None:
        if normalizer == replace or normalizer == {"type": "Sequence", "normalizers": [replace]}:
            return False
        if normalizer == {"type": "Sequence", "normalizers": [prepend, replace]}:
            return True
    elif (
        normalizer is None
        and isinstance(pre_tokenizer, dict)
        and pre_tokenizer.get("type") == "Metaspace"
        and not pre_tokenizer.get("split", True)
    ):
        scheme = pre_tokenizer.get("prepend_scheme", "always")
        if scheme != "never":
            way = "replace tokenizer.json with the tokenizer.model that it was converted from"
            raise _unlike_spaces(where, str(scheme), way)
        return False
    raise TokenizerError(
        f"{where}: its normalizer and pre_tokenizer are not SentencePiece's, so GGUF cannot "
        "represent them"
    )
