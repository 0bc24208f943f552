"""Training against plain computations, and what it leaves as it found it."""

import contextlib
import copy
import io
import itertools
import json
import math
import re
import sys
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from minllama.data import Dataset
from minllama.errors import CheckpointError, MinllamaError, OptionError, SlowDtypeWarning
from minllama.evaluation.metrics import evaluate
from minllama.evaluation.registry import curves
from minllama.evaluation.report.figures import DEV_LOSSES
from minllama.model.llama import load_pretrained
from minllama.options import TrainingOptions
from minllama.training import run
from minllama.training.losses import Loss
from minllama.training.progress import TrainingProgress
from minllama.training.run_checkpoint import read_metrics
from minllama.training.schedule import Schedule
from minllama.training.trainer import fit
from tests.tiny_classifier import LABELS, TinyClassifier, make_dataset, same, trained

CPU = torch.device("cpu")


def options(**changes):
    return TrainingOptions(
        **{"lr": 0.01, "epochs": 2, "batch_size": 8, "autocast": "off"} | changes
    )


# Targets in parts.


def test_ordinal_targets_fall_to_neighbors():
    # With a deviation of one class: exp(-1/2) beside, exp(-2) two away, over their sum.
    data = make_dataset()
    near, far = math.exp(-0.5), math.exp(-2)
    parts = {
        0: torch.tensor([1, near, far]) / (1 + near + far),
        1: torch.tensor([near, 1, near]) / (1 + 2 * near),
        2: torch.tensor([far, near, 1]) / (1 + near + far),
    }
    gold, logits = [1, 0, 2, 2, 0, 1], torch.randn(6, 3)
    texts = [data.labels.index(label) for label in gold]
    expected = [-(parts[y] * z.log_softmax(-1)).sum() for y, z in zip(gold, logits, strict=True)]
    loss = Loss(data, balanced=False, device=CPU, ordinal=1.0)
    torch.testing.assert_close(loss.summed(logits, texts), torch.stack(expected).sum())
    # A text's weight is that of its own class, so that accumulated batches stay one large one.
    weighted = Loss(data, balanced=True, device=CPU, ordinal=1.0)
    mine = weighted.weights[torch.tensor(gold)]
    torch.testing.assert_close(weighted.summed(logits, texts), (mine * torch.stack(expected)).sum())
    assert weighted.normalizer(texts) == pytest.approx(mine.sum().item())


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_prior_has_its_share_of_the_target(multi_label):
    data = make_dataset(multi_label=multi_label)
    n_classes = len(data.label_names)
    prior, logits = torch.rand(len(data), n_classes), torch.randn(4, n_classes)
    prior = prior if multi_label else prior / prior.sum(-1, keepdim=True)
    texts = [3, 1, 8, 2]
    hard = Loss(data, balanced=False, device=CPU).summed(logits, texts)
    log_p = logits.log_softmax(-1)
    if multi_label:
        log_p, log_not = F.logsigmoid(logits), F.logsigmoid(-logits)
        of_prior = -(prior[texts] * log_p + (1 - prior[texts]) * log_not).sum()
    else:
        of_prior = -(prior[texts] * log_p).sum()
    soft = Loss(data, balanced=False, device=CPU)
    soft.share_with(prior, 0.25)
    torch.testing.assert_close(soft.summed(logits, texts), 0.75 * hard + 0.25 * of_prior)


def test_ordinal_classes_need_one_label_a_text():
    with pytest.raises(MinllamaError, match="multi-label classes have no order; omit --ordinal"):
        Loss(make_dataset(multi_label=True), balanced=False, device=CPU, ordinal=1.0)


def test_self_distillation_holds_a_classifier_where_it_was():
    data = make_dataset()
    moved = {}
    for share in (0.0, 0.9):
        classifier = TinyClassifier(dropout=0.0)
        before = torch.from_numpy(classifier.predict_proba(data.texts))
        fit(classifier, data, None, options(self_distillation=share, epochs=4))
        after = torch.from_numpy(classifier.predict_proba(data.texts))
        moved[share] = (after - before).abs().mean().item()
    assert moved[0.9] < 0.5 * moved[0.0]


