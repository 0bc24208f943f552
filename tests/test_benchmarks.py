"""The benchmarks' own code: what they print of what they measured, and the GPU's on a CPU."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """A benchmark by its name, as a script sees the others."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in (
        "contenders",
        "speed",
        "written",
        "weight_files",
        "gpu",
        "results",
        "result_files",
    ):
        sys.modules.pop(name, None)


def test_the_gpus_rows_are_measured_where_there_is_a_device(module, monkeypatch, capsys):
    gpu = module("gpu")
    small = {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "hidden_dim": 64}
    monkeypatch.setattr(gpu, "SHAPE", {**gpu.SHAPE, **small, "vocab_size": 97, "max_seq_len": 64})
    monkeypatch.setattr(gpu, "BATCHES", (1, 3))
    monkeypatch.setattr(gpu, "PROMPT", 12)
    monkeypatch.setattr(gpu, "NEW", 5)
    monkeypatch.setattr(gpu, "bandwidth", lambda device: 1e9)
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--device", "cpu", "--layers", "1", "--rounds", "1"]
    )
    gpu.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [
        (f"| {task}, batch {batch}, tokens/s", kept)
        for kept in ("bfloat16", "8 bits", "4 bits")
        for batch in (1, 3)
        for task in ("decode", "prefill")
    ]
    assert all(float(row[2]) > 0 and float(row[3]) > 0 for row in rows)
    # The table is rounded to four and two places.
    assert all(
        float(row[4]) == pytest.approx(float(row[2]) / float(row[3]), rel=0.01, abs=0.006)
        for row in rows
    )


def test_without_a_gpu_it_is_said(module, monkeypatch, capsys):
    gpu = module("gpu")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpu.main()
    assert capsys.readouterr().out.count("not measured: no GPU") == 4


def test_a_ratio_is_of_medians_and_less_may_be_better(module):
    speed = module("speed")
    found = {
        "decode minllama": [{"value": v, "peak": 1} for v in (200, 10, 300)],
        "decode llama.cpp": [{"value": v, "peak": 1} for v in (100, 90, 110)],
        "process minllama": [{"value": 0, "peak": 2e9, "seconds": 2.0}],
        "process transformers-bfloat16": [{"value": 0, "peak": 3e9, "seconds": 5.0}],
    }
    rows = {(aim.task, aim.field): (a, b, ratio) for aim, a, b, ratio in speed.rows_of(found)}
    assert rows == {
        ("decode", "value"): (200, 100, 2.0),
        ("process", "seconds"): (2.0, 5.0, 2.5),
        ("process", "peak"): (2e9, 3e9, 1.5),
    }


def test_an_aim_may_be_a_limit_of_its_own(module):
    aims = {(aim.task, aim.field, aim.theirs): aim for aim in module("speed").AIMS}
    opened = aims["open", "value", "transformers"]
    assert str(opened) == "<= 1"
    assert opened.is_met(0.9, 0.5)
    assert not opened.is_met(15.0, 1.08)
    peak = aims["process", "peak", "transformers-bfloat16"]
    assert peak.is_met(0.58e9, 1.2)
    assert not peak.is_met(0.65e9, 1.2)
    assert not aims["decode", "value", "llama.cpp"].is_met(300.0, 1.4)


def test_a_contender_of_ours_that_fails_is_no_fast_one(module, monkeypatch, capsys, tmp_path):
    contenders, speed = module("contenders"), module("speed")
    shown = sys.stdout
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(contenders, "FOLDER", Path("/nonexistent"))
    with pytest.raises(SystemExit) as ended:
        contenders.whole_ours()
    sys.stdout.close()  # the null device, which it writes to
    sys.stdout = shown
    assert ended.value.code == 2
    fine = {"value": 1.0, "peak": 1.0, "seconds": 1.0}
    results = {"minllama": {}, "peft": fine, "transformers-float32": {}}
    monkeypatch.setattr(speed, "measure", lambda task, who: results.get(who, {}))
    monkeypatch.setattr(speed, "make_weights", lambda: None)
    for task, who, status in (
        ("lora-float32", "minllama", 1),
        ("lora-float32", "minllama-blocks", 1),
        ("lora-float32", "peft", 0),
        ("decode", "transformers-float32", 0),
    ):
        monkeypatch.setattr(sys, "argv", ["speed.py", task, "--beside", who])
        monkeypatch.setattr(contenders, "DATA", tmp_path)
        assert speed.main() == status
        said = f"failed, at least once: {task} {who}" in capsys.readouterr().out
        assert said == (results.get(who) is not fine)


def test_every_row_is_of_tasks_and_contenders_that_there_are(module):
    contenders, speed = module("contenders"), module("speed")
    for aim in speed.AIMS:
        assert aim.ours in contenders.TASKS[aim.task], aim
        assert aim.theirs in contenders.TASKS[aim.their_task or aim.task], aim


