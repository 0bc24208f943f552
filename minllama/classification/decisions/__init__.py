"""Decisions: questions on a state, answered with probabilities by scoring label words.

`questions` says what can be asked, `prompts` turns a question into label continuations, `decide`
scores them and makes answers. The method and its limits are in docs/decisions.md.
"""

from minllama.classification.decisions.decide import DecisionModel, answer_by_classifier
from minllama.classification.decisions.questions import (
    Answer,
    Option,
    Question,
    choice_confidence,
    score_confidence,
)

__all__ = [
    "Answer",
    "DecisionModel",
    "Option",
    "Question",
    "answer_by_classifier",
    "choice_confidence",
    "score_confidence",
]
