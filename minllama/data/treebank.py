"""Undo treebank tokenization: `it 's n't` becomes `it'sn't`, `-LRB-` a bracket.

Corpora such as the Stanford Sentiment Treebank contain tokens separated by spaces, with brackets
and quotes in the Penn Treebank's spelling, which pretrained models have hardly seen.
"""

import re

_BRACKETS = {
    "-LRB-": "(",
    "-RRB-": ")",
    "-LSB-": "[",
    "-RSB-": "]",
    "-LCB-": "{",
    "-RCB-": "}",
}
_BRACKET = re.compile("|".join(_BRACKETS), re.IGNORECASE)
# Clitics and punctuation attached to the preceding word, and those attached to the next one.
_CLITIC = re.compile(r" (n't|'(?:s|re|ve|ll|d|m))(?=\W|$)", re.IGNORECASE)
_CLOSING = re.compile(r" +([.,;:!?%)\]}]|\.\.\.)(?=\W|$)")
_OPENING = re.compile(r"([(\[{$#]) +")
_OPENING_QUOTE = re.compile(r"`` *")
_CLOSING_QUOTE = re.compile(r" *''")
_POSSESSIVE = re.compile(r"(?<=s) '(?= |$)")


def undo_treebank(text: str) -> str:
    """`text` without a treebank's token spaces and spellings.

    Other texts hardly change: a space before a comma is removed, for example.
    """
    text = _BRACKET.sub(lambda match: _BRACKETS[match[0].upper()], text)
    text = _OPENING_QUOTE.sub('"', text)
    text = _CLOSING_QUOTE.sub('"', text)
    text = _CLITIC.sub(r"\1", text)
    text = _CLOSING.sub(r"\1", text)
    text = _OPENING.sub(r"\1", text)
    return _POSSESSIVE.sub("'", text)
