"""Time, cost and limits of a job, beside sums done by hand; and the command."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from minllama.checkpoints.huggingface import write_huggingface
from minllama.cli.plan import command
from minllama.errors import OptionError
from minllama.model.config import LlamaConfig
from minllama.options.planning import PlanOptions, size_of
from minllama.planning import plan_job
from minllama.planning.job import exchanged_bytes
from tests.tiny import our_model

# Llama 2 7B, whose card says 6.74 billion parameters.
SHAPE = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
CONFIG = LlamaConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=128, vocab_size=100)
# Two layers of 4 x 64 x 64 + 3 x 64 x 128 + 2 x 64, embeddings 100 x 64 twice, and a norm.
LAYERS, WORDS, NORM = 2 * (16384 + 24576 + 128), 6400, 64


def test_labeling_takes_rows_by_rate_and_the_start() -> None:
    options = PlanOptions(method="frozen", gpus=10, rows=1e6, rate=100.0, startup=100.0, price=2.0)
    job = plan_job(CONFIG, "replicated", options)
    # 10,000 s of one GPU, 1,000 s on ten, and 100 s to start.
    assert job.hours == pytest.approx(1100 / 3600)
    assert job.gpu_hours == pytest.approx(11000 / 3600)
    assert job.cost == pytest.approx(22000 / 3600)
    assert job.efficiency == pytest.approx(1000 / 1100)
    assert job.exchanged == 0
    # With n workers 100 n s of starting beside 10,000 s are a tenth of all for n = 11.1.
    assert job.most_gpus == 11
    assert "start for 100 s" in job.reason


def test_training_waits_for_the_exchange() -> None:
    options = PlanOptions(
        method="full", gpus=4, rows=1e6, rate=10.0, batch_size=10, startup=0.0, bandwidth="1MB"
    )
    gradients = 4 * (LAYERS + WORDS + NORM)  # the output matrix has none
    assert exchanged_bytes(CONFIG, "full", "replicated", options, 4) == 2 * 3 / 4 * gradients
    job = plan_job(CONFIG, "replicated", options)
    assert job.efficiency == pytest.approx(1 / (1 + 1.5 * gradients / 1e6))
    assert job.hours == pytest.approx(1e6 / 10 / 4 / job.efficiency / 3600)
    assert job.most_gpus == 1
    assert "waits" in job.reason


def test_sharded_weights_are_gathered_twice() -> None:
    options = PlanOptions(method="full", gpus=4)
    weights = 2 * (LAYERS + 2 * WORDS + NORM)  # in bfloat16
    gradients = 4 * (LAYERS + WORDS + NORM)
    expected = 3 / 4 * (2 * weights + gradients)
    assert exchanged_bytes(CONFIG, "full", "sharded", options, 4) == expected
    assert exchanged_bytes(CONFIG, "frozen", "sharded", options, 4) == 0
    assert exchanged_bytes(CONFIG, "full", "sharded", options, 1) == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80e9), ("16 GiB", 16 * 2**30), ("1.5t", 1.5e12), ("512", 512.0), (".5kib", 512.0)],
)
def test_sizes_are_read(text: str, size: float) -> None:
    assert size_of(text, "gpu_memory") == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "80XB", "1e400GB", "nan", "8 0GB"])
def test_other_texts_are_no_sizes(text: str) -> None:
    with pytest.raises(OptionError, match="gpu_memory must be a size such as 80GB"):
        size_of(text, "gpu_memory")


def test_a_job_needs_what_its_time_follows_from() -> None:
    for values in ({"rows": 1e9}, {"rows": 1e9, "rate": 5.0}, {"rows": 1e9, "method": "lora"}):
        with pytest.raises(OptionError, match="give method and rate"):
            PlanOptions(**values)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="give its rows"):
        PlanOptions(rate=5.0)


def planned(*arguments: str) -> str:
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_a_config_without_weights_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    by_file = planned(str(tmp_path / "config.json"), "--gpus", "8", "--seq-len", "2048")
    assert by_file == planned(str(tmp_path), "--gpus", "8", "--seq-len", "2048")
    assert "6,738,415,616 parameters, 32 layers" in by_file
    rows = [line.split() for line in by_file.splitlines() if line.startswith(("frozen", "full"))]
    # Frozen weights are not divided.
    assert [row[:2] for row in rows] == [
        *(["frozen", "replicated"], ["full", "replicated"], ["full", "sharded"])
    ]
    frozen, full, _ = rows
    assert frozen[2] == "13.5"  # GB: 6.74 billion in bfloat16
    assert full[2:5] == ["27.0", "52.9", "52.9"]  # and in float32, with buckets and moments
    assert "no" in full


def test_json_has_the_job(tmp_path: Path) -> None:
    write_huggingface(tmp_path / "m", our_model().config, our_model().state_dict())
    text = planned(
        *(str(tmp_path / "m"), "--method", "lora", "--seq-len", "64", "--json"),
        *("--rows", "1e6", "--rate", "50", "--epochs", "2", "--startup", "0"),
    )
    content = json.loads(text)
    (plan,) = content["plans"]
    assert (plan["method"], plan["sharding"], plan["fits"]) == ("lora", "replicated", True)
    assert content["job"]["hours"] == pytest.approx(2e6 / 50 / 3600)


def test_texts_longer_than_the_context_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    result = CliRunner().invoke(command, [str(tmp_path), "--seq-len", "5000"])
    assert isinstance(result.exception, OptionError)
    assert "exceeds the model's context of 4,096 tokens" in str(result.exception)
