"""`--method auto`, from files to a classifier in a folder: whole, interrupted, and in no time."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minllama.classification import load_classifier
from minllama.errors import MinllamaError
from minllama.experiment import run_experiment
from minllama.experiment.ladder import climb as climb_module
from minllama.experiment.ladder import contrastive as contrastive_module
from minllama.experiment.ladder import tfidf as tfidf_rung
from minllama.experiment.ladder.budget import REPORT_SECONDS, Budget
from minllama.experiment.ladder.choice import Choice, Gain
from minllama.experiment.ladder.climb import climb
from minllama.experiment.ladder.contrastive import ContrastiveRung
from minllama.experiment.ladder.lora import LabelWordsRung, LoRARung, restore_base
from minllama.experiment.ladder.partner import Multiplied, multiplied_by
from minllama.experiment.ladder.product import ProductRung
from minllama.experiment.ladder.rung import Context, Measured, NotThisTime
from minllama.experiment.ladder.scoring import ClassScoring
from minllama.experiment.ladder.tfidf import TfidfRung
from minllama.experiment.ladder.zero_shot import ZeroShotRung
from minllama.experiment.reporter import Reporter
from minllama.lora import lora_layers
from tests.experiment_cases import REPORT, Heard, examples, names_in, write_labelled

SLOW = pytest.mark.slow
TEXTS = ["a fine film", "dull", "great music and a slow plot"]
TITLES = [
    *("TF-IDF", "zero-shot label words", "frozen heads", "contrastive LoRA"),
    *("LoRA with label words", "LoRA with a head", "LoRA and frozen heads"),
]

SELECTING_MODULES = (
    *("classification.frozen", "experiment.ladder.climb", "experiment.ladder.contrastive"),
)


def ladder_of(folder):
    return json.loads((folder / "metrics.json").read_text())["ladder"]


def rungs_of(folder):
    return {rung["name"]: rung for rung in ladder_of(folder)["rungs"]}


@pytest.fixture(scope="module", autouse=True)
def _short_measurements():
    """Rates are measured for a moment only."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("rung", "lora"):
            patch.setattr(f"minllama.experiment.ladder.{module}.ENOUGH_SECONDS", 0.05)
        for module in SELECTING_MODULES:
            patch.setattr(f"minllama.{module}.FEW_ROWS", 0)  # as if there were many
        yield


@pytest.fixture(scope="module")
def whole(experiment_in, labelled_files, tmp_path_factory):
    """A run without an interruption."""
    heard, folder = Heard(), tmp_path_factory.mktemp("ladder") / "whole"
    experiment = experiment_in(folder, "auto", test=labelled_files / "dev.txt")
    return experiment.output, run_experiment(experiment, reporter=heard), heard.lines


def test_auto_leaves_an_ordinary_classifier_and_its_ladder(whole):
    folder, outcome, lines = whole
    after = load_classifier(folder, device="cpu")
    np.testing.assert_array_equal(
        after.predict_proba(TEXTS), outcome.classifier.predict_proba(TEXTS)
    )
    assert {"classifier.json", "README.md"} | REPORT <= names_in(folder)
    assert "ladder" not in names_in(folder)
    content = ladder_of(folder)
    assert (content["metric"], content["minutes"], content["prefer"]) == ("accuracy", 5, "accuracy")
    assert [rung["name"] for rung in content["rungs"]] == TITLES
    (chosen,) = (rung for rung in content["rungs"] if rung["chosen"])
    assert chosen["value"] > 0.5
    assert chosen["bytes"] > 500
    assert chosen["seconds"] > 0
    for rung in content["rungs"]:
        assert rung["reason"]
        assert (rung["value"] is None) == (rung["rows"] == 0)
    # What will be tried is reported before anything is.
    begin = next(i for i, line in enumerate(lines) if line.startswith("auto: at most 5 minutes"))
    plan = lines[begin + 1 : begin + 1 + len(TITLES)]
    assert [line.split(":")[0] for line in plan] == [f"- {title}" for title in TITLES]
    assert any(line.startswith(f"chosen: {chosen['name']}, ") for line in lines)
    page = (folder / "report.html").read_text()
    assert "What was tried" in page
    assert f"Chosen: <bdi>{chosen['name']}</bdi>" in page


