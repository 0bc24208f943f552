"""Texts and token ids of requests as prompts: what `/classify`, `/predict` and embeddings read.

Over-long ones are refused with both numbers, or truncated where the request, or the classifier's
own options, say so.
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from minllama.classification.prompts import EncodedPrompt, PromptTemplate
from minllama.data.treebank import undo_treebank
from minllama.errors import MinllamaError
from minllama.generation.api import check_can_fit
from minllama.server.errors import TOO_LONG, RequestError, as_request_error
from minllama.server.openai_fields import check_ids
from minllama.server.registry import ServedModel
from minllama.server.service import Service

Ids = list[int]
Input = str | list[str] | Ids | list[Ids]
ALL = -1  # vLLM's word for as many tokens as the model can read


@dataclass(frozen=True)
class Reading:
    """How texts become prompts.

    Attributes:
        template: the frame around a text.
        most: tokens of a prompt that are kept; `ALL` for as many as fit, None to refuse longer
            ones.
        keep_end: which end of a longer text is kept; None for the template's own.
        undo_treebank: see `PromptOptions`.
        has_special: whether BOS and EOS are added, where the tokenizer does.
        param: the field of the request, for errors.
    """

    template: PromptTemplate
    most: int | None = None
    keep_end: bool | None = None
    undo_treebank: bool = False
    has_special: bool = True
    param: str = "input"


def as_list(given: Input) -> Sequence[str | Ids]:
    """One input, or several, as a list of texts or of token ids."""
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [given]
    return given  # type: ignore[return-value]


async def encode_inputs(
    service: Service, model: ServedModel, inputs: Sequence[str | Ids], reading: Reading
) -> list[EncodedPrompt]:
    """Each input in its prompt; ids are whole prompts as they are.

    Raises:
        RequestError: one is empty, too long, holds unknown ids, or cannot be encoded.
    """
    limit = min(reading.template.max_len, model.context_len)
    if service.options.max_prompt_tokens is not None:
        limit = min(limit, service.options.max_prompt_tokens)
    encode = partial(_encode_all, model, inputs, reading, limit)
    return await service.in_thread(encode)


def _encode_all(
    model: ServedModel, inputs: Sequence[str | Ids], reading: Reading, limit: int
) -> list[EncodedPrompt]:
    prompts = []
    for number, given in enumerate(inputs):
        try:
            if isinstance(given, str):
                prompt = _of_text(given, reading, limit)
            else:
                check_ids(reading.param, given, model)
                prompt = _of_ids(list(given), reading, limit)
            if not prompt.ids:
                raise MinllamaError("it is empty; give some text")
            check_ids(reading.param, prompt.ids, model)
        except MinllamaError as error:
            found = as_request_error(error)
            where = f"{reading.param}.{number}" if len(inputs) > 1 else reading.param
            is_named = found.message.startswith(reading.param)
            raise RequestError(
                found.message if is_named else f"{where}: {found.message}",
                param=where,
                code=found.code,
                status=found.status,
            ) from error
        prompts.append(prompt)
    return prompts


def _of_text(text: str, reading: Reading, limit: int) -> EncodedPrompt:
    template, tokenizer = reading.template, reading.template.tokenizer
    frame = copy.copy(template)
    if reading.undo_treebank:
        text = undo_treebank(text)
    if reading.most is None:
        check_can_fit(text, tokenizer, limit)
        frame.max_len = sys.maxsize
        prompt = frame.encode(text)
        _check_length(_full_len(prompt), limit)
    else:
        frame.max_len = limit if reading.most == ALL else min(limit, reading.most)
        if reading.keep_end is not None:
            frame.keep_end = reading.keep_end
        prompt = frame.encode(_shortened(text, frame))
    return prompt if reading.has_special else _without_special(prompt, reading.template)


def _of_ids(given: Ids, reading: Reading, limit: int) -> EncodedPrompt:
    """Ids as they are; the labels that may follow are those after any text of the template."""
    continuations: tuple[tuple[int, ...], ...] = ()
    if reading.template.labels:
        continuations = reading.template.encode("").continuations
    label_len = max(map(len, continuations), default=0)
    if reading.most is None:
        _check_length(len(given) + label_len, limit)
        return EncodedPrompt(tuple(given), continuations)
    most = (limit if reading.most == ALL else min(limit, reading.most)) - label_len
    if most < 1:
        raise MinllamaError("the labels leave no room for a text")
    # As vLLM does: the end of ids is kept.
    kept = given[:most] if reading.keep_end is False else given[-most:]
    return EncodedPrompt(tuple(kept), continuations, is_shortened=len(kept) < len(given))


def _shortened(text: str, frame: PromptTemplate) -> str:
    """At most so much of a text as may fit, so that megabytes are not tokenized in vain."""
    if len(text) <= frame.max_len:
        return text
    n_chars = frame.max_len * frame.tokenizer.longest_token + 1
    return text[-n_chars:] if frame.keep_end else text[:n_chars]


def _without_special(prompt: EncodedPrompt, template: PromptTemplate) -> EncodedPrompt:
    ids, tokenizer = prompt.ids, template.tokenizer
    if ids[:1] == (tokenizer.bos_id,):
        ids = ids[1:]
    if template.eos is not False and ids[-1:] == (tokenizer.eos_id,):
        ids = ids[:-1]
    return replace(prompt, ids=ids)


def _full_len(prompt: EncodedPrompt) -> int:
    return len(prompt) + max(map(len, prompt.continuations), default=0)


def _check_length(n_tokens: int, limit: int) -> None:
    if n_tokens > limit:
        raise RequestError(
            f"the prompt has {n_tokens} tokens, and at most {limit} are possible; shorten it, or "
            "let it be truncated",
            code=TOO_LONG,
        )
