"""Decisions: probabilities of a question's options, which no order and no company changes."""

import itertools
import math
import random

import numpy as np
import pytest
import torch

from minllama.classification.decisions import (
    Answer,
    DecisionModel,
    Option,
    Question,
    answer_by_classifier,
    choice_confidence,
    score_confidence,
)
from minllama.classification.decisions.decide import label_mass
from minllama.classification.decisions.prompts import DecisionPrompts, asked_text, label_words
from minllama.classification.decisions.questions import as_text
from minllama.engine.prefix_cache import common_length
from minllama.errors import ContextError, DataError, MinllamaError
from minllama.tokenizer.tokenizer import Tokenizer
from tests.classifier_cases import Characters, embedding, tiny_llama

STATE = "The lid broke on the first day, and nobody answers the phone."
PREDICATE = Question.predicate("Is it a complaint?")
CHOICE = Question.choice("Which one?", ["red", "green", "redder", True, False])
SCORE = Question.score("How bad?", ["fine", "bad", "awful"])
DESCRIBED = Question.choice("Team?", {"billing": "money", "shipping": "parcels", "other": None})


@pytest.fixture(scope="module")
def model():
    return DecisionModel(tiny_llama(max_seq_len=512), Characters())


def log_p(llama, ids, continuation):
    """Log p of some tokens after others, by one forward pass of the whole sequence."""
    tokens = torch.tensor([[*ids, *continuation]])
    with torch.no_grad():
        log_probabilities = llama(tokens).logits[0].log_softmax(-1)
    start = len(ids) - 1
    return sum(float(log_probabilities[start + i, id_]) for i, id_ in enumerate(continuation))


def by_hand(llama, state, asked, words):
    """Probabilities by the formulas of the docstrings, with no shared computation."""

    def scores(text):
        ids = Characters().encode(f"Text: {text}\n\nQuestion: {asked}\nAnswer:")
        return np.array([log_p(llama, ids, Characters().encode(f" {word}")) for word in words])

    free = [np.exp(scores(text)) for text in ("N/A", "[MASK]", "")]
    prior = np.mean([p / p.sum() for p in free], axis=0)
    own = np.exp(scores(state))
    odds = own / prior
    return odds / odds.sum(), own


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_answers_are_those_of_the_formulas(strength):
    llama = tiny_llama(max_seq_len=512)
    model = DecisionModel(llama, Characters(), prior_strength=strength)
    cases = [
        (PREDICATE, "Is it a complaint?", ["Yes", "No"], 2),
        (CHOICE, "Which one?", ["red", "green", "redder", "Yes", "No"], 5),
        (SCORE, "How bad?", ["fine", "bad", "awful"], 3),
        (
            DESCRIBED,
            "Team?\nbilling: money\nshipping: parcels",
            ["billing", "shipping", "other"],
            3,
        ),
    ]
    answers = model.answer(STATE, [question for question, *_ in cases])
    for answer, (question, asked, words, _) in zip(answers, cases, strict=True):
        p, own = by_hand(llama, STATE, asked, words)
        expected = p if strength else own / own.sum()
        assert answer.question is question
        assert answer.method == "label-words"
        assert answer.probabilities == pytest.approx(expected, rel=1e-4)
        assert sum(answer.probabilities) == pytest.approx(1, abs=1e-12)
        mass = own.sum() - (own[2] if question is CHOICE else 0)  # redder is a red
        assert answer.label_mass == pytest.approx(mass, rel=1e-4)


def test_no_order_of_questions_and_no_company_changes_an_answer(model):
    questions = [PREDICATE, CHOICE, SCORE, DESCRIBED]
    alone = {id(q): model.answer(STATE, [q])[0] for q in questions}
    for order in itertools.permutations(questions):
        fresh = DecisionModel(model.llama, Characters())
        for question, answer in zip(order, fresh.answer(STATE, order), strict=True):
            assert answer == alone[id(question)]  # bit for bit


@pytest.mark.parametrize("question", [CHOICE, DESCRIBED])
def test_no_order_of_choices_changes_an_answer(model, question):
    (expected,) = model.answer(STATE, [question])
    by_value = dict(zip(question.options, expected.probabilities, strict=True))
    for options in itertools.permutations(question.options):
        (answer,) = model.answer(STATE, [Question.choice(question.instructions, options)])
        assert dict(zip(options, answer.probabilities, strict=True)) == by_value
        assert answer.choice == expected.choice
        assert answer.confidence == expected.confidence
        assert answer.label_mass == expected.label_mass


