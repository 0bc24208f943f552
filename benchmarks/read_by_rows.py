"""Memory of `minllama train --method full` in several processes, from its loading to its writing.

    torchrun --standalone --nproc-per-node 2 benchmarks/read_by_rows.py fsdp
    torchrun --standalone --nproc-per-node 2 benchmarks/read_by_rows.py whole
    torchrun --standalone --nproc-per-node 2 benchmarks/read_by_rows.py ddp

prints a line of JSON: of each process the most anonymous memory in each part of the run, in MB
above what it has before the model is opened. `whole` is fsdp where each process loads the whole
model, and has it again after the training. The model is random, in a folder in bfloat16.
"""

import argparse
import json
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from parallel import config_of

from minllama import Llama, Tokenizer
from minllama.checkpoints.huggingface import write_huggingface
from minllama.distributed.ranks import joined
from minllama.experiment import Experiment, train
from minllama.options import ClassifierOptions, DataOptions, LoRAOptions, TrainingOptions
from minllama.training.malloc import give_back_freed_memory

WORDS, EVERY = 40, 0.01  # words of a text, and seconds between two looks
# Functions of `minllama.experiment.train`, and what they do.
PARTS = {
    "_open": "loading",
    "make_head": "features",
    "fit": "training",
    "_calibrate": "dev",
    "measure": "report",
    "_write": "writing",
}


class Watch:
    """The most anonymous memory in each part of a run, looked at by a thread."""

    def __init__(self) -> None:
        self.part, self.peaks = "", dict[str, int]()
        self._start = self._now()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        wait = threading.Event()
        while not wait.wait(EVERY):
            self.look()

    def look(self) -> None:
        if self.part:
            self.peaks[self.part] = max(self.peaks.get(self.part, 0), self._now() - self._start)

    def over(self, name: str, part: str) -> None:
        """Take a function of the run as a part of it."""
        function: Callable[..., Any] = getattr(train, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.part = part
            try:
                return function(*arguments, **options)
            finally:
                self.look()
                self.part = ""

        setattr(train, name, call)

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith("RssAnon:")) * 1024


def write_data(folder: Path, n_layers: int, n_texts: int) -> None:
    """A model and labeled texts."""
    tokenizer = Tokenizer.from_pretrained()
    torch.manual_seed(0)
    config = config_of(n_layers, tokenizer.vocab_size)
    weights = Llama(config).bfloat16().state_dict()
    write_huggingface(folder / "model", config, weights, vocabulary=tokenizer.vocabulary)
    for name, n in (("train", n_texts), ("dev", 8)):
        texts = [" ".join(f"{name}{(i * j) % 97}" for j in range(WORDS)) for i in range(n)]
        rows = [f"{text},{('no', 'yes')[i % 2]}" for i, text in enumerate(texts)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows, ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=("fsdp", "whole", "ddp"))
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--texts", type=int, default=24, help="eight a step")
    given = parser.parse_args()
    with joined(device="cpu") as ranks:
        folder = Path(ranks.first(lambda: tempfile.mkdtemp()))
        ranks.first(lambda: write_data(folder, given.layers, given.texts))
        give_back_freed_memory()
        experiment = Experiment(
            train=str(folder / "train.csv"),
            dev=str(folder / "dev.csv"),
            test=None,
            output=folder / "run",
            model=str(folder / "model"),
            device="cpu",
            dtype="float32",
            quantize=None,
            data=DataOptions(),
            classifier=ClassifierOptions(method="full", layer="all", pooling="last"),
            lora=LoRAOptions(),
            training=TrainingOptions(
                epochs=1,
                batch_size=8,
                autocast="off",
                parallel="ddp" if given.way == "ddp" else "fsdp",
            ),
        )
        if given.way == "whole":
            vars(train)["is_read_by_rows"] = lambda *arguments: False
        watch = Watch()
        for name, part in PARTS.items():
            watch.over(name, part)
        train.run_experiment(experiment)
        found = [{k: round(v / 1e6) for k, v in of.items()} for of in ranks.collected(watch.peaks)]
        if ranks.is_first:
            print(json.dumps({"way": given.way, "processes": ranks.size, "MB": found}))


if __name__ == "__main__":
    main()
