"""Runs that are cut, killed, damaged or changed: they go on exactly, or are refused in a line."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minllama import atomic
from minllama.data import rows
from minllama.errors import CheckpointError, MinllamaError
from minllama.options import TrainingOptions
from minllama.training.optimizer import AdamW
from minllama.training.run_checkpoint import (
    CheckpointFolder,
    RunState,
    RunTensors,
    differences,
    read_metrics,
    remove_checkpoint,
    saved_step,
    sealed,
)
from minllama.training.trainer import fit
from tests.tiny_classifier import TinyClassifier, make_dataset, same, trained

ROOT = Path(__file__).resolve().parents[2]
TRAIN, DEV = make_dataset(), make_dataset(9, 1)
STEPS = 9  # 3 epochs of 22 texts, 8 a step; evaluations after steps 2, 3, 5, 6, 8, 9
TIMES = ("seconds", "examples_per_second", "tokens_per_second")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Bits are compared with those of child processes, which have one thread after a fork."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def options(**changes):
    chosen = {"lr": 0.02, "epochs": 3, "batch_size": 4, "gradient_accumulation": 2}
    chosen |= {"evals_per_epoch": 2, "autocast": "off", "save_every": 4, "metric": "log_loss"}
    return TrainingOptions(**chosen | changes)


def run(folder, classifier=None, *, resume=False, **arguments):
    changes = arguments.pop("options", {})
    classifier = classifier or TinyClassifier()
    result = fit(
        classifier,
        arguments.pop("train", TRAIN),
        arguments.pop("dev", DEV),
        options(**changes),
        folder=folder,
        resume=resume,
        head_parameters=list(classifier.score.parameters()),
        **arguments,
    )
    return classifier, result


def without_times(rows):
    return [{key: row[key] for key in row if key not in TIMES} for row in rows]


def outcome(folder):
    """All that a run leaves, but for times."""
    checkpoint = folder / "checkpoint"
    state = json.loads((checkpoint / "state.json").read_text())
    for name in ("seconds", "step_seconds"):
        del state["state"][name]
    assert len(state.pop("sha256")) == 64  # of these, too
    for file in state["files"].values():
        assert file["bytes"] > 0
    tensors = {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}
    return state, tensors, without_times(read_metrics(folder))


@pytest.fixture(scope="module")
def uncut(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("uncut")
    classifier, result = run(folder)
    assert result.steps == STEPS
    assert result.best_step not in (None, STEPS)  # or restoring the best would not be seen
    return outcome(folder), trained(classifier)


def with_other_weights():
    classifier = TinyClassifier()
    with torch.no_grad():
        for parameter in classifier.parameters():
            if parameter.requires_grad:
                parameter.fill_(7.0)
    return classifier


def check_resumes(folder, uncut, resumed_from):
    """Go on with a classifier whose trained weights are others, and compare with the uncut run."""
    classifier = with_other_weights() if resumed_from else TinyClassifier()
    torch.manual_seed(99)
    classifier, result = run(folder, classifier, resume=True)
    assert result.resumed_from == resumed_from
    assert same(trained(classifier), uncut[1])
    assert outcome(folder) == uncut[0]
    assert without_times(result.history) == uncut[0][2]
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint", "metrics.jsonl"]


# Runs that are cut.


class Cut(TinyClassifier):
    """Raises an error when it is asked for something the n-th time."""

    def __init__(self, what, n, error=KeyboardInterrupt):
        super().__init__()
        self.what, self.left, self.error = what, n, error

    def count(self, what):
        self.left -= what == self.what
        if what == self.what and self.left == 0:
            raise self.error

    def compute_logits(self, prompts):
        if torch.is_grad_enabled():
            self.count("batch")
        return super().compute_logits(prompts)

    def predict_proba(self, texts):
        self.count("evaluation")
        return super().predict_proba(texts)


class CutProgress:
    def __init__(self, step, error=KeyboardInterrupt):
        self.step, self.error, self.ended = step, error, False

    def begin(self, step, total_steps):
        assert (step, total_steps) == (0, STEPS)

    def advance(self, row):
        if row["step"] == self.step:
            raise self.error

    def end(self):
        self.ended = True


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_cut_after_any_step_goes_on_exactly(step, tmp_path, uncut):
    progress = CutProgress(step)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=progress)
    assert progress.ended
    assert saved_step(tmp_path) == step
    check_resumes(tmp_path, uncut, step)


@pytest.mark.parametrize("step", [1, 5])
def test_a_run_on_rows_in_files_is_that_on_rows_in_memory(step, tmp_path, uncut, monkeypatch):
    monkeypatch.setattr(rows, "HELD", 16)
    train = dataclasses.replace(TRAIN, texts=list(TRAIN.texts), labels=list(TRAIN.labels))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, train=train, progress=CutProgress(step))
    classifier, result = run(tmp_path, with_other_weights(), train=train, resume=True)
    assert result.resumed_from == step
    assert same(trained(classifier), uncut[1])
    assert outcome(tmp_path) == uncut[0]


@pytest.mark.parametrize("batch", [1, 2, 3, 6, 12, 18])
def test_a_run_cut_in_the_midst_of_a_step_goes_on_exactly(batch, tmp_path, uncut):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Cut("batch", batch))
    check_resumes(tmp_path, uncut, (batch - 1) // 2)


@pytest.mark.parametrize(("evaluation", "step"), [(1, 2), (2, 3), (5, 8), (6, 9)])
def test_a_run_cut_in_an_evaluation_goes_on_with_it(evaluation, step, tmp_path, uncut):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Cut("evaluation", evaluation))
    assert len(read_metrics(tmp_path)) == step - 1
    check_resumes(tmp_path, uncut, step)


def test_a_run_may_be_cut_again_and_again(tmp_path, uncut):
    for batch in (5, 1, 4, 2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, Cut("batch", batch), resume=True)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Cut("evaluation", 1), resume=True)
    check_resumes(tmp_path, uncut, 5)


@pytest.mark.parametrize(("step", "saved"), [(1, 0), (3, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_a_run_that_fails_goes_on_from_its_last_checkpoint(step, saved, tmp_path, uncut):
    with pytest.raises(RuntimeError):
        run(tmp_path, progress=CutProgress(step, RuntimeError))
    assert len(read_metrics(tmp_path)) == step  # steps that are done again are written again
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    check_resumes(tmp_path, uncut, saved)


@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="Ctrl-C is ignored here (nohup, &)"
)
@pytest.mark.parametrize("update", [1, 4, 9])
def test_an_interrupt_within_an_update_waits_for_its_end(update, tmp_path, monkeypatch):
    grouped = {"head_lr": 0.02, "weight_decay": 1e-9}  # matrices and vectors are two groups
    expected, _ = run(tmp_path / "whole", options=grouped)
    calls, plain = [], AdamW._update

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 2 * update:  # one group of this step is updated, and one is not
            os.kill(os.getpid(), signal.SIGINT)
        plain(self, *arguments)

    monkeypatch.setattr(AdamW, "_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", options=grouped)
    assert saved_step(tmp_path / "cut") == update
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    classifier, _ = run(tmp_path / "cut", resume=True, options=grouped)
    assert same(trained(classifier), trained(expected))


@pytest.mark.parametrize("changes", [{"keep": "last"}, {"self_distillation": 0.5}])
@pytest.mark.parametrize("step", [1, 4, 8])
def test_a_cut_run_goes_on_exactly_whatever_it_keeps(changes, step, tmp_path):
    expected, _ = run(tmp_path / "whole", options=changes)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", progress=CutProgress(step), options=changes)
    classifier, _ = run(tmp_path / "cut", with_other_weights(), resume=True, options=changes)
    assert same(trained(classifier), trained(expected))
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_resuming_what_is_finished_only_gives_its_result(tmp_path, uncut):
    run(tmp_path)
    classifier, result = run(tmp_path, Cut("batch", 1), resume=True)
    assert (result.resumed_from, result.steps) == (STEPS, STEPS)
    assert same(trained(classifier), uncut[1])


def test_a_run_that_stopped_early_does_not_go_on(tmp_path):
    stopping = {"options": {"lr": 5.0, "patience": 1}}
    first, result = run(tmp_path, **stopping)
    assert result.stopped_early
    assert result.steps < STEPS
    again, resumed = run(tmp_path, resume=True, **stopping)
    assert resumed.stopped_early
    assert resumed.steps == result.steps
    assert same(trained(first), trained(again))


def test_without_a_checkpoint_resuming_starts(tmp_path, uncut):
    check_resumes(tmp_path / "new", uncut, 0)


def test_a_cut_run_is_not_started_over_by_mistake(tmp_path, uncut):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=CutProgress(5))
    before = outcome(tmp_path)
    with pytest.raises(
        MinllamaError, match="of a run that was interrupted after 5 steps: resume it, or"
    ):
        run(tmp_path)
    assert outcome(tmp_path) == before
    remove_checkpoint(tmp_path)
    assert saved_step(tmp_path) is None
    run(tmp_path)
    assert outcome(tmp_path) == uncut[0]
    run(tmp_path)  # a finished one is in nobody's way
    assert outcome(tmp_path) == uncut[0]


def test_only_what_is_trained_is_stored_and_the_best_is_written_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=CutProgress(3))
    stored = load_file(tmp_path / "checkpoint" / "weights.safetensors")
    assert stored.keys() == trained(TinyClassifier()).keys()
    (best,) = (tmp_path / "checkpoint").glob("best-*")
    inode = best.stat().st_ino
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Cut("batch", 3), resume=True)  # after step 4, without an evaluation between
    assert saved_step(tmp_path) == 4
    assert [path.stat().st_ino for path in (tmp_path / "checkpoint").glob("best-*")] == [inode]


# Runs that are killed.

KILLED_AT_RANDOM = """
import os, random, signal, time
from pathlib import Path
from tests.training.test_run_checkpoint import run, saved_step, whole_step

