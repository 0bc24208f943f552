"""PEFT's adapters, beside a good base model."""

import json
from pathlib import Path

import torch

from tests.faults.mutations import Mutator, safetensors
from tests.faults.mutations import json_values as json_mutator
from tests.faults.read_models import PICKLED, run_model, tiny_folder, torch_bytes
from tests.faults.reader import Reader, reader, writing

ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "base",
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
    "rank_pattern": {"layers.0.self_attn.v_proj": 1},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layers_to_transform": None,
}


def adapter_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    sizes = {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (16, 8), "mlp.down_proj": (24, 16)}
    tensors = {}
    for layer in range(2):
        for module, (n_in, n_out) in sizes.items():
            rank = 1 if (layer, module) == (0, "self_attn.v_proj") else 2
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, n_in)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(n_out, rank)
    return tensors


@reader("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
def adapter_file(folder: Path, name: str) -> Reader:
    from safetensors.torch import save

    tiny_folder(folder / "base")
    adapter = folder / "adapter"
    adapter.mkdir()
    config = {**ADAPTER, "base_model_name_or_path": str(folder / "base")}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    if name.endswith("bin"):
        tensors = adapter_tensors()
        seeds = [torch_bytes(tensors), torch_bytes(tensors, **PICKLED)]
        return Reader(seeds, writing(adapter / name, lambda: run_model(adapter)))
    (adapter / "adapter_model.safetensors").write_bytes(save(adapter_tensors()))
    seeds = [(adapter / name).read_bytes()]
    mutate: Mutator = safetensors
    if name.endswith("json"):
        seeds.append(json.dumps({**config, "use_rslora": True}).encode())
        seeds.append(json.dumps({**config, "layers_to_transform": [0, 1]}).encode())
        mutate = json_mutator
    return Reader(seeds, writing(adapter / name, lambda: run_model(adapter)), mutate)