def test_of_few_rows_the_rung_that_combines_the_others_is_the_default(make_experiment, monkeypatch):
    """Too few rows tell rungs apart, and one of them has the others in it."""
    for module in SELECTING_MODULES:
        monkeypatch.setattr(f"minllama.{module}.FEW_ROWS", 150)
    defaults, choose = [], climb_module.choose_for_few

    def noted(names, compare, default, **options):
        defaults.append(default)
        return choose(names, lambda one, other: Gain(0.0, 1.0, 24), default, **options)

    monkeypatch.setattr(climb_module, "choose_for_few", noted)
    experiment = make_experiment("auto")
    outcome = run_experiment(experiment)
    assert defaults == ["contrastive LoRA"]
    (chosen,) = (rung for rung in rungs_of(experiment.output).values() if rung["chosen"])
    assert (chosen["name"],) == tuple(defaults)
    assert chosen["reason"].startswith("the others are combined in it")
    assert outcome.classifier.base_choices
    after = load_classifier(experiment.output, device="cpu")
    np.testing.assert_array_equal(
        after.predict_proba(TEXTS), outcome.classifier.predict_proba(TEXTS)
    )
    # Without it, the frozen heads are.
    monkeypatch.setattr(ContrastiveRung, "obstacle", lambda rung: "for a test")
    run_experiment(dataclasses.replace(experiment, output=experiment.output.with_name("again")))
    assert defaults[1:] == ["frozen heads"]


def test_the_tuned_head_has_a_fixed_share_of_a_few_rows():
    labels = np.arange(40) % 2
    sign = np.where(labels == 1, 1.0, -1.0)[:, None] * np.float32([[-1, 1]])
    noise = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    frozen, tuned = (2 * sign + noise).astype(np.float32), (50 * sign + 90 * noise[::-1])
    context = SimpleNamespace(
        train=SimpleNamespace(labels=labels.tolist()),
        splits=SimpleNamespace(dev=SimpleNamespace(labels=[0, 1])),
        empty_scores=lambda: np.full((42, 2), np.nan, dtype=np.float32),
    )
    of_rung, others = context.empty_scores(), context.empty_scores()
    of_rung[:40], others[:40] = tuned, frozen
    found = multiplied_by(context, of_rung, others, share=contrastive_module.SHARE)
    shares = [
        factor * float((z - z.mean(1, keepdims=True)).std())
        for factor, z in ((found.of_partner, frozen), (found.of_rung, tuned))
    ]
    assert shares[1] / sum(shares) == pytest.approx(contrastive_module.SHARE, rel=1e-5)
    logits = found.of_partner * frozen + found.of_rung * tuned
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(found.scores[:40], expected, atol=1e-5)
    assert np.isnan(found.scores[40:]).all()
    # Frozen heads that time allowed to be fitted to a part of the rows are compared on that part.
    others[30:] = np.nan
    found = multiplied_by(context, of_rung, others, share=contrastive_module.SHARE)
    assert np.isfinite(found.scores[:30]).all()
    assert np.isnan(found.scores[30:]).all()
    assert found.of_rung > 0


def test_contrastive_tuning_stops_when_the_time_is_up():
    context = SimpleNamespace(folder=Path(), budget=SimpleNamespace(left=1.0))
    rung = ContrastiveRung(context)
    rung._stop_in_time(3)
    context.budget.left = -1.0
    with pytest.raises(NotThisTime, match="the time was up after step 3 of 20"):
        rung._stop_in_time(3)
    rung._stop_in_time(20)  # done


