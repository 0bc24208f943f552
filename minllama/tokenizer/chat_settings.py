"""Read chat templates and special tokens from the files in a tokenizer's folder.

Follows transformers' PreTrainedTokenizerBase.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"  # NAME.jinja for each further template
DEFAULT = "default"
ADDITIONAL = "additional_special_tokens"
UNKNOWN = "<unk>"
# The names under which transformers hands tokens to a template.
TOKEN_NAMES = (
    *("bos_token", "eos_token", "unk_token", "sep_token"),
    *("pad_token", "cls_token", "mask_token"),
)

NamedTokens = dict[str, str | list[str]]


def chat_templates(
    folder: Path, config: Mapping[str, Any], read: Callable[[Path], bytes]
) -> dict[str, str]:
    """Name -> source of a folder's chat templates; a lone one is the `default`.

    Separate template files replace all templates in the settings.

    Args:
        folder: where the tokenizer is.
        config: the content of tokenizer_config.json.
        read: gives a file's content.
    """
    own = folder / CHAT_TEMPLATE
    paths = {DEFAULT: own} if own.is_file() else {}
    further = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    paths |= {path.stem: path for path in further if path.is_file()}
    if paths:
        sources = {name: read(path).decode(errors="replace") for name, path in paths.items()}
        return {name: source.removeprefix("\ufeff") for name, source in sources.items()}
    templates = config.get("chat_template")
    if isinstance(templates, str):
        return {DEFAULT: templates}
    if isinstance(templates, list):
        is_named = [isinstance(e, dict) and isinstance(e.get("name"), str) for e in templates]
        entries = [entry for entry, named in zip(templates, is_named, strict=True) if named]
        templates = {entry["name"]: entry.get("template") for entry in entries}
    if not isinstance(templates, dict):
        return {}
    return {
        name: source
        for name, source in templates.items()
        if isinstance(name, str) and name and isinstance(source, str)
    }


def named_tokens(config: Mapping[str, Any], *, has_unknown: bool) -> NamedTokens:
    """Name -> text of the tokens that templates may write; empty if the settings name none.

    Args:
        config: the content of tokenizer_config.json and special_tokens_map.json.
        has_unknown: `<unk>` is a token of a vocabulary of pieces, which need not be stated.
    """
    extra = config.get("extra_special_tokens")
    named = {**config, **extra} if isinstance(extra, dict) else config
    tokens: NamedTokens = {}
    if has_unknown and "unk_token" not in named:
        tokens["unk_token"] = UNKNOWN
    for name, value in named.items():
        is_named = name.endswith("_token") or (isinstance(extra, dict) and name in extra)
        if is_named and (text := token_text(value)) is not None:
            tokens[name] = text
        elif value is None and name in TOKEN_NAMES:
            tokens[name] = ""
    listed = config.get(ADDITIONAL)
    if isinstance(listed, list):
        tokens[ADDITIONAL] = [text for v in listed if (text := token_text(v)) is not None]
    return tokens


def token_text(token: Any) -> str | None:
    """Text of a token in the settings: a string, or an AddedToken as a dictionary."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def template_settings(default: str | None, named: Mapping[str, str]) -> list[dict[str, str]]:
    """Several templates as tokenizer_config.json holds them."""
    every = ({} if default is None else {DEFAULT: default}) | dict(named)
    return [{"name": name, "template": source} for name, source in every.items()]


def written_tokens(tokens: Mapping[str, Any], is_special: Callable[[str], bool]) -> dict[str, Any]:
    """The named tokens for tokenizer_config.json: those that are special tokens of a vocabulary.

    transformers would add any other to it.
    """
    written: dict[str, Any] = {}
    for name, value in tokens.items():
        if isinstance(value, str) and is_special(value):
            written[name] = value
        elif isinstance(value, list) and value and all(map(is_special, value)):
            written[name] = list(value)
    return written
