"""Ids of vocabularies in GGUF equal those of llama.cpp as it runs, and those that it gave once.

Literal ones, by llama-cpp-python 0.3.36, are compared everywhere; where that is installed, it is
asked again, with more texts.
"""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minllama.tokenizer.byte_level import ALIASES, PRE_TOKENIZERS
from minllama.tokenizer.gguf import from_gguf
from minllama.tokenizer.gguf_export import ENDS, LATER_ENDS, to_gguf
from minllama.tokenizer.sentencepiece_form import from_model, parse_model
from minllama.tokenizer.tokenizer import Tokenizer
from tests.tokenizer_cases import (
    CROSSING,
    TEXTS,
    crossing_fields,
    llama_cpp_encoder,
    random_texts,
    tiny_sentencepiece,
)

GGML = "tokenizer.ggml."
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
MARKERS = ("<|im_start|>", "<|im_end|>", "<x>", "[INST]", " spaced ", "<a>", "<a>b")
KINDS_OF_MARKERS: dict[str, tuple[int, ...]] = {
    "user-defined": (USER_DEFINED,) * 7,
    "control": (CONTROL,) * 7,
    "ordinary": (NORMAL,) * 7,
    "mixed": (USER_DEFINED, CONTROL, NORMAL, USER_DEFINED, USER_DEFINED, CONTROL, USER_DEFINED),
}
STRETCHES = ("Hi there", " Hi", "Hi ", "\n", "  ", "the cat", "▁x", "a\tb", "漢字 x")
CHAT = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
CUT = "It'S 12345 naïve a/b²!\n\n \tDon't 漢字  (x"
HARD = [
    CUT,
    "I'm you're he'll DON'T it'D 'S ’s",
    "1,234.56 12 345 6789 x²y³ 𝟙𝟚𝟛 ١٢٣",
    "a\tb\t\tc \t d\r\n\r\ny\n \n z  lead  \n\n\n",
    "日本語123テスト foo/bar//baz\n/x 👩‍👧 ok!!!\n\n",
    "Ünïcödé CAFÉ ǅ ǈ Ǆ ʰ e\u0301\u0302 x\u0301y \u2028\u2029\u1680x\u180e",
]
# Tokens of the vocabulary in data/tokenizer_crossing.json for CUT.
CUTS = {
    "smollm": "I|t|'|S|Ġ|1|2|3|4|5|Ġ|naÃ|¯|v|e|Ġ|a|/|b|Â²|!|Ċ|ĊĠ|ĉ|D|on|'t|Ġ|æ¼¢åŃĹ|Ġ|Ġ|(|x",
    "llama-bpe": "I|t|'|S|Ġ|12|3|45|Ġ|naÃ|¯|v|e|Ġ|a|/|b|Â²|!|ĊĊ|Ġ|ĉ|D|on|'t|Ġ|æ¼¢åŃĹ|Ġ|Ġ|(|x",
    "gpt-2": "I|t|'|S|Ġ1234|5|Ġ|naÃ|¯|v|e|Ġ|a|/|b|Â²|!|Ċ|ĊĠ|ĉ|D|on|'t|Ġ|æ¼¢åŃĹ|Ġ|Ġ|(|x",
    "default": "I|t|'|S|Ġ|12|3|45|Ġ|naÃ|¯|v|e|Ġ|a|/|b|Â²|!|Ċ|ĊĠ|ĉ|D|on|'|t|Ġ|æ¼¢åŃĹ|ĠĠ|(|x",
    "smaug-bpe": "I|t|'|S|Ġ|12|3|45|Ġ|naÃ|¯|v|e|Ġ|a|/|b|Â²|!|ĊĊ|Ġ|ĉ|D|on|'t|Ġ|æ¼¢åŃĹ|Ġ|Ġ|(|x",
    "deepseek-llm": "I|t|'|S|Ġ|1234|5|Ġ|n|a|Ã|¯|v|e|Ġ|a|/|b|Â²|!|Ċ|Ċ|Ġ|ĉ|D|on|'|t|Ġ|æ¼¢åŃĹ|Ġ|Ġ|(|x",
    "deepseek-coder": "I|t|'|S|Ġ|1|2|3|4|5|Ġ|naÃ|¯|v|e|Ġ|a|/|b|Â²|!"
    "|Ċ|Ċ|Ġ|ĉ|D|on|'|t|Ġ|æ¼¢åŃĹ|Ġ|Ġ|(|x",
    "deepseek-v3": "I|t|'|S|Ġ|12|3|45|Ġ|naÃ|¯|v|e|Ġ|a|/|b|Â²|!|ĊĊ|Ġ|ĉ|D|on|'t|Ġ|æ¼¢åŃĹ|Ġ|Ġ|(|x",
    "falcon": "I|t|'|S|Ġ|12|3|45|Ġ|naÃ|¯|v|e|Ġ|a|/|b|Â²|!|Ċ|ĊĠ|ĉ|D|on|'|t|Ġ|æ¼¢åŃĹ|ĠĠ|(|x",
    "qwen2": "I|t|'|S|Ġ|1|2|3|4|5|Ġ|naÃ|¯|v|e|Ġ|a|/|b|Â²|!|ĊĊ|Ġ|ĉ|D|on|'t|Ġ|æ¼¢åŃĹ|Ġ|Ġ|(|x",
    "tekken": "I|t|'|S|Ġ|1|2|3|4|5|Ġ|naÃ|¯|v|e|Ġ|a|/|b|Â²|!|ĊĊ|Ġ|ĉ|D|on|'t|Ġ|æ¼¢åŃĹ|Ġ|Ġ|(|x",
    "gpt-4o": "I|t|'|S|Ġ|12|3|45|Ġ|naÃ|¯|v|e|Ġ|a|/|b|Â²|!|ĊĊ|Ġ|ĉ|D|on|'t|Ġ|æ¼¢åŃĹ|Ġ|Ġ|(|x",
    "seed-coder": "I|t|'|S|Ġ|1|2|3|4|5|Ġ|naÃ|¯|v|e|Ġ|a|/|b|Â²|!|ĊĊ|Ġ|ĉ|D|on|'t|Ġ|æ¼¢åŃĹ|Ġ|Ġ|(|x",
    "minicpm5": "I|t|'|S|Ġ|12|3|45|Ġ|naÃ|¯|v|e|Ġ|a|/|b|Â²|!|ĊĊ|Ġ|ĉ|D|on|'t|Ġ|æ¼¢åŃĹ|Ġ|Ġ|(|x",
    "bloom": "I|t|'|S|Ġ1234|5|Ġ|naÃ|¯|v|e|Ġ|a/|b|Â²|!|Ċ|ĊĠ|ĉ|D|on|'t|Ġ|æ¼¢åŃĹ|ĠĠ|(|x",
    "viking": "I|t|'|S|Ġ|1|2|3|4|5|Ġ|naÃ|¯|v|e|Ġ|a/|b|Â²|!|Ċ|ĊĠ|ĉ|D|on|'t|Ġ|æ¼¢åŃĹ|ĠĠ|(|x",
}


