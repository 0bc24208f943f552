"""`minllama bench`: what it measures, prints, writes and compares, and what it refuses."""

import json
import statistics
from types import SimpleNamespace

import pytest
import torch

from minllama import cli
from minllama.benchmark import BenchmarkResult, Measurement, read_result
from minllama.benchmark.machine import commit_of, processor
from minllama.benchmark.measurements import texts
from minllama.benchmark.table import rate, rows
from minllama.errors import MinllamaError, OptionError
from minllama.options.benchmark import BenchmarkOptions

FEW = ("--repetitions", 2, "--prompt-tokens", 20, "--new-tokens", 4, "--contexts", "30,9000")
NAMES = [
    *("prefill, 20 tokens", "decode, short prompt", "decode behind 30 tokens"),
    *("decode behind 9,000 tokens", "decode, 3 sequences", "zero-shot, five labels"),
    "LoRA, batches of 16",
]


@pytest.fixture
def run(capfd, base):
    """Call `minllama bench` on the tiny model: its status, and what it prints."""

    def call(*args):
        with pytest.raises(SystemExit) as ended:
            cli.main(["bench", str(base), "--device", "cpu", *map(str, args)])
        captured = capfd.readouterr()
        return SimpleNamespace(status=ended.value.code, out=captured.out, err=captured.err)

    return call


@pytest.fixture(scope="module")
def written(base, tmp_path_factory):
    """The JSON that a run of everything wrote, of the tiny model."""
    from minllama.benchmark import run_benchmark
    from minllama.options.loading import LoadOptions

    options = BenchmarkOptions(
        repetitions=2, prompt_tokens=20, new_tokens=4, contexts="30,9000", batch_size=3
    )
    result = run_benchmark(str(base), LoadOptions(device="cpu", quantize="auto"), options)
    path = tmp_path_factory.mktemp("bench") / "result.json"
    path.write_text(result.to_json())
    return path


def test_everything_is_measured_as_often_as_said(written):
    content = json.loads(written.read_text())
    assert [one["name"] for one in content["measurements"]] == NAMES
    for one in content["measurements"]:
        if one["name"] == "decode behind 9,000 tokens":  # the tiny model's context is shorter
            assert one["values"] == []
            assert one["note"].startswith("needs 9,004 tokens, and the model has ")
            continue
        assert len(one["values"]) == 2
        assert one["median"] == pytest.approx(statistics.mean(one["values"]))
        assert min(one["values"]) > 0
    assert content["machine"]["processor"] == processor()
    assert content["peak_bytes"] > 50e6
    assert read_result(written).to_json() == written.read_text()


def test_a_run_is_set_beside_an_earlier_one(run, written, tmp_path):
    earlier = json.loads(written.read_text())
    for one in earlier["measurements"]:
        one["values"] = [value / 2 for value in one["values"]]
        one["median"] = one["median"] / 2 if one["values"] else None
    earlier["machine"]["processor"] = "another one"
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(earlier))
    output = tmp_path / "now.json"
    result = run("--tests", "prefill", *FEW, "--compare", path, "--output", output)
    assert result.status == 0, result.err
    (measured,) = json.loads(output.read_text())["measurements"]
    ratio = measured["median"] / earlier["measurements"][0]["median"]
    (line,) = (line for line in result.out.splitlines() if line.startswith("prefill"))
    assert f"{ratio:.2f}" in line
    assert "before another one" in result.out
    # What only the earlier run has is shown as well.
    assert any(line.startswith("decode, 3 sequences") for line in result.out.splitlines())
    table = run("--tests", "prefill", *FEW, "--compare", path, "--markdown")
    assert "| now | [min, max] | before | [min, max] | ratio |" in table.out


