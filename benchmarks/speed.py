"""minllama beside its peers: `make bench`, or `make bench-quick` for the main rows.

Each measurement is a process of its own (`contenders.py`), the contenders of a task in turns
(A B A B); the table gives medians, ratios and what is aimed at. Needs the extra `bench`, the data
beside the repository for the tasks that read texts, and a machine without other work.

    python benchmarks/speed.py [--rounds 5] [--quick] [--results FILE] [--plot FILE]
        [--page FILE] [TASK ...] [--beside PEER ...]
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import contenders
import written
from weight_files import make_gguf_files, make_weights

ROOT = Path(__file__).resolve().parent


class Aim(NamedTuple):
    """One row: what of a task is compared with what, and what for.

    Attributes:
        task: in `contenders.TASKS`.
        ours, theirs: who are compared.
        field: `value` or `peak`.
        aim: the ratio that is aimed at.
        less: whether less is better; the ratio is then theirs / ours.
        words: of the row.
        their_task: where it is another one.
        most: what ours must not exceed, where the aim is that and not the ratio; in the unit of
            the row's words.
    """

    task: str
    ours: str
    theirs: str
    field: str
    aim: float
    less: bool
    words: str
    their_task: str = ""
    most: float = 0.0

    @property
    def unit(self) -> float:
        """What a number is divided by to be in the unit of the words."""
        return 1e9 if self.field == "peak" else 1.0

    def is_met(self, ours: float, ratio: float) -> bool:
        """Whether what is aimed at was reached; without an aim, whether ours is ahead."""
        return ours / self.unit <= self.most if self.most else ratio >= (self.aim or 1)

    def __str__(self) -> str:
        return f"<= {self.most:g}" if self.most else f">= {self.aim:g}" if self.aim else ""


B16, F32, CPP = "transformers-bfloat16", "transformers-float32", "llama.cpp"
FORMAT_AIMS = tuple(
    Aim(f"{task}-{name}{at}", "minllama", CPP, "value", aim, False, f"{words} ({name}), tokens/s")
    for name in contenders.FORMATS
    for task, at, aim, words in (
        ("prefill", "", 1.5, "prefill, 512 tokens"),
        *(
            ("decode", f"-at-{n}", 1.2 if name == "F16" else 1.5, f"decode behind {n:,} tokens")
            for n in contenders.FORMAT_CONTEXTS
        ),
    )
)
AIMS = (
    Aim("decode", "minllama", CPP, "value", 1.5, False, "decode, batch 1, tokens/s"),
    Aim("decode", "minllama", B16, "value", 1.0, False, "decode, batch 1, tokens/s"),
    Aim("decode", "minllama", F32, "value", 1.0, False, "decode, batch 1, tokens/s"),
    Aim("decode-16", "minllama", CPP, "value", 1.0, False, "decode, batch 16, tokens/s in all"),
    Aim("decode-16", "minllama", B16, "value", 1.0, False, "decode, batch 16, tokens/s in all"),
    Aim("prefill", "minllama", B16, "value", 1.5, False, "prefill, 512 tokens, tokens/s"),
    Aim(
        "decode-16",
        "minllama",
        "minllama",
        "value",
        4.0,
        False,
        "decode, batch 16, beside our batch 1",
        "decode",
    ),
    Aim("decode-16", "minllama", F32, "value", 1.0, False, "decode, batch 16, tokens/s in all"),
    Aim(
        "decode-busy",
        "minllama",
        "minllama",
        "value",
        0.5,
        False,
        "decode with a busy neighbor, beside the same without, tokens/s",
        "decode",
    ),
    Aim("decode-busy", "minllama", CPP, "value", 1.0, False, "both with one, tokens/s"),
    Aim("decode-busy", "minllama", F32, "value", 1.0, False, "both with one, tokens/s"),
    Aim(
        "scheduling",
        "minllama",
        "minllama-top-p",
        "value",
        0.0,
        True,
        "a step of 16 sequences outside the forward pass, greedy beside top-p, %",
        most=5.0,
    ),
    Aim("prefill", "minllama", F32, "value", 1.0, False, "prefill, 512 tokens, tokens/s"),
    Aim("prefill", "minllama", CPP, "value", 1.0, False, "prefill, 512 tokens, tokens/s"),
    Aim(
        "lookup",
        "minllama",
        "minllama-without",
        "value",
        0.0,
        False,
        "a summary with --prompt-lookup 3, tokens/s",
    ),
    Aim("open", "minllama", "transformers", "value", 0, True, "open the GGUF, seconds", most=1.0),
    Aim("open", "minllama", CPP, "value", 0.0, True, "open the GGUF, seconds"),
    Aim("process", "minllama", B16, "seconds", 2.0, True, "whole process, one token, seconds"),
    Aim("process", "minllama", B16, "peak", 0, True, "its peak memory, GB", most=0.6),
    Aim(
        "zero-shot",
        "minllama",
        "transformers-full-sequences",
        "value",
        7.0,
        False,
        "zero-shot, five labels, against full sequences, examples/s",
    ),
    Aim(
        "zero-shot",
        "minllama",
        "transformers-by-hand",
        "value",
        1.2,
        False,
        "zero-shot, against one forward by hand, examples/s",
    ),
    Aim(
        "zero-shot",
        "minllama-long-labels",
        "transformers-by-hand",
        "value",
        0.8,
        False,
        "the same, labels of several tokens, examples/s",
    ),
    Aim("lora-bfloat16", "minllama", "peft", "value", 2.0, False, "LoRA, bfloat16, examples/s"),
    Aim("lora-bfloat16", "minllama", "peft", "peak", 2.0, True, "its peak memory, GB"),
    Aim("lora-float32", "minllama", "peft", "value", 2.0, False, "LoRA, float32, examples/s"),
    Aim("lora-float32", "minllama", "peft", "peak", 2.0, True, "its peak memory, GB"),
    Aim(
        "lora-float32",
        "minllama-blocks",
        "peft",
        "value",
        2.0,
        False,
        "LoRA on the file's blocks, examples/s",
    ),
    Aim("lora-float32", "minllama-blocks", "peft", "peak", 2.0, True, "its peak memory, GB"),
    Aim("full", "minllama", "transformers", "value", 1.5, False, "full, float32, examples/s"),
    Aim("full", "minllama-autocast", "transformers", "value", 1.5, False, "full, autocast"),
    Aim("frozen", "minllama", "transformers", "value", 8.0, False, "frozen head, 10 epochs"),
    Aim("adamw", "minllama", "torch-fused", "value", 0.9, False, "AdamW, 135M, steps/s"),
    *FORMAT_AIMS,
)


def measure(task: str, who: str) -> dict[str, Any]:
    """One process; its JSON, and how long all of it took."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "contenders.py"), task, who],
        stdin=subprocess.DEVNULL,  # what is piped in would be a part of prompts
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"signal {-done.returncode}"])[-1]
        print(f"  {task}, {who}: {last}", file=sys.stderr)
        return {}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**result, "seconds": time.perf_counter() - start}


