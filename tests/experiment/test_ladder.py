"""The rules of the ladder: time, comparisons, the choice, what is kept and what is skipped."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from minllama.errors import CheckpointError
from minllama.evaluation.report.ladder import Ladder, LadderRow, file_size
from minllama.experiment.ladder.budget import REPORT_SECONDS, SAFETY, Budget
from minllama.experiment.ladder.choice import Gain, choose, choose_for_few
from minllama.experiment.ladder.epochs import TrainingTimes, most_epochs
from minllama.experiment.ladder.rung import seconds_each
from minllama.experiment.ladder.scoring import ClassScoring
from minllama.experiment.ladder.state import LadderState, RungFolder


class Clock:
    """Shows the time that it is set to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_budget_counts_down_and_keeps_time_for_the_report() -> None:
    clock = Clock()
    budget = Budget(2, clock=clock)
    assert (budget.spent, budget.left) == (0, 120 - REPORT_SECONDS)
    clock.now += 50
    assert (budget.spent, budget.left) == (50, 70 - REPORT_SECONDS)
    assert budget.allows((70 - REPORT_SECONDS) / SAFETY)
    assert not budget.allows(70 / SAFETY)
    budget.add(40)  # of an earlier process
    assert (budget.spent, budget.left) == (90, 30 - REPORT_SECONDS)
    budget.reserve += 24
    assert budget.left == 0
    assert budget.left_in_words == "no time was left"
    assert not budget.allows(1)
    # 90 s are over and 30 are reserved: 100 s more are 240 s with their margin, four minutes.
    assert budget.minutes_for(100) == 4
    assert budget.minutes_for(101) == 5


def test_a_rate_is_measured_for_some_seconds_and_interruptions_do_not_count() -> None:
    clock, done, busy = Clock(), [], {0: 3.0}

    def work(start: int, end: int) -> int:
        done.append((start, end))
        clock.now += busy.get(start, 1.0) * (end - start) / 64
        return 10 * (end - start)

    assert seconds_each(work, 640, clock) == pytest.approx(1 / 640)
    assert done == [(0, 32), (32, 96)]  # 1.5 s and 1 s
    done.clear()
    busy[0] = 100.0  # stopped meanwhile
    assert seconds_each(work, 640, clock) == pytest.approx(1 / 640)
    assert done == [(0, 32), (32, 64)]
    done.clear()
    busy[0] = 3.0
    assert seconds_each(work, 5, clock) == pytest.approx(3 / 640)
    assert done == [(0, 5)]


