"""Tokenizers from checkpoints, files and folders, and written to folders."""

import re
from pathlib import Path

import gguf
import pytest
import sentencepiece

from minllama.checkpoints.gguf import write_gguf
from minllama.checkpoints.huggingface import write_huggingface
from minllama.checkpoints.open import open_checkpoint, read_tokenizer
from minllama.checkpoints.types import Checkpoint
from minllama.cli import main
from minllama.errors import CheckpointError, MinllamaError, TokenizerError
from minllama.model.config import LlamaConfig
from minllama.tokenizer.gguf import to_gguf
from minllama.tokenizer.sentencepiece_form import from_model
from minllama.tokenizer.tiktoken_form import from_ranks
from minllama.tokenizer.tokenizer import Tokenizer
from minllama.tokenizer.tokenizers_form import dump
from minllama.tokenizer.vocabulary import Vocabulary
from tests.tiny import our_model
from tests.tokenizer_cases import (
    TEXTS,
    byte_json,
    random_texts,
    tiny_ranks,
    tiny_sentencepiece,
    write_vocabulary_gguf,
)

VOCABULARIES = {
    "pieces": lambda: from_model(tiny_sentencepiece(), "tiny"),
    "ranks": lambda: from_ranks(tiny_ranks(), "tiny"),
    "byte level": lambda: Vocabulary("tokenizers", dump(byte_json()), "tiny", eos_id=1),
}