def test_a_whole_run_is_written_as_a_page(module, monkeypatch, capsys, tmp_path):
    contenders, speed, written = module("contenders"), module("speed"), module("written")
    values = iter((10.0, 100.0, 14.0, 90.0, 12.0, 110.0))
    monkeypatch.setattr(
        speed,
        "measure",
        lambda task, who: {"value": next(values), "peak": 1.0, "seconds": 1.0},
    )
    for name in ("make_weights", "make_gguf_files"):
        monkeypatch.setattr(speed, name, lambda: None)
    monkeypatch.setattr(contenders, "TASKS", {"prefill-Q4_0": {"minllama": 0, "llama.cpp": 0}})
    monkeypatch.setattr(written.page_path, "__defaults__", (tmp_path / "benchmarks",))
    monkeypatch.setattr(sys, "argv", ["speed.py", "--rounds", "3"])
    assert speed.main() == 0
    (path,) = (tmp_path / "benchmarks").iterdir()
    name = re.fullmatch(r"\d{4}-\d\d-\d\d_([a-z0-9-]+)-2-threads\.md", path.name)
    assert name is not None
    text = path.read_text()
    row = (
        "| prefill, 512 tokens (Q4_0), tokens/s | llama.cpp | 12 [10, 14] | 100 [90, 110] | 0.12 |"
    )
    assert f"{row} >= 1.5, missed |" in text.splitlines()
    assert f"- torch: {torch.__version__}" in text.splitlines()
    assert text in capsys.readouterr().out


def test_some_tasks_are_no_page(module, monkeypatch, tmp_path):
    speed, written = module("speed"), module("written")
    monkeypatch.setattr(speed, "measure", lambda task, who: {})
    monkeypatch.setattr(speed, "make_weights", lambda: None)
    monkeypatch.setattr(written.page_path, "__defaults__", (tmp_path / "benchmarks",))
    monkeypatch.setattr(sys, "argv", ["speed.py", "adamw", "--rounds", "1"])
    speed.main()
    assert not (tmp_path / "benchmarks").exists()


def results_file(path, results, wording, groups=("train",)):
    about = {"groups": groups, "machine": {"torch": "2.13"}}
    path.write_text(json.dumps({"about": about, "results": results, "wording": wording}))
    return str(path)


def test_results_that_differ_are_told_by_key_and_wording_may_differ(
    module, monkeypatch, capsys, tmp_path
):
    results = module("results")
    before = {"train a": [{"ids": [1, 2]}, {"ids": [3, 4]}], "train b": {"p": 0.5}, "train c": "x"}
    after = {"train a": [{"ids": [1, 2]}, {"ids": [3, 5, 6]}], "train b": {"p": 0.5 + 1e-7}}
    first = results_file(tmp_path / "a", before, {"train a page": ["one"], "train b page": ["b"]})
    second = results_file(tmp_path / "b", after, {"train a page": ["two"], "train b page": ["b"]})
    words = results_file(tmp_path / "c", before, {"train a page": ["two"], "train b page": ["b"]})

    def compared(*arguments):
        monkeypatch.setattr(sys, "argv", ["results.py", "--compare", *arguments])
        return results.main(), capsys.readouterr().out.splitlines()

    same = ["results: 0 of 3 keys differ", "wording: 0 of 2 keys differ"]
    assert compared(first, first) == (0, same)
    page = '  train a page: [0]: "one" -> "two"'
    assert compared(first, words) == (0, [same[0], "wording: 1 of 2 keys differ", page])
    status, lines = compared(first, second)
    assert status == 1
    assert lines == [
        "results: 3 of 3 keys differ",
        "  train a: [1].ids[1]: 4 -> 5 (2 places, numbers by up to 1)",
        "  train b: .p: 0.5 -> 0.5000001 (numbers by up to 1e-07)",
        '  train c: all: "x" -> "(missing)"',
        "wording: 1 of 2 keys differ",
        page,
    ]
    assert compared(first, second, "--tolerance", "1e-6")[1][:3] == [
        "results: 2 of 3 keys differ", lines[1], lines[3],
    ]  # fmt: skip


def test_only_groups_that_both_have_run_are_compared(module, monkeypatch, capsys, tmp_path):
    results = module("results")
    both = {"train a": 1, "help a": 2}
    first = results_file(tmp_path / "a", both, {}, ("train", "help"))
    second = results_file(tmp_path / "b", {"train a": 1}, {})
    monkeypatch.setattr(sys, "argv", ["results.py", "--compare", first, second])
    assert results.main() == 0
    assert capsys.readouterr().out.splitlines()[0] == "results: 0 of 1 keys differ"


def test_what_a_run_alone_has_is_masked_and_sentences_are_wording(module, tmp_path):
    files = module("result_files")
    found = files.Results(tmp_path)
    found.add_json(
        "train x",
        {"seconds": 3.2, "verdict": "Right on 2.", "model": f"{tmp_path}/base", "accuracy": 0.25},
    )
    found.add_text("train x stderr", "[prefill 4 tokens, 125.8 tokens/s]\n2 texts in 3.2 seconds\n")
    assert found.values == {
        "train x": {"seconds": "...", "verdict": "...", "model": "FOLDER/base", "accuracy": 0.25}
    }
    assert found.wording == {
        "train x verdict": ["Right on 2."],
        "train x stderr": ["[prefill 4 tokens, N tokens/s]", "2 texts in TIME"],
    }


def test_a_tensor_that_differs_is_named(module, tmp_path):
    files = module("result_files")
    one, other = torch.arange(6.0).view(2, 3), torch.zeros(2)
    save_file({"a": one, "b": other}, tmp_path / "model.safetensors")
    before = files.tensors_of(tmp_path / "model.safetensors")
    save_file({"a": one, "b": other + 1}, tmp_path / "model.safetensors")
    after = files.tensors_of(tmp_path / "model.safetensors")
    assert before["a"] == after["a"]
    assert before["a"].startswith("F32 [2, 3] ")
    assert {name for name in before if before[name] != after[name]} == {"", "b"}
