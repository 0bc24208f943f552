"""Label more rows than one file has: batches of other programs, folders, and clusters.

`Labeler` is the function of batches; `label_files` labels the files of a folder or a pattern into
Parquet parts, in this process or with Ray Data. `minllama classify` calls it.
"""

from minllama.labeling.files import FilesOutcome, label_files
from minllama.labeling.labeler import Labeler, Labels

__all__ = ["FilesOutcome", "Labeler", "Labels", "label_files"]