def test_of_many_rows_some_are_compared_and_all_are_fitted(make_experiment, monkeypatch):
    for module in ("rung", "frozen"):
        monkeypatch.setattr(f"minllama.experiment.ladder.{module}.MAX_ROWS", 16)
    fitted, fit = [], tfidf_rung.fit_tfidf
    monkeypatch.setattr(
        tfidf_rung, "fit_tfidf", lambda texts, *rest: fitted.append(len(texts)) or fit(texts, *rest)
    )
    experiment = make_experiment("auto", training={"epochs": 1})
    outcome = run_experiment(experiment)
    n, n_dev = len(outcome.splits.train), len(outcome.splits.dev)
    assert n > 21
    assert fitted == [n]
    rungs = rungs_of(experiment.output)
    for title in ("TF-IDF", "frozen heads"):
        assert f" of {n} training texts" in rungs[title]["how"]
        # Half of sixteen for words, and some more where a class has fewer than five among them.
        assert 8 + n_dev <= rungs[title]["rows"] <= 21 + n_dev
    assert rungs["TF-IDF"]["how"].endswith(f"fitted to {n}")


class Stopped:
    """Interrupts a function when it is called for the nth time."""

    def __init__(self, function, n):
        self._function, self._left = function, n

    def __call__(self, *arguments, **options):
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        return self._function(*arguments, **options)


@pytest.mark.parametrize(
    "place",
    ["lora", *(pytest.param(p, marks=SLOW) for p in ("tfidf", "zero-shot", "frozen", "choice"))],
)
def test_a_run_that_was_interrupted_at_any_rung_goes_on_there(
    make_experiment, labelled_files, whole, monkeypatch, place
):
    experiment = make_experiment("auto", test=labelled_files / "dev.txt")
    heard = Heard(interrupt_after={"frozen": "reading the training texts", "lora": 3}.get(place))
    with monkeypatch.context() as patch:
        if place == "tfidf":
            patch.setattr(TfidfRung, "run", Stopped(None, 1))
        if place == "zero-shot":
            patch.setattr(ZeroShotRung, "run", Stopped(None, 1))
        if place == "choice":
            patch.setattr(climb_module, "_choice", Stopped(None, 1))
        with pytest.raises(KeyboardInterrupt):
            run_experiment(experiment, reporter=heard)
    with pytest.raises(MinllamaError, match="--resume continues it, --force replaces it"):
        run_experiment(experiment)
    resumed = Heard()
    outcome = run_experiment(experiment, reporter=resumed, resume=True)
    done = [line for line in resumed.lines if line.endswith(": done before the interruption")]
    places = {"tfidf": 0, "zero-shot": 1, "frozen": 2, "lora": 4, "choice": 7}
    assert len(done) == places[place]
    folder, of_whole, _ = whole
    np.testing.assert_allclose(
        outcome.classifier.predict_proba(TEXTS),
        of_whole.classifier.predict_proba(TEXTS),
        atol=1e-6,
    )
    one, other = rungs_of(experiment.output), rungs_of(folder)
    for name, rung in one.items():
        assert (rung["value"], rung["chosen"]) == (other[name]["value"], other[name]["chosen"])


def test_the_product_of_lora_and_frozen_heads_is_one_classifier(
    make_experiment, labelled_files, monkeypatch
):
    """Its logits are those of the two, weighted and added; it is saved with the adapters."""
    alone, load = {}, climb_module.load_candidate

    def opened(folder, llama, tokenizer):
        for name in ("shallow", "lora"):
            one = load(folder.parents[1] / name / "classifier", llama, tokenizer)
            alone[name] = one.predict_logits(TEXTS)
            restore_base(llama)
        return load(folder, llama, tokenizer)

    def chosen(names, *rest, **options):
        title = ProductRung.title
        return Choice(title, title, dict.fromkeys(names, "for a test"))

    monkeypatch.setattr(climb_module, "load_candidate", opened)
    monkeypatch.setattr(climb_module, "choose", chosen)
    monkeypatch.setattr(LoRARung, "_is_worse", lambda *arguments: False)
    weighted = lambda context, scores: Multiplied(scores.copy(), 0.6, 0.4)  # noqa: E731
    monkeypatch.setattr("minllama.experiment.ladder.product.multiplied", weighted)
    experiment = make_experiment("auto", test=labelled_files / "dev.txt")
    made = run_experiment(experiment).classifier
    *lower, (trained, _) = made.choices
    assert lower or made.tfidf is not None
    # What the lower heads read is as it was without adapters.
    adapted = {int(name.split(".")[1]) for name in lora_layers(made.llama)}
    assert max((layer for layer, _ in lower), default=0) <= min(adapted) < trained
    centered = [
        (logits - logits.mean(1, keepdims=True)).ravel()
        for logits in (*alone.values(), made.predict_logits(TEXTS))
    ]
    weights, *_ = np.linalg.lstsq(np.stack(centered[:2], 1), centered[2], rcond=None)
    assert (weights > 0).all()
    np.testing.assert_allclose(np.stack(centered[:2], 1) @ weights, centered[2], atol=2e-3)
    assert "adapter_model.safetensors" in names_in(experiment.output)
    after = load_classifier(experiment.output, device="cpu")
    np.testing.assert_array_equal(after.predict_proba(TEXTS), made.predict_proba(TEXTS))
    # The steps of its training are in the report.
    assert (experiment.output / "report.html").read_text().count('id="training"') == 1


