"""GGUF's fields <-> vocabularies, held against llama.cpp and the libraries themselves."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece

from minllama.checkpoints.gguf import write_gguf
from minllama.checkpoints.gguf_header import read_header
from minllama.errors import TokenizerError
from minllama.tokenizer.byte_level import BYTE_CHARS, PRE_TOKENIZERS, build
from minllama.tokenizer.gguf import from_gguf, to_gguf
from minllama.tokenizer.huggingface import to_files
from minllama.tokenizer.load import load_vocabulary
from minllama.tokenizer.sentencepiece_form import from_model
from minllama.tokenizer.tiktoken_form import from_ranks
from minllama.tokenizer.tokenizer import Tokenizer
from minllama.tokenizer.tokenizers_form import bpe_model, dump, parse
from minllama.tokenizer.vocabulary import Vocabulary
from tests.tiny import our_model
from tests.tokenizer_cases import (
    TEXTS,
    default_fields,
    llama_cpp_encoder,
    random_texts,
    tiny_ranks,
    tiny_sentencepiece,
)

GGML = "tokenizer.ggml."
ALL_TEXTS = [*TEXTS, *random_texts(500, seed=3)]


@pytest.fixture(scope="session")
def fields(default_model: Path) -> dict[str, Any]:
    return default_fields(default_model)


@pytest.fixture
def pieces_fields() -> dict[str, Any]:
    return to_gguf(from_model(tiny_sentencepiece(), "tiny"), 600)


@pytest.fixture
def bytes_fields() -> dict[str, Any]:
    """Of a byte-level vocabulary: an end token, the 256 bytes, `he` and `hel`."""
    tokens = ["<end>", *BYTE_CHARS.values(), "he", "hel"]
    return {
        GGML + "model": "gpt2",
        GGML + "pre": "gpt-2",
        GGML + "tokens": tokens,
        GGML + "token_type": [3] + [1] * (len(tokens) - 1),
        GGML + "merges": ["h e", "he l"],
        GGML + "eos_token_id": 0,
    }


def forms() -> dict[str, Vocabulary]:
    """One vocabulary of each form, and SentencePiece's as a tokenizer.json."""
    pieces = from_model(tiny_sentencepiece(), "tiny")
    as_json = to_files(pieces)["tokenizer.json"]
    return {
        "sentencepiece": pieces,
        "pieces in a tokenizer.json": Vocabulary(
            "tokenizers", as_json, "tiny", bos_id=1, eos_id=2, add_bos=True
        ),
        "tiktoken": from_ranks(tiny_ranks(), "tiny"),
    }


# There and back, and llama.cpp


@pytest.mark.parametrize("name", ["sentencepiece", "pieces in a tokenizer.json", "tiktoken"])
def test_llama_cpp_gives_our_ids(name: str, tmp_path: Path) -> None:
    vocabulary = forms()[name]
    tokenizer = Tokenizer(vocabulary)
    fields = to_gguf(vocabulary, tokenizer.vocab_size)
    encode = llama_cpp_encoder(fields, tmp_path / "vocabulary.gguf")
    special = "".join(list(tokenizer.special_tokens)[-2:])
    for text in ALL_TEXTS:
        assert tokenizer.encode(text, bos=False) == encode(text, False), ascii(text)
        mixed = f"{text}{special}{text}"
        assert tokenizer.encode(mixed, bos=False, special=True) == encode(mixed, True), ascii(text)


