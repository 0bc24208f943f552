"""Train a random Llama for a few steps, and print the memory that it took: run as a program.

    python measured_peak.py '{"config": {...}, "method": "lora", "dtype": "bfloat16", ...}'

Prints JSON: `weights`, what building the model added to the resident set, and `peak`, what the
steps reached above the resident set of a process that has imported everything.
"""

import gc
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minllama.classification.prompts import EncodedPrompt
from minllama.data import Dataset
from minllama.engine.states import pooled_states
from minllama.lora import add_lora_wrapper
from minllama.model.config import LlamaConfig
from minllama.model.inputs import padded
from minllama.model.llama import Llama
from minllama.options import TrainingOptions
from minllama.training.trainer import fit


class Classifier(nn.Module):
    """A head on the mean of a text's hidden states; a text is the number that seeds its tokens."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, length: int) -> None:
        super().__init__()
        self.labels, self.multi_label, self.length = ("no", "yes"), False, length
        torch.set_default_dtype(dtype)
        self.llama = Llama(config)
        torch.set_default_dtype(torch.float32)
        self.score = nn.Linear(config.dim, 2)

    def encode(self, text: str) -> EncodedPrompt:
        generator = torch.Generator().manual_seed(int(text))
        vocab = self.llama.config.vocab_size
        ids = torch.randint(0, vocab, (self.length,), generator=generator)
        return EncodedPrompt(tuple(ids.tolist()))

    def compute_logits(self, prompts: Sequence[EncodedPrompt]) -> Tensor:
        ids, mask = padded([prompt.ids for prompt in prompts])
        n_layers = self.llama.config.n_layers
        states = pooled_states(self.llama, ids, mask, n_layers, "mean")
        logits: Tensor = self.score(states)
        return logits


def resident(field: str = "VmRSS") -> int:
    """Bytes of the resident set, now (VmRSS) or at most since the last reset (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def warm_up(method: str, dtype: torch.dtype) -> None:
    """Run everything once in small, so that code and libraries are in memory."""
    config = LlamaConfig(dim=64, n_layers=1, n_heads=4, vocab_size=64, hidden_dim=64)
    run(Classifier(config, dtype, 8), method, TrainingOptions(lr=1e-4, epochs=1), texts=2)


def run(classifier: Classifier, method: str, options: TrainingOptions, texts: int) -> None:
    classifier.llama.requires_grad_(method == "full")
    if method == "lora":
        add_lora_wrapper(classifier.llama, r=8)
    if method == "frozen":
        with torch.inference_mode():
            classifier.eval().compute_logits([classifier.encode(str(i)) for i in range(texts)])
        return
    labels = [i % 2 for i in range(texts)]
    data = Dataset([str(i) for i in range(texts)], labels, ["no", "yes"], "random")
    fit(classifier, data, None, options)  # type: ignore[arg-type]


def main(settings: dict[str, Any]) -> None:
    method, dtype = settings["method"], getattr(torch, settings["dtype"])
    options = TrainingOptions(
        lr=1e-4,
        epochs=1,
        batch_size=settings["batch_size"],
        gradient_checkpointing=settings.get("gradient_checkpointing", False),
        autocast=settings.get("autocast", "auto"),
    )
    warm_up(method, dtype)
    gc.collect()
    before = resident()
    classifier = Classifier(LlamaConfig(**settings["config"]), dtype, settings["length"])
    weights = resident() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    run(classifier, method, options, settings["texts"])
    print(json.dumps({"weights": weights, "peak": resident("VmHWM") - before}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
