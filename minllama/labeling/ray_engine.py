"""Label files with Ray Data: its readers, actors, Parquet writer and checkpoints.

Files are read by tasks, labeled by a pool of actors that each hold the classifier, and written by
tasks; Ray schedules them, restarts what dies, and keeps a checkpoint of the rows that are written.
"""

import logging
import sys
from collections.abc import Iterator
from typing import Any

from minllama.distributed.ray_cluster import check_resources, start_ray
from minllama.errors import MinllamaError, optional_import
from minllama.experiment.reporter import Reporter
from minllama.labeling.inputs import ERROR, ROW_ID, Inputs, as_binary
from minllama.labeling.output import BAD, LABELED, STATUS, OutputFolder
from minllama.labeling.work import Work
from minllama.options.labeling import LabelingOptions
from minllama.text import first_line


def label_with_ray(
    work: Work,
    inputs: Inputs,
    folder: OutputFolder,
    options: LabelingOptions,
    reporter: Reporter,
) -> None:
    """Label all files into the folder; rows in its checkpoint are left out.

    Args:
        work: labels a table.
        inputs: the files, which all machines of the cluster can open.
        folder: the output, which all of them can write.
        options: number and resources of the actors.
        reporter: receives messages.

    Raises:
        DataError: a file cannot be read.
        MinllamaError: the cluster has not the resources, or a task failed for good.
    """
    ray = optional_import("ray", "--engine ray needs", extra="ray")
    data = optional_import("ray.data", "--engine ray needs", extra="ray")
    is_own = not ray.is_initialized()
    if is_own:
        # One more, for tasks that read and write, which wait most of the time.
        start_ray(ray, spare_cpus=1)
    try:
        check_resources(
            ray,
            options.actors,
            cpus=options.actor_cpus,
            gpus=options.actor_gpus,
            workers="actors",
            worker="actor",
            other_cpus=1,  # a task that reads, or writes
        )
        reporter.message(
            f"labeling {len(inputs.paths):,} files with Ray {ray.__version__}: {options.actors} "
            f"actors of {options.actor_cpus:g} CPUs and {options.actor_gpus:g} GPUs"
        )
        _configure(data, folder)
        rows = data.read_datasource(_datasource(work, inputs))
        rows = rows.repartition(target_num_rows_per_block=work.rows_per_part)
        rows = rows.map_batches(
            _Actor,
            fn_constructor_args=(work,),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=data.ActorPoolStrategy(size=options.actors),
            num_cpus=options.actor_cpus,
            num_gpus=options.actor_gpus,
        )
        rows.write_parquet(str(folder.folder.absolute()), partition_cols=[STATUS])
    except ray.exceptions.RayError as error:
        raise _plain_error(error) from error
    finally:
        data.DataContext.get_current().checkpoint_config = None
        if is_own:
            ray.shutdown()


class _Actor:
    """Labels tables in a process of Ray, which loads the classifier once."""

    def __init__(self, work: Work) -> None:
        self._work = work
        _ = work.labeler.classifier  # before the first batch

    def __call__(self, table: Any) -> Any:
        import pyarrow as pa
        from pyarrow import compute

        labeled = self._work.label_table(table)
        is_bad = compute.is_valid(labeled[ERROR])
        status = compute.if_else(is_bad, pa.scalar(BAD), pa.scalar(LABELED))
        return labeled.append_column(STATUS, status)


def _configure(data: Any, folder: OutputFolder) -> None:
    context = data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Removed after the manifest says that all is done: else a run that is killed between the two
    # would begin again beside its own rows.
    context.checkpoint_config = data.checkpoint.CheckpointConfig(
        ROW_ID, str(folder.checkpoint.absolute()), delete_checkpoint_on_success=False
    )


def _datasource(work: Work, inputs: Inputs) -> Any:
    """Ray's reader of files, with the rows of `Reading.tables`."""
    from ray.data.datasource import FileBasedDatasource

    class Files(FileBasedDatasource):  # type: ignore[misc]
        """Rows of files of one format, good and bad ones."""

        def __init__(self) -> None:
            super().__init__(list(inputs.paths), filesystem=inputs.filesystem)
            self._numbers = {path: number for number, path in enumerate(inputs.paths)}

        def _open_input_source(self, filesystem: Any, path: str, **settings: Any) -> Any:
            return filesystem.open_input_file(path)

        def _read_stream(self, f: Any, path: str) -> Iterator[Any]:
            yield from work.reading.tables(
                as_binary(f), inputs.name_of(path), self._numbers[path], inputs.data_format
            )

    return Files()


def _plain_error(error: BaseException) -> MinllamaError:
    """The error of ours that a task ended with, or one that names Ray's."""
    cause: BaseException | None = error
    while cause is not None:
        # Ray's wrapper is of our class too, with a traceback as its message.
        if isinstance(cause, MinllamaError) and not hasattr(cause, "cause"):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return MinllamaError(
        f"Ray failed ({first_line(error)}); the same command with --resume continues"
    )
