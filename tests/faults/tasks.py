"""Work that a fault interrupts: training, saving, converting, labeling and serving.

A task runs in a child of a process that has imported everything, so that an attempt takes as long
as its work. It knows what an uncut run leaves, and whether what is there now is whole.
"""

import contextlib
import http.client
import json
import os
import shutil
import signal
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minllama.atomic import sha256_of
from minllama.checkpoints.huggingface import write_huggingface
from minllama.checkpoints.open import open_checkpoint
from minllama.classification import LlamaEmbeddingClassifier, load_classifier
from minllama.classification.storage.manifest import CLASSIFIER_FILE
from minllama.cli import main
from minllama.errors import MinllamaError
from minllama.experiment.ladder.state import has_ladder
from minllama.model.llama import Llama
from minllama.tokenizer.tokenizer import Tokenizer
from minllama.training.run_checkpoint import METRICS, has_checkpoint
from tests.experiment_cases import examples, write_labelled
from tests.faults.read_models import CONFIG, tiny_folder, tiny_state
from tests.faults.read_tokenizers import byte_vocabulary

BASE_CONFIG = CONFIG.replace(max_seq_len=128)


def forked(work: Callable[[], None], log: Path) -> int:
    """Start `work` in a child whose output goes to `log`; its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        try:
            work()
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except MinllamaError as error:  # of a function, as the command line shows it
            print(f"minllama: {error}", file=sys.stderr)
            status = 2
        except BaseException:
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """Wait for a child; its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def command(*words: object) -> None:
    """Run a command of `minllama` in this process, which it ends."""
    sys.argv = ["minllama", *map(str, words)]
    main()


class Task(ABC):
    """Work of one name.

    Args:
        folder: for what it needs; its output goes elsewhere, to a place that may be faulty.

    Attributes:
        kinds: what it can make.
        kind: which of these it makes now.
    """

    name = ""
    kinds: tuple[str, ...] = ("",)

    def __init__(self, folder: Path) -> None:
        self.folder, self.kind = folder, self.kinds[0]
        folder.mkdir(parents=True)

    @abstractmethod
    def begin(self, place: Path) -> None:
        """Put an older output in place."""

    @abstractmethod
    def run(self, place: Path) -> None:
        """Do the work, or resume it, as a user would after an interruption."""

    @abstractmethod
    def check_whole(self, place: Path) -> None:
        """Assert that the output is the old or the new one, from beginning to end."""

    @abstractmethod
    def result(self, place: Path) -> Any:
        """What a complete run leaves, comparable bit for bit."""

    def leftovers(self, place: Path) -> list[str]:
        """Names that a complete run should not have left."""
        return [path.name for path in place.iterdir() if path.name.startswith(".")]


class Train(Task):
    """LoRA with a checkpoint after each step, over the classifier of an older run."""

    name = "train"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.base = tiny_folder(folder / "base", BASE_CONFIG)
        self.train = write_labelled(folder / "train.txt", examples(24))
        self.dev = write_labelled(folder / "dev.txt", examples(8, seed=1))
        self.older = folder / "older"

    def _words(self, output: Path, *more: object) -> list[object]:
        words: list[object] = ["train", "--train", self.train, "--dev", self.dev]
        words += ["--model", self.base, "--method", "lora", "--r", 2, "--batch-size", 8]
        words += ["--dtype", "float32", "--device", "cpu", "--save-every", 1, "--output", output]
        return [*words, *more]

    def begin(self, place: Path) -> None:
        if not self.older.exists():
            words = self._words(self.older, "--epochs", 1, "--seed", 5)
            assert ended(forked(lambda: command(*words), self.folder / "log")) == 0
        shutil.copytree(self.older, place / "run")

    def run(self, place: Path) -> None:
        output = place / "run"
        can_resume = has_checkpoint(output) or has_ladder(output)
        command(*self._words(output, "--epochs", 3, "--resume" if can_resume else "--force"))

    def check_whole(self, place: Path) -> None:
        load_classifier(place / "run", device="cpu").predict_proba(["a fine film"])

    def result(self, place: Path) -> Any:
        output = place / "run"
        content = json.loads((output / CLASSIFIER_FILE).read_text())
        metrics = json.loads((output / "metrics.json").read_text())["splits"]
        files = {name: sha for name, sha in content["sha256"].items() if name != CLASSIFIER_FILE}
        history = [json.loads(line)["loss"] for line in (output / METRICS).read_text().splitlines()]
        predictions = (output / "predictions.jsonl").read_text()
        return files, metrics["dev"]["evaluation"], history, predictions

    def leftovers(self, place: Path) -> list[str]:
        assert not (place / "run" / "checkpoint").exists()
        return [*super().leftovers(place), *super().leftovers(place / "run")]


class Save(Task):
    """A model with its tokenizer, over another one."""

    name = "save"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.vocabulary = byte_vocabulary(folder / "words")
        self.old, self.new = tiny_state(), {k: v + 1 for k, v in tiny_state().items()}

    def begin(self, place: Path) -> None:
        self._write(place, self.old)
        (place / "model" / "notes.txt").write_text("mine")

    def run(self, place: Path) -> None:
        self._write(place, self.new)

    def _write(self, place: Path, state: dict[str, torch.Tensor]) -> None:
        write_huggingface(place / "model", CONFIG, state, vocabulary=self.vocabulary)

    def check_whole(self, place: Path) -> None:
        state = self._state(place)
        wholes = [all(torch.equal(state[k], v) for k, v in s.items()) for s in (self.old, self.new)]
        assert any(wholes), "a model of two"
        assert (place / "model" / "notes.txt").read_text() == "mine"

    def _state(self, place: Path) -> dict[str, torch.Tensor]:
        checkpoint = open_checkpoint(place / "model")
        assert checkpoint.vocabulary is not None
        return {name: tensor.load().clone() for name, tensor in checkpoint.tensors.items()}

    def result(self, place: Path) -> Any:
        return {path.name: sha256_of(path) for path in sorted((place / "model").iterdir())}


