"""`minllama classify`: label texts with a trained classifier, or zero-shot with label words."""

import contextlib
import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from minllama.atomic import only_run
from minllama.cli.classify_files import classify_files, labels_files
from minllama.cli.deciding import decide
from minllama.cli.grouped import GroupedCommand, option
from minllama.cli.open import (
    INTERRUPTED,
    activations_option,
    dataclass_options,
    debug_option,
    ended_by_interrupts,
    flags_of,
    given_options,
    model_options,
    open_words,
    pick,
    quantize_option_of_classifier,
    source_option,
    warn_of_slow_dtype,
    with_template,
)
from minllama.cli.output_file import OutputFile
from minllama.cli.text_answers import check_texts, classify_texts
from minllama.errors import MinllamaError, OptionError
from minllama.options import (
    CORRECTED,
    OUTPUT_FORMATS,
    DataOptions,
    ExplainOptions,
    PromptOptions,
    ZeroShotOptions,
    names_of,
)
from minllama.options.evaluation import ThresholdOptions
from minllama.options.labeling import LabelingOptions
from minllama.options.loading import LoadOptions

if TYPE_CHECKING:
    from minllama.classification import Classifier
    from minllama.data import BadRows
    from minllama.experiment.resume import Done

# Options that only apply to the rows of a file, and those that a saved classifier determines.
OF_ROWS = ("output_format", "bom", "keep_columns", "resume", "force", *names_of(DataOptions))
OF_A_CLASSIFIER = ("source", *names_of(ZeroShotOptions), *names_of(PromptOptions))


@click.command("classify", cls=GroupedCommand)
@click.argument("classifier", required=False)
@option(
    "--labels",
    metavar="A,B,...",
    group="Method",
    common=True,
    help="Classify zero-shot with these labels, without a trained classifier; quote a label that "
    "contains a comma, or give a JSON list.",
)
@option(
    "--labels-file",
    metavar="FILE",
    group="Method",
    help="File with the labels: one per line, a JSON list, or a JSON object {name: id}.",
)
@option(
    "--text",
    "texts",
    multiple=True,
    metavar="TEXT",
    group="Data",
    common=True,
    help="A text to classify; repeatable.",
)
@source_option(
    "-i",
    "--input",
    "rows",
    group="Data",
    common=True,
    help="Texts to classify: a file, - for standard input, or a Hugging Face dataset; or several "
    "files: a folder, a quoted pattern such as 'data/*.parquet', or a URI such as s3://...",
)
@option(
    "-o",
    "--output",
    metavar="FILE|DIR",
    default="-",
    group="Output",
    common=True,
    help="File for the predictions on --input (default -, standard output); its name determines "
    "the format: .jsonl, .csv, .tsv, .parquet or .txt. Of several files, a folder of Parquet "
    "parts.",
)
@option(
    "--output-format",
    type=click.Choice(OUTPUT_FORMATS),
    group="Output",
    help="JSON Lines, a table with one column per class, or lines of 'label ||| text' "
    "(labelled); by default from the name of FILE, else jsonl.",
)
@option(
    "--bom",
    is_flag=True,
    group="Output",
    help="Begin CSV and TSV with a byte order mark, so that Excel reads them as UTF-8.",
)
@option(
    "--keep-columns",
    metavar="NAMES",
    group="Output",
    help="Columns of --input to copy to the output, separated by commas, or all.",
)
@option("--resume", is_flag=True, group="Output", help="Continue after the last row in FILE.")
@option("--force", is_flag=True, group="Output", help="Replace FILE if it exists.")
@option("--json", "as_json", is_flag=True, group="Output", help="Print JSON for --text, too.")
@option(
    "--base", metavar="PATH|ID", group="Model", help="The classifier's base model, if it has moved."
)
@model_options
@quantize_option_of_classifier
@activations_option
@dataclass_options(ZeroShotOptions, skip=("shots",))
@dataclass_options(PromptOptions)
@dataclass_options(ThresholdOptions)
@dataclass_options(ExplainOptions)
@dataclass_options(LabelingOptions)
@dataclass_options(
    DataOptions,
    skip=("label_names", "multi_label", "label_separator", "label_columns", "label_lists"),
)
@debug_option
def command(
    classifier: str | None,
    labels: str | None,
    labels_file: str | None,
    texts: tuple[str, ...],
    rows: str | None,
    output: str,
    output_format: str | None,
    bom: bool,
    keep_columns: str | None,
    resume: bool,
    force: bool,
    as_json: bool,
    source: str | None,
    **values: Any,
) -> None:
    """Label texts with CLASSIFIER (a folder that `minllama train` wrote), or with --labels."""
    explaining = pick(ExplainOptions, values)
    _check_effective(bool(texts), labels_file, score=values["score"], explains=explaining.explain)
    options = pick(ZeroShotOptions, values)
    prompt, data = pick(PromptOptions, values), pick(DataOptions, values)
    threshold, loading = pick(ThresholdOptions, values), pick(LoadOptions, values)
    labeling = pick(LabelingOptions, values)
    if labels_files(rows, output, labeling) and not texts:
        assert rows is not None
        _check_given_to(classifier, labels, labels_file)
        columns = _selected_columns(keep_columns, "parquet")
        classify_files(
            *(classifier, rows, output, loading, threshold, data, labeling),
            columns=columns,
            resume=resume,
            force=force,
        )
        return
    file = OutputFile.of(output, output_format, has_mark=bom)
    _check_input(texts, rows, file, resume=resume, force=force)
    columns = _selected_columns(keep_columns, file.output_format)
    _check_given_to(classifier, labels, labels_file)
    if classifier is not None:
        made = _load(classifier, loading)
    else:
        if loading.base is not None:
            raise OptionError("--base is for a CLASSIFIER; with --labels, use --model")
        names = _names(labels, labels_file, data.encoding)
        made = _zero_shot(names, options, prompt, source, loading)
        _learn_prior(made, options, rows, data)
    decide(made, threshold)
    if texts:
        classify_texts(made, texts, explaining, as_json=as_json)
    else:
        assert rows is not None
        with only_run(output) if output != "-" else contextlib.nullcontext():
            _classify_rows(made, rows, file, data, explaining, columns=columns, resume=resume)


