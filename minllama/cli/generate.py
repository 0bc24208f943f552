"""`minllama generate`: continue a prompt."""

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from minllama.cli.grouped import GroupedCommand, option
from minllama.cli.open import (
    activations_option,
    base_option,
    check_sampling,
    chosen_template,
    dataclass_options,
    debug_option,
    ended_by_interrupts,
    generation_config_option,
    model_options,
    open_model,
    pick,
    quantize_option,
    recommended,
    template_options,
    warn_of_slow_dtype,
)
from minllama.cli.prompt_text import MARK, PromptText, read_system, read_text
from minllama.errors import MinllamaError
from minllama.options import GenerationOptions
from minllama.options.loading import LoadOptions
from minllama.text import escaped, first_few, one_line

if TYPE_CHECKING:
    from minllama.generation.api import TextStream
    from minllama.generation.decode import Timings
    from minllama.generation.sequence_text import Generation, PromptLogprob
    from minllama.tokenizer.tokenizer import Tokenizer


@click.command("generate", cls=GroupedCommand)
@click.argument("prompt", required=False)
@option(
    "--prompt-file",
    metavar="FILE",
    group="Prompt",
    help="Read the prompt from a file; - for stdin.",
)
@option(
    "--chat",
    is_flag=True,
    group="Prompt",
    common=True,
    help="Format the prompt with the model's chat template.",
)
@template_options(", with --chat")
@option("--json", "as_json", is_flag=True, group="Output", help="Print one JSON record per text.")
@model_options
@base_option
@quantize_option
@activations_option
@generation_config_option
@dataclass_options(GenerationOptions)
@debug_option
def command(
    prompt: str | None,
    prompt_file: str | None,
    chat: bool,
    system: str | None,
    system_file: str | None,
    chat_template: str | None,
    as_json: bool,
    source: str | None,
    generation_config: bool,
    **options: Any,
) -> None:
    """Continue PROMPT (- for standard input), and print the text as it is generated.

    Piped or redirected input is put before PROMPT.
    """
    loading = pick(LoadOptions, options)
    # Check everything that needs no torch before importing it.
    options["json_schema"] = _schema(options["json_schema"])
    if as_json and options["logprobs"] is None and not options["prompt_lookup"]:
        options["logprobs"] = 0
    checked = GenerationOptions(**options)
    if not generation_config:
        check_sampling(checked.temperature)
    if checked.logprobs is not None and not as_json:
        raise MinllamaError("--logprobs are part of the JSON records; give --json too")
    system = read_system(system, system_file)
    _check_chat(chat, system, chat_template, checked.special)
    prompt_text = PromptText(prompt, prompt_file)

    with ended_by_interrupts():
        from minllama.generation.api import TextStream

    warn_of_slow_dtype(loading.dtype, loading.device)
    model, words, checkpoint = open_model(source, loading)
    if generation_config:
        checked = recommended(options, checkpoint)
    text = prompt_text.whole()
    context_len = model.config.context_len
    if chat:
        prompt_ids = _chat_ids(
            text, system, chosen_template(chat_template, words), words, context_len
        )
    else:
        prompt_ids = _prompt_ids(text, words, context_len, checked.special)
    stream = TextStream(model, words, [prompt_ids], checked)
    if as_json:
        for _ in stream:
            pass
        for result in stream.results:
            record = _record(str(checkpoint.path), text, result, stream.timings, words)
            click.echo(json.dumps(record))
    else:
        _print_texts(stream, "" if chat else text, checked.n)
    click.echo(summary(stream.timings, stream.results), err=True)


def _check_chat(chat: bool, system: str | None, template: str | None, special: bool) -> None:
    if system is not None and not chat:
        raise MinllamaError("--system needs --chat; add it, or omit --system")
    if template is not None and not chat:
        raise MinllamaError("--chat-template needs --chat; add it, or omit --chat-template")
    if special and chat:
        raise MinllamaError(
            "--special is for a prompt that is already in the model's chat format, and --chat "
            "applies that format; give one of them"
        )


