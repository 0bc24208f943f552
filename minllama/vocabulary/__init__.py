"""Vocabularies in the forms they are stored in, and from one form to another.

A `Vocabulary` is what a checkpoint knows of its tokenizer: one of three serialized forms that a
library reads, and the ids and flags beside it. Knows nothing of models and imports no torch;
turning text into ids is `minllama.tokenizer`'s business.
"""

from minllama.vocabulary.base import Form, TokenType, Vocabulary
from minllama.vocabulary.files import find_vocabulary, load_vocabulary
from minllama.vocabulary.gguf import from_gguf, to_gguf
from minllama.vocabulary.huggingface import to_files
from minllama.vocabulary.llama2c import from_llama2c_bin
from minllama.vocabulary.size import check_fits, count_tokens

__all__ = [
    "Form",
    "TokenType",
    "Vocabulary",
    "check_fits",
    "count_tokens",
    "find_vocabulary",
    "from_gguf",
    "from_llama2c_bin",
    "load_vocabulary",
    "to_files",
    "to_gguf",
]
