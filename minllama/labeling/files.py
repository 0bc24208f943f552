"""Label files into a folder of Parquet parts, in this process or with Ray Data.

Both engines read rows by `inputs.py` and label them by `labeler.py`, so they give the same rows;
probabilities may differ in their last digits, since rounding depends on a text's batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minllama.atomic import only_run
from minllama.errors import optional_import
from minllama.experiment.predict import digest_of
from minllama.experiment.reporter import Reporter
from minllama.labeling.inputs import (
    ERROR,
    OWN_COLUMNS,
    Inputs,
    Reading,
    find_inputs,
    opened_input,
)
from minllama.labeling.labeler import Labeler
from minllama.labeling.output import BAD, LABELED, OutputFolder, status_folder
from minllama.labeling.work import Work
from minllama.options import DataOptions
from minllama.options.labeling import LabelingOptions


@dataclass(frozen=True)
class FilesOutcome:
    """The result of labeling files.

    Attributes:
        labeled: rows with labels, of all runs.
        bad: rows without.
        reasons: the most frequent reasons, and the number of rows with each.
        was_complete: an earlier run had done everything.
    """

    labeled: int
    bad: int
    reasons: tuple[tuple[str, int], ...]
    was_complete: bool


def label_files(
    labeler: Labeler,
    source: str,
    output: Path,
    *,
    data: DataOptions | None = None,
    keep: Sequence[str] = (),
    options: LabelingOptions | None = None,
    resume: bool = False,
    force: bool = False,
    reporter: Reporter | None = None,
) -> FilesOutcome:
    """Label all rows of files into a folder of Parquet parts.

    Args:
        labeler: has the classifier.
        source: a file, a folder, a pattern, or a URI; see `minllama.labeling.inputs.find_inputs`.
        output: the folder; see `minllama.labeling.output`.
        data: format, encoding and text column of the files.
        keep: columns of the files that the parts carry along.
        options: the engine and its processes.
        resume: continue an interrupted run: no row is missing and none occurs twice.
        force: replace an earlier run's parts.
        reporter: receives messages and progress.

    Raises:
        DataError: files cannot be found or read, or the folder is of a run with other settings.
        OptionError: options contradict one another.
        MinllamaError: a library is missing, the classifier cannot be opened, another run writes
            there, or the engine failed.
    """
    data, options = data or DataOptions(), options or LabelingOptions()
    reporter = reporter or Reporter()
    folder = OutputFolder(output)
    folder.check(resume=resume, force=force)
    optional_import("pyarrow.parquet", "Parquet parts need")
    if options.engine == "ray":
        optional_import("ray.data", "--engine ray needs", extra="ray")
    inputs = find_inputs(source, data.data_format)
    work = Work(labeler, Reading(data, tuple(keep), options.rows_per_part), options.rows_per_part)
    check_names(work)
    settings = _settings(work, inputs, options)
    with only_run(output):
        has_work = folder.start(settings, resume=resume)
        if has_work:
            engine = _engine(options)
            engine(work, inputs, folder, options, reporter)
            folder.complete(settings)
        counts = folder.counts()
    reasons = tuple(folder.reasons()) if counts[BAD] else ()
    return FilesOutcome(counts[LABELED], counts[BAD], reasons, not has_work)


def check_names(work: Work) -> None:
    """Refuse kept columns with the names of the classifier's columns.

    Raises:
        OptionError: names them.
    """
    from minllama.errors import OptionError
    from minllama.text import listed

    new = (*work.labeler.label_columns, *OWN_COLUMNS)
    if taken := [name for name in work.reading.kept_names().values() if name in new]:
        raise OptionError(
            f"--keep-columns: {listed(taken)} would have the name of a column of the output; "
            "rename it in the input, or omit it"
        )


Engine = Callable[[Work, Inputs, OutputFolder, LabelingOptions, Reporter], None]


def _engine(options: LabelingOptions) -> Engine:
    if options.engine == "ray":
        from minllama.labeling.ray_engine import label_with_ray

        return label_with_ray
    return label_here


def label_here(
    work: Work,
    inputs: Inputs,
    folder: OutputFolder,
    options: LabelingOptions,
    reporter: Reporter,
) -> None:
    """Label file after file in this process, skipping the parts that are there.

    A part has the rows of one place in one file, which its name says; its labeled rows are written
    last, so that a part with them is complete.
    """
    advance = reporter.advance("labeling files", len(inputs.paths))
    for number, path in enumerate(inputs.paths):
        name = inputs.name_of(path)
        with opened_input(inputs, path) as file:
            for table in work.reading.tables(file, name, number, inputs.data_format):
                _write_part(work, table, number, folder.folder)
        advance(1)


def _write_part(work: Work, table: Any, number: int, folder: Path) -> None:
    from pyarrow import compute

    start = table["index"][0].as_py()
    name = f"part-{number:05}-{start:012}.parquet"
    last = status_folder(folder, LABELED) / name
    if last.is_file():
        return
    labeled = work.label_table(table)
    is_bad = compute.is_valid(labeled[ERROR])
    bad = labeled.filter(is_bad)
    if bad.num_rows:
        write_table(bad, status_folder(folder, BAD) / name)
    write_table(labeled.filter(compute.invert(is_bad)), last)


def write_table(table: Any, path: Path) -> None:
    """Write a Parquet file, whole or not at all.

    Raises:
        MinllamaError: it cannot be written.
    """
    from pyarrow import parquet

    from minllama.atomic import atomic_file

    with atomic_file(path) as temporary:
        parquet.write_table(table, temporary)


def _settings(work: Work, inputs: Inputs, options: LabelingOptions) -> dict[str, Any]:
    """What a run that is continued must have in common with its beginning, by users' words."""
    labeler = work.labeler
    settings: Mapping[str, Any] = {
        "engine": options.engine,
        "classifier": digest_of(labeler.classifier),
        "input files": [
            [inputs.name_of(path), size]
            for path, size in zip(inputs.paths, inputs.sizes, strict=True)
        ],
        "data format": inputs.data_format,
        "data options": {
            name: value for name, value in asdict(work.reading.data).items() if value is not None
        },
        "kept columns": list(work.reading.keep),
        "rows per part": work.rows_per_part,
    }
    return dict(settings)
