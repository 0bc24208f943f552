"""The shape and constants of a Llama, checked on construction.

Field names are Meta's; each checkpoint reader translates its own names.
"""

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from minllama.errors import MinllamaError

ROPE_SCALINGS = ("linear", "dynamic", "yarn", "llama3", "factors")

MAX_COUNT = 2**53  # up to which float64 has every integer, and so what reads JSON as floats
LARGEST = 1e6  # of a number that stretches positions: no model has a thousandth of it


@dataclass(frozen=True)
class RopeScaling:
    """How rotary angles are stretched to reach beyond the context of the pre-training.

    Attributes:
        kind: `linear` (Chen et al. 2023, positions divided by `factor`), `dynamic` (NTK-aware base
            that grows with the text), `yarn` (Peng et al. 2023), `llama3` (Llama 3.1's piecewise
            rule) or `factors` (a divisor for each frequency, as GGUF files store them).
        factor: how many times the original context is reached; > 0.
        original_max_seq_len: the context of the pre-training, in tokens (yarn, llama3).
        low_freq_factor: wavelengths above original_max_seq_len / low_freq_factor are divided by
            `factor` in full (llama3).
        high_freq_factor: wavelengths below original_max_seq_len / high_freq_factor stay (llama3).
        beta_fast: rotations over the original context above which a frequency stays (yarn).
        beta_slow: rotations below which a frequency is divided by `factor` in full (yarn).
        attention_factor: multiplies cosines and sines (yarn); `None` derives it from `factor`, and
            from `mscale` / `mscale_all_dim` if both are given.
        mscale: numerator's weight in yarn's attention factor; `None` for the paper's rule.
        mscale_all_dim: denominator's weight; `None` for the paper's rule.
        truncate: round yarn's ramp to whole dimensions, as the paper's code does.
        factors: one divisor for each of the C / 2 frequencies (factors).
    """

    kind: str
    factor: float = 1.0
    original_max_seq_len: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ROPE_SCALINGS:
            raise MinllamaError(
                f"rope scaling {self.kind!r} is unknown; known: {', '.join(ROPE_SCALINGS)}"
            )
        self._settle("factor")
        if self.kind in ("yarn", "llama3"):
            if self.original_max_seq_len is None:
                raise MinllamaError(f"rope scaling {self.kind!r} needs original_max_seq_len")
            original: Any = self.original_max_seq_len
            if isinstance(original, float) and original.is_integer():  # JSON's 8192.0
                object.__setattr__(self, "original_max_seq_len", int(original))
            _require_count("rope scaling: original_max_seq_len", self.original_max_seq_len)
        self._settle("low_freq_factor")
        self._settle("high_freq_factor")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise MinllamaError(
                f"rope scaling: low_freq_factor ({self.low_freq_factor:g}) must be above 0 and "
                f"below high_freq_factor ({self.high_freq_factor:g})"
            )
        for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                self._settle(name)
                if (value := getattr(self, name)) > LARGEST:
                    raise MinllamaError(f"rope scaling: {name} ({value:g}) is above {LARGEST:g}")
        _require_flag("rope scaling: truncate", self.truncate)
        divisors = (_positive("rope scaling: each of factors", factor) for factor in self.factors)
        object.__setattr__(self, "factors", tuple(divisors))

    def _settle(self, name: str) -> None:
        object.__setattr__(self, name, _positive(f"rope scaling: {name}", getattr(self, name)))


