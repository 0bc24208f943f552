"""The destination of predictions: a file of any format, or standard output.

`minllama classify` calls it to determine the format from the file's name, to read what an
interrupted run has written, and to append to that.
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
    """The format for a file name's extension; JSON Lines if it has none.

    Raises:
        OptionError: no format has this extension.
    """
    ending = "" if output == STANDARD_OUTPUT else Path(output).suffix.lower()
    if not ending:
        return "jsonl"
    if ending not in OUTPUT_ENDINGS:
        packed = "; output is not compressed" if ending == ".gz" else ""
        *some, last = OUTPUT_ENDINGS
        raise OptionError(
            f"--output {output!r}: no output format has the extension {ending!r}{packed}; use "
            f"{', '.join(some)} or {last}, or give --output-format"
        )
    return OUTPUT_ENDINGS[ending]


@dataclass(frozen=True)
class OutputFile:
    """A destination for predictions.

    Attributes:
        name: a path, or `-` for standard output.
        output_format: one of OUTPUT_FORMATS.
        has_mark: whether a new file begins with a byte order mark.
    """

    name: str
    output_format: str
    has_mark: bool = False

    @classmethod
    def of(cls, name: str, chosen: str | None, *, has_mark: bool) -> "OutputFile":
        """The destination that --output names.

        Args:
            name: a path, or `-`.
            chosen: one of OUTPUT_FORMATS; None to determine it from the name.
            has_mark: as for the attribute.

        Raises:
            OptionError: it is a folder, its format is unknown, or has no byte order mark.
        """
        if not name:
            raise OptionError("--output is empty; name a file, or - for standard output")
        if name != STANDARD_OUTPUT and Path(name).is_dir():
            raise OptionError(f"{name} is a folder; name a file")
        output_format = chosen or _format_of(name)
        if has_mark and output_format not in ("csv", "tsv"):
            raise OptionError("--bom: only for CSV and TSV output; omit it")
        return cls(name, output_format, has_mark)

    @property
    def written(self) -> Path:
        """The file that predictions are appended to; for Parquet, a JSON Lines file next to it."""
        path = Path(self.name)
        if self.output_format == "parquet":
            return path.with_name(f"{path.name}.partial.jsonl")
        return path

    @property
    def existing(self) -> Path | None:
        """The file of an earlier run; None if there is none."""
        if self.name == STANDARD_OUTPUT:
            return None
        return next((p for p in (Path(self.name), self.written) if p.is_file()), None)

    def check(self, source: str, *, resume: bool, force: bool) -> None:
        """Refuse a destination that cannot take predictions of `source`, before opening anything.

        Raises:
            OptionError: it does not suit the format, or would overwrite existing data.
            MinllamaError: the library of the format is not installed.
        """
        if resume and (self.name == STANDARD_OUTPUT or self.output_format == "labelled"):
            raise OptionError(
                "--resume needs an --output file in JSON Lines, CSV, TSV or Parquet format"
            )
        if resume and force:
            raise OptionError("--resume continues FILE and --force replaces it; give one of them")
        self._check_distinct(source)
        if self.existing and not (resume or force):
            raise OptionError(f"{self.existing} exists; --resume continues it, --force replaces it")
        if self.output_format == "parquet":
            self._check_parquet()

    def _check_distinct(self, source: str) -> None:
        """Refuse to overwrite the input, under any name or link."""
        from minllama.data import is_source

        written = () if self.name == STANDARD_OUTPUT else (str(self.written),)
        for name in (self.name, *written):
            if is_source(name, source):
                shown = "standard output" if name == STANDARD_OUTPUT else name
                raise OptionError(f"{shown} is also the --input; name another file for --output")

    def _check_parquet(self) -> None:
        path = Path(self.name)
        if self.name == STANDARD_OUTPUT or (path.exists() and not path.is_file()):
            raise OptionError(
                "Parquet needs a regular file; name one with --output, or give --output-format csv "
                "or jsonl"
            )
        if find_spec("pyarrow") is None:
            raise missing_library("pyarrow", f"{path}: Parquet needs")

    def done(self) -> "Done":
        """The rows that an interrupted run has written.

        Raises:
            DataError: the file is not from such a run.
        """
        from minllama.experiment.parquet_output import records_in
        from minllama.experiment.resume import done_of_records, read_done

        path = Path(self.name)
        if self.output_format == "parquet" and path.is_file() and not self.written.is_file():
            return done_of_records(records_in(path), path)
        return read_done(self.written, self.output_format)

    @contextlib.contextmanager
    def opened(self, done: "Done") -> Iterator[TextIO]:
        """The stream that lines are appended to, after the rows that are done.

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
            if done.records and not end:  # a complete Parquet file, whose input has grown
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
        """Complete the file after the last line; return notes for the user.

        Raises:
            MinllamaError: it cannot be written; the JSON Lines file is kept.
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