def test_from_pretrained_reads_a_checkpoint(default_model: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(default_model)
    assert tokenizer.vocabulary.origin == "GGUF gpt2 (smollm)"
    assert tokenizer.encode("Hello world") == [19556, 905]


@pytest.mark.parametrize("name", ["pieces", "ranks", "byte level"])
def test_saved_and_loaded_it_behaves_the_same(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(VOCABULARIES[name]())
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = Tokenizer.from_pretrained(tmp_path / "saved")
    for attribute in (
        "vocab_size",
        "bos_id",
        "eos_id",
        "pad_id",
        "stop_ids",
        "add_bos",
        "add_eos",
        "chat_template",
        "special_tokens",
    ):
        assert getattr(loaded, attribute) == getattr(tokenizer, attribute), attribute
    special = "".join(list(tokenizer.special_tokens)[:3])
    for text in [*TEXTS, *random_texts(300, seed=17)]:
        ids = tokenizer.encode(text)
        assert loaded.encode(text) == ids, ascii(text)
        assert loaded.decode(ids) == tokenizer.decode(ids)
        mixed = text + special + text
        assert loaded.encode(mixed, special=True) == tokenizer.encode(mixed, special=True)
    for i in range(tokenizer.vocab_size):
        assert loaded.token_bytes(i) == tokenizer.token_bytes(i)


def test_saving_replaces_another_tokenizer_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    Tokenizer(VOCABULARIES["pieces"]()).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.model").exists()
    (tmp_path / "chat_template.jinja").write_text("of another")
    (tmp_path / "added_tokens.json").write_text("{}")
    Tokenizer(VOCABULARIES["byte level"]()).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_from_pretrained_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither config\.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("no tokenizer")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        Tokenizer.from_pretrained(tmp_path / "notes.txt")


def test_from_pretrained_takes_a_lone_file(tmp_path: Path) -> None:
    pieces = Tokenizer(VOCABULARIES["pieces"]())
    path = tmp_path / "any.name"
    path.write_bytes(tiny_sentencepiece())
    assert Tokenizer.from_pretrained(path).encode("the fox") == pieces.encode("the fox")


def test_a_target_that_cannot_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(MinllamaError, match="a file of that name is there"):
        Tokenizer(VOCABULARIES["pieces"]()).save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_checkpoint_without_a_tokenizer_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig(dim=8, n_layers=1, n_heads=1, vocab_size=8)
    bare = Checkpoint(tmp_path, "test", config, {}, read_vocabulary=lambda: None)
    monkeypatch.setattr("minllama.checkpoints.open.open_checkpoint", lambda source: bare)
    with pytest.raises(TokenizerError, match="no tokenizer in or beside this checkpoint"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_that_does_not_open_is_named_with_its_path(tmp_path: Path) -> None:
    raw = byte_json()
    raw["model"]["merges"] = ["no pair of tokens"]
    (tmp_path / "tokenizer.json").write_bytes(dump(raw))
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: tokenizer.json: damaged tokenizer (Merges")


def test_a_damaged_tokenizer_in_a_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not readable as JSON"):
        Tokenizer.from_pretrained(tmp_path)


# GGUF files


def test_a_gguf_file_is_a_tokenizer_with_a_model_or_without(tmp_path: Path) -> None:
    pieces = from_model(tiny_sentencepiece(), "tiny")
    alone, whole, other = (tmp_path / name for name in ("alone.gguf", "whole.gguf", "other.gguf"))
    fields = to_gguf(pieces, 600)
    write_vocabulary_gguf(fields, alone)
    model = our_model(vocab_size=600)
    write_gguf(whole, model.config, model.state_dict(), pieces)
    writer = gguf.GGUFWriter(other, "none of ours")  # without a single key of a model
    for key, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    reference = sentencepiece.SentencePieceProcessor(model_proto=tiny_sentencepiece())
    for path in (alone, whole, other):
        tokenizer = Tokenizer.from_pretrained(path)
        beside = open_checkpoint(whole, tokenizer=path)
        for text in TEXTS:
            assert tokenizer.encode(text) == [1, *reference.encode(text)]
        assert Tokenizer.from_checkpoint(beside).encode("the fox") == tokenizer.encode("the fox")
        assert beside.tokenizer == str(path)
    with pytest.raises(CheckpointError, match="contains a vocabulary but no weights"):
        open_checkpoint(alone)


def test_a_gguf_file_without_a_tokenizer_or_a_cut_one_says_so(tmp_path: Path) -> None:
    model, path, cut = our_model(), tmp_path / "none.gguf", tmp_path / "cut.gguf"
    write_gguf(path, model.config, model.state_dict(), None)
    with pytest.raises(TokenizerError, match="no tokenizer in or beside this checkpoint"):
        Tokenizer.from_pretrained(path)
    with pytest.raises(TokenizerError, match="this GGUF file has no tokenizer; name another"):
        open_checkpoint(path, tokenizer=path)
    write_vocabulary_gguf(to_gguf(from_model(tiny_sentencepiece(), "tiny"), 600), cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    for source in (lambda: Tokenizer.from_pretrained(cut), lambda: read_tokenizer(cut)):
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            source()


# A tokenizer larger than the model


def test_a_tokenizer_larger_than_the_model_is_not_written(tmp_path: Path) -> None:
    tokenizer = Tokenizer(VOCABULARIES["pieces"]())
    small, fits = our_model(vocab_size=599), our_model(vocab_size=600)
    message = "600 tokens, but the model has 599; use the model's own tokenizer"
    with pytest.raises(TokenizerError, match=message):
        write_huggingface(
            tmp_path / "hf", small.config, small.state_dict(), vocabulary=tokenizer.vocabulary
        )
    with pytest.raises(TokenizerError, match=message):
        write_gguf(tmp_path / "x", small.config, small.state_dict(), tokenizer.vocabulary)
    assert not list(tmp_path.iterdir())
    tokenizer.save_pretrained(tmp_path / "words first")
    with pytest.raises(TokenizerError, match=message):
        small.save_pretrained(tmp_path / "words first")
    assert not (tmp_path / "words first" / "config.json").exists()
    small.save_pretrained(tmp_path / "model first")
    with pytest.raises(TokenizerError, match=message):
        tokenizer.save_pretrained(tmp_path / "model first")
    assert not (tmp_path / "model first" / "tokenizer.model").exists()
    fits.save_pretrained(tmp_path / "words first")
    fits.save_pretrained(tmp_path / "model first")
    tokenizer.save_pretrained(tmp_path / "model first")
    for folder in ("words first", "model first"):
        assert Tokenizer.from_pretrained(tmp_path / folder).vocab_size == 600


@pytest.mark.parametrize("target", ["hf", "gguf", "llama2c"])
@pytest.mark.parametrize("name", ["pieces", "ranks", "byte level"])
def test_convert_refuses_a_tokenizer_larger_than_the_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], target: str, name: str
) -> None:
    Tokenizer(VOCABULARIES[name]()).save_pretrained(tmp_path / "words")
    our_model(vocab_size=61).save_pretrained(tmp_path / "model")
    arguments = ["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--to", target]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--tokenizer", str(tmp_path / "words")])
    assert ended.value.code == 2
    told = capfd.readouterr().err
    assert re.fullmatch(r"minllama: .*words: \d+ tokens, but the model has 61; .*\n", told)
    assert not (tmp_path / "out").exists()
