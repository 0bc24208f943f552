"""The pre-tokenizers of byte-level BPE that GGUF names in `tokenizer.ggml.pre`.

A pre-tokenizer splits a text into the words within which pairs are merged, by one pattern after
another, each of which splits the pieces of the previous one. The patterns follow llama.cpp
(src/llama-vocab.cpp), or the original model where llama.cpp has rewritten a pattern for its engine.
Included are those of files with the architecture `llama`.
"""

from typing import NamedTuple

from minllama.tokenizer.tokenizers_form import Json


class PreTokenizer(NamedTuple):
    """One of GGUF's `tokenizer.ggml.pre`.

    Attributes:
        component: the same as the `pre_tokenizer` of a tokenizer.json.
        ignore_merges: a word that is a token is that token, regardless of the merges.
        add_bos: whether BOS begins a text if a file does not state it.
    """

    component: Json
    ignore_merges: bool = False
    add_bos: bool = False


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2_PATTERN = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_MINICPM5_PATTERN = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}+|{_REST}"
_SEED_CODER_PATTERN = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}"
    r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_WITH_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_TEKKEN_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}|{_REST_WITH_SLASH}"
)
_GPT4O_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}"
)
# Letters of scripts with case, as DeepSeek lists them.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_PUNCTUATION = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK3_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK3_PATTERN = (
    rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM_PATTERN = r" ?[^(\s|.,!?…。，、।۔،)]+"


def split(pattern: str) -> Json:
    """A component that splits a text before and after each match."""
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def to_bytes(*, use_regex: bool) -> Json:
    """A component that spells bytes as characters, optionally after splitting by GPT2_PATTERN."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _by(*patterns: str, ignore_merges: bool = False, add_bos: bool = False) -> PreTokenizer:
    parts = [*map(split, patterns), to_bytes(use_regex=False)]
    component = {"type": "Sequence", "pretokenizers": parts}
    return PreTokenizer(component, ignore_merges=ignore_merges, add_bos=add_bos)


PRE_TOKENIZERS = {
    "smollm": PreTokenizer(
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                to_bytes(use_regex=True),
            ],
        }
    ),
    "llama-bpe": _by(LLAMA3_PATTERN, ignore_merges=True, add_bos=True),
    "gpt-2": PreTokenizer(to_bytes(use_regex=True)),
    # llama.cpp's choice for files that name none: punctuation alone, then GPT-2's words, and
    # digits in threes.
    "default": _by(r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "smaug-bpe": _by(LLAMA3_PATTERN),
    "deepseek-llm": _by(
        "[\r\n]",
        rf"\s?[{_CASED_LETTERS}]+",
        rf"\s?[{_DEEPSEEK_PUNCTUATION}]+",
        r"\s+$",
        _DEEPSEEK_CJK,
        r"\p{N}+",
    ),
    "deepseek-coder": _by("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}"),
    "deepseek-v3": _by(
        r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3_PATTERN
    ),
    "falcon": _by(r"[\p{P}\$\+<=>\^~\|`]+", GPT2_PATTERN, r"[0-9][0-9][0-9]"),
    "qwen2": _by(_QWEN2_PATTERN),
    "tekken": _by(_TEKKEN_PATTERN, ignore_merges=True, add_bos=True),
    "gpt-4o": _by(_GPT4O_PATTERN),
    "seed-coder": _by(_SEED_CODER_PATTERN),
    "minicpm5": _by(r"\p{N}{1,3}", _MINICPM5_PATTERN, ignore_merges=True),
    "bloom": _by(_BLOOM_PATTERN),
    "viking": _by(_BLOOM_PATTERN, r"\p{N}"),
}

# Aliases in files, as in llama.cpp.
ALIASES = {
    alias: name
    for name, aliases in {
        "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        "smaug-bpe": "dbrx glm4 chatglm-bpe",
        "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
        "gpt-2": "phi-2 gigachat a.x-4.0 mellum mpt olmo jais trillion granite-docling exaone4",
        "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
        "qwen2": "stablelm2 hunyuan megrez deepseek-r1-qwen kormo f2llmv2 grok-2 solar-open",
        "gpt-4o": "llama4 kanana2 talkie minimax-m2",
        "bloom": "poro-chat gpt3-finnish",
    }.items()
    for alias in aliases.split()
}