@dataclass(frozen=True)
class LlamaConfig:
    """The shape and constants of one Llama (Touvron et al. 2023a, sec. 2.2; 2023b, sec. 2.2).

    Attributes:
        dim: width D of the residual stream.
        n_layers: number of layers.
        n_heads: number H of query heads.
        n_kv_heads: number K of key and value heads; `None` means n_heads (no grouping).
        head_dim: width C of a head, even; `None` means dim / n_heads.
        hidden_dim: width F inside the feed-forward; `None` means Meta's rule, 8/3 dim rounded up
            to a multiple of 256.
        vocab_size: number V of tokens.
        max_seq_len: longest text in tokens that positions are defined for.
        norm_eps: epsilon under the root of RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: scaling of the rotary frequencies; `None` for none.
        tie_embeddings: the output matrix is the embedding matrix.
        attention_bias: biases on query, key, value and output projections.
        ffn_bias: biases on the three projections of the feed-forward.
        causal: a token attends to itself and earlier tokens; False for a bidirectional encoder.
        dropout: probability for embeddings, attention weights and both residual branches, while
            training.

    Raises:
        MinllamaError: values contradict each other; the message names them.
    """

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    n_kv_heads: int = None  # type: ignore[assignment]  # settled in __post_init__, never None after
    head_dim: int = None  # type: ignore[assignment]
    hidden_dim: int = None  # type: ignore[assignment]
    max_seq_len: int = 2048
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    ffn_bias: bool = False
    causal: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "vocab_size", "max_seq_len"):
            _require_count(name, getattr(self, name))
        self._settle("n_kv_heads", self.n_heads)
        if not self.head_dim and self.dim % self.n_heads:
            raise MinllamaError(
                f"dim ({self.dim}) must be divisible by n_heads ({self.n_heads}); or set head_dim"
            )
        self._settle("head_dim", self.dim // self.n_heads)
        self._settle("hidden_dim", meta_hidden_dim(self.dim, multiple_of=256))
        if self.n_heads % self.n_kv_heads:
            raise MinllamaError(
                f"n_heads ({self.n_heads}) must be divisible by n_kv_heads ({self.n_kv_heads})"
            )
        if self.head_dim % 2:
            raise MinllamaError(
                f"head_dim ({self.head_dim}) must be even: rotary embeddings rotate pairs"
            )
        for name in ("norm_eps", "rope_theta"):
            object.__setattr__(self, name, _positive(name, getattr(self, name)))
        for name in ("tie_embeddings", "attention_bias", "ffn_bias", "causal"):
            _require_flag(name, getattr(self, name))
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise MinllamaError(f"dropout must be in [0, 1), not {self.dropout!r}")
        scaling = self.rope_scaling
        if scaling is not None and not isinstance(scaling, RopeScaling):
            raise MinllamaError(f"rope_scaling must be a RopeScaling or None, not {scaling!r}")
        if scaling and scaling.kind == "factors" and len(scaling.factors) != self.head_dim // 2:
            raise MinllamaError(
                f"rope scaling: {len(scaling.factors)} factors for {self.head_dim // 2} "
                "frequencies (head_dim / 2)"
            )
        if scaling and scaling.kind == "yarn" and self.rope_theta <= 1:
            raise MinllamaError(f"yarn needs rope_theta above 1, not {self.rope_theta!r}")
        if scaling and scaling.kind == "dynamic":
            if self.head_dim <= 2:
                raise MinllamaError(f"dynamic scaling needs head_dim above 2, not {self.head_dim}")
            if not 1 <= scaling.factor <= LARGEST:
                raise MinllamaError(
                    f"dynamic scaling needs a factor from 1 to {LARGEST:g}, not {scaling.factor:g}"
                )

    def _settle(self, name: str, default: int) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, default)
        _require_count(name, getattr(self, name))

    @property
    def context_len(self) -> int:
        """Longest text in tokens; dynamic scaling reaches `factor` times max_seq_len."""
        if self.rope_scaling is not None and self.rope_scaling.kind == "dynamic":
            return int(self.max_seq_len * self.rope_scaling.factor)
        return self.max_seq_len

    def has_defaults_beyond(self, fields: Collection[str]) -> bool:
        """Whether every field other than these has its default.

        Engines that compute without the modules list the fields that they implement, so that models
        with newer fields run by the modules instead of ignoring the field.
        """
        return all(
            getattr(self, field.name) == field.default
            for field in dataclasses.fields(self)
            if field.name not in fields
        )

    def replace(self, **changes: Any) -> "LlamaConfig":
        """A copy with some fields changed, checked again."""
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := sorted(set(changes) - known):
            raise MinllamaError(
                f"unknown config field {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        return dataclasses.replace(self, **changes)


def meta_hidden_dim(dim: int, multiple_of: int, multiplier: float | None = None) -> int:
    """Feed-forward width by Meta's rule: 8/3 dim, scaled, rounded up to `multiple_of`."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def _require_count(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise MinllamaError(f"{name} must be an integer above 0, not {_shown(value)}")
    if value > MAX_COUNT:
        raise MinllamaError(f"{name} ({_shown(value)}) exceeds the limit of {MAX_COUNT}")


def _positive(name: str, value: Any) -> float:
    """A number above 0 as a float: torch does not support integers beyond 64 bits."""
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (OverflowError, TypeError):  # an integer beyond float64, or no number at all
        number = math.nan
    if not math.isfinite(number) or number <= 0:
        raise MinllamaError(f"{name} must be a finite number above 0, not {_shown(value)}")
    return number


def _shown(value: Any) -> str:
    """A value for a message, shortened: JSON may contain an integer of a thousand digits."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write integers of more than 4300
        return "an integer of thousands of digits"
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def _require_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise MinllamaError(f"{name} must be true or false, not {_shown(value)}")
