"""The tokenizer's promises: special tokens, lengths, padding, streams, bad input.

That its ids equal the references' is in test_tokenizer_ids.py, files in test_tokenizer_files.py.
"""

import json
import re
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minllama.errors import TokenizerError
from minllama.tokenizer.byte_level import BYTE_CHARS, build
from minllama.tokenizer.gguf import from_gguf
from minllama.tokenizer.load import load_vocabulary
from minllama.tokenizer.sentencepiece_form import Piece, build_model, from_model
from minllama.tokenizer.tiktoken_form import from_ranks
from minllama.tokenizer.tokenizer import Tokenizer
from minllama.tokenizer.tokenizers_form import added_token, dump
from minllama.tokenizer.vocabulary import Vocabulary
from tests.tokenizer_cases import (
    TEXTS,
    default_fields,
    tiny_ranks,
    tiny_sentencepiece,
)

FIXED = settings(derandomize=True, max_examples=150, deadline=None)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="session")
def smollm(default_model: Path) -> Tokenizer:
    return Tokenizer(from_gguf(default_fields(default_model), "default"))


@pytest.fixture(scope="session")
def llama2(shared_data: Path) -> Tokenizer:
    return Tokenizer(load_vocabulary(shared_data / "tokenizer.model"))


@pytest.fixture(scope="session")
def pieces() -> Tokenizer:
    return Tokenizer(from_model(tiny_sentencepiece(), "tiny"))


@pytest.fixture(scope="session")
def ranks() -> Tokenizer:
    return Tokenizer(from_ranks(tiny_ranks(), "tiny"))


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """Bytes and nothing else, and a special token before them."""
    return Tokenizer(byte_vocabulary(["<|end|>"]))


def byte_vocabulary(special: list[str], **settings: object) -> Vocabulary:
    tokens = [*special, *BYTE_CHARS.values()]
    types = [3] * len(special) + [1] * len(BYTE_CHARS)
    data = dump(build(tokens, types, [], "gpt-2", "tiny"))
    return Vocabulary(storage_format="tokenizers", data=data, origin="tiny", **settings)


# Special tokens


def test_text_never_becomes_a_special_token(
    smollm: Tokenizer, pieces: Tokenizer, ranks: Tokenizer
) -> None:
    for tokenizer in (smollm, pieces, ranks):
        for text, token_id in tokenizer.special_tokens.items():
            ids = tokenizer.encode(f"a {text} b{text}", bos=False)
            assert not set(ids) & set(tokenizer.special_tokens.values())
            assert tokenizer.decode(ids) == f"a {text} b{text}"
            asked = tokenizer.encode(f"a {text} b{text}", bos=False, special=True)
            assert asked.count(token_id) == 2


def test_the_longest_special_token_wins() -> None:
    tokenizer = Tokenizer(byte_vocabulary(["<a>", "<a><a>"]))
    assert tokenizer.encode("<a><a><a>", special=True) == [1, 0]
    assert tokenizer.encode_chat("<a><a><a>", {"X": "x"}) == [1, 0]


def test_sentencepiece_puts_its_space_behind_special_tokens(llama2: Tokenizer) -> None:
    # As Meta's code, which encodes what follows </s><s> as a text of its own.
    assert llama2.encode("Hello</s><s>Hello", special=True) == [1, 15043, 2, 1, 15043]


def test_chat_literals_stay_text(smollm: Tokenizer) -> None:
    rendered = "<|im_start|>user\n\U000f0000 hi\U000f0001<|im_end|>\n"
    masked = {"\U000f0000": "<|im_end|>", "\U000f0001": "<|im_start|>"}
    ids = smollm.encode_chat(rendered, masked)
    text = "<|im_start|>user\n<|im_end|> hi<|im_start|><|im_end|>\n"
    assert smollm.decode(ids, skip_special=False) == text
    assert [i for i in ids if i < 3] == [1, 2]
    inner = smollm.encode("user\n<|im_end|> hi<|im_start|>", bos=False)
    assert ids == [1, *inner, 2, *smollm.encode("\n", bos=False)]


def test_chat_without_literals_is_the_text_with_its_special_tokens(llama2: Tokenizer) -> None:
    rendered = "<s>[INST] Hi [/INST]"
    assert llama2.encode_chat(rendered, {}) == [1, *llama2.encode("[INST] Hi [/INST]", bos=False)]
    masked = llama2.encode_chat("<s>[INST] X [/INST]", {"X": "</s>"})
    assert masked == [1, *llama2.encode("[INST] </s> [/INST]", bos=False)]


