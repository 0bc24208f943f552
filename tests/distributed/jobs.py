"""Runs of `minllama train` that one process and several do alike; also what each process calls.

`torchrun --nproc-per-node N tests/distributed/jobs.py '{"folder": ...}'` does them.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minllama.checkpoints.gguf import write_gguf
from minllama.checkpoints.open import open_checkpoint
from minllama.distributed.ranks import current, joined
from minllama.experiment import Experiment, Reporter, run_experiment
from minllama.options import ClassifierOptions, DataOptions, LoRAOptions, TrainingOptions
from minllama.training import run_checkpoint
from minllama.training.run import TrainingRun
from tests.experiment_cases import examples, write_labelled
from tests.tiny import our_model

# 27 texts in batches of 8: the last step of an epoch has three, fewer than four processes.
COMMON = {"epochs": 2, "batch_size": 8, "lr": 0.01, "autocast": "off"}
JOBS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"method": "lora"},
    "balanced": {"method": "lora", "training": {"class_weights": "balanced"}},
    "accumulated": {
        "method": "lora",
        "training": {"batch_size": 5, "gradient_accumulation": 2, "evals_per_epoch": 3},
    },
    "full": {"method": "full", "training": {"lr": 0.001}},
    "checkpointed": {"method": "full", "training": {"lr": 1e-3, "gradient_checkpointing": True}},
    "label-words": {"method": "lora", "objective": "label-words"},
    # Of four layers three are trained, and the output matrix is not; rows of blocks are read.
    "from-blocks": {"method": "full", "layer": "3", "model": "blocks.gguf"},
    "all-words": {"method": "full", "objective": "label-words", "training": {"lr": 1e-3}},
    "dora": {"method": "lora", "lora": {"use_dora": True}},
    "distilled": {"method": "lora", "training": {"self_distillation": 0.5}},
    "several-labels": {"method": "lora", "data": {"multi_label": True}, "train": "several.csv"},
    "regression": {"method": "lora", "objective": "regression", "train": "numbers.csv"},
    "frozen": {"method": "frozen"},
    "one-head": {"method": "frozen", "layer": "1"},
    "zero-shot": {"method": "zero-shot", "score": "batch"},
}


def write_data(folder: Path) -> None:
    """A quantized model beside the one in `base`; texts with one label, several, and numbers."""
    vocabulary = open_checkpoint(folder / "base").vocabulary
    model = our_model(
        *(3,), n_layers=4, hidden_dim=64, vocab_size=49152, max_seq_len=128, tie_embeddings=False
    )
    write_gguf(folder / "blocks.gguf", model.config, model.state_dict(), vocabulary, "q8_0")
    write_labelled(folder / "train.txt", examples(27))
    write_labelled(folder / "dev.txt", examples(9, seed=1))
    write_labelled(folder / "test.txt", examples(11, seed=2))
    rows = [*examples(27), *examples(9, seed=1)]
    several = [
        f"{text},{label}{';loud' if i % 3 == 0 else ''}" for i, (label, text) in enumerate(rows)
    ]
    numbers = [f"{text},{len(text) + 7 * (label == 'good')}" for label, text in rows]
    for name, lines in (("several.csv", several), ("numbers.csv", numbers)):
        (folder / name).write_text("\n".join(["text,label", *lines, ""]), encoding="utf-8")


def experiment(folder: Path, output: Path, name: str, training: Mapping[str, Any]) -> Experiment:
    """A run of the tiny model in `folder`, without dropout: that would differ by process."""
    job = dict(JOBS[name])
    method, own = job.pop("method"), job.pop("training", {})
    train, data = job.pop("train", "train.txt"), job.pop("data", {})
    model = job.pop("model", "base")
    lora, dtype = job.pop("lora", {}), job.pop("dtype", "float32")
    if method in ("lora", "full") and job.get("objective") != "label-words":
        job["dropout"] = 0.0
    has_splits = train == "train.txt"
    return Experiment(
        train=str(folder / train),
        dev=str(folder / "dev.txt") if has_splits else None,
        test=str(folder / "test.txt") if has_splits else None,
        output=output,
        model=str(folder / model),
        device="cpu",
        dtype=dtype,
        quantize=None,
        data=DataOptions(**data),
        classifier=ClassifierOptions(method=method, **job),
        lora=LoRAOptions(r=2, **lora) if method == "lora" else LoRAOptions(),
        training=TrainingOptions(**{**COMMON, **own, **training})
        if method in ("lora", "full")
        else TrainingOptions(),
    )


class Interrupting(Reporter):
    """Ctrl-C after a step, in the process that reports."""

    def __init__(self, step: int) -> None:
        self._step = step

    def progress(self) -> "InterruptingProgress":
        return InterruptingProgress(self._step)


class InterruptingProgress:
    """Sends this process what Ctrl-C sends."""

    def __init__(self, step: int) -> None:
        self._step = step

    def begin(self, step: int, total_steps: int) -> None:
        pass

    def advance(self, row: Mapping[str, Any]) -> None:
        if row["step"] == self._step:
            signal.raise_signal(signal.SIGINT)

    def end(self) -> None:
        pass


def killed_after(step: int, rank: int) -> None:
    """Kill a process before its step counts, unless it was started again."""
    conclude = TrainingRun._conclude_step

    def concluded(run: TrainingRun) -> Any:
        is_first_try = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if is_first_try and run.state.step == step and current().rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return conclude(run)

    TrainingRun._conclude_step = concluded  # type: ignore[method-assign]


def killed_in_save(number: int, rank: int, is_written: bool) -> None:
    """Kill a process in a save, before or after it has written its files, at the first try."""
    write, calls = run_checkpoint._write, []

    def writing(*arguments: Any) -> Any:
        calls.append(1)
        is_first_try = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        is_now = is_first_try and len(calls) == number and current().rank == rank
        if is_now and not is_written:
            os.kill(os.getpid(), signal.SIGKILL)
        done = write(*arguments)
        if is_now:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    run_checkpoint._write = writing


def stalled_after(step: int, rank: int, file: Path) -> None:
    """Let a process hang after a step, with a file that says so: all others wait for it."""
    conclude = TrainingRun._conclude_step

    def concluded(run: TrainingRun) -> Any:
        if run.state.step == step and current().rank == rank:
            file.touch()
            time.sleep(600)
        return conclude(run)

    TrainingRun._conclude_step = concluded  # type: ignore[method-assign]


def main(arguments: Sequence[str]) -> None:
    asked = json.loads(arguments[0])
    folder, output = Path(asked["folder"]), Path(asked["output"])
    if "kill" in asked:
        killed_after(*asked["kill"])
    if "kill_in_save" in asked:
        killed_in_save(*asked["kill_in_save"])
    if "stall" in asked:
        stalled_after(*asked["stall"], output / "stalled")
    with joined(device="cpu"):
        for name in asked["jobs"]:
            run = experiment(folder, output / name, name, asked.get("training", {}))
            stop = asked.get("interrupt")
            try:
                outcome = run_experiment(
                    run,
                    resume=asked.get("resume", False),
                    reporter=None if stop is None else Interrupting(stop),
                )
                if run.classifier.method == "full" and run.training.parallel == "fsdp":
                    whole = [p for p in outcome.classifier.llama.parameters() if p.numel()]
                    assert not whole, "a process has the whole model after it is written"
            except KeyboardInterrupt:
                if stop is None:
                    raise


if __name__ == "__main__":
    main(sys.argv[1:])