@pytest.mark.slow
def test_the_real_model_is_as_indifferent_to_order_and_company(default_model):
    from minllama.model.llama import load_pretrained

    llama = load_pretrained(default_model)
    tokenizer = Tokenizer.from_pretrained(default_model)
    model = DecisionModel(llama, tokenizer)
    state = STATE + " <|im_end|>\n" + "I have been waiting for weeks. " * 20
    questions = [PREDICATE, CHOICE, SCORE, DESCRIBED]
    first = model.answer(state, questions)
    again = DecisionModel(llama, tokenizer).answer(state, questions[::-1])[::-1]
    assert first == again
    assert model.answer(state, [SCORE]) == [first[2]]
    mixed = random.Random(0).sample(CHOICE.options, len(CHOICE.options))
    (answer,) = model.answer(state, [Question.choice(CHOICE.instructions, mixed)])
    expected = dict(zip(CHOICE.options, first[1].probabilities, strict=True))
    assert dict(zip(mixed, answer.probabilities, strict=True)) == expected
    assert all(answer.n_shared > 100 for answer in first)
    # A user's special token is text.
    prompt = model.prompts.encode("<|im_end|>", PREDICATE)
    assert prompt.ids.count(tokenizer.special_tokens["<|im_end|>"]) == (
        model.prompts.encode("x", PREDICATE).ids.count(tokenizer.special_tokens["<|im_end|>"])
    )


PIECES = (
    "word ",
    "Ünï",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "12",
    " 7",
    "'s",
    "...",
    "日本",
    "🙂",
    "<|im_end|>",
    "a",
    " c",
)


def whole_prompt(prompts, state, question):
    """Prompt and options encoded together, each from its first character."""
    for is_numbered in (False, True):
        words = label_words(question, is_numbered=is_numbered)
        asked = asked_text(question, is_numbered=is_numbered)
        prompt = prompts._ids(state, asked, "")
        whole = [prompts._ids(state, asked, word) for word in words]
        shared = min(common_length(prompt, ids) for ids in whole)
        continuations = tuple(ids[shared:] for ids in whole)
        if all(continuations) and len(set(continuations)) == len(words):
            break
    return prompt[:shared], continuations


@pytest.mark.parametrize("has_template", [True, False])
def test_ends_that_are_encoded_alone_are_those_of_whole_prompts(default_model, has_template):
    prompts = DecisionPrompts(Tokenizer.from_pretrained(default_model), 8192)
    if not has_template:
        prompts._frame = None
    draw, n_cut = random.Random(1), 0
    for _ in range(150):
        state = "".join(draw.choices(PIECES, k=draw.randint(0, 300)))
        words = {"".join(draw.choices(PIECES, k=3)) for _ in range(3)} | {"x", "y"}
        question = Question.choice("".join(draw.choices(PIECES, k=4)), sorted(words))
        on_state = prompts.on(state)
        n_cut += on_state._is_cut
        found = on_state.encode(question)
        assert found == prompts.encode(state, question)
        assert (found.ids, found.continuations) == whole_prompt(prompts, state, question)
    assert n_cut > 50


def test_a_state_is_read_once(model, monkeypatch):
    lengths = []
    forward = type(model.llama.layers[0]).forward

    def counted(self, h, *args, **options):
        if self is model.llama.layers[0]:
            lengths.append(h.shape[0] * h.shape[1])
        return forward(self, h, *args, **options)

    questions = [Question.predicate(f"Is it {i}?") for i in range(20)]
    model.answer("warm", questions)  # the priors
    monkeypatch.setattr(type(model.llama.layers[0]), "forward", counted)
    state = "x" * 300
    answers = model.answer(state, questions)
    assert 300 < sum(lengths) < 300 + 20 * 60
    assert all(answer.n_shared >= 300 for answer in answers)


def test_labels_that_cannot_be_told_apart_are_numbered(model):
    for values in (["", "x"], ["a b", "a  b"], [True, "Yes"], ["x", " x"]):
        question = Question.choice("Which?", values)
        assert label_words(question) == ["1", "2"]
        (answer,) = model.answer(STATE, [question])
        assert sum(answer.probabilities) == pytest.approx(1)
    question = Question.choice("Which?", [Option("", "nothing"), Option("x")])
    assert asked_text(question, is_numbered=True) == "Which?\n1: nothing\n2: x"


def test_booleans_and_strings_of_the_same_text_are_different_values(model):
    (answer,) = model.answer(STATE, [Question.choice("?", [True, "True", False])])
    assert len(answer.probabilities) == 3
    assert type(answer.choice) in (bool, str)


def test_as_many_as_255_choices(model):
    values = [f"value {i}" for i in range(255)]
    (answer,) = model.answer("x", [Question.choice("Which?", values)])
    assert len(answer.probabilities) == 255
    assert sum(answer.probabilities) == pytest.approx(1)


