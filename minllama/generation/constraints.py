"""Constrain generation to a JSON schema or a regular expression, with llguidance.

At every step the tokens that cannot lead to a valid text are forbidden, so that what comes out is
valid by construction (unless max_new_tokens truncates it). Where the library gives up, that is an
error, never a text that ends early. The scheduler calls a constraint
before and after each token.
"""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from minllama.engine.sequence import Constraint
from minllama.errors import MinllamaError, OptionError, optional_import
from minllama.options import GenerationOptions
from minllama.tokenizer.tokenizer import Tokenizer

MAX_FAULT_CHARS = 300
MAX_VOCABULARIES = 4  # in the cache


def constraint_maker(
    tokenizer: Tokenizer, options: GenerationOptions, vocab_size: int
) -> Callable[[], Constraint]:
    """A maker of constraints, one for each row, by `options.json_schema` or `options.regex`.

    Raises:
        MinllamaError: llguidance is not installed.
        OptionError: the schema or the expression is not valid, or nothing at all satisfies it.
    """
    matcher = _library().LLMatcher
    name = "regex" if options.json_schema is None else "json_schema"
    try:
        if options.json_schema is None:
            assert options.regex is not None
            grammar = matcher.grammar_from_regex(options.regex)
        else:
            json.loads(options.json_schema)
            grammar = matcher.grammar_from_json_schema(options.json_schema)
    except UnicodeEncodeError as error:
        raise OptionError(f"{name} holds a lone surrogate; it was decoded wrongly") from error
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{name} is not JSON: {error}") from error
    return grammar_maker(tokenizer, grammar, vocab_size, name)


def grammar_maker(
    tokenizer: Tokenizer, grammar: str, vocab_size: int, name: str
) -> Callable[[], Constraint]:
    """A maker of constraints by a grammar of llguidance.

    Args:
        tokenizer: of the model.
        grammar: in one of the forms that `LLMatcher` takes.
        vocab_size: of the model.
        name: of the option, for errors.

    Raises:
        MinllamaError: llguidance is not installed.
        OptionError: the grammar is not valid, or nothing at all satisfies it.
    """
    matcher, vocabulary = _library().LLMatcher, _vocabulary(tokenizer, vocab_size)
    if fault := matcher.validate_grammar(grammar, vocabulary):
        raise OptionError(f"{name} cannot be followed: {_one_line(fault)}")

    def make() -> Constraint:
        # Messages go into our errors: the library would print them.
        return _GrammarConstraint(matcher(vocabulary, grammar, log_level=0), name, tokenizer)

    # A grammar that no text satisfies fails at its first step.
    make().forbid(torch.zeros(tokenizer.vocab_size))
    return make


def _library() -> Any:
    return optional_import("llguidance", "json_schema and regex need", extra="constraint")


@lru_cache(maxsize=MAX_VOCABULARIES)
def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> Any:
    """A vocabulary for the library, cached: building it takes longer than most grammars."""
    library = _library()
    words = library.TokenizerWrapper(_Words(tokenizer))
    return library.LLTokenizer(words, n_vocab=vocab_size)


class _GrammarConstraint:
    """One row's state in the grammar; `name` is that of the option, for errors.

    The library knows of one token that ends a text; where that may come, so may the others.
    """

    def __init__(self, matcher: Any, name: str, tokenizer: Tokenizer) -> None:
        self._matcher, self._name = matcher, name
        self._eos_id = tokenizer.eos_id
        self._other_ends = sorted(set(tokenizer.stop_ids) - {tokenizer.eos_id})

    def forbid(self, logits: Tensor) -> None:
        mask = self._matcher.compute_bitmask()
        self._check()  # a mask that could not be computed allows the end of the text
        # One bit for each token, lowest bit first.
        packed = torch.frombuffer(bytearray(mask), dtype=torch.uint8)
        bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)
        allowed = (bits & 1).flatten()[: len(logits)].bool()
        if self._other_ends and allowed[self._eos_id]:
            allowed[self._other_ends] = True
        logits.masked_fill_(~allowed.to(logits.device), -torch.inf)

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(self._eos_id if token_id in self._other_ends else token_id)
        self._check()

    def is_complete(self) -> bool:
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        fault = self._matcher.get_error().partition("<state>")[0]
        if "NoExtension" in fault:
            fault = "no text of this vocabulary satisfies it"
        raise OptionError(f"{self._name} cannot be followed: {_one_line(fault)}; use a simpler one")


def _one_line(fault: str) -> str:
    """The library's message, without its rendering of long expressions."""
    fault = re.sub(r"^(at )?\d+\(\d+\): ", "", fault)  # positions in a generated grammar
    words = " ".join(re.split(r"\n *\d+ \| ", fault)[0].split())
    return words if len(words) <= MAX_FAULT_CHARS else words[: MAX_FAULT_CHARS - 3] + "..."


class _Words:
    """The vocabulary for llguidance: each token's bytes, and a function that encodes text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.eos_id is None:
            raise MinllamaError(
                "a constraint needs a token that ends a text; this vocabulary has none"
            )
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_tokens.values())

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, bos=False, eos=False)
