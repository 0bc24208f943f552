"""A downloaded tokenizer or JSON file takes no more time or memory than it should."""

import base64
import json
import struct
import tracemalloc
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from minllama import Tokenizer
from minllama.errors import TokenizerError
from minllama.text import parse_json, read_json
from minllama.tokenizer import byte_level
from minllama.tokenizer.bounds import MAX_GROWTH, charsmap_growth, find_excess
from minllama.tokenizer.huggingface import from_tokenizer_json
from minllama.tokenizer.sentencepiece_form import parse_model
from minllama.tokenizer.tiktoken_form import parse_ranks
from tests.tokenizer_cases import tiny_ranks, tiny_sentencepiece


def sequence(key: str, *parts: Any) -> dict[str, Any]:
    return {"type": "Sequence", key: list(parts)}


def replace(pattern: Any, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


DOUBLE = replace({"String": "a"}, "aa")
BYTES = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
NESTED: Any = DOUBLE
for _ in range(40):
    NESTED = sequence("normalizers", NESTED, DOUBLE)
EXCESSES = {
    "doubled forty times": ({"normalizer": sequence("normalizers", *[DOUBLE] * 40)}, "times"),
    "doubled in nested sequences": ({"normalizer": NESTED}, "more than 32 normalizers"),
    "one long replacement": ({"normalizer": replace({"String": "a"}, "b" * 10**6)}, "times"),
    "an empty pattern": ({"normalizer": replace({"String": ""}, "b")}, "an empty text"),
    "an empty prefix": ({"normalizer": {"type": "Prepend", "prepend": ""}}, "an empty text"),
    "a pattern that matches nothing": ({"normalizer": replace({"Regex": "x*"}, "b" * 2000)}, "ti"),
    "a long prefix": ({"normalizer": {"type": "Prepend", "prepend": "b" * 2000}}, "times"),
    "bytes of bytes": ({"pre_tokenizer": sequence("pretokenizers", *[BYTES] * 20)}, "times"),
    "an unknown normalizer": ({"normalizer": {"type": "Twice"}}, "not supported for a Llama"),
    "an unknown pre-tokenizer": ({"pre_tokenizer": {"type": "Twice"}}, "not supported for a Llama"),
    "nested loops": ({"pre_tokenizer": split("(a+)+$")}, "nested loops"),
    "a loop in a counted loop": ({"pre_tokenizer": split("(?:[^x]{1,9}){2,}")}, "nested loops"),
    "a loop deep in a loop": ({"normalizer": replace({"Regex": "((a|b*)c)*"}, "")}, "nested loops"),
    "a long pattern": ({"pre_tokenizer": split("a" * 10**5)}, "100000 characters"),
    "a long template": (
        {"post_processor": {"type": "TemplateProcessing", "single": [{}] * 10**4}},
        "adds 10000 tokens",
    ),
    "many decoders": ({"decoder": sequence("decoders", *[BYTES] * 1000)}, "more than 32 decoders"),
    "a long token": ({"added_tokens": [{"id": 0, "content": "a" * 10**5}]}, "an added token"),
    "components of other types": ({"normalizer": {"type": "Replace", "pattern": 3}}, "damaged"),
    "a component that is none": ({"normalizer": 7}, "damaged"),
    "a table that is none": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "???"}},
        "damaged",
    ),
}


@pytest.mark.parametrize(("parts", "message"), EXCESSES.values(), ids=EXCESSES)
def test_what_no_llama_has_is_refused_before_it_runs(parts: dict[str, Any], message: str) -> None:
    assert message in (find_excess(parts) or "")
    words = json.loads(Tokenizer.from_pretrained().vocabulary.data)
    with pytest.raises(TokenizerError) as caught:
        from_tokenizer_json(json.dumps(words | parts).encode(), "x")
    assert str(caught.value).startswith("x: ")


