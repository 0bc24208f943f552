"""Options that several commands share, and the models that they name.

`dataclass_options` makes command-line options from the option dataclasses of `minllama.options`, so
that names, defaults, help texts and help groups are defined there and nowhere else.
"""

import contextlib
import dataclasses
import os
import signal
import threading
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from minllama.cli.grouped import Command, option
from minllama.errors import OptionError
from minllama.options import ACTIVATIONS, QUANTIZE, CheckedOptions, group_of
from minllama.options.loading import DTYPES, LoadOptions
from minllama.text import escaped, one_line

if TYPE_CHECKING:
    import torch

    from minllama.checkpoints.types import Checkpoint
    from minllama.model.llama import Llama
    from minllama.options import GenerationOptions, PromptOptions
    from minllama.tokenizer.tokenizer import Tokenizer

INTERRUPTED = "interrupted; the same command with --resume, and without --force, continues {}"
WEIGHT_FORMATS = ("auto", "none", *QUANTIZE)


def debug_option(command: Command) -> Command:
    """`--debug`: show tracebacks."""

    def remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value and context.obj is not None:
            context.obj.debug = True

    return option(
        "--debug",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=remember,
        help="Show the traceback of an error.",
    )(command)


def model_options(command: Command) -> Command:
    """`--model`, `--tokenizer`, `--dtype`, `--device`."""
    options = (
        option(
            "-m",
            "--model",
            "source",
            metavar="PATH|ID",
            group="Model",
            common=True,
            help="File, folder or Hugging Face id (default: the embedded model).",
        ),
        load_options(
            tokenizer="Tokenizer file (also GGUF) or folder, if there is none beside the model.",
            dtype="Data type of the weights; by default chosen for the command and machine.",
        ),
    )
    for add in reversed(options):
        command = add(command)
    return command


def load_options(*, tokenizer: str, dtype: str) -> Callable[[Command], Command]:
    """`--tokenizer`, `--dtype` and `--device`, with the help of the first two."""
    options = (
        option("--tokenizer", metavar="PATH", group="Model", help=tokenizer),
        option("--dtype", type=click.Choice(DTYPES), group="Model", help=dtype),
        option(
            "--device",
            metavar="DEVICE",
            group="Model",
            help="cpu, cuda or mps; by default a GPU if there is one.",
        ),
    )

    def decorate(command: Command) -> Command:
        for add in reversed(options):
            command = add(command)
        return command

    return decorate


def base_option(command: Command) -> Command:
    """`--base`, for a model that may be a PEFT adapter."""
    return option(
        "--base",
        metavar="PATH|ID",
        group="Model",
        help="Base model of a PEFT adapter, if not the one that adapter_config.json names.",
    )(command)


def quantize_option(command: Command) -> Command:
    """`--quantize`."""
    return option(
        "--quantize",
        type=click.Choice(WEIGHT_FORMATS),
        default="auto",
        group="Model",
        help="Weight format: auto for the fastest with this file and machine, stored for the "
        "quantized blocks of a GGUF file, none for dense weights in --dtype (default auto).",
    )(command)


def activations_option(command: Command) -> Command:
    """`--activations`."""
    return option(
        "--activations",
        type=click.Choice(ACTIVATIONS),
        default=ACTIVATIONS[0],
        group="Model",
        help="Integers that quantized weights are multiplied with on a CPU: int8 is faster and "
        "less exact (default int16).",
    )(command)


def quantize_option_of_classifier(command: Command) -> Command:
    """`--quantize`, for a saved classifier, which has its own weight format."""
    return option(
        "--quantize",
        type=click.Choice(WEIGHT_FORMATS),
        group="Model",
        help="Weight format, as for train; by default the same as in training.",
    )(command)


def classifier_options(command: Command) -> Command:
    """`--base`, `--tokenizer`, `--dtype`, `--device`, for a saved classifier."""
    options = (
        option(
            "--base",
            metavar="PATH|ID",
            group="Model",
            help="The classifier's base model, if it has moved.",
        ),
        load_options(
            tokenizer="The classifier's tokenizer, if it has moved and is not the base model's "
            "own.",
            dtype="Data type of the weights; by default as in training, for the same results.",
        ),
    )
    for add in reversed(options):
        command = add(command)
    return command


def source_option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """An option that names a data source, and is refused if given twice."""

    def only_value(
        context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
    ) -> str | None:
        if len(values) > 1:
            raise click.UsageError(
                f"{parameter.opts[-1]} takes one source, but is given {len(values)} times; put "
                "the rows into one file",
                context,
            )
        return values[0] if values else None

    return option(*names, multiple=True, callback=only_value, metavar="SOURCE", **settings)


