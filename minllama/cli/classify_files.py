"""`minllama classify` on many files: a folder of Parquet parts, by this process or by Ray."""

from collections.abc import Sequence
from pathlib import Path

from minllama.cli.open import ended_by_interrupts, flags_of, given_options, warn_of_slow_dtype
from minllama.errors import OptionError
from minllama.options import DataOptions, ExplainOptions, names_of
from minllama.options.evaluation import ThresholdOptions
from minllama.options.labeling import LabelingOptions
from minllama.options.loading import LoadOptions

INTERRUPTED = "interrupted; the same command with --resume, and without --force, continues {}"
# Options without a meaning for parts, and those of the engine ray.
OF_ONE_FILE = ("output_format", "bom", "as_json", "label_column", *names_of(ExplainOptions))
OF_RAY = ("actors", "actor_cpus", "actor_gpus")


def labels_files(rows: str | None, output: str, options: LabelingOptions) -> bool:
    """Whether --input and --output are for a folder of parts.

    That is so for Ray, for several files (a folder, a pattern, a URI), and where the output is a
    folder or its name ends in a slash.

    Raises:
        OptionError: options of parts were typed, but there are none.
    """
    from minllama.data.source import is_several

    is_folder = output.endswith("/") or (output != "-" and Path(output).is_dir())
    several = rows is not None and (options.engine == "ray" or is_folder or is_several(rows))
    given = given_options(set(names_of(LabelingOptions)) - {"engine"})
    if given and not several:
        raise OptionError(
            f"{flags_of(sorted(given))}: only for several files, which are labeled into a folder; "
            "name a folder with --output, or omit it"
        )
    return several


def classify_files(
    classifier: str | None,
    rows: str,
    output: str,
    loading: LoadOptions,
    threshold: ThresholdOptions,
    data: DataOptions,
    options: LabelingOptions,
    *,
    columns: Sequence[str],
    resume: bool,
    force: bool,
) -> None:
    """Label the files of --input into the folder --output.

    Raises:
        MinllamaError: what `minllama.labeling.label_files` raises, or options do not apply.
    """
    _check(classifier, rows, output, options, columns)
    assert classifier is not None
    with ended_by_interrupts():
        from minllama.labeling import Labeler, label_files

    from minllama.cli.waiting import ConsoleReporter
    from minllama.experiment.predict import described

    warn_of_slow_dtype(loading.dtype, loading.device)
    labeler = Labeler(_findable(classifier), loading=loading, threshold=threshold)
    reporter = ConsoleReporter()
    reporter.message(described(labeler.classifier))
    try:
        outcome = label_files(
            labeler,
            rows,
            Path(output),
            data=data,
            keep=columns,
            options=options,
            resume=resume,
            force=force,
            reporter=reporter,
        )
    except KeyboardInterrupt:
        reporter.message(INTERRUPTED.format(output))
        raise
    finally:
        reporter.close()
    if outcome.was_complete:
        reporter.message(f"{output} was complete already")
    if outcome.bad:
        why = "; ".join(f"{reason}: {count:,}" for reason, count in outcome.reasons)
        reporter.message(f"bad rows in {output}/status=bad: {outcome.bad:,} ({why})")
    reporter.message(f"classified {outcome.labeled:,} texts")


def _findable(classifier: str) -> str:
    """The classifier's name for processes in other folders."""
    path = Path(classifier).expanduser()
    return str(path.resolve()) if path.exists() else classifier


def _check(
    classifier: str | None,
    rows: str,
    output: str,
    options: LabelingOptions,
    columns: Sequence[str],
) -> None:
    if classifier is None:
        raise OptionError(
            "several files are labeled with a CLASSIFIER; make one of label words with minllama "
            "train --method zero-shot"
        )
    if output == "-":
        raise OptionError("several files are labeled into a folder; name it with --output DIR")
    if rows == "-":
        raise OptionError("standard input is labeled into one file; name a file with --output")
    if given := given_options(OF_ONE_FILE):
        names = [name for name in OF_ONE_FILE if name in given]
        flags = flags_of(names).replace("--as-json", "--json")
        raise OptionError(f"{flags}: not for a folder of parts, which are Parquet; omit it")
    if options.engine != "ray" and (given := given_options(OF_RAY)):
        raise OptionError(f"{flags_of(sorted(given))}: only for --engine ray; omit it")
    if "all" in columns:
        raise OptionError(
            "--keep-columns all: files may have different columns; name those to keep"
        )
