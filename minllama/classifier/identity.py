"""Which weights are these? A fingerprint that tells one base model from another.

Knows nothing of files.
"""

import hashlib

import torch
from torch import Tensor

from minllama.llama import Llama
from minllama.lora.layer import LoRALayer

SAMPLES = 256  # numbers of each tensor that are looked at


def fingerprint(llama: Llama) -> str:
    """A hash of the base weights of a Llama: the same for the same numbers, however stored.

    Of each tensor some hundred numbers are read, evenly spread, rounded to bfloat16, so that a
    model loaded in float32 or bfloat16, from one format or from another, is the same one, and one
    that was trained further is not. Adapters are left out, merged ones as well.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_base_tensors(llama).items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES)
        sample = flat[::step].to(torch.bfloat16).cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _base_tensors(llama: Llama) -> dict[str, Tensor]:
    tensors = {}
    for name, module in llama.named_modules():
        if isinstance(module, LoRALayer):
            tensors[f"{name}.weight"] = module.unmerged_weight
            if module.base.bias is not None:
                tensors[f"{name}.bias"] = module.base.bias
        elif ".base" not in name and ".adapters" not in name:
            for key, parameter in module.named_parameters(prefix=name, recurse=False):
                tensors[key] = parameter
    return tensors
