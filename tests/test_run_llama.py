"""The classic script, every option from its files to its files."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import run_llama
from minllama.checkpoints.open import open_checkpoint
from minllama.generation.api import generate
from minllama.model.llama import load_pretrained
from minllama.tokenizer.tokenizer import Tokenizer
from minllama.training.run import TrainingRun
from tests.experiment_cases import examples, write_labelled
from tests.tiny import our_model

ROOT = Path(__file__).resolve().parent.parent
CLASSIC = """
    --option --train --dev --test --label-names --pretrained-model-path --max_sentence_len --seed
    --epochs --batch_size --lr --hidden_dropout_prob --use_gpu --dev_out --test_out
    --generated_sentence_low_temp_out --generated_sentence_high_temp_out
"""


@pytest.fixture
def files(tmp_path):
    """Numbered labels, as the course has them: train, dev, an unlabeled test, and names."""
    number = {"bad": 0, "good": 1}
    for name, n, seed in (("train", 24, 0), ("dev", 8, 1)):
        rows = [(number[label], text) for label, text in examples(n, seed=seed)]
        write_labelled(tmp_path / f"{name}.txt", rows)
    write_labelled(tmp_path / "test.txt", [(-1, text) for _, text in examples(6, seed=2)])
    (tmp_path / "names.json").write_text(json.dumps(number))
    return tmp_path


def run(folder, option, *arguments, model):
    given = ["--option", option, "--pretrained-model-path", str(model)]
    given += ["--train", str(folder / "train.txt"), "--dev", str(folder / "dev.txt")]
    given += ["--test", str(folder / "test.txt"), "--label-names", str(folder / "names.json")]
    given += ["--dev_out", str(folder / "dev.out"), "--test_out", str(folder / "test.out")]
    given += ["--generated_sentence_low_temp_out", str(folder / "low.out")]
    given += ["--generated_sentence_high_temp_out", str(folder / "high.out")]
    return run_llama.main([*given, "--output", str(folder / "run"), *map(str, arguments)])


def rows_of(path):
    """(label, text) of each line."""
    return [line.split(" ||| ", 1) for line in path.read_text().splitlines()]


def check_predictions(folder, labels=("0", "1")):
    for name in ("dev", "test"):
        given, lines = rows_of(folder / f"{name}.txt"), rows_of(folder / f"{name}.out")
        assert [text for _, text in lines] == [text for _, text in given]
        assert {label for label, _ in lines} <= set(labels)


def test_generate_writes_both_temperatures_and_repeats_with_a_seed(files, base, capsys):
    assert run(files, "generate", "--seed", 3, model=base) == 0
    low, high = (files / "low.out").read_text(), (files / "high.out").read_text()
    assert low.startswith(run_llama.STORY)
    assert high.startswith(run_llama.STORY)
    assert low != high
    assert low.strip() in capsys.readouterr().out
    assert run(files, "generate", "--seed", 3, model=base) == 0
    assert (files / "high.out").read_text() == high
    model = load_pretrained(base, device="cpu")
    words = Tokenizer.from_pretrained(base)
    ids = torch.tensor([words.encode(run_llama.STORY)])
    greedy = model.generate(ids, 5, temperature=0.0)[0].tolist()
    assert low.startswith(words.decode(greedy)[: len(run_llama.STORY) + 5])


@pytest.mark.slow
def test_without_a_path_it_is_the_default_model(default_model, tmp_path, capsys):
    outputs = ("--generated_sentence_low_temp_out", str(tmp_path / "low"))
    outputs += ("--generated_sentence_high_temp_out", str(tmp_path / "high"))
    assert run_llama.main(["--option", "generate", *outputs]) == 0
    model, words = load_pretrained(device="cpu"), Tokenizer.from_pretrained()
    expected = generate(model, words, [run_llama.STORY], max_new_tokens=75, temperature=0)
    assert (tmp_path / "low").read_text() == f"{run_llama.STORY}{expected[0].text}\n"


def test_prompt_says_the_likeliest_name_by_its_number(files, base, capsys):
    assert run(files, "prompt", model=base) == 0
    check_predictions(files)
    out = capsys.readouterr().out
    accuracy = float(re.search(r"dev: accuracy ([\d.]+)", out)[1])
    pairs = zip(rows_of(files / "dev.out"), rows_of(files / "dev.txt"), strict=True)
    right = sum(said == gold for said, gold in pairs)
    assert accuracy == pytest.approx(right / 8, abs=6e-4)
    assert "test: no labels to compare with" in out


@pytest.mark.parametrize("option", ["finetune", "lora"])
def test_training_predicts_with_what_it_has_learned(files, base, capsys, option):
    learning = ("--epochs", 3, "--lr", 5e-3, "--batch_size", 4, "--hidden_dropout_prob", 0.1)
    assert run(files, option, *learning, model=base) == 0
    check_predictions(files)
    assert re.search(r"dev: accuracy [\d.]+; predictions in", capsys.readouterr().out)
    saved = json.loads((files / "run" / "classifier.json").read_text())
    assert saved["weights"] == {"finetune": "full", "lora": "adapter"}[option]
    assert (saved["layer"], saved["pooling"], saved["dropout"]) == (2, "last", 0.1)
    assert saved["labels"] == ["bad", "good"]  # the files have numbers: --label-names was read
    first = (files / "dev.out").read_text()
    assert run(files, option, *learning, model=base) == 2  # the run is there
    assert "--force replaces it" in capsys.readouterr().err
    assert run(files, option, *learning, "--force", model=base) == 0
    assert (files / "dev.out").read_text() == first


def test_a_llama2c_checkpoint_with_the_llama_2_tokenizer(files, shared_data, tmp_path, capsys):
    model = our_model(vocab_size=32000, max_seq_len=64)
    names = {
        "compute_query": "wq",
        "compute_key": "wk",
        "compute_value": "wv",
        "compute_output": "wo",
    }
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = tensor
    state.setdefault("output.weight", state["tok_embeddings.weight"])
    config = model.config
    args = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": 16,
        "max_seq_len": 64,
        "hidden_dim": config.hidden_dim,
    }
    path = tmp_path / "stories.pt"
    torch.save({"model": state, "model_args": args}, path)
    words = ("--tokenizer", shared_data / "tokenizer.model", "--max_sentence_len", 40)
    assert open_checkpoint(path).config.n_layers == 2
    assert run(files, "prompt", *words, model=path) == 0, capsys.readouterr().err
    check_predictions(files)
    assert run(files, "lora", "--epochs", 1, *words, model=path) == 0, capsys.readouterr().err
    check_predictions(files)


def test_the_same_label_on_every_row_is_a_placeholder(files, base, capsys):
    write_labelled(files / "test.txt", [(0, text) for _, text in examples(6, seed=2)])
    assert run(files, "prompt", model=base) == 0
    assert "test: no labels to compare with" in capsys.readouterr().out


def test_what_is_left_out_is_said(files, base, capsys):
    lines = (files / "dev.txt").read_text()
    (files / "dev.txt").write_text("unknown ||| a label\n" + lines)
    assert run(files, "prompt", model=base) == 0
    captured = capsys.readouterr()
    assert "line 1: label 'unknown' is not one of 'bad', 'good'" in captured.err
    assert '[label words, score sum, temperature 1, prompt "{text} Is this movie' in captured.err
    assert "dev: no labels to compare with" in captured.out
    (files / "dev.txt").write_text(lines + "no separator\n")
    for option in ("prompt", "lora"):
        assert run(files, option, model=base) == 2
        assert "skip it with --skip-bad-rows" in capsys.readouterr().err
        assert run(files, option, "--label-names", "none.json", model=base) == 2
        assert "none.json: No such file" in capsys.readouterr().err
    assert run(files, "prompt", "--skip-bad-rows", model=base) == 0
    assert "bad rows skipped: 1" in capsys.readouterr().err
    assert len(rows_of(files / "dev.out")) == 8


@pytest.mark.parametrize("option", ["generate", "prompt", "finetune", "lora"])
@pytest.mark.parametrize("place", ["/proc/none/x", ".", "dev.txt"])
def test_what_cannot_be_written_is_found_before_the_work(files, capsys, monkeypatch, option, place):
    monkeypatch.chdir(files)
    before = (files / "dev.txt").read_bytes()
    name = "--generated_sentence_high_temp_out" if option == "generate" else "--test_out"
    assert run(files, option, name, place, model="is never read") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{name} dev.txt is a file of --dev" in error or "cannot write" in error
    assert (files / "dev.txt").read_bytes() == before
    assert not (files / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--option", "lora", "--train", "a", "--dev", "b", "--lr", "0"], "lr must be > 0"),
        (["--option", "prompt", "--dev", "b", "--label-names", "none.json"], "none.json: No such"),
        (
            ["--option", "lora", "--train", "a", "--dev", "b", "--max_sentence_len", "2"],
            "--max_sentence_len must be >= 4",
        ),
        (
            ["--option", "lora", "--train", "a", "--dev", "b", "--hidden_dropout_prob", "1.5"],
            "--hidden_dropout_prob must be in",
        ),
        (
            ["--option", "lora", "--train", "a", "--dev", "b", "--output", ""],
            "--output is empty",
        ),
        (["--option", "finetune"], "--option finetune needs --train FILE"),
        (["--option", "prompt"], "--option prompt needs --label-names FILE"),
        (["--pretrained-model-path", "nowhere/at/all.pt"], "nowhere/at/all.pt"),
        (["--option", "lora", "--train", "none.txt", "--dev", "none.txt"], "none.txt"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_llama.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_said(capsys):
    assert run_llama.main(["--use_gpu"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_help_is_quick_and_names_every_argument():
    done = subprocess.run(
        [sys.executable, "run_llama.py", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    for name in CLASSIC.split():
        assert name in done.stdout


def test_an_interrupted_training_says_how_it_goes_on(files, base, capsys, monkeypatch):
    take = TrainingRun._take_step

    def interrupted(self):
        if self.state.step == 2:
            raise KeyboardInterrupt
        take(self)

    monkeypatch.setattr(TrainingRun, "_take_step", interrupted)
    assert run(files, "lora", "--epochs", 1, "--batch_size", 8, model=base) == 130
    assert "--resume continues it" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(files, "lora", "--epochs", 1, "--batch_size", 8, "--resume", model=base) == 0
    check_predictions(files)


def test_an_interrupt_before_anything_is_kept_promises_nothing(files, base, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("minllama.experiment.train.load_splits", interrupted)
    assert run(files, "lora", model=base) == 130
    assert "--resume" not in capsys.readouterr().err


def test_characters_that_the_terminal_lacks_do_not_end_it(files, base):
    given = ("--option", "generate", "--pretrained-model-path", str(base))
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_llama.py"), *given],
        capture_output=True,
        cwd=files,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    written = [files / f"generated-sentence-temp-{t}.txt" for t in (0, 1)]
    assert any(not path.read_text("utf-8").isascii() for path in written)


def test_files_that_would_replace_one_another_are_refused(files, base, capsys):
    same = ("--dev_out", files / "x", "--test_out", files / "x")
    assert run(files, "lora", *same, model=base) == 2
    assert "--test_out and --dev_out are both" in capsys.readouterr().err
    assert run(files, "lora", "--dev_out", files / "names.json", model=base) == 2
    assert "is a file of --label-names" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--pretrained-model-path", "--tokenizer"])
@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_the_model_is_not_written_over(files, base, capsys, flag, name):
    copy = shutil.copytree(base, files / "model") / "model.safetensors"
    before = copy.read_bytes()
    given = ("--dev_out", copy, flag, copy.parent / name)
    assert run(files, "prompt", *given, model=base) == 2
    assert f"model.safetensors is a file of {flag}" in capsys.readouterr().err
    assert copy.read_bytes() == before