run(Path("warm"))  # what is imported late is imported now
began = time.perf_counter()
run(Path("timed"), options={"save_every": 1})
# A run is cut many times, however fast the machine is, and was when this was timed: the time that
# it may take grows from a sixteenth of all, as long as no step is done in it.
longest = (time.perf_counter() - began) / 16
folder, chosen, last, step = Path("run"), random.Random(0), -1, 0
while step < 9:
    if step == last:
        longest *= 1.5
    last = step
    pid = os.fork()
    if pid == 0:
        run(folder, resume=True, options={"save_every": 1})
        os._exit(0)
    time.sleep(chosen.random() * longest)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    step = whole_step(folder)
    print(step, flush=True)
run(folder, resume=True)
"""

# Each child does the same save, and kills itself before the n-th line of Python that the save
# executes, whichever file the line stands in. Then the save is done, and the run goes on.
KILLED_EVERYWHERE = """
import os, shutil, signal, sys
from pathlib import Path
from minllama import atomic
from minllama.training.run_checkpoint import CheckpointFolder
from tests.training.test_run_checkpoint import run, whole_step

folder, how, stride = Path("run"), sys.argv[1], int(sys.argv[2])
checkpoint, kept, save = folder / "checkpoint", Path("kept"), CheckpointFolder.save
if how == "no-exchange":
    atomic._exchange = lambda one, other: False

