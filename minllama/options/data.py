"""Options for reading data files and building prompts, and the formats of predictions."""

from dataclasses import dataclass
from typing import ClassVar

from minllama.errors import OptionError
from minllama.options.base import CheckedOptions, Range, option
from minllama.options.text_files import checked_encoding, checked_separator, column_names

DATA_FORMATS = ("labelled", "text", "csv", "tsv", "jsonl", "json", "parquet")
OUTPUT_FORMATS = ("jsonl", "csv", "tsv", "parquet", "labelled")
# The format in which predictions are written, by the file name's extension.
OUTPUT_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "labelled",
}


@dataclass(frozen=True, kw_only=True)
class DataOptions(CheckedOptions):
    """How to read texts and labels from files; see `minllama.data`."""

    group: ClassVar[str] = "Data"

    data_format: str | None = option(
        None,
        "format of the data: labelled (lines of 'label ||| text'), text (one text per line), csv, "
        "tsv, jsonl, json or parquet; by default from the file's name, or from the content of "
        "piped input",
        choices=DATA_FORMATS,
    )
    encoding: str | None = option(
        None,
        "encoding of text files, such as cp1252, latin-1, utf-16 or shift_jis (default UTF-8)",
    )
    separator: str | None = option(
        None,
        "separator of csv cells: a character, or comma, semicolon, tab, pipe or space; by "
        "default detected from the first line",
    )
    no_header: bool = option(False, "the first line of csv or tsv is an example, not column names")
    columns: str | None = option(
        None, "column names of csv or tsv without a header line, in order, such as text,label"
    )
    text_column: str | None = option(
        None, "name of the column with the texts (by default detected)", common=True
    )
    label_column: str | None = option(
        None, "name of the column with the labels (by default detected)", common=True
    )
    label_names: str | None = option(
        None,
        "JSON file with the class names: a list in order, {name: id} or {id: name}",
    )
    multi_label: bool = option(
        False,
        "rows may have several labels or none, as a list or in one cell such as 'late, broken'",
    )
    label_separator: str = option(",", "separator of the labels in one cell, with --multi-label")
    label_columns: str | None = option(
        None,
        "columns of 0 and 1, one per label and named after it, such as toxic,rude; quote a name "
        "that contains a comma",
    )
    label_lists: str | None = option(
        None,
        "how to read lists of 0 and 1: as labels (0 and 1 are names or ids of labels) or as "
        "multi-hot vectors (one element per label, named by --label-names); by default whichever "
        "fits the data",
        choices=("labels", "multi-hot"),
    )
    skip_bad_rows: bool = option(False, "skip rows that cannot be used, and report how many")

    def __post_init__(self) -> None:
        super().__post_init__()
        texts = ("text_column", "label_column", "label_names", "label_separator", "columns")
        for name in (*texts, "label_columns"):
            if getattr(self, name) == "":
                raise OptionError(f"{name} must not be empty")
        if self.encoding is not None:
            object.__setattr__(self, "encoding", checked_encoding(self.encoding))
        if self.separator is not None:
            object.__setattr__(self, "separator", checked_separator(self.separator))
        if self.columns is not None:
            column_names(self.columns)
        others = ("label_column", "label_names", "label_lists")
        if self.label_columns is not None and (given := [n for n in others if getattr(self, n)]):
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise OptionError(f"--label-columns already defines the labels; omit {flags}")

    @property
    def has_several_labels(self) -> bool:
        """Whether the options allow several labels per row."""
        return self.multi_label or self.label_columns is not None or self.label_lists is not None


@dataclass(frozen=True, kw_only=True)
class PromptOptions(CheckedOptions):
    """How a text becomes a prompt; see `minllama.classification.prompts`."""

    group: ClassVar[str] = "Prompt"

    prompt: str | None = option(
        None, "prompt template: contains {text} once, and optionally {labels}"
    )
    chat: bool = option(
        False, "format the prompt with the model's chat template; the label is the answer"
    )
    system: str | None = option(None, "system message, with --chat")
    chat_template: str | None = option(
        None,
        "chat template: a Jinja file, or the name of one of the model's templates, with --chat",
    )
    max_len: int | None = option(
        None,
        "truncate texts so that prompt and label fit into this many tokens",
        within=Range(4),
    )
    keep_end: bool = option(False, "truncate texts at the beginning instead of the end")
    undo_treebank: bool = option(
        False,
        'undo treebank tokenization first: "it \'s -LRB- ok -RRB-" becomes "it\'s (ok)"',
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chat_template is not None and not self.chat:
            raise OptionError("--chat-template needs --chat; add it, or omit --chat-template")
