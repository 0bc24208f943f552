"""`minllama generate`: continue a prompt."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minllama.cli.common import (
    check_sampling,
    dataclass_options,
    debug_option,
    ended_by_interrupts,
    model_options,
    open_model,
    quantize_option,
    warn_of_slow_dtype,
)
from minllama.errors import MinllamaError
from minllama.options import GenerationOptions

if TYPE_CHECKING:
    from minllama.decoding import Timings
    from minllama.generation import Generation, TextStream


MAX_INPUT_BYTES = 2**26  # the longest context that can be read holds less text


@click.command("generate")
@click.argument("prompt", required=False)
@click.option("--prompt-file", metavar="FILE", help="Read the prompt from a file; - for stdin.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option("--system", metavar="TEXT", help="System message, with --chat.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON record for each text.")
@model_options
@quantize_option
@dataclass_options(GenerationOptions)
@debug_option
def command(
    prompt: str | None,
    prompt_file: str | None,
    chat: bool,
    system: str | None,
    as_json: bool,
    source: str | None,
    tokenizer: str | None,
    dtype: str | None,
    device: str | None,
    quantize: str,
    **options: Any,
) -> None:
    """Continue PROMPT (or - for standard input); the text streams as it is made."""
    # Whatever can be refused is refused before torch is imported.
    options["json_schema"] = _schema(options["json_schema"])
    if as_json and options["logprobs"] is None and not options["prompt_lookup"]:
        options["logprobs"] = 0
    checked = GenerationOptions(**options)
    check_sampling(checked.temperature)
    if checked.logprobs is not None and not as_json:
        raise MinllamaError("--logprobs are part of a record; give --json too")
    text = _read_prompt(prompt, prompt_file)
    if system is not None and not chat:
        raise MinllamaError("--system needs --chat: without it the prompt stands alone")

    with ended_by_interrupts():
        from minllama.conversation import chat_template, encode_messages
        from minllama.generation import TextStream, encode_prompt

    warn_of_slow_dtype(dtype, device)
    model, words, checkpoint = open_model(source, tokenizer, dtype, device, quantize)
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        context_len = model.config.context_len
        prompt_ids = encode_messages(chat_template(words), words, messages, context_len)
    else:
        prompt_ids = encode_prompt(text, words, model.config.context_len)
        if not prompt_ids:
            raise MinllamaError("the prompt is empty; give some text to continue")
    stream = TextStream(model, words, [prompt_ids], checked)
    if as_json:
        for _ in stream:
            pass
        for result in stream.results:
            click.echo(json.dumps(_record(str(checkpoint.path), text, result, stream.timings)))
    elif checked.n == 1:
        _print_streaming(stream, "" if chat else text)
    else:
        for _ in stream:
            pass
        for number, result in enumerate(stream.results):
            click.secho(f"--- {number + 1} of {checked.n} ({result.finish_reason})", dim=True)
            click.echo(result.text, color=True)
    click.echo(summary(stream.timings, stream.results), err=True)


def _print_streaming(stream: "TextStream", prompt: str) -> None:
    if sys.stdout.isatty():  # a person reads on from the prompt; a program wants the new text only
        click.secho(prompt, dim=True, nl=False)
    for piece in stream:
        click.echo(piece.text, nl=False, color=True)  # as it is, into files too
        sys.stdout.flush()
    click.echo()


def summary(timings: "Timings", results: "list[Generation]") -> str:
    """One line: tokens per second of both phases, and why the texts ended."""
    reasons = ", ".join(sorted({result.finish_reason for result in results}))
    return (
        f"[prefill {timings.prefill_tokens} tokens, {timings.prefill_rate:.1f} tokens/s; "
        f"decode {timings.decode_tokens} tokens, {timings.decode_rate:.1f} tokens/s; "
        f"ended by {reasons}]"
    )


def _record(model: str, prompt: str, result: "Generation", timings: "Timings") -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_ids,
        "tokens": result.token_ids,
        "logprobs": result.logprobs
        and [
            {
                "token": token.text,
                "logprob": token.logprob,
                "alternatives": [
                    {"id": token_id, "logprob": logprob} for token_id, logprob in token.alternatives
                ],
            }
            for token in result.logprobs
        ],
        "timings": {
            "prefill_tokens": timings.prefill_tokens,
            "prefill_seconds": round(timings.prefill_seconds, 6),
            "decode_tokens": timings.decode_tokens,
            "decode_seconds": round(timings.decode_seconds, 6),
        },
    }


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise MinllamaError(
            "give one prompt: as an argument, with --prompt-file, or - for standard input"
        )
    source = prompt if prompt == "-" else prompt_file
    if source is None:
        assert prompt is not None
        return prompt
    return _read_text(None if source == "-" else source)


def _read_text(source: str | None) -> str:
    """The content of a file, or of standard input; what is endless is refused, not read."""
    where = "standard input" if source is None else source or repr(source)
    try:
        with sys.stdin.buffer if source is None else Path(source).open("rb") as file:
            content = file.read(MAX_INPUT_BYTES + 1)
        if len(content) > MAX_INPUT_BYTES:
            raise MinllamaError(f"{where}: more than {MAX_INPUT_BYTES // 2**20} MiB; shorten it")
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MinllamaError(
            f"{where}: not UTF-8 at byte {error.start}; convert it to UTF-8"
        ) from error
    except OSError as error:
        raise MinllamaError(f"{where}: cannot be read ({error.strerror})") from error


def _schema(value: str | None) -> str | None:
    """A JSON schema given in place, or the content of a file that holds one."""
    if value is None or value.lstrip().startswith("{"):
        return value
    try:
        return _read_text(value)
    except MinllamaError as error:
        raise MinllamaError(f"--json-schema {error}; give a file, or a schema in {{}}") from error
