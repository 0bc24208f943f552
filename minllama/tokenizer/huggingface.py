"""Read and write a vocabulary as the tokenizer files of a Hugging Face folder.

`tokenizer.json` or `tokenizer.model` has the tokens; `tokenizer_config.json` and related files have
BOS, EOS and the chat templates.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

from minllama.errors import TokenizerError
from minllama.tokenizer import chat_settings, sentencepiece_form, tiktoken_form, tokenizers_form
from minllama.tokenizer.chat_settings import CHAT_TEMPLATE
from minllama.tokenizer.chat_settings import token_text as _text
from minllama.tokenizer.tokenizers_form import Json, added_token
from minllama.tokenizer.vocabulary import (
    MAX_VOCAB_SIZE,
    ListedToken,
    TokenFlags,
    TokenType,
    Vocabulary,
)

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_MODEL = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
_ADDED_TOKENS = "added_tokens.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
# All possible files of a folder's tokenizer, which a new one replaces.
FILES = frozenset(
    (
        TOKENIZER_JSON,
        TOKENIZER_MODEL,
        TOKENIZER_CONFIG,
        CHAT_TEMPLATE,
        chat_settings.TEMPLATE_FOLDER,
        GENERATION_CONFIG,
        _ADDED_TOKENS,
        _SPECIAL_TOKENS,
    )
)
_MODEL_CONFIG = "config.json"
_FURTHER_SPECIAL = ("additional_special_tokens", "extra_special_tokens")

_MAX_SETTINGS_BYTES = 2**26
_MAX_SHOWN = 80  # characters of a file's content in an error message


def with_settings(vocabulary: Vocabulary, folder: Path) -> Vocabulary:
    """`vocabulary`, read from `folder`, with the settings of the other files there.

    Settings that they lack stay unchanged.

    Raises:
        TokenizerError: one of the files is damaged, or names a token that does not exist.
    """
    config = _set_values(folder / _SPECIAL_TOKENS) | _set_values(folder / TOKENIZER_CONFIG)
    vocabulary, ids = _with_added_tokens(vocabulary, folder, config)
    named: dict[str, Any] = {
        f"{name}_id": ids[text]
        for name in ("bos", "eos", "pad")
        # transformers adds tokens that only the settings name; the model has no row for them.
        if (text := _text(config.get(f"{name}_token")) or "") in ids
    }
    vocabulary = dataclasses.replace(vocabulary, **named)
    ends = _ending_ids(folder, max(ids.values(), default=-1) + 1)
    if vocabulary.eos_id is None and ends:
        vocabulary = dataclasses.replace(vocabulary, eos_id=ends[0])
    templates = chat_settings.chat_templates(folder, config, _read)
    where = str(folder / TOKENIZER_CONFIG)
    add_bos = _flag(config, "add_bos_token", vocabulary.add_bos, where)
    add_eos = _flag(config, "add_eos_token", vocabulary.add_eos, where)
    return dataclasses.replace(
        vocabulary,
        stop_ids=tuple(
            i for i in dict.fromkeys([*vocabulary.stop_ids, *ends]) if i != vocabulary.eos_id
        ),
        add_bos=add_bos and vocabulary.bos_id is not None,
        add_eos=add_eos and vocabulary.eos_id is not None,
        chat_template=templates.pop(chat_settings.DEFAULT, None) or vocabulary.chat_template,
        chat_templates=templates or vocabulary.chat_templates,
        named_tokens=_named_tokens(vocabulary, folder, ids),
    )


def from_tokenizer_json(data: bytes, where: str) -> Vocabulary:
    """The vocabulary of a tokenizer.json alone; BOS and EOS are those of its template."""
    raw = tokenizers_form.parse(data, where)
    tokenizers_form.decoder_kind(raw.get("decoder"), where)
    bos_id, eos_id = tokenizers_form.template_ids(raw)
    return Vocabulary(
        storage_format="tokenizers",
        data=data,
        origin=TOKENIZER_JSON,
        bos_id=bos_id,
        eos_id=eos_id,
        add_bos=bos_id is not None,
        add_eos=eos_id is not None,
    )


def to_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    """File name -> content of the tokenizer in a Hugging Face folder.

    transformers' AutoTokenizer gives the same ids by them. A SentencePiece model is kept beside its
    tokenizer.json, for programs that want it; where no tokenizer.json can be exact, it is alone.
    """
    where = vocabulary.origin
    files: dict[str, bytes] = {}
    raw: Json | None
    if vocabulary.storage_format == "sentencepiece":
        files[TOKENIZER_MODEL] = vocabulary.data
        raw = sentencepiece_form.to_tokenizers(vocabulary)
    elif vocabulary.storage_format == "tiktoken":
        raw = tiktoken_form.to_tokenizers(vocabulary.data, where)
    else:
        raw = tokenizers_form.parse(vocabulary.data, where)
    if raw is not None:
        prefix = vocabulary.bos_id if vocabulary.add_bos else None
        suffix = vocabulary.eos_id if vocabulary.add_eos else None
        files[TOKENIZER_JSON] = tokenizers_form.dump(
            tokenizers_form.with_template(raw, prefix, suffix)
        )
    files[TOKENIZER_CONFIG] = _json_bytes(_config(vocabulary, raw))
    files[GENERATION_CONFIG] = _json_bytes(_generation_config(vocabulary))
    if vocabulary.chat_template is not None and not vocabulary.chat_templates:
        files[CHAT_TEMPLATE] = vocabulary.chat_template.encode()
    return files


def stated_vocab_size(folder: Path) -> int | None:
    """How many tokens the model in `folder` has, by its config.json; None if that is not stated."""
    try:
        size = _read_json(folder / _MODEL_CONFIG).get("vocab_size")
    except TokenizerError:
        return None  # opening it reports the damage
    return size if type(size) is int else None


def _config(vocabulary: Vocabulary, raw: Json | None) -> Json:
    """The content of tokenizer_config.json; `raw` is that of the tokenizer.json, if there is."""
    if raw is None:
        pieces = sentencepiece_form.pieces_of(
            sentencepiece_form.parse_model(vocabulary.data, vocabulary.origin)
        )
        texts = dict(enumerate(piece.text for piece in pieces))
        special = None
    else:
        texts = {token_id: text for text, token_id in tokenizers_form.token_ids(raw).items()}
        special = tokenizers_form.special_ids(raw)
    config: Json = {
        # The class that uses tokenizer.json unchanged, in every version.
        "tokenizer_class": "LlamaTokenizer" if raw is None else "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False,
    }
    if raw is None:
        # Whether added tokens are also followed by a space, as in Meta's code.
        config["legacy"] = vocabulary.legacy
        if vocabulary.flags:
            config["added_tokens_decoder"] = {
                str(i): added_token(
                    i, pieces[i].text, special=pieces[i].type != TokenType.USER_DEFINED, flags=flags
                )
                for i, flags in vocabulary.flags
            }
    for name in ("bos", "eos", "pad"):
        token_id = getattr(vocabulary, f"{name}_id")
        # transformers would make an ordinary padding token special.
        if token_id is not None and (name != "pad" or special is None or token_id in special):
            config[f"{name}_token"] = texts[token_id]
    ids = {text: token_id for token_id, text in texts.items()}
    named = chat_settings.written_tokens(
        vocabulary.named_tokens,
        lambda text: text in ids and (special is None or ids[text] in special),
    )
    if vocabulary.chat_templates:  # all versions of transformers read the list
        config["chat_template"] = chat_settings.template_settings(
            vocabulary.chat_template, vocabulary.chat_templates
        )
    return named | config


def _generation_config(vocabulary: Vocabulary) -> Json:
    ends = [i for i in (vocabulary.eos_id, *vocabulary.stop_ids) if i is not None]
    return {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": ends if len(ends) > 1 else vocabulary.eos_id,
    }


def _with_added_tokens(
    vocabulary: Vocabulary, folder: Path, config: Json
) -> tuple[Vocabulary, Mapping[str, int]]:
    """`vocabulary` with the tokens listed beside it, BOS and EOS made special; and text -> id."""
    where = str(folder)
    listed = _listed_tokens(folder, config)
    named = [config.get("bos_token"), config.get("eos_token")]
    for key in _FURTHER_SPECIAL:
        names = config.get(key)
        named += names if isinstance(names, list) else []
    special = {text: token for token in named if (text := _text(token)) is not None}
    if vocabulary.storage_format == "tiktoken":
        n_ranks = len(tiktoken_form.parse_ranks(vocabulary.data, where))
        return vocabulary, tiktoken_form.special_tokens(n_ranks)
    if vocabulary.storage_format == "tokenizers":
        raw = tokenizers_form.parse(vocabulary.data, where)
        extended = tokenizers_form.with_added_tokens(raw, listed, special, where)
        ids = tokenizers_form.token_ids(extended)
        if extended is raw:
            return vocabulary, ids
        return dataclasses.replace(vocabulary, data=tokenizers_form.dump(extended)), ids
    data, ids = sentencepiece_form.with_added_pieces(vocabulary.data, listed, special, where)
    tokens = {text: _token_flags(token) for text, token in special.items()}
    tokens |= {token.text: token.flags for token in listed if token.flags is not None}
    flags = [
        (ids[text], token_flags)
        for text, token_flags in tokens.items()
        if token_flags and text in ids
    ]
    config_path = str(folder / TOKENIZER_CONFIG)
    spaced = _flag(config, "add_prefix_space", None, config_path)
    if spaced is not None:
        data = sentencepiece_form.with_space_in_front(data, spaced, where)
    return dataclasses.replace(
        vocabulary,
        data=data,
        flags=tuple(sorted((i, token_flags) for i, token_flags in flags if any(token_flags))),
        legacy=_flag(config, "legacy", True, config_path),
    ), ids


def _listed_tokens(folder: Path, config: Json) -> list[ListedToken]:
    """The tokens that other files in the folder list, each text once."""
    listed: dict[str, ListedToken] = {}
    path = folder / _ADDED_TOKENS
    for key, token_id in _set_values(path).items():
        listed[key] = ListedToken(_listed_id(token_id, key, str(path)), key)
    decoder = config.get("added_tokens_decoder")
    for key, token in decoder.items() if isinstance(decoder, dict) else ():
        if (text := _text(token)) is not None:
            path = folder / TOKENIZER_CONFIG
            token_id = int(key) if re.fullmatch("[0-9]{1,9}", key) else key
            listed[text] = ListedToken(
                _listed_id(token_id, text, str(path)),
                text,
                special=isinstance(token, dict) and token.get("special") is True,
                flags=_token_flags(token),
                normalized=token.get("normalized") if isinstance(token, dict) else None,
            )
    return list(listed.values())


def _listed_id(token_id: Any, text: str, where: str) -> int:
    if type(token_id) is not int or not 0 <= token_id < MAX_VOCAB_SIZE:
        raise TokenizerError(
            f"{where}: the added token {text[:_MAX_SHOWN]!r} has the id "
            f"{repr(token_id)[:_MAX_SHOWN]}, which is not a valid token id"
        )
    return token_id


def _token_flags(token: Any) -> TokenFlags | None:
    """The flags of an AddedToken as a dictionary; None for a token that is only a text."""
    if not isinstance(token, dict):
        return None
    return TokenFlags(*(token.get(name) is True for name in TokenFlags._fields))


def _ending_ids(folder: Path, n_tokens: int) -> list[int]:
    """The ids that end a generation, as the model's files have them: one, or a list."""
    for name in (GENERATION_CONFIG, _MODEL_CONFIG):
        ends = _read_json(folder / name).get("eos_token_id")
        if ends is not None:
            listed = ends if isinstance(ends, list) else [ends]
            return [i for i in listed if type(i) is int and 0 <= i < n_tokens]
    return []


