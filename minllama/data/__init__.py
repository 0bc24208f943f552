"""Read, check, split, sample and stream texts and labels from data files."""

from minllama.data.dataset import Row, count_rows, load_dataset, stream_rows
from minllama.data.examples import check_text
from minllama.data.label_names import read_label_names, read_labels_file
from minllama.data.number_splits import check_number_splits, one_number, random_split
from minllama.data.records import BadRow, BadRows
from minllama.data.source import Source, is_source
from minllama.data.splits import (
    check_splits,
    one_class,
    sample_balanced,
    sample_per_class,
    stratified_split,
)
from minllama.data.types import Dataset, Labels, Notice

__all__ = [
    "BadRow",
    "BadRows",
    "Dataset",
    "Labels",
    "Notice",
    "Row",
    "Source",
    "check_number_splits",
    "check_splits",
    "check_text",
    "count_rows",
    "is_source",
    "load_dataset",
    "one_class",
    "one_number",
    "random_split",
    "read_label_names",
    "read_labels_file",
    "sample_balanced",
    "sample_per_class",
    "stratified_split",
    "stream_rows",
]