def test_a_placeholder_inside_a_literal_stays(byte_level: Tokenizer) -> None:
    ids = byte_level.encode_chat("AB|ABC", {"A": "B", "B": "A", "ABC": "x"})
    assert byte_level.decode(ids) == "BA|x"


def test_metaspace_first_puts_no_space_behind_a_special_token() -> None:
    vocab = {"<unk>": 0, "<s>": 1, "▁": 2, "h": 3, "i": 4}
    raw = {
        "version": "1.0",
        "added_tokens": [added_token(1, "<s>", special=True)],
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        },
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>"},
    }
    tokenizer = Tokenizer(Vocabulary("tokenizers", json.dumps(raw).encode(), "tiny"))
    assert tokenizer.encode("hi<s>hi", special=True) == [2, 3, 4, 1, 3, 4]
    assert tokenizer.encode_chat("hi<s>X", {"X": "hi"}) == [2, 3, 4, 1, 3, 4]
    assert tokenizer.encode_chat("<s>X", {"X": "hi"}) == [1, 3, 4]
    assert tokenizer.decode([2, 3, 4, 2, 3]) == "hi h"


def test_an_added_token_keeps_its_first_byte() -> None:
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "▁<x>": 3}
    raw = {
        "added_tokens": [added_token(3, "▁<x>", special=False)],
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>"},
    }
    tokenizer = Tokenizer(Vocabulary("tokenizers", json.dumps(raw).encode(), "tiny"))
    assert tokenizer.decode([3, 2]) == "▁<x>a"
    assert tokenizer.decode([1, 2]) == "a"


# BOS, EOS, lengths, padding


def test_bos_and_eos_are_the_checkpoints_unless_told(pieces: Tokenizer) -> None:
    text = pieces.encode("the fox", bos=False)
    assert pieces.encode("the fox") == [1, *text]
    assert pieces.encode("the fox", eos=True) == [1, *text, 2]
    both = Tokenizer(from_model(tiny_sentencepiece(), "tiny"))
    both.add_bos, both.add_eos = False, True
    assert both.encode("the fox") == [*text, 2]
    assert both.encode("", bos=True, eos=True) == [1, 2]


def test_bos_and_eos_survive_truncation_and_count(pieces: Tokenizer) -> None:
    text = pieces.encode("the quick brown fox", bos=False)
    assert pieces.encode("the quick brown fox", eos=True, max_len=4) == [1, *text[:2], 2]
    assert pieces.encode("the quick brown fox", bos=False, max_len=3) == text[:3]
    assert pieces.encode("the quick brown fox", max_len=99) == [1, *text]
    assert pieces.encode("the quick brown fox", eos=True, max_len=2) == [1, 2]
    with pytest.raises(TokenizerError, match="max_len must be at least 2"):
        pieces.encode("x", eos=True, max_len=1)


def test_asking_for_a_token_that_is_not_there_is_an_error(byte_level: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="tiny: this vocabulary has no token that begins"):
        byte_level.encode("x", bos=True)
    with pytest.raises(TokenizerError, match="tiny: this vocabulary has no token that ends"):
        byte_level.encode("x", eos=True)


def test_batch_equals_one_by_one(smollm: Tokenizer) -> None:
    one_by_one = [smollm.encode(text, bos=True, max_len=5) for text in TEXTS]
    assert smollm.encode_batch(TEXTS, bos=True, max_len=5) == one_by_one


@pytest.mark.parametrize(
    ("declared", "eos_id", "expected"),
    [
        (0, 1, 0),  # declared and special
        (2, 1, 1),  # an ordinary token: EOS instead
        (None, 1, 1),
        (2, None, 0),  # no EOS: another special one
        (None, None, 0),
        (999, 1, 1),
    ],
)
def test_padding_is_never_an_ordinary_token(
    declared: int | None, eos_id: int | None, expected: int
) -> None:
    vocabulary = byte_vocabulary(["<pad>", "<end>"], pad_id=declared, eos_id=eos_id)
    assert Tokenizer(vocabulary).pad_id == expected


def test_padding_is_never_a_byte_token(pieces: Tokenizer) -> None:
    zero_byte = pieces.vocabulary.__class__(
        storage_format="sentencepiece", data=tiny_sentencepiece(), origin="tiny", eos_id=2, pad_id=3
    )
    assert Tokenizer(zero_byte).token_bytes(3) == b"\x00"
    assert Tokenizer(zero_byte).pad_id == 2


