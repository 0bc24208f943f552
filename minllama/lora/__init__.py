"""Low-rank adapters for frozen linear layers: LoRA, rsLoRA, DoRA.

`layer` computes one layer, `targets` selects layers, `inject` acts on a whole Llama.
"""

from minllama.lora.inject import (
    adapter_names,
    adapters_disabled,
    add_lora_wrapper,
    lora_layers,
    lora_parameters,
    merge_lora,
    remove_lora_wrapper,
    set_adapters,
    unmerge_lora,
)
from minllama.lora.layer import LoRAAdapter, LoRALayer

__all__ = [
    "LoRAAdapter",
    "LoRALayer",
    "adapter_names",
    "adapters_disabled",
    "add_lora_wrapper",
    "lora_layers",
    "lora_parameters",
    "merge_lora",
    "remove_lora_wrapper",
    "set_adapters",
    "unmerge_lora",
]