UNIT = re.compile(r", (tokens/s.*|examples/s|steps/s|seconds|GB)$")


def measure_all(
    found: dict[str, list[dict[str, Any]]],
    tasks: list[str],
    rounds: int,
    peers: tuple[str, ...],
    results: Path | None,
) -> list[str]:
    """Put what each contender of each task (or only those of `peers`) measures in its place.

    Results are written after each of them, so that a run that is cut keeps what it has.

    Returns:
        Which of them failed, as `task contender`.
    """
    failed = []
    for task in tasks:
        chosen = [who for who in contenders.TASKS[task] if not peers or who in peers]
        for who in chosen:
            found.pop(f"{task} {who}", None)
        for _ in range(rounds):
            for who in chosen:
                result = measure(task, who)
                if not result:
                    failed.append(f"{task} {who}")
                else:
                    found.setdefault(f"{task} {who}", []).append(result)
                    if results:
                        results.write_text(json.dumps(found, indent=1) + "\n")
                    print(f"  {task}, {who}: {result['value']:.4g}", file=sys.stderr)
    return list(dict.fromkeys(failed))


def chosen_tasks(quick: bool) -> tuple[list[str], tuple[str, ...]]:
    """What is measured where no tasks are named, and of whom; nobody for all.

    Training in a precision that the machine only emulates takes a quarter of an hour a process.
    """
    dtype = contenders.fast_dtype()
    if quick:
        return ["decode", "prefill", f"lora-{dtype}"], (
            "minllama",
            CPP,
            f"transformers-{dtype}",
            "peft",
        )
    slow = {"float32": "lora-bfloat16"}.get(dtype)
    return [task for task in contenders.TASKS if task != slow], ()


