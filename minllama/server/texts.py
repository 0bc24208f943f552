"""Prompts to texts over a service: what routes of every protocol generate with."""

import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from minllama.engine.sequence import Constraint, Request
from minllama.errors import OptionError
from minllama.generation.api import encode_prompt, text_request
from minllama.generation.conversation import encode_messages
from minllama.generation.sequence_text import Generation, Piece, SequenceText
from minllama.generation.tool_calls import Tool
from minllama.options import GenerationOptions
from minllama.server.errors import RequestError, as_request_error
from minllama.server.jobs import Job
from minllama.server.registry import ServedModel
from minllama.server.service import Service

# OpenAI's, where neither the request nor the model's makers say more.
DEFAULTS: Mapping[str, Any] = {"temperature": 1.0}


def generation_options(
    model: ServedModel,
    given: Mapping[str, Any],
    *,
    max_new_tokens: int | None = None,
    defaults: Mapping[str, Any] = DEFAULTS,
) -> GenerationOptions:
    """Options of a request: its own, then what the model's makers recommend, then the protocol's.

    Args:
        model: whose makers may recommend something.
        given: options by name as the request has them; None is not given.
        max_new_tokens: where the request says nothing; None for as many as the context has room
            for.
        defaults: of the protocol; OpenAI's.

    Raises:
        OptionError: one is wrong.
    """
    said = {} if model.defaults is None else dict(model.defaults.options)
    said.pop("max_new_tokens", None)
    own = {name: value for name, value in given.items() if value is not None}
    most = model.context_len if max_new_tokens is None else max_new_tokens
    return GenerationOptions(**{"max_new_tokens": most, **defaults, **said, **own})


async def encode(service: Service, model: ServedModel, text: str) -> list[int]:
    """A prompt's token ids; special tokens that it spells are plain text.

    Raises:
        MinllamaError: it cannot be encoded, or is too long.
    """
    ids = await service.in_thread(encode_prompt, text, model.tokenizer, model.context_len)
    check_length(service, model, len(ids))
    return ids


async def encode_chat(
    service: Service,
    model: ServedModel,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Tool] = (),
) -> list[int]:
    """The token ids of messages in the model's chat template, up to where the answer begins.

    Args:
        service: whose threads to use.
        model: of the template.
        messages: in OpenAI's shape, with contents as texts.
        tools: that the model may call.

    Raises:
        MinllamaError: there is no template, it refuses the messages, or they are too long.
    """
    if len(messages) > model.context_len:  # each has a token at least: refused before any work
        raise RequestError(
            f"the prompt has {len(messages)} messages, and at most {model.context_len - 1} tokens "
            "are possible; shorten it",
            code="context_length_exceeded",
        )

    def render() -> list[int]:
        template, words = model.template(), model.tokenizer
        return encode_messages(template, words, messages, model.context_len, tools=tools)

    ids = await service.in_thread(render)
    check_length(service, model, len(ids))
    return ids


def check_length(service: Service, model: ServedModel, n_tokens: int) -> None:
    """Refuse a prompt that leaves no room in the context, or is longer than this server allows.

    Raises:
        RequestError: with both numbers.
    """
    most = model.context_len - 1
    if service.options.max_prompt_tokens is not None:
        most = min(most, service.options.max_prompt_tokens)
    if n_tokens > most:
        raise RequestError(
            f"the prompt has {n_tokens} tokens, and at most {most} are possible; shorten it",
            code="context_length_exceeded",
        )
    if not n_tokens:
        raise RequestError("the prompt is empty; give some text to continue")


class Texts:
    """Texts of one request while they are generated; made by `generate`.

    Attributes:
        job: their job.
        prompts: token ids.
        results: one for each row, prompt * n + sample; whole when the job has ended.
        n_new_tokens: of the texts so far, those that ended them included.
    """

    def __init__(
        self, job: Job, prompts: list[list[int]], texts: list[SequenceText], schema_name: str
    ) -> None:
        self.job, self.prompts, self._texts = job, prompts, texts
        self._schema_name = schema_name
        self.results = [text.result for text in texts]
        self.n_new_tokens = 0

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Bits of text as they come: each time one for each row that has got tokens.

        Raises:
            MinllamaError: the request failed, took too long, or the server ends.
        """
        async for tokens in self.job:
            pieces: dict[int, Piece] = {}
            for token in tokens:
                text = self._texts[token.row]
                if text.has_ended:
                    continue
                if token.finish_reason == "error":
                    raise _schema_error(self.job.error_of(token.row), self._schema_name)
                self.n_new_tokens += token.id is not None
                piece = text.feed(token)
                if (first := pieces.get(token.row)) is not None:
                    piece = piece._replace(
                        text=first.text + piece.text, logprobs=first.logprobs + piece.logprobs
                    )
                pieces[token.row] = piece
                if piece.finish_reason is not None:
                    self.job.finish(token.row)
            if pieces:
                yield list(pieces.values())

    async def whole(self) -> list[Generation]:
        """The results, once all rows have ended.

        Raises:
            MinllamaError: as `pieces` does.
        """
        async for _ in self.pieces():
            pass
        return self.results

    @property
    def n_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def n_cached_tokens(self) -> int:
        """How many of the prompts' tokens a prefix cache had."""
        return sum(map(self.job.cached_tokens, range(len(self.prompts))))


async def generate(
    service: Service,
    model: ServedModel,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    *,
    salt: str,
    make_constraint: Callable[[], Constraint] | None = None,
    schema_name: str = "json_schema",
) -> Texts:
    """Let prompts be continued, all of them or none.

    Args:
        service: who computes.
        model: which.
        prompts: token ids, checked by `check_length`.
        options: how; `n` samples of each prompt. Without a seed, each prompt draws its own.
        salt: `routing.partition(request)`.
        make_constraint: what each text is held to, where that is not in the options.
        schema_name: the field of the request that the options' schema comes from, for errors.

    Raises:
        RequestError: the queue is full, or the server is ending.
        OptionError: an option is wrong.
    """
    listed = [list(ids) for ids in prompts]
    seed = random.SystemRandom().getrandbits(64) if options.seed is None else options.seed

    def prepare() -> list[Request]:
        return [
            text_request(
                *(model.tokenizer, ids, options, model.llama.config.vocab_size),
                seed=f"{seed}/{number if options.seed is None else 0}",
                salt=salt,
                make_constraint=make_constraint,
            )
            for number, ids in enumerate(listed)
        ]

    schema_name = schema_name if options.regex is None else "guided_regex"
    if options.json_schema is None and options.regex is None:
        requests = prepare()
    else:
        try:
            requests = await service.in_thread(prepare, timeout=service.options.schema_seconds)
        except OptionError as error:
            raise _schema_error(error, schema_name) from error
    job = service.submit(model, requests)
    stop_ids = requests[0].stop_ids
    texts = [
        SequenceText(model.tokenizer, ids, options, stop_ids=stop_ids)
        for ids in listed
        for _ in range(options.n)
    ]
    return Texts(job, listed, texts, schema_name)


def _schema_error(error: BaseException, name: str) -> RequestError:
    """An error of a constraint by the name of the field that it comes from."""
    if not isinstance(error, OptionError):
        return as_request_error(error)
    words = str(error)
    for own in ("json_schema", "regex"):
        if words.startswith(own):
            return RequestError(name + words.removeprefix(own), param=name)
    return as_request_error(error)
