"""Count the tokens of a vocabulary without opening it, and compare with the model's rows."""

from minllama.errors import TokenizerError
from minllama.tokenizer import sentencepiece_form, tiktoken_form, tokenizers_form
from minllama.tokenizer.vocabulary import Vocabulary


def count_tokens(vocabulary: Vocabulary) -> int:
    """The number of tokens: one more than the largest id.

    Raises:
        TokenizerError: the vocabulary is damaged.
    """
    where = vocabulary.origin
    if vocabulary.storage_format == "sentencepiece":
        return len(sentencepiece_form.parse_model(vocabulary.data, where).pieces)
    if vocabulary.storage_format == "tiktoken":
        n_ranks = len(tiktoken_form.parse_ranks(vocabulary.data, where))
        return n_ranks + tiktoken_form.N_SPECIAL_TOKENS
    raw = tokenizers_form.parse(vocabulary.data, where)
    return max(tokenizers_form.token_ids(raw).values(), default=-1) + 1


def check_fits(n_tokens: int, vocab_size: int, where: str) -> None:
    """Raise TokenizerError if a tokenizer has more tokens than a model has rows.

    Such a pair is refused: token ids would be out of range.
    """
    if n_tokens > vocab_size:
        raise TokenizerError(
            f"{where}: {n_tokens} tokens, but the model has {vocab_size}; use the model's own "
            "tokenizer"
        )
