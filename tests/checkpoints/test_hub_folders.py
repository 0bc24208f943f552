"""Claims about classifiers and adapters that are on the hub, against a stand-in of it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minllama import LlamaEmbeddingClassifier, add_lora_wrapper, load_pretrained
from minllama.tokenizer.tokenizer import Tokenizer
from tests.hub import Hub, Repository, serving
from tests.peft_model import unwarned

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
Run = Callable[..., subprocess.CompletedProcess[str]]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, a sequence classifier, adapters of both kinds, and a classifier of ours."""
    folder = tmp_path_factory.mktemp("folders")
    kind = transformers.LlamaForSequenceClassification
    model = kind.from_pretrained(base, num_labels=2, pad_token_id=2)
    model.config.id2label = {0: "no", 1: "yes"}
    model.config.label2id = {"no": 0, "yes": 1}
    model.save_pretrained(folder / "sequence")
    for name in TOKENIZER:
        (folder / "sequence" / name).write_bytes((base / name).read_bytes())
    for task, theirs in (
        ("SEQ_CLS", model),
        ("CAUSAL_LM", transformers.LlamaForCausalLM.from_pretrained(base)),
    ):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task)
        with unwarned():
            made = peft.get_peft_model(theirs, config)
            made.save_pretrained(folder / task)
        file = folder / task / "adapter_config.json"
        named = {**json.loads(file.read_text()), "base_model_name_or_path": "org/base"}
        file.write_text(json.dumps(named))
    llama = load_pretrained(base, device="cpu")
    add_lora_wrapper(llama)
    ours = LlamaEmbeddingClassifier(llama, Tokenizer.from_pretrained(base), ["no", "yes"])
    ours.save_pretrained(folder / "own")
    return {"base": base, **{name: folder / name for name in ("sequence", "own")}} | {
        name: folder / name for name in ("SEQ_CLS", "CAUSAL_LM")
    }


@pytest.fixture
def hub(folders: dict[str, Path]) -> Iterator[Hub]:
    with serving() as hub:
        for name, folder in folders.items():
            files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
            hub.repositories[f"org/{name}"] = Repository({**files, "training_args.bin": b"no"})
        yield hub


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    more = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }

    def call(*args: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "minllama", *map(str, args)],
            env={**kept, **more},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return call


@pytest.mark.parametrize(
    "name", ["sequence", "SEQ_CLS", pytest.param("own", marks=pytest.mark.slow)]
)
def test_a_classifier_is_downloaded_and_classifies(
    name: str, run: Run, hub: Hub, folders: dict[str, Path]
) -> None:
    text = ("--text", "once upon a time", "--json")
    from_hub = run("classify", f"org/{name}", *text)
    if name != "own":
        assert ("adapter_model.safetensors" in hub.downloads()) == (name == "SEQ_CLS")
    assert from_hub.returncode == 0, from_hub.stderr
    assert "training_args.bin" not in hub.downloads()
    assert "label" in json.loads(from_hub.stdout)
    if name == "own":
        info = run("info", f"org/{name}")
        assert info.returncode == 0, info.stderr
        hub.is_down = True
        assert run("classify", f"org/{name}", *text).stdout == from_hub.stdout
        assert run("classify", folders[name], *text).stdout == from_hub.stdout


def test_an_adapter_is_downloaded_with_its_base(run: Run, hub: Hub) -> None:
    info = run("info", "org/CAUSAL_LM")
    assert info.returncode == 0, info.stderr
    assert "PEFT adapter of 2 matrices on Hugging Face" in info.stdout
    assert "adapter_model.safetensors" in hub.downloads()
    generated = run("generate", "a", "-m", "org/CAUSAL_LM", "--max-new-tokens", 2)
    assert generated.returncode == 0, generated.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("classify", "org/none", "--text", "a"), "org/none: no such local path, and no such repo"),
        (("classify", "no-folder", "--text", "a"), "no-folder: no classifier.json"),
        (("classify", "org/base", "--text", "a"), "a language model (LlamaForCausalLM), not a"),
        (("info", "org/none"), "org/none: no such local path, and no such repository"),
    ],
)
def test_what_is_no_classifier_there_is_one_line(
    arguments: tuple[str, ...], message: str, run: Run
) -> None:
    ended = run(*arguments)
    assert ended.returncode != 0
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