def restore():
    for path in [checkpoint, *folder.glob(".*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)
    if kept.exists():
        shutil.copytree(kept, checkpoint)

def killed_at(n, *arguments):
    def trace(frame, event, argument):
        nonlocal n
        if event == "line":
            n -= 1
            if n == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    child = os.fork()
    if child == 0:
        sys.settrace(trace)
        save(*arguments)
        sys.settrace(None)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

def save_killed(*arguments):
    shutil.rmtree(kept, ignore_errors=True)
    if checkpoint.exists():
        checkpoint.rename(kept)
    n = stride
    restore()
    while killed_at(n, *arguments):
        stale = len(list(folder.glob(".*.tmp")))
        print(arguments[1].step, whole_step(folder), stale, flush=True)
        restore()
        n += stride
    restore()
    save(*arguments)

CheckpointFolder.save = save_killed
run(folder, options={"save_every": 2})
"""


def whole_step(folder):
    """The step of the checkpoint that a kill has left; 0 for none, an error for a damaged one."""
    if not folder.exists() or saved_step(folder) is None:
        return 0
    checkpoint = CheckpointFolder(folder)
    state, _ = checkpoint._content(checkpoint._raw())
    return state.step


def killed(folder, program, *arguments):
    """What a program prints that kills its children: numbers, by lines."""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stderr
    return [[int(word) for word in line.split()] for line in finished.stdout.splitlines()]


@pytest.mark.parametrize("how", ["exchange", pytest.param("no-exchange", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stride", [401, pytest.param(67, marks=pytest.mark.slow)])
def test_a_kill_within_a_save_leaves_the_previous_checkpoint_or_the_new(
    how, stride, tmp_path, uncut
):
    lines = killed(tmp_path, KILLED_EVERYWHERE, how, str(stride))
    # The first save; one that has new best weights; those that keep the best; the last.
    for saved, previous in ((2, 0), (4, 2), (6, 4), (8, 6), (9, 8)):
        found = [step for step_of_save, step, _ in lines if step_of_save == saved]
        assert found[0] == previous
        assert set(found) <= {previous, saved}
        assert found == sorted(found)
    assert any(saved == step for saved, step, _ in lines)
    assert any(stale for _, _, stale in lines)
    assert outcome(tmp_path / "run")[1:] == uncut[0][1:]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint", "metrics.jsonl"]


def test_a_run_killed_at_random_instants_ends_as_if_it_had_not_been(tmp_path, uncut):
    steps = [step for (step,) in killed(tmp_path, KILLED_AT_RANDOM)]
    assert steps == sorted(steps)
    assert len(set(steps)) > 2
    assert outcome(tmp_path / "run")[1:] == uncut[0][1:]


@pytest.mark.parametrize("instant", ["before", "between"])
def test_a_checkpoint_that_lost_its_name_gets_it_back(instant, tmp_path, uncut, monkeypatch):
    # Without an atomic swap there is an instant between two renames; a kill there leaves no name.
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=CutProgress(5))
    (tmp_path / "checkpoint").rename(tmp_path / ".checkpoint.00000001.tmp")
    half = tmp_path / ".checkpoint.00000002.tmp"
    if instant == "before":  # the new one is not whole
        half.mkdir()
        (half / "weights.safetensors").write_bytes(b"half")
    else:  # both are whole, and the other one is older
        shutil.copytree(tmp_path / ".checkpoint.00000001.tmp", half)
        state = json.loads((half / "state.json").read_text())
        state["state"]["step"] = 4
        (half / "state.json").write_text(json.dumps(sealed(state)))
    check_resumes(tmp_path, uncut, 5)


# Checkpoints that are damaged, or of another run.


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    with pytest.raises(KeyboardInterrupt):
        run(folder, progress=CutProgress(6))
    return folder


@pytest.fixture
def copied(cut, tmp_path):
    return Path(shutil.copytree(cut, tmp_path / "copy"))


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


FILES = ["state.json", "weights.safetensors", "optimizer.safetensors", "best"]
DAMAGE = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"}"),
    "flipped": flip,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "not text": lambda path: path.write_bytes(b"\xff" * 100),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_an_error_of_one_line(file, damage, copied):
    (path,) = (copied / "checkpoint").glob(f"{file}*")
    if (file, damage) == ("state.json", "flipped"):
        pytest.skip("a flipped bit in white space is none")
    DAMAGE[damage](path)
    classifier = TinyClassifier()
    before = trained(classifier)
    with pytest.raises(CheckpointError) as caught:
        run(copied, classifier, resume=True)
    message = str(caught.value)
    assert message.startswith(f"{copied / 'checkpoint'}: the checkpoint is damaged (")
    assert message.endswith("); delete it to start again")
    assert "\n" not in message
    assert same(trained(classifier), before)


@pytest.mark.parametrize(
    "changes",
    [
        {"state": None},
        {"state": {"step": 6, "unknown": 1}},
        {"state": {"step": "6"}},
        {"state": {"step": 6, "best_step": "../../x"}},
        {"state": {"step": 6, "row": []}},
        {"files": {}},
        {"files": []},
        {"updates": {"score.weight": "many"}},
        {"fingerprint": 3},
        {"state": {"step": 6, "best_step": float("inf")}},
        {"updates": {"score.weight": float("inf")}},
        {"format": [1]},
        {"format": 1},
    ],
)
def test_a_state_that_says_nonsense_is_an_error_of_one_line(changes, copied):
    path = copied / "checkpoint" / "state.json"
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | changes)))
    with pytest.raises(CheckpointError, match=r"checkpoint: .* delete it to start again$"):
        run(copied, resume=True)


def test_no_flipped_bit_of_a_state_is_taken_for_another_state(copied):
    path = copied / "checkpoint" / "state.json"
    data = path.read_bytes()
    content, refused = json.loads(data), 0
    for i in range(0, len(data), 7):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :])
        try:
            saved_step(copied)
        except CheckpointError:
            refused += 1
        else:  # in white space
            assert json.loads(path.read_bytes()) == content
    assert refused > 100


@pytest.mark.parametrize("content", ["[]", "null", "{" * 100_000, "[" * 100_000, "{}"])
def test_a_state_that_is_no_object_is_an_error_of_one_line(content, copied):
    (copied / "checkpoint" / "state.json").write_text(content)
    for action in (lambda: run(copied, resume=True), lambda: saved_step(copied)):
        with pytest.raises(CheckpointError, match=r"the checkpoint is damaged \([^\n]*; delete it"):
            action()


@pytest.mark.parametrize("rows", [None, 0, 3, 5])
def test_metrics_that_are_missing_are_an_error(rows, copied):
    path = copied / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.unlink() if rows is None else path.write_text("".join(lines[:rows]))
    message = (
        "metrics.jsonl: cannot be read"
        if rows is None
        else f"has only {rows} of the checkpoint's 6 steps"
    )
    with pytest.raises(CheckpointError, match=message):
        run(copied, resume=True)


def changed_base(value=1.0):
    classifier = TinyClassifier()
    with torch.no_grad():
        classifier.llama.layers[0].feed_forward.w1.weight[0, 0] += value
    return classifier


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"lr": 0.01, "seed": 3}}, "lr was 0.02, now 0.01; seed was 0, now 3;"),
        ({"settings": {"model": "b"}}, 'model was null, now "b";'),
        ({"train": make_dataset(23)}, "training texts, their tokens or labels differ;"),
        (
            {"train": dataclasses.replace(TRAIN, labels=[*TRAIN.labels[:-1], 2])},
            "training texts, their tokens or labels differ;",
        ),
        ({"dev": make_dataset(9, 2)}, "dev texts or labels differ;"),
        ({"dev": None}, "dev texts or labels differ;"),
        ({"classifier": changed_base()}, "weights of the frozen base differ;"),
        (
            {"classifier": TinyClassifier().requires_grad_(True)},
            "trained parameters differ; weights of the frozen base differ;",
        ),
    ],
)
def test_another_run_is_refused_and_what_differs_is_named(arguments, message, copied):
    before = outcome(copied)
    with pytest.raises(CheckpointError) as caught:
        run(copied, resume=True, **arguments)
    assert str(caught.value) == (
        f"{copied / 'checkpoint'}: cannot resume: {message} resume with the settings of the run, "
        "or start again in another folder"
    )
    assert outcome(copied) == before


def test_how_often_it_is_saved_may_change(copied, uncut):
    classifier, _ = run(copied, resume=True, options={"save_every": 1})
    assert same(trained(classifier), uncut[1])


def test_differences_are_named_in_both_directions():
    old = {"options": {"a": 1, "b": "x" * 90, "save_every": 1}, "data": "1", "gone": None}
    new = {"options": {"a": 1, "c": True}, "data": "2"}
    old["settings"] = {"training": {"a": 1, "save_every": 1}, "lora": {"r": 8}, "model": {"m": 1}}
    new["settings"] = {"training": {"a": 1, "c": True}, "lora": {"r": 4}, "model": None}
    assert differences(old, new) == [
        f'b was "{"x" * 56}..., now null',
        "c was null, now true",
        "data differ",
        "r was 8, now 4",
        'model was {"m": 1}, now null',
    ]
    assert differences(old, old) == []


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MinllamaError, match="cannot write"):
        run(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_tensors_of_every_dtype_come_back_as_they_were(tmp_path):
    torch.manual_seed(0)
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    weights = {str(kind): torch.randn(3, 4).to(kind).T for kind in kinds}  # not contiguous
    saved = RunTensors(weights, {"exp_avg.x": torch.randn(2)}, {"x": 3}, {"x": torch.randn(2)})
    state = RunState(step=3, best_step=2, best_metric=0.1)
    CheckpointFolder(tmp_path).save(state, saved, {"options": {}})
    loaded = CheckpointFolder(tmp_path).load({"options": {}})
    assert loaded is not None
    assert loaded[0] == state
    assert same(loaded[1].weights, weights)
    assert same(loaded[1].moments, saved.moments)
    assert same(loaded[1].best, saved.best)
    assert loaded[1].updates == {"x": 3}
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "checkpoint").iterdir()}
    assert modes == {(tmp_path / "checkpoint" / "state.json").stat().st_mode & 0o777}


def test_a_checkpoint_with_other_shapes_is_refused(copied):
    # The hashes of a file that somebody made are right; its tensors are still not this model's.
    path = copied / "checkpoint" / "weights.safetensors"
    tensors = load_file(path)
    tensors["score.bias"] = torch.zeros(7)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="the checkpoint is damaged"):
        run(copied, resume=True)