def texts_with_markers() -> list[str]:
    texts = [CHAT, "<a>bc <a>b <a> b", "<s>x</s> <unk> <0x0A>", "x <s> y"]
    for m in MARKERS:
        texts += [m, m + m, f"{m} {m}", f" {m}", f"{m} "]
        for s in STRETCHES:
            texts += [m + s, s + m, s + m + s, m + s + m, f"{s} {m} {s}", f"{m}\n{s}\n{m}"]
    return texts


def marked_fields(kinds: tuple[int, ...], *, spaced: bool) -> dict[str, Any]:
    """GGUF's fields, as written here, of a SentencePiece model with MARKERS of these types."""
    model = parse_model(tiny_sentencepiece(), "tiny")
    for marker, kind in zip(MARKERS, kinds, strict=True):
        model.pieces.add(piece=marker.replace(" ", "▁"), score=0.0, type=kind)
    model.normalizer_spec.add_dummy_prefix = spaced
    vocabulary = from_model(model.SerializeToString(), "tiny")
    return to_gguf(vocabulary, 600 + len(MARKERS))


def opened(fields: dict[str, Any]) -> Tokenizer:
    vocabulary = from_gguf(fields, "x")
    assert vocabulary is not None
    return Tokenizer(vocabulary)


def crossing(pre: str) -> dict[str, Any]:
    golden = json.loads(CROSSING.read_text())
    return crossing_fields(golden["tokens"], golden["merges"], pre)


def differs_by_design(pre: str) -> Callable[[str], bool]:
    """Whether llama.cpp has rewritten a model's pattern so that it cuts a text otherwise."""
    kind = ALIASES.get(pre, pre)

    def has(text: str, found: Callable[[str], bool]) -> bool:
        return any(found(char) for char in text if not char.isascii())

    if kind in ("deepseek-llm", "deepseek-coder"):
        # White space beyond ASCII is one character to its engine, and CJK to the pattern.
        return lambda text: has(text, str.isspace)
    if kind in ("tekken", "gpt-4o"):
        # Where the pattern speaks of case and marks, its engine looks at A-Z and a-z.
        cased = ("Lu", "Ll", "Lt", "Lm", "Mn", "Mc", "Me")
        return lambda text: has(text, lambda char: unicodedata.category(char) in cased)
    return lambda text: False


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_each_kind_cuts_a_text_as_llama_cpp_did(pre: str) -> None:
    fields = crossing(pre)
    tokens = fields[GGML + "tokens"]
    assert "|".join(tokens[i] for i in opened(fields).encode(CUT, bos=False)) == CUTS[pre]


