"""A model of which each process reads its rows: none has all of it, when it is read or written."""

import json
from pathlib import Path

import pytest
import torch

from minllama.checkpoints import huggingface
from minllama.checkpoints.huggingface import write_huggingface
from minllama.model.llama import Llama, load_pretrained
from tests.distributed.launching import torchrun
from tests.tiny import our_model

pytestmark = pytest.mark.slow
SHAPE = {"dim": 256, "n_heads": 8, "n_kv_heads": 4, "hidden_dim": 704, "vocab_size": 1001}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 16 million weights in bfloat16, in shards: 32 MB, and 64 MB in float32."""
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(huggingface, "MAX_SHARD_SIZE", "10MB")
        our_model(n_layers=21, **SHAPE).bfloat16().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) == 4
    return folder


@pytest.mark.parametrize("size", [2, 4])
def test_no_process_has_the_whole_model(model: Path, tmp_path: Path, size: int) -> None:
    ended = torchrun(size, "tests/distributed/loading.py", model, tmp_path / "written")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    whole: Llama = load_pretrained(model, dtype="float32", device="cpu")
    n_bytes = {name: p.nbytes for name, p in whole.named_parameters()}
    total, largest = sum(n_bytes.values()), max(n_bytes.values())
    assert total > 64e6
    for rank, process in enumerate(found):
        assert process["whole"] > 0.9 * total  # as one process loads it
        assert process["loading"] < 1.05 * total / size + 4 * largest
        assert process["writing"] < total / 5
        gathered = sorted(n_bytes.values()) if rank == 0 else []
        assert sorted(process["gathered"]) == gathered  # one at a time, by the first alone
        for name, parameter in whole.named_parameters():
            most = -(-len(parameter) // size)
            n_rows = min(most, len(parameter) - rank * most)
            assert process["rows"][name] == [n_rows, *parameter.shape[1:]]
    write_huggingface(tmp_path / "expected", whole.config, whole.state_dict())
    for path in (tmp_path / "expected").iterdir():
        assert (tmp_path / "written" / path.name).read_bytes() == path.read_bytes()
    assert torch.equal(
        load_pretrained(tmp_path / "written", device="cpu").norm.weight, whole.norm.weight
    )
