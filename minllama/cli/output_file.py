"""Where predictions are written: a file of any format, or standard output.

Tells the format by the file's name, what a file holds of an interrupted run, and opens it
after that. Knows nothing of what is written.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from minllama.errors import MinllamaError, OptionError, missing_library
from minllama.options import OUTPUT_ENDINGS

if TYPE_CHECKING:
    from minllama.experiment.resume import Done

STANDARD_OUTPUT = "-"


def _format_of(output: str) -> str:
    """The format that the end of a name tells: JSON lines where it has none.

    Raises:
        OptionError: it is that of no format.
    """
    ending = "" if output == STANDARD_OUTPUT else Path(output).suffix.lower()
    if not ending:
        return "jsonl"
    if ending not in OUTPUT_ENDINGS:
        packed = "; nothing is compressed here" if ending == ".gz" else ""
        *some, last = OUTPUT_ENDINGS
        raise OptionError(
            f"--output {output!r}: {ending!r} is the end of no format that is written{packed}; "
            f"let the name end in {', '.join(some)} or {last}, or say which it is with "
            "--output-format"
        )
    return OUTPUT_ENDINGS[ending]


@dataclass(frozen=True)
class OutputFile:
    """A place for predictions.

    Attributes:
        name: a path, or `-` for standard output.
        output_format: one of OUTPUT_FORMATS.
        has_mark: whether a new file begins with a byte order mark.
    """

    name: str
    output_format: str
    has_mark: bool = False

    @classmethod
    def of(cls, name: str, asked: str | None, *, has_mark: bool) -> "OutputFile":
        """The place that --output names.

        Args:
            name: a path, or `-`.
            asked: one of OUTPUT_FORMATS; None to tell it by the name.
            has_mark: as for the attribute.

        Raises:
            OptionError: it is no file, or its name tells no format, or not one with such a mark.
        """
        if not name:
            raise OptionError(
                "the name of --output is empty; name a file, or - for standard output"
            )
        if name != STANDARD_OUTPUT and Path(name).is_dir():
            raise OptionError(f"{name} is a folder; name a file")
        output_format = asked or _format_of(name)
        if has_mark and output_format not in ("csv", "tsv"):
            raise OptionError("--bom: for an --output of CSV or TSV; leave away what has no use")
        return cls(name, output_format, has_mark)

    @property
    def written(self) -> Path:
        """The file that grows with each prediction: of Parquet one of JSON lines beside it."""
        path = Path(self.name)
        if self.output_format == "parquet":
            return path.with_name(f"{path.name}.partial.jsonl")
        return path

    @property
    def existing(self) -> Path | None:
        """What is there of an earlier run; None where nothing is."""
        if self.name == STANDARD_OUTPUT:
            return None
        return next((p for p in (Path(self.name), self.written) if p.is_file()), None)

    def check(self, source: str, *, resume: bool, force: bool) -> None:
        """Refuse a place that predictions of `source` cannot go to, before anything is opened.

        Raises:
            OptionError: it is none for this format, or holds something that is not to be lost.
            MinllamaError: the library of the format is not there.
        """
        if resume and (self.name == STANDARD_OUTPUT or self.output_format == "labelled"):
            raise OptionError(
                "--resume needs an --output of JSON lines, CSV, TSV or Parquet, whose end it can "
                "find"
            )
        if resume and force:
            raise OptionError(
                "--resume goes on with FILE and --force replaces it; give one of them"
            )
        self._check_distinct(source)
        if self.existing and not (resume or force):
            raise OptionError(
                f"{self.existing} exists; --resume goes on with it, --force replaces it"
            )
        if self.output_format == "parquet":
            self._check_parquet()

    def _check_distinct(self, source: str) -> None:
        """Refuse to write over what is read, by whatever name or link it is called."""
        from minllama.data import is_source

        both = () if self.name == STANDARD_OUTPUT else (str(self.written),)
        for name in (self.name, *both):
            if is_source(name, source):
                what = "standard output" if name == STANDARD_OUTPUT else name
                raise OptionError(
                    f"{what} is the file that --input reads; name another for --output"
                )

    def _check_parquet(self) -> None:
        path = Path(self.name)
        if self.name == STANDARD_OUTPUT or (path.exists() and not path.is_file()):
            raise OptionError(
                "Parquet is written into a file, at its end; name one with --output, or give "
                "--output-format csv or jsonl"
            )
        if find_spec("pyarrow") is None:
            raise missing_library("pyarrow", f"{path}: Parquet needs")

    def done(self) -> "Done":
        """What is there of a run that is to be resumed.

        Raises:
            DataError: something else is there.
        """
        from minllama.experiment.parquet_output import records_in
        from minllama.experiment.resume import done_of_records, read_done

        path = Path(self.name)
        if self.output_format == "parquet" and path.is_file() and not self.written.is_file():
            return done_of_records(records_in(path), path)
        return read_done(self.written, self.output_format)

    @contextlib.contextmanager
    def opened(self, done: "Done") -> Iterator[TextIO]:
        """The stream that lines go to, behind what is done, which stays.

        Raises:
            MinllamaError: it cannot be written.
        """
        mark = "\ufeff" if self.has_mark else ""
        if self.name == STANDARD_OUTPUT:
            sys.stdout.write(mark)
            yield sys.stdout
            return
        from minllama.experiment.parquet_output import records_in, write_lines

        end = done.end
        try:
            self.written.parent.mkdir(parents=True, exist_ok=True)
            if done.records and not end:  # a whole file of Parquet, whose input has grown
                end = write_lines(records_in(Path(self.name)), self.written)
            if end:
                os.truncate(self.written, end)
            with self.written.open(
                "a" if end else "w", encoding="utf-8", errors="backslashreplace", newline="\n"
            ) as stream:
                stream.write("" if end else mark)
                yield stream
        except OSError as error:
            raise MinllamaError(f"{self.name}: cannot be written ({error.strerror})") from error

    def finish(self) -> list[str]:
        """Make the file whole, once all lines are written: what people should know of it.

        Raises:
            MinllamaError: it cannot be written; the lines are kept.
        """
        if self.output_format != "parquet":
            return []
        from minllama.experiment.parquet_output import write_parquet

        layout = write_parquet(self.written, Path(self.name))
        if layout is None:
            return []
        self.written.unlink()
        notice = layout.notice()
        return [] if notice is None else [notice]
