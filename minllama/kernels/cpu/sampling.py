"""Choose tokens in one pass over the logits, each row by one thread; see `src/sampling.inc`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minllama.kernels.cpu import ops
from minllama.kernels.cpu.library import call
from minllama.kernels.cpu.structs import Draw
from minllama.kernels.dispatch import register
from minllama.options import SamplingOptions


def serves(logits: Tensor, options: SamplingOptions, uniforms: Sequence[float]) -> bool:
    """Whether compiled code draws from these logits."""
    return logits.dtype == torch.float32 and logits.dim() == 2 and ops.serves(logits)


def draw_tokens(logits: Tensor, options: SamplingOptions, uniforms: Sequence[float]) -> Tensor:
    """See `minllama.generation.sampling.draw_tokens`."""
    rows, size = logits.shape
    if not size or (options.temperature and len(uniforms) != rows):
        raise ops.unfit("draw_tokens", logits, torch.empty(len(uniforms)))
    logits = logits.detach().contiguous()
    draws = torch.tensor(uniforms, dtype=torch.float64, device="cpu")
    chosen = torch.empty(rows, dtype=torch.int64, device="cpu")
    arguments = Draw(
        rows=rows,
        size=size,
        temperature=options.divisor,
        top_p=options.top_p,
        min_p=options.min_p,
        logits=logits.data_ptr(),
        uniforms=draws.data_ptr(),
        chosen=chosen.data_ptr(),
    )
    call("draw", arguments)
    return chosen


register("draw_tokens", serves, draw_tokens)
