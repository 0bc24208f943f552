"""Read, query and build the content of a `tokenizer.json` (the library `tokenizers`).

Supports the parts that Llamas have: a BPE model, added tokens, a decoder of bytes or of
SentencePiece's pieces, and a template that adds BOS and EOS.
"""

import json
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from minllama.errors import TokenizerError
from minllama.text import parse_json
from minllama.tokenizer.bounds import find_excess
from minllama.tokenizer.vocabulary import MAX_VOCAB_SIZE, ListedToken, TokenFlags

Json = dict[str, Any]
MAX_ENTRIES = 2**22  # of a tokenizer.json: three times the largest known, merges included


class DecoderKind(NamedTuple):
    """How the tokens of a tokenizer.json are spelled.

    Attributes:
        byte_level: a character is a byte, in GPT-2's alphabet; otherwise SentencePiece's pieces.
        strips_space: the first token's leading space is not part of the text.
    """

    byte_level: bool
    strips_space: bool


def read_json(data: bytes, where: str) -> Any:
    """Parse a JSON file; raises TokenizerError if it is damaged."""
    try:
        return parse_json(data, max_entries=MAX_ENTRIES)
    except ValueError as error:
        raise TokenizerError(
            f"{where}: not readable as JSON ({error}); download it again"
        ) from error


def parse(data: bytes, where: str) -> Json:
    """The content of a tokenizer.json, checked as far as this package reads it.

    Raises:
        TokenizerError: it is damaged, or its model is not BPE.
    """
    raw = read_json(data, where)
    model = raw.get("model") if isinstance(raw, dict) else None
    if not isinstance(model, dict):
        raise TokenizerError(f"{where}: not a tokenizer.json, it has no model; download it again")
    if model.get("type", "BPE") != "BPE":
        raise TokenizerError(f"{where}: its model is {model['type']!r}; only BPE is supported")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        # If tokens lack the prefix, the library splits characters and aborts the process.
        if model.get(name):
            raise TokenizerError(f"{where}: its model has a {name}; not supported for a Llama")
    if not isinstance(model.get("unk_token", ""), str | None):
        raise TokenizerError(f"{where}: the model's unk_token is not a string; download it again")
    vocab, added = model.get("vocab"), raw.setdefault("added_tokens", [])
    if not isinstance(vocab, dict) or not all(map(_is_id, vocab.values())):
        raise TokenizerError(f"{where}: the model's vocab is not a table of ids; download it again")
    if len(set(vocab.values())) != len(vocab):
        raise TokenizerError(
            f"{where}: two tokens of the model's vocab share one id; download it again"
        )
    if not isinstance(added, list) or not all(map(_is_added_token, added)):
        raise TokenizerError(f"{where}: added_tokens is damaged; download it again")
    _check_added_ids(vocab, added, where)
    if (excess := find_excess(raw)) is not None:
        raise TokenizerError(f"{where}: {excess}; use the tokenizer of another source")
    checked: Json = raw
    return checked


def dump(raw: Json) -> bytes:
    """`raw` as a tokenizer.json; a dictionary keeps its order, so equal content is equal bytes."""
    return json.dumps(raw, ensure_ascii=False, separators=(",", ":")).encode()


def token_ids(raw: Json) -> dict[str, int]:
    """Text -> id of all tokens, added ones as well."""
    own: dict[str, int] = raw["model"]["vocab"]
    return own | {token["content"]: token["id"] for token in raw["added_tokens"]}


def special_ids(raw: Json) -> set[int]:
    """Ids of tokens that are only parsed on request."""
    return {token["id"] for token in raw["added_tokens"] if token.get("special")}


def components(component: Any, key: str) -> list[Json]:
    """A component, or those of a Sequence, which are under `key`."""
    sequence = isinstance(component, dict) and component.get("type") == "Sequence"
    parts = _listed(component.get(key)) if sequence else [component]
    return [part for part in parts if isinstance(part, dict) and "type" in part]


def decoder_kind(decoder: Json | None, where: str) -> DecoderKind:
    """How tokens are spelled, from the `decoder` of a tokenizer.json.

    Raises:
        TokenizerError: it is of a kind that is not supported for a Llama.
    """
    parts = {str(part["type"]): part for part in components(decoder, "decoders")}
    if "ByteLevel" in parts:
        return DecoderKind(byte_level=True, strips_space=False)
    if metaspace := parts.get("Metaspace"):
        scheme = metaspace.get("prepend_scheme", "always")
        prefix = scheme != "never" and metaspace.get("add_prefix_space", True)
        return DecoderKind(byte_level=False, strips_space=bool(prefix))
    if "ByteFallback" in parts or "Replace" in parts:
        strips = parts.get("Strip", {}).get("start")
        return DecoderKind(byte_level=False, strips_space=strips == 1)
    raise TokenizerError(
        f"{where}: its decoder is {' + '.join(parts) or 'missing'}; known: ByteLevel, Metaspace "
        "and ByteFallback"
    )