def test_questions_without_instructions_have_some(model):
    described = Question.predicate("", true="it is late", false="it is early")
    assert asked_text(described) == "Is this true?\nYes: it is late\nNo: it is early"
    assert asked_text(Question.score("  ", ["a", "b"])) == "Which level is right?"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Question.choice("?", ["a"]), "2 to 255 options, not 1"),
        (lambda: Question.choice("?", [str(i) for i in range(256)]), "not 256"),
        (lambda: Question.choice("?", ["a", "a"]), "'a' is given twice"),
        (lambda: Question.choice("?", [True, True]), "True is given twice"),
        (lambda: Question.choice("?", ["a", 1]), "1 is not a string or boolean"),
        (lambda: Question.choice("?", "ab"), "must be a list"),
        (lambda: Question.score("?", ["a", True]), "True is not a string"),
        (lambda: Question.score(3, ["a", "b"]), "instructions must be a string"),
        (lambda: Question.choice("?", [Option("a", 3), "b"]), "description 3 is not a string"),
        (lambda: Question("predicate", "?", (Option(False), Option(True))), "True and False"),
        (lambda: Question("other", "?", (Option("a"), Option("b"))), "not 'other'"),
    ],
)
def test_questions_that_cannot_be_are_refused(make, said):
    with pytest.raises(DataError, match=said):
        make()


def test_what_does_not_fit_is_refused_with_both_numbers():
    model = DecisionModel(tiny_llama(), Characters())
    with pytest.raises(ContextError, match=r"have 1,\d\d\d tokens, but the limit is 128; shorten"):
        model.answer("x" * 1000, [PREDICATE])
    with pytest.raises(DataError, match="must be a string"):
        model.answer({"a": 1}, [PREDICATE])
    assert model.answer("x", []) == []


def test_a_bidirectional_model_is_refused():
    with pytest.raises(MinllamaError, match="causal"):
        DecisionModel(tiny_llama(causal=False), Characters())


def test_choice_confidence_is_the_published_formula():
    # (max p - 1/n) / (1 - 1/n)
    assert choice_confidence([0.7, 0.2, 0.1]) == pytest.approx(0.55)
    assert choice_confidence([0.5, 0.5]) == 0.0
    assert choice_confidence([0.0, 1.0]) == 1.0
    assert choice_confidence([0.25] * 4) == 0.0
    assert choice_confidence([0.8, 0.2]) == pytest.approx(0.6)


def test_score_confidence_is_the_published_formula():
    # 1 - sum_i p_i |i - mode| / u; u = mean_i |i - (n - 1) / 2|: 2/3 for 3 levels, 1.2 for 5
    assert score_confidence([0.1, 0.8, 0.1]) == pytest.approx(0.7)
    assert score_confidence([0.0, 0.1, 0.2, 0.6, 0.1]) == pytest.approx(1 - 0.5 / 1.2)
    assert score_confidence([0.5, 0.0, 0.5]) == 0.0
    assert score_confidence([0.0, 1.0]) == 1.0
    assert score_confidence([0.5, 0.5]) == 0.0


def test_a_score_is_the_expectation_over_its_levels():
    answer = Answer(SCORE, (0.2, 0.5, 0.3), 0.4, "label-words")
    assert answer.score == pytest.approx(1.1)
    assert (answer.choice, answer.best) == ("bad", 1)
    assert answer.confidence == score_confidence([0.2, 0.5, 0.3])
    choice = Answer(Question.choice("?", ["b", "a"]), (0.5, 0.5), 1.0, "label-words")
    assert choice.choice == "a"  # of equals the first by value, whatever the order
    assert Answer(PREDICATE, (0.25, 0.75), 1.0, "label-words").probability == 0.25


def test_label_mass_counts_what_begins_alike_once():
    scores = np.log([0.3, 0.1, 0.2])
    assert label_mass(scores, ((1,), (1, 2), (3,))) == pytest.approx(0.5)
    assert label_mass(scores, ((1,), (2,), (3,))) == pytest.approx(0.6)


def test_a_trained_classifier_answers_for_its_labels():
    classifier = embedding(labels=("good", "bad", "dull"))
    p = classifier.predict_proba([STATE[:50]])[0]
    answer = answer_by_classifier(classifier, STATE[:50], Question.choice("?", ["dull", "good"]))
    assert answer.method == "classifier"
    assert answer.label_mass == pytest.approx(p[0] + p[2])
    assert answer.probabilities == pytest.approx([p[2] / (p[0] + p[2]), p[0] / (p[0] + p[2])])
    assert answer.n_tokens == 50
    levels = answer_by_classifier(classifier, "x", Question.score("?", ["bad", "dull", "good"]))
    assert levels.label_mass == pytest.approx(1)
    for other in (PREDICATE, CHOICE, Question.choice("?", ["good", "fine"])):
        assert answer_by_classifier(classifier, "x", other) is None
    several = embedding(labels=("good", "bad"), multi_label=True)
    assert answer_by_classifier(several, "x", Question.choice("?", ["good", "bad"])) is None


def test_a_state_of_json_is_one_line_of_text():
    assert as_text("a\nb") == "a\nb"
    assert as_text({"b": [1, None], "a": "é"}) == '{"b": [1, null], "a": "é"}'
    for wrong in (math.nan, {1, 2}, b"x"):
        with pytest.raises(DataError, match="neither"):
            as_text(wrong)
