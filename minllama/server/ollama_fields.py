"""What the routes of Ollama's API have in common: fields of requests, and parts of answers."""

import datetime
import json
import re
import time
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from minllama.options import GenerationOptions
from minllama.server.errors import RequestError
from minllama.server.openai_fields import INT64, schema_text, stop_strings
from minllama.server.registry import ServedModel
from minllama.server.routing import Body, check_range
from minllama.server.service import Service
from minllama.server.texts import Texts, generation_options

# Ollama's, where neither the request nor the model's makers say more.
DEFAULTS: Mapping[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
ANY_OBJECT = '{"type": "object"}'
LEAST_TOP_P = 1e-9  # leaves the most likely token, as 0 does elsewhere
_DURATION = re.compile(r"-?((\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h))+|[+-]?\d+")
LATEST = ":latest"  # the tag that clients put behind a name

Count = Annotated[int, Field(ge=-(2**31), lt=2**31)]


class Options(Body):
    """How to generate; names are llama.cpp's. Those of memory and of threads are not looked at."""

    num_predict: Count | None = None
    temperature: float | None = Field(None, ge=0, le=10**6)
    top_k: Count | None = None
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: str | list[str] | None = None
    repeat_penalty: float | None = Field(None, gt=0, le=100)
    repeat_last_n: Count | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    typical_p: float | None = None
    tfs_z: float | None = None
    mirostat: int | None = None

    def given(self, most_stop: int) -> dict[str, Any]:
        """Options of `GenerationOptions` by name; None where the request says nothing.

        Raises:
            RequestError: one would change the text and is not possible here.
        """
        for name, neutral in (("typical_p", 1), ("tfs_z", 1), ("mirostat", 0)):
            if getattr(self, name) not in (None, neutral):
                message = f"options.{name} is not supported; give {neutral}, or omit it"
                raise RequestError(message, param=f"options.{name}")
        penalty = self.repeat_penalty
        if penalty is not None and penalty != 1:
            if self.repeat_last_n == 0:
                penalty = 1.0
            elif self.repeat_last_n not in (None, -1):
                raise RequestError(
                    "options.repeat_last_n must be -1 or 0: repeat_penalty counts all of the text",
                    param="options.repeat_last_n",
                )
        return {
            "temperature": self.temperature,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "top_p": None if self.top_p is None else max(self.top_p, LEAST_TOP_P),
            "min_p": self.min_p,
            "seed": None if self.seed in (None, -1) else self.seed % 2**64,
            "stop": stop_strings(self.stop or None, most_stop),
            "repetition_penalty": penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }


class OllamaBody(Body):
    """Fields of texts and of chats."""

    model: str = Field(min_length=1, max_length=512)
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: Options | None = None
    keep_alive: float | str | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, lt=2**31)

    @property
    def is_streamed(self) -> bool:
        """Ollama streams unless it is told not to."""
        return self.stream is not False

    @property
    def unloads(self) -> bool:
        """Whether the model is to be given up at once, which is answered and not done."""
        return str(self.keep_alive).rstrip("smh") in ("0", "0.0")

    def generation_options(self, service: Service, model: ServedModel) -> GenerationOptions:
        """How to generate.

        Raises:
            RequestError: a value is beyond a limit, or not possible here.
        """
        limits = service.options
        if isinstance(self.keep_alive, str) and not _DURATION.fullmatch(self.keep_alive or "0"):
            raise RequestError("keep_alive must be a duration, such as 5m", param="keep_alive")
        if self.think:
            raise RequestError(f"{model.id} does not support thinking", param="think")
        check_range("top_logprobs", self.top_logprobs, 0, limits.max_logprobs)
        options = self.options or Options.model_validate({})
        room = min(model.context_len, limits.max_tokens)
        most = options.num_predict
        if most is not None and most > 0:
            check_range("options.num_predict", most, 1, limits.max_tokens)
        given = options.given(limits.max_stop)
        given |= {
            "max_new_tokens": most if most is not None and most > 0 else room,
            "json_schema": self._schema(limits.max_schema_bytes),
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
        }
        return generation_options(model, given, defaults=DEFAULTS)

    def _schema(self, most: int) -> str | None:
        """The JSON schema of `format`, as text; None where the text is free."""
        if not self.format:
            return None
        if isinstance(self.format, dict):
            return schema_text("format", json.dumps(self.format), most)
        if self.format != "json":
            raise RequestError('format must be "json" or a JSON schema', param="format")
        return ANY_OBJECT


def model_of(service: Service, name: str) -> ServedModel:
    """The model that generates under a name, with the tag `:latest` or without a tag.

    Raises:
        RequestError: there is none.
    """
    return named_model(service, name).generative()


def named_model(service: Service, name: str) -> ServedModel:
    """The model of a name, with the tag `:latest` or without a tag.

    Raises:
        RequestError: there is none.
    """
    if name not in service.registry.models and name.endswith(LATEST):
        name = name.removesuffix(LATEST)
    return service.registry.get(name)


def timestamp(seconds: float | None = None) -> str:
    """A time in RFC 3339; now without one."""
    moment = datetime.datetime.fromtimestamp(
        time.time() if seconds is None else seconds, datetime.UTC
    )
    return moment.isoformat().replace("+00:00", "Z")


def figures(texts: Texts, began: float) -> dict[str, int]:
    """How many tokens were read and generated, and how long it took, in nanoseconds.

    Args:
        texts: that have ended.
        began: when the request came, by `time.perf_counter`.
    """
    job, end = texts.job, time.perf_counter()
    first = end if job.first_at is None else job.first_at
    return {
        "total_duration": nanoseconds(end - began),
        "load_duration": nanoseconds(job.created - began),  # until it joined the queue
        "prompt_eval_count": texts.n_prompt_tokens,
        "prompt_eval_duration": nanoseconds(first - job.created),
        "eval_count": texts.n_new_tokens,
        "eval_duration": nanoseconds(end - first),
    }


def nanoseconds(seconds: float) -> int:
    return max(0, int(seconds * 1e9))