# What a step does.


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("class_weights", ["none", "balanced"])
@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulated_batches_equal_one_large_batch(multi_label, class_weights, accumulation):
    data = make_dataset(multi_label=multi_label)  # 22 texts: the last step has 6
    results = []
    for chosen in ({}, {"batch_size": 8 // accumulation, "gradient_accumulation": accumulation}):
        classifier = TinyClassifier(multi_label=multi_label, dropout=0.0).double()
        result = fit(classifier, data, None, options(class_weights=class_weights, **chosen))
        results.append((trained(classifier), result))
    (large, of_large), (small, of_small) = results
    assert of_large.steps == of_small.steps == 6
    for name, tensor in large.items():
        # The model's norms and softmax are float32's, whatever its weights are.
        torch.testing.assert_close(small[name], tensor, atol=1e-6, rtol=0)
    losses = [[row["loss"] for row in result.history] for result in (of_large, of_small)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_run_equals_a_plain_loop():
    # One epoch of three steps of 8, 8 and 6 texts. AdamW step by step, each number by itself.
    data, chosen = (
        make_dataset(),
        options(
            epochs=1, warmup=0.4, head_lr=0.1, weight_decay=0.5, clip=0.3, class_weights="balanced"
        ),
    )
    classifier = TinyClassifier(dropout=0.0).double()
    plain = copy.deepcopy(classifier).train()
    result = fit(
        classifier, data, None, chosen, head_parameters=list(classifier.score.parameters())
    )
    schedule = Schedule([len(text) for text in data.texts], chosen)
    weights = torch.tensor(compute_class_weight("balanced", classes=np.arange(3), y=data.labels))
    moments = {}
    for step, factor in ((1, 1 / 2), (2, 1.0), (3, 1 / 2)):  # one step of warm-up, two of decay
        texts = list(itertools.chain(*schedule.batches(step)))
        logits = plain.compute_logits([plain.encode(data.texts[i]) for i in texts])
        gold = torch.tensor([data.labels[i] for i in texts])
        loss = F.cross_entropy(logits, gold, weight=weights)
        parameters = {n: p for n, p in plain.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        assert norm > 0.3  # or clipping would not be seen
        row = result.history[step - 1]
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-6)
        assert row["lr"] == pytest.approx(0.01 * factor)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            gradient = gradient * 0.3 / (norm + 1e-6)
            m, v = moments.get(name, (0.0, 0.0))
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            moments[name] = m, v
            lr = factor * (0.1 if name.startswith("score") else 0.01)
            size = lr * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
            with torch.no_grad():
                parameter -= size * m / (v.sqrt() + 1e-6)
                if parameter.dim() > 1:
                    parameter -= lr * 0.5 * parameter
    for name, parameter in plain.named_parameters():
        found = classifier.get_parameter(name)
        torch.testing.assert_close(found, parameter, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "factors"),
    [
        (
            {"schedule": "linear"},
            [1 / 3, 2 / 3, 1, 7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4, 1 / 8],
        ),
        ({"schedule": "linear", "warmup": 0.0}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ({"schedule": "constant"}, [1 / 3, 2 / 3, *[1] * 8]),
        ({"schedule": "constant", "warmup": 1.0}, [i / 11 for i in range(1, 11)]),
        (
            {"schedule": "cosine"},  # (1 + cos(pi i / 8)) / 2
            [1 / 3, 2 / 3, 1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060],
        ),
    ],
)
def test_learning_rates_are_these_numbers(changes, factors):
    chosen = options(**{"warmup": 0.2, "epochs": 5, "batch_size": 2} | changes)
    schedule = Schedule([1, 1, 1], chosen)
    found = [schedule.lr_factor(step) for step in range(1, schedule.total_steps + 1)]
    assert found == pytest.approx(factors, abs=1e-6)


@pytest.mark.parametrize("multi_label", [False, True])
def test_balanced_losses_are_those_of_torch_with_these_weights(multi_label):
    torch.manual_seed(0)
    # Seven texts; of the four classes one is rare and one is absent.
    labels = [(0,), (0, 2), (), (1, 0), (0,), (1,), (0,)] if multi_label else [0, 0, 1, 0, 2, 1, 0]
    data = Dataset(["x"] * 7, labels, ["a", "b", "c", "d"], "x", multi_label)
    loss, logits, texts = Loss(data, balanced=True, device=CPU), torch.randn(5, 4), [6, 1, 3, 2, 4]
    found = loss.summed(logits, texts) / loss.normalizer(texts)
    if multi_label:
        weights = torch.tensor([2 / 5, 5 / 2, 6.0, 1.0])  # without / with
        gold = torch.tensor([[i in labels[t] for i in range(4)] for t in texts]).float()
        expected = F.binary_cross_entropy_with_logits(logits, gold, pos_weight=weights)
    else:
        weights = torch.tensor([7 / 12, 7 / 6, 7 / 3, 1.0])  # 7 / (3 n)
        gold = torch.tensor([labels[t] for t in texts])
        expected = F.cross_entropy(logits, gold, weight=weights)
    torch.testing.assert_close(loss.weights, weights)
    torch.testing.assert_close(found, expected)


def test_a_label_that_all_texts_have_still_counts():
    data = Dataset(["x"] * 3, [(0,), (0, 1), (0,)], ["a", "b"], "x", True)
    weights = Loss(data, balanced=True, device=CPU).weights
    assert weights.tolist() == [1.0, 2.0]


# The order of the texts.


def test_an_epoch_has_each_text_once_and_little_padding():
    torch.manual_seed(0)
    lengths = torch.randint(1, 200, (1003,)).tolist()
    schedule = Schedule(lengths, options(epochs=3, batch_size=4, gradient_accumulation=2))
    assert (schedule.steps_per_epoch, schedule.total_steps) == (126, 378)
    epochs = [
        [schedule.batches(step) for step in range(126 * epoch + 1, 126 * epoch + 127)]
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert sorted(i for step in epoch for batch in step for i in batch) == list(range(1003))
        assert all(len(batch) == 4 for step in epoch for batch in step[:-1])
        padded = sum(
            max(lengths[i] for i in batch) * len(batch) for step in epoch for batch in step
        )
        assert padded < 1.05 * sum(lengths)  # in random batches of 4 it would be 1.6
        # Long and short batches are mixed: no half of the epoch has much longer texts.
        half = [i for step in epoch[:63] for batch in step for i in batch]
        assert 0.8 < np.mean([lengths[i] for i in half]) / np.mean(lengths) < 1.2
    companions = [
        {frozenset((i, j)) for step in epoch for b in step for i in b for j in b if i != j}
        for epoch in epochs
    ]
    assert len(companions[0] & companions[1]) < 0.2 * len(companions[0])


def test_a_small_set_does_not_always_meet_in_the_same_batches():
    lengths = list(range(1, 65))  # no two alike: only the windows make a difference
    schedule = Schedule(lengths, options(batch_size=4))
    first, second = (
        {frozenset(schedule.batches(step)[0]) for step in range(start, start + 16)}
        for start in (1, 17)
    )
    assert len(first & second) < 8
    longest = [lengths[schedule.batches(step)[0][0]] for step in range(1, 17)]
    # Nor are the steps of a window (four here) in the order of their lengths.
    assert any(longest[i] < longest[i + 1] for i in range(15) if i % 4 != 3)


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([10] * 16, [8, 8]),  # 160 tokens of 100 at most: not ten texts and six
        ([10] * 10, [10]),
        ([90, 20, 20, 10], [1, 3]),
        ([200, 150, 20, 20, 10], [1, 1, 3]),  # a text is never cut
        ([50, 50, 50, 50, 50], [2, 2, 1]),
    ],
)
def test_a_batch_of_many_tokens_is_computed_in_parts_of_alike_sizes(lengths, sizes):
    schedule = Schedule(lengths, options(batch_size=16), max_tokens=100)
    parts = schedule.batches(1)
    assert [len(part) for part in parts] == sizes
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert [i for part in parts for i in part] == schedule.texts(1)


def test_parts_of_a_batch_give_its_gradients(monkeypatch):
    """Loss and weights are the batch's, in however many passes it is computed."""
    results = []
    for most in (1_000_000, 20):
        for limits in ("MAX_TOKENS", "MAX_TOKENS_IF_MUCH_IS_TRAINED"):
            monkeypatch.setattr(run, limits, {"cpu": most})
        classifier, passes = TinyClassifier(dropout=0.0).double(), []
        plain = classifier.compute_logits
        classifier.compute_logits = lambda prompts, f=plain, p=passes: (
            p.append(prompts) or f(prompts)
        )
        result = fit(classifier, make_dataset(), None, options())
        results.append((len(passes), [row["loss"] for row in result.history], trained(classifier)))
    (few, losses, weights), (many, in_parts, of_parts) = results
    assert (few, many > 20) == (6, True)
    assert in_parts == pytest.approx(losses, rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(of_parts[name], tensor, atol=1e-6, rtol=0)


def test_passes_are_small_where_gradients_are():
    classifier = TinyClassifier()
    assert run._max_tokens(classifier, CPU) == 2048  # a half of it
    classifier.llama.requires_grad_(False)
    assert run._max_tokens(classifier, CPU) == 768
    classifier.llama.requires_grad_(True)
    assert run._max_tokens(classifier, torch.device("cuda")) == math.inf
    # Quantized weights are no parameters.
    classifier.requires_grad_(False)
    classifier.score.requires_grad_(True)
    classifier.llama = nn.Module()
    classifier.llama.register_buffer("quants", torch.zeros(10_000, dtype=torch.uint8))
    assert run._max_tokens(classifier, CPU) == 768


def test_any_step_can_be_asked_for_first():
    lengths = [len(text) for text in make_dataset(50).texts]
    in_order, alone = Schedule(lengths, options()), []
    for step in range(1, 15):
        alone.append(Schedule(lengths, options()).batches(step))
    assert [in_order.batches(step) for step in range(1, 15)] == alone
    other = Schedule(lengths, options(seed=1))
    assert [other.batches(step) for step in range(1, 15)] != alone


@pytest.mark.parametrize(
    ("evals", "places"), [(1, {10}), (2, {5, 10}), (3, {4, 7, 10}), (99, set(range(1, 11)))]
)
def test_evaluations_are_spread_over_the_epoch(evals, places):
    schedule = Schedule([1] * 10, options(batch_size=1, evals_per_epoch=evals))
    assert {step for step in range(1, 11) if schedule.evaluates_after(step)} == places
    assert {step for step in range(11, 21) if schedule.evaluates_after(step)} == {
        place + 10 for place in places
    }


# Seeds, and what is left as it was.


def test_the_same_run_twice_gives_the_same_weights_and_no_one_elses_random_numbers():
    runs = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        classifier = TinyClassifier()
        torch.manual_seed(noise)
        fit(classifier, make_dataset(), make_dataset(9, 1), options(seed=seed))
        after = torch.rand(3)
        torch.manual_seed(noise)
        assert torch.equal(after, torch.rand(3))
        runs.append(trained(classifier))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_dropout_is_another_in_each_step():
    drawn = []

    class Drawing(TinyClassifier):
        def compute_logits(self, prompts):
            drawn.append(torch.rand(1).item())
            return super().compute_logits(prompts)

    fit(Drawing(), make_dataset(), None, options(batch_size=4, gradient_accumulation=2))
    assert len(set(drawn)) == len(drawn) == 12


def test_only_what_wants_gradients_changes():
    classifier = TinyClassifier()
    before = copy.deepcopy(classifier.state_dict())
    fit(classifier, make_dataset(), None, options())
    after = classifier.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(trained(classifier))
    assert {"score.weight", "llama.norm.weight"} < changed
    assert "llama.tok_embeddings.weight" not in changed
    assert all(parameter.grad is None for parameter in classifier.parameters())


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("asked", [False, True])
def test_modes_and_gradient_checkpointing_are_put_back(error, asked):
    seen = set()

    class Watched(TinyClassifier):
        def compute_logits(self, prompts):
            if torch.is_grad_enabled():
                modes = (self.llama.training, self.score.training)
                seen.add((*modes, self.llama.gradient_checkpointing))
                if error is not None and len(seen) == 1:
                    raise error
            return super().compute_logits(prompts)

    classifier = Watched()
    classifier.score.train()
    classifier.llama.layers[1].train()
    modes = [module.training for module in classifier.modules()]
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        fit(classifier, make_dataset(), make_dataset(9, 1), options(gradient_checkpointing=asked))
    assert [module.training for module in classifier.modules()] == modes
    assert not classifier.llama.gradient_checkpointing
    assert seen == {(True, True, asked)}


def test_gradient_checkpointing_changes_no_weight():
    plain, checkpointed = TinyClassifier(), TinyClassifier()
    fit(plain, make_dataset(), None, options())
    fit(checkpointed, make_dataset(), None, options(gradient_checkpointing=True))
    assert same(trained(plain), trained(checkpointed))


# Evaluations.


class Scripted(TinyClassifier):
    """Its n-th prediction is right for as many of the ten dev texts as the script says."""

    def __init__(self, script):
        super().__init__()
        self.script, self.seen = list(script), []

    def predict_proba(self, texts):
        self.seen.append(trained(self))
        right = self.script[len(self.seen) - 1]
        sure = np.float32(0.9 if len(self.seen) % 2 else 0.8)  # surer where the count is odd
        rest = (1 - sure) / 2
        rows = [[sure, rest, rest] if i < right else [rest, sure, rest] for i in range(len(texts))]
        return np.array(rows, dtype=np.float32)


TEN = Dataset([f"t{i}" for i in range(10)], [0] * 10, list(LABELS), "ten")


@pytest.mark.parametrize(
    ("metric", "script", "best"),
    [
        ("accuracy", [3, 6, 6, 5], 2),  # the first of equals
        ("accuracy", [3, 6, 6, 7], 4),
        ("log_loss", [9, 9, 8, 8], 1),
        ("log_loss", [5, 6, 7, 8], 4),
        ("macro_f1", [9, 10, 1, 1], 2),
    ],
)
def test_the_best_weights_are_kept(metric, script, best):
    classifier = Scripted(script)
    result = fit(classifier, make_dataset(), TEN, options(epochs=4, metric=metric))
    assert result.best_step == 3 * best
    assert same(trained(classifier), classifier.seen[best - 1])
    row = result.history[3 * best - 1]
    assert result.best_metric == row["dev_loss" if metric == "log_loss" else f"dev_{metric}"]
    assert not result.stopped_early


def test_patience_counts_evaluations_without_gain():
    classifier = Scripted([3, 5, 4, 6, 6, 5, 9])
    result = fit(classifier, make_dataset(), TEN, options(epochs=7, patience=2))
    assert (result.stopped_early, result.steps, result.best_step) == (True, 18, 12)
    assert same(trained(classifier), classifier.seen[3])


@pytest.mark.parametrize("multi_label", [False, True])
def test_rows_say_what_an_evaluation_says(multi_label, tmp_path):
    data, dev = make_dataset(multi_label=multi_label), make_dataset(12, 1, multi_label=multi_label)
    classifier = TinyClassifier(multi_label=multi_label)
    result = fit(classifier, data, dev, options(epochs=4, lr=0.02), folder=tmp_path / "run")
    assert [row["step"] for row in result.history] == list(range(1, 13))
    assert [row["epoch"] for row in result.history[:3]] == [0.3333, 0.6667, 1.0]
    evaluated = [row for row in result.history if "dev_loss" in row]
    assert [row["step"] for row in evaluated] == [3, 6, 9, 12]
    now = evaluate(classifier.predict_proba(dev.texts), dev.labels, LABELS, multi_label=multi_label)
    row = result.history[result.best_step - 1]
    names = {"loss": "log_loss", "accuracy": "accuracy", "macro_f1": "macro_f1"}
    names |= {"micro_f1": "micro_f1"} if multi_label else {}
    found = {key.removeprefix("dev_"): row[key] for key in row if key.startswith("dev_")}
    assert found == {short: getattr(now, name) for short, name in names.items()}
    assert {key for key in row if key.startswith("dev_")} <= {*DEV_LOSSES, *curves()}
    assert read_metrics(tmp_path / "run") == list(result.history)
    losses = [row["loss"] for row in result.history]
    assert losses[-1] < losses[0]
    assert result.history[-1]["seconds"] <= result.seconds
    assert result.examples_per_second > 0
    assert result.tokens_per_second > result.examples_per_second


def test_without_a_dev_split_the_last_weights_stay():
    classifier = TinyClassifier()
    result = fit(classifier, make_dataset(), None, options())
    assert (result.best_step, result.best_metric) == (None, None)
    assert not any(key.startswith("dev_") for row in result.history for key in row)
    assert result.seconds > 0


# Precision.


@pytest.mark.parametrize(
    ("asked", "fast", "dtype", "used"),
    [
        ("on", False, torch.float32, True),
        ("off", True, torch.float32, False),
        ("auto", True, torch.float32, True),
        ("auto", False, torch.float32, False),
        ("auto", True, torch.float64, False),
    ],
)
def test_autocast_is_used_for_steps_where_it_pays(as_cpu, asked, fast, dtype, used):
    as_cpu(*(["bf16"] if fast else []))
    seen = {"step": set(), "evaluation": set()}

    class Watched(TinyClassifier):
        def compute_logits(self, prompts):
            logits = super().compute_logits(prompts)
            seen["step" if torch.is_grad_enabled() else "evaluation"].add(logits.dtype)
            return logits

    classifier = Watched().to(dtype)
    result = fit(classifier, make_dataset(), make_dataset(9, 1), options(autocast=asked))
    assert seen == {"step": {torch.bfloat16 if used else dtype}, "evaluation": {dtype}}
    assert classifier.score.weight.dtype == dtype
    assert math.isfinite(result.history[-1]["loss"])


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float32", None])
def test_a_slow_half_precision_is_said_to_be_slow_in_python_too(base, as_cpu, dtype):
    as_cpu(level="portable")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_pretrained(base, dtype=dtype, device="cpu")
    said = [str(warning.message) for warning in caught]
    if dtype in ("bfloat16", torch.bfloat16):
        assert [warning.category for warning in caught] == [SlowDtypeWarning]
        assert said[0].startswith("this CPU only emulates bfloat16")
        assert caught[0].filename == __file__
    else:
        assert not said


# What cannot work.


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_no_number_stops_before_the_weights_change(where, tmp_path):
    class Diverging(TinyClassifier):
        steps = 0

        def compute_logits(self, prompts):
            logits = super().compute_logits(prompts)
            self.steps += 1
            if self.steps == 5:
                self.before = trained(self)
                if where == "loss":
                    return logits * math.inf
                logits.register_hook(lambda gradient: gradient * math.nan)
            return logits

    classifier, run = Diverging(), tmp_path / "run"
    with pytest.raises(MinllamaError) as caught:
        fit(classifier, make_dataset(), None, options(save_every=2), folder=run)
    what = "the loss" if where == "loss" else "a gradient"
    assert str(caught.value) == (
        f"training has diverged: {what} is not a finite number at step 5 of 6; use a learning "
        f"rate (--lr) below 0.01, or float32 without autocast; {run / 'checkpoint'} has the "
        "state before it"
    )
    assert same(trained(classifier), classifier.before)
    resumed = TinyClassifier()
    result = fit(resumed, make_dataset(), None, options(save_every=2), folder=run, resume=True)
    assert (result.resumed_from, result.steps) == (4, 6)


def frozen():
    return TinyClassifier().requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "changes", "arguments", "message"),
    [
        (TinyClassifier, {"lr": None}, {}, "lr is not set; try 3e-4 for LoRA"),
        (TinyClassifier, {"patience": 1}, {"dev": None}, "patience needs a"),
        (TinyClassifier, {}, {"resume": True}, "resume needs a run"),
        (TinyClassifier, {"tensorboard": True}, {}, "tensorboard needs a run"),
        (frozen, {}, {}, "nothing to train"),
        (lambda: TinyClassifier(("a", "b")), {}, {}, r"texts 0: its labels \(bad, good, so-so\)"),
        (
            lambda: TinyClassifier(multi_label=True),
            {},
            {},
            "texts 0: the classifier may have several labels each, the texts one",
        ),
        (
            TinyClassifier,
            {},
            {"dev": make_dataset(3, multi_label=True)},
            "texts 0: the texts may have several labels each, the classifier one",
        ),
        (TinyClassifier, {}, {"dev": Dataset(["a"], None, list(LABELS), "d")}, "d: the dev texts"),
    ],
)
def test_what_cannot_work_is_refused(make, changes, arguments, message):
    dev = arguments.pop("dev", TEN) if "dev" in arguments else TEN
    with pytest.raises(MinllamaError, match=message):
        fit(make(), make_dataset(), dev, options(**changes), **arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("lr", 0.0), ("schedule", "step"), ("warmup", 1.5), ("autocast", "bf16")],
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(OptionError, match=f"^{name} must be "):
        TrainingOptions(**{name: value})


# What people see.


def test_tensorboard_gets_every_number_or_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    chosen, data = options(tensorboard=True), make_dataset()
    with pytest.raises(MinllamaError, match=r"python -m pip install 'minllama\[tensorboard\]'$"):
        fit(TinyClassifier(), data, TEN, chosen, folder=tmp_path / "run")
    written = {}

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert (folder, purge_step) == (str(tmp_path / "run" / "tensorboard"), 1)

        def add_scalar(self, name, value, step):
            written.setdefault(step, {"step": step})[name] = value

        def close(self):
            written["closed"] = True

    stub = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    result = fit(TinyClassifier(), data, TEN, chosen, folder=tmp_path / "run")
    assert written.pop("closed")
    assert list(written.values()) == list(result.history)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_without_a_terminal_progress_is_a_line_now_and_then():
    stream, clock = io.StringIO(), Clock()
    progress = TrainingProgress(stream, every_seconds=10, clock=clock)
    progress.begin(10, 100)
    for step in range(11, 17):
        clock.now += 4
        row = {"step": step, "loss": step / 10, "examples_per_second": 12.34}
        if step == 14:
            row |= {"dev_loss": 0.5, "dev_accuracy": 0.75, "dev_macro_f1": 0.7}
        progress.advance(row)
    progress.end()
    assert stream.getvalue().splitlines() == [
        "step 13/100  loss 1.200  12.3 texts/s  5:48 left",
        "step 14/100  dev: loss 0.500  accuracy 0.750  macro F1 0.700",
        "step 16/100  loss 1.350  12.3 texts/s  5:36 left",
    ]


def test_a_run_that_was_cut_in_an_evaluation_goes_on_with_its_step():
    stream, clock = io.StringIO(), Clock()
    progress = TrainingProgress(stream, every_seconds=10, clock=clock)
    progress.begin(5, 9)
    clock.now += 60
    progress.advance({"step": 5, "loss": 1.0, "examples_per_second": 2.0})
    assert stream.getvalue() == "step 5/9  loss 1.000  2 texts/s\n"


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    fit(TinyClassifier(), make_dataset(), TEN, options(), progress=TrainingProgress(stream))
    assert "step 6/6  dev: loss" in stream.getvalue()
    plain = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", stream.getvalue())
    assert re.search(r"6/6 loss \d\.\d{3}  [\d.e+]+ texts/s 0:00:00", plain)


def test_metrics_are_lines_of_json(tmp_path):
    fit(TinyClassifier(), make_dataset(), None, options(), folder=tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(CheckpointError, match="only 6 of the checkpoint's 7 steps"):
        read_metrics(tmp_path, 7)
