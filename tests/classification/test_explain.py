"""Explanations: each word's effect is the difference that leaving it out makes."""

import dataclasses
import json
import math

import numpy as np
import pytest

import minllama
from minllama.classification.explain import explain, split_words, without
from minllama.errors import MinllamaError
from minllama.evaluation.regression import TargetScale
from minllama.options import PromptOptions
from tests.classifier_cases import embedding, zero_shot

TEXT = "what a mess: three hours"
WITHOUT = [
    "a mess: three hours",
    "what mess: three hours",
    "what a three hours",
    "what a mess: hours",
    "what a mess: three",
]
CLASSIFIERS = {
    "label words": zero_shot,
    "pmi": lambda: zero_shot(score="pmi"),
    "head": lambda: embedding(prompt="Text: {text}"),
    "head without prompt": embedding,
    "mean": lambda: embedding(pooling="mean", prompt="Text: {text}"),
}


def log_odds(classifier, text, column):
    """log(p / (1 - p)) in float64, where a p near 1 has a distance from it."""
    odds = np.exp(classifier.predict_logits([text])[0].astype(float) / classifier.temperature)
    return math.log(odds[column] / (odds.sum() - odds[column]))


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_an_effect_is_the_probability_less_that_without_the_word(kind):
    classifier = CLASSIFIERS[kind]()
    explanation = explain(classifier, TEXT)
    (target,) = explanation.targets
    (label,) = classifier.predict([TEXT])
    assert target.label == label
    column = classifier.labels.index(label)
    p = float(classifier.predict_proba([TEXT])[0, column])
    assert target.value == pytest.approx(p, abs=1e-6)
    before = log_odds(classifier, TEXT, column)
    assert target.log_odds == pytest.approx(before, abs=1e-4)
    assert explanation.words == tuple(TEXT.split())
    for effect, log_effect, rest in zip(
        target.effects, target.log_odds_effects, WITHOUT, strict=True
    ):
        q = float(classifier.predict_proba([rest])[0, column])
        assert effect == pytest.approx(p - q, abs=1e-6)
        after = log_odds(classifier, rest, column)
        assert log_effect == pytest.approx(before - after, abs=1e-4)
    assert (explanation.unit, explanation.n_words, explanation.n_unread) == ("probability", 5, 0)
    assert not explanation.is_grouped


def test_effects_follow_the_temperature():
    classifier = zero_shot()
    classifier.temperature = 3.0
    (target,) = explain(classifier, TEXT, target="bad").targets
    p, q = classifier.predict_proba([TEXT, WITHOUT[2]])[:, 1]
    assert target.effects[2] == pytest.approx(p - q, abs=1e-6)
    before, after = (log_odds(classifier, text, 1) for text in (TEXT, WITHOUT[2]))
    assert target.log_odds_effects[2] == pytest.approx(before - after, abs=1e-4)


def test_any_label_can_be_explained_and_the_predicted_one_obeys_thresholds():
    classifier = embedding(labels=("no", "yes"))
    for label in classifier.labels:
        (target,) = explain(classifier, TEXT, target=label).targets
        assert target.label == label
    yes, no = (explain(classifier, TEXT, target=label).targets[0] for label in ("yes", "no"))
    assert yes.effects == pytest.approx([-effect for effect in no.effects], abs=1e-6)
    for threshold, expected in ((0.0001, "yes"), (0.9999, "no")):
        classifier.threshold = threshold
        assert classifier.predict([TEXT]) == [expected]
        assert explain(classifier, TEXT).targets[0].label == expected
    with pytest.raises(MinllamaError, match=r"^the target 'maybe' is not a label; .*'no', 'yes'$"):
        explain(classifier, TEXT, target="maybe")


def test_multi_label_has_the_effects_on_every_label():
    classifier = embedding(multi_label=True, prompt="Text: {text}")
    explanation = explain(classifier, TEXT)
    assert tuple(target.label for target in explanation.targets) == classifier.labels
    p = classifier.predict_proba([TEXT])[0]
    for i, rest in enumerate(WITHOUT):
        q = classifier.predict_proba([rest])[0]
        z = classifier.predict_logits([TEXT, rest])
        for label, target in enumerate(explanation.targets):
            assert target.effects[i] == pytest.approx(p[label] - q[label], abs=1e-6)
            assert target.log_odds_effects[i] == pytest.approx(z[0, label] - z[1, label], abs=1e-5)
    (one,) = explain(classifier, TEXT, target="bad").targets
    assert one == explanation.targets[1]