REAL = {
    "Llama 1 and 2": {
        "normalizer": sequence(
            "normalizers", {"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")
        )
    },
    "Llama 3": {
        "pre_tokenizer": sequence("pretokenizers", split(byte_level.LLAMA3_PATTERN), BYTES)
    },
    "Metaspace": {
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}
    },
    "Gemma": {"normalizer": replace({"String": " "}, "▁"), "pre_tokenizer": split(" ")},
    "GPT-4o": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": sequence(
            "pretokenizers",
            split(
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+"
            ),
            BYTES,
        ),
    },
    "DeepSeek": {
        "normalizer": sequence("normalizers"),
        "pre_tokenizer": sequence(
            "pretokenizers",
            split("[\r\n]"),
            split(r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-Ρ]+"),
            split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
            split(r"\s+$"),
            split(r"[一-龥ࠀ-一가-퟿]+"),
            {"type": "Digits", "individual_digits": True},
            BYTES,
        ),
    },
    "digits from the right": {"pre_tokenizer": split(r"\d{1,3}(?=(?:\d{3})*\b)")},
    "classes in classes": {"pre_tokenizer": split(r"[\p{L}&&[^\p{Han}()]]+|[]+)]*")},
    "nothing at all": {},
}


@pytest.mark.parametrize("parts", REAL.values(), ids=REAL)
def test_what_real_tokenizers_have_is_taken(parts: dict[str, Any]) -> None:
    assert find_excess(parts) is None
    for part in parts.values():
        for piece in part.get("pretokenizers", [part]):
            if piece["type"] == "Split" and "Regex" in piece["pattern"]:
                pre_tokenizers.Split(Regex(piece["pattern"]["Regex"]), "isolated")  # as it is


def test_a_sentencepiece_table_that_lengthens_texts_is_refused() -> None:
    table = struct.pack("<I", 8) + bytes(8) + b"ab\0" + b"x" * 5000 + b"\0"
    assert charsmap_growth(table) == 5000 > MAX_GROWTH
    assert charsmap_growth(b"") == 1
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.pieces.add(piece="a", score=0, type=1)
    model.normalizer_spec.precompiled_charsmap = table
    with pytest.raises(TokenizerError, match="times as long"):
        parse_model(model.SerializeToString(), "x")


DOCUMENTS = {
    "cut": (b'{"a": ', "Expecting value"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "empty objects": (b"[" + b"{}," * 10**6 + b"{}]", "more than 1,048,576 entries"),
    "an escaped lone surrogate": (rb'{"\ud800": 1}', "lone surrogate"),
    "a lone surrogate in bytes": (b'{"a": "\xed\xa0\x80"}', "can't decode"),
    "another encoding": ('{"a": "\ud800"}'.encode("utf-16-le", "surrogatepass"), "can't decode"),
    "a number of many digits": (b"1" * 10_000, "Exceeds the limit"),
}


@pytest.mark.parametrize(("document", "message"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_document_that_is_damaged_or_too_large_is_one_line(document: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(document)


def test_whole_characters_and_a_byte_order_mark_are_read() -> None:
    assert parse_json('\ufeff{"a": "\\ud83d\\ude00 naïve"}'.encode()) == {"a": "😀 naïve"}


def test_the_size_of_a_file_is_looked_at_before_it_is_parsed(tmp_path) -> None:
    (tmp_path / "x.json").write_bytes(b'"' + b"a" * 2**24 + b'"')
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than 16 MiB"):
        read_json(tmp_path / "x.json")
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()


def test_ranks_that_take_minutes_to_cut_are_refused() -> None:
    n_ranks = len(parse_ranks(tiny_ranks(), "x"))
    long = b"%s %d\n" % (base64.b64encode(b"ab" * 2**19), n_ranks)
    with pytest.raises(TokenizerError, match="a token is 1048576 long, and no known one"):
        parse_ranks(tiny_ranks() + long, "x")
    many = b"".join(
        b"%s %d\n" % (base64.b64encode(b"%0500d" % i), n_ranks + i) for i in range(9000)
    )
    with pytest.raises(TokenizerError, match=r"its tokens are 450.* long together"):
        parse_ranks(tiny_ranks() + many, "x")


def test_pieces_that_take_minutes_to_cut_are_refused() -> None:
    model = parse_model(tiny_sentencepiece(), "x")
    model.pieces.add(piece="ab" * 2**19, score=-1.0, type=1)
    with pytest.raises(TokenizerError, match="a token is 1048576 long, and no known one"):
        parse_model(model.SerializeToString(), "x")


@pytest.mark.parametrize("n", [0, 2])
def test_a_sentencepiece_model_has_one_unknown_piece(n: int) -> None:
    # The library's own parser takes an unknown type for that of the first piece.
    model = parse_model(tiny_sentencepiece(), "x")
    for i in range(2):
        model.pieces[i].type = 2 if n else 1
    with pytest.raises(TokenizerError, match=f"{n} unknown tokens, where .* has exactly one"):
        parse_model(model.SerializeToString(), "x")
