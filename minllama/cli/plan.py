"""`minllama plan`: what fits into memory, and how long a job takes."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

from minllama.cli.grouped import GroupedCommand, option
from minllama.cli.open import dataclass_options, debug_option, ended_by_interrupts, pick
from minllama.errors import OptionError
from minllama.options.planning import PLANNED_METHODS, PlanOptions, size_of

if TYPE_CHECKING:
    from minllama.model.config import LlamaConfig
    from minllama.planning import JobPlan, Memory

COLUMNS = ("method", "weights are", "weights", "gradients", "optimizer", "activations", "working")


@click.command("plan", cls=GroupedCommand)
@click.argument("model", required=False)
@dataclass_options(PlanOptions)
@option("--json", "as_json", is_flag=True, group="Output", help="Print JSON.")
@debug_option
def command(model: str | None, as_json: bool, **values: Any) -> None:
    """Plan training or labeling with MODEL on hardware that need not be here.

    MODEL is a checkpoint, a config.json or a Hugging Face id, of which no weights are downloaded
    (default: the embedded model).
    """
    options = pick(PlanOptions, values)
    with ended_by_interrupts():
        from minllama.checkpoints.open import open_config
        from minllama.planning import plan_job

    config = open_config(model)
    if options.seq_len > config.context_len:
        raise OptionError(
            f"--seq-len {options.seq_len:,} exceeds the model's context of "
            f"{config.context_len:,} tokens; give at most that"
        )
    plans = [_planned(config, *choice, options) for choice in _choices(options)]
    job = None
    if options.rows is not None:
        fitting = next((plan for plan in plans if plan["fits"]), plans[-1])
        job = plan_job(config, fitting["sharding"], options)
    if as_json:
        jobs = None if job is None else dataclasses.asdict(job)
        click.echo(json.dumps({"plans": plans, "job": jobs}, indent=2))
        return
    for line in (*_heading(config, options), "", *_table(plans), "", *_notes(options)):
        click.echo(line)
    for line in [] if job is None else ["", *_job(job, options)]:
        click.echo(line)


def _choices(options: PlanOptions) -> list[tuple[str, Any]]:
    from minllama.planning.memory import SHARDINGS

    methods = PLANNED_METHODS if options.method is None else (options.method,)
    return [
        (method, sharding)
        for method in methods
        # Only what is trained is divided: `minllama.distributed.sharding`.
        for sharding in (SHARDINGS if options.gpus > 1 and method == "full" else SHARDINGS[:1])
    ]


def _planned(
    config: "LlamaConfig", method: str, sharding: Any, options: PlanOptions
) -> dict[str, Any]:
    """The plan of one method, as JSON has it: sizes in bytes."""
    from minllama.planning import most_texts, plan_memory

    usable = size_of(options.gpu_memory, "gpu_memory") * (1 - options.reserve)
    memory: Memory = plan_memory(config, method, sharding, options)
    sizes = {name: round(getattr(memory, name)) for name in COLUMNS[2:]}
    return {
        "method": method,
        "sharding": sharding,
        **sizes,
        "peak": round(memory.peak),
        "usable": round(usable),
        "fits": memory.peak <= usable,
        "most_texts": most_texts(config, method, sharding, options, usable),
    }


def _heading(config: "LlamaConfig", options: PlanOptions) -> list[str]:
    from minllama.planning.parameters import all_parameters

    checkpointing = ", recomputed activations" if options.gradient_checkpointing else ""
    usable = size_of(options.gpu_memory, "gpu_memory") * (1 - options.reserve)
    unit = "GPU" if options.device == "cuda" else "process"
    return [
        f"model     {all_parameters(config):,} parameters, {config.n_layers} layers",
        f"work      {options.batch_size:,} texts of {options.seq_len:,} tokens at a time on each "
        f"{unit}{checkpointing}",
        f"hardware  {options.gpus:,} x {options.gpu_memory}, of which {_gigabytes(usable)} GB "
        f"({1 - options.reserve:.0%}) are used",
    ]


def _table(plans: list[dict[str, Any]]) -> list[str]:
    """GB on each GPU."""
    rows = [(*COLUMNS, "peak GB", "fits", "most texts")]
    for plan in plans:
        sizes = (_gigabytes(plan[name]) for name in (*COLUMNS[2:], "peak"))
        most = f"{plan['most_texts']:,}" if plan["most_texts"] else "-"
        fits = "yes" if plan["fits"] else "no"
        rows.append((plan["method"], plan["sharding"], *sizes, fits, most))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _notes(options: PlanOptions) -> list[str]:
    notes = [
        "The peak is not the sum: the backward pass frees activations while it makes gradients.",
    ]
    if options.gpus > 1:
        notes.append(
            "replicated: each GPU has all weights (DDP); sharded: its part, in training (FSDP)."
        )
    if options.device == "cpu":
        notes.append(
            "malloc may keep a third more, unless MALLOC_MMAP_THRESHOLD_=131072 is in the "
            "environment."
        )
    return notes


def _job(job: "JobPlan", options: PlanOptions) -> list[str]:
    assert options.rows is not None
    passes = f" x {options.epochs} epochs" if options.epochs > 1 else ""
    cost = "" if job.cost is None else f", cost {job.cost:,.2f}"
    lines = [
        f"job       {options.rows:,.0f} texts{passes}, {options.method}, weights {job.sharding}, "
        f"{options.rate:,g} texts/s on one GPU (as given)",
        f"time      {_duration(job.hours)} on {options.gpus:,} GPUs, at {job.efficiency:.0%} of "
        f"that rate; {job.gpu_hours:,.2f} GPU hours{cost}",
    ]
    if job.exchanged:
        lines.append(
            f"exchange  {_gigabytes(job.exchanged)} GB a step from each GPU, at "
            f"{options.bandwidth} a second"
        )
    texts = job.most_gpus * options.batch_size
    step = f" (a step then has {texts:,} texts)" if job.exchanged else ""
    lines.append(
        f"scaling   to {job.most_gpus:,} GPUs{step} at 90% of the rate or more; then {job.reason}"
    )
    return lines


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 72 else f"{hours / 24:,.1f} days"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f}" if size >= 1e9 else f"{size / 1e9:.3f}"
