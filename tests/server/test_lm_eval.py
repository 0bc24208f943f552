"""Claims about lm-evaluation-harness: `local-completions` runs as it is, on a task of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minllama.server.run import HttpServer

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytest.importorskip("aiohttp", reason="lm-eval's extra api is not installed")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
{rest}
"""
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - metric: acc
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: byte_perplexity
""",
    "texts": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
""",
}


@torch.inference_mode()
def log_likelihood(server: HttpServer, context: str, more: str) -> tuple[float, bool]:
    """How likely a text is after another, by a plain forward pass."""
    model = server.service.registry.get("tiny")
    known = len(model.tokenizer.encode(context))
    ids = model.tokenizer.encode(context + more)
    logprobs = model.llama(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    own = logprobs[known - 1 :].gather(1, torch.tensor(ids[known:]).unsqueeze(1))
    is_greedy = logprobs[known - 1 :].argmax(-1).tolist() == ids[known:]
    return own.sum().item(), is_greedy


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("options", [{}, {"tokenizer_backend": "remote", "batch_size": 2}])
def test_a_task_runs_with_the_servers_tokenizer(
    server: HttpServer, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import RemoteTokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    choices = ["Paris", "Rome", "nothing at all"]
    rows = [
        {"question": f"The capital number {i} is", "choices": choices, "gold": i % 3}
        for i in range(4)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, rest in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data, rest=rest))
    model = LocalCompletionsAPI(
        model="tiny", base_url=f"{server.url}/v1/completions", max_length=1024, **options
    )
    assert isinstance(model.tokenizer, RemoteTokenizer)
    assert model.eot_token_id == server.service.registry.get("tiny").tokenizer.eos_id
    made = lm_eval.simple_evaluate(
        model=model,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert set(made["results"]) == set(TASKS)
    for sample in made["samples"]["choices"]:
        for choice, ((found, is_greedy),) in zip(choices, sample["resps"], strict=True):
            expected = log_likelihood(server, sample["doc"]["question"], f" {choice}")
            assert float(found) == pytest.approx(expected[0], abs=1e-3)
            assert is_greedy == expected[1]