def test_training_goes_on_unless_accuracy_and_loss_are_both_worse(tmp_path):
    """Frozen heads are right on 90 of 100 rows, sure of all; each other is right on fewer."""

    def scored(right, sure):
        rows = np.tile(np.float32([0, sure]), (100, 1))
        rows[right:] = rows[right:, ::-1] * 0.1  # wrong, and in doubt
        return rows

    frozen = np.tile(np.float32([0, 3]), (100, 1))
    frozen[90:] = [3, 0]
    scoring = ClassScoring([1] * 100, ["no", "yes"], "accuracy", multi_label=False)
    results = {"frozen": Measured(frozen, "", 1.0, None, None)}
    context = SimpleNamespace(scoring=scoring, results=results, folder=tmp_path)
    rung = LabelWordsRung(context)
    assert rung._is_worse(np.float32([[0, 3]] * 60 + [[3, 0]] * 40))
    assert not rung._is_worse(scored(80, 3.0)), "its probabilities are better"
    assert not rung._is_worse(frozen)


def test_another_run_s_ladder_is_not_resumed(make_experiment):
    experiment = make_experiment("auto")
    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, reporter=Heard(interrupt_after="reading the training texts"))
    with pytest.raises(MinllamaError, match=r"cannot resume: .*seed"):
        run_experiment(make_experiment("auto", training={"seed": 3}), resume=True)
    with pytest.raises(MinllamaError, match="of another method; resume it with --method auto"):
        run_experiment(make_experiment("lora"), resume=True)
    # More time is no other run.
    run_experiment(make_experiment("auto", ladder={"minutes": 6}), resume=True)


def test_in_no_time_a_frozen_head_is_fitted_and_the_rest_is_skipped(make_experiment):
    experiment = make_experiment("auto", ladder={"minutes": 0.001})
    run_experiment(experiment)
    rungs = rungs_of(experiment.output)
    assert [name for name, rung in rungs.items() if rung["value"] is not None] == ["frozen heads"]
    assert rungs["frozen heads"]["reason"] == "the only one left"
    for name in TITLES[:2] + TITLES[3:]:
        assert rungs[name]["reason"].startswith("skipped: it takes about ")
        assert rungs[name]["reason"].endswith(" would do")


def test_numbers_are_predicted_by_what_can(make_experiment, tmp_path):
    rows = [(len(text), text) for _, text in examples(40)]
    train = write_labelled(tmp_path / "numbers.txt", rows)
    experiment = make_experiment("auto", train=train, dev="", objective="regression")
    outcome = run_experiment(experiment)
    assert outcome.classifier.scale is not None
    content = ladder_of(experiment.output)
    assert content["metric"] == "rmse"
    reasons = {rung["name"]: rung["reason"] for rung in content["rungs"]}
    assert [name for name in TITLES if "labels are numbers" not in reasons[name]] == [
        *("frozen heads", "LoRA with a head"),
    ]


