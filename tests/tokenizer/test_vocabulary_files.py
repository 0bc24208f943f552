"""Tokenizer files as others write them: recognized, read, and refused where they are damaged."""

import base64
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from minllama.errors import MinllamaError, TokenizerError
from minllama.tokenizer.byte_level import BYTE_CHARS, spell, unspell
from minllama.tokenizer.gguf import to_gguf
from minllama.tokenizer.huggingface import to_files
from minllama.tokenizer.llama2c import from_llama2c_bin
from minllama.tokenizer.load import find_vocabulary, load_vocabulary
from minllama.tokenizer.sentencepiece_form import from_model, parse_model
from minllama.tokenizer.tiktoken_form import from_ranks, special_tokens
from minllama.tokenizer.tokenizer import Tokenizer
from minllama.tokenizer.tokenizers_form import dump
from tests.tokenizer_cases import (
    TEXTS,
    byte_json,
    random_texts,
    tiny_ranks,
    tiny_sentencepiece,
)

ALL_TEXTS = [*TEXTS, *random_texts(300, seed=19)]


def tokenizer_bin(model: bytes) -> bytes:
    """A tokenizer.bin, as `export` of llama2.c's tokenizer.py writes it."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens, scores = [], []
    for i in range(processor.vocab_size()):
        text = processor.id_to_piece(i)
        if i == processor.bos_id():
            text = "\n<s>\n"
        elif i == processor.eos_id():
            text = "\n</s>\n"
        tokens.append(text.replace("▁", " ").encode())
        scores.append(processor.get_score(i))
    parts = [struct.pack("<i", max(map(len, tokens)))]
    for token, score in zip(tokens, scores, strict=True):
        parts += [struct.pack("<fi", score, len(token)), token]
    return b"".join(parts)


# A file is what its content says


def test_files_are_recognized_by_content(tmp_path: Path) -> None:
    contents = {
        "SentencePiece": tiny_sentencepiece(),
        "tiktoken (Llama 3)": tiny_ranks(),
        "tokenizer.json": dump(byte_json()),
        "llama2.c tokenizer.bin": tokenizer_bin(tiny_sentencepiece()),
    }
    for origin, content in contents.items():
        path = tmp_path / "misleading.gguf.json"
        path.write_bytes(content)
        assert load_vocabulary(path).origin == origin
        assert load_vocabulary(str(path)) == load_vocabulary(path)


def test_what_is_no_tokenizer_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content, message in (
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b"GGUF\x03\x00\x00\x00", "is a GGUF file; open it with Tokenizer.from_pretrained"),
        (b"just some text\n", "not a tokenizer, or damaged; known: tokenizer.json"),
        (b"\x0a\x00", "not a tokenizer, or damaged"),
        (b"{", "not readable as JSON"),
        (b"{}", "it has no model"),
        (b'{"model": {"type": "Unigram", "vocab": []}}', "its model is 'Unigram'"),
        (b"[" * 100_000, "not a tokenizer, or damaged"),
        (b'{"a":' * 100_000, "not readable as JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(TokenizerError, match=message) as caught:
            load_vocabulary(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(TokenizerError, match="no such file or folder"):
        load_vocabulary(tmp_path / "absent")
    with pytest.raises(TokenizerError, match=r"no tokenizer in this folder; known: tokenizer"):
        load_vocabulary(tmp_path)
    assert find_vocabulary(tmp_path) is None


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        file.truncate(2**40)  # a hole: it takes no disk
    with pytest.raises(TokenizerError, match="too large to be a tokenizer"):
        load_vocabulary(path)


@pytest.mark.parametrize("form", ["model", "ranks", "bin", "json"])
def test_damage_is_an_error_of_ours_or_none(form: str, tmp_path: Path) -> None:
    content = {
        "model": tiny_sentencepiece(),
        "ranks": tiny_ranks(),
        "bin": tokenizer_bin(tiny_sentencepiece()),
        "json": to_files(from_model(tiny_sentencepiece(), "tiny"))["tokenizer.json"],
    }[form]
    rng = random.Random(23)
    path = tmp_path / "file"
    refused = []
    for i in range(150):
        damaged = bytearray(content)
        if i % 3 == 0:
            del damaged[rng.randrange(len(damaged)) :]
        for _ in range(i % 3):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            tokenizer = Tokenizer(load_vocabulary(path))
            tokenizer.decode(tokenizer.encode("the <s> fox é漢 12\x00", special=True))
            to_gguf(tokenizer.vocabulary, tokenizer.vocab_size)
        except MinllamaError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert not [message for message in refused if "\n" in message]


# llama2.c's tokenizer.bin


def test_tokenizer_bin_gives_sentencepieces_ids(shared_data: Path) -> None:
    model = (shared_data / "tokenizer.model").read_bytes()
    tokenizer = Tokenizer(from_llama2c_bin(tokenizer_bin(model), "tokenizer.bin"))
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, True)
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    for text in ALL_TEXTS:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == [1, *ids], ascii(text)
        assert tokenizer.decode(ids) == reference.decode(ids), ascii(text)


def test_a_tokenizer_bin_written_byte_by_byte() -> None:
    texts = [b"<unk>", b"\n<s>\n", b"\n</s>\n"]
    texts += [b"<0x%02X>" % byte for byte in range(256)]
    texts += [b" ", b"a", b"b", b" a", b"ab", b"\xe6\xbc\xa2"]
    scores = [0.0] * 259 + [-3.0, -4.0, -5.0, -2.0, -1.0, -6.0]
    data = struct.pack("<i", 6) + b"".join(
        struct.pack("<fi", score, len(text)) + text
        for text, score in zip(texts, scores, strict=True)
    )
    tokenizer = Tokenizer(from_llama2c_bin(data, "t"))
    space, a, ab, kanji = 259, 260, 263, 264
    assert tokenizer.encode("ab") == [1, space, ab]  # `ab` scores above ` a`
    assert tokenizer.encode("a") == [1, space + 3]
    assert tokenizer.encode("漢é", bos=False) == [space, kanji, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.token_bytes(space + 3) == b" a"
    assert tokenizer.token_bytes(3 + 0x0A) == b"\n"
    assert tokenizer.decode([1, a, 2]) == "a"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x01\x00", "not a complete tokenizer.bin \\(2 bytes\\)"),
        (struct.pack("<i", -1), "longest token allegedly has -1 bytes"),
        (struct.pack("<ifi", 4, 0.0, 5), "token 0 has 5 bytes"),
        (struct.pack("<ifi", 4, 0.0, 0), "token 0 has 0 bytes"),
        (struct.pack("<ifi", 4, float("nan"), 1) + b"a", "the score nan"),
        (struct.pack("<ifi", 4, 0.0, 2) + b"a", "truncated in token 0"),
        (struct.pack("<ifi", 4, 0.0, 1) + b"a\x00", "truncated in token 1"),
        (struct.pack("<ifi", 4, 0.0, 1) + b"\xff", "token 0 is not UTF-8"),
        (struct.pack("<ifi", 4, 0.0, 1) + b"a", "token 0 is 'a', not <unk>"),
    ],
)
def test_a_damaged_tokenizer_bin_is_one_line(data: bytes, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        from_llama2c_bin(data, "t.bin")
    assert str(caught.value).startswith("t.bin: ")


# Meta's folders


@pytest.mark.parametrize(
    ("content", "origin"),
    [(tiny_sentencepiece, "SentencePiece"), (tiny_ranks, "tiktoken (Llama 3)")],
)
def test_metas_tokenizer_model_of_either_kind(content: Any, origin: str, tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(content())
    vocabulary = find_vocabulary(tmp_path)
    assert vocabulary is not None
    assert (vocabulary.origin, vocabulary.add_bos, vocabulary.add_eos) == (origin, True, False)


def test_llama_3s_special_tokens_have_metas_ids() -> None:
    ids = special_tokens(128_000)
    assert len(ids) == 256
    assert list(ids.values()) == list(range(128_000, 128_256))
    assert ids["<|begin_of_text|>"] == 128_000
    assert ids["<|end_of_text|>"] == 128_001
    assert ids["<|finetune_right_pad_id|>"] == 128_004
    assert ids["<|start_header_id|>"] == 128_006
    assert ids["<|end_header_id|>"] == 128_007
    assert ids["<|eom_id|>"] == 128_008
    assert ids["<|eot_id|>"] == 128_009
    assert ids["<|python_tag|>"] == 128_010
    assert ids["<|reserved_special_token_2|>"] == 128_011
    assert ids["<|reserved_special_token_246|>"] == 128_255


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([b"YQ== 0", b"!!! 1"], "line 2 is not a base64 token and its rank"),
        ([b"YQ== 0", b"Yg=="], "line 2 is not"),
        ([b"YQ== 0", b"Yg== 2"], "2 tokens, but their ranks are not 0 to 1"),
        ([b"YQ== 0", b"Yg== 1"], "no token for the byte 0x00"),
    ],
)
def test_damaged_ranks_are_one_line(lines: list[bytes], message: str) -> None:
    with pytest.raises(TokenizerError, match=f"r: .*{message}"):
        from_ranks(b"\n".join(lines), "r")


# The alphabet of byte-level tokens


def test_the_byte_alphabet_is_that_of_the_library() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(BYTE_CHARS.values()) == set(ByteLevel.alphabet())
    every = bytes(range(256))
    assert unspell(spell(every)) == every
    assert spell(b" the\n") == "ĠtheĊ"
    for byte in (0x00, 0x20, 0x7F, 0xA0, 0xAD):
        assert unspell(chr(byte)) == chr(byte).encode()
    assert unspell("漢Ġ") == "漢Ġ".encode()


def test_ranks_are_read_in_any_order() -> None:
    lines = tiny_ranks().splitlines()
    backwards = from_ranks(b"\r\n".join(reversed(lines)), "x")
    text = "the quick brown fox"
    assert Tokenizer(backwards).encode(text) == Tokenizer(from_ranks(tiny_ranks(), "x")).encode(
        text
    )
    assert base64.b64decode(lines[0].split()[0]) == b"!"


def test_a_piece_that_is_not_utf8_is_named() -> None:
    model = tiny_sentencepiece().replace("▁the".encode(), b"\xff\xfethe\xff"[:6], 1)
    with pytest.raises(TokenizerError, match=r"x: piece [0-9]+ is empty or not UTF-8"):
        parse_model(model, "x")