def _chat_ids(
    text: str, system: str | None, template: str | None, words: "Tokenizer", context_len: int
) -> list[int]:
    """Token ids of a conversation of one message."""
    from minllama.generation.conversation import chat_template, encode_messages

    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    ids = encode_messages(chat_template(words, template), words, messages, context_len)
    _note_special_tokens(text, words, "--special, without --chat")
    return ids


def _prompt_ids(text: str, words: "Tokenizer", context_len: int, special: bool) -> list[int]:
    """Token ids of a prompt without a chat template."""
    from minllama.generation.api import encode_prompt

    ids = encode_prompt(text, words, context_len, special=special)
    if not ids:
        raise MinllamaError("the prompt is empty; give some text to continue")
    if not special:
        _note_special_tokens(text, words, "--special")
    return ids


def _note_special_tokens(text: str, words: "Tokenizer", options: str) -> None:
    """Tell the user that special tokens in a prompt are read as plain text."""
    from minllama.generation.api import spelled_special

    spelled = spelled_special(text, words)
    if spelled:
        listed = first_few(map(escaped, spelled), 3)
        notice = f"read as plain text: {listed} (special tokens with {options})"
        click.echo(one_line(notice), err=True)


def _print_texts(stream: "TextStream", prompt: str, n: int) -> None:
    """Print one text as it is generated, several when all are complete."""
    if n == 1:
        _print_streaming(stream, prompt)
        return
    for _ in stream:
        pass
    for number, result in enumerate(stream.results):
        click.secho(f"--- {number + 1} of {n} ({result.finish_reason})", dim=True)
        click.echo(result.text, color=True)


def _print_streaming(stream: "TextStream", prompt: str) -> None:
    if sys.stdout.isatty():  # people read on from the prompt, programs need only the new text
        click.secho(prompt, dim=True, nl=False)
    for piece in stream:
        click.echo(piece.text, nl=False, color=True)  # unchanged, also into files
        sys.stdout.flush()
    click.echo()


def summary(timings: "Timings", results: "list[Generation]") -> str:
    """One line: tokens per second of both phases, and the finish reasons."""
    reasons = ", ".join(sorted({result.finish_reason for result in results}))
    return (
        f"[prefill {timings.prefill_tokens} tokens, {timings.prefill_rate:.1f} tokens/s; "
        f"decode {timings.decode_tokens} tokens, {timings.decode_rate:.1f} tokens/s; "
        f"ended by {reasons}]"
    )


def _logprob_record(token: "PromptLogprob", words: "Tokenizer") -> dict[str, Any]:
    """One token's log-probability; `bytes` as in OpenAI's API, for incomplete characters."""
    return {
        "id": token.id,
        "token": token.text,
        "bytes": list(token.bytes),
        "logprob": token.logprob,
        "alternatives": [
            {
                "id": token_id,
                "token": words.token_text(token_id),
                "bytes": list(words.token_bytes(token_id)),
                "logprob": logprob,
            }
            for token_id, logprob in token.alternatives
        ],
    }


def _record(
    model: str, prompt: str, result: "Generation", timings: "Timings", words: "Tokenizer"
) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_ids,
        "tokens": result.token_ids,
        "logprobs": result.logprobs
        and [_logprob_record(token, words) for token in result.logprobs],
        "prompt_logprobs": result.prompt_logprobs
        and [_logprob_record(token, words) for token in result.prompt_logprobs],
        "timings": {
            "prefill_tokens": timings.prefill_tokens,
            "prefill_seconds": round(timings.prefill_seconds, 6),
            "decode_tokens": timings.decode_tokens,
            "decode_seconds": round(timings.decode_seconds, 6),
        },
    }


def _schema(value: str | None) -> str | None:
    """A JSON schema given directly, or read from a file."""
    value = value and value.removeprefix(MARK)
    if value is None or value.lstrip().startswith("{"):
        return value
    try:
        return read_text(value)
    except MinllamaError as error:
        raise MinllamaError(f"--json-schema {error}; give a file, or a schema in braces") from error
