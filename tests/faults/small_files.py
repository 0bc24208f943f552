"""Small files that a run leaves, and the functions that read them from its folder."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minllama.benchmark.results import FORM, read_result
from minllama.evaluation.registry import on_card
from minllama.experiment.build import LAYER_FILE, _read_choice
from minllama.experiment.evaluate import saved_headlines, saved_verdicts
from minllama.experiment.ladder import state as ladder

MEASURED = dict.fromkeys(on_card(regression=False), 0.5) | {"count": 4, "calibration_error": 0.1}
SPLIT = {"evaluation": MEASURED, "verdict": "as good as chance"}
BENCH = {
    "form": FORM,
    "model": "m",
    "weights": "float32",
    "machine": {"cpu": "x"},
    "measurements": [{"name": "decode", "unit": "tokens/s", "values": [1.0, 2.0], "note": ""}],
    "peak_bytes": 10,
    "date": "2026-01-01",
}
SETTINGS = {"a": 1}


def _ladder(folder: Path) -> None:
    ladder.LadderState(folder, SETTINGS, resume=True)


def _bench(folder: Path) -> None:
    read_result(folder / "bench.json")


def _metrics(folder: Path) -> None:
    saved_headlines(folder)
    saved_verdicts(folder)


def _npy(scores: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, scores)
    return stream.getvalue()


def _json(content: Any) -> bytes:
    return json.dumps(content).encode()


EMPTY = np.zeros((2, 3), dtype=np.float32)
STATE = {"settings": SETTINGS, "rungs": {"x": {"y": 1}}, "starting": None, "spent": 1.5}
# Name -> content, reader, and where it is in the folder.
SMALL_FILES: dict[str, tuple[bytes, Callable[[Path], object], str]] = {
    "ladder.json": (_json(STATE), _ladder, ladder.STATE_FILE),
    "plan.json": (_json({"tfidf": 1, "heads": 2}), lambda f: _rung(f).plan(), "r/plan.json"),
    "scores.npy": (_npy(EMPTY), lambda f: _rung(f).scores(EMPTY), "r/scores.npy"),
    "layer.json": (_json({"layer": 1, "pooling": "mean"}), _read_choice, LAYER_FILE),
    "metrics.json": (_json({"splits": {"dev": SPLIT, "test": SPLIT}}), _metrics, "metrics.json"),
    "bench.json": (_json(BENCH), _bench, "bench.json"),
}


def _rung(folder: Path) -> Any:
    return ladder.RungFolder(folder / "r")