def test_a_regression_is_explained_in_its_unit():
    classifier = embedding(labels=("stars",), scale=TargetScale(3.0, 200.0))
    explanation = explain(classifier, TEXT)
    (target,) = explanation.targets
    value = classifier.predict_values([TEXT])[0]
    assert explanation.unit == "value"
    assert target.label == "stars"
    assert target.value == pytest.approx(value, abs=1e-3)
    expected = [value - classifier.predict_values([rest])[0] for rest in WITHOUT]
    assert target.effects == pytest.approx(expected, abs=1e-3)
    assert target.log_odds is None
    assert target.log_odds_effects is None
    assert "log_odds" not in explanation.to_dict()["targets"][0]


def test_a_single_class_is_certain_and_no_word_moves_it():
    (target,) = explain(embedding(labels=("only",)), "so so").targets
    assert (target.value, target.effects, target.log_odds) == (1.0, (0.0, 0.0), None)


def test_texts_without_words_and_of_one_word():
    framed = embedding(prompt="Text: {text}")
    for text in ("", "  ", "\n"):
        explanation = explain(framed, text)
        assert (explanation.spans, explanation.targets[0].effects) == ((), ())
        assert explanation.targets[0].value == pytest.approx(framed.predict_proba([text]).max())
    (target,) = explain(framed, "ok").targets
    p, q = framed.predict_proba(["ok", ""])[:, framed.labels.index(target.label)]
    assert target.effects == pytest.approx([p - q], abs=1e-6)
    bare = embedding()  # nothing is left to read
    assert explain(bare, "ok").targets[0].effects == (None,)
    assert explain(bare, "ok").targets[0].log_odds_effects == (None,)
    assert explain(bare, "ok").strongest() == []
    with pytest.raises(MinllamaError, match="has no tokens"):
        explain(bare, "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" a  b\tc\n", ["a", "b", "c"]),
        ("don't stop -- now.", ["don't", "stop", "--", "now."]),
        ("\u3000a\u00a0b\x1cc", ["a", "b", "c"]),
        ("映画は最高!", ["映", "画", "は", "最", "高!"]),
        ("「映画」。GPU2枚", ["「映", "画」。", "GPU2", "枚"]),
        ("ที่นี่", ["\u0e17\u0e35\u0e48", "\u0e19\u0e35\u0e48"]),
        ("कहानी अच्छी", ["कहानी", "अच्छी"]),
        ("좋은 영화", ["좋은", "영화"]),
        ("e\u0301t\u00e9 \U0001f44d\U0001f3fd", ["e\u0301t\u00e9", "\U0001f44d\U0001f3fd"]),
        ("", []),
    ],
)
def test_words(text, words):
    spans = split_words(text)
    found = [text[start:end] for start, end in spans]
    assert found == words
    assert "".join(found) == "".join(text.split())


def test_one_white_space_goes_with_a_word():
    text = " a  b\tc"
    assert [without(text, span) for span in split_words(text)] == ["  b\tc", " a  c", " a  b"]
    assert without("a", (0, 1)) == ""
    assert without("映画", (0, 1)) == "画"


def test_more_words_than_the_limit_are_grouped():
    classifier = embedding(prompt="{text}.")
    text = "a bc def gh i jk lm"
    explanation = explain(classifier, text, max_words=3)
    assert explanation.words == ("a bc", "def gh", "i jk lm")
    assert explanation.is_grouped
    assert explanation.n_words == 7
    (target,) = explanation.targets
    rests = [text, "def gh i jk lm", "a bc i jk lm", "a bc def gh"]
    p = classifier.predict_proba(rests)[:, classifier.labels.index(target.label)]
    assert target.effects == pytest.approx(p[0] - p[1:], abs=1e-6)
    assert explain(classifier, text, max_words=1).words == (text,)
    assert not explain(classifier, text, max_words=7).is_grouped
    for limit in (0, -1, 10_001, 2.5, True, None):
        with pytest.raises(MinllamaError, match="max_words must be"):
            explain(classifier, text, max_words=limit)


