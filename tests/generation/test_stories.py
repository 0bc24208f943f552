"""Claims about a real checkpoint of llama2.c's, 260K parameters: there and back, byte for byte."""

import shutil
from pathlib import Path

import pytest

from minllama import cli
from minllama.checkpoints.open import open_checkpoint
from minllama.errors import CheckpointWarning


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(arg) for arg in args])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def stories(shared_data: Path, tmp_path: Path) -> Path:
    """A copy, for its own tokenizer is not there, and another one is."""
    path = shared_data / "stories260K.bin"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    return Path(shutil.copy(path, tmp_path))


@pytest.mark.parametrize("way", [["hf"], ["gguf"], ["llama2c"], ["hf", "gguf"], ["gguf", "hf"]])
def test_it_comes_back_byte_for_byte_from_every_format(
    way: list[str], stories: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = stories
    for number, target in enumerate(way):
        assert run("convert", source, tmp_path / f"{number}", "--to", target) == 0
        source = tmp_path / f"{number}"
    assert run("convert", source, tmp_path / "back", "--to", "llama2c") == 0
    assert (tmp_path / "back").read_bytes() == stories.read_bytes()
    capfd.readouterr()


def test_info_knows_its_shape(stories: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("info", stories) == 0
    printed = capfd.readouterr().out
    assert "llama2.c .bin (legacy)" in printed
    assert "dim 64, layers 5, heads 8/4 x 8, hidden 172, vocabulary 512, tied" in printed
    assert "260,032" in printed


def test_a_tokenizer_of_another_model_beside_it_is_not_used(
    shared_data: Path, stories: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(shared_data / "tokenizer.model", tmp_path)
    with pytest.warns(CheckpointWarning, match="has 32000 tokens, but the model has 512"):
        assert open_checkpoint(stories).vocabulary is None
    for target in ("hf", "gguf"):
        assert run("convert", stories, tmp_path / target, "--to", target) == 0
        said = capfd.readouterr().err.splitlines()
        assert ["name the right one with --tokenizer" in line for line in said] == [True, False]
    assert run("generate", "Once", "-m", stories) == 2
    assert "no tokenizer in or beside the model" in capfd.readouterr().err