@pytest.mark.parametrize("pre", [*PRE_TOKENIZERS, *ALIASES])
def test_each_name_cuts_texts_as_llama_cpp_does(pre: str, tmp_path: Path) -> None:
    fields = crossing(pre)
    encode = llama_cpp_encoder(fields, tmp_path / "vocabulary.gguf")
    tokenizer, skipped = opened(fields), differs_by_design(pre)
    texts = HARD if pre in ALIASES else [*HARD, *TEXTS, *random_texts(300, seed=77)]
    for text in texts:
        for content, special in ((text, False), (f"{text}<end>{text}", True)):
            ids = tokenizer.encode(content, bos=False, special=special)
            assert ids == encode(content, special) or skipped(text), ascii(content)


@pytest.mark.parametrize(
    ("kind", "text", "spaced", "tokens"),
    [
        (
            "user-defined",
            CHAT,
            True,
            "<|im_start|>/▁/u/s/er/\n/H/i/▁t/h/er/e/<|im_end|>/▁/\n/<|im_start|>/▁/as/s/i/st/a/n/t/\n",
        ),
        (
            "control",
            CHAT,
            False,
            "<|im_start|>/u/s/er/\n/H/i/▁t/h/er/e/<|im_end|>/\n/<|im_start|>/as/s/i/st/a/n/t/\n",
        ),
        (
            "mixed",
            "<|im_start|>Hi <|im_end|> Hi[INST]",
            True,
            "<|im_start|>/▁/H/i/▁/<|im_end|>/▁▁/H/i/[INST]",
        ),
        ("user-defined", "a spaced b<a>bc<a>", True, "▁a/ spaced /▁b/<a>b/▁/c/<a>"),
        ("ordinary", "<|im_end|>Hi <|im_start|>", True, "<|im_end|>/▁/H/i/▁</|/i/m/_/st/ar/t/|/>"),
        ("control", " <a>b <a>", True, "▁▁/<a>b/▁▁/<a>"),
    ],
)
def test_markers_stand_in_texts_as_in_llama_cpps(
    kind: str, text: str, spaced: bool, tokens: str
) -> None:
    fields = marked_fields(KINDS_OF_MARKERS[kind], spaced=spaced)
    ids = opened(fields).encode(text, bos=False, special=True)
    assert "/".join(fields[GGML + "tokens"][i] for i in ids) == tokens


@pytest.mark.parametrize("spaced", [True, False])
@pytest.mark.parametrize("kind", KINDS_OF_MARKERS)
def test_ids_around_markers_are_llama_cpps(kind: str, spaced: bool, tmp_path: Path) -> None:
    fields = marked_fields(KINDS_OF_MARKERS[kind], spaced=spaced)
    encode = llama_cpp_encoder(fields, tmp_path / "vocabulary.gguf")
    tokenizer = opened(fields)
    for text in [*texts_with_markers(), *TEXTS, *random_texts(100, seed=5)]:
        for special in (False, True):
            ids = tokenizer.encode(text, bos=False, special=special)
            assert ids == encode(text, special), ascii(text)


@pytest.mark.parametrize("marker", [*ENDS, *LATER_ENDS, "<|eot|>", "<|eos|>", "[END]"])
def test_an_end_is_known_by_its_text_as_in_llama_cpp(marker: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python as a reference")
    fields = marked_fields((NORMAL,) * len(MARKERS), spaced=True)
    fields[GGML + "tokens"][600] = marker
    fields[GGML + "tokens"][601] = "<other>"  # llama.cpp ends the process where two are the same
    encode = llama_cpp_encoder(fields, tmp_path / "vocabulary.gguf")
    model = llama_cpp.Llama(str(tmp_path / "vocabulary.gguf"), vocab_only=True, verbose=False)
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    tokenizer = opened(fields)
    assert (600 in tokenizer.stop_ids) == llama_cpp.llama_vocab_is_eog(vocabulary, 600)
    assert (marker in ENDS + LATER_ENDS) == (600 in tokenizer.stop_ids)
    assert tokenizer.encode(marker, bos=False, special=True) == encode(marker, True)