def _named_tokens(
    vocabulary: Vocabulary, folder: Path, ids: Mapping[str, int]
) -> chat_settings.NamedTokens:
    """The tokens that chat templates may write, by name; a null says that there is none."""
    config = _read_json(folder / _SPECIAL_TOKENS) | _read_json(folder / TOKENIZER_CONFIG)
    # transformers' class for Llamas has an unknown token by default.
    is_llama_class = str(config.get("tokenizer_class")).startswith("LlamaTokenizer")
    has_unknown = vocabulary.storage_format == "sentencepiece" or is_llama_class
    return {
        **vocabulary.named_tokens,
        **chat_settings.named_tokens(
            config, has_unknown=has_unknown and chat_settings.UNKNOWN in ids
        ),
    }


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_SETTINGS_BYTES:
            raise TokenizerError(f"{path}: far larger than such a file is; download it again")
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_json(path: Path) -> Json:
    """The object in a JSON file; empty without the file."""
    if not path.is_file():
        return {}
    raw = tokenizers_form.read_json(_read(path), str(path))
    if not isinstance(raw, dict):
        raise TokenizerError(f"{path}: not a JSON object; download it again")
    return raw


def _set_values(path: Path) -> Json:
    """As `_read_json`, without null values, which mean unset."""
    return {key: value for key, value in _read_json(path).items() if value is not None}


@overload
def _flag(config: Json, name: str, default: bool, where: str) -> bool: ...
@overload
def _flag(config: Json, name: str, default: None, where: str) -> bool | None: ...
def _flag(config: Json, name: str, default: bool | None, where: str) -> bool | None:
    value = config.get(name, default)
    if value is not None and not isinstance(value, bool):
        raise TokenizerError(f"{where}: {name} is {repr(value)[:_MAX_SHOWN]}, not true or false")
    return value


def _json_bytes(content: Json) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
