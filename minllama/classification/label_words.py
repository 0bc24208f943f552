"""Label words as a head: the logit of each label's first token after a prompt.

A language model scores the first token of a label word by a linear function of its last state, so
label words are one more head beside those on frozen features, and one that no labeled text is
needed for. Where there are few of them it decides nearly alone (Schick & Schuetze 2021, sec. 3.1).
`minllama.classification.frozen` multiplies it with the others.
"""

import re
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from minllama.classification.base import Classifier, make_template
from minllama.classification.products import log_softmax
from minllama.errors import MinllamaError
from minllama.quantization.modules import rows_of

WORD = re.compile(r"([^\W\d_]{2,}|[^\W\d_]+['’][^\W\d_]+)\Z")


def words_of_labels(labels: Sequence[str]) -> dict[str, str] | None:
    """Label -> the words that it is made of; None if one is not made of words.

    `not_spam` and `not-spam` become `not spam`; `3`, `B2` and `x` are no words.
    """
    words = {label: " ".join(re.split(r"[\s_-]+", label.strip())) for label in labels}
    is_made_of_words = all(all(map(WORD.match, text.split())) for text in words.values())
    return words if is_made_of_words and len(set(words.values())) == len(words) else None


def label_rows(reader: Classifier, words: Sequence[str]) -> NDArray[np.float32] | None:
    """The rows of the vocabulary's matrix for the first tokens of label words: (C, D).

    Args:
        reader: its Llama and prompt are used.
        words: C words, which stand for the labels after the prompt.

    Returns:
        None where a first token does not tell a label from all others, the prompt runs into the
        words, or the model is not causal.
    """
    llama = reader.llama
    if not llama.config.causal:
        return None
    try:
        template = make_template(reader.prompt, llama, reader.tokenizer, labels=words)
        encoded = template.encode("x")
    except MinllamaError:
        return None  # no room for them, or two are alike
    first = [ids[0] for ids in encoded.continuations]
    if encoded.ids != reader.encode("x").ids or len(set(first)) < len(first):
        return None
    head = llama.tok_embeddings if llama.output is None else llama.output
    with torch.inference_mode():
        rows = rows_of(head, torch.tensor(first, device=llama.device)).float().cpu().numpy()
    return np.asarray(rows, dtype=np.float32)


def label_head(
    features: NDArray[np.float32], rows: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight (C, D) and bias (C,) of label words, less their prior over these texts.

    The prior is the log of the mean probability, from texts without labels (batch calibration,
    Zhou et al. 2023, sec. 3.2).

    Args:
        features: (N, D), the last token's states after all layers and the norm.
        rows: of `label_rows`.
    """
    log_probs = log_softmax((features @ rows.T).astype(np.float64))
    prior = np.log(np.exp(log_probs).mean(0) + np.finfo(np.float64).tiny)
    return rows, -prior.astype(np.float32)
