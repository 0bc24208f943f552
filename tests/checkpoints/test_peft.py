"""Claims about a PEFT adapter's folder given as a model: its base with the adapter applied."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from minllama import cli
from minllama.checkpoints.gguf import write_gguf
from minllama.checkpoints.open import open_checkpoint
from minllama.errors import CheckpointError, CheckpointWarning
from minllama.lora.peft_files import load_adapter
from minllama.model.llama import load_pretrained
from tests.peft_model import ALL, in_peft, their_adapter, their_classifier
from tests.tiny import random_ids

KINDS: tuple[dict[str, Any], ...] = (
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ALL, "use_dora": True},
    {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"(q|k).proj": 2}},
)


@dataclass
class Result:
    exit_code: int
    stdout: str
    stderr: str


Run = Callable[..., Result]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Call the command line in this process."""

    def call(*args: object) -> Result:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(arg) for arg in args])
        captured = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, captured.out, captured.err)

    return call


def adapter(folder: Path, *, base: str | None = "base", **options: Any) -> Path:
    """The folder of a random adapter of PEFT's, whose config names its base."""
    their_adapter(folder, **{**KINDS[0], **options})
    name_base(folder / "adapter", str(folder / base) if base == "base" else base)
    return folder / "adapter"


def name_base(folder: Path, base: str | None) -> None:
    file = folder / "adapter_config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({**raw, "base_model_name_or_path": base}))


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_peft_computes(kind: dict[str, Any], tmp_path: Path) -> None:
    folder = adapter(tmp_path, **kind)
    ids = random_ids(2, 20)
    with torch.no_grad():
        ours = load_pretrained(folder, device="cpu")(ids).logits
        theirs = in_peft(tmp_path)(ids).logits
        plain = load_pretrained(tmp_path / "base", device="cpu")(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    assert (ours - plain).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_convert_writes_the_merged_weights(run: Run, kind: dict[str, Any], tmp_path: Path) -> None:
    folder = adapter(tmp_path, **kind)
    merged = in_peft(tmp_path).merge_and_unload()
    for command in (["convert", "--to", "hf"], ["merge"]):
        out = tmp_path / command[0]
        assert run(*command, str(folder), str(out)).exit_code == 0
        written = LlamaForCausalLM.from_pretrained(out)
        for name, tensor in merged.state_dict().items():
            torch.testing.assert_close(written.state_dict()[name], tensor, rtol=0, atol=1e-5)
        assert not (out / "adapter_config.json").exists()
    result = run("convert", str(folder), str(tmp_path / "x.gguf"), "--to", "gguf")
    assert result.exit_code == 0, result.stderr
    ids = random_ids(2, 20)
    with torch.no_grad():
        got = load_pretrained(tmp_path / "x.gguf", device="cpu", quantize=None)(ids).logits
        torch.testing.assert_close(got, merged(ids).logits, rtol=0, atol=2e-4)


def test_a_quantized_base_keeps_its_blocks_where_nothing_is_added(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    base = load_pretrained(tmp_path / "base", device="cpu")
    shutil.rmtree(tmp_path / "base")
    write_gguf(tmp_path / "base", base.config, base.state_dict(), None, "q8_0")
    ids = random_ids(1, 20)
    with torch.no_grad():
        dense = load_pretrained(tmp_path / "base", device="cpu")
        load_adapter(dense, folder)
        stored = load_pretrained(folder, device="cpu", dtype=torch.float32, quantize="stored")
        torch.testing.assert_close(stored(ids).logits, dense(ids).logits, rtol=0, atol=0.01)
    assert open_checkpoint(folder).tensors["layers.0.attention.compute_query.weight"].blocks is None


def test_the_base_is_found_beside_the_adapter_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter(tmp_path, base=None)
    with pytest.raises(CheckpointError, match=r"adapter_config.json names no base model; name it"):
        open_checkpoint(folder)
    named = open_checkpoint(folder, base=tmp_path / "base")
    name_base(folder, "../base")
    assert open_checkpoint(folder).config == named.config
    name_base(folder, "base")  # as PEFT reads it: from where the command is run
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(folder).config == named.config
    assert open_checkpoint(folder / "adapter_model.safetensors").config == named.config
    shutil.copytree(tmp_path / "base", folder, dirs_exist_ok=True)  # a whole model beside it
    name_base(folder, str(folder))
    assert open_checkpoint(folder).format.startswith("PEFT adapter of 6 matrices on Hugging Face")


def test_what_is_wrong_with_the_base_is_one_line(run: Run, tmp_path: Path) -> None:
    folder = adapter(tmp_path, base="nobody/nothing")
    for command in ("info", "generate x -m", "chat -m"):
        result = run(*command.split(), str(folder))
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
        assert "its base model 'nobody/nothing' cannot be opened" in result.stderr
        assert "--base" in result.stderr
    name_base(folder, None)
    out = tmp_path / "x"
    result = run("convert", str(folder), str(out), "--to", "hf", "--base", str(folder))
    assert "it is an adapter itself" in result.stderr or "config.json" in result.stderr
    assert not out.exists()
    result = run("info", str(tmp_path / "base"), "--base", str(folder))
    assert "so it has no base" in result.stderr
    their_adapter(tmp_path / "other", target_modules=["q_proj"], r=3)
    file = tmp_path / "other" / "adapter" / "adapter_model.safetensors"
    shutil.copy(file, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit this model"):
        open_checkpoint(folder, base=tmp_path / "base")


def test_info_says_what_it_is_of(run: Run, tmp_path: Path) -> None:
    result = run("info", str(adapter(tmp_path)))
    assert result.exit_code == 0, result.stderr
    assert f"PEFT adapter of 6 matrices on Hugging Face, {tmp_path / 'base'}" in result.stdout


def test_a_classifiers_head_is_not_passed_over_in_silence(run: Run, tmp_path: Path) -> None:
    their_classifier(tmp_path, target_modules=["q_proj"])
    name_base(tmp_path / "adapter", str(tmp_path / "base"))
    with pytest.warns(
        CheckpointWarning, match="adapter of a sequence classifier; its head is ignored"
    ):
        checkpoint = open_checkpoint(tmp_path / "adapter")
    assert "score.weight" in checkpoint.ignored
    result = run("info", str(tmp_path / "adapter"))
    assert result.exit_code == 0
    assert "its head is ignored" in result.stderr
    (tmp_path / "adapter" / "classifier.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a classifier, not a generative model"):
        open_checkpoint(tmp_path / "adapter")