@pytest.mark.parametrize("name", ["sentencepiece", "pieces in a tokenizer.json", "tiktoken"])
def test_read_back_it_gives_the_same_ids(name: str) -> None:
    vocabulary = forms()[name]
    tokenizer = Tokenizer(vocabulary)
    back = from_gguf(to_gguf(vocabulary, tokenizer.vocab_size), "tiny")
    assert back is not None
    for attribute in ("bos_id", "eos_id", "pad_id", "add_bos", "add_eos"):
        assert getattr(back, attribute) == getattr(vocabulary, attribute), attribute
    assert set(back.stop_ids) == set(vocabulary.stop_ids)
    again = Tokenizer(back)
    assert again.special_tokens == tokenizer.special_tokens
    for text in ALL_TEXTS:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids, ascii(text)
        assert again.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("legacy", "message"),
    [
        (True, "it adds no space before a text that starts with one, which GGUF cannot"),
        (False, "it adds a space only before the first text between special tokens, which GGUF"),
    ],
)
def test_spaces_of_transformers_5_are_refused_with_a_way_that_works(
    legacy: bool, message: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model = tmp_path / "tokenizer.model"
    model.write_bytes(tiny_sentencepiece())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    folder = tmp_path / "saved"
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(folder)
    with pytest.raises(TokenizerError, match=message) as error:
        to_gguf(load_vocabulary(folder), 600)
    assert "replace tokenizer.json with the tokenizer.model that it was converted from" in str(
        error.value
    )
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    fields = to_gguf(load_vocabulary(folder), 600)
    assert fields[GGML + "add_space_prefix"] is True
    assert fields[GGML + "bos_token_id"] == 1


def test_a_folder_of_transformers_5_without_spaces_in_front_has_llama_cpps_ids(
    tmp_path: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(tiny_sentencepiece())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "add_prefix_space": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    fields = to_gguf(load_vocabulary(tmp_path / "saved"), 600)
    assert fields[GGML + "add_space_prefix"] is False
    back = Tokenizer(from_gguf(fields, "x"))
    for text in ALL_TEXTS:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert back.encode(text, bos=False) == ids, ascii(text)
    encode = llama_cpp_encoder(fields, tmp_path / "vocabulary.gguf")
    for text in ALL_TEXTS:
        assert back.encode(text, bos=False) == encode(text, False), ascii(text)


def test_a_space_in_front_of_a_space_is_what_a_metaspace_leaves_out(tmp_path: Path) -> None:
    # Why those are refused: there is no flag by which llama.cpp would do without it.
    fields = to_gguf(from_model(tiny_sentencepiece(), "tiny"), 600)
    encode = llama_cpp_encoder(fields, tmp_path / "vocabulary.gguf")
    spaces = fields[GGML + "tokens"].index("▁▁")
    assert encode(" x", False)[0] == spaces
    assert encode("<s> x", True)[1] == spaces


def test_llama_2_survives_gguf_and_equals_llama_cpp(shared_data: Path, tmp_path: Path) -> None:
    vocabulary = load_vocabulary(shared_data / "tokenizer.model")
    fields = to_gguf(vocabulary, 32000)
    reference = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.data)
    detour = Tokenizer(from_gguf(fields, "detour"))
    encode = llama_cpp_encoder(fields, tmp_path / "vocabulary.gguf")
    for text in ALL_TEXTS:
        ids = reference.encode(text)
        assert detour.encode(text, bos=False) == ids, ascii(text)
        assert encode(text, False) == ids, ascii(text)


def test_llama_2s_scores_and_types_are_stored_as_they_are(shared_data: Path) -> None:
    fields = to_gguf(load_vocabulary(shared_data / "tokenizer.model"), 32000)
    assert fields[GGML + "tokens"][:3] == ["<unk>", "<s>", "</s>"]
    assert fields[GGML + "token_type"][:5] == [2, 3, 3, 6, 6]
    assert fields[GGML + "tokens"][259:262] == ["▁▁", "▁t", "er"]
    assert fields[GGML + "scores"][259:262] == [-1e9, -1.0, -2.0]
    assert fields[GGML + "unknown_token_id"] == 0
    assert (fields[GGML + "add_bos_token"], fields[GGML + "add_eos_token"]) == (True, False)


def test_the_default_models_fields_survive_unchanged(fields: dict[str, Any]) -> None:
    written = to_gguf(from_gguf(fields, "default"), 49152)
    for key in ("model", "pre", "tokens", "token_type", "merges", "add_bos_token"):
        assert written[GGML + key] == fields[GGML + key], key
    for key in ("bos_token_id", "eos_token_id", "padding_token_id"):
        assert written[GGML + key] == fields[GGML + key], key
    assert written["tokenizer.chat_template"] == fields["tokenizer.chat_template"]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_is_recognized_again(bytes_fields: dict[str, Any], pre: str) -> None:
    bytes_fields[GGML + "pre"] = pre
    assert to_gguf(from_gguf(bytes_fields, "x"), 259)[GGML + "pre"] == pre


def test_missing_tokens_are_filled_with_unused_ones(
    pieces_fields: dict[str, Any], bytes_fields: dict[str, Any]
) -> None:
    for fields, size in ((pieces_fields, 600), (bytes_fields, 259)):
        vocabulary = from_gguf(fields, "x")
        padded = to_gguf(vocabulary, size + 3)
        names = [f"[PAD{size + i}]" for i in range(3)]
        assert padded[GGML + "tokens"][size:] == names
        assert padded[GGML + "token_type"][size:] == [5, 5, 5]
        tokenizer = Tokenizer(from_gguf(padded, "x"))
        assert tokenizer.vocab_size == size + 3
        assert tokenizer.decode(tokenizer.encode(names[0])) == names[0]
        assert max(tokenizer.encode(names[0])) < size


def test_end_of_turn_and_message_are_further_stops(bytes_fields: dict[str, Any]) -> None:
    bytes_fields |= {GGML + "eot_token_id": 5, GGML + "eom_token_id": 6}
    vocabulary = from_gguf(bytes_fields, "x")
    assert vocabulary.stop_ids == (5, 6)
    assert Tokenizer(vocabulary).stop_ids == {0, 5, 6}
    written = to_gguf(vocabulary, 259)
    assert (written[GGML + "eot_token_id"], written[GGML + "eom_token_id"]) == (5, 6)


def test_tokens_that_end_a_turn_by_their_text_are_stops_too(
    bytes_fields: dict[str, Any],
) -> None:
    tokens, types = bytes_fields[GGML + "tokens"], bytes_fields[GGML + "token_type"]
    tokens[5], types[5] = "<|im_end|>", 3
    tokens[6], types[6] = "<|eot_id|>", 1  # of a converter that left it ordinary
    tokens[7], types[7] = "<|end|>", 5  # unused
    vocabulary = from_gguf(bytes_fields, "x")
    assert vocabulary.stop_ids == (5, 6)
    # The first goes without saying, and the other has a field of its name.
    assert to_gguf(vocabulary, 259)[GGML + "eot_token_id"] == 6


@pytest.mark.parametrize("name", ["llama3", "llama-v3", "falcon3"])
def test_a_pre_tokenizer_may_have_another_name(bytes_fields: dict[str, Any], name: str) -> None:
    bytes_fields |= {GGML + "bos_token_id": 0, GGML + "pre": name}
    other, usual = (
        from_gguf(fields, "x")
        for fields in (bytes_fields, bytes_fields | {GGML + "pre": "llama-bpe"})
    )
    assert (other.data, other.add_bos) == (usual.data, True)


def test_llama_3s_stops_go_to_the_fields_of_their_names() -> None:
    fields = to_gguf(from_ranks(tiny_ranks(), "tiny"), 856)
    assert fields[GGML + "eos_token_id"] == 601
    assert fields[GGML + "eom_token_id"] == 608
    assert fields[GGML + "eot_token_id"] == 609
    assert fields[GGML + "pre"] == "llama-bpe"


# What a file leaves unsaid


def test_a_file_without_a_tokenizer_has_no_vocabulary() -> None:
    assert from_gguf({}, "x") is None
    assert from_gguf({GGML + "model": "none"}, "x") is None
    assert from_gguf({GGML + "model": "no_vocab"}, "x") is None


def test_pieces_have_bos_in_front_unless_the_file_says_otherwise(
    pieces_fields: dict[str, Any],
) -> None:
    for key in ("bos_token_id", "eos_token_id", "add_bos_token", "add_eos_token"):
        del pieces_fields[GGML + key]
    vocabulary = from_gguf(pieces_fields, "x")
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.add_bos) == (1, 2, True)
    silent = from_gguf(pieces_fields | {GGML + "add_bos_token": False}, "x")
    assert not silent.add_bos


