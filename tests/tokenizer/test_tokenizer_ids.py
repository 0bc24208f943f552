"""Ids equal the reference's: literal ones, llama.cpp's, sentencepiece's and tiktoken's.

The files in `data` were made by llama.cpp; `tokenizer_cases.py` says how.
"""

import json
import time
from pathlib import Path

import pytest
import sentencepiece
import tiktoken

from minllama.tokenizer.byte_level import BYTE_CHARS, LLAMA3_PATTERN
from minllama.tokenizer.codecs import _tiktoken_chunks
from minllama.tokenizer.gguf import from_gguf
from minllama.tokenizer.load import load_vocabulary
from minllama.tokenizer.sentencepiece_form import from_model
from minllama.tokenizer.tiktoken_form import from_ranks, parse_ranks
from minllama.tokenizer.tokenizer import Tokenizer
from tests.tokenizer_cases import (
    CROSSING,
    GOLDEN,
    PRE_TOKENIZERS,
    TEXTS,
    crossing_fields,
    default_fields,
    llama_cpp_encoder,
    random_texts,
    tiny_ranks,
    tiny_sentencepiece,
)

# The default model's vocabulary has no tokens for these bytes, and drops them (so does llama.cpp).
LACKING = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}


@pytest.fixture(scope="session")
def fields(default_model: Path) -> dict:
    return default_fields(default_model)


@pytest.fixture(scope="session")
def smollm(fields: dict) -> Tokenizer:
    return Tokenizer(from_gguf(fields, "default"))


@pytest.fixture(scope="session")
def llama2(shared_data: Path) -> Tokenizer:
    return Tokenizer(load_vocabulary(shared_data / "tokenizer.model"))


@pytest.fixture(scope="session")
def pieces() -> Tokenizer:
    return Tokenizer(from_model(tiny_sentencepiece(), "tiny"))


@pytest.fixture(scope="session")
def ranks() -> Tokenizer:
    return Tokenizer(from_ranks(tiny_ranks(), "tiny"))


def test_default_model_gives_the_ids_of_its_issue(smollm: Tokenizer) -> None:
    ids = "19556 905 28 357 506 216 34 32 34 38 17 216 33 34 35 36 37"
    assert smollm.encode("Hello world, it's 2026! 12345") == [int(i) for i in ids.split()]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_ids_equal_those_recorded_from_llama_cpp(fields: dict, pre: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    tokenizer = Tokenizer(from_gguf(fields | {"tokenizer.ggml.pre": pre}, "default"))
    assert len(golden["texts"]) > 300
    assert tokenizer.encode_batch(golden["texts"], bos=False) == golden[pre]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_tokens_that_run_across_words_are_cut_as_by_llama_cpp(pre: str) -> None:
    golden = json.loads(CROSSING.read_text())
    fields = crossing_fields(golden["tokens"], golden["merges"], pre)
    tokenizer = Tokenizer(from_gguf(fields, "crossing"))
    for text, ids in zip(golden["texts"], golden[pre], strict=True):
        assert tokenizer.encode(text, bos=False) == ids, ascii(text)


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("smollm", "1|2|3|4|5|Ġ!|1|'|S|Ċ|Ċ|a"),
        ("gpt-2", "1234|5|Ġ!|1|'|S|Ċ|Ċ|a"),
        ("llama-bpe", "123|45|Ġ!|1|'S|ĊĊ|a"),
        ("default", "123|45|Ġ|!|1|'|S|Ċ|Ċ|a"),
    ],
)
def test_each_pre_tokenizer_cuts_in_its_own_way(pre: str, tokens: str) -> None:
    merges = ["1 2", "12 3", "123 4", "4 5", "Ġ !", "' S", "Ċ Ċ", "Ċ a"]
    vocabulary = ["<end>", *BYTE_CHARS.values(), *(pair.replace(" ", "") for pair in merges)]
    tokenizer = Tokenizer(from_gguf(crossing_fields(vocabulary, merges, pre), "x"))
    ids = tokenizer.encode("12345 !1'S\n\na", bos=False)
    assert "|".join(vocabulary[i] for i in ids) == tokens


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_ids_equal_llama_cpps(fields: dict, pre: str, tmp_path: Path) -> None:
    changed = fields | {"tokenizer.ggml.pre": pre}
    tokenizer = Tokenizer(from_gguf(changed, "default"))
    encode = llama_cpp_encoder(changed, tmp_path / "vocabulary.gguf")
    for text in random_texts(600, seed=7):
        if LACKING.isdisjoint(text.encode()):
            assert tokenizer.encode(text, bos=False) == encode(text, False), ascii(text)
            ids = tokenizer.encode(text + "<|im_end|>" + text, bos=False, special=True)
            assert ids == encode(text + "<|im_end|>" + text, True), ascii(text)


