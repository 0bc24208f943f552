"""Generation held to a JSON schema or a regular expression, through the library llguidance.

At every step the tokens that cannot lead to a valid text are forbidden, so that what comes out is
valid by construction (unless it is cut by max_new_tokens). Knows nothing of the decode loop.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minllama.decoding import Constraint
from minllama.errors import MinllamaError, OptionError
from minllama.options import GenerationOptions
from minllama.tokenizer import Tokenizer


def constraint_maker(
    tokenizer: Tokenizer, options: GenerationOptions, vocab_size: int
) -> Callable[[], Constraint]:
    """A maker of constraints, one for each row, by `options.json_schema` or `options.regex`.

    Raises:
        MinllamaError: llguidance is not installed.
        OptionError: the schema or the expression is not valid.
    """
    try:
        from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
    except ImportError as error:
        raise MinllamaError(
            "json_schema and regex need the library llguidance; "
            "install it with: python -m pip install 'minllama[constraint]'"
        ) from error
    if options.json_schema is not None:
        try:
            json.loads(options.json_schema)
            grammar = LLMatcher.grammar_from_json_schema(options.json_schema)
        except ValueError as error:
            raise OptionError(f"json_schema is not JSON: {error}") from error
    else:
        assert options.regex is not None
        grammar = LLMatcher.grammar_from_regex(options.regex)
    vocabulary = LLTokenizer(TokenizerWrapper(_Words(tokenizer)), n_vocab=vocab_size)
    if fault := LLMatcher.validate_grammar(grammar, vocabulary):
        name = "regex" if options.json_schema is None else "json_schema"
        raise OptionError(f"{name} cannot be followed: {' '.join(fault.split())}")
    return lambda: _GrammarConstraint(LLMatcher(vocabulary, grammar))


class _GrammarConstraint:
    """One row's state in the grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def forbid(self, logits: Tensor) -> None:
        if self._matcher.is_error():
            raise MinllamaError(f"the constraint failed: {self._matcher.get_error()}")
        # One bit for each token, lowest bit first.
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)
        allowed = (bits & 1).flatten()[: len(logits)].bool()
        logits.masked_fill_(~allowed.to(logits.device), -torch.inf)

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)

    def is_complete(self) -> bool:
        return bool(self._matcher.is_stopped())


class _Words:
    """The vocabulary as llguidance wants it: each token's bytes, and a way to encode text."""

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