def test_unnamed_bos_and_eos_are_control_tokens_or_none(pieces_fields: dict[str, Any]) -> None:
    for key in ("bos_token_id", "eos_token_id"):
        del pieces_fields[GGML + key]
    pieces_fields[GGML + "token_type"][1:3] = [1, 1]
    vocabulary = from_gguf(pieces_fields, "x")
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.add_bos) == (None, None, False)


def test_pieces_without_the_space_in_front(pieces_fields: dict[str, Any]) -> None:
    tokenizer = Tokenizer(from_gguf(pieces_fields, "x"))
    bare = Tokenizer(from_gguf(pieces_fields | {GGML + "add_space_prefix": False}, "x"))
    assert bare.encode(" the fox") == tokenizer.encode("the fox")
    assert bare.decode(bare.encode(" the fox")) == " the fox"
    assert to_gguf(bare.vocabulary, 600)[GGML + "add_space_prefix"] is False


def test_byte_level_defaults(bytes_fields: dict[str, Any]) -> None:
    bytes_fields[GGML + "bos_token_id"] = 0
    assert not from_gguf(bytes_fields, "x").add_bos
    # llama.cpp has it in front for Llama 3's kind, and takes "default" where none is named.
    assert from_gguf(bytes_fields | {GGML + "pre": "llama-bpe"}, "x").add_bos
    del bytes_fields[GGML + "pre"]
    assert from_gguf(bytes_fields, "x").origin == "GGUF gpt2 (default)"


