"""Classifiers of the default model on SST-5 and CFIMDB: `make bench-classification`.

Each row is one or several runs of `minllama train`, as a person would type it, measured on the dev
file. Nothing is chosen on that file: it is given as `--dev` with `--no-calibration`, and `--keep
last` where there is training, so that it is only measured. Settings were chosen on training lines.
Needs the data beside the repository, in ../shared/data, and the extra `train`.
"""

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
MEASURED_ONLY = ("--no-calibration", "--undo-treebank")
SENTIMENT = ("--prompt", "Review: {text}\nSentiment:")
# For a frozen head: of six wordings on 4,000 training lines as good as the best, and the second
# shortest.
REVIEW = ("--prompt", "Review: {text}")
# Chosen on training lines: the wording and words for no examples at all, and those for a few.
IN_ONE_WORD = (
    "--prompt",
    "Review: {text}\nIn one word, this movie is",
    "--label-words",
    "terrible,bad,okay,good,incredible",
)
BY_SENTIMENT = (*SENTIMENT, "--label-words", "terrible,negative,neutral,positive,excellent")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        task: what is measured, for people.
        data: `sst` or `cfimdb`.
        arguments: of `minllama train`, beside files and MEASURED_ONLY.
        seeds: a run for each, of which the mean is shown.
        reference, aim: accuracies to stand beside.
    """

    task: str
    data: str
    arguments: tuple[str, ...]
    reference: str
    aim: str
    seeds: tuple[int, ...] = (0,)


ZERO_SHOT = ("--method", "zero-shot")
CORRECTED = ("--score", "batch", "--prior-strength", "0.5")
LORA = (
    *("--method", "lora", "--r", "16", "--lora-alpha", "32", "--lora-dropout", "0.05"),
    *("--keep", "last"),
)
ROWS = {
    "zero-shot": Row("SST-5, zero-shot", "sst", (*ZERO_SHOT, *IN_ONE_WORD), "0.398", ">= 0.40"),
    "five-shot": Row(
        "SST-5, five shots in the prompt, mean of 5 draws",
        "sst",
        (*ZERO_SHOT, *BY_SENTIMENT, *CORRECTED, "--shots", "5"),
        "0.405",
        ">= 0.42",
        seeds=(0, 1, 2, 3, 4),
    ),
    "frozen": Row("SST-5, frozen", "sst", ("--method", "frozen", *REVIEW), "0.478", ">= 0.48"),
    "few": Row(
        "SST-5, 16 examples a class, label-words LoRA, mean of 3 seeds",
        "sst",
        (
            *LORA,
            *IN_ONE_WORD,
            "--objective",
            "label-words",
            "--per-class",
            "16",
            "--epochs",
            "10",
            "--batch-size",
            "8",
            "--lr",
            "1e-3",
            "--ordinal",
            "0.7",
        ),
        "zero-shot",
        "a clear gain",
        seeds=(0, 1, 2),
    ),
    "lora": Row(
        "SST-5, LoRA, one epoch, as PEFT's",
        "sst",
        (*LORA, *SENTIMENT, "--epochs", "1"),
        "0.483",
        ">= 0.51",
    ),
    "lora-two": Row(
        "SST-5, LoRA, two epochs", "sst", (*LORA, *SENTIMENT, "--epochs", "2"), "0.483", ">= 0.51"
    ),
    "cfimdb": Row(
        "CFIMDB, LoRA, three epochs, last 700 tokens",
        "cfimdb",
        (*LORA, *SENTIMENT, "--epochs", "3", "--max-len", "700", "--keep-end"),
        "0.922",
        ">= 0.94",
    ),
}


def command(row: Row, seed: int, output: Path) -> list[str]:
    """The arguments of `minllama` for one run."""
    files = (
        "--train",
        str(DATA / f"{row.data}-train.txt"),
        "--dev",
        str(DATA / f"{row.data}-dev.txt"),
    )
    names = ("--label-names", str(DATA / f"{row.data}-label-mapping.json"))
    rest = ("--seed", str(seed), "--force", "--output", str(output))
    return ["train", *files, *names, *MEASURED_ONLY, *row.arguments, *rest]


def measure(row: Row, folder: Path) -> tuple[list[float], list[float]]:
    """Accuracy and wall-clock seconds of each run."""
    accuracies, seconds = [], []
    for seed in row.seeds:
        arguments = command(row, seed, folder / f"{row.task[:5]}-{seed}")
        print(f"$ minllama {shlex.join(arguments)}", file=sys.stderr, flush=True)
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "minllama", *arguments], check=True, stdout=2)
        seconds.append(time.perf_counter() - began)
        metrics = json.loads((folder / f"{row.task[:5]}-{seed}" / "metrics.json").read_text())
        accuracies.append(metrics["splits"]["dev"]["evaluation"]["accuracy"])
        print(f"accuracy {accuracies[-1]:.4f} in {seconds[-1]:.0f} s", file=sys.stderr, flush=True)
    return accuracies, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"some of {', '.join(ROWS)}; all without any")
    names = parser.parse_args().rows or list(ROWS)
    if unknown := set(names) - set(ROWS):
        parser.error(f"there is no row {', '.join(sorted(unknown))}")
    if not DATA.is_dir():
        parser.error(f"needs the data in {DATA}")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| task | to beat | aim | accuracy on dev | runs | minutes a run, all in all |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            row = ROWS[name]
            accuracies, seconds = measure(row, Path(folder))
            runs = ", ".join(f"{accuracy:.3f}" for accuracy in accuracies)
            minutes = statistics.mean(seconds) / 60
            print(
                f"| {row.task} | {row.reference} | {row.aim} | {statistics.mean(accuracies):.3f} | "
                f"{runs} | {minutes:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