def test_several_labels_a_text_are_predicted_by_what_can(make_experiment, tmp_path):
    lines = [{"text": text, "label": [label, "any"][: 1 + i % 2]}
             for i, (label, text) in enumerate(examples(40))]  # fmt: skip
    train = tmp_path / "several.jsonl"
    train.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"dev": "", "data": {"multi_label": True}, "training": {"epochs": 1}}
    experiment = make_experiment("auto", train=train, **options)
    assert run_experiment(experiment).classifier.multi_label
    rungs = rungs_of(experiment.output)
    assert rungs["frozen heads"]["value"] is not None
    for name in TITLES[:2]:
        assert "texts have several labels" in rungs[name]["reason"]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class FakeRung:
    """Takes so many seconds, and is right on so many of 100 rows."""

    def __init__(self, clock, name, seconds, right, said=None):
        self.name, self.title, self._clock = name, f"a {name}", clock
        self._seconds, self._right, self._said = seconds, right, said or seconds

    def obstacle(self):
        return None

    def estimate(self):
        return self._said

    def plan(self):
        return f"about {self._said} s"

    def run(self):
        self._clock.now += self._seconds
        scores = np.tile(np.float32([0, 1]), (100, 1))
        scores[self._right :] = [1, 0]
        return Measured(scores, "by magic", self._seconds, 50.0, object())


@pytest.fixture
def climbed(tmp_path, monkeypatch):
    """Climb rungs that take (seconds, right answers, estimate), in so many minutes."""
    monkeypatch.setattr(climb_module, "save_candidate", lambda *arguments: None)
    monkeypatch.setattr(climb_module, "size_on_disk", lambda folder: 1000)
    monkeypatch.setattr(climb_module, "load_candidate", lambda folder, *rest: folder.parent.name)
    monkeypatch.setattr(climb_module, "restore_base", lambda llama: None)
    monkeypatch.setattr(climb_module, "_fingerprint", lambda context: {})
    monkeypatch.setattr(Context, "keep_time_for_report", lambda context: None)
    monkeypatch.setattr(Context, "empty_scores", lambda context: np.empty((100, 2), np.float32))

    def call(minutes, prefer="accuracy", **rungs):
        clock = Clock()
        options = SimpleNamespace(minutes=minutes, prefer=prefer)
        experiment = SimpleNamespace(ladder=options, tokenizer=None)
        scoring = ClassScoring([1] * 100, ["no", "yes"], "accuracy", multi_label=False)
        budget = Budget(minutes, clock=clock)
        splits = SimpleNamespace(whole=None)
        context = Context(experiment, splits, None, None, Reporter(), budget, tmp_path, {}, scoring)
        made = [FakeRung(clock, name, *values) for name, values in rungs.items()]
        return climb(context, resume=False, rungs=made), clock.now

    return call


def test_what_does_not_fit_is_skipped_and_the_time_is_kept(climbed):
    result, seconds = climbed(2, words=(20, 60), head=(30, 90), slow=(70, 99))
    assert seconds == 50 <= 120 - REPORT_SECONDS
    assert result.classifier == "head"
    assert [row.reason for row in result.ladder.rows] == [
        "30.0 ± 4.6 points below a head",
        "the best of those that could be measured",
        "skipped: it takes about 1 min 10 s, and 1 min 4 s were left; --minutes 3 would do",
    ]
    result, seconds = climbed(3, words=(20, 60), head=(30, 90), slow=(70, 99))
    assert (result.classifier, seconds) == ("slow", 120)


def test_a_rung_that_takes_longer_than_it_said_leaves_less_for_the_others(climbed):
    result, seconds = climbed(2, words=(100, 60, 10), head=(30, 90))
    assert (result.classifier, seconds) == ("words", 100)
    assert result.ladder.rows[1].reason.startswith("skipped: it takes about 30.0 s, and 14.0 s")


def test_the_cheaper_of_two_that_cannot_be_told_apart_is_taken(climbed):
    # Two rows of 100 differ: 2 points, with a standard error of 1.4; one differs: 1 point, of 1.
    assert climbed(9, head=(1, 90), slow=(9, 92))[0].classifier == "slow"
    result, _ = climbed(9, head=(1, 90), slow=(9, 91))
    assert result.classifier == "head"
    assert result.ladder.rows[1].reason == (
        "1.0 ± 1.0 points above a head, which is cheaper and within one standard error of the best"
    )
