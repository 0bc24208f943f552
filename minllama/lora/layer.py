"""A linear layer with low-rank adapters (Hu et al. 2021).

Follows the papers: LoRA, rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024). Shape letters are
those of `minllama.model.llama`; R is the rank.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minllama.errors import MinllamaError, OptionError
from minllama.kernels.dispatch import accelerated
from minllama.options import LoRAOptions
from minllama.quantization.modules import AnyLinear, check_trainable, dense_weight, stored_tensor


@accelerated
def low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """Scale * B (A dropout(x)) (Hu et al. 2021, eq. 3): (..., in), (R, in), (out, R) -> (..., out).

    The small matrices are cast to x's dtype, not x to theirs; kernels compute in float32.
    """
    low = F.linear(F.dropout(x, dropout), a.to(x.dtype))  # (..., R)
    return F.linear(low, (scale * b).to(x.dtype))


@accelerated
def add_low_rank(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """Y + `low_rank`: (..., out) -> (..., out); kernels may write the result to y."""
    return y + low_rank.reference(x, a, b, scale, dropout)


class LoRAAdapter(nn.Module):
    """The trainable update of one linear layer: delta W = scaling * B A (Hu et al. 2021, eq. 3).

    `lora_A` (R, in) starts Kaiming-uniform and `lora_B` (out, R) at zero, so that training starts
    from the base. Everything is float32, whatever the base's dtype: bfloat16 would lose small
    steps. With DoRA there is also `lora_magnitude_vector` (out,), the length m of each row of the
    adapted weight: W' = m * (W + delta W) / ||W + delta W|| (Liu et al. 2024, eq. 5).
    """

    def __init__(self, base: AnyLinear, options: LoRAOptions) -> None:
        super().__init__()
        self.options = options
        r = options.r
        self.scaling = options.scaling
        # Drawn on the CPU, so that a seed means the same adapter on every device.
        a = torch.empty(r, base.in_features, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        b = a.new_zeros(base.out_features, r)
        device = stored_tensor(base).device
        self.lora_A, self.lora_B = nn.Parameter(a.to(device)), nn.Parameter(b.to(device))
        self.dropout = nn.Dropout(options.lora_dropout)
        # B is zero, so the rows of W + delta W are as long as those of W.
        magnitude = nn.Parameter(_row_norms(dense_weight(base))) if options.use_dora else None
        self.lora_magnitude_vector = magnitude

    def delta_weight(self, base: AnyLinear) -> Tensor:
        """The update of the weight of `base`: (out, in), float32."""
        delta = self.scaling * (self.lora_B @ self.lora_A)
        if self.lora_magnitude_vector is None:
            return delta
        weight = dense_weight(base)
        return self._row_scale(base).unsqueeze(-1) * (weight + delta) - weight

    def forward(
        self, x: Tensor, y: Tensor, base: AnyLinear, base_output: Tensor, share: float
    ) -> Tensor:
        """Return y plus the adapter's output, without forming the weight update.

        y may be overwritten. Dropout applies to the input of the low-rank product; with DoRA, not
        to the base's part.

        Args:
            x: the layer's input, (..., in).
            y: the output so far, (..., out).
            base, base_output: the layer, and its output for x.
            share: factor on all of it.
        """
        scale = share * self.scaling
        dropout = self.dropout.p if self.dropout.training else 0.0
        if self.lora_magnitude_vector is None:
            return add_low_rank(y, x, self.lora_A, self.lora_B, scale, dropout)
        delta = low_rank(x, self.lora_A, self.lora_B, scale, dropout).to(y.dtype)
        lengths = self._row_scale(base)  # (out,)
        linear = base_output if base.bias is None else base_output - base.bias
        return y + (share * (lengths - 1)).to(x.dtype) * linear + lengths.to(x.dtype) * delta

    def _row_scale(self, base: AnyLinear) -> Tensor:
        """The factor m / ||W + delta W|| of each row, (out,); the norm has no gradient.

        Liu et al. 2024, sec. 4.3, treat it as a constant, which saves memory.
        """
        assert self.lora_magnitude_vector is not None
        with torch.no_grad():
            adapted = torch.addmm(dense_weight(base), self.lora_B, self.lora_A, alpha=self.scaling)
            norms = _row_norms(adapted)
        return self.lora_magnitude_vector / norms


class LoRALayer(nn.Module):
    """A linear layer with adapters: y = W x + scaling * B A dropout(x).

    (Hu et al. 2021, sec. 4.1.) There may be several adapters; those in `active` are added, each
    with its weight: y = (W + sum_i share_i * delta W_i) x.

    Args:
        base: the layer; it is frozen.
        r: rank R of the first adapter.
        lora_alpha: scaling is lora_alpha / r.
        lora_dropout: probability of dropping an element of the adapter's input in training.
        use_rslora: scaling is lora_alpha / sqrt(r), so that gradients do not shrink as r grows.
        use_dora: also learn the magnitude of each row of the weight.
        adapter_name: of the first adapter.

    Attributes:
        base: the layer that was there before.
        adapters: name -> LoRAAdapter; in a state dict, `adapters.default.lora_A`.
        active: name -> weight of the active adapters.

    Raises:
        OptionError: an option is out of its range, or the name cannot be one.
    """

    def __init__(
        self,
        base: AnyLinear,
        r: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        *,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter_name: str = "default",
    ) -> None:
        super().__init__()
        options = LoRAOptions(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            use_dora=use_dora,
        )
        self.base = base.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self.active: dict[str, float] = {}
        self._unmerged_weight: Tensor | None = None
        self.train(base.training)
        self.add_adapter(adapter_name, options)

    def add_adapter(self, name: str, options: LoRAOptions) -> None:
        """Add a new adapter, and make it the only active one.

        Raises:
            OptionError: the name cannot be one.
        """
        check_adapter_name(name)
        assert name not in self.adapters, name
        assert not self.is_merged
        # New modules are in training mode, which would enable dropout in a model in eval mode.
        self.adapters[name] = LoRAAdapter(self.base, options).train(self.training)
        self.active = {name: 1.0}

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def is_merged(self) -> bool:
        return self._unmerged_weight is not None

    @property
    def unmerged_weight(self) -> Tensor:
        """The base's own weight, (out, in), whether adapters are merged into it or not."""
        if self._unmerged_weight is not None:
            return self._unmerged_weight
        return (
            stored_tensor(self.base)
            if isinstance(self.base, nn.Linear)
            else dense_weight(self.base)
        )

    def adapter(self, name: str) -> LoRAAdapter:
        adapter = self.adapters[name]
        assert isinstance(adapter, LoRAAdapter)
        return adapter

    def delta_weight(self, name: str = "default") -> Tensor:
        """An adapter's update of the base's weight, with weight 1: (out, in), float32."""
        assert not self.is_merged, "the base's own weight is not in its place"
        return self.adapter(name).delta_weight(self.base)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the base's dtype."""
        base_output: Tensor = self.base(x)
        if self.is_merged:
            return base_output
        y = base_output.clone() if self._reads_again() else base_output
        for name, share in self.active.items():
            y = self.adapters[name](x, y, self.base, base_output, share)
        return y

    def _reads_again(self) -> bool:
        """Whether a hook or DoRA reads the base's output after adapters have written to it."""
        hooks = self.base._forward_hooks or nn.modules.module._global_forward_hooks
        return bool(hooks) or any(self.adapter(name).options.use_dora for name in self.active)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + sum_i share_i * delta W_i, computed in float32 and rounded once to W's dtype.

        Raises:
            MinllamaError: it has NaN or infinite values, or the base is quantized.
        """
        check_trainable(self.base)
        weight = dense_weight(self.base)
        for name, share in self.active.items():
            weight = weight + share * self.delta_weight(name)
        weight = weight.to(stored_tensor(self.base).dtype)
        if not torch.isfinite(weight).all():
            kind = str(weight.dtype).removeprefix("torch.")
            raise MinllamaError(
                f"the merged weight has NaN or infinite values in {kind}: the adapter's training "
                "diverged, or a wider dtype is needed"
            )
        return weight

    def merge(self) -> None:
        """Replace the base's weight by `merged_weight`, and keep the original for `unmerge`.

        It could not be computed back: a rounded sum cannot be undone by subtraction.
        """
        assert isinstance(self.base, nn.Linear)
        merged, weight = self.merged_weight(), self.base.weight
        self._unmerged_weight = weight.data
        weight.data = merged  # the old weight is not written to: it may be a memory-mapped file

    def unmerge(self) -> None:
        """Restore the weight from before `merge`, bit for bit."""
        assert self._unmerged_weight is not None
        assert isinstance(self.base, nn.Linear)
        weight = self.base.weight
        # The model may have been moved to another device meanwhile.
        weight.data = self._unmerged_weight.to(weight.device, weight.dtype)
        self._unmerged_weight = None

    def extra_repr(self) -> str:
        return f"active={self.active}, merged={self.is_merged}"


def _row_norms(weight: Tensor) -> Tensor:
    """||w_i|| of each row, (out, in) -> (out,); bounded from below, so that it can divide."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1)
    return norms.clamp(min=torch.finfo(torch.float32).tiny)


def check_adapter_name(name: str) -> None:
    """Check a name: it becomes part of state dict keys, and must not hide an attribute of
    ModuleDict.

    Raises:
        OptionError: it cannot be one.
    """
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict(), name):
        raise OptionError(
            "adapter_name must be letters, digits, _ and -, and not a module attribute of "
            f"torch, not {name!r}"
        )