@pytest.mark.parametrize("keep_end", [False, True])
@pytest.mark.parametrize("treebank", [False, True])
def test_words_that_are_not_read_have_no_effect(keep_end, treebank):
    options = PromptOptions(
        prompt="T: {text}.", max_len=24, keep_end=keep_end, undo_treebank=treebank
    )
    classifier = embedding(prompt=options)
    text = (
        "a ( b ) bc , def gh i jk lm no pqrs tu v wx"
        if treebank
        else "a bc def gh i jk lm no pq rs"
    )
    explanation = explain(classifier, text)
    (target,) = explanation.targets
    column = classifier.labels.index(target.label)
    p = float(classifier.predict_proba([text])[0, column])
    for span, effect in zip(explanation.spans, target.effects, strict=True):
        q = float(classifier.predict_proba([without(text, span)])[0, column])
        assert effect == pytest.approx(p - q, abs=1e-6)
    unread, n = target.effects, explanation.n_unread
    assert 0 < n < explanation.n_words
    assert set(unread[:n] if keep_end else unread[-n:]) == {0.0}
    few = explain(classifier, text, max_words=3)
    assert len(few.spans) == 3
    words = text.split()
    rest = " ".join(words[:n] if keep_end else words[-n:])
    assert few.words[0 if keep_end else -1] == rest
    assert few.targets[0].effects[0 if keep_end else -1] == 0.0
    one = explain(classifier, text, max_words=1)
    assert one.words == (text,)
    q = float(classifier.predict_proba([""])[0, column])
    assert one.targets[0].effects == pytest.approx([p - q], abs=1e-6)


def test_only_the_text_itself_counts_as_shortened():
    classifier = embedding(prompt=PromptOptions(prompt="{text}", max_len=8))
    explain(classifier, "a bc def gh i jk lm")
    assert len(classifier.shortened) == 1


@pytest.mark.parametrize("keep_end", [False, True])
def test_of_a_huge_text_only_what_can_be_read_is_encoded(keep_end, monkeypatch):
    options = PromptOptions(prompt="{text}.", max_len=24, keep_end=keep_end)
    classifier = embedding(prompt=options)
    words = [f"w{i % 7}" for i in range(40_000)]
    text = " ".join(words)
    lengths, encode = [], classifier.template.encode

    def counted(part):
        lengths.append(len(part))
        return encode(part)

    monkeypatch.setattr(classifier.template, "encode", counted)
    explanation = explain(classifier, text)
    assert len(explanation.spans) <= 100
    assert explanation.n_words == 40_000
    assert max(lengths[1:]) <= 20_100
    (target,) = explanation.targets
    column = classifier.labels.index(target.label)
    p = float(classifier.predict_proba([text])[0, column])
    for i in range(-1, -6, -1) if keep_end else range(5):
        q = float(classifier.predict_proba([without(text, explanation.spans[i])])[0, column])
        assert target.effects[i] == pytest.approx(p - q, abs=1e-6)


def test_a_span_that_is_most_of_a_huge_text_leaves_the_rest_to_be_read():
    classifier = embedding(prompt=PromptOptions(prompt="{text}.", max_len=24))
    text = "x" * 60_000 + " short end"
    explanation = explain(classifier, text)
    (target,) = explanation.targets
    column = classifier.labels.index(target.label)
    p, q = classifier.predict_proba([text, "short end"])[:, column]
    assert target.effects == pytest.approx([p - q, 0, 0], abs=1e-6)


def test_an_explanation_is_the_same_each_time_and_can_be_written_as_json():
    classifier = zero_shot()
    explanation = explain(classifier, TEXT)
    assert explain(classifier, TEXT) == explanation
    with pytest.raises(dataclasses.FrozenInstanceError):
        explanation.unit = "x"
    said = json.loads(json.dumps(explanation.to_dict(), allow_nan=False))
    assert said["words"][2] == {"text": "mess:", "start": 7, "end": 12}
    assert TEXT[7:12] == "mess:"
    (target,) = said["targets"]
    assert target["effects"] == list(explanation.targets[0].effects)
    assert target["log_odds_effects"] == list(explanation.targets[0].log_odds_effects)
    assert target["probability"] == explanation.targets[0].value
    assert (said["method"], said["n_words"], said["n_unread"]) == ("leave-one-out", 5, 0)
    order = explanation.strongest(2)
    effects = np.abs(explanation.targets[0].effects)
    assert effects[order[0]] == effects.max()
    assert effects[order[0]] >= effects[order[1]]


def test_what_is_not_a_text_is_refused():
    for wrong in (None, 3, b"a", ["a"]):
        with pytest.raises(MinllamaError, match="string"):
            explain(embedding(), wrong)


def test_the_package_has_explain():
    assert minllama.explain is explain
    assert minllama.Explanation.__name__ == "Explanation"
