"""Weights in bfloat16 and a head in float32, trained in several ways: prints what comes of each.

`torchrun --nproc-per-node N tests/distributed/half.py MODEL`
"""

import json
import sys

import torch

from minllama import Llama, LlamaEmbeddingClassifier, Tokenizer
from minllama.data import Dataset
from minllama.distributed.ranks import joined
from minllama.options import TrainingOptions
from minllama.training.trainer import fit
from tests.experiment_cases import examples


def trained(model: str, parallel: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of a training, and the weights after it."""
    torch.manual_seed(0)
    llama = Llama.from_pretrained(model, dtype="bfloat16")
    classifier = LlamaEmbeddingClassifier(
        llama, Tokenizer.from_pretrained(model), ("bad", "good"), bias=True
    )
    assert llama.output is not None
    llama.output.requires_grad_(False)  # a head reads states
    assert {p.dtype for p in classifier.parameters()} == {torch.bfloat16, torch.float32}
    rows = examples(16)
    names = ["bad", "good"]
    train = Dataset(
        [text for _, text in rows], [names.index(label) for label, _ in rows], names, ""
    )
    options = TrainingOptions(lr=0.01, epochs=2, batch_size=8, parallel=parallel)
    result = fit(classifier, train, None, options)
    return [row["loss"] for row in result.history], classifier.state_dict()


if __name__ == "__main__":
    with joined(device="cpu") as ranks:
        (of_ddp, one), (of_fsdp, other) = (trained(sys.argv[1], way) for way in ("ddp", "fsdp"))
        same_dtypes = all(other[name].dtype == tensor.dtype for name, tensor in one.items())
        changes = [(other[name].float() - one[name].float()).abs().max() for name in one]
        if ranks.is_first:
            found = {"ddp": of_ddp, "fsdp": of_fsdp, "same_dtypes": same_dtypes}
            print(json.dumps({**found, "change": float(max(changes))}))