def times_of(n_train: int, epoch: float = 10.0) -> TrainingTimes:
    return TrainingTimes(epoch, n_train, 5.0, 1.0, 200, [n_train // 5] * 5)


def budget_of(seconds: float) -> Budget:
    return Budget((SAFETY * seconds + REPORT_SECONDS) / 60, clock=lambda: 0.0)


def plan_in(seconds: float, most: int, *, epoch: float = 10.0) -> tuple[int, int] | None:
    """Epochs and folds in so many seconds: 2,000 rows in five folds and 200 of dev."""
    plan = times_of(2000, epoch).plan(budget_of(seconds), most)
    if plan is None:
        return None
    assert plan.rows == 2000
    return plan.epochs, plan.folds


def test_more_epochs_come_before_folds_up_to_three_of_them() -> None:
    assert plan_in(9, 3) is None
    assert plan_in(11, 3) == (1, 0)
    assert plan_in(32, 3) == (3, 0)
    # A fold takes 4/5 of a training, and to predict a fifth of the rows: 25 seconds beside 31.
    assert plan_in(57, 3) == (3, 1)
    assert plan_in(9999, 3) == (3, 2), "two folds and dev are 1,000 rows, which is enough"


def test_many_classes_get_more_epochs_only_beside_enough_rows_to_be_measured_on() -> None:
    assert plan_in(9999, 8) == (8, 2)
    # Eight epochs and two folds take 81 + 2 * 65 seconds, seven 71 + 2 * 57.
    assert plan_in(212, 8) == (8, 2)
    assert plan_in(210, 8) == (7, 2)
    assert plan_in(82, 8) == (3, 2)
    assert plan_in(32, 8) == (3, 0)


def test_of_a_large_file_as_many_rows_are_trained_on_as_one_epoch_allows() -> None:
    times = times_of(100_000, epoch=500.0)  # 200 rows a second, and one to read dev
    assert times.plan(budget_of(502), 3) == (1, 0, 100_000)
    assert times.plan(budget_of(101.0001), 3) == (1, 0, 20_000)
    assert times.least == pytest.approx(11)
    assert times.plan(budget_of(11.0001), 3) == (1, 0, 2000)
    assert times.plan(budget_of(10.9), 3) is None, "frozen heads are as good then"
    assert times_of(1500).least == pytest.approx(11), "all of a small file"


def test_epochs_follow_the_number_of_classes_unless_they_are_given() -> None:
    assert [most_epochs(None, n) for n in (2, 19, 20, 150)] == [3, 3, 8, 8]
    assert most_epochs(2, 150) == 2


# By how much the first of two is better, in thousandths, and the standard error of it.
GAINS = {("b", "a"): (30, 12), ("c", "a"): (38, 12), ("c", "b"): (8, 9), ("d", "c"): (-20, 9)}


def compared(one: str, other: str) -> Gain:
    gains = {**{(x, "d"): (20, 9) for x in "bc"}, ("d", "a"): (18, 12), **GAINS}
    if (one, other) in gains:
        value, error = gains[one, other]
        return Gain(value / 1000, error / 1000, 500)
    value, error = gains[other, one]
    return Gain(-value / 1000, error / 1000, 500)


def test_the_cheapest_within_one_standard_error_of_the_best_is_chosen() -> None:
    choice = choose("abcd", compared)
    assert (choice.best, choice.chosen) == ("c", "b")
    assert choice.reasons == {
        "a": "3.0 ± 1.2 points below b",
        "b": "the cheapest within one standard error of the best (c, 0.8 ± 0.9 points better)",
        "c": "0.8 ± 0.9 points above b, which is cheaper and within one standard error of the best",
        "d": "2.0 ± 0.9 points below b",
    }
    assert choose("acd", compared).chosen == "c"
    assert choose("c", compared).reasons == {"c": "the only one left"}


# By how much the first's log-loss is lower, in thousandths of a nat, and the standard error of it.
LOSSES = {("b", "a"): (1, 2), ("c", "a"): (9, 3), ("c", "b"): (7, 3), ("d", "c"): (30, 2)}


def compared_losses(one: str, other: str) -> Gain:
    sign, pair = (1, (one, other)) if (one, other) in LOSSES else (-1, (other, one))
    value, error = LOSSES[pair]
    return Gain(sign * value / 1000, error / 1000, 500)


def test_where_the_metric_cannot_tell_a_clearly_lower_loss_decides() -> None:
    choice = choose("abcd", compared, losses=compared_losses)
    assert choice.chosen == "c", "d has the lowest loss, but is worse by the metric"
    assert choice.reasons == {
        "a": "3.8 ± 1.2 points below c",
        "b": "0.8 ± 0.9 points below c",
        "c": "the best of those that could be measured, and its log-loss is clearly below that of "
        "cheaper ones",
        "d": "2.0 ± 0.9 points below c",
    }


def test_a_loss_within_two_standard_errors_leaves_the_cheaper_one() -> None:
    def nearly(one: str, other: str) -> Gain:
        value, error, rows = compared_losses(one, other)
        return Gain(value, error * 7 / 6, rows)  # c is 7 below b, and two errors are 7

    assert choose("abcd", compared, losses=nearly).chosen == "b"


def test_the_best_by_the_metric_gives_way_to_clearly_better_probabilities() -> None:
    gains = {("b", "c"): Gain(0.008, 0.009, 500), ("c", "b"): Gain(-0.008, 0.009, 500)}
    choice = choose("bc", lambda one, other: gains[one, other], losses=compared_losses)
    assert (choice.best, choice.chosen) == ("b", "c")
    assert choice.reasons["c"] == (
        "within one standard error of the best (b, 0.8 ± 0.9 points better), and its log-loss is "
        "clearly below that of cheaper ones"
    )


def test_of_few_rows_the_combination_is_chosen_unless_another_is_clearly_better() -> None:
    choice = choose_for_few("abcd", compared, "b")
    assert (choice.best, choice.chosen) == ("c", "b")
    assert choice.reasons["a"] == "3.0 ± 1.2 points below b"
    assert choice.reasons["b"].startswith("the others are combined in it")
    assert choice.reasons["c"] == "0.8 ± 0.9 points above b"
    assert choose_for_few("abcd", compared, "c").chosen == "c"
    choice = choose_for_few("abcd", compared, "d")
    assert choice.chosen == "c"
    assert choice.reasons["c"] == "better than the rest by more than one standard error"


def test_with_speed_the_fastest_within_a_point_of_the_best_is_chosen() -> None:
    speeds = {"a": 900.0, "b": 50.0, "c": 80.0, "d": 300.0}
    choice = choose("abcd", compared, speeds=speeds)
    assert (choice.best, choice.chosen) == ("c", "c")
    choice = choose("abcd", compared, speeds={**speeds, "b": 100.0})
    assert choice.chosen == "b"
    assert choice.reasons["b"] == (
        "the fastest within a point of the best (c, 0.8 ± 0.9 points better)"
    )
    assert choice.reasons["c"] == "0.8 ± 0.9 points above b, but slower"


def scores(*right: int | None) -> np.ndarray:
    """Of two classes: the second is predicted, where 1 stands; None where it is not measured."""
    rows = [[np.nan, np.nan] if r is None else [1 - r, r] for r in right]
    return np.array(rows, dtype=np.float32)


def test_two_are_compared_on_the_rows_where_both_were_measured() -> None:
    scoring = ClassScoring([1, 1, 1, 1, 1, 1], ["no", "yes"], "accuracy", multi_label=False)
    one, other = scores(1, 1, 1, 0, None, None), scores(1, 0, 0, 1, 0, 0)
    assert scoring.result(one).value == 0.75
    assert scoring.result(one).rows == 4
    assert scoring.result(other).value == pytest.approx(1 / 3)
    gain = scoring.gain(one, other)
    differences = np.array([0, 1, 1, -1])
    assert gain.value == 0.25
    assert gain.rows == 4
    assert gain.error == pytest.approx(differences.std(ddof=1) / 2)
    assert scoring.gain(other, one).value == -0.25
    apart = scores(None, None, None, None, 1, 1)
    assert scoring.gain(one, apart).error == np.inf


def test_losses_are_compared_after_calibration() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 2000).tolist()
    sure = random.normal(size=(2000, 2)).astype(np.float32)
    sure[np.arange(2000), labels] += 1
    scoring = ClassScoring(labels, ["no", "yes"], "accuracy", multi_label=False)
    assert scoring.gain(sure, 20 * sure).value == 0
    assert scoring.loss_gain(sure, 20 * sure).value == pytest.approx(0, abs=1e-3)
    noisy = sure + random.normal(size=(2000, 2)).astype(np.float32)
    gain = scoring.loss_gain(sure, noisy)
    assert gain.value > 3 * gain.error > 0
    assert scoring.loss_gain(scores(*[None] * 2000), sure).rows == 0


@pytest.mark.parametrize("metric", ["macro_f1", "log_loss"])
def test_other_metrics_compare_in_their_own_direction(metric: str) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 300).tolist()
    good = random.normal(size=(300, 3)).astype(np.float32)
    good[np.arange(300), labels] += 3
    bad = random.normal(size=(300, 3)).astype(np.float32)
    bad[np.arange(300), labels] += 0.5
    scoring = ClassScoring(labels, ["a", "b", "c"], metric, multi_label=False)
    gain = scoring.gain(good, bad)
    assert gain.value > 3 * gain.error > 0
    assert scoring.gain(bad, good).value == pytest.approx(-gain.value)
    low, high = scoring.result(good).interval or (0, 0)
    assert low < scoring.result(good).value < high