def given_options(names: Iterable[str]) -> set[str]:
    """The options that were typed, even if with their default values."""
    source = click.get_current_context().get_parameter_source
    return {name for name in names if source(name) is ParameterSource.COMMANDLINE}


def flags_of(names: Iterable[str]) -> str:
    """Options in command-line spelling: `--data-format, --force`."""
    return ", ".join("--" + name.replace("_", "-") for name in names)


def check_sampling(temperature: float) -> None:
    """Refuse sampling filters at temperature 0, where they would change nothing.

    Raises:
        OptionError: such filters were typed.
    """
    unused = given_options(("top_k", "top_p", "min_p"))
    if unused and temperature == 0:
        raise OptionError(
            f"{flags_of(sorted(unused))} filter samples, but at temperature 0 nothing is sampled; "
            "give --temperature too, or omit them"
        )


def template_options(note: str = "") -> Callable[[Command], Command]:
    """`--system`, `--system-file`, `--chat-template`; `note` is appended to their help."""
    options = (
        option("--system", metavar="TEXT", group="Prompt", help=f"System message{note}."),
        option(
            "--system-file",
            metavar="FILE",
            group="Prompt",
            help=f"Read the system message from a file{note}.",
        ),
        option(
            "--chat-template",
            metavar="FILE|NAME",
            group="Prompt",
            help=f"Chat template: a Jinja file, or the name of one of the model's templates{note}.",
        ),
    )

    def decorate(command: Command) -> Command:
        for add in reversed(options):
            command = add(command)
        return command

    return decorate


def generation_config_option(command: Command) -> Command:
    """`--generation-config`."""
    return option(
        "--generation-config",
        is_flag=True,
        group="Sampling",
        help="Sample as the checkpoint recommends (see minllama info); options that are given "
        "take precedence.",
    )(command)


def recommended(options: dict[str, Any], checkpoint: "Checkpoint") -> "GenerationOptions":
    """Generation options that a checkpoint recommends, overridden by those that were typed.

    Raises:
        MinllamaError: the checkpoint recommends nothing, or its settings are damaged.
    """
    from minllama.generation.checkpoint_defaults import sampling_defaults

    defaults = sampling_defaults(checkpoint)
    if defaults is None:
        raise OptionError(
            f"--generation-config: {checkpoint.path} recommends no sampling options; omit it"
        )
    typed = given_options(options)
    untyped = {name: value for name, value in options.items() if name not in typed}
    changes = {name: options[name] for name in typed}
    changes |= {name: value for name, value in untyped.items() if name not in defaults.options}
    checked = defaults.generation_options(changes)
    check_sampling(checked.temperature)
    click.echo(one_line(f"sampling options of {defaults.origin}: {defaults}"), err=True)
    return checked


def chosen_template(choice: str | None, words: "Tokenizer") -> str | None:
    """Return a template's name if the tokenizer has it, else the content of the file of that name.

    Raises:
        MinllamaError: there is neither, or the file cannot be read.
    """
    from minllama.cli.prompt_text import read_text

    named = {*words.vocabulary.chat_templates}
    named |= set() if words.chat_template is None else {"default"}
    if choice is None or choice in named:
        return choice
    shown = escaped(choice)
    if not os.path.exists(choice) or os.path.isdir(choice):  # a pipe is not a file, but can be read
        listed = escaped(", ".join(sorted(named)) or "which has none")
        raise OptionError(
            f"--chat-template {shown}: neither a file nor a template of the model ({listed:.200})"
        )
    source = read_text(choice)
    if "{" not in source:
        raise OptionError(f"--chat-template {shown}: not a Jinja template; name another file")
    return source


def with_template(
    prompt: "PromptOptions", words: "Tokenizer | Callable[[], Tokenizer]"
) -> "PromptOptions":
    """Prompt options in which a chat template file is replaced by its content.

    Args:
        prompt: as typed.
        words: the model's tokenizer, or a function that opens it, called only if needed.

    Raises:
        MinllamaError: there is neither such a template nor such a file.
    """
    if prompt.chat_template is None:
        return prompt
    known = words() if callable(words) else words
    return dataclasses.replace(prompt, chat_template=chosen_template(prompt.chat_template, known))


def pick(options: type, values: dict[str, Any]) -> Any:
    """Construct an option dataclass from its fields among `values`, and remove them there."""
    names = [field.name for field in dataclasses.fields(options)]
    return options(**{name: values.pop(name) for name in names if name in values})


