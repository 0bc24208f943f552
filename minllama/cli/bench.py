"""`minllama bench`: measure a model's speed on this machine."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minllama.atomic import atomic_file
from minllama.cli.grouped import GroupedCommand, option
from minllama.cli.open import (
    activations_option,
    base_option,
    dataclass_options,
    debug_option,
    ended_by_interrupts,
    load_options,
    pick,
    quantize_option,
    warn_of_slow_dtype,
)
from minllama.errors import MinllamaError
from minllama.options.benchmark import BenchmarkOptions
from minllama.options.loading import LoadOptions

if TYPE_CHECKING:
    from minllama.benchmark import BenchmarkResult

TOKENIZER = "Tokenizer file (also GGUF) or folder, if there is none beside the model."
DTYPE = "Data type of the weights; by default chosen for the machine."


@click.command("bench", cls=GroupedCommand)
@click.argument("model", required=False)
@dataclass_options(BenchmarkOptions)
@option("--json", "as_json", is_flag=True, group="Output", help="Print JSON.")
@option("--markdown", is_flag=True, group="Output", help="Print a Markdown table.")
@option("-o", "--output", metavar="FILE", group="Output", help="Write JSON to a file as well.")
@option(
    "--compare",
    metavar="FILE",
    group="Output",
    common=True,
    help="Set the results beside those of an earlier run, which --output wrote.",
)
@load_options(tokenizer=TOKENIZER, dtype=DTYPE)
@base_option
@quantize_option
@activations_option
@debug_option
def command(
    model: str | None,
    as_json: bool,
    markdown: bool,
    output: str | None,
    compare: str | None,
    **values: Any,
) -> None:
    """Measure how fast MODEL runs on this machine (default: the embedded model).

    MODEL is a file, a folder or a Hugging Face id. Other work on the machine disturbs the
    measurement, which the range beside each median shows.
    """
    loading, options = pick(LoadOptions, values), pick(BenchmarkOptions, values)
    if options.chosen_formats and (loading.dtype or loading.quantize != "auto"):
        raise MinllamaError("--formats names weight formats; omit --quantize and --dtype")
    if as_json and markdown:
        raise MinllamaError("--json and --markdown are two forms of the output; give one of them")
    if as_json and compare:
        raise MinllamaError("--compare is for tables; omit --json, or --compare")
    if output is not None and (Path(output).is_dir() or not Path(output).parent.is_dir()):
        raise MinllamaError(f"{output}: cannot be written; name a file in a folder that exists")
    with ended_by_interrupts():
        from minllama.benchmark import read_result, run_benchmark
        from minllama.benchmark.table import print_result, to_markdown

    earlier = None if compare is None else read_result(compare)
    warn_of_slow_dtype(loading.dtype, loading.device)
    result = run_benchmark(model, loading, options, report=_shown)
    _shown("")
    if output is not None:
        _write(Path(output), result)
    if as_json:
        click.echo(result.to_json(), nl=False)
    elif markdown:
        click.echo(to_markdown(result, earlier), nl=False)
    else:
        print_result(result, earlier)


def _shown(line: str) -> None:
    """Show what is measured, on a terminal; the next line replaces it."""
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{line}", nl=False, err=True)


def _write(path: Path, result: "BenchmarkResult") -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(result.to_json(), encoding="utf-8")