def test_formats_are_measured_interleaved(base, monkeypatch):
    from minllama.benchmark import measurements, run_benchmark
    from minllama.options.loading import LoadOptions

    seen = []

    def rate(llama, prompt):
        seen.append((llama.quantize, llama.dtype))
        return 1.0

    monkeypatch.setattr(measurements, "prefill_rate", rate)
    options = BenchmarkOptions(
        tests="prefill", formats="int8, float32,int4", repetitions=2, prompt_tokens=20
    )
    result = run_benchmark(str(base), LoadOptions(device="cpu", quantize="auto"), options)
    names = [f"prefill, 20 tokens, {name}" for name in ("int8", "float32", "int4")]
    assert [one.name for one in result.measurements] == names
    assert result.weights == "int8, float32, int4"
    assert seen == 3 * [(name, torch.float32) for name in ("int8", None, "int4")]


def test_json_is_the_whole_output(run):
    result = run("--tests", "decode", *FEW, "--json")
    assert result.status == 0, result.err
    assert [one["name"] for one in json.loads(result.out)["measurements"]] == [NAMES[1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tests", "prefill,fast"], "tests must be some of prefill, decode, context"),
        (["--tests", ","], "tests must be some of"),
        (["--contexts", "512,0"], "contexts must be integers above 0"),
        (["--contexts", "-1"], "contexts must be integers above 0"),
        (["--repetitions", "0"], "repetitions must be >= 1, not 0"),
        (["--json", "--markdown"], "give one of them"),
        (["--json", "--compare", "x"], "--compare is for tables"),
        (["--output", "/nowhere/there/x.json"], "name a file in a folder that exists"),
        (["--compare", "/nowhere/x.json"], "cannot be read"),
        (["--formats", "int8,q4"], "formats must be some of auto, stored, int8, int4, float32"),
        (["--formats", "int8", "--quantize", "int4"], "omit --quantize and --dtype"),
        (["--formats", "int8", "--dtype", "float32"], "omit --quantize and --dtype"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(run, options, message):
    result = run(*options)
    assert result.status == 2
    assert result.out == ""
    assert message in result.err
    assert len(result.err.strip().splitlines()) <= 4  # click names the command as well


@pytest.mark.parametrize(
    "text", ["", "[]", '{"form": 2}', '{"form": 1, "model": 1}', "[" * 10000, "\0", '{"form": NaN}']
)
def test_other_files_are_no_results(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(MinllamaError, match="not a result of minllama bench"):
        read_result(path)


@pytest.mark.parametrize("values", [[], [0.0], [-1.0], [float("nan")], ["x"], [None]])
def test_rates_that_cannot_be_are_refused(written, tmp_path, values):
    content = json.loads(written.read_text())
    content["measurements"][0]["values"] = values
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(MinllamaError, match="not a result of minllama bench"):
        read_result(path)


def test_medians_and_ranges_in_a_table():
    now = BenchmarkResult("m", "int4", {}, (Measurement("a", "texts/s", (10.0, 30.0, 11.0)),))
    old = BenchmarkResult("m", "int4", {}, (Measurement("a", "texts/s", (5.0, 5.5, 90.0)),))
    assert list(rows(now, None)) == [("a", "11", "[10, 30]", "texts/s")]
    assert list(rows(now, old)) == [("a", "11", "[10, 30]", "5.5", "[5, 90]", "2.00", "texts/s")]
    assert [rate(value) for value in (7.424, 74.24, 742.4, 7424)] == [
        "7.42",
        "74.2",
        "742",
        "7,424",
    ]


def test_texts_are_different_ones():
    assert len(set(texts(200))) == 200
    assert texts(200)[:16] == texts(16)


def test_the_commit_of_a_checkout(tmp_path):
    import subprocess

    assert commit_of(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert commit_of(tmp_path) is None  # there is none yet
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    clean = commit_of(tmp_path)
    assert clean is not None
    assert len(clean) >= 7
    (tmp_path / "file").write_text("2")
    assert commit_of(tmp_path) == clean + "+"


def test_options_are_checked_in_python_too():
    assert BenchmarkOptions(tests=" decode ,batch,decode").chosen_tests == ("decode", "batch")
    assert BenchmarkOptions(contexts="1, 20").context_lengths == (1, 20)
    with pytest.raises(OptionError, match="contexts must be"):
        BenchmarkOptions(contexts="٣")