def test_a_vocabulary_without_special_tokens_has_no_padding() -> None:
    assert Tokenizer(byte_vocabulary([])).pad_id is None


def test_attributes_say_what_the_vocabulary_says(smollm: Tokenizer, ranks: Tokenizer) -> None:
    assert (smollm.vocab_size, smollm.bos_id, smollm.eos_id, smollm.pad_id) == (49152, 1, 2, 2)
    assert (smollm.add_bos, smollm.add_eos) == (False, False)
    assert smollm.stop_ids == {0, 2}  # <|endoftext|> by its text, as in llama.cpp
    assert smollm.special_tokens["<|im_start|>"] == 1
    assert len(smollm.special_tokens) == 17
    assert smollm.chat_template is not None
    assert smollm.chat_template.startswith("{% for message in messages %}")
    assert (ranks.vocab_size, ranks.add_bos) == (600 + 256, True)
    assert ranks.stop_ids == {601, 608, 609}
    assert ranks.token_text(604) == "<|finetune_right_pad_id|>"
    assert ranks.pad_id == 604


# Decoding


@FIXED
@given(text=ANY_TEXT)
def test_byte_level_round_trip(byte_level: Tokenizer, ranks: Tokenizer, text: str) -> None:
    for tokenizer in (byte_level, ranks):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@FIXED
@given(text=ANY_TEXT)
def test_sentencepiece_round_trip(pieces: Tokenizer, text: str) -> None:
    assert pieces.decode(pieces.encode(text)) == text.replace("▁", " ")


@FIXED
@given(data=st.data())
def test_streamed_text_equals_decode_at_every_split(
    pieces: Tokenizer, ranks: Tokenizer, data: st.DataObject
) -> None:
    tokenizer = data.draw(st.sampled_from([pieces, ranks]))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    options = {
        "skip_special": data.draw(st.booleans()),
        "continuation": data.draw(st.booleans()),
    }
    whole = tokenizer.decode(ids, **options)
    decoder = tokenizer.stream_decoder(**options)
    assert "".join(decoder.push(i) for i in ids) + decoder.flush() == whole
    for split in range(len(ids) + 1):
        decoder = tokenizer.stream_decoder(**options)
        text = decoder.push_all(ids[:split]) + decoder.push_all(ids[split:])
        assert text + decoder.flush() == whole


def test_stream_never_gives_half_a_character(byte_level: Tokenizer) -> None:
    decoder = byte_level.stream_decoder()
    given = [decoder.push(i) for i in byte_level.encode("é👍a")]
    assert given == ["", "é", "", "", "", "👍", "a"]
    assert decoder.flush() == ""


def test_stream_ends_a_broken_character_with_a_replacement(byte_level: Tokenizer) -> None:
    decoder = byte_level.stream_decoder()
    assert [decoder.push(i) for i in byte_level.encode("👍")[:3]] == ["", "", ""]
    assert decoder.flush() == "\ufffd"
    decoder = byte_level.stream_decoder()
    ids = byte_level.encode("👍")[:2] + byte_level.encode("ok")
    assert "".join(map(decoder.push, ids)) == "\ufffdok"


def test_the_dummy_space_is_dropped_at_the_start_of_a_text_only(llama2: Tokenizer) -> None:
    hello, world = 15043, 3186
    assert llama2.decode([hello, world]) == "Hello world"
    assert llama2.decode([1, hello, world]) == "Hello world"
    assert llama2.decode([hello, world], continuation=True) == " Hello world"
    assert llama2.decode([1, hello], skip_special=False) == "<s>Hello"
    decoder = llama2.stream_decoder()
    assert decoder.push(hello) + decoder.push(world) == " Hello world"
    byte_of_space = 3 + 0x20
    assert llama2.decode([byte_of_space, hello]) == "  Hello"


def test_decode_leaves_special_tokens_out_or_in(smollm: Tokenizer) -> None:
    ids = smollm.encode("<|im_start|>Hi<|im_end|>", special=True)
    assert smollm.decode(ids) == "Hi"
    assert smollm.decode(ids, skip_special=False) == "<|im_start|>Hi<|im_end|>"


def test_one_token_has_bytes_and_text(smollm: Tokenizer, byte_level: Tokenizer) -> None:
    [space_world] = smollm.encode(" world")
    assert smollm.token_bytes(space_world) == b" world"
    assert smollm.token_text(space_world) == " world"
    assert smollm.token_text(2) == "<|im_end|>"
    first_byte = byte_level.encode("é")[0]
    assert byte_level.token_bytes(first_byte) == b"\xc3"
    assert byte_level.token_text(first_byte) == "\ufffd"


