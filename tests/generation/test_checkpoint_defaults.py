"""Sampling defaults of a checkpoint: shown, used on request, read as transformers reads them."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import minllama
from minllama import cli
from minllama.checkpoints.gguf import write_gguf
from minllama.checkpoints.open import open_checkpoint
from minllama.errors import CheckpointError, OptionError
from minllama.generation.checkpoint_defaults import load_generation_options, sampling_defaults
from minllama.options import GenerationOptions
from tests.tiny import our_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    our_model().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def says(folder: Path, **content: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "content",
    [
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        {"do_sample": True},
        {"do_sample": True, "temperature": None, "top_k": 0, "top_p": None, "min_p": 0.05},
        {"do_sample": True, "top_k": 3, "eos_token_id": [1, 2], "repetition_penalty": 1.1},
        {"do_sample": False, "temperature": 0.7, "top_p": 0.5, "repetition_penalty": 1.3},
        {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 7},
        {"do_sample": None, "temperature": 0.6, "repetition_penalty": None},
    ],
)
def test_defaults_are_those_that_transformers_generates_with(
    content: dict[str, Any], folder: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GenerationConfig.from_pretrained(says(folder, **content))
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1,
        )
    )  # fmt: skip
    model.generation_config = theirs
    prepared, _ = model._prepare_generation_config(None)
    ours = load_generation_options(folder)
    assert (ours.temperature != 0) == bool(prepared.do_sample)
    if prepared.do_sample:
        assert ours.temperature == prepared.temperature
        assert ours.top_k == (prepared.top_k or 0)
        assert ours.top_p == prepared.top_p
        assert ours.min_p == (prepared.min_p or 0.0)
    assert ours.repetition_penalty == (prepared.repetition_penalty or 1.0)
    assert ours.max_new_tokens == (prepared.max_new_tokens or GenerationOptions().max_new_tokens)


def test_settings_of_samples_that_none_is_drawn_by_are_named(folder: Path) -> None:
    says(folder, temperature=0.7, top_p=0.5, repetition_penalty=1.2)
    assert str(sampling_defaults(open_checkpoint(folder))) == (
        "the most likely token, repetition_penalty 1.2; without effect, as do_sample is not true: "
        "temperature, top_p"
    )


def test_what_is_given_comes_before_what_the_checkpoint_says(folder: Path) -> None:
    says(folder, do_sample=True, temperature=0.6, top_p=0.9, stop_strings="END")
    options = minllama.load_generation_options(folder, top_p=0.5, seed=1)
    assert options == GenerationOptions(temperature=0.6, top_k=50, top_p=0.5, stop=("END",), seed=1)
    with pytest.raises(OptionError, match="top_p must be in"):
        load_generation_options(folder, top_p=2.0)


def test_a_checkpoint_that_says_nothing_changes_nothing(folder: Path) -> None:
    says(folder, eos_token_id=[1, 2], bos_token_id=1, transformers_version="5", max_length=4096)
    assert sampling_defaults(open_checkpoint(folder)) is None
    assert load_generation_options(folder) == GenerationOptions()
    (folder / "generation_config.json").unlink()
    assert load_generation_options(folder, seed=1) == GenerationOptions(seed=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"do_sample": true, "temperature": "warm"}', "temperature must be a number >= 0, not"),
        ('{"do_sample": true, "temperature": NaN}', "temperature must be a finite number"),
        ('{"do_sample": true, "top_k": 1.5}', "top_k must be an integer >= 0, not 1.5"),
        ('{"do_sample": true, "top_p": 7}', "top_p must be in (0, 1], not 7.0"),
        ('{"do_sample": "\\u001b[31myes"}', "do_sample is '\\x1b[31myes', not true or false"),
        ('{"do_sample": 1}', "do_sample is 1, not true or false"),
        ('{"stop_strings": [1], "do_sample": false}', "stop must be a list of strings"),
        ("[]", "not a JSON object"),
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line_with_the_file(
    content: str, message: str, folder: Path
) -> None:
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        load_generation_options(folder)
    assert message in str(caught.value)
    assert "generation_config.json: " in str(caught.value)
    assert str(caught.value).isprintable()


def test_gguf_files_say_it_in_fields_of_their_own(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = our_model()
    write_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), None)
    assert sampling_defaults(open_checkpoint(tmp_path / "m.gguf")) is None
    said = {"temp": 0.6, "top_p": 0.95, "penalty_repeat": 1.1, "xtc_probability": 0.5}
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    writer = gguf.GGUFWriter(tmp_path / "n.gguf", "llama")
    for field in reader.fields.values():
        if field.name.startswith("llama."):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for name, value in said.items():
        writer.add_float32(f"general.sampling.{name}", value)
    writer.add_int32("general.sampling.top_k", 20)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert load_generation_options(tmp_path / "n.gguf") == GenerationOptions(
        temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.1
    )
    defaults = sampling_defaults(open_checkpoint(tmp_path / "n.gguf"))
    assert str(defaults).endswith("; not supported here: xtc_probability 0.5")


@pytest.fixture
def run(capfd: Any, monkeypatch: Any) -> Any:
    def call(*args: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # noqa: SIM115
        with pytest.raises(SystemExit) as ended:
            cli.main([str(arg) for arg in args])
        sys.stdin.close()
        captured = capfd.readouterr()
        return int(str(ended.value.code)), captured.out, captured.err

    return call


def test_the_command_line_shows_and_uses_them(run: Any, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(base, folder)
    say = json.loads((folder / "generation_config.json").read_text())
    says(folder, **say)
    given = ("generate", "a", "-m", folder, "--max-new-tokens", 9, "--seed", 1)
    status, _, err = run(*given, "--generation-config")
    assert status == 2
    assert "m recommends no sampling options; omit it" in err
    assert "sampling" not in run("info", folder)[1]
    says(folder, **say, do_sample=True, temperature=5.0, top_k=7, num_beams=4, typical_p=1.0)
    shown = "temperature 5, top_k 7; not supported here: num_beams 4"
    assert f"sampling     {shown} (with --generation-config)\n" in run("info", folder)[1]
    status, out, err = run(*given, "--generation-config")
    assert status == 0, err
    assert f"sampling options of {folder}/generation_config.json: {shown}\n" in err
    assert out == run(*given, "--temperature", 5, "--top-k", 7)[1]
    assert out != run(*given)[1]
    top_p = run(*given, "--generation-config", "--top-p", 0.5)
    assert top_p[1] == run(*given, "--temperature", 5, "--top-k", 7, "--top-p", 0.5)[1]
    greedy = run(*given, "--generation-config", "--temperature", 0)
    assert greedy[:2] == (0, run(*given)[1])
    status, _, err = run(*given, "--generation-config", "--temperature", 0, "--top-p", 0.5)
    assert (status, "filter samples, but at temperature 0 nothing is sampled" in err) == (2, True)
    (folder / "generation_config.json").write_text('{"do_sample": 3}')
    assert "do_sample is 3" in run("info", folder)[1]


def test_tensors_are_not_read_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(folder, do_sample=True)
    monkeypatch.setattr(torch, "empty", None)
    assert load_generation_options(folder).top_k == 50


# What `convert` carries


SAYS = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "num_beams": 4,
    "stop_strings": ["\n\n"],
    "max_new_tokens": 7,
    "pad_token_id": 999,
    "transformers_version": "4.1",
}


def test_convert_carries_a_folders_settings_to_folders(
    run: Any, base: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "m")
    ids = json.loads((base / "generation_config.json").read_text())
    says(tmp_path / "m", **SAYS, bos_token_id=77)
    assert run("convert", tmp_path / "m", tmp_path / "out", "--to", "hf")[0] == 0
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    not_carried = ("pad_token_id", "transformers_version")
    kept = {name: value for name, value in SAYS.items() if name not in not_carried}
    assert written == {**kept, **{n: ids[n] for n in ("bos_token_id", "eos_token_id")}}
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (theirs.do_sample, theirs.temperature, theirs.num_beams) == (True, 0.6, 4)
    both = [sampling_defaults(open_checkpoint(tmp_path / name)) for name in ("m", "out")]
    assert both[0].options == both[1].options


@pytest.mark.slow
def test_convert_carries_them_to_gguf_and_back(run: Any, base: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    shutil.copytree(base, tmp_path / "m")
    says(tmp_path / "m", do_sample=True, temperature=0.6, top_p=1, repetition_penalty=1.1)
    for source, target, to in (("m", "a.gguf", "gguf"), ("a.gguf", "b.gguf", "gguf")):
        assert run("convert", tmp_path / source, tmp_path / target, "--to", to)[0] == 0
    for name in ("a.gguf", "b.gguf"):
        fields = gguf.GGUFReader(tmp_path / name).fields
        found = {
            key.removeprefix("general.sampling."): (field.contents(), field.types[0].name)
            for key, field in fields.items()
            if key.startswith("general.sampling.")
        }
        # Without a word on top_k transformers takes the likeliest fifty.
        assert found == {
            "temp": (pytest.approx(0.6), "FLOAT32"),
            "top_k": (50, "INT32"),
            "top_p": (1.0, "FLOAT32"),
            "penalty_repeat": (pytest.approx(1.1), "FLOAT32"),
        }
    assert run("convert", tmp_path / "b.gguf", tmp_path / "back", "--to", "hf")[0] == 0
    options = GenerationOptions(temperature=0.6, top_k=50, top_p=1.0, repetition_penalty=1.1)
    for name in ("m", "a.gguf", "b.gguf", "back"):
        assert load_generation_options(tmp_path / name) == options


@pytest.mark.parametrize(
    ("content", "warns"),
    [
        ({}, False),
        ({"temperature": 0.6}, False),  # of no effect, as nothing says do_sample
        ({"do_sample": False, "top_k": 3}, False),
        ({"do_sample": True, "temperature": -1}, True),
        ({"do_sample": True, "top_k": "many"}, True),
        ({"do_sample": 3}, True),
    ],
)
def test_what_draws_no_samples_is_not_written_to_gguf(
    content: dict[str, Any], warns: bool, run: Any, base: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "m")
    says(tmp_path / "m", **content)
    status, _, err = run("convert", tmp_path / "m", tmp_path / "a.gguf", "--to", "gguf")
    assert status == 0, err
    assert ("none are written to the GGUF file" in err) == warns
    assert sampling_defaults(open_checkpoint(tmp_path / "a.gguf")) is None


def test_an_adapter_samples_as_its_base(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from tests.peft_model import their_adapter

    their_adapter(tmp_path, target_modules=["q_proj"])
    says(tmp_path / "base", do_sample=True, temperature=0.5)
    name = {"base_model_name_or_path": str(tmp_path / "base")}
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **name}))
    assert load_generation_options(tmp_path / "adapter").temperature == 0.5
    says(tmp_path / "adapter", do_sample=True, temperature=0.25)
    assert load_generation_options(tmp_path / "adapter").temperature == 0.25
