"""What is done with each row of many files, by this process and by Ray's actors alike."""

from dataclasses import dataclass
from typing import Any

from minllama.labeling.inputs import ERROR, TEXT, Reading
from minllama.labeling.labeler import Labeler


@dataclass(frozen=True)
class Work:
    """What is done with each row; it can be pickled.

    Attributes:
        labeler: labels texts.
        reading: reads rows.
        rows_per_part: of an output file.
    """

    labeler: Labeler
    reading: Reading
    rows_per_part: int

    def label_table(self, table: Any) -> Any:
        """Add the classifier's columns to a table of `Reading`; bad rows get none.

        Returns:
            The table: `row_id`, `file`, `index`, kept columns, `text`, the classifier's columns,
            and `error` at the end.
        """
        import pyarrow as pa

        errors = table[ERROR].to_pylist()
        good = [row for row, error in enumerate(errors) if error is None]
        texts = table[TEXT].to_pylist()
        labels = self.labeler.label([texts[row] for row in good])
        for row, error in zip(good, labels.errors, strict=True):
            errors[row] = error
        table = table.drop_columns([ERROR])
        for name, values in labels.columns.items():
            column: list[Any] = [None] * len(errors)
            for row, value in zip(good, values, strict=True):
                column[row] = value
            table = table.append_column(name, pa.array(column, self.labeler.arrow_type(name)))
        return table.append_column(ERROR, pa.array(errors, pa.string()))
