"""Rotary position embeddings: frequencies, their scalings, and the rotation itself.

Used by the model's attention and by the engines; positions are an argument.
"""

import math

import torch
from torch import Tensor, nn

from minllama.kernels.dispatch import accelerated, is_plain
from minllama.model.config import LlamaConfig, RopeScaling

_FIRST_TABLE_LEN = 2048


class RotaryEmbedding(nn.Module):
    """Rotates pairs of a head's channels by an angle proportional to the position.

    RoFormer (Su et al. 2021), sec. 3.2.2, eq. 15 and 34. Pairs are interleaved, (x0, x1), (x2, x3)
    and so on, as there and in Meta's code. One instance serves all layers of a model: its table of
    unit vectors is built once per device, and again only when texts outgrow it.

    Dynamic scaling, as in transformers, rotates all of a forward pass with the base of its longest
    text, and cached keys keep the base of their pass. So beyond max_seq_len, and only with this
    scaling, logits depend slightly on the batch and on how a text is split into passes.

    The table is float32 whatever the model's dtype: bfloat16 cannot distinguish position 8191 from
    8160.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        # Not buffers: `model.to(dtype)` must not round them, nor a meta device swallow them.
        self._tables: dict[torch.device, Tensor] = {}

    def forward(self, positions: Tensor, text_len: int | None = None) -> Tensor:
        """Unit vectors e^(i m theta) for each position m.

        Args:
            positions: (B, T) or (T,), integers >= 0.
            text_len: an upper bound of the positions, if known: it avoids a device sync for the
                largest.

        Returns:
            Complex64 (B, T, 1, C / 2) or (T, 1, C / 2): the 1 broadcasts over the heads.
        """
        if text_len is None:
            text_len = int(positions.max()) + 1
        table = self.fixed_table(text_len, positions.device)
        if table is None:
            return _unit_vectors(positions, *frequencies(self.config, text_len)).unsqueeze(-2)
        return table[positions].unsqueeze(-2)

    def fixed_table(self, text_len: int, device: torch.device) -> Tensor | None:
        """The result of `table`; None with dynamic scaling, whose base depends on the text."""
        scaling = self.config.rope_scaling
        is_dynamic = scaling is not None and scaling.kind == "dynamic"
        if is_dynamic and text_len > self.config.max_seq_len:
            return None
        return self.table(text_len, device)

    def table(self, text_len: int, device: torch.device) -> Tensor:
        """The rotations of at least the first positions, if they do not depend on the text's
        length.

        Args:
            text_len: how many positions at least.
            device: of the result.

        Returns:
            Complex64 (L, C / 2), L >= text_len; the same tensor until texts outgrow it.
        """
        table = self._tables.get(device)
        if table is None or len(table) < text_len:
            # Doubling, not all of the context at once: a million positions are a gigabyte.
            length = max(
                text_len,
                min(
                    self.config.max_seq_len,
                    _FIRST_TABLE_LEN if table is None else 2 * len(table),
                ),
            )
            every = torch.arange(length, device=device)
            table = _unit_vectors(every, *frequencies(self.config))
            if is_plain(table):  # a fake or traced table must not be stored
                self._tables[device] = table
        return table


@accelerated
def apply_rotary_embedding(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate each pair of channels: RoFormer eq. 34, written as a product of complex numbers.

    Args:
        x: (B, T, H, C), queries or keys.
        rotation: result of `RotaryEmbedding` for their positions.

    Returns:
        (B, T, H, C) in x's dtype; computed in float32.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, T, H, C / 2)
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)  # (B, T, H, C)


def frequencies(config: LlamaConfig, text_len: int | None = None) -> tuple[Tensor, float]:
    """Angle per position of each channel pair, and the factor on cosine and sine.

    Args:
        config: has head_dim, rope_theta and rope_scaling.
        text_len: length of the whole text in tokens, for dynamic scaling.

    Returns:
        Float32 (C / 2,) in radians per position; and yarn's attention factor, 1 for all others.
    """
    scaling, theta, head_dim = config.rope_scaling, config.rope_theta, config.head_dim
    plain = _plain_frequencies(theta, head_dim)
    match scaling.kind if scaling else None:
        case None:
            return plain, 1.0
        case "linear":
            assert scaling is not None
            return plain / scaling.factor, 1.0
        case "dynamic":
            assert scaling is not None
            return _dynamic(config, scaling, max(text_len or 0, config.max_seq_len)), 1.0
        case "llama3":
            assert scaling is not None
            return plain / llama3_factors(plain, scaling), 1.0
        case "factors":
            assert scaling is not None
            return plain / torch.tensor(scaling.factors, dtype=torch.float32), 1.0
        case "yarn":
            assert scaling is not None
            return _yarn(plain, theta, scaling), _yarn_attention_factor(scaling)
        case unknown:
            raise AssertionError(f"unsupported rope scaling: {unknown}")


def llama3_factors(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Divisor of each frequency by Llama 3.1's rule (Grattafiori et al. 2024, and Meta's code).

    Long wavelengths are divided by `factor`, short ones stay, and between the two limits the
    frequency is interpolated linearly in the number of rotations over the original context.

    Args:
        plain: (C / 2,) frequencies, radians per position.
        scaling: has factor, original_max_seq_len, low_freq_factor, high_freq_factor.

    Returns:
        (C / 2,) between 1 and `factor`.
    """
    assert scaling.original_max_seq_len is not None
    rotations = scaling.original_max_seq_len * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    unscaled = ((rotations - low) / (high - low)).clamp(0, 1)  # 1: unchanged, 0: divided in full
    return 1 / ((1 - unscaled) / scaling.factor + unscaled)


def _plain_frequencies(theta: float, head_dim: int) -> Tensor:
    # RoFormer eq. 15: theta_i = 10000^(-2(i-1)/d). In float32 and in this order of operations, as
    # models were trained: a last-bit change is 5e-4 radians at position 8192.
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _dynamic(config: LlamaConfig, scaling: RopeScaling, text_len: int) -> Tensor:
    # NTK-aware: the base grows so that the slowest pair covers the text and the fastest stays.
    c = config.head_dim
    stretch = scaling.factor * text_len / config.max_seq_len - (scaling.factor - 1)
    return _plain_frequencies(config.rope_theta * stretch ** (c / (c - 2)), c)


def _yarn(plain: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    # Peng et al. 2023, sec. 3.2 ("NTK-by-parts"): pairs that turn often stay, pairs that turn less
    # than once are interpolated, with a ramp over the pair's index between the two.
    assert scaling.original_max_seq_len is not None
    n = len(plain)

    def pair_with(rotations: float) -> float:
        """Index of the pair with that many rotations over the original context."""
        wavelengths = scaling.original_max_seq_len / (rotations * 2 * math.pi)  # type: ignore[operator]
        return n * math.log(wavelengths) / math.log(theta)

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * n - 1)
    if low == high:
        high += 0.001  # a ramp of no width is a step, not a division by zero
    interpolated = ((torch.arange(n, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * interpolated + plain * (1 - interpolated)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    """Peng et al. 2023, eq. 22: sharpen attention by 0.1 ln(s) + 1, split evenly over q and k."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def sharpening(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return sharpening(scaling.mscale) / sharpening(scaling.mscale_all_dim)
    return sharpening(1.0)


def _unit_vectors(positions: Tensor, per_position: Tensor, length: float) -> Tensor:
    angles = positions.unsqueeze(-1).float() * per_position.to(positions.device)
    return torch.polar(torch.full_like(angles, length), angles)