def _check_given_to(classifier: str | None, labels: str | None, labels_file: str | None) -> None:
    """Refuse two classifiers, none, and options that a saved one determines."""
    if labels is not None and labels_file is not None:
        raise OptionError("--labels and --labels-file exclude each other; give one")
    is_given = labels is not None or labels_file is not None
    if (classifier is None) != is_given:
        raise OptionError("give either a CLASSIFIER or --labels, such as --labels good,bad")
    given = given_options(OF_A_CLASSIFIER)
    if classifier is not None and given:
        flags = flags_of(name for name in OF_A_CLASSIFIER if name in given)
        flags = flags.replace("--source", "--model")
        raise OptionError(
            f"{flags}: determined by the CLASSIFIER; omit {'it' if len(given) == 1 else 'them'}"
        )


def _check_effective(
    has_texts: bool, labels_file: str | None, *, score: str, explains: bool
) -> None:
    """Refuse options that would change nothing."""
    of_rows = [name for name in OF_ROWS if labels_file is None or name != "encoding"]
    uses: tuple[tuple[Sequence[str], bool, str], ...] = (
        (of_rows, not has_texts, "only for the rows of --input"),
        (("as_json",), has_texts, "only for --text (--output-format is for --input)"),
        (("max_words",), explains, "only with --explain"),
        (("prior_strength",), score in CORRECTED, f"only for --score {', '.join(CORRECTED)}"),
    )
    for names, has_use, purpose in uses:
        given = given_options(names)
        if given and not has_use:
            flags = flags_of(name for name in names if name in given).replace("--as-json", "--json")
            raise OptionError(f"{flags}: {purpose}; omit {'it' if len(given) == 1 else 'them'}")


def _check_input(
    texts: tuple[str, ...], rows: str | None, output: OutputFile, *, resume: bool, force: bool
) -> None:
    if bool(texts) == (rows is not None):
        raise OptionError("give either texts with --text or a file with --input")
    if texts and output.name != "-":
        raise OptionError("--output is for --input; the labels of --text are printed, so omit it")
    check_texts(texts)
    if rows is not None:
        output.check(rows, resume=resume, force=force)


def _selected_columns(names: str | None, output_format: str) -> list[str]:
    """The columns that --keep-columns names; a quoted name may contain a comma."""
    if names is None:
        return []
    from minllama.data.label_lists import split_names

    try:
        columns = [name for name in split_names(names) if name]
    except ValueError as error:
        raise OptionError(f"--keep-columns {error}; quote a name as in CSV") from error
    if not columns or output_format == "labelled":
        raise OptionError(
            "--keep-columns needs column names or all, and an output format other than labelled"
        )
    return columns


def _load(folder: str, loading: LoadOptions) -> "Classifier":
    with ended_by_interrupts():
        from minllama.classification.storage.save_load import load_classifier_with

    warn_of_slow_dtype(loading.dtype, loading.device)
    return load_classifier_with(folder, loading)


def _names(labels: str | None, labels_file: str | None, encoding: str | None) -> list[str]:
    """The names of --labels or --labels-file; warns of names that look alike."""
    from minllama.data import read_labels_file
    from minllama.data.label_names import names_of_option
    from minllama.data.look_alikes import look_alike_message, look_alikes

    if labels_file is not None:
        names, where = read_labels_file(labels_file, encoding), labels_file
    else:
        assert labels is not None
        names, where = names_of_option(labels, "--labels"), f"--labels {labels!r}"
    if len(names) < 2:
        layout = "one per line" if labels is None else "separated by commas"
        raise OptionError(f"{where}: only one label; give at least two, {layout}")
    for group in look_alikes(names):
        click.echo(f"labels: {look_alike_message(group, {})}", err=True)
    return names