def test_the_state_of_a_run_is_read_again_and_another_s_is_refused(tmp_path: Path) -> None:
    state = LadderState(tmp_path, {"seed": 1}, resume=False)
    state.rungs["tfidf"] = {"seconds": 2.0}
    state.starting = {"choice": [3, "mean"], "penalty": 0.1}
    state.save(12.5)
    again = LadderState(tmp_path, {"seed": 1}, resume=True)
    assert (again.rungs, again.starting, again.spent) == (state.rungs, state.starting, 12.5)
    assert LadderState(tmp_path, {"seed": 1}, resume=False).rungs == {}
    with pytest.raises(CheckpointError, match="cannot resume: seed"):
        LadderState(tmp_path, {"seed": 2}, resume=True)
    for content in (
        "{",
        "[]",
        '{"settings": {"seed": 1}}',
        '{"settings": {"seed": 1}, "rungs": 3}',
    ):
        (tmp_path / "state.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"state\.json: damaged .*--force"):
            LadderState(tmp_path, {"seed": 1}, resume=True)


def test_scores_of_a_rung_are_kept(tmp_path: Path) -> None:
    folder, empty = RungFolder(tmp_path / "lora"), np.full((3, 2), np.nan, dtype=np.float32)
    assert folder.plan() is None
    assert folder.scores(empty) is empty
    folder.save_scores(np.ones((3, 2), dtype=np.float32))
    folder.save_plan({"epochs": 2})
    assert RungFolder(tmp_path / "lora").scores(empty).tolist() == [[1, 1]] * 3
    assert folder.plan() == {"epochs": 2}
    with pytest.raises(CheckpointError, match="an array of shape"):
        folder.scores(np.zeros((4, 2), dtype=np.float32))
    (tmp_path / "lora" / "scores.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(CheckpointError, match="damaged"):
        folder.scores(empty)


ROW = LadderRow(
    name="frozen head", reason="the best", value=0.71875, interval=(0.5, 0.9), rows=1234,
    how="5-fold cross-validation", seconds=75.2, texts_per_second=1234.5, size=12_400, chosen=True,
)  # fmt: skip


def test_the_ladder_in_words_and_in_json() -> None:
    skipped = LadderRow("LoRA with a head", "skipped: no time")
    ladder = Ladder((ROW, skipped), "accuracy", 5.0, "accuracy")
    assert ladder.cells(ROW) == (
        *("71.9%", "50.0% to 90.0%", "1,234", "1 min 15 s", "1,200", "12 KB"),
    )
    assert ladder.cells(skipped) == ("–", "", "–", "–", "–", "–")
    assert dataclasses.replace(ladder, metric="macro_f1").cells(ROW)[:2] == (
        *("0.719", "0.500 to 0.900"),
    )
    content = json.loads(json.dumps(ladder.to_dict()))
    assert {name: content[name] for name in ("metric", "minutes", "prefer")} == {
        "metric": "accuracy", "minutes": 5.0, "prefer": "accuracy",
    }  # fmt: skip
    assert content["rungs"][0] == {
        "name": "frozen head", "chosen": True, "reason": "the best", "value": 0.71875,
        "interval": [0.5, 0.9], "rows": 1234, "how": "5-fold cross-validation", "seconds": 75.2,
        "texts_per_second": 1234.5, "bytes": 12400,
    }  # fmt: skip
    assert content["rungs"][1]["value"] is None
    assert [file_size(n) for n in (10, 12_345, 2_340_000)] == ["1 KB", "12 KB", "2.3 MB"]