def rows_of(found: dict[str, Any]) -> list[tuple[Aim, float, float, float]]:
    """Aims of what was measured, both medians, and their ratio."""
    rows = []
    for aim in AIMS:
        ours = found.get(f"{aim.task} {aim.ours}")
        theirs = found.get(f"{aim.their_task or aim.task} {aim.theirs}")
        if ours and theirs:
            a, b = (statistics.median(one[aim.field] for one in side) for side in (ours, theirs))
            rows.append((aim, a, b, b / a if aim.less else a / b))
    return rows


def cells_of(
    rows: list[tuple[Aim, float, float, float]], found: dict[str, Any]
) -> list[tuple[str, str, str, str, str, str]]:
    """What the page shows of each row: task, peer, ours, theirs, ratio, aim."""
    cells = []
    for aim, median, _, ratio in rows:
        both = f"{aim.task} {aim.ours}", f"{aim.their_task or aim.task} {aim.theirs}"
        ours, theirs = (
            written.with_range([one[aim.field] for one in found[who]], aim.unit) for who in both
        )
        missed = "" if aim.is_met(median, ratio) else ", missed"
        cells.append((aim.words, aim.theirs, ours, theirs, f"{ratio:.2f}", f"{aim}{missed}"))
    return cells


def draw(rows: list[tuple[Aim, float, float, float]], path: Path) -> None:
    """Ratios as bars, from 1 on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = rows[::-1]
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(rows) + 1), layout="constrained")
    ratios = [ratio for *_, ratio in rows]
    colors = ["#c2410c" if aim.is_met(a, ratio) else "#94a3b8" for aim, a, _, ratio in rows]
    axes.barh(range(len(rows)), [ratio - 1 for ratio in ratios], left=1, color=colors, height=0.6)
    names = [f"{UNIT.sub('', aim.words)} / {aim.theirs}" for aim, *_ in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    for i, ratio in enumerate(ratios):
        axes.text(max(ratio, 1) * 1.04, i, f"{ratio:.2f}", va="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(0.5, max(ratios) * 2)
    axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.axvline(1, color="#334155", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    title = "minllama beside its peers, times as good (grey: less than the aim)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", choices=[[], *contenders.TASKS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the main rows, a process each")
    parser.add_argument("--beside", nargs="+", metavar="PEER", help="measure these alone")
    parser.add_argument("--results", type=Path, help="JSON file that what is measured is added to")
    parser.add_argument(
        "--page",
        type=Path,
        help="Markdown file of the table (of a whole run docs/benchmarks/DATE_MACHINE.md)",
    )
    parser.add_argument("--plot", type=Path, help="PNG file of the ratios")
    arguments = parser.parse_args()
    tasks, peers = chosen_tasks(arguments.quick)
    tasks, rounds = arguments.tasks or tasks, 1 if arguments.quick else arguments.rounds
    if arguments.quick:
        os.environ["MINLLAMA_BENCH_RUNS"], os.environ["MINLLAMA_BENCH_STEPS"] = "1", "6"
    if not contenders.DATA.is_dir():
        left_out = [task for task in tasks if task in contenders.OF_TEXTS]
        tasks = [task for task in tasks if task not in left_out]
        if left_out:
            print(f"left out, for {contenders.DATA} is not there: {', '.join(left_out)}\n")
    make_weights()
    if any(aim.task in tasks for aim in FORMAT_AIMS):
        make_gguf_files()
    found: dict[str, Any] = {}
    if arguments.results and arguments.results.exists():
        found = json.loads(arguments.results.read_text())
    failed = measure_all(found, tasks, rounds, tuple(arguments.beside or peers), arguments.results)

    import torch

    from minllama.benchmark.machine import describe_machine

    rows = rows_of(found)
    machine = {**describe_machine(torch.device("cpu")), "threads": str(contenders.THREADS)}
    page = written.page(cells_of(rows, found), machine, failed, rounds)
    print(page, end="")
    is_whole = not (arguments.quick or arguments.tasks or arguments.beside)
    if arguments.page or is_whole:
        path = arguments.page or written.page_path(machine)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
        print(f"\nwrote {path}", file=sys.stderr)
    if arguments.plot and rows:
        draw(rows, arguments.plot)
    # A peer may be missing here; what is ours must not fail unseen.
    return int(any(" minllama" in one for one in failed))


if __name__ == "__main__":
    sys.exit(main())