def test_some_kinds_take_whole_words_before_merging(bytes_fields: dict[str, Any]) -> None:
    # As llama.cpp has it: of these names, `ignore_merges` is true for three.
    bytes_fields[GGML + "merges"] = ["h e"]
    hel = 258
    for pre in PRE_TOKENIZERS:
        ids = Tokenizer(from_gguf(bytes_fields | {GGML + "pre": pre}, "x")).encode("hel", bos=False)
        assert (ids == [hel]) == (pre in ("llama-bpe", "tekken", "minicpm5")), pre


def test_an_ordinary_end_token_becomes_special(bytes_fields: dict[str, Any]) -> None:
    bytes_fields[GGML + "token_type"][0] = 1
    tokenizer = Tokenizer(from_gguf(bytes_fields, "x"))
    assert tokenizer.special_tokens == {"<end>": 0}
    assert 0 not in tokenizer.encode("<end>")


def test_user_defined_tokens_are_found_in_any_text(bytes_fields: dict[str, Any]) -> None:
    bytes_fields[GGML + "tokens"].append("<tool>")
    bytes_fields[GGML + "token_type"].append(4)
    tokenizer = Tokenizer(from_gguf(bytes_fields, "x"))
    assert tokenizer.encode("<tool>") == [259]
    assert tokenizer.decode([259]) == "<tool>"
    assert to_gguf(tokenizer.vocabulary, 260)[GGML + "token_type"][259] == 4


def test_an_id_out_of_range_counts_as_not_given(bytes_fields: dict[str, Any]) -> None:
    bytes_fields |= {GGML + "padding_token_id": 2**32 - 1, GGML + "bos_token_id": 259}
    vocabulary = from_gguf(bytes_fields, "x")
    assert (vocabulary.pad_id, vocabulary.bos_id) == (None, None)


def test_a_vocabulary_may_have_no_merges(bytes_fields: dict[str, Any], tmp_path: Path) -> None:
    bytes_fields[GGML + "tokens"] = bytes_fields[GGML + "tokens"][:257]
    bytes_fields[GGML + "token_type"] = bytes_fields[GGML + "token_type"][:257]
    del bytes_fields[GGML + "merges"]  # as the gguf package leaves out an empty list
    vocabulary = from_gguf(bytes_fields, "x")
    tokenizer = Tokenizer(vocabulary)
    model = our_model(vocab_size=257)
    path = tmp_path / "model.gguf"
    write_gguf(path, model.config, model.state_dict(), vocabulary)
    header = read_header(path)
    assert header.fields[GGML + "merges"] == []  # llama.cpp wants the key
    assert GGML + "merges" in gguf.GGUFReader(path).fields
    again = Tokenizer.from_pretrained(path)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)


