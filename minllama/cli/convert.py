"""`minllama convert`: write a checkpoint in another format."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from minllama.atomic import check_replaceable
from minllama.cli.grouped import GroupedCommand, option
from minllama.cli.open import base_option, debug_option, ended_by_interrupts, torch_dtype
from minllama.errors import MinllamaError
from minllama.options.loading import DTYPES
from minllama.text import one_line

if TYPE_CHECKING:
    from minllama.checkpoints.types import Checkpoint

Target = Literal["hf", "gguf", "llama2c"]
GgufDtype = Literal["f32", "f16", "bf16", "q8_0"]
GGUF_DTYPES: dict[str, GgufDtype] = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "q8_0": "q8_0",
}


@click.command("convert", cls=GroupedCommand)
@click.argument("src")
@click.argument("dst")
@option(
    "--to",
    "target",
    type=click.Choice(["hf", "gguf", "llama2c"]),
    required=True,
    group="Output",
    common=True,
    help="A Hugging Face folder, a GGUF file, or llama2.c's legacy .bin file.",
)
@option(
    "--dtype",
    type=click.Choice([*DTYPES, "q8_0"]),
    group="Output",
    common=True,
    help="Data type of the weights (default: as stored; float32 for quantized ones).",
)
@option(
    "--tokenizer",
    metavar="PATH",
    group="Model",
    help="Tokenizer of SRC: file (also GGUF) or folder.",
)
@option("--force", is_flag=True, group="Output", help="Replace DST if it exists.")
@base_option
@debug_option
def command(
    src: str,
    dst: str,
    target: Target,
    dtype: str | None,
    tokenizer: str | None,
    force: bool,
    base: str | None,
) -> None:
    """Write the checkpoint SRC (a file, a folder, a Hugging Face id, or `default`) to DST.

    A PEFT adapter is merged into its base.
    """
    if not dst:
        raise MinllamaError("DST is empty; name a file or folder to write")
    if target == "hf":
        check_replaceable(dst)
    if Path(dst).exists() and not force:
        raise MinllamaError(f"{dst} exists; --force replaces it")
    if dtype == "q8_0" and target != "gguf":
        raise MinllamaError(
            f"--dtype q8_0 needs --to gguf; --to {target} takes {', '.join(DTYPES)}"
        )
    if target == "llama2c" and dtype not in (None, "float32"):
        raise MinllamaError("llama2.c's legacy .bin format is float32 only; omit --dtype")

    with ended_by_interrupts():
        from minllama.checkpoints.open import open_checkpoint

    write(open_checkpoint(src, tokenizer=tokenizer, base=base), dst, target, dtype)


def write(checkpoint: "Checkpoint", dst: str, target: Target, dtype: str | None) -> None:
    """Write a checkpoint in another format, and report it on stderr.

    Raises:
        MinllamaError: it is damaged, or the format cannot represent it; nothing is written.
    """
    with ended_by_interrupts():
        from minllama.checkpoints.gguf import write_gguf
        from minllama.checkpoints.huggingface import write_huggingface
        from minllama.checkpoints.llama2c import write_llama2c_bin
        from minllama.generation.checkpoint_defaults import (
            settings_for_gguf,
            settings_for_huggingface,
        )
        from minllama.model.llama import Llama
        from minllama.tokenizer.size import check_fits, count_tokens

    vocabulary = checkpoint.vocabulary
    if vocabulary is not None:  # before reading weights; a llama2.c file would not reveal it
        where = checkpoint.tokenizer or str(checkpoint.path)
        check_fits(count_tokens(vocabulary), checkpoint.config.vocab_size, where)
    collect = {"hf": settings_for_huggingface, "gguf": settings_for_gguf}.get(target)
    settings = {} if collect is None else collect(checkpoint)
    dtype = dtype or ("float32" if target == "llama2c" else _stored_dtype(checkpoint))
    # Through the model: names, shapes and values are checked before anything is written.
    # A GGUF file stores norms and biases in float32, whatever the type of its matrices.
    loaded_dtype = torch_dtype("float32" if target == "gguf" else dtype)
    model = Llama.from_checkpoint(checkpoint, dtype=loaded_dtype, device="cpu")
    tensors = model.state_dict()
    if target == "hf":
        write_huggingface(dst, model.config, tensors, vocabulary=vocabulary, generation=settings)
    elif target == "gguf":
        write_gguf(dst, model.config, tensors, vocabulary, GGUF_DTYPES[dtype], further=settings)
    else:
        write_llama2c_bin(dst, model.config, tensors)
    click.echo(one_line(f"wrote {dst} ({dtype})"), err=True)


def _stored_dtype(checkpoint: "Checkpoint") -> str:
    """The most common stored dtype; float32 for quantized blocks."""
    stored = Counter[str]()
    for tensor in checkpoint.tensors.values():
        kind = tensor.stored_as if tensor.stored_as in DTYPES else "float32"
        stored[kind] += tensor.stored_bytes
    return stored.most_common(1)[0][0]