class Convert(Task):
    """A Hugging Face folder to GGUF, over another file."""

    name = "convert"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.base = tiny_folder(folder / "base", BASE_CONFIG)

    def begin(self, place: Path) -> None:
        (place / "model.gguf").write_bytes(b"an older file" * 1000)

    def run(self, place: Path) -> None:
        command("convert", self.base, place / "model.gguf", "--to", "gguf", "--force")

    def check_whole(self, place: Path) -> None:
        content = (place / "model.gguf").read_bytes()
        if content != b"an older file" * 1000:
            model = Llama.from_pretrained(place / "model.gguf", device="cpu", dtype="float32")
            expected = tiny_state(BASE_CONFIG)
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, expected[name]), name

    def result(self, place: Path) -> Any:
        return sha256_of(place / "model.gguf")


class Label(Task):
    """Rows of a file to predictions."""

    name = "label"
    rows = 1400
    kinds = ("jsonl", "csv", "parquet")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        base = tiny_folder(folder / "base", BASE_CONFIG)
        llama, words = Llama.from_pretrained(base, device="cpu"), Tokenizer.from_pretrained(base)
        classifier = LlamaEmbeddingClassifier(llama, words, ["bad", "good"], bias=True)
        torch.nn.init.normal_(classifier.score.weight)
        classifier.save_pretrained(folder / "classifier")
        lines = (f'{i},"{text[:40]}"\n' for i, (_, text) in enumerate(examples(self.rows)))
        (folder / "rows.csv").write_text("id,text\n" + "".join(lines))

    def begin(self, place: Path) -> None:
        pass  # where there is a file, a user says whether to resume or to replace it

    def _output(self, place: Path) -> Path:
        return place / f"out.{self.kind}"

    def run(self, place: Path) -> None:
        output = self._output(place)
        words = ["classify", self.folder / "classifier", "--input", self.folder / "rows.csv"]
        words += ["--output", output, "--keep-columns", "id", "--device", "cpu"]
        is_begun = output.exists() or output.with_name(output.name + ".partial.jsonl").exists()
        command(*words, *(["--resume"] if is_begun else []))

    def check_whole(self, place: Path) -> None:
        """Lines are appended: all but the last are whole, in order, and none is a duplicate."""
        output = self._output(place)
        lines = output.with_name(output.name + ".partial.jsonl")
        file = output if self.kind == "jsonl" else lines
        if self.kind != "csv" and file.exists():
            whole = file.read_bytes().rpartition(b"\n")[0]
            indices = [json.loads(line)["index"] for line in whole.splitlines()]
            assert indices == [*range(len(indices))]

    def result(self, place: Path) -> Any:
        assert [path.name for path in place.iterdir()] == [f"out.{self.kind}"]
        if self.kind != "parquet":
            return self._output(place).read_bytes()
        from pyarrow import parquet

        return parquet.read_table(self._output(place)).to_pydict()


class Serve(Task):
    """A server whose answers are read while it dies; a new one gives the same ones."""

    name = "serve"
    bodies = (
        ("/classify", {"model": "classifier", "input": ["a fine film", "dull"]}),
        ("/v1/completions", {"model": "base", "prompt": "ab", "max_tokens": 12, "temperature": 0}),
        (
            "/v1/completions",
            {"model": "base", "prompt": "b", "max_tokens": 20, "seed": 1, "stream": True},
        ),
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.base = tiny_folder(folder / "base", BASE_CONFIG)
        llama = Llama.from_pretrained(self.base, device="cpu")
        words = Tokenizer.from_pretrained(self.base)
        classifier = LlamaEmbeddingClassifier(llama, words, ["bad", "good"], bias=True)
        torch.nn.init.normal_(classifier.score.weight)
        classifier.save_pretrained(folder / "classifier")

    def begin(self, place: Path) -> None:
        pass

    def run(self, place: Path) -> None:
        """Serve on the port in `place`/port, until killed."""
        models = [self.base, self.folder / "classifier"]
        port = (place / "port").read_text()
        command("serve", *models, "--host", "127.0.0.1", "--port", port, "--device", "cpu")

    def check_whole(self, place: Path) -> None:
        pass

    def result(self, place: Path) -> Any:
        """The answers, but for ids and times; an error of the connection if one is truncated."""
        return [self._answer(place, path, body) for path, body in self.bodies]

    def _answer(self, place: Path, path: str, body: dict[str, Any]) -> Any:
        port = int((place / "port").read_text())
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(body), headers)
            with connection.getresponse() as response:
                content = response.read()
            assert response.status == 200, content
        finally:
            connection.close()
        if "stream" in body:
            events = content.decode().split("\n\n")
            assert events[-2:] == ["data: [DONE]", ""], "a stream that seems to have ended"
            pieces = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
            return "".join(piece["choices"][0]["text"] for piece in pieces if piece["choices"])
        answer = json.loads(content)
        return answer.get("choices") or [row["probs"] for row in answer["data"]]


TASKS = {task.name: task for task in (Train, Save, Convert, Label, Serve)}


def kill(pid: int) -> bool:
    """End a child by SIGKILL; whether it was still running."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return ended(pid) == -signal.SIGKILL
