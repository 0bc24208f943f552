"""Hugging Face's folders: read as transformers reads them, and written so that it can.

Every setting is in a folder that the test writes; ids are held against transformers' own.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from minllama.errors import TokenizerError
from minllama.tokenizer.gguf import from_gguf
from minllama.tokenizer.huggingface import to_files
from minllama.tokenizer.load import load_vocabulary
from minllama.tokenizer.sentencepiece_form import Piece, build_model, from_model
from minllama.tokenizer.tiktoken_form import from_ranks
from minllama.tokenizer.tokenizer import Tokenizer
from minllama.tokenizer.tokenizers_form import Json, added_token, dump, parse
from minllama.tokenizer.vocabulary import Vocabulary
from tests.tokenizer_cases import (
    TEXTS,
    byte_json,
    default_fields,
    random_texts,
    tiny_ranks,
    tiny_sentencepiece,
)

BOS, EOS, TURN, FIRST_BYTE = 0, 1, 2, 3
ALL_TEXTS = [*TEXTS, *random_texts(300, seed=19)]


def write_folder(folder: Path, raw: Json | None = None, **files: Any) -> Path:
    """A folder of JSON files (`tokenizer_config=...`), with `raw` as its tokenizer.json."""
    (folder / "tokenizer.json").write_bytes(dump(byte_json() if raw is None else raw))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_named_tokens_are_strings_or_dictionaries(tmp_path: Path) -> None:
    for end in ("</s>", {"__type": "AddedToken", "content": "</s>", "lstrip": False}):
        config = {"bos_token": "<s>", "eos_token": end, "pad_token": "<|turn|>"}
        vocabulary = load_vocabulary(write_folder(tmp_path, tokenizer_config=config))
        assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (BOS, EOS, TURN)


def test_special_tokens_map_says_what_the_config_does_not(tmp_path: Path) -> None:
    write_folder(
        tmp_path,
        tokenizer_config={"eos_token": "</s>"},
        special_tokens_map={"bos_token": {"content": "<s>"}, "eos_token": "<|turn|>"},
    )
    vocabulary = load_vocabulary(tmp_path)
    assert (vocabulary.bos_id, vocabulary.eos_id) == (BOS, EOS)


def test_a_named_token_that_has_no_row_is_passed_over(tmp_path: Path) -> None:
    vocabulary = load_vocabulary(write_folder(tmp_path, tokenizer_config={"pad_token": "[PAD]"}))
    assert vocabulary.pad_id is None


@pytest.mark.parametrize("name", ["generation_config", "config"])
@pytest.mark.parametrize(
    ("ends", "eos_id", "stop_ids"),
    [(2, 1, (2,)), ([1, 2], 1, (2,)), ([1], 1, ()), ([2, 999, "x", True], 1, (2,))],
)
def test_further_ends_come_from_the_models_files(
    tmp_path: Path, name: str, ends: Any, eos_id: int, stop_ids: tuple[int, ...]
) -> None:
    files = {name: {"eos_token_id": ends}, "tokenizer_config": {"eos_token": "</s>"}}
    vocabulary = load_vocabulary(write_folder(tmp_path, **files))
    assert (vocabulary.eos_id, vocabulary.stop_ids) == (eos_id, stop_ids)


def test_eos_comes_from_the_models_files_where_the_tokenizer_names_none(tmp_path: Path) -> None:
    vocabulary = load_vocabulary(write_folder(tmp_path, generation_config={"eos_token_id": [2, 1]}))
    assert (vocabulary.eos_id, vocabulary.stop_ids) == (TURN, (EOS,))


def template(*names: str) -> Json:
    items = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if name == "A"
        else {"SpecialToken": {"id": name, "type_id": 0}}
        for name in names
    ]
    tokens = {
        name: {"id": name, "ids": [["<s>", "</s>"].index(name)], "tokens": [name]}
        for name in names
        if name != "A"
    }
    return {
        "type": "TemplateProcessing",
        "single": items,
        "pair": [*items, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": tokens,
    }


@pytest.mark.parametrize(
    ("names", "add_bos", "add_eos"),
    [
        (["<s>", "A"], True, False),
        (["<s>", "A", "</s>"], True, True),
        (["A", "</s>"], False, True),
        (["A"], False, False),
    ],
)
@pytest.mark.parametrize("in_sequence", [False, True])
def test_undeclared_bos_and_eos_are_those_of_the_template(
    tmp_path: Path, names: list[str], add_bos: bool, add_eos: bool, in_sequence: bool
) -> None:
    processor = template(*names)
    if in_sequence:  # as Llama 3's
        byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
        processor = {"type": "Sequence", "processors": [byte_level, processor]}
    write_folder(
        tmp_path,
        byte_json(post_processor=processor),
        tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"},
    )
    vocabulary = load_vocabulary(tmp_path)
    assert (vocabulary.add_bos, vocabulary.add_eos) == (add_bos, add_eos)
    ids = Tokenizer(vocabulary).encode("")
    assert ids == [BOS] * add_bos + [EOS] * add_eos


def test_a_declaration_goes_before_the_template(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
    config["add_eos_token"] = True
    raw = byte_json(post_processor=template("<s>", "A"))
    vocabulary = load_vocabulary(write_folder(tmp_path, raw, tokenizer_config=config))
    assert Tokenizer(vocabulary).encode("") == [EOS]


NULLS = (
    *("add_bos_token", "add_eos_token", "bos_token", "eos_token", "pad_token", "unk_token"),
    *("chat_template", "clean_up_tokenization_spaces", "added_tokens_decoder", "legacy"),
    *("additional_special_tokens", "extra_special_tokens", "add_prefix_space", "model_max_length"),
)


@pytest.mark.parametrize("name", [*NULLS, "all"])
def test_null_says_nothing(tmp_path: Path, name: str) -> None:
    # But for the names that chat templates read, which are as transformers has them.
    def said(folder: Path) -> Vocabulary:
        return dataclasses.replace(load_vocabulary(folder), named_tokens={})

    nulls = dict.fromkeys(NULLS if name == "all" else [name])
    raw = byte_json(post_processor=template("<s>", "A", "</s>"))
    mapped = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|turn|>"}
    silent, null = tmp_path / "silent", tmp_path / "null"
    for folder, config in ((silent, {}), (null, nulls)):
        folder.mkdir()
        write_folder(folder, raw, tokenizer_config=config, special_tokens_map=mapped)
    assert said(null) == said(silent)
    assert Tokenizer(load_vocabulary(null)).encode("") == [BOS, EOS]
    for folder in (silent, null):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(tiny_sentencepiece())
        (folder / "added_tokens.json").write_text('{"<|turn|>": 600, "<|null|>": null}')
    assert said(null) == said(silent)
    assert load_vocabulary(null).add_bos


@pytest.mark.parametrize("name", ["add_bos_token", "add_eos_token"])
@pytest.mark.parametrize("value", ["false", [], 2.0])
def test_a_setting_that_is_neither_true_nor_false_is_named(
    tmp_path: Path, name: str, value: Any
) -> None:
    write_folder(tmp_path, tokenizer_config={name: value})
    with pytest.raises(TokenizerError, match=f"{name} is .*, not true or false"):
        load_vocabulary(tmp_path)


HOSTILE_IDS = {
    "negative": -1,
    "beyond any vocabulary": 2**22,
    "beyond 64 bits": 2**70,
    "a number of a thousand digits": 10**1000,
    "a fraction": 600.5,
    "a text": "600",
    "true": True,
    "a list": [600],
}


@pytest.mark.parametrize("name", HOSTILE_IDS)
@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_an_id_that_no_token_can_have_is_named(tmp_path: Path, name: str, file: str) -> None:
    write_folder(tmp_path, added_tokens={"<|new|>\x1b[31m": HOSTILE_IDS[name]})
    if file == "tokenizer.model":
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / file).write_bytes(tiny_sentencepiece())
    with pytest.raises(
        TokenizerError, match=r"added_tokens\.json: the added token '<.new.>"
    ) as told:
        load_vocabulary(tmp_path)
    assert str(told.value).isprintable()
    assert len(str(told.value)) < 400


@pytest.mark.parametrize("key", ["-1", "x", "", "9" * 400, "1.0", "\u0663"])
def test_a_key_that_is_no_id_is_named(tmp_path: Path, key: str) -> None:
    decoder = {key: {"content": "<|new|>", "special": True}}
    write_folder(tmp_path, tokenizer_config={"added_tokens_decoder": decoder})
    with pytest.raises(TokenizerError, match=r"'<.new.>' has the id '.*which is not a valid token"):
        load_vocabulary(tmp_path)


def test_two_added_tokens_of_one_id_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiny_sentencepiece())
    (tmp_path / "added_tokens.json").write_text('{"<|a|>": 600, "<|b|>": 600}')
    with pytest.raises(TokenizerError, match=r"'<.b.>' has the id 600; the next .* is 601"):
        load_vocabulary(tmp_path)


def test_what_the_settings_say_of_an_added_token_counts_as_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    raw = byte_json(added_tokens=[added_token(TURN, "<|turn|>", special=False)])
    flags = {"lstrip": True, "rstrip": True, "single_word": False, "normalized": False}
    decoder = {"2": {"content": "<|turn|>", "special": True, **flags}}
    decoder["259"] = {"content": "<new>", "special": False, **flags, "lstrip": False}
    config = {"added_tokens_decoder": decoder, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_folder(tmp_path, raw, tokenizer_config=config, config={"model_type": "llama"})
    ours = Tokenizer(load_vocabulary(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a <|turn|> b", "a <new> b", "<new><|turn|>\n", " <|turn|>"):
        assert ours.encode(text, special=True) == theirs(text)["input_ids"], text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("one", "one"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool_use", "template": "t"}], None),
        (None, None),
    ],
)
def test_chat_template_of_the_config(tmp_path: Path, value: Any, expected: str | None) -> None:
    write_folder(tmp_path, tokenizer_config={"chat_template": value})
    assert load_vocabulary(tmp_path).chat_template == expected


def test_chat_template_of_its_own_file_comes_first(tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer_config={"chat_template": "old"})
    (tmp_path / "chat_template.jinja").write_text("new é\n", encoding="utf-8")
    assert load_vocabulary(tmp_path).chat_template == "new é\n"


def test_half_a_character_in_the_files_is_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer_config={"chat_template": "\ud83d"})
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: not readable as JSON"):
        load_vocabulary(tmp_path)
    write_folder(tmp_path, tokenizer_config={"chat_template": "👍"})  # as two escapes
    assert load_vocabulary(tmp_path).chat_template == "👍"
    data = json.dumps(byte_json(added_tokens=[added_token(259, "\udc80", special=True)]))
    (tmp_path / "tokenizer.json").write_text(data)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not readable as JSON"):
        load_vocabulary(tmp_path)


def test_named_tokens_become_special(tmp_path: Path) -> None:
    raw = byte_json(added_tokens=[added_token(TURN, "<|turn|>", special=False)])
    plain = Tokenizer(load_vocabulary(write_folder(tmp_path, raw)))
    assert plain.encode("<|turn|>") == [TURN]
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "additional_special_tokens": ["<|turn|>"],
    }
    named = Tokenizer(load_vocabulary(write_folder(tmp_path, raw, tokenizer_config=config)))
    assert named.special_tokens == {"<s>": 0, "</s>": 1, "<|turn|>": 2}
    assert not {0, 1, 2} & set(named.encode("<s></s><|turn|>"))
    assert named.encode("<s></s><|turn|>", special=True) == [0, 1, 2]


def test_tokens_listed_beside_a_tokenizer_json_are_added(tmp_path: Path) -> None:
    decoder = {"259": {"content": "<|new|>", "special": True}, "0": {"content": "<s>"}}
    write_folder(tmp_path, tokenizer_config={"added_tokens_decoder": decoder})
    assert Tokenizer(load_vocabulary(tmp_path)).encode("<|new|>", special=True) == [259]
    decoder["300"] = {"content": "<|gap|>"}
    write_folder(tmp_path, tokenizer_config={"added_tokens_decoder": decoder})
    with pytest.raises(TokenizerError, match=r"'<\|gap\|>' has the id 300, not 260"):
        load_vocabulary(tmp_path)


def test_tokens_listed_beside_a_tokenizer_model_are_added(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiny_sentencepiece())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|a|>": 600, "<s>": 1}))
    config = {"added_tokens_decoder": {"601": {"content": "<|b|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(load_vocabulary(tmp_path))
    assert tokenizer.vocab_size == 602
    assert 600 in tokenizer.encode("x<|a|>")
    assert 601 not in tokenizer.encode("x<|b|>")
    assert 601 in tokenizer.encode("x<|b|>", special=True)
    config["additional_special_tokens"] = ["<|a|>"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert 600 not in Tokenizer(load_vocabulary(tmp_path)).encode("x<|a|>")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|a|>": 700}))
    with pytest.raises(TokenizerError, match="has the id 601; the next free id is 600"):
        load_vocabulary(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<s>": 5}))
    with pytest.raises(TokenizerError, match="'<s>' has the id 5, and 1 in the model"):
        load_vocabulary(tmp_path)


def test_sentencepieces_own_ends_and_padding() -> None:
    vocabulary = from_model(tiny_sentencepiece(pad_id=3), "x")
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (1, 2, 3)
    without = from_model(tiny_sentencepiece(bos_id=-1, eos_id=-1), "x")
    assert (without.bos_id, without.eos_id, without.add_bos) == (None, None, False)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config", "[]"),
        ("tokenizer_config", "{"),
        ("generation_config", '"x"'),
        ("special_tokens_map", "\x00"),
    ],
)
def test_a_damaged_settings_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    write_folder(tmp_path)
    (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(TokenizerError, match=f"{name}.json: not "):
        load_vocabulary(tmp_path)


BAD_JSON = {
    "no vocab": ({"model": {"type": "BPE"}}, "vocab is not a table of ids"),
    "negative id": ({"model": {"vocab": {"a": -1}}}, "vocab is not a table of ids"),
    "absurd id": ({"model": {"vocab": {"a": 2**32 - 1}}}, "vocab is not a table of ids"),
    "one id twice": ({"model": {"vocab": {"a": 0, "b": 0}}}, "share one id"),
    "added tokens": ({"added_tokens": [{"id": 0}]}, "added_tokens is damaged"),
    "added id": (
        {"added_tokens": [added_token(9, "<s>", special=True)]},
        "'<s>' has the id 9, not 0",
    ),
    "decoder": ({"decoder": {"type": "WordPiece"}}, "its decoder is WordPiece; known"),
    "no decoder": ({"decoder": None}, "its decoder is missing"),
    "prefix": (
        {"model": {"vocab": {"a": 0}, "continuing_subword_prefix": "##"}},
        "has a continuing_subword_prefix",
    ),
    "unknown token": (
        {"model": {"vocab": {"a": 0}, "unk_token": []}},
        "unk_token is not a string; download",
    ),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_damaged_tokenizer_json_is_one_line(tmp_path: Path, name: str) -> None:
    changes, message = BAD_JSON[name]
    with pytest.raises(TokenizerError, match=message):
        load_vocabulary(write_folder(tmp_path, byte_json(**changes)))


# Written folders, and transformers


def saved(vocabulary: Vocabulary, folder: Path) -> Path:
    folder.mkdir()
    for name, content in to_files(vocabulary).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def vocabularies() -> dict[str, Vocabulary]:
    merged = byte_json(post_processor=template("<s>", "A"))
    return {
        "sentencepiece": from_model(tiny_sentencepiece(), "tiny"),
        "tiktoken": from_ranks(tiny_ranks(), "tiny"),
        "byte level": Vocabulary(
            "tokenizers",
            dump(merged),
            "tiny",
            bos_id=BOS,
            eos_id=EOS,
            pad_id=TURN,
            stop_ids=(TURN,),
            add_eos=True,
            chat_template="{{ messages }} é",
        ),
    }


def assert_transformers_agrees(vocabulary: Vocabulary, folder: Path, texts: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer(vocabulary)
    theirs = transformers.AutoTokenizer.from_pretrained(saved(vocabulary, folder))
    special = list(ours.special_tokens)[-1]
    for text in texts:
        # transformers takes special tokens in any text for these.
        ids = ours.encode(text, special=True)
        assert theirs(text)["input_ids"] == ids, ascii(text)
        mixed = f"{text}{special} {text}"
        assert theirs(mixed)["input_ids"] == ours.encode(mixed, special=True), ascii(text)
    assert theirs.bos_token_id == ours.bos_id
    assert theirs.eos_token_id == ours.eos_id
    assert theirs.chat_template == ours.chat_template
    # transformers has one more only if a named token got a new row.
    assert len(theirs) == ours.vocab_size


@pytest.mark.parametrize("name", ["sentencepiece", "tiktoken", "byte level"])
def test_transformers_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    assert_transformers_agrees(vocabularies()[name], tmp_path / "saved", ALL_TEXTS)


def test_transformers_gives_llama_2s_ids(shared_data: Path, tmp_path: Path) -> None:
    vocabulary = load_vocabulary(shared_data / "tokenizer.model")
    assert_transformers_agrees(vocabulary, tmp_path / "saved", ALL_TEXTS)


def test_transformers_gives_the_default_models_ids(default_model: Path, tmp_path: Path) -> None:
    vocabulary = from_gguf(default_fields(default_model), "default")
    assert_transformers_agrees(vocabulary, tmp_path / "saved", ALL_TEXTS)


@pytest.mark.parametrize("name", ["sentencepiece", "tiktoken", "byte level"])
def test_a_written_folder_says_the_same(name: str, tmp_path: Path) -> None:
    vocabulary = vocabularies()[name]
    back = load_vocabulary(saved(vocabulary, tmp_path / "saved"))
    for attribute in (
        "bos_id",
        "eos_id",
        "pad_id",
        "stop_ids",
        "add_bos",
        "add_eos",
        "chat_template",
    ):
        assert getattr(back, attribute) == getattr(vocabulary, attribute), attribute


def test_a_folder_of_transformers_own_is_read_with_its_ids(
    shared_data: Path, tmp_path: Path
) -> None:
    # Its LlamaTokenizer leaves out the space in front of a text that begins with one.
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "source"
    source.mkdir()
    shutil.copyfile(shared_data / "tokenizer.model", source / "tokenizer.model")
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    config["tokenizer_class"] = "LlamaTokenizer"
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    theirs.save_pretrained(tmp_path / "saved")
    ours = Tokenizer(load_vocabulary(tmp_path / "saved"))
    assert ours.encode(" Hello") == [1, 15043]
    for text in ALL_TEXTS:
        assert ours.encode(text, special=True) == theirs(text)["input_ids"], ascii(text)


def test_a_sentencepiece_model_is_kept_as_it_is() -> None:
    files = to_files(from_model(tiny_sentencepiece(), "tiny"))
    assert files["tokenizer.model"] == tiny_sentencepiece()
    for options in (
        {"model_type": "unigram"},
        {"normalization_rule_name": "nfkc"},
        {"remove_extra_whitespaces": True},
        {"user_defined_symbols": "▁<tool>"},
    ):
        # No tokenizer.json can be exact, so there is none.
        files = to_files(from_model(tiny_sentencepiece(**_hashable(options)), "tiny"))
        assert set(files) == {"tokenizer.model", "tokenizer_config.json", "generation_config.json"}
        assert json.loads(files["tokenizer_config.json"])["eos_token"] == "</s>"


def test_pieces_that_merges_cannot_say_have_no_tokenizer_json() -> None:
    kinds = {"<unk>": 2, "▁": 1, "a": 1, "b": 1, "ab": 1, "abb": 1}

    def files_of(step: float = 1.0, **changes: int | None) -> set[str]:
        kept = {text: kind for text, kind in (kinds | changes).items() if kind is not None}
        pieces = [Piece(text, -step * i, kind) for i, (text, kind) in enumerate(kept.items())]
        model = build_model(pieces, add_dummy_prefix=True, bos_id=None, eos_id=None, where="x")
        return set(to_files(Vocabulary("sentencepiece", model, "x")))

    assert "tokenizer.json" in files_of()
    assert "tokenizer.json" in files_of(**{"[PAD6]": 5})
    assert "tokenizer.json" not in files_of(ab=5)  # a step toward `abb`, and no token itself
    assert "tokenizer.json" not in files_of(b=None)  # SentencePiece still makes `ab`
    assert "tokenizer.json" not in files_of(step=0.0)  # the leftmost pair, not the best, is joined


def _hashable(options: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}


def test_an_ordinary_token_is_not_named_for_padding() -> None:
    vocabulary = Vocabulary("tokenizers", dump(byte_json()), "tiny", pad_id=FIRST_BYTE)
    assert "pad_token" not in json.loads(to_files(vocabulary)["tokenizer_config.json"])


def test_what_was_read_unchanged_is_written_unchanged(tmp_path: Path) -> None:
    raw = byte_json(post_processor=template("<s>", "A"))
    write_folder(tmp_path, raw, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    assert json.loads(to_files(load_vocabulary(tmp_path))["tokenizer.json"]) == parse(
        dump(raw), "x"
    )
