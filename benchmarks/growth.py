"""How decoding grows with context and batch, and training's memory with the text: three plots.

    python benchmarks/growth.py [--output docs/plots] [--only decode-at decode-of-16 lora-of]

Each point is a process of its own (`contenders.py`), once. Adds to growth.json and draws what is
in it. Needs the extra `bench` and a machine at rest.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import contenders
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from speed import measure
from weight_files import make_weights

from minllama.benchmark.machine import processor

Points = dict[str, dict[str, dict[str, float]]]  # task -> contender -> what it measured
COLORS = {
    "minllama": "#c2410c",
    "minllama-checkpointing": "#fb923c",
    "llama.cpp": "#0f766e",
    "transformers-float32": "#64748b",
    "peft": "#64748b",
}
NAMES = {
    "transformers-float32": "transformers, float32",
    "peft": "transformers and PEFT",
    "minllama-checkpointing": "minllama, gradient checkpointing",
}


def line_plot(
    points: Points, prefix: str, sizes: Sequence[int], field: str, scale: float, axes: Axes
) -> None:
    """One line for each contender, named at its end."""
    contenders_of = dict.fromkeys(who for n in sizes for who in points[f"{prefix}-{n}"])
    for who in contenders_of:
        at = [n for n in sizes if who in points[f"{prefix}-{n}"]]
        values = [points[f"{prefix}-{n}"][who][field] * scale for n in at]
        axes.plot(at, values, marker="o", color=COLORS[who], label=NAMES.get(who, who))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#e2e8f0")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def draw(points: Points, folder: Path) -> None:
    plots = (
        ("decode-at", contenders.CONTEXTS, "value", 1.0, "context", "Decoding, tokens/s",
         "tokens before the one that is decoded"),
        ("decode-of", contenders.BATCHES, "value", 1.0, "batch", "Decoding, tokens/s in all",
         "rows at a time"),
        ("lora-of", contenders.LENGTHS, "peak", 1e-9, "training-memory",
         "LoRA in float32, 4 texts a step: peak memory, GB", "tokens of each text"),
    )  # fmt: skip
    for prefix, sizes, field, scale, name, title, below in plots:
        sizes = tuple(n for n in sizes if f"{prefix}-{n}" in points)
        if not sizes:
            continue
        figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        line_plot(points, prefix, sizes, field, scale, axes)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel(below)
        figure.savefig(folder / f"{name}.png", dpi=110)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/plots"))
    kinds = ("decode-at", "decode-of", "lora-of")
    parser.add_argument("--only", nargs="+", default=kinds, help="how tasks begin: decode-at-1024")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    make_weights()
    results = arguments.output / "growth.json"
    points = json.loads(results.read_text())["points"] if results.exists() else {}
    for task, contenders_of in contenders.GROWTH.items():
        if not task.startswith(tuple(arguments.only)):
            continue
        points[task] = {who: found for who in contenders_of if (found := measure(task, who))}
        for who, one in points[task].items():
            print(f"  {task}, {who}: {one['value']:.4g}", file=sys.stderr, flush=True)
        written = {"machine": processor(), "threads": contenders.THREADS, "points": points}
        results.write_text(json.dumps(written, indent=1) + "\n")
    draw(points, arguments.output)


if __name__ == "__main__":
    main()
