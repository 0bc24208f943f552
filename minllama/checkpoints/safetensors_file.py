"""Write a safetensors file tensor by tensor, so that no two of them need to be in memory at once.

The bytes are those that the library's `save_file` writes, which takes all tensors together.
`minllama.checkpoints.huggingface` calls it.

Format: https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

# In the library's order: tensors whose elements have more bytes come first, so all are aligned.
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ALIGNMENT = 8  # of the header, which is padded with spaces


def write_safetensors(
    path: Path, like: Mapping[str, Tensor], read: Callable[[str], Tensor]
) -> None:
    """Write a file of tensors in floating point.

    Args:
        path: of the file.
        like: tensors of the same names, shapes and dtypes, perhaps on the meta device.
        read: returns a tensor by its name; each is read once.

    Raises:
        OSError: it cannot be written.
    """
    kinds = list(NAMES)
    order = sorted(like, key=lambda name: (kinds.index(like[name].dtype), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor, start = like[name], end
        end += tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = read(name).detach().cpu().contiguous()
            assert tensor.shape == like[name].shape, name
            assert tensor.dtype == like[name].dtype, name
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
