"""Files of examples -> texts and labels: read, checked, split, sampled, streamed.

Knows nothing of tokens or models.
"""

from minllama.data.dataset import Row, count_rows, load_dataset, stream_rows
from minllama.data.examples import Dataset, Labels, Notice, check_text
from minllama.data.label_names import read_label_names, read_labels_file
from minllama.data.records import BadRow, BadRows
from minllama.data.source import Source, is_source
from minllama.data.splits import (
    check_splits,
    one_class,
    sample_balanced,
    sample_per_class,
    stratified_split,
)

__all__ = [
    "BadRow",
    "BadRows",
    "Dataset",
    "Labels",
    "Notice",
    "Row",
    "Source",
    "check_splits",
    "check_text",
    "count_rows",
    "is_source",
    "load_dataset",
    "one_class",
    "read_label_names",
    "read_labels_file",
    "sample_balanced",
    "sample_per_class",
    "stratified_split",
    "stream_rows",
]
