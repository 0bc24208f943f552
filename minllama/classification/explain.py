"""Explain a prediction by leaving out one word of the text at a time.

`minllama classify --explain` and the library's users call `explain`: a classifier and a text go in,
for each word comes out how much the prediction moves without it.
"""

import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minllama.classification.base import Classifier, probabilities
from minllama.classification.prompts import EncodedPrompt
from minllama.data.texts import checked_texts
from minllama.data.treebank import undo_treebank
from minllama.errors import MinllamaError
from minllama.evaluation.metrics import predictions
from minllama.options import ExplainOptions
from minllama.text import listed, shown

Span = tuple[int, int]  # start and end of characters in a text

# Scripts that write no spaces between words: Thai and Lao, Burmese, Khmer, kana, Han.
UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),
    (0x20000, 0x3FFFF),
)
MIN_WINDOW = 20_000  # characters of a truncated text that are encoded again in any case


@dataclass(frozen=True, slots=True)
class TargetEffects:
    """What is explained: a label's probability, or a predicted number.

    Attributes:
        label: its name.
        value: p(label | text), or the number.
        effects: for each span `value` less that of the text without it; None where nothing is left
            that the classifier could read.
        log_odds: log(p / (1 - p)) of the label, in nats; None for a number, or a single class.
        log_odds_effects: for each span, the same difference of log-odds.
    """

    label: str
    value: float
    effects: tuple[float | None, ...]
    log_odds: float | None = None
    log_odds_effects: tuple[float | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """How much each word of a text moves a prediction; `explain` returns it.

    Attributes:
        text: as it was given.
        spans: (start, end) of what was left out, in characters of `text`, in order: words, or runs
            of neighboring words.
        targets: what was explained: one label, or each label of a multi-label classifier.
        unit: `probability`, or `value` for a regression.
        n_words: how many words the text has; more than `spans` if words were grouped.
        n_unread: how many of them the classifier did not read, as the text was truncated; leaving
            them out changes nothing, so their effect is 0.
        max_words: the limit of `spans`.
    """

    text: str
    spans: tuple[Span, ...]
    targets: tuple[TargetEffects, ...]
    unit: str
    n_words: int
    n_unread: int
    max_words: int

    @property
    def words(self) -> tuple[str, ...]:
        """The text of each span."""
        return tuple(self.text[start:end] for start, end in self.spans)

    @property
    def is_grouped(self) -> bool:
        """Whether some spans hold several words."""
        return self.n_words > len(self.spans)

    def strongest(self, most: int = 10, target: int = 0) -> list[int]:
        """Numbers of the spans with the largest effects on a target, either sign, none of zero."""
        effects = [effect or 0.0 for effect in self.targets[target].effects]
        order = sorted(range(len(effects)), key=lambda i: (-abs(effects[i]), i))
        return [i for i in order[:most] if effects[i]]

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold; lists of effects are parallel to `words`."""
        targets: list[dict[str, Any]] = []
        for target in self.targets:
            said: dict[str, Any] = {"label": target.label, self.unit: target.value}
            if target.log_odds is not None:
                said["log_odds"] = target.log_odds
            said["effects"] = list(target.effects)
            if target.log_odds_effects is not None:
                said["log_odds_effects"] = list(target.log_odds_effects)
            targets.append(said)
        return {
            "method": "leave-one-out",
            "words": [
                {"text": word, "start": start, "end": end}
                for word, (start, end) in zip(self.words, self.spans, strict=True)
            ],
            "targets": targets,
            "n_words": self.n_words,
            "n_unread": self.n_unread,
            "max_words": self.max_words,
        }


def explain(
    classifier: Classifier,
    text: str,
    *,
    target: str | None = None,
    max_words: int = ExplainOptions.max_words,
) -> Explanation:
    """How much leaving out each word of a text moves the prediction.

    The effect of a word is p(label | text) - p(label | text without the word): positive if the word
    speaks for the label (Li, Monroe & Jurafsky 2016, "Understanding Neural Networks through
    Representation Erasure", sec. 3, where it is relative to the log-likelihood). With a word goes
    the white space character after it, or, at the end of the text, the one before it.

    What is left out is one word at a time, so the effects do not add up to the prediction. Where
    two words say the same, leaving out either one changes little, and both have small effects
    although they decide; where words matter together ("not bad"), each gets the effect of all. A
    text without a word can be odd, and the classifier's opinion of odd texts counts too. Effects
    explain the classifier, not the world.

    A text that is truncated to fit the prompt is explained as it is predicted: without an earlier
    word, more of its end is read. Words that were not read have effect 0.

    Args:
        classifier: of any kind.
        text: the text.
        target: the label to explain; None for the predicted one, or for each label if the
            classifier is multi-label.
        max_words: the most spans. Of a text with more words, those that were not read are one span,
            and neighboring ones of the others are grouped into runs of nearly equal numbers.

    Returns:
        The effects, computed in the classifier's own batches; the same for the same arguments.

    Raises:
        MinllamaError: `predict_logits` would refuse the text, the target is not a label, or
            max_words is not 1 to 10,000.
    """
    planned = plan(classifier, text, target=target, max_words=max_words)
    return planned.explanation(classifier.predict_encoded(planned.prompts))


@dataclass(frozen=True, slots=True)
class ExplanationPlan:
    """What has to be read to explain a prediction; `plan` makes it.

    Attributes:
        prompts: different ones, the whole text's first.
    """

    prompts: list[EncodedPrompt]
    _finish: Callable[[NDArray[np.float32]], Explanation]

    def explanation(self, logits: NDArray[np.float32]) -> Explanation:
        """What the classifier's scores of the prompts, (U, C), say of the words."""
        return self._finish(logits)


def plan(
    classifier: Classifier,
    text: str,
    *,
    target: str | None = None,
    max_words: int = ExplainOptions.max_words,
) -> ExplanationPlan:
    """What `explain` reads, for those who read it together with other texts.

    Raises:
        MinllamaError: as `explain`.
    """
    max_words = ExplainOptions(max_words=max_words).max_words
    (text,) = checked_texts([text])
    chosen = None if target is None else _index_of(classifier, target)
    whole = classifier.encode(text)
    words = split_words(text)
    read_from, read_to = _read_part(classifier, text, whole)
    unread = [word for word in words if word[1] <= read_from or word[0] >= read_to]
    spans = _spans(words, unread, max_words)
    prompts, place = _prompts(classifier, text, whole, spans, (read_from, read_to))

    def finish(logits: NDArray[np.float32]) -> Explanation:
        return Explanation(
            text,
            spans,
            _targets(classifier, logits, place, chosen),
            "probability" if classifier.scale is None else "value",
            len(words),
            len(unread),
            max_words,
        )

    return ExplanationPlan(prompts, finish)


def split_words(text: str) -> tuple[Span, ...]:
    """The words of a text: what white space separates.

    In scripts without spaces (`UNSPACED`: Han, kana, Thai, Lao, Burmese, Khmer) each character is
    one word, with the marks and the punctuation that belong to it; what other scripts write between
    them stays together.
    """
    return tuple(_words(text))


def _words(text: str) -> Iterator[Span]:
    start: int | None = None
    is_unspaced = is_opening = False  # the last character's script; all so far open brackets
    for i, character in enumerate(text):
        if character.isspace():
            if start is not None:
                yield start, i
            start = None
            continue
        code, category = ord(character), unicodedata.category(character)
        opens = category in ("Ps", "Pi")
        now = any(low <= code <= high for low, high in UNSPACED)
        follows = category[0] in "MP" and not opens
        if start is None:
            start, is_unspaced, is_opening = i, now, opens
        elif (now or is_unspaced) and not follows and not is_opening:
            yield start, i
            start, is_unspaced, is_opening = i, now, opens
        else:
            is_unspaced, is_opening = is_unspaced or now, is_opening and opens
    if start is not None:
        yield start, len(text)


def without(text: str, span: Span) -> str:
    """The text without a span and one white space character beside it."""
    start, end = span
    if text[end : end + 1].isspace():
        end += 1
    elif text[start - 1 : start].isspace():
        start -= 1
    return text[:start] + text[end:]


def _index_of(classifier: Classifier, target: str) -> int:
    if target not in classifier.labels:
        raise MinllamaError(
            f"the target {shown(target)} is not a label; choose one of {listed(classifier.labels)}"
        )
    return classifier.labels.index(target)


def _undone(classifier: Classifier, text: str) -> str:
    return undo_treebank(text) if classifier.prompt.undo_treebank else text


def _read_part(classifier: Classifier, text: str, whole: EncodedPrompt) -> Span:
    """Start and end of what the classifier reads of a text."""
    n = whole.n_read
    if n is None:
        return 0, len(text)
    # Without the treebank's spaces, the text that is read has fewer characters than the original.
    lengths = range(len(text) + 1)
    if classifier.prompt.keep_end:
        tail = bisect_left(
            lengths, n, key=lambda k: len(_undone(classifier, text[len(text) - k :]))
        )
        return len(text) - tail, len(text)
    return 0, bisect_left(lengths, n, key=lambda k: len(_undone(classifier, text[:k])))


def _spans(words: tuple[Span, ...], unread: list[Span], most: int) -> tuple[Span, ...]:
    """At most so many runs of neighboring words; those that were not read are one of them."""
    if len(words) <= most:
        return words
    is_first = bool(unread) and unread[0] == words[0]
    read = words[len(unread) :] if is_first else words[: len(words) - len(unread)]
    if not unread or not read or most == 1:
        return _grouped(words, most if not unread else 1)
    rest = (unread[0][0], unread[-1][1])
    grouped = _grouped(read, min(len(read), most - 1))
    return (rest, *grouped) if is_first else (*grouped, rest)


def _grouped(words: tuple[Span, ...], n: int) -> tuple[Span, ...]:
    ends = [len(words) * i // n for i in range(n + 1)]
    return tuple((words[first][0], words[last - 1][1]) for first, last in pairwise(ends))


def _prompts(
    classifier: Classifier, text: str, whole: EncodedPrompt, spans: tuple[Span, ...], read: Span
) -> tuple[list[EncodedPrompt], list[int | None]]:
    """Different prompts, the whole text's first; and for each span the number of its prompt.

    None for a span without which nothing is left to read.
    """

    def key_of(prompt: EncodedPrompt) -> tuple[object, ...]:
        text = prompt.text if classifier.reads_words else None
        return prompt.ids, prompt.continuations, text

    prompts = {key_of(whole): 0}  # prompts that do not differ are read once
    distinct = [whole]
    place: list[int | None] = []
    is_read = [start < read[1] and end > read[0] for start, end in spans]
    lengths = [end - start for (start, end), is_one in zip(spans, is_read, strict=True) if is_one]
    longest = max(lengths, default=0)
    for span, is_one in zip(spans, is_read, strict=True):
        if not is_one:
            place.append(0)
            continue
        prompt = _encoded_without(classifier, text, span, read, longest)
        if not prompt.ids:
            place.append(None)
            continue
        key = key_of(prompt)
        if key not in prompts:
            prompts[key] = len(distinct)
            distinct.append(prompt)
        place.append(prompts[key])
    return distinct, place


def _encoded_without(
    classifier: Classifier, text: str, span: Span, read: Span, longest: int
) -> EncodedPrompt:
    """The prompt of the text without a span; of a long text only what can matter is encoded."""
    n_near = max(2 * (read[1] - read[0]) + longest, MIN_WINDOW)
    if read != (0, len(text)) and n_near < len(text):
        if classifier.prompt.keep_end:
            cut = len(text) - n_near
            near = without(text[cut:], (max(0, span[0] - cut), span[1] - cut))
        else:
            near = without(text[:n_near], (span[0], min(n_near, span[1])))
        prompt = classifier.template.encode(_undone(classifier, near))
        if prompt.is_shortened:
            return prompt
    return classifier.template.encode(_undone(classifier, without(text, span)))


def _targets(
    classifier: Classifier,
    logits: NDArray[np.float32],
    place: list[int | None],
    chosen: int | None,
) -> tuple[TargetEffects, ...]:
    if classifier.scale is not None:
        values = classifier.scale.values(logits[:, 0])
        return (TargetEffects(classifier.labels[0], float(values[0]), _effects(values, place)),)
    multi_label = classifier.multi_label
    p = probabilities(logits, classifier.temperature, multi_label=multi_label)
    log_odds = _log_odds(logits.astype(np.float64) / classifier.temperature, multi_label)
    if chosen is not None:
        explained = [chosen]
    elif multi_label:
        explained = list(range(len(classifier.labels)))
    else:
        predicted = predictions(p[:1], multi_label=False, thresholds=classifier.decision)
        explained = np.flatnonzero(predicted[0]).tolist()
    return tuple(
        TargetEffects(
            classifier.labels[i],
            float(p[0, i]),
            _effects(p[:, i].astype(np.float64), place),
            None if log_odds is None else float(log_odds[0, i]),
            None if log_odds is None else _effects(log_odds[:, i], place),
        )
        for i in explained
    )


def _log_odds(logits: NDArray[np.float64], multi_label: bool) -> NDArray[np.float64] | None:
    """log(p / (1 - p)) of each label, (N, C); None for a single class, whose p is 1."""
    if multi_label:
        return logits
    if logits.shape[1] == 1:
        return None
    others = np.empty_like(logits)
    for i in range(logits.shape[1]):
        others[:, i] = np.logaddexp.reduce(np.delete(logits, i, axis=1), axis=1)
    return logits - others


def _effects(values: NDArray[np.float64], place: list[int | None]) -> tuple[float | None, ...]:
    return tuple(None if row is None else float(values[0] - values[row]) for row in place)
