"""Options that several commands share, and how they become a model.

Option dataclasses are turned into command-line options here, once, so that names, defaults and
help stand where the options are defined and nowhere else.
"""

import contextlib
import dataclasses
import os
import signal
import threading
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from minllama.errors import OptionError
from minllama.options import QUANTIZE
from minllama.options.loading import LoadOptions
from minllama.text import escaped, one_line

if TYPE_CHECKING:
    import torch

    from minllama.checkpoints.types import Checkpoint
    from minllama.model.llama import Llama
    from minllama.options import GenerationOptions, PromptOptions
    from minllama.tokenizer.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")
INTERRUPTED = "interrupted; with --resume, and without --force, the same command goes on with {}"
FORMS = ("auto", "none", *QUANTIZE)

Command = TypeVar("Command", bound=Callable[..., Any])


def debug_option(command: Command) -> Command:
    """`--debug`: show tracebacks."""

    def remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value and context.obj is not None:
            context.obj.debug = True

    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=remember,
        help="Show where an error comes from.",
    )(command)


def model_options(command: Command) -> Command:
    """`--model`, `--tokenizer`, `--dtype`, `--device`."""
    options = (
        click.option(
            "-m",
            "--model",
            "source",
            metavar="PATH|ID",
            help="File, folder or Hugging Face id; without it the embedded default model.",
        ),
        click.option(
            "--tokenizer",
            metavar="PATH",
            help="Tokenizer file (GGUF as well) or folder, where none lies beside the model.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            help="Of the weights; without it what suits the command and the machine.",
        ),
        click.option(
            "--device", metavar="DEVICE", help="cpu, cuda or mps; without it the GPU if any."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def base_option(command: Command) -> Command:
    """`--base`: of a model that may be a PEFT adapter."""
    return click.option(
        "--base",
        metavar="PATH|ID",
        help="Where a PEFT adapter's base model is, if not where its adapter_config.json says.",
    )(command)


def quantize_option(command: Command) -> Command:
    """`--quantize`."""
    return click.option(
        "--quantize",
        type=click.Choice(FORMS),
        default="auto",
        help="Bits of the weights: auto for what is fastest with this file and machine, stored for "
        "a GGUF file's blocks as they are, none for numbers in --dtype (default auto).",
    )(command)


def quantize_option_of_classifier(command: Command) -> Command:
    """`--quantize`, where a classifier has its own."""
    return click.option(
        "--quantize",
        type=click.Choice(FORMS),
        help="Bits of the weights, as for train; without it as in training.",
    )(command)


def classifier_options(command: Command) -> Command:
    """`--base`, `--tokenizer`, `--dtype`, `--device`: of a classifier that is in a folder."""
    options = (
        click.option("--base", metavar="PATH|ID", help="Where the classifier's base model is now."),
        click.option(
            "--tokenizer",
            metavar="PATH",
            help="Where its tokenizer is now, where that is not the base model's own.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            help="Of the weights; without it as in training, which gives the same numbers.",
        ),
        click.option(
            "--device", metavar="DEVICE", help="cpu, cuda or mps; without it the GPU if any."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def source_option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """An option that names data: to be given once, for of two files one would be ignored."""

    def the_one(
        context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
    ) -> str | None:
        if len(values) > 1:
            raise click.UsageError(
                f"{parameter.opts[-1]} is there {len(values)} times, and takes one source; put "
                "the rows into one file",
                context,
            )
        return values[0] if values else None

    return click.option(*names, multiple=True, callback=the_one, metavar="SOURCE", **settings)


def given_options(names: Iterable[str]) -> set[str]:
    """Those of the options that were typed, be it with their defaults."""
    source = click.get_current_context().get_parameter_source
    return {name for name in names if source(name) is ParameterSource.COMMANDLINE}


def flags_of(names: Iterable[str]) -> str:
    """Options as they are typed: `--data-format, --force`."""
    return ", ".join("--" + name.replace("_", "-") for name in names)


def check_sampling(temperature: float) -> None:
    """Refuse filters of a sample, typed where none is drawn: they would change nothing.

    Raises:
        OptionError: names them.
    """
    idle = given_options(("top_k", "top_p", "min_p"))
    if idle and temperature == 0:
        raise OptionError(
            f"{flags_of(sorted(idle))} filter what is drawn at a temperature above 0, and it is 0; "
            "give --temperature too, or leave them away"
        )


def template_options(note: str = "") -> Callable[[Command], Command]:
    """`--system`, `--system-file`, `--chat-template`; `note` ends their help."""
    options = (
        click.option("--system", metavar="TEXT", help=f"System message{note}."),
        click.option(
            "--system-file", metavar="FILE", help=f"Read the system message from a file{note}."
        ),
        click.option(
            "--chat-template",
            metavar="FILE|NAME",
            help="Jinja file to use as chat template, or the name of one of the model's "
            f"several{note}.",
        ),
    )

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def generation_config_option(command: Command) -> Command:
    """`--generation-config`."""
    return click.option(
        "--generation-config",
        is_flag=True,
        help="Sample as the model's makers recommend (info shows how); what is typed comes first.",
    )(command)


def recommended(options: dict[str, Any], checkpoint: "Checkpoint") -> "GenerationOptions":
    """Generation options as a checkpoint's makers recommend them, and as they were typed.

    Raises:
        MinllamaError: the checkpoint recommends nothing, or what it says is damaged.
    """
    from minllama.generation.checkpoint_defaults import sampling_defaults

    defaults = sampling_defaults(checkpoint)
    if defaults is None:
        raise OptionError(
            f"--generation-config: {checkpoint.path} says nothing about sampling; leave it out"
        )
    typed = given_options(options)
    untyped = {name: value for name, value in options.items() if name not in typed}
    changes = {name: options[name] for name in typed}
    changes |= {name: value for name, value in untyped.items() if name not in defaults.options}
    checked = defaults.generation_options(changes)
    check_sampling(checked.temperature)
    click.echo(one_line(f"sampling by {defaults.origin}: {defaults}"), err=True)
    return checked


def chosen_template(choice: str | None, words: "Tokenizer") -> str | None:
    """A template's name, where the tokenizer has one of that name, else the content of a file.

    Raises:
        MinllamaError: it is neither, or the file cannot be read.
    """
    from minllama.cli.prompt_text import read_text

    named = {*words.vocabulary.chat_templates}
    named |= set() if words.chat_template is None else {"default"}
    if choice is None or choice in named:
        return choice
    shown = escaped(choice)
    if not os.path.exists(choice) or os.path.isdir(choice):  # what is no file may be a pipe
        listed = escaped(", ".join(sorted(named)) or "it has none")
        raise OptionError(
            f"--chat-template {shown}: no such file, and no template of the model's ({listed:.200})"
        )
    source = read_text(choice)
    if "{" not in source:
        raise OptionError(f"--chat-template {shown}: holds no Jinja template; name another file")
    return source


def with_template(
    prompt: "PromptOptions", words: "Tokenizer | Callable[[], Tokenizer]"
) -> "PromptOptions":
    """The options of a prompt, with a template that was named by its file in its own words.

    Args:
        prompt: as typed.
        words: the model's tokenizer, or what opens it, which is asked where a template is named.

    Raises:
        MinllamaError: the model has no such template, and no file is called so.
    """
    if prompt.chat_template is None:
        return prompt
    known = words() if callable(words) else words
    return dataclasses.replace(prompt, chat_template=chosen_template(prompt.chat_template, known))


def pick(options: type, values: dict[str, Any]) -> Any:
    """Take the fields of an option dataclass out of the command's arguments, and make it."""
    names = [field.name for field in dataclasses.fields(options)]
    return options(**{name: values.pop(name) for name in names if name in values})


def dataclass_options(
    options: type, *, defaults: dict[str, Any] | None = None, skip: tuple[str, ...] = ()
) -> Callable[[Command], Command]:
    """One command-line option for each field of an option dataclass."""

    def decorate(command: Command) -> Command:
        hints = typing.get_type_hints(options)
        for field in reversed(dataclasses.fields(options)):
            if field.name not in skip:
                default = (defaults or {}).get(field.name, field.default)
                command = _click_option(field, hints[field.name], default)(command)
        return command

    return decorate


def _click_option(
    field: "dataclasses.Field[Any]", hint: Any, default: Any
) -> Callable[[Command], Command]:
    flag = "--" + (field.metadata["flag"] or field.name.replace("_", "-"))
    names = (flag, field.name)
    within = field.metadata["within"]
    notes = [] if default in (None, ()) or isinstance(default, bool) else [_shown(default)]
    meaning = field.metadata["meaning"]
    text = meaning[0].upper() + meaning[1:] + (f" ({'; '.join(notes)})" if notes else "") + "."
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    if kind is bool:
        # One that is true by default is there to be turned off.
        return click.option(
            *names, is_flag=True, flag_value=not default, default=default, help=text
        )
    if typing.get_origin(kind) is tuple:
        metavar = "TEXT" if typing.get_args(kind)[0] is str else "ID|TEXT"
        return click.option(*names, multiple=True, default=default, help=text, metavar=metavar)
    if choices := field.metadata["choices"]:
        return click.option(*names, type=click.Choice(choices), default=default, help=text)
    metavar = {int: "INTEGER", float: "NUMBER", str: "TEXT"}[kind]
    if within is not None:
        metavar = f"{metavar} {within}"
    return click.option(*names, type=kind, default=default, help=text, metavar=f"[{metavar}]")


def _shown(default: Any) -> str:
    """A default in the words of the command line."""
    if isinstance(default, tuple):
        default = ", ".join(default)
    return f"default {default:g}" if isinstance(default, float) else f"default {default}"


@contextlib.contextmanager
def ended_by_interrupts() -> Iterator[None]:
    """Let Ctrl-C end the process at once, with status 130, while libraries are imported.

    Nothing has begun then, and a KeyboardInterrupt in the midst of a C++ library's import aborts
    the process with a core dump, or is lost.
    """
    handler = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if handler is not signal.default_int_handler or not in_main_thread:
        yield  # ignored, as under nohup, or somebody else's
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
    """The model and tokenizer that the shared options name, to generate with.

    Raises:
        MinllamaError: they cannot be opened, or there is no tokenizer.
    """
    with ended_by_interrupts():
        from minllama.checkpoints.load import load_with
        from minllama.checkpoints.weight_format import resolve_weight_format
        from minllama.model.llama import Llama

    # The tokenizer first: it is quick, and a damaged one is found before gigabytes are read.
    checkpoint, words = open_words(source, loading)
    model = load_with(Llama, checkpoint, resolve_weight_format(checkpoint, loading))
    return model, words, checkpoint


def open_words(source: str | None, loading: LoadOptions) -> "tuple[Checkpoint, Tokenizer]":
    """The checkpoint that the shared options name, of which only the tokenizer is read.

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
    """Say it where somebody asks for a half precision that this machine only emulates."""
    if dtype is None:
        return
    from minllama.checkpoints.weight_format import slow_dtype

    if (warning := slow_dtype(dtype, device)) is not None:
        click.echo(f"{option or f'--dtype {dtype}'}: {warning}", err=True)


def torch_dtype(name: str | None) -> "torch.dtype | None":
    """Torch's dtype of that name."""
    if name is None:
        return None
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