def test_a_byte_without_a_token_is_dropped_and_its_neighbors_may_join(smollm: Tokenizer) -> None:
    # As in the tokenizer.json that the model was trained with; llama.cpp keeps the dots apart.
    assert smollm.encode(".\x14.") == smollm.encode("..")


def test_llama_2_ids_equal_sentencepieces(llama2: Tokenizer) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_proto=llama2.vocabulary.data)
    for text in TEXTS + random_texts(1000, seed=11):
        ids = reference.encode(text)
        assert llama2.encode(text) == [1, *ids], ascii(text)
        assert llama2.decode([1, *ids]) == reference.decode(ids), ascii(text)


def test_llama_2_gives_literal_ids(llama2: Tokenizer) -> None:
    # From the model card's own example, and the space that sentencepiece keeps.
    assert llama2.encode("Hello this is a test") == [1, 15043, 445, 338, 263, 1243]
    assert llama2.encode(" Hello", eos=True) == [1, 29871, 15043, 2]


def test_tiktoken_ids_equal_those_of_metas_pattern(ranks: Tokenizer) -> None:
    reference = tiktoken.Encoding(
        "reference",
        pat_str=LLAMA3_PATTERN,
        mergeable_ranks=parse_ranks(tiny_ranks(), "tiny"),
        special_tokens={"<|begin_of_text|>": 600, "<|eot_id|>": 609},
    )
    for text in TEXTS + random_texts(300, seed=13):
        assert ranks.encode(text, bos=False) == reference.encode_ordinary(text), ascii(text)
    text = "<|begin_of_text|>Hi<|eot_id|>"
    expected = reference.encode(text, allowed_special="all")
    assert ranks.encode(text, bos=False, special=True) == expected
    assert [expected[0], expected[-1]] == [600, 609]


def test_tiktoken_chunks_are_metas() -> None:
    def metas(text: str) -> list[str]:  # the rule of llama3/tokenizer.py, character by character
        chunks = []
        for begin in range(0, len(text), 400_000):
            part, start, run = text[begin : begin + 400_000], 0, 0
            was_space = part[0].isspace()
            for i, char in enumerate(part):
                if char.isspace() != was_space:
                    run, was_space = 1, char.isspace()
                else:
                    run += 1
                    if run > 25_000:
                        chunks.append(part[start:i])
                        start, run = i, 1
            chunks.append(part[start:])
        return chunks

    texts = ["ab " * 20_000 + "x" * 60_000 + " " * 25_001 + "y", "z" * 50_000, "w " * 210_000]
    for text in texts:
        assert list(_tiktoken_chunks(text)) == metas(text)


LONG = {
    "letters": "a" * 10**6,
    "spaces": " " * 10**6 + "x",
    "digits": "1" * 10**6,
    "line breaks": "\r\n" * 500_000,
    "ideographs": "漢" * 300_000,
    "punctuation": "!" * 10**6,
    "special": "<|eot_id|></s><|im_end|>" * 40_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LONG)
def test_a_megabyte_of_one_kind_is_neither_a_crash_nor_quadratic(
    smollm: Tokenizer, pieces: Tokenizer, ranks: Tokenizer, kind: str
) -> None:
    for tokenizer in (smollm, pieces, ranks):
        begin = time.perf_counter()
        ids = tokenizer.encode(LONG[kind])
        # A second or so at most; quadratic time would be hours.
        assert time.perf_counter() - begin < 30
        assert tokenizer.decode(ids) == LONG[kind]
