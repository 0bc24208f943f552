"""Memory and traffic of full fine-tuning in several processes: replicated or divided weights.

    torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py ddp
    torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py fsdp

prints a line of JSON: the peak resident memory of each process in MB, before the model is made
(`start`), from then on (`model`) and in training (`peak`), megabytes on the loopback interface per
step, of all processes together, and the median seconds of a step. Other programs' traffic counts:
`unshare --net sh -c 'ip link set lo up && torchrun ...'` keeps it out.
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from minllama import Llama, LlamaConfig, LlamaEmbeddingClassifier, Tokenizer
from minllama.data import Dataset
from minllama.distributed.ranks import joined
from minllama.options import TrainingOptions
from minllama.training.trainer import fit

TEXTS, WORDS = 48, 40


def peak() -> float:
    """The most resident memory of this process since `reset_peak`, in MB."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Traffic:
    """A progress that reads the loopback interface's counter after each step."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def begin(self, step: int, total_steps: int) -> None:
        pass

    def advance(self, row: Mapping[str, Any]) -> None:
        lines = Path("/proc/net/dev").read_text().splitlines()
        (of_loopback,) = (line for line in lines if line.strip().startswith("lo:"))
        self.bytes.append(int(of_loopback.split()[1]))

    def end(self) -> None:
        pass


def config_of(n_layers: int, vocab_size: int) -> LlamaConfig:
    """The model that is trained."""
    return LlamaConfig(
        dim=512,
        n_layers=n_layers,
        n_heads=8,
        n_kv_heads=8,
        hidden_dim=1376,
        vocab_size=vocab_size,
        max_seq_len=256,
        tie_embeddings=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parallel", choices=("ddp", "fsdp"))
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--autocast", default="off", choices=("on", "off"))
    parser.add_argument("--gradient-checkpointing", action="store_true")
    given = parser.parse_args()
    with joined(device="cpu") as ranks:
        tokenizer = Tokenizer.from_pretrained()
        start = peak()
        torch.manual_seed(0)
        llama = Llama(config_of(given.layers, tokenizer.vocab_size))
        classifier = LlamaEmbeddingClassifier(llama, tokenizer, ("no", "yes"))
        n_trained = sum(p.numel() for p in classifier.parameters())
        model = peak()
        reset_peak()
        texts = [" ".join(f"word{(i * j) % 97}" for j in range(WORDS)) for i in range(TEXTS)]
        train = Dataset(texts, [i % 2 for i in range(TEXTS)], ["no", "yes"], "random words")
        options = TrainingOptions(
            lr=1e-5,
            epochs=1,
            batch_size=8,
            parallel=given.parallel,
            autocast=given.autocast,
            gradient_checkpointing=given.gradient_checkpointing,
        )
        traffic = Traffic()
        result = fit(classifier, train, None, options, progress=traffic)
        memory = ranks.collected({"start": start, "model": model, "peak": peak()})
        if ranks.is_first:
            steps = [b - a for a, b in zip(traffic.bytes, traffic.bytes[1:], strict=False)]
            times = [8 / row["examples_per_second"] for row in result.history]
            found = {
                "parallel": given.parallel,
                "processes": ranks.size,
                "trained": n_trained,
                "MB": [{k: round(v) for k, v in of.items()} for of in memory],
                "MB on the wire per step": round(statistics.median(steps) / 1e6, 1),
                "seconds per step": round(statistics.median(times), 2),
                "last loss": result.history[-1]["loss"],
            }
            print(json.dumps(found))


if __name__ == "__main__":
    main()