def dataclass_options(
    options: type[CheckedOptions],
    *,
    defaults: dict[str, Any] | None = None,
    skip: tuple[str, ...] = (),
) -> Callable[[Command], Command]:
    """One command-line option for each field of an option dataclass."""

    def decorate(command: Command) -> Command:
        hints = typing.get_type_hints(options)
        for field in reversed(dataclasses.fields(options)):  # type: ignore[arg-type]
            if field.name not in skip:
                default = (defaults or {}).get(field.name, field.default)
                command = _click_option(options, field, hints[field.name], default)(command)
        return command

    return decorate


# Types of the values of options that take several.
_METAVARS = {str: "TEXT", int | str: "ID|TEXT", tuple[int | str, float]: "ID|TEXT=VALUE"}


def _click_option(
    options: type[CheckedOptions], field: "dataclasses.Field[Any]", hint: Any, default: Any
) -> Callable[[Command], Command]:
    flag = "--" + (field.metadata["flag"] or field.name.replace("_", "-"))
    names = (flag, field.name)
    listed = {"group": group_of(options, field), "common": field.metadata["common"]}
    within = field.metadata["within"]
    notes = [] if default in (None, ()) or isinstance(default, bool) else [_shown(default)]
    meaning = field.metadata["meaning"]
    text = meaning[0].upper() + meaning[1:] + (f" ({'; '.join(notes)})" if notes else "") + "."
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    if kind is bool:
        # An option that is true by default is there to be turned off.
        return option(
            *names, is_flag=True, flag_value=not default, default=default, help=text, **listed
        )
    if typing.get_origin(kind) is tuple:
        metavar = _METAVARS[typing.get_args(kind)[0]]
        return option(*names, multiple=True, default=default, help=text, **listed, metavar=metavar)
    if choices := field.metadata["choices"]:
        return option(*names, type=click.Choice(choices), default=default, help=text, **listed)
    metavar = {int: "INTEGER", float: "NUMBER", str: "TEXT"}[kind]
    if within is not None:
        metavar = f"{metavar} {within}"
    return option(*names, type=kind, default=default, help=text, **listed, metavar=f"[{metavar}]")


def _shown(default: Any) -> str:
    """A default value, as help texts show it."""
    if isinstance(default, tuple):
        default = ", ".join(default)
    return f"default {default:g}" if isinstance(default, float) else f"default {default}"


@contextlib.contextmanager
def ended_by_interrupts() -> Iterator[None]:
    """Make Ctrl-C end the process at once, with status 130, while libraries are imported.

    There is nothing to clean up yet, and a KeyboardInterrupt during a C++ library's import aborts
    the process with a core dump, or is lost.
    """
    handler = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if handler is not signal.default_int_handler or not in_main_thread:
        yield  # ignored, as under nohup, or handled by others
        return
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def open_model(
    source: str | None,
    loading: LoadOptions,
) -> "tuple[Llama, Tokenizer, Checkpoint]":
    """Open the model and tokenizer that the shared options name.

    Raises:
        MinllamaError: they cannot be opened, or there is no tokenizer.
    """
    with ended_by_interrupts():
        from minllama.checkpoints.load import load_with
        from minllama.checkpoints.weight_format import resolve_weight_format
        from minllama.model.llama import Llama

    # Tokenizer first: it loads fast, and a damaged one is found before gigabytes are read.
    checkpoint, words = open_words(source, loading)
    model = load_with(Llama, checkpoint, resolve_weight_format(checkpoint, loading))
    return model, words, checkpoint


def open_words(source: str | None, loading: LoadOptions) -> "tuple[Checkpoint, Tokenizer]":
    """Open the checkpoint that the shared options name, and read only its tokenizer.

    Raises:
        MinllamaError: it cannot be opened, or there is no tokenizer.
    """
    with ended_by_interrupts():
        from minllama.checkpoints.open import open_checkpoint
        from minllama.tokenizer.tokenizer import Tokenizer

    checkpoint = open_checkpoint(source, tokenizer=loading.tokenizer, base=loading.base)
    checkpoint.check_language_model()  # before its tokenizer, which may be missing
    return checkpoint, Tokenizer.from_checkpoint(checkpoint)


def warn_of_slow_dtype(
    dtype: "torch.dtype | str | None",
    device: "torch.device | str | None",
    *,
    option: str | None = None,
) -> None:
    """Print a warning if this machine only emulates the requested half precision."""
    if dtype is None:
        return
    from minllama.checkpoints.weight_format import slow_dtype

    if (warning := slow_dtype(dtype, device)) is not None:
        click.echo(f"{option or f'--dtype {dtype}'}: {warning}", err=True)


def torch_dtype(name: str | None) -> "torch.dtype | None":
    """The torch dtype of that name."""
    if name is None:
        return None
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