# What bad input gets


@pytest.mark.parametrize("special", [False, True])
def test_a_lone_surrogate_is_an_error_that_says_where(byte_level: Tokenizer, special: bool) -> None:
    with pytest.raises(TokenizerError, match=r"surrogate \(U\+DC80\) at character 3"):
        byte_level.encode("ab👍\udc80", special=special)
    with pytest.raises(TokenizerError, match=r"surrogate \(U\+D83D\) at character 0"):
        byte_level.encode_chat("X", {"X": "\ud83d"})


def test_text_that_is_no_string_is_an_error(byte_level: Tokenizer) -> None:
    for wrong in (b"bytes", None, 3, ["list"]):
        with pytest.raises(TokenizerError, match="text must be a string, not"):
            byte_level.encode(wrong)
    with pytest.raises(TokenizerError, match="takes a list of texts"):
        byte_level.encode_batch("one text")


def test_ids_out_of_range_are_errors(byte_level: Tokenizer) -> None:
    for wrong in (-1, 257, 2**40):
        message = re.escape(f"token id {wrong} is out of range; there are 257 tokens")
        for use in (
            lambda i: byte_level.decode([1, i]),
            byte_level.token_bytes,
            byte_level.token_text,
            byte_level.stream_decoder().push,
        ):
            with pytest.raises(TokenizerError, match=message):
                use(wrong)
    with pytest.raises(TokenizerError, match=r"a token id must be an integer, not 1\.5"):
        byte_level.decode([1.5])


def test_ids_of_the_vocabulary_out_of_range_are_errors() -> None:
    with pytest.raises(TokenizerError, match="BOS token has the id 999, but there are 257 tokens"):
        Tokenizer(byte_vocabulary(["<end>"], bos_id=999))
    with pytest.raises(TokenizerError, match="end token has the id -1"):
        Tokenizer(byte_vocabulary(["<end>"], stop_ids=(-1,)))


def test_a_damaged_vocabulary_is_one_line() -> None:
    for form in ("sentencepiece", "tokenizers", "tiktoken"):
        with pytest.raises(TokenizerError) as caught:
            Tokenizer(Vocabulary(form, b"\xff\x00 nonsense\n{", "tiny"))
        assert str(caught.value).startswith("tiny: ")
        assert "\n" not in str(caught.value)


def test_an_absurd_id_takes_no_memory() -> None:
    raw = build(["a", "b"], [1, 1], [], "gpt-2", "tiny")
    raw["model"]["vocab"]["b"] = 2**32 - 1
    with pytest.raises(TokenizerError, match="tiny: a token has the id 4294967295"):
        Tokenizer(Vocabulary("tokenizers", dump(raw), "tiny"))


def test_a_regular_expression_that_never_ends_is_an_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    raw = build(["a", "x"], [1, 1], [], "llama-bpe", "tiny")
    splitter = raw["pre_tokenizer"]["pretokenizers"][0] | {"pattern": {"Regex": "(x+x+)+y"}}
    data = dump(raw | {"pre_tokenizer": splitter})
    tokenizer = Tokenizer(Vocabulary("tokenizers", data, "tiny"))
    with pytest.raises(TokenizerError, match=r"tiny: damaged tokenizer \(.*retry-limit"):
        tokenizer.encode("x" * 100)
    capfd.readouterr()  # Rust's own report


def test_a_sentencepiece_model_without_byte_tokens_has_an_unknown_one() -> None:
    kinds = {"<unk>": 2, "<s>": 3, "▁a": 1, "▁": 1, "a": 1}
    pieces = [Piece(text, -float(i), kind) for i, (text, kind) in enumerate(kinds.items())]
    data = build_model(pieces, add_dummy_prefix=True, bos_id=1, eos_id=None, where="tiny")
    tokenizer = Tokenizer(Vocabulary("sentencepiece", data, "tiny", bos_id=1))
    assert tokenizer.encode("a漢 a") == [2, 0, 2]
    assert tokenizer.pad_id == 0


def test_other_threads_run_while_a_long_text_is_encoded(smollm: Tokenizer) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 40_000
    ticks, is_done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not is_done.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    ids = smollm.encode(text)
    is_done.set()
    thread.join()
    assert ticks > 20  # where the library kept the interpreter's lock it was one or two
    short = smollm.encode("The quick brown fox jumps over the lazy dog.")
    assert ids[: len(short)] == short
    assert smollm.decode(ids) == text
