"""Claims about GGUF models in several files, in folders, and without weights."""

import shutil
from pathlib import Path

import gguf
import pytest
import torch

from minllama.checkpoints.gguf import write_gguf
from minllama.checkpoints.open import open_checkpoint, read_tokenizer
from minllama.errors import CheckpointError, TokenizerError
from minllama.model.llama import load_pretrained
from minllama.tokenizer.load import load_vocabulary
from minllama.tokenizer.tokenizer import Tokenizer
from tests.tiny import both, our_model
from tests.tokenizer_cases import tiny_sentencepiece


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    model = our_model()
    write_gguf(tmp_path / "whole.gguf", model.config, model.state_dict(), None, "f32")
    return tmp_path / "whole.gguf"


def split(whole: Path, folder: Path, n_tensors: int = 9) -> list[Path]:
    """The same model in files of so many tensors, by gguf's own writer."""
    folder.mkdir(exist_ok=True)
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=n_tensors)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("*.gguf"))


def test_a_model_in_parts_opens_by_any_of_them_or_their_folder(whole: Path, tmp_path: Path) -> None:
    parts = split(whole, tmp_path / "parts")
    assert [part.name for part in parts] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    want = load_pretrained(whole, device="cpu").state_dict()
    for source in (*parts, tmp_path / "parts"):
        got = load_pretrained(source, device="cpu").state_dict()
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            assert torch.equal(got[name], tensor), name


def test_a_missing_part_is_named(whole: Path, tmp_path: Path) -> None:
    parts = split(whole, tmp_path / "parts")
    parts[1].unlink()
    for source in (parts[0], parts[2], tmp_path / "parts"):
        with pytest.raises(CheckpointError, match=r"m-00002-of-00003.gguf is missing"):
            open_checkpoint(source)


def test_parts_that_are_not_of_one_model_are_refused(whole: Path, tmp_path: Path) -> None:
    parts = split(whole, tmp_path / "parts")
    shutil.copy(parts[0], parts[1])
    with pytest.raises(CheckpointError, match=r"it says that it is part 0 \(from 0\) of 3"):
        open_checkpoint(parts[0])
    others = split(whole, tmp_path / "others", n_tensors=10)
    shutil.copy(others[1], parts[1])
    with pytest.raises(CheckpointError, match=r"in two parts|instead of"):
        open_checkpoint(parts[0])
    alone = tmp_path / "alone.gguf"
    shutil.copy(others[0], alone)
    with pytest.raises(CheckpointError, match=r"one of \d parts of a model; rename them to"):
        open_checkpoint(alone)


def test_a_folder_with_one_gguf_is_that_model(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(whole, folder / "m.gguf")
    (folder / "README.md").write_text("a model")
    want = open_checkpoint(whole).config
    assert open_checkpoint(folder).config == want
    (folder / "config.json").write_text("{}")  # often beside it, of the model it was made from
    assert open_checkpoint(folder).config == want
    shutil.copy(whole, folder / "n.gguf")
    with pytest.raises(CheckpointError, match=r"several GGUF files; name one of m.gguf, n.gguf"):
        open_checkpoint(folder)


def test_weights_of_hugging_faces_go_before_a_gguf_beside_them(whole: Path, tmp_path: Path) -> None:
    both(tmp_path / "hf")
    shutil.copy(whole, tmp_path / "hf" / "m.gguf")
    assert open_checkpoint(tmp_path / "hf").format == "Hugging Face"


def test_a_vocabulary_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "ggml-vocab.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("tokenizer.ggml.model", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["<unk>", "<s>", "</s>"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="contains a vocabulary but no weights"):
        open_checkpoint(path)


def test_a_tokenizer_is_found_by_any_part_or_a_folder_of_gguf(tmp_path: Path) -> None:
    pieces, model = tmp_path / "tokenizer.model", our_model(vocab_size=600)
    pieces.write_bytes(tiny_sentencepiece())
    vocabulary = load_vocabulary(pieces)
    want = Tokenizer(vocabulary).encode("a question, an answer")
    path = tmp_path / "whole.gguf"
    write_gguf(path, model.config, model.state_dict(), vocabulary, "f32")
    parts = split(path, tmp_path / "parts")
    assert len(parts) == 3
    for source in (path, *parts, tmp_path / "parts"):
        assert Tokenizer(read_tokenizer(source)).encode("a question, an answer") == want
        assert Tokenizer.from_pretrained(source).encode("a question, an answer") == want


def test_a_tokenizer_in_one_of_several_gguf_files_has_to_be_named(tmp_path: Path) -> None:
    model = our_model()
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name, model.config, model.state_dict(), None, "f32")
    with pytest.raises(CheckpointError, match=r"name one of a\.gguf, b\.gguf"):
        read_tokenizer(tmp_path)
    (tmp_path / "b.gguf").unlink()
    with pytest.raises(TokenizerError, match=r"a\.gguf: this GGUF file has no tokenizer"):
        read_tokenizer(tmp_path)
