"""Write a report's files: `report.html`, `metrics.json` and `predictions.jsonl`.

All three are replaced together.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minllama.atomic import atomic_folder
from minllama.evaluation.report.content import Report, ReportedSplit, ReportedValues
from minllama.evaluation.report.page import render_page
from minllama.evaluation.report.values import value_lines
from minllama.evaluation.thresholds import saved

PAGE_FILE, METRICS_FILE, PREDICTIONS_FILE = "report.html", "metrics.json", "predictions.jsonl"
REPORT_FILES = (PAGE_FILE, METRICS_FILE, PREDICTIONS_FILE)
DIGITS = 6  # significant digits of a probability: about float32's precision


def write_report(folder: str | os.PathLike[str], report: Report) -> Path:
    """Write `report.html`, `metrics.json` and `predictions.jsonl` into `folder`.

    Other files in the folder are kept.

    Returns:
        The path of `report.html`.

    Raises:
        MinllamaError: the folder cannot be written, or matplotlib is missing.
    """
    with atomic_folder(folder) as temporary:
        write_files(temporary, report)
    return Path(folder) / PAGE_FILE


def write_files(folder: Path, report: Report) -> None:
    """Write the files of `write_report` into an existing folder."""
    # Half a character cannot be encoded: HTML has a reference for it that shows as �, and
    # JSON's own escape is what `backslashreplace` writes.
    (folder / PAGE_FILE).write_text(
        render_page(report), encoding="utf-8", errors="xmlcharrefreplace"
    )
    (folder / METRICS_FILE).write_text(
        metrics_json(report), encoding="utf-8", errors="backslashreplace"
    )
    with (folder / PREDICTIONS_FILE).open("w", encoding="utf-8", errors="backslashreplace") as file:
        for split in report.splits:
            if isinstance(split, ReportedValues):
                file.writelines(value_lines(split))
            else:
                file.writelines(prediction_lines(report, split))


def metrics_json(report: Report) -> str:
    """Everything except the texts, with one line per matrix row."""
    content = {
        "title": report.title,
        "created": None if report.created is None else report.created.isoformat(),
        "seconds": report.seconds,
        "objective": "regression" if report.has_numbers else "classification",
        "multi_label": report.multi_label,
        "label_names": report.label_names,
        "thresholds": report.thresholds and saved(report.thresholds, report.label_names),
        "splits": {
            split.name: {
                "rows": len(split.texts),
                "evaluation": split.evaluation and split.evaluation.to_dict(),
                "others": {name: other.to_dict() for name, other in split.others.items()},
                "verdict": split.verdict,
                "paired": {name: paired.to_dict() for name, paired in split.paired.items()},
            }
            for split in report.splits
        },
        **({} if report.ladder is None else {"ladder": report.ladder.to_dict()}),
        "notes": report.notes,
        "settings": report.settings,
        "versions": report.versions,
    }
    text = json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False)
    # A bracket before a line break is structure: inside strings line breaks are escaped.
    number_lists = r"\[\n([^\[\]{}\"]*)\]"
    return re.sub(number_lists, lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


def plain(value: Any) -> Any:
    """The value for JSON: non-finite numbers become null, other types strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def prediction_lines(report: Report, split: ReportedSplit) -> Iterator[str]:
    """For each text a line of JSON; with several labels a text, `label` and `predicted` are lists.

    `label` is null for a text without a gold label, and `score` is the scoring of label words.
    """
    names = report.label_names

    def named(classes: Any) -> Any:
        chosen = [names[i] for i in classes]
        return chosen if report.multi_label else chosen[0]

    predicted = report.predicted(split)
    probabilities = _rounded(split.probabilities)
    for i, text in enumerate(split.texts):
        gold = split.gold(i)
        row = {
            "split": split.name,
            "text": text,
            "label": None if gold is None else named(gold),
            "predicted": named(np.flatnonzero(predicted[i])),
            "probabilities": dict(zip(names, probabilities[i].tolist(), strict=True)),
        }
        if report.score is not None:
            row["score"] = report.score
        yield json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _rounded(probabilities: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Round to DIGITS significant digits: 0.3, not 0.30000001192092896."""
    values = np.asarray(probabilities, dtype=np.float64)
    magnitude = np.floor(np.log10(np.maximum(values, 1e-300)))
    scale = 10.0 ** np.minimum(DIGITS - 1 - magnitude, 300)
    return np.asarray(np.round(values * scale) / scale)
