"""Claims about what is served: names, and adapters and heads that share one base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from minllama.classification import load_classifier
from minllama.errors import CheckpointError, OptionError
from minllama.experiment import run_experiment
from minllama.generation.api import generate
from minllama.lora import add_lora_wrapper, lora_parameters
from minllama.lora.peft_files import save_adapter
from minllama.model.llama import Llama
from minllama.options import GenerationOptions
from minllama.server.errors import RequestError
from minllama.server.registry import Registry, kind_of, name_of, named, parsed_aliases
from tests.server.running import LOADING, running

TEXTS = ["a fine film", "it drags on"]


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A PEFT adapter for generation whose deltas are large enough to change texts."""
    llama = Llama.from_pretrained(base, device="cpu", dtype="float32")
    add_lora_wrapper(llama, "all-linear", r=2)
    torch.manual_seed(1)
    for parameter in lora_parameters(llama):
        parameter.data.normal_(std=0.3)
    folder = tmp_path / "adapter"
    save_adapter(folder, llama, base_model_name=str(base))
    return folder


@pytest.fixture
def classifiers(make_experiment: Callable[..., Any], tmp_path: Path) -> dict[str, Path]:
    """A frozen base with a head, and one with an adapter and a head."""
    for method in ("frozen", "lora"):
        run_experiment(make_experiment(method, output=method))
    return {method: tmp_path / method for method in ("frozen", "lora")}


def addresses(llama: Llama) -> set[int]:
    """Where the matrices of a model's base are."""
    names = [name for name, _ in llama.named_parameters() if "lora" not in name]
    return {llama.get_parameter(name).data_ptr() for name in names}


def test_one_base_is_shared_by_adapters_and_heads(
    base: Path, adapter: Path, classifiers: dict[str, Path]
) -> None:
    sources = {"base": base, "adapter": adapter, **classifiers}
    registry = Registry({name: str(path) for name, path in sources.items()}, None, LOADING)
    registry.load()
    models = registry.models
    assert [model.kind for model in models.values()] == [
        "model",
        "adapter",
        "classifier",
        "classifier",
    ]
    shared = addresses(models["base"].llama)
    assert all(addresses(model.llama) == shared for model in models.values())
    assert models["frozen"].engine is models["base"].engine
    assert models["lora"].engine is not models["base"].engine
    options = GenerationOptions(max_new_tokens=8)
    texts = {}
    for name, source in (("base", base), ("adapter", adapter)):
        alone = Llama.from_pretrained(source, device="cpu", dtype="float32")
        words = models[name].tokenizer
        (expected,) = generate(alone, words, "Once upon", options)
        (found,) = generate(models[name].llama, words, "Once upon", options)
        assert found.text == expected.text
        texts[name] = found.text
    assert texts["base"] != texts["adapter"]
    for name, folder in classifiers.items():
        classifier = models[name].classifier
        assert classifier is not None
        expected_p = load_classifier(folder, device="cpu").predict_proba(TEXTS)
        assert classifier.predict_proba(TEXTS) == pytest.approx(expected_p, abs=1e-6)


def test_a_request_chooses_by_model(base: Path, adapter: Path) -> None:
    with running({"base": base, "tuned": adapter}, aliases={"gpt": "base"}) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        texts = {
            name: client.completions.create(
                model=name, prompt="Once upon", max_tokens=8, temperature=0
            )
            .choices[0]
            .text
            for name in ("base", "tuned", "gpt")
        }
        assert texts["base"] == texts["gpt"] != texts["tuned"]
        assert [model.id for model in client.models.list()] == ["base", "tuned", "gpt"]
        unnamed = httpx.post(
            f"{server.url}/v1/completions",
            json={"prompt": "Once upon", "max_tokens": 8, "temperature": 0},
        )
        assert unnamed.json()["choices"][0]["text"] == texts["base"]


def test_a_classifier_generates_nothing(classifiers: dict[str, Path]) -> None:
    with running({"frozen": classifiers["frozen"]}) as server:
        for path, body in (
            ("completions", {"prompt": "x"}),
            ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            answer = httpx.post(f"{server.url}/v1/{path}", json={"model": "frozen", **body})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "model"


def test_another_base_than_the_classifiers_is_refused(
    classifiers: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    other = Llama.from_pretrained(base, device="cpu", dtype="float32")
    other.norm.weight.data.mul_(2)
    folder = tmp_path / "other"
    other.save_pretrained(folder)
    for file in base.iterdir():
        if "token" in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    from minllama.options.loading import LoadOptions

    loading = LoadOptions(device="cpu", base=str(folder))
    with pytest.raises(CheckpointError, match="not the classifier's base"):
        Registry({"lora": str(classifiers["lora"])}, None, loading).load()


def test_names_come_from_files_folders_and_ids(tmp_path: Path, default_model: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "m.gguf").write_bytes(b"")
    assert name_of(str(tmp_path / "run")) == "run"
    assert name_of(str(tmp_path / "m.gguf")) == "m"
    assert name_of("org/model") == "org/model"
    assert name_of(None) == default_model.stem
    assert kind_of(None) == "model"


def test_two_models_of_one_name_need_an_alias(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True)
    sources = [str(tmp_path / parent / "run") for parent in ("a", "b")]
    with pytest.raises(OptionError, match="--alias"):
        named(sources)
    assert list(named(sources, {"second": sources[1]})) == ["run", "second"]


def test_aliases_have_a_name_and_a_model() -> None:
    assert parsed_aliases(["a=b=c", "d=e"]) == {"a": "b=c", "d": "e"}
    for wrong in (["a"], ["=b"], ["a="], ["a=b", "a=c"]):
        with pytest.raises(OptionError, match="--alias"):
            parsed_aliases(wrong)


def test_unknown_names_are_not_found(base: Path) -> None:
    registry = Registry({"tiny": str(base)}, {"further": "tiny"}, LOADING)
    registry.load()
    assert registry.get(None) is registry.get("tiny") is registry.get("default")
    assert registry.get("further").engine is registry.get("tiny").engine
    with pytest.raises(RequestError) as caught:
        registry.get("../../etc/passwd\n\x1b[31m")
    assert caught.value.status == 404
    assert "\x1b" not in caught.value.message