def template_ids(raw: Json) -> tuple[int | None, int | None]:
    """Ids of the tokens that its post-processor puts before and after a text."""
    ids = token_ids(raw)
    for part in components(raw.get("post_processor"), "processors"):
        if part["type"] == "TemplateProcessing":
            names = [_special_name(item) for item in _listed(part.get("single"))]
            at = names.index(None) if None in names else len(names)  # the text itself
            prefix = ids.get(names[0] or "") if at > 0 else None
            suffix = ids.get(names[at + 1] or "") if at + 1 < len(names) else None
            return prefix, suffix
    return None, None


def with_template(raw: Json, bos_id: int | None, eos_id: int | None) -> Json:
    """`raw` with a post-processor that puts exactly these tokens before and after a text."""
    if template_ids(raw) == (bos_id, eos_id):
        return raw
    texts = {token_id: text for text, token_id in token_ids(raw).items()}

    def special(token_id: int, type_id: int) -> Json:
        return {"SpecialToken": {"id": texts[token_id], "type_id": type_id}}

    def segment(name: str, type_id: int) -> list[Json]:
        text = [{"Sequence": {"id": name, "type_id": type_id}}]
        prefix = [] if bos_id is None else [special(bos_id, type_id)]
        suffix = [] if eos_id is None else [special(eos_id, type_id)]
        return prefix + text + suffix

    used = [token_id for token_id in (bos_id, eos_id) if token_id is not None]
    template = {
        "type": "TemplateProcessing",
        "single": segment("A", 0),
        "pair": segment("A", 0) + segment("B", 1),
        "special_tokens": {
            texts[token_id]: {"id": texts[token_id], "ids": [token_id], "tokens": [texts[token_id]]}
            for token_id in used
        },
    }
    return raw | {"post_processor": template if used else None}


def with_added_tokens(
    raw: Json, added: Sequence[ListedToken], special: Collection[str], where: str
) -> Json:
    """`raw` with the added tokens of a Hugging Face folder, some of them special.

    As in transformers, the list takes precedence over `raw` for existing tokens, except for their
    ids.

    Args:
        raw: the content of a tokenizer.json.
        added: the listed tokens.
        special: texts of tokens that no plain text may become; the unknown ones are passed over.
        where: the source, for error messages.
    """
    ids = token_ids(raw)
    entries = {token["content"]: token for token in raw["added_tokens"]}
    for token in sorted(added, key=lambda token: token.token_id):
        token_id = ids.setdefault(token.text, token.token_id)
        new = added_token(token_id, token.text, special=token.special, flags=token.flags)
        old = entries.get(token.text)
        if old is None:
            entries[token.text] = new | {"normalized": bool(token.normalized)}
        elif token.flags is not None:
            settings = token.flags._asdict() | {
                "special": token.special or bool(old.get("special"))
            }
            entries[token.text] = old | settings
    for text in special:
        if text in entries:
            entries[text] = entries[text] | {"special": True}
        elif text in ids:
            entries[text] = added_token(ids[text], text, special=True)
    tokens = sorted(entries.values(), key=lambda token: int(token["id"]))
    if tokens == raw["added_tokens"]:
        return raw
    _check_added_ids(raw["model"]["vocab"], tokens, where)
    return raw | {"added_tokens": tokens}


def document(
    *,
    added_tokens: list[Json],
    normalizer: Json | None,
    pre_tokenizer: Json | None,
    decoder: Json,
    model: Json,
) -> Json:
    """The content of a tokenizer.json, without a post-processor (see `with_template`)."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def added_token(
    token_id: int, text: str, *, special: bool, flags: TokenFlags | None = None
) -> Json:
    """One entry of `added_tokens`."""
    return {
        "id": token_id,
        "content": text,
        **(flags or TokenFlags())._asdict(),
        "normalized": False,
        "special": special,
    }


def bpe_model(
    vocab: dict[str, int],
    merges: Sequence[str | tuple[str, str]],
    *,
    unk_token: str | None = None,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> Json:
    """The `model`: pairs of tokens in `merges`, or strings with a space between, best first."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unk_token is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
    }


def merge_pairs(raw: Json, where: str) -> list[tuple[str, str]]:
    """The merges of a tokenizer.json, best first, in either of the two spellings."""
    pairs = []
    for merge in _listed(raw["model"].get("merges")):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if (
            not isinstance(parts, list | tuple)
            or len(parts) != 2
            or not all(isinstance(part, str) for part in parts)
        ):
            raise TokenizerError(f"{where}: the merge {merge!r} is not a pair of tokens")
        pairs.append((parts[0], parts[1]))
    return pairs


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _special_name(item: Any) -> str | None:
    """Text of the special token of a template item; `None` for the text itself."""
    token = item.get("SpecialToken") if isinstance(item, dict) else None
    name = token.get("id") if isinstance(token, dict) else None
    return name if isinstance(name, str) else None


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_VOCAB_SIZE


def _is_added_token(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("content"), str)
        and _is_id(value.get("id"))
    )


def _check_added_ids(vocab: dict[str, int], added: Sequence[Json], where: str) -> None:
    # The library renumbers them, and only logs that.
    next_id = len(vocab)
    for token in added:
        text, token_id = token["content"], token["id"]
        expected = vocab.get(text, next_id)
        if token_id != expected:
            raise TokenizerError(
                f"{where}: the added token {text!r} has the id {token_id}, not {expected}"
            )
        next_id += text not in vocab
