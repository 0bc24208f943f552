"""Options that are defined once: name, default, range and meaning in one frozen dataclass field.

The command line's help and parsing, the Python API and its validation all read the same fields.
Knows nothing of what the options are for, and imports no torch, so that `--help` stays instant.
"""

import dataclasses
import math
import numbers
import types
import typing
from dataclasses import dataclass
from typing import Any

from minllama.errors import OptionError
from minllama.text_files import checked_encoding, checked_separator, column_names

# Forms that weights may be kept in instead of numbers: see `minllama.quantization.quantized`.
QUANTIZE = ("stored", "int8", "int4")


@dataclass(frozen=True)
class Range:
    """The interval that a number must lie in, with or without its ends."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'>' if self.low_open else '>='} {self.low:g}"
        left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
        # 2^32 - 1 has ten digits, of which none may be left out.
        low, high = (f"{end:.10g}" for end in (self.low, self.high))
        return f"in {left}{low}, {high}{right}"


def option(
    default: Any,
    meaning: str,
    *,
    within: Range | None = None,
    choices: tuple[str, ...] = (),
    flag: str | None = None,
) -> Any:
    """Define one option: a dataclass field that carries its meaning and range.

    Args:
        default: the value when nothing is said.
        meaning: one sentence, as the command line's help prints it.
        within: the interval that a number must lie in; `None` for no limit.
        choices: the words that a string must be one of; empty for any string.
        flag: its name on the command line, where that is not the field's; of a flag that is true
            by default it says the opposite.
    """
    metadata = {"meaning": meaning, "within": within, "choices": choices, "flag": flag}
    return dataclasses.field(default=default, metadata=metadata)


class CheckedOptions:
    """Base of the option dataclasses: checks every field against its type and range at birth."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            checked = _checked(field.name, value, hints[field.name], field.metadata.get("within"))
            choices = field.metadata.get("choices")
            if choices and checked is not None and checked not in choices:
                known = ", ".join(choices)
                raise OptionError(f"{field.name} must be one of {known}, not {checked!r}")
            if checked is not value:
                object.__setattr__(self, field.name, checked)


