"""How tokens are chosen, and how texts begin and end."""

from dataclasses import dataclass

from minllama.errors import OptionError
from minllama.options.base import CheckedOptions, Range, option


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(CheckedOptions):
    """How the next token is chosen from the logits; see `minllama.generation.sampling`."""

    temperature: float = option(
        0.0,
        "0 takes the likeliest token; above, a sample from softmax(logits / temperature)",
        within=Range(0),
    )
    top_k: int = option(0, "sample among this many likeliest tokens; 0 for all", within=Range(0))
    top_p: float = option(
        1.0,
        "sample among the likeliest tokens that together have this probability",
        within=Range(0, 1, low_open=True),
    )
    min_p: float = option(
        0.0,
        "sample among tokens at least this many times as likely as the likeliest",
        within=Range(0, 1),
    )
    repetition_penalty: float = option(
        1.0,
        "divide positive logits of tokens already in the text by this, multiply negative ones",
        within=Range(0, low_open=True),
    )
    seed: int | None = option(None, "makes samples repeatable", within=Range(0))


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(SamplingOptions):
    """How a text is continued; see `minllama.generation.api`."""

    max_new_tokens: int = option(256, "stop after this many new tokens", within=Range(1))
    n: int = option(1, "how many samples of each prompt", within=Range(1, 4096))
    stop: tuple[str, ...] = option(
        (),
        "stop before this text, in which special tokens may stand; may be given several times",
    )
    stop_token_ids: tuple[int | str, ...] = option(
        (),
        "stop before this token, by its id or its text; may be given several times",
        flag="stop-token",
    )
    ignore_eos: bool = option(False, "go on past the token that ends a text")
    skip_special_tokens: bool = option(
        True, "show the special tokens that are generated", flag="show-special"
    )
    special: bool = option(
        False, "special tokens that the prompt spells, such as <|im_start|>, are these tokens"
    )
    logprobs: int | None = option(
        None, "report log-probabilities, and this many alternatives per token", within=Range(0, 100)
    )
    json_schema: str | None = option(None, "generate JSON that this JSON schema describes")
    regex: str | None = option(None, "generate text that this regular expression matches in full")
    prompt_lookup: int = option(
        0,
        "guess this many tokens from what the text has said before, and check them in one pass; "
        "the tokens stay the same (in half precision, but for near ties), and come faster where a "
        "text repeats itself; at temperature 0",
        within=Range(0, 31),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_lookup:
            self._check_prompt_lookup()
        if self.json_schema is not None and self.regex is not None:
            raise OptionError("json_schema and regex cannot both constrain one text; give one")

    def _check_prompt_lookup(self) -> None:
        alone = {
            "temperature": self.temperature != 0,
            "repetition_penalty": self.repetition_penalty != 1,
            "logprobs": self.logprobs is not None,
            "json_schema": self.json_schema is not None,
            "regex": self.regex is not None,
        }
        if clashes := [name for name, given in alone.items() if given]:
            raise OptionError(
                f"prompt_lookup is for the likeliest tokens alone; leave out {', '.join(clashes)}"
            )
