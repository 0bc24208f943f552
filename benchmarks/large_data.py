"""What rows of data cost in memory: reading, training and evaluating files of different lengths.

    python benchmarks/large_data.py [--rows 100000 1000000] [--tasks read train evaluate]

Each line is a process of its own (`PYTHONPATH` chooses which minllama it imports), on a CSV file of
texts of 20 words in random order, in five classes. `anonymous` is the peak of the process's
anonymous memory (`RssAnon` of /proc/self/status every 10 ms) over what it was after the imports:
what the system cannot drop or write back, unlike pages of files. `resident` is the peak of the
whole resident set.
A model of two layers of width 32 has the default model's tokenizer; `train` is LoRA, interrupted
after 20 steps. One thread; Linux only.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from minllama.checkpoints.huggingface import write_huggingface
from minllama.checkpoints.open import open_checkpoint
from minllama.classification import LlamaEmbeddingClassifier, save_classifier
from minllama.data import load_dataset
from minllama.experiment.evaluate import evaluate_classifier
from minllama.experiment.experiment import Experiment
from minllama.experiment.reporter import Reporter
from minllama.experiment.train import run_experiment
from minllama.model.config import LlamaConfig
from minllama.model.llama import Llama
from minllama.options import ClassifierOptions, LoRAOptions, TrainingOptions
from minllama.tokenizer.tokenizer import Tokenizer

TASKS = ("read", "train", "evaluate")
WORDS, CLASSES = 20, 5
STEPS = 20
EVERY_SECONDS = 0.01


def write_rows(path: Path, n_rows: int) -> None:
    """A CSV file of words in random order; every class has its own share of them."""
    draw = random.Random(0)
    page = Path(__file__).resolve().parent.parent / "docs" / "design.md"
    words = sorted(set(re.findall(r"\b[a-z]{2,8}\b", page.read_text())))
    with path.open("w") as file:
        file.write("text,label\n")
        for row in range(n_rows):
            file.write(f"{' '.join(draw.choices(words, k=WORDS))},class {row % CLASSES}\n")


def write_model(folder: Path) -> None:
    torch.manual_seed(0)
    checkpoint = open_checkpoint(None)
    config = LlamaConfig(
        dim=32,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        hidden_dim=48,
        vocab_size=checkpoint.config.vocab_size,
        max_seq_len=128,
    )
    llama = Llama(config)
    write_huggingface(folder, config, llama.state_dict(), vocabulary=checkpoint.vocabulary)
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(folder))
    labels = [f"class {i}" for i in range(CLASSES)]
    llama = Llama.from_pretrained(folder)
    save_classifier(LlamaEmbeddingClassifier(llama, tokenizer, labels), folder / "classifier")


class FirstSteps:
    """The progress of a training that is interrupted."""

    def begin(self, step: int, total_steps: int) -> None:
        pass

    def advance(self, row: Mapping[str, Any]) -> None:
        if row["step"] == STEPS:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


class Interrupting(Reporter):
    """Ends a training after its first steps."""

    def progress(self) -> FirstSteps:
        return FirstSteps()


def read(folder: Path, rows: Path) -> None:
    split = load_dataset(rows)
    assert split.labels is not None
    assert len(split.texts) == len(split.labels)


def train(folder: Path, rows: Path) -> None:
    with tempfile.TemporaryDirectory() as output:
        experiment = Experiment(
            train=str(rows),
            output=Path(output) / "run",
            model=str(folder),
            quantize=None,
            classifier=ClassifierOptions(method="lora", layer="all", pooling="mean"),
            lora=LoRAOptions(r=2),
            training=TrainingOptions(epochs=1, batch_size=16),
        )
        try:
            run_experiment(experiment, reporter=Interrupting())
        except KeyboardInterrupt:
            return
        raise AssertionError("the training was not interrupted")


def evaluate(folder: Path, rows: Path) -> None:
    from minllama.classification import load_classifier

    classifier = load_classifier(folder / "classifier")
    split = load_dataset(rows, label_names=classifier.labels)
    assert evaluate_classifier(classifier, split, "data").evaluation is not None


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def measured(work: Callable[[], None]) -> dict[str, float]:
    """Peaks of memory, in bytes, and seconds."""
    before, peak, done = status("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(EVERY_SECONDS):
            peak = max(peak, status("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    try:
        work()
    finally:
        seconds = time.perf_counter() - began
        done.set()
        thread.join()
    return {"anonymous": peak - before, "resident": status("VmHWM"), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--one", nargs=3, metavar=("TASK", "MODEL", "FILE"), help="in this process")
    arguments = parser.parse_args()
    if arguments.one:
        torch.set_num_threads(1)
        task, folder, rows = arguments.one
        work = {"read": read, "train": train, "evaluate": evaluate}[task]
        print(json.dumps(measured(lambda: work(Path(folder), Path(rows)))))
        return
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        write_model(folder)
        for n_rows in arguments.rows:
            write_rows(folder / f"{n_rows}.csv", n_rows)
        for task in arguments.tasks:
            for n_rows in arguments.rows:
                command = [sys.executable, __file__, "--one", task, name, f"{name}/{n_rows}.csv"]
                found = json.loads(subprocess.check_output(command))
                print(
                    f"{task}, {n_rows:,} rows: anonymous {found['anonymous'] / 1e6:,.0f} MB, "
                    f"resident {found['resident'] / 1e6:,.0f} MB, {found['seconds']:.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