def _checked(name: str, value: Any, hint: Any, within: Range | None) -> Any:
    """`value`, as the type that `hint` names; an OptionError where it is not one."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
    if value is None and types.NoneType in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        if int in typing.get_args(typing.get_args(kind)[0]):
            return _checked_tokens(name, value)
        if isinstance(value, str):  # one string where several may stand
            value = (value,)
        if not isinstance(value, tuple | list) or not all(isinstance(v, str) for v in value):
            raise OptionError(f"{name} must be a list of strings, not {value!r}")
        if not all(value):
            raise OptionError(f"{name} holds an empty string, which would match everywhere")
        return tuple(value)
    # bool is an int to Python, but `top_k=True` is a mistake. NumPy's numbers are numbers.
    is_flag = isinstance(value, bool)
    if kind is int and not is_flag and isinstance(value, numbers.Integral):
        value = int(value)
    if kind is float and not is_flag and isinstance(value, numbers.Real):
        try:
            value = float(value)
        except OverflowError:  # an integer beyond every float
            value = math.inf
        if not math.isfinite(value):
            raise OptionError(f"{name} must be a finite number{_range_text(within)}, not {value}")
    elif type(value) is not kind:
        raise OptionError(f"{name} must be {_KIND_NAMES[kind]}{_range_text(within)}, not {value!r}")
    if within is not None and value not in within:
        raise OptionError(f"{name} must be {within}, not {value!r}")
    return value


def _checked_tokens(name: str, value: Any) -> tuple[int | str, ...]:
    """`value` as a tuple of token ids and texts of tokens; a string of digits is an id."""
    if hasattr(value, "tolist"):  # an array or a tensor of ids
        value = value.tolist()
    if isinstance(value, str | numbers.Integral):  # one where several may stand
        value = (value,)
    listed = isinstance(value, tuple | list | set | frozenset)
    if not listed or not all(isinstance(v, str | numbers.Integral) for v in value):
        raise OptionError(f"{name} must be a list of token ids or of tokens' texts, not {value!r}")
    tokens: list[int | str] = []
    for token in value:
        if isinstance(token, bool) or token == "":
            raise OptionError(f"{name} holds {token!r}, which is no token")
        is_id = not isinstance(token, str) or (token.isascii() and token.isdecimal())
        tokens.append(int(token) if is_id else token)
        if is_id and tokens[-1] < 0:  # type: ignore[operator]
            raise OptionError(f"{name} holds {token}, and token ids are >= 0")
    return tuple(tokens)


_KIND_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def _range_text(within: Range | None) -> str:
    return "" if within is None else f" {within}"


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(CheckedOptions):
    """How the next token is chosen from the logits; see `minllama.sampling`."""

    temperature: float = option(
        0.0,
        "0 takes the likeliest token; above, a sample from softmax(logits / temperature)",
        within=Range(0),
    )
    top_k: int = option(0, "sample among this many likeliest tokens; 0 for all", within=Range(0))
    top_p: float = option(
        1.0,
        "sample among the likeliest tokens that together have this probability",
        within=Range(0, 1, low_open=True),
    )
    min_p: float = option(
        0.0,
        "sample among tokens at least this many times as likely as the likeliest",
        within=Range(0, 1),
    )
    repetition_penalty: float = option(
        1.0,
        "divide positive logits of tokens already in the text by this, multiply negative ones",
        within=Range(0, low_open=True),
    )
    seed: int | None = option(None, "makes samples repeatable", within=Range(0))


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(SamplingOptions):
    """How a text is continued; see `minllama.generation`."""

    max_new_tokens: int = option(256, "stop after this many new tokens", within=Range(1))
    n: int = option(1, "how many samples of each prompt", within=Range(1, 4096))
    stop: tuple[str, ...] = option(
        (),
        "stop before this text, in which special tokens may stand; may be given several times",
    )
    stop_token_ids: tuple[int | str, ...] = option(
        (),
        "stop before this token, by its id or its text; may be given several times",
        flag="stop-token",
    )
    ignore_eos: bool = option(False, "go on past the token that ends a text")
    skip_special_tokens: bool = option(
        True, "show the special tokens that are generated", flag="show-special"
    )
    special: bool = option(
        False, "special tokens that the prompt spells, such as <|im_start|>, are these tokens"
    )
    logprobs: int | None = option(
        None, "report log-probabilities, and this many alternatives per token", within=Range(0, 100)
    )
    json_schema: str | None = option(None, "generate JSON that this JSON schema describes")
    regex: str | None = option(None, "generate text that this regular expression matches in full")
    prompt_lookup: int = option(
        0,
        "guess this many tokens from what the text has said before, and check them in one pass; "
        "the tokens stay the same (in half precision, but for near ties), and come faster where a "
        "text repeats itself; at temperature 0",
        within=Range(0, 31),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_lookup:
            self._check_prompt_lookup()
        if self.json_schema is not None and self.regex is not None:
            raise OptionError("json_schema and regex cannot both constrain one text; give one")

    def _check_prompt_lookup(self) -> None:
        alone = {
            "temperature": self.temperature != 0,
            "repetition_penalty": self.repetition_penalty != 1,
            "logprobs": self.logprobs is not None,
            "json_schema": self.json_schema is not None,
            "regex": self.regex is not None,
        }
        if clashes := [name for name, given in alone.items() if given]:
            raise OptionError(
                f"prompt_lookup is for the likeliest tokens alone; leave out {', '.join(clashes)}"
            )


def names_of(options: type[CheckedOptions]) -> tuple[str, ...]:
    """The names of its fields."""
    return tuple(field.name for field in dataclasses.fields(options))  # type: ignore[arg-type]


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
    """What stands around a text; see `minllama.prompts`."""

    prompt: str | None = option(
        None, "the frame around a text, which holds {text} once and perhaps {labels}"
    )
    chat: bool = option(False, "put the prompt into the model's chat template, the label answers")
    system: str | None = option(None, "system message, with --chat")
    max_len: int | None = option(
        None, "shorten texts so that prompt and label have this many tokens", within=Range(4)
    )
    keep_end: bool = option(False, "shorten a text at its beginning, not at its end")
    undo_treebank: bool = option(
        False, "undo a treebank's spacing and brackets first: it 's -LRB- ok -RRB- is it's (ok)"
    )


CLASS_METRICS = ("accuracy", "macro_f1", "log_loss")
VALUE_METRICS = ("rmse", "mae", "r2", "pearson", "spearman")  # of numbers
METHODS = ("zero-shot", "frozen", "lora", "full")
OBJECTIVES = ("head", "label-words", "regression")
SCORES = ("sum", "token-mean", "byte-mean", "pmi", "contextual", "batch")
CORRECTED = ("pmi", "contextual", "batch")  # the scores of which something is taken off
POOLINGS = ("last", "mean", "weighted-mean")


@dataclass(frozen=True, kw_only=True)
class ZeroShotOptions(CheckedOptions):
    """How label words are scored; see `minllama.classifier.zero_shot`."""

    label_words: str | None = option(
        None,
        "words that stand for the labels, in their order, separated by commas (in quotes where one "
        "holds a comma), or as JSON: a list, or {label: word}",
    )
    score: str = option(
        "sum",
        "log-probability of a label: as it is (sum), per token or byte, or corrected (pmi, "
        "contextual; batch by texts of the task)",
        choices=SCORES,
    )
    prior_strength: float = option(
        1.0,
        "how much of the correction of pmi, contextual and batch to make",
        within=Range(0, 2),
    )
    shots: int = option(
        0,
        "how many training examples to show before each text, spread over the classes",
        within=Range(0, 1000),
    )


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(ZeroShotOptions):
    """What kind of classifier is made, and how; see `minllama.experiment`."""

    method: str = option(
        "lora",
        "what is trained: nothing (zero-shot), a head on fixed features (frozen), low-rank "
        "adapters (lora), or all weights (full)",
        choices=METHODS,
    )
    objective: str = option(
        "head",
        "a new linear head, or the scores of label-words (best with few examples); or regression: "
        "a head for labels that are numbers, by mean squared error",
        choices=OBJECTIVES,
    )
    layer: str = option(
        "auto", "how many layers run: a number, all, or auto for what cross-validation finds best"
    )
    pooling: str = option(
        "auto",
        "the vector of a text: of its last token, or a mean of all; auto by cross-validation",
        choices=("auto", *POOLINGS),
    )
    dropout: float = option(
        0.1, "probability of dropping an element of that vector in training", within=Range(0, 1)
    )
    bidirectional: bool = option(False, "let each token look ahead, too; with a head only")
    dev_fraction: float = option(
        0.1,
        "share of the training file to evaluate on, without --dev",
        within=Range(0, 0.9, low_open=True),
    )
    per_class: int = option(
        0, "learn from this many examples of each class only; 0 from all", within=Range(0)
    )
    no_calibration: bool = option(False, "leave the probabilities as they come")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer not in ("auto", "all") and not self.layer.isdecimal():
            raise OptionError(f"layer must be a number, all or auto, not {self.layer!r}")
        if self.method == "frozen" and self.objective == "label-words":
            raise OptionError("frozen fits a head; label-words are trained with lora or full")
        if self.method == "zero-shot" and self.objective == "regression":
            raise OptionError(
                "zero-shot scores label words, and a number needs a head; use --method frozen, "
                "lora or full"
            )
        if self.bidirectional and (self.method == "zero-shot" or self.objective == "label-words"):
            raise OptionError("bidirectional needs a head: label words are continuations")
        if self.shots and not (self.method == "zero-shot" or self.objective == "label-words"):
            raise OptionError("shots belong into the prompts of zero-shot or label-words")


@dataclass(frozen=True, kw_only=True)
class LoRAOptions(CheckedOptions):
    """Low-rank adapters beside frozen weights; see `minllama.lora`."""

    target_modules: tuple[str, ...] = option(
        ("all-linear",),
        "adapt these: all-linear, or names such as compute_query or q_proj, or a regular "
        "expression for the whole dotted name; may be given several times",
    )
    r: int = option(8, "rank of the adapters", within=Range(1))
    lora_alpha: float = option(
        16.0, "adapters are scaled by lora_alpha / r", within=Range(0, low_open=True)
    )
    lora_dropout: float = option(
        0.0, "probability of dropping an adapter's input while training", within=Range(0, 1)
    )
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) instead (rsLoRA)")
    use_dora: bool = option(False, "learn the magnitude of each row of a weight as well (DoRA)")

    @property
    def scaling(self) -> float:
        """What B A is multiplied by (Hu et al. 2021, sec. 4.1; Kalajdzievski 2023 for rsLoRA)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target_modules:
            raise OptionError("target_modules is empty; name a module, or all-linear")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(CheckedOptions):
    """How a classifier is trained; see `minllama.training`."""

    epochs: int = option(3, "how often each training text is seen", within=Range(1))
    batch_size: int = option(16, "how many texts are computed together", within=Range(1))
    gradient_accumulation: int = option(
        1,
        "how many batches make one step: what a larger batch does, in less memory",
        within=Range(1),
    )
    lr: float | None = option(
        None,
        "highest learning rate (where not given 3e-4 for lora and 2e-5 for full)",
        within=Range(0, low_open=True),
    )
    head_lr: float | None = option(
        None, "that of the head (where not given 1e-3)", within=Range(0, low_open=True)
    )
    weight_decay: float = option(
        0.0, "shrink matrices by this share times the learning rate, each step", within=Range(0)
    )
    schedule: str = option(
        "linear",
        "how the learning rate falls after the warm-up: linear, cosine, or constant (not at all)",
        choices=("linear", "cosine", "constant"),
    )
    warmup: float = option(
        0.06, "share of the steps over which the learning rate rises", within=Range(0, 1)
    )
    clip: float = option(
        1.0, "scale gradients down to at most this norm; 0 leaves them", within=Range(0)
    )
    autocast: str = option(
        "auto",
        "multiply in bfloat16: auto does so for float32 weights where the hardware is good at it",
        choices=("auto", "on", "off"),
    )
    gradient_checkpointing: bool = option(
        False,
        "keep fewer activations and compute them twice: 1.4 to 1.9 times as long, in far less "
        "memory",
    )
    class_weights: str = option(
        "none",
        "balanced: errors of rare classes cost more, in proportion",
        choices=("none", "balanced"),
    )
    ordinal: float = option(
        0.0,
        "classes stand in order, as stars do: spread targets over neighbours, by so many classes",
        within=Range(0),
    )
    self_distillation: float = option(
        0.0,
        "share of each target that is the classifier's own answer before training, against "
        "forgetting",
        within=Range(0, 1, high_open=True),
    )
    patience: int = option(
        0, "stop after this many evaluations without a gain; 0 never does", within=Range(0)
    )
    metric: str = option(
        "accuracy",
        "what is best on the dev split: accuracy, macro_f1, log_loss; of numbers rmse (where not "
        "given), mae, r2, pearson, spearman",
        choices=(*CLASS_METRICS, *VALUE_METRICS),
    )
    keep: str = option(
        "best",
        "which weights to keep: the best by that metric on the dev split, or the last",
        choices=("best", "last"),
    )
    evals_per_epoch: int = option(
        1, "how often to evaluate on the dev split in each epoch", within=Range(1)
    )
    seed: int = option(
        0,
        "of order and dropout: the same gives the same weights",
        within=Range(0, 2**32 - 1),  # what scikit-learn takes
    )
    save_every: int = option(
        100, "steps between two checkpoints, from which a cut run goes on", within=Range(1)
    )
    tensorboard: bool = option(False, "write the curves for TensorBoard, too")
