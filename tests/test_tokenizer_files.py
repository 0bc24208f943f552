"""Tokenizers from checkpoints, files and folders, and written to folders."""

from pathlib import Path

import pytest
from tokenizer_cases import TEXTS, byte_json, random_texts, tiny_ranks, tiny_sentencepiece

from minllama.checkpoints import Checkpoint
from minllama.config import LlamaConfig
from minllama.errors import CheckpointError, MinllamaError, TokenizerError
from minllama.tokenizer import Tokenizer
from minllama.vocabulary import Vocabulary
from minllama.vocabulary.sentencepiece_form import from_model
from minllama.vocabulary.tiktoken_form import from_ranks
from minllama.vocabulary.tokenizers_form import dump

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
    monkeypatch.setattr("minllama.checkpoints.open_checkpoint", lambda source: bare)
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
