"""What runs leave and others read: predictions, checkpoints, settings, measurements."""

from pathlib import Path
from typing import Any

import torch

from tests.faults.mutations import Mutator, binary, safetensors, text
from tests.faults.mutations import json_values as json_mutator
from tests.faults.read_data import ROWS
from tests.faults.reader import Reader, reader, writing


def predicted() -> list[dict[str, Any]]:
    return [
        {
            "index": i,
            "text": words,
            "label": "good",
            "probabilities": {"good": 0.75, "bad": 0.25},
            "classifier": "0123456789abcdef",
            "columns": {"id": i},
        }
        for i, (words, _) in enumerate(ROWS)
    ]


@reader("predictions.jsonl", "predictions.csv", "predictions.parquet")
def predictions(folder: Path, name: str) -> Reader:
    """An interrupted output of `minllama classify`, as --resume reads it."""
    from minllama.experiment.parquet_output import records_in, write_lines, write_parquet
    from minllama.experiment.resume import done_of_records, read_done
    from minllama.experiment.tables import layout_of, row_of

    path, lines = folder / name, folder / "lines.jsonl"
    write_lines(predicted(), lines)
    if name.endswith("parquet"):
        write_parquet(lines, path)
        seeds = [path.read_bytes()]
        return Reader(seeds, writing(path, lambda: done_of_records(records_in(path), path)))
    if name.endswith("jsonl"):
        return Reader([lines.read_bytes()], writing(path, lambda: read_done(path)), json_mutator)
    layout = layout_of(predicted()[0], ["id"])
    rows = [layout.names, *(layout.values(record) for record in predicted())]
    table = "".join(row_of(list(row), ",") for row in rows).encode()
    return Reader([table], writing(path, lambda: read_done(path, "csv")), text)


@reader("run state.json", "run weights.safetensors", "run metrics.jsonl")
def run_file(folder: Path, name: str) -> Reader:
    from minllama.training.run_checkpoint import (
        CheckpointFolder,
        MetricsFile,
        RunState,
        RunTensors,
        read_metrics,
        saved_step,
    )

    fingerprint = {"options": {"lr": 1.0}, "data": "0" * 64}
    state = RunState(step=1, best_step=1, best_metric=0.5, examples=8)
    tensors = RunTensors(
        {"a": torch.ones(2)}, {"exp_avg.a": torch.ones(2)}, {"a": 1}, {"a": torch.zeros(2)}
    )
    CheckpointFolder(folder).save(state, tensors, fingerprint)
    MetricsFile(folder, [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]).close()
    if name.endswith("metrics.jsonl"):
        path = folder / "metrics.jsonl"
        return Reader([path.read_bytes()], writing(path, lambda: read_metrics(folder, 1)), text)
    path = folder / "checkpoint" / name.partition(" ")[2]

    def read() -> None:
        saved_step(folder)
        CheckpointFolder(folder).load(fingerprint)

    mutate: Mutator = safetensors if name.endswith("safetensors") else json_mutator
    return Reader([path.read_bytes()], writing(path, read), mutate)


@reader("ladder.json", "plan.json", "scores.npy", "layer.json", "metrics.json", "bench.json")
def state_of_a_run(folder: Path, name: str) -> Reader:
    """Small files that a run leaves beside its model, and that another command reads."""
    from tests.faults.small_files import SMALL_FILES

    seed, read, file = SMALL_FILES[name]
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    mutate: Mutator = binary if name.endswith("npy") else json_mutator
    return Reader([seed], writing(path, lambda: read(folder)), mutate)
