"""Results of a benchmark: medians with their range, on one machine, and two runs side by side."""

import json
import math
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minllama.errors import MinllamaError
from minllama.text import read_json

FORM = 1  # of the file
MOST_BYTES = 10_000_000


@dataclass(frozen=True)
class Measurement:
    """One kind of work, measured several times.

    Attributes:
        name: such as `decode, 512 tokens of context`; the same in all runs of the same work.
        unit: of the values, such as `tokens/s`; more is better.
        values: one for each repetition.
        note: why there are none; "" otherwise.
    """

    name: str
    unit: str
    values: tuple[float, ...] = ()
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class BenchmarkResult:
    """What a run measured, and on what.

    Attributes:
        model: its path.
        weights: the format in which they were computed with.
        machine: names and values.
        measurements: in order.
        peak_bytes: the most memory that the process had; None where the system does not tell.
        date: when the run began, in ISO 8601.
    """

    model: str
    weights: str
    machine: Mapping[str, str]
    measurements: tuple[Measurement, ...] = field(default=())
    peak_bytes: int | None = None
    date: str = ""

    def to_json(self) -> str:
        content = {
            "form": FORM,
            "date": self.date,
            "model": self.model,
            "weights": self.weights,
            "machine": dict(self.machine),
            "peak_bytes": self.peak_bytes,
            "measurements": [
                {
                    "name": one.name,
                    "unit": one.unit,
                    "values": list(one.values),
                    **({"note": one.note} if one.note else {"median": one.median}),
                }
                for one in self.measurements
            ],
        }
        return json.dumps(content, indent=1) + "\n"


def read_result(path: str | os.PathLike[str]) -> BenchmarkResult:
    """Read what `minllama bench --output FILE` (or `--json`) wrote.

    Raises:
        MinllamaError: there is no such file, or it is something else.
    """
    try:
        content = read_json(Path(path), max_bytes=MOST_BYTES)
        if content["form"] != FORM:
            raise ValueError(f"form {content['form']!r}")
        return BenchmarkResult(
            str(content["model"]),
            str(content["weights"]),
            {str(name): str(value) for name, value in content["machine"].items()},
            tuple(_measurement(one) for one in content["measurements"]),
            None if content["peak_bytes"] is None else int(content["peak_bytes"]),
            str(content["date"]),
        )
    except OSError as error:
        raise MinllamaError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise MinllamaError(
            f"{path}: not a result of minllama bench ({type(error).__name__}: {error}); write one "
            "with minllama bench --output FILE"
        ) from error


def _measurement(content: Mapping[str, Any]) -> Measurement:
    values = tuple(float(value) for value in content["values"])
    note = str(content.get("note", ""))
    if not note and not (values and all(math.isfinite(value) and value > 0 for value in values)):
        raise ValueError(f"values {values!r}")
    return Measurement(str(content["name"]), str(content["unit"]), values, note)
