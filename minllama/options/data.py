"""How files become texts and labels, and texts prompts; the formats that are written."""

from dataclasses import dataclass

from minllama.errors import OptionError
from minllama.options.base import CheckedOptions, Range, option
from minllama.options.text_files import checked_encoding, checked_separator, column_names

DATA_FORMATS = ("labelled", "text", "csv", "tsv", "jsonl", "json", "parquet")
OUTPUT_FORMATS = ("jsonl", "csv", "tsv", "parquet", "labelled")
# By the end of a file's name, in which predictions are written.
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
    """How files become texts and labels; see `minllama.data`."""

    data_format: str | None = option(
        None,
        "labelled (lines of 'label ||| sentence'), text (lines of text alone), csv, tsv, jsonl, "
        "json or parquet; where not given by the file's name, or by what is piped in",
        choices=DATA_FORMATS,
    )
    encoding: str | None = option(
        None, "of text files: cp1252, latin-1, utf-16, shift_jis and so on; without it UTF-8"
    )
    separator: str | None = option(
        None,
        "stands between the cells of csv: a character, or comma, semicolon, tab, pipe, space; by "
        "the first line where not given",
    )
    no_header: bool = option(False, "the first line of csv or tsv is an example, no column names")
    columns: str | None = option(
        None, "names of the columns of csv or tsv without such a line, in order: text,label"
    )
    text_column: str | None = option(None, "the column that holds the text, where it has columns")
    label_column: str | None = option(None, "the column that holds the label")
    label_names: str | None = option(
        None,
        "JSON file that names the classes: a list in order, or {name: number}, or {number: name}",
    )
    multi_label: bool = option(
        False, "a row may have several labels or none: a list, or one cell such as 'late, broken'"
    )
    label_separator: str = option(",", "stands between the labels of one cell, with --multi-label")
    label_columns: str | None = option(
        None,
        "columns of 0 and 1, one for each label, which has the column's name: toxic,rude; in "
        "quotes where a name holds a comma",
    )
    label_lists: str | None = option(
        None,
        "what lists of 0 and 1 are: labels (0 and 1 are names or numbers of labels) or multi-hot "
        "(one place for each label, named by --label-names); where not given, what they can be",
        choices=("labels", "multi-hot"),
    )
    skip_bad_rows: bool = option(False, "leave out rows that cannot be used, and say how many")

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
            raise OptionError(f"--label-columns says what the labels are; omit {flags}")

    @property
    def has_several_labels(self) -> bool:
        """Whether it is said that a row may have several labels."""
        return self.multi_label or self.label_columns is not None or self.label_lists is not None


@dataclass(frozen=True, kw_only=True)
class PromptOptions(CheckedOptions):
    """What stands around a text; see `minllama.classification.prompts`."""

    prompt: str | None = option(
        None, "the frame around a text, which holds {text} once and perhaps {labels}"
    )
    chat: bool = option(False, "put the prompt into the model's chat template, the label answers")
    system: str | None = option(None, "system message, with --chat")
    chat_template: str | None = option(
        None,
        "Jinja file to use as chat template, or the name of one of the model's several, with "
        "--chat",
    )
    max_len: int | None = option(
        None, "shorten texts so that prompt and label have this many tokens", within=Range(4)
    )
    keep_end: bool = option(False, "shorten a text at its beginning, not at its end")
    undo_treebank: bool = option(
        False, "undo a treebank's spacing and brackets first: it 's -LRB- ok -RRB- is it's (ok)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chat_template is not None and not self.chat:
            raise OptionError("--chat-template needs --chat: without it the prompt stands alone")