def _zero_shot(
    names: list[str],
    options: ZeroShotOptions,
    prompt: PromptOptions,
    source: str | None,
    loading: LoadOptions,
) -> "Classifier":
    with ended_by_interrupts():
        from minllama.checkpoints.load import load_with
        from minllama.checkpoints.weight_format import resolve_weight_format
        from minllama.experiment.build import make_zero_shot
        from minllama.model.llama import Llama

    warn_of_slow_dtype(loading.dtype, loading.device)
    checkpoint, words = open_words(source, loading)
    prompt = with_template(prompt, words)
    loading = replace(loading, quantize=loading.quantize or "auto")
    model = load_with(Llama, checkpoint, resolve_weight_format(checkpoint, loading, "read"))
    return make_zero_shot(model, words, names, prompt, options)


def _learn_prior(
    classifier: "Classifier", options: ZeroShotOptions, rows: str | None, data: DataOptions
) -> None:
    """Estimate the label prior of the score `batch` from the first texts of the file."""
    if options.score != "batch":
        return
    if rows is None or rows == "-":
        raise OptionError(
            "--score batch estimates the prior from the texts of a file; name it with --input"
        )
    from itertools import islice

    from minllama.classification import LlamaZeroShotClassifier
    from minllama.data import count_rows, stream_rows
    from minllama.experiment.build import PRIOR_TEXTS

    assert isinstance(classifier, LlamaZeroShotClassifier)
    texts = [row.text for row in islice(stream_rows(rows, data), PRIOR_TEXTS)]
    if not texts:
        count_rows(rows, data)  # raises an error that explains why
    classifier.fit_prior(texts)
    classifier.shortened.clear()


def _classify_rows(
    classifier: "Classifier",
    rows: str,
    output: OutputFile,
    data: DataOptions,
    explaining: ExplainOptions,
    *,
    columns: list[str],
    resume: bool,
) -> None:
    from minllama.cli.waiting import ConsoleReporter
    from minllama.data import BadRows, count_rows
    from minllama.experiment.predict import described, predict_stream, score_of, shortened_texts
    from minllama.experiment.resume import Done

    bad_rows, reporter, notices = BadRows(), ConsoleReporter(), list[str]()
    done = output.done() if resume else Done()
    total = 0 if rows == "-" else count_rows(rows, data, start=done.start)[0]
    if done.records:
        reporter.message(f"resuming after row {done.records[-1]['index']} of {rows}")
    reporter.message(described(classifier))
    # Output lines and a progress bar on the same terminal would overwrite each other.
    has_bar = total > 0 and not (output.name == "-" and sys.stdout.isatty())
    chunks = predict_stream(
        classifier,
        rows,
        data,
        output_format=output.output_format,
        columns=columns,
        explaining=explaining,
        done=done,
        bad_rows=bad_rows,
        progress=reporter.advance("classifying", total) if has_bar else None,
        notices=notices,
    )
    try:
        # Errors that prevent classifying or resuming occur in the first chunk, before writing.
        first = next(chunks, [])
        if rows == "-" and not done.records and not first:
            _check_some(bad_rows, output)
        count = _write_lines(output, done, itertools.chain([first], chunks))
        notices += output.finish()
    except KeyboardInterrupt:
        if output.name != "-" and output.output_format != "labelled":
            reporter.message(INTERRUPTED.format(output.name))
        raise
    finally:
        reporter.close()
    for notice in (_left_out(bad_rows), shortened_texts(classifier), *notices):
        if notice:
            reporter.message(notice)
    score = score_of(classifier)
    reporter.message(f"classified {count:,} texts" + (f", score {score}" if score else ""))


def _write_lines(output: OutputFile, done: "Done", chunks: Iterable[list[str]]) -> int:
    """Append the lines, flushing after each chunk; return their number."""
    count = 0
    with output.opened(done) as stream:
        for lines in chunks:
            stream.writelines(lines)
            stream.flush()
            count += len(lines)
    return count


def _left_out(bad_rows: "BadRows") -> str | None:
    if not bad_rows.count:
        return None
    why = "; ".join([bad_rows.summary(), *bad_rows.remedies])
    return f"bad rows skipped: {bad_rows.count} ({why})"


def _check_some(bad_rows: "BadRows", output: OutputFile) -> None:
    """Refuse standard input without rows, or without good ones if the output is a table."""
    if not bad_rows.count:
        raise MinllamaError("standard input: no rows; pipe in one text per line")
    if output.output_format not in ("jsonl", "labelled"):
        raise MinllamaError(
            f"standard input: all {bad_rows.count} rows are bad: {bad_rows.summary()}"
        )
