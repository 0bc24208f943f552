"""Pre-tokenizers that GGUF names, against ones that are built by hand.

The patterns are spelled as in llama.cpp's src/llama-vocab.cpp, once for the library `tokenizers`
and once for the module `regex`, so that neither our table nor an engine is its own judge.
"""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from minllama.tokenizer.byte_level import ALIASES, BYTE_CHARS, PRE_TOKENIZERS, build, unspell
from minllama.tokenizer.gguf import from_gguf, to_gguf
from minllama.tokenizer.tokenizer import Tokenizer as OurTokenizer
from minllama.tokenizer.tokenizers_form import Json, dump
from minllama.tokenizer.vocabulary import Vocabulary
from tests.tokenizer_cases import TEXTS, crossing_fields, random_texts

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
S = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CJK = "[一-龥\u0800-一가-\ud7ff]+"
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
U, L = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORD = r"[^\r\n\p{L}\p{N}]?"
# Case alone makes a letter one of DeepSeek's: its list ends with Unicode 11 and has gaps.
PATTERNS = {
    "smaug-bpe": [rf"{S}|{WORD}\p{{L}}+|\p{{N}}{{1,3}}|{TAIL}"],
    "dbrx": [rf"{S}|{WORD}\p{{L}}+|\p{{N}}{{1,3}}|{TAIL}"],
    "deepseek-coder": ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    "refact": [r"\p{N}", GPT2],
    "minerva-7b": [r"\p{N}", GPT2],
    "trillion": [GPT2],
    "megrez": [rf"{S}|{WORD}\p{{L}}+|\p{{N}}|{TAIL}"],
    "qwen2": [rf"{S}|{WORD}\p{{L}}+|\p{{N}}|{TAIL}"],
    "seed-coder": [
        rf"{S}|{WORD}\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "minicpm5": [r"\p{N}{1,3}", rf"{S}|{WORD}\p{{L}}+|\p{{N}}+|{TAIL}"],
    "tekken": [
        rf"{WORD}{U}*{L}+|{WORD}{U}+{L}*|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "gpt-4o": [
        rf"{WORD}{U}*{L}+{S}?|{WORD}{U}+{L}*{S}?|\p{{N}}{{1,3}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "poro-chat": [BLOOM],
    "viking": [BLOOM, r"\p{N}"],
}


def raw_of(pre: str, **model: Any) -> Json:
    raw = build(list(BYTE_CHARS.values()), [1] * 256, [], pre, "x")
    raw["model"] |= model
    return raw


def words(pre: str, text: str) -> list[str]:
    component = Tokenizer.from_str(dump(raw_of(pre)).decode()).pre_tokenizer
    return [unspell(word).decode() for word, _ in component.pre_tokenize_str(text)]


def cut(patterns: list[str], text: str) -> list[str]:
    """The pieces that the patterns, one after the other, leave of a text."""
    regex = pytest.importorskip("regex")
    pieces = [text]
    for pattern in patterns:
        matcher, cut_further = regex.compile(pattern), []
        for piece in pieces:
            done = 0
            for match in matcher.finditer(piece):
                cut_further += [piece[done : match.start()], match[0]]
                done = match.end()
            cut_further.append(piece[done:])
        pieces = [piece for piece in cut_further if piece]
    return pieces


def texts() -> list[str]:
    """Without what one Unicode knows as a letter and another one does not know at all."""

    def is_old(char: str) -> bool:
        assigned = unicodedata.ucd_3_2_0.category(char) != "Cn"
        # The long s is an s where a pattern minds no case, and none where both are listed.
        return assigned and char not in "ſK"

    every = [*TEXTS, *random_texts(600, seed=41)]
    return ["".join(filter(is_old, text)) for text in every]


def by_hand(pre: str) -> pre_tokenizers.Sequence:
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[pre]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.mark.parametrize("pre", PATTERNS)
def test_a_text_is_cut_as_by_llama_cpps_patterns(pre: str) -> None:
    component = Tokenizer.from_str(dump(raw_of(pre)).decode()).pre_tokenizer
    reference = by_hand(pre)
    for text in texts():
        ours = [word for word, _ in component.pre_tokenize_str(text)]
        assert ours == [word for word, _ in reference.pre_tokenize_str(text)], ascii(text)
        assert [unspell(word).decode() for word in ours] == cut(PATTERNS[pre], text), ascii(text)


def test_deepseek_llm_cuts_by_its_lists_of_letters() -> None:
    # Its punctuation runs from : to ~, letters and all, so a letter beyond ASCII stands alone.
    assert words("deepseek-llm", "Hello wörld") == ["Hello", " w", "ö", "rld"]
    assert words("deepseek-llm", "a\n\nb  \n 1234 漢字!") == [
        *("a", "\n", "\n", "b", "  ", "\n", " ", "1234", " ", "漢字", "!")
    ]
    assert words("deepseek-llm", "Привет, мир") == ["Привет", ",", " мир"]
    # The last pattern but one is of all from U+0800 to U+4E00, the Ohm sign and quotes as well.
    assert words("deepseek-llm", " \u0390\u0386\u2126 \u01c5 \u10a0\u0560") == [
        *(" \u0390\u0386", "\u2126", " \u01c5", " ", "\u10a0", "\u0560")
    ]
    assert words("deepseek-llm", "\u2018x\u2019\uff01 \u3001") == list("‘x’！ 、")
    assert words("deepseek-llm", "x  ") == ["x", "  "]


@pytest.mark.parametrize("pre", ["deepseek-coder", "smaug-bpe", "viking"])
def test_files_with_it_are_read_and_written(pre: str) -> None:
    golden = json.loads(
        (Path(__file__).parents[1] / "data" / "tokenizer_crossing.json").read_text()
    )
    vocabulary = from_gguf(crossing_fields(golden["tokens"], golden["merges"], pre), "x")
    assert vocabulary is not None
    reference = Tokenizer.from_str(vocabulary.data.decode())
    reference.pre_tokenizer = by_hand(pre)
    ours = OurTokenizer(vocabulary)
    for text in texts():
        assert ours.encode(text) == reference.encode(text).ids
    assert to_gguf(vocabulary, ours.vocab_size)["tokenizer.ggml.pre"] == pre


def test_every_alias_means_a_kind_that_is_known() -> None:
    assert set(ALIASES.values()) <= set(PRE_TOKENIZERS)
    assert not set(ALIASES) & set(PRE_TOKENIZERS)


def test_bos_stands_in_front_where_llama_cpp_puts_it() -> None:
    tokens, types = ["<s>", *BYTE_CHARS.values()], [3] + [1] * 256
    for pre in (*PRE_TOKENIZERS, *ALIASES):
        fields = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.bos_token_id": 0,
        }
        vocabulary = from_gguf(fields, "x")
        assert vocabulary is not None
        assert vocabulary.add_bos == (ALIASES.get(pre, pre) in ("llama-bpe", "tekken")), pre


def test_components_that_do_the_same_have_one_name() -> None:
    # deepseek-coder's own tokenizer.json: digits by a component of their own.
    raw = raw_of("deepseek-coder")
    parts = raw["pre_tokenizer"]["pretokenizers"]
    parts[4] = {"type": "Digits", "individual_digits": True}
    vocabulary = Vocabulary("tokenizers", dump(raw), "x")
    assert to_gguf(vocabulary, 256)["tokenizer.ggml.pre"] == "deepseek-coder"
    llama = Vocabulary("tokenizers", dump(raw_of("llama-bpe", ignore_merges=False)), "x")
    assert to_gguf(llama, 256)["tokenizer.ggml.pre"] == "smaug-bpe"
