"""The table of kernels: rules by instruction sets, and limits that are measured once."""

import json
import math
from math import inf

import pytest
import torch

from minllama.kernels import hardware
from minllama.kernels.cpu import calibration
from minllama.kernels.cpu.calibration import FORM
from minllama.kernels.cpu.library import library
from minllama.kernels.hardware import AVX2, AVX512, PORTABLE, choice

needs_library = pytest.mark.skipif(library() is None, reason="needs the compiled code")
NAME = calibration.QUANTIZED_BFLOAT16
DENSE = calibration.DENSE


@pytest.fixture
def measures(as_cpu, monkeypatch, tmp_path):
    """As on a processor with AVX512-BF16 that nobody states; how often it was measured."""
    as_cpu()
    monkeypatch.delenv(hardware.VARIABLE)
    hardware.stated.cache_clear()
    monkeypatch.setenv(hardware.CALIBRATE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration.sys, "platform", "linux")
    monkeypatch.setattr(calibration, "best_level", lambda: AVX512)
    for module in (calibration, hardware):
        monkeypatch.setattr(module, "fast_bfloat16", lambda device: True)
        monkeypatch.setattr(module, "has_amx", lambda dtype: False)
    calls = []

    def measured(names):
        calls.append(None)
        return {name: {NAME: 128.0, DENSE: 96.0}[name] for name in names}

    monkeypatch.setattr(calibration, "measure", measured)
    return calls


def forget():
    hardware.calibration.cache_clear()
    hardware.choice.cache_clear()


@needs_library
def test_a_machine_is_measured_once(measures, tmp_path):
    for _ in range(3):
        forget()
        found = choice("quantized", AVX512, torch.bfloat16)
        assert found.limit == 128
        assert found.reason.startswith("measured here")
    assert len(measures) == 1
    (path,) = (tmp_path / "minllama").iterdir()
    content = json.loads(path.read_text())
    assert content["limits"] == {NAME: 128, DENSE: 96}
    assert hardware.processor() in content["machine"]
    path.unlink()  # which is safe
    forget()
    assert choice("quantized", AVX512, torch.bfloat16).limit == 128
    assert len(measures) == 2


@needs_library
@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", json.dumps({"form": FORM}), "\x00" * 200_000, "[" * 90_000),
        json.dumps({"form": FORM, "machine": "another", "limits": {NAME: 64, DENSE: 64}}),
        "another name",
        "no such size",
        "of another form",
    ],
)
def test_a_file_that_is_none_is_measured_again(measures, tmp_path, content):
    choice("quantized", AVX512, torch.bfloat16)
    (path,) = (tmp_path / "minllama").iterdir()
    if content == "no such size":
        content = path.read_text().replace("128", "129")
    elif content == "another name":
        content = path.read_text().replace(DENSE, "other")
    elif content == "of another form":
        content = path.read_text().replace(f'"form": {FORM}', '"form": 1')
    whole = path.read_text()
    path.write_text(content)
    forget()
    assert choice("quantized", AVX512, torch.bfloat16).limit == 128
    assert len(measures) == 2
    assert path.read_text() == whole


@needs_library
def test_a_folder_that_cannot_be_written_is_no_error(measures, tmp_path):
    (tmp_path / "minllama").write_text("a file where the folder would be")
    assert choice("quantized", AVX512, torch.bfloat16).limit == 128


@needs_library
def test_other_threads_are_another_machine(measures, tmp_path):
    choice("quantized", AVX512, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        forget()
        choice("quantized", AVX512, torch.bfloat16)
    finally:
        torch.set_num_threads(threads)
    assert len(list((tmp_path / "minllama").iterdir())) == len(measures) == 2


@needs_library
def test_it_can_be_turned_off(measures, monkeypatch, tmp_path):
    monkeypatch.setenv(hardware.CALIBRATE, "0")
    assert choice("quantized", AVX512, torch.bfloat16).limit == 192
    assert not measures
    assert not (tmp_path / "minllama").exists()


@needs_library
@pytest.mark.parametrize("features", [[], ["bf16"], ["amx"]])
def test_a_stated_processor_is_not_measured(as_cpu, monkeypatch, features):
    as_cpu(*features)
    monkeypatch.setenv(hardware.CALIBRATE, "")
    monkeypatch.setattr(calibration, "measure", None)
    assert hardware.calibration() == {}


@needs_library
def test_where_the_processor_multiplies_no_bfloat16_only_float32_is_measured(measures, monkeypatch):
    monkeypatch.setattr(calibration, "fast_bfloat16", lambda device: False)
    assert hardware.calibration() == {DENSE: 96}
    assert choice("dense", AVX512).limit == 96
    assert choice("dense", AVX512).reason == "measured here: torch's float32 products win beyond"
    for name in ("dense pass", "dense step", "upcast"):
        assert choice(name, AVX512).limit == inf


@needs_library
@pytest.mark.parametrize("name", [NAME, DENSE])
@pytest.mark.parametrize(
    ("slower_from", "limit"), [(32, 16), (48, 32), (96, 64), (512, 384), (513, inf)]
)
def test_the_limit_is_below_the_first_size_at_which_torch_wins(
    monkeypatch, name, slower_from, limit
):
    ours = (calibration.ops.quantized_matmul, calibration.ops.dense_matmul)

    def took(work):
        (rows,) = {len(x) for x in work.args if x is not weight_of(work)}
        return 1.0 if (work.func in ours) == (rows < slower_from) else 2.0

    def weight_of(work):
        return work.args[1] if work.func is torch.nn.functional.linear else work.args[0]

    monkeypatch.setattr(calibration, "_seconds", took)
    assert calibration.measure([name]) == {name: limit}


@needs_library
def test_both_kernels_that_are_timed_compute_the_same():
    weight = calibration._Matrix()
    x = torch.randn(32, calibration.IN, generator=torch.Generator().manual_seed(1))
    integers = calibration.ops.quantized_matmul(weight, x)
    products = calibration._dequantized(weight, x.bfloat16()).float()
    assert (integers - products).abs().max() < 0.02 * integers.abs().max()


@pytest.mark.parametrize(
    ("level", "features", "expected"),
    [
        (PORTABLE, [], {"quantized": 32, "quantized pass": 32, "dense step": 32, "attention": 64}),
        (PORTABLE, [], {"dense": 16, "upcast": 16}),
        (AVX2, [], {"quantized": inf, "quantized pass": inf, "dense step": inf, "attention": 512}),
        (AVX2, [], {"dense": inf, "upcast": inf}),
        (AVX512, [], {"quantized": inf, "dense step": inf, "dense pass": inf, "attention": 64}),
        (AVX512, ["bf16"], {"quantized": 192, "quantized pass": inf, "dense pass": 32}),
        (AVX512, ["amx"], {"quantized": 32, "quantized pass": inf, "dense step": inf}),
        (AVX2, ["amx"], {"quantized": 32, "quantized pass": 32, "dense pass": 32}),
    ],
)
def test_rules_by_instruction_sets(as_cpu, level, features, expected):
    as_cpu(*features)
    found = {name: choice(name, level, torch.bfloat16) for name in expected}
    assert {name: chosen.limit for name, chosen in found.items()} == expected
    for chosen in found.values():
        assert chosen.reason
        assert math.isinf(chosen.limit) == chosen.size.startswith("any number of ")