# What bad input gets


def test_an_unknown_kind_is_named_with_those_known(bytes_fields: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match=r"a\.gguf: unknown tokenizer 'bert'; known: 'llam"):
        from_gguf(bytes_fields | {GGML + "model": "bert"}, Path("a.gguf"))
    known = "known: smollm, llama-bpe, gpt-2, default"
    with pytest.raises(TokenizerError, match=f"a: unknown pre-tokenizer 'kimi-k2'; {known}"):
        from_gguf(bytes_fields | {GGML + "pre": "kimi-k2"}, "a")


BAD_FIELDS = {
    "no tokens": ({"tokens": None}, "tokens is not a list of strings"),
    "empty tokens": ({"tokens": []}, "a vocabulary of 0 tokens"),
    "tokens not strings": ({"tokens": [1, 2]}, "tokens is not a list of strings"),
    "no merges": ({"merges": None}, "merges is not a list of strings"),
    "types too short": ({"token_type": [1]}, "token_type is not a list of 259 numbers"),
    "types not numbers": ({"token_type": ["a"] * 259}, "token_type is not a list of finite"),
    "pre a number": ({"pre": 3}, "pre is not a string"),
    "flag a number": ({"add_bos_token": 1}, "add_bos_token is not true or false"),
    "a token twice": ({"tokens": ["a"] * 259}, "tokens 0 and 258 are both 'a'"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_a_damaged_field_is_named(bytes_fields: dict[str, Any], name: str) -> None:
    changes, message = BAD_FIELDS[name]
    damaged = bytes_fields | {GGML + key: value for key, value in changes.items()}
    with pytest.raises(TokenizerError, match=message):
        from_gguf(damaged, "a.gguf")


@pytest.mark.parametrize("merges", [["h"], ["h e l"], ["x yz"], [""]])
def test_merges_that_are_no_pairs_of_tokens_are_an_error(
    bytes_fields: dict[str, Any], merges: list[str]
) -> None:
    with pytest.raises(TokenizerError, match="damaged tokenizer"):
        Tokenizer(from_gguf(bytes_fields | {GGML + "merges": merges}, "a"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scores", None, "scores is not a list of 600 numbers"),
        ("scores", [float("nan")] * 600, "scores is not a list of finite numbers"),
        (
            "token_type",
            [2, 3, 3, 6, *[1] * 596],
            "byte tokens must be all or none of <0x00> to <0xFF>",
        ),
        ("tokens", [""] * 600, "token 0 is empty"),
        ("tokens", ["a"] * 600, "tokens 0 and 1 are both 'a'"),
        ("token_type", [2, *[77] * 599], "has the unknown type 77"),
    ],
)
def test_damaged_pieces_are_named(
    pieces_fields: dict[str, Any], key: str, value: Any, message: str
) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer(from_gguf(pieces_fields | {GGML + key: value}, "a.gguf"))


def test_the_unknown_token_is_found_by_field_type_or_name(pieces_fields: dict[str, Any]) -> None:
    types = pieces_fields[GGML + "token_type"]
    for changes in ({}, {"unknown_token_id": 0, "token_type": [1, *types[1:]]}):
        fields = pieces_fields | {GGML + key: value for key, value in changes.items()}
        assert Tokenizer(from_gguf(fields, "x")).special_tokens["<unk>"] == 0
    del pieces_fields[GGML + "unknown_token_id"]
    assert Tokenizer(from_gguf(pieces_fields, "x")).special_tokens["<unk>"] == 0
    pieces_fields[GGML + "token_type"][0] = 1
    assert Tokenizer(from_gguf(pieces_fields, "x")).special_tokens["<unk>"] == 0
    pieces_fields[GGML + "tokens"][0] = "other"
    with pytest.raises(
        TokenizerError, match="0 unknown tokens, but SentencePiece needs exactly one"
    ):
        from_gguf(pieces_fields, "x")


def test_more_tokens_than_the_model_has_is_an_error() -> None:
    with pytest.raises(TokenizerError, match="SentencePiece: 600 tokens, but the model has 599"):
        to_gguf(from_model(tiny_sentencepiece(), "tiny"), 599)


def changed(**changes: Any) -> Vocabulary:
    raw = build(list(BYTE_CHARS.values()), [1] * 256, [], "gpt-2", "tiny")
    raw["model"] |= changes.pop("model", {})
    return Vocabulary("tokenizers", dump(raw | changes), "tiny")


def test_what_gguf_cannot_say_is_refused() -> None:
    assert to_gguf(changed(), 256)[GGML + "pre"] == "gpt-2"
    with pytest.raises(TokenizerError, match="GGUF has no name for its pre_tokenizer; known:"):
        to_gguf(changed(pre_tokenizer={"type": "Whitespace"}), 256)
    with pytest.raises(TokenizerError, match="it normalizes text"):
        to_gguf(changed(normalizer={"type": "NFC"}), 256)
    with pytest.raises(TokenizerError, match="like gpt-2, but differs in ignore_merges"):
        to_gguf(changed(model={"ignore_merges": True}), 256)
    prefixed = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
    with pytest.raises(TokenizerError, match="GGUF has no name for its pre_tokenizer"):
        to_gguf(changed(pre_tokenizer=prefixed), 256)
    with pytest.raises(TokenizerError, match="not a BPE model"):
        to_gguf(from_model(tiny_sentencepiece(model_type="unigram"), "tiny"), 600)
    with pytest.raises(TokenizerError, match="it normalizes text"):
        to_gguf(from_model(tiny_sentencepiece(normalization_rule_name="nfkc"), "tiny"), 600)


def test_merges_that_sentencepiece_would_not_make_are_refused() -> None:
    raw = parse(to_files(from_model(tiny_sentencepiece(), "tiny"))["tokenizer.json"], "tiny")
    assert to_gguf(Vocabulary("tokenizers", dump(raw), "tiny"), 600)
    merges = raw["model"]["merges"]
    # Without this merge BPE stops short of the token; SentencePiece would still make it.
    raw["model"]["merges"] = merges[1:]
    with pytest.raises(TokenizerError, match=r"tiny: its merges for '.+' are not SentencePiece's"):
        to_gguf(Vocabulary("tokenizers", dump(raw), "tiny"), 600)
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "c": 4, "ab": 5, "bc": 6, "abc": 7}
    # `abc` comes both before and after `bc`: no one score has that order.
    raw["model"] = bpe_model(
        vocab, [["a", "b"], ["ab", "c"], ["b", "c"], ["a", "bc"]], unk_token="<unk>"
    )
    raw["added_tokens"] = []
    with pytest.raises(TokenizerError, match="its merges for 'abc' are not"):
        to_gguf(Vocabulary("tokenizers", json.dumps(raw).encode(), "tiny"), 8)


def test_pieces_without_an_unknown_token_are_refused() -> None:
    raw = parse(to_files(from_model(tiny_sentencepiece(), "tiny"))["tokenizer.json"], "tiny")
    raw["model"]["unk_token"] = None
    # With a token for each byte no text becomes it, as in folders that transformers 5 saves.
    assert to_gguf(Vocabulary("tokenizers", dump(raw), "tiny"), 600)[GGML + "unknown_token_id"] == 0
    raw["model"]["byte_fallback"] = False
    with pytest.raises(TokenizerError, match="tiny: it has no unknown token"):
        to_gguf(Vocabulary("tokenizers", dump(raw), "tiny"), 600)


def test_removal_of_extra_spaces_survives_for_our_own_reading() -> None:
    vocabulary = from_model(tiny_sentencepiece(remove_extra_whitespaces=True), "tiny")
    back = Tokenizer(from_gguf(to_gguf(vocabulary, 600), "x"))
    for text in ["  the   fox ", "a  b"]:
        assert back.encode(text) == Tokenizer(vocabulary).encode(text)
    assert back.decode(back.encode("  the   fox ")) == "the fox"
