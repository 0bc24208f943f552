"""Options for sampling tokens, and for when generation stops."""

from dataclasses import dataclass
from typing import ClassVar

from minllama.errors import OptionError
from minllama.options.base import CheckedOptions, Range, option

SMALLEST = 2.0**-126  # positive number of float32 with all of its digits


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(CheckedOptions):
    """How the next token is chosen from the logits; see `minllama.generation.sampling`."""

    group: ClassVar[str] = "Sampling"

    temperature: float = option(
        0.0,
        "0 for the most likely token (greedy); else sample from softmax(logits / temperature)",
        within=Range(0),
        common=True,
    )
    top_k: int = option(0, "sample from this many most likely tokens; 0 for all", within=Range(0))
    top_p: float = option(
        1.0,
        "sample from the most likely tokens whose probabilities add up to this",
        within=Range(0, 1, low_open=True),
    )
    min_p: float = option(
        0.0,
        "sample from tokens at least this many times as likely as the most likely one",
        within=Range(0, 1),
    )
    repetition_penalty: float = option(
        1.0,
        "divide positive logits of tokens already in the text by this, multiply negative ones",
        within=Range(0, low_open=True),
    )
    frequency_penalty: float = option(
        0.0,
        "subtract this from a token's logit for each time that it was generated",
        within=Range(-2, 2),
    )
    presence_penalty: float = option(
        0.0,
        "subtract this once from the logit of each token that was generated",
        within=Range(-2, 2),
    )
    logit_bias: tuple[tuple[int | str, float], ...] = option(
        (),
        "add this, from -100 to 100, to the logit of a token, given by its id or text; repeatable",
        within=Range(-100, 100),
    )
    seed: int | None = option(
        None, "seed of the random number generator, for repeatable samples", within=Range(0)
    )

    @property
    def divisor(self) -> float:
        """What logits are divided by: the temperature, where float32 does not round it to 0."""
        return self.temperature and max(self.temperature, SMALLEST)


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(SamplingOptions):
    """How to continue a text; see `minllama.generation.api`."""

    group: ClassVar[str] = "Generation"

    max_new_tokens: int = option(
        256, "stop after this many new tokens", within=Range(1), common=True
    )
    n: int = option(1, "number of samples per prompt", within=Range(1, 4096))
    stop: tuple[str, ...] = option(
        (),
        "stop before this text, which may contain special tokens; repeatable",
    )
    stop_token_ids: tuple[int | str, ...] = option(
        (),
        "stop before this token, given by its id or text; repeatable",
        flag="stop-token",
    )
    ignore_eos: bool = option(False, "continue past the end-of-sequence token")
    skip_special_tokens: bool = option(
        True, "show special tokens in the output", flag="show-special"
    )
    special: bool = option(
        False, "parse special tokens in the prompt, such as <|im_start|>, instead of reading text"
    )
    logprobs: int | None = option(
        None,
        "report log-probabilities, with this many alternatives per token",
        within=Range(0, 100),
    )
    prompt_logprobs: bool = option(
        False, "report log-probabilities of the prompt's tokens too; needs logprobs"
    )
    json_schema: str | None = option(
        None, "generate JSON that matches this JSON schema (on the command line, also a file)"
    )
    regex: str | None = option(None, "generate text that fully matches this regular expression")
    prompt_lookup: int = option(
        0,
        "speculative decoding: draft this many tokens from earlier text and verify them in one "
        "forward pass; same tokens (except near ties in half precision), faster where the text "
        "repeats itself; needs temperature 0",
        within=Range(0, 31),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_lookup:
            self._check_prompt_lookup()
        if self.prompt_logprobs and self.logprobs is None:
            raise OptionError("prompt_logprobs needs logprobs, the number of alternatives")
        if self.json_schema is not None and self.regex is not None:
            raise OptionError("json_schema and regex exclude each other; give one")

    def _check_prompt_lookup(self) -> None:
        alone = {
            "temperature": self.temperature != 0,
            "repetition_penalty": self.repetition_penalty != 1,
            "frequency_penalty": self.frequency_penalty != 0,
            "presence_penalty": self.presence_penalty != 0,
            "logit_bias": bool(self.logit_bias),
            "logprobs": self.logprobs is not None,
            "json_schema": self.json_schema is not None,
            "regex": self.regex is not None,
        }
        if clashes := [name for name, given in alone.items() if given]:
            raise OptionError(
                f"prompt_lookup needs plain greedy decoding; omit {', '.join(clashes)}"
            )
