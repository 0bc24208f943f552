"""Convert between a Llama's config and the `llama.*` keys of a GGUF file.

The keys have llama.cpp's meaning; `rope_freqs.weight`, a divisor for each rotary frequency, is part
of the config. Errors do not name the file; `minllama.checkpoints.gguf`, the caller, adds it.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from minllama.errors import CheckpointError, MinllamaError
from minllama.model.config import LlamaConfig, RopeScaling

ARCHITECTURE = "llama"
ORIGINAL_LEN = "rope.scaling.original_context_length"
LLAMA3_ORIGINAL_LEN = 8192
# Tolerance of stored divisors by Llama 3.1's rule, since converters compute in float32.
DIVISOR_TOLERANCE = 1e-4
MAX_U32 = 2**32 - 1
MAX_F32 = 3.4028234663852886e38
# Keys that llama.cpp reads for other architectures only, with their neutral values.
NEUTRAL = {
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_attn_factor": (-1, 1),
    "rope.scaling.yarn_beta_fast": (-1, 32),
    "rope.scaling.yarn_beta_slow": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
}


class Keys:
    """The `llama.*` keys of one file, with type checks; keeps track of the keys that were read.

    Keys with a value per layer (a list) are refused: minllama's layers are equal.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields
        self.read_keys: set[str] = set()

    def integer(self, key: str, default: int | None = None) -> int:
        value: int = self._get(key, default, (int,), "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return shortest_float(self._get(key, default, (int, float), "a number"))

    def flag(self, key: str, default: bool) -> bool:
        value: bool = self._get(key, default, (bool,), "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value: str = self._get(key, default, (str,), "a string")
        return value

    def unread(self) -> list[str]:
        """The `llama.*` keys that were not read."""
        prefix = f"{ARCHITECTURE}."
        return sorted(k for k in self.fields if k.startswith(prefix) and k not in self.read_keys)

    def _get(self, key: str, default: Any, types: tuple[type, ...], kind: str) -> Any:
        key = f"{ARCHITECTURE}.{key}"
        self.read_keys.add(key)
        value = self.fields.get(key, default)
        if value is None:
            raise CheckpointError(f"the key {key} is missing; convert the model to GGUF again")
        if isinstance(value, Sequence) and not isinstance(value, str):
            if not len(value) or any(item != value[0] for item in value):
                raise CheckpointError(f"{key} differs between layers; a Llama has equal layers")
            value = value[0]
        if type(value) not in types:
            raise CheckpointError(f"{key} must be {kind}, not {value!r}")
        return value


def check_architecture(fields: Mapping[str, Any]) -> None:
    """Refuse anything but a Llama.

    Raises:
        CheckpointError: the message names the architecture.
    """
    architecture = fields.get("general.architecture")
    if architecture is None:
        raise CheckpointError(
            "the key general.architecture is missing; so it is not a language model"
        )
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"the architecture is {architecture!r}, but minllama runs only {ARCHITECTURE!r}; "
            "choose a Llama model"
        )


def check_has_weights(fields: Mapping[str, Any], n_tensors: int) -> None:
    """Refuse a file that contains only a vocabulary, as llama.cpp's --vocab-only writes.

    Raises:
        CheckpointError: the message says how to use it.
    """
    if n_tensors == 0 and "tokenizer.ggml.tokens" in fields:
        raise CheckpointError(
            "it contains a vocabulary but no weights; pass it with --tokenizer, and another "
            "file as the model"
        )


def config_from_keys(
    keys: Keys,
    *,
    vocab_size: int,
    rope_freqs: Sequence[float] | None,
    tie_embeddings: bool,
    attention_bias: bool,
    ffn_bias: bool,
) -> LlamaConfig:
    """A LlamaConfig from a file's keys.

    Args:
        keys: the file's.
        vocab_size: rows of its embedding, for files without the key.
        rope_freqs: the content of `rope_freqs.weight`, (C / 2,); `None` without it.
        tie_embeddings: whether the file has no output matrix.
        attention_bias: whether it has biases there.
        ffn_bias: whether it has biases there.

    Raises:
        MinllamaError: a key is missing, or has a value that minllama does not support.
    """
    if (n_experts := keys.integer("expert_count", 0)) > 0:
        raise CheckpointError(
            f"it is a mixture of {n_experts} experts, but minllama runs only dense Llamas"
        )
    n_heads, dim = keys.integer("attention.head_count"), keys.integer("embedding_length")
    if n_heads < 1:
        raise CheckpointError(f"llama.attention.head_count must be above 0, not {n_heads}")
    head_dim = keys.integer("attention.key_length", dim // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (width := keys.integer(key, head_dim)) != head_dim:
            raise CheckpointError(
                f"llama.{key} is {width} but heads are {head_dim} wide; minllama needs values as "
                "wide as keys, and rotates whole heads"
            )
    config = LlamaConfig(
        dim=dim,
        n_layers=keys.integer("block_count"),
        n_heads=n_heads,
        n_kv_heads=keys.integer("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        hidden_dim=keys.integer("feed_forward_length"),
        vocab_size=keys.integer("vocab_size", vocab_size),
        max_seq_len=keys.integer("context_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope_theta=keys.number("rope.freq_base", 10000.0),
        causal=keys.flag("attention.causal", default=True),
        tie_embeddings=tie_embeddings,
        attention_bias=attention_bias,
        ffn_bias=ffn_bias,
    )
    return config.replace(rope_scaling=_scaling_from_keys(keys, config, rope_freqs))


def keys_from_config(config: LlamaConfig) -> tuple[dict[str, Any], list[float] | None]:
    """The inverse of `config_from_keys`: keys with the prefix `llama.`, and rope_freqs or `None`.

    Raises:
        MinllamaError: llama.cpp cannot represent this config; the message names the field.
    """
    keys: dict[str, Any] = {
        "block_count": config.n_layers,
        "context_length": config.max_seq_len,
        "embedding_length": config.dim,
        "feed_forward_length": config.hidden_dim,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.freq_base": float(config.rope_theta),
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    if not config.causal:
        keys["attention.causal"] = False
    scaling_keys, rope_freqs = _scaling_to_keys(config)
    keys |= scaling_keys
    for key, value in keys.items():
        if type(value) in (int, float) and value > (MAX_U32 if type(value) is int else MAX_F32):
            raise MinllamaError(f"{key} is {value}, which does not fit into GGUF's 32 bits")
    return {f"{ARCHITECTURE}.{key}": value for key, value in keys.items()}, rope_freqs


def llama3_divisors(
    theta: float, head_dim: int, factor: float, original_len: int, low: float, high: float
) -> list[float]:
    """Divisor of each rotary frequency by Llama 3.1's rule, (C / 2,).

    Frequencies with fewer than `low` rotations over the original context are divided by `factor`,
    those with more than `high` stay, and those between are interpolated (Meta's reference code,
    `apply_scaling`).
    """
    divisors = []
    for pair in range(head_dim // 2):
        rotations = original_len * theta ** (-2 * pair / head_dim) / (2 * math.pi)
        unscaled = min(max((rotations - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - unscaled) / factor + unscaled))
    return divisors


def shortest_float(value: float) -> float:
    """The shortest decimal that is the same float32, so that 1e-5 is read back as 1e-5."""
    try:
        packed = struct.pack("f", value)
    except OverflowError:  # a float64 beyond float32, for the config to refuse
        return value
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next((c for c in candidates if struct.pack("f", c) == packed), value)


def _scaling_from_keys(
    keys: Keys, config: LlamaConfig, rope_freqs: Sequence[float] | None
) -> RopeScaling | None:
    kind = keys.text("rope.scaling.type", "linear")  # llama.cpp's default, at a factor of 1
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(f"rope scaling {kind!r} is unknown; known: none, linear, yarn")
    for key, values in NEUTRAL.items():
        if (value := keys.number(key, values[0])) not in values:
            raise CheckpointError(
                f"llama.{key} is {value:g}, which llama.cpp ignores for a Llama; so it is "
                "unclear what this model computes"
            )
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0))
    if factor == 0 or kind == "none":
        factor = 1.0
    sharpening = keys.number("rope.scaling.attn_factor", 1.0)
    if rope_freqs is not None and any(f != 1 for f in rope_freqs):
        if kind == "yarn" or sharpening != 1:
            raise CheckpointError("both rope_freqs.weight and yarn scale the rotary angles")
        return _scaling_from_divisors(keys, config, [factor * f for f in rope_freqs])
    if kind == "yarn" and (factor != 1 or sharpening != 1):
        paper = _paper_attention_factor(factor)
        return RopeScaling(
            "yarn",
            factor=factor,
            original_max_seq_len=keys.integer(ORIGINAL_LEN, config.max_seq_len),
            attention_factor=None if sharpening == 1 else shortest_float(sharpening * paper),
        )
    if sharpening != 1:
        raise CheckpointError("llama.rope.scaling.attn_factor is set without yarn")
    return RopeScaling("linear", factor=factor) if factor != 1 else None


def _scaling_from_divisors(keys: Keys, config: LlamaConfig, divisors: list[float]) -> RopeScaling:
    """Llama 3.1's rule if the divisors follow it, else the divisors themselves."""
    if len(divisors) != config.head_dim // 2:
        raise CheckpointError(
            f"rope_freqs.weight has {len(divisors)} divisors for {config.head_dim // 2} "
            "frequencies (head_dim / 2)"
        )
    divisors = [shortest_float(divisor) for divisor in divisors]
    factor = divisors[-1]  # the slowest frequency is divided in full
    original_len = keys.integer(ORIGINAL_LEN, LLAMA3_ORIGINAL_LEN)
    if 1 < factor < math.inf and original_len > 0:
        rule = llama3_divisors(config.rope_theta, config.head_dim, factor, original_len, 1.0, 4.0)
        if all(
            math.isclose(divisor, expected, rel_tol=DIVISOR_TOLERANCE)
            for divisor, expected in zip(divisors, rule, strict=True)
        ):
            return RopeScaling("llama3", factor=factor, original_max_seq_len=original_len)
    return RopeScaling("factors", factors=tuple(divisors))


def _scaling_to_keys(config: LlamaConfig) -> tuple[dict[str, Any], list[float] | None]:
    scaling = config.rope_scaling
    if scaling is None:
        return {}, None
    keys = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
    match scaling.kind:
        case "linear":
            return keys, None
        case "yarn":
            return keys | _yarn_keys(scaling), None
        case "llama3":
            assert scaling.original_max_seq_len is not None
            divisors = llama3_divisors(
                config.rope_theta,
                config.head_dim,
                scaling.factor,
                scaling.original_max_seq_len,
                scaling.low_freq_factor,
                scaling.high_freq_factor,
            )
            return {ORIGINAL_LEN: scaling.original_max_seq_len}, divisors
        case "factors":
            return {}, list(scaling.factors)
    raise MinllamaError(
        f"GGUF cannot represent rope scaling {scaling.kind!r}; convert to hf instead"
    )


def _yarn_keys(scaling: RopeScaling) -> dict[str, Any]:
    fixed = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    for name, value in fixed.items():
        if getattr(scaling, name) != value:
            raise MinllamaError(
                f"llama.cpp computes yarn with {name} {value}, and this model has "
                f"{getattr(scaling, name)}; convert to hf instead"
            )
    factor = scaling.attention_factor
    paper_factor = _paper_attention_factor(scaling.factor)
    if factor is None:
        factor = paper_factor
        if scaling.mscale and scaling.mscale_all_dim:
            factor = _paper_attention_factor(scaling.factor, scaling.mscale)
            factor /= _paper_attention_factor(scaling.factor, scaling.mscale_all_dim)
    keys: dict[str, Any] = {ORIGINAL_LEN: scaling.original_max_seq_len}
    if factor != paper_factor:
        keys["rope.scaling.attn_factor"] = factor / paper_factor
    return keys


def _paper_attention_factor(factor: float, weight: float = 1.0) -> float:
    """Peng et al. 2023, eq. 22, which llama.cpp multiplies `attn_factor` by."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
