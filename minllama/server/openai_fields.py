"""What the routes of OpenAI's API have in common: fields of requests, and parts of answers."""

import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from minllama.generation.sequence_text import PromptLogprob
from minllama.server.errors import RequestError
from minllama.server.registry import ServedModel
from minllama.server.routing import Body, check_range
from minllama.server.service import Service
from minllama.server.texts import Texts
from minllama.tokenizer.tokenizer import Tokenizer

INT64 = 2**63
MAX_STOP_CHARS = 1024
LEAST_LOGPROB = -9999.0  # OpenAI's word for a token that is out of the question

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(Body):
    """What a stream holds besides."""

    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: in every event


class SamplingFields(Body):
    """Fields of completions and of chats; names and ranges are OpenAI's, the last five vLLM's."""

    model: str | None = Field(None, max_length=512)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    n: int | None = Field(None, ge=1, lt=2**31)
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    ignore_eos: bool | None = None
    guided_regex: str | None = None

    @property
    def has_usage(self) -> bool:
        """Whether a stream ends with what it has cost."""
        return self.stream_options is not None and self.stream_options.include_usage

    def given(self, service: Service, model: ServedModel) -> dict[str, Any]:
        """Options of `GenerationOptions` by name; None where the request says nothing.

        Raises:
            RequestError: a value is beyond a limit of this server.
        """
        limits = service.options
        check_range("n", self.n, 1, min(limits.max_n, limits.max_sequences))
        check_range("max_tokens", self.max_tokens, 0, limits.max_tokens)
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),  # -1 is vLLM's for all
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "logit_bias": logit_bias(self.logit_bias, model.tokenizer, limits.max_logit_bias),
            "seed": None if self.seed is None else self.seed % 2**64,
            "n": self.n,
            "stop": stop_strings(self.stop, limits.max_stop),
            "ignore_eos": self.ignore_eos,
            "regex": schema_text("guided_regex", self.guided_regex, limits.max_schema_bytes),
        }


def logit_bias(
    given: Mapping[str, float] | None, tokenizer: Tokenizer, most: int
) -> tuple[tuple[int | str, float], ...] | None:
    """Biases by token id, which JSON spells as text.

    Raises:
        RequestError: a key is no id of this vocabulary, or there are too many.
    """
    if given is None:
        return None
    if len(given) > most:
        message = f"logit_bias: at most {most} tokens, not {len(given)}"
        raise RequestError(message, param="logit_bias")
    biases = []
    for token, bias in given.items():
        is_id = token.isascii() and token.isdecimal() and len(token) < 10
        if not is_id or int(token) >= tokenizer.vocab_size:
            raise RequestError(
                f"logit_bias: keys are token ids from 0 to {tokenizer.vocab_size - 1}",
                param="logit_bias",
            )
        biases.append((int(token), bias))
    return tuple(biases)


def stop_strings(given: str | Sequence[str] | None, most: int) -> tuple[str, ...] | None:
    """Stop strings as a tuple.

    Raises:
        RequestError: there are too many, or one is empty or too long.
    """
    if given is None:
        return None
    listed = (given,) if isinstance(given, str) else tuple(given)
    if len(listed) > most:
        raise RequestError(f"stop: at most {most} strings, not {len(listed)}", param="stop")
    if not all(0 < len(text) <= MAX_STOP_CHARS for text in listed):
        raise RequestError(f"stop: strings of 1 to {MAX_STOP_CHARS} characters", param="stop")
    return listed


def schema_text(param: str, text: str | None, most: int) -> str | None:
    """A schema or a regular expression, which is not too long.

    Raises:
        RequestError: it is.
    """
    if text is not None and len(text) > most:
        raise RequestError(
            f"{param} has {len(text)} characters, at most {most} are possible", param=param
        )
    return text


def check_ids(param: str, ids: Sequence[int], model: ServedModel) -> None:
    """Refuse ids that the model or its tokenizer does not know.

    Raises:
        RequestError: there are such.
    """
    n_tokens = min(model.llama.config.vocab_size, model.tokenizer.vocab_size)
    if (largest := max(ids, default=0)) >= n_tokens:
        raise RequestError(
            f"{param} holds the token id {largest}; the model knows 0 to {n_tokens - 1}",
            param=param,
        )


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def usage_of(texts: Texts) -> dict[str, Any]:
    """What a request has cost; every prompt counts once, whatever `n`."""
    return usage_in_tokens(texts.n_prompt_tokens, texts.n_new_tokens, texts.n_cached_tokens)


def usage_in_tokens(n_prompt: int, n_new: int = 0, n_cached: int = 0) -> dict[str, Any]:
    """A request's cost in OpenAI's words.

    Args:
        n_prompt: tokens of its prompts.
        n_new: tokens that were generated.
        n_cached: tokens of its prompts that a cache had.
    """
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_new,
        "total_tokens": n_prompt + n_new,
        "prompt_tokens_details": {"cached_tokens": n_cached},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def usage_in_event(fields: SamplingFields, texts: Texts) -> dict[str, Any]:
    """The field `usage` of an event that holds a text: absent, null, or the cost so far."""
    if not fields.has_usage:
        return {}
    is_counted = fields.stream_options and fields.stream_options.continuous_usage_stats
    return {"usage": usage_of(texts) if is_counted else None}


def shown_logprob(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LEAST_LOGPROB)


def shown_token(spelled: bytes) -> str:
    r"""A token's text; `bytes:\xe2` where it holds a part of a character, as OpenAI shows it."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def alternatives_of(token: PromptLogprob, tokenizer: Tokenizer) -> list[tuple[bytes, float]]:
    """The bytes and log-probabilities of the most likely tokens in its place."""
    return [(tokenizer.token_bytes(i), shown_logprob(p)) for i, p in token.alternatives]
