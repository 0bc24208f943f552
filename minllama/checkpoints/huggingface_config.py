"""Convert between Hugging Face's config.json and LlamaConfig."""

from collections.abc import Mapping
from typing import Any

from minllama.errors import MinllamaError
from minllama.model.config import LlamaConfig, RopeScaling
from minllama.tokenizer.vocabulary import Vocabulary

CONFIG_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "attention_bias": "attention_bias",
    "ffn_bias": "mlp_bias",
}
REQUIRED = ("dim", "n_layers", "n_heads", "hidden_dim", "vocab_size")
DEFAULTS = {"max_seq_len": 2048, "norm_eps": 1e-6}  # where transformers' differ from ours

SCALING_KEYS = {
    "factor": "factor",
    "original_max_seq_len": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
}
SCALING_FIELDS = {  # the fields of each kind, as transformers checks them
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_seq_len", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_max_seq_len", "beta_fast", "beta_slow", "attention_factor"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
}
REQUIRED_FIELDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
DEFAULT_THETA = 10000.0

# Keys that do not affect what the model computes.
HARMLESS_KEYS = {
    *("model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout"),
    *("pretraining_tp", "_name_or_path", "is_llama_config", "rope_interleaved", "return_dict"),
    *("transformers.js_config", "_attn_implementation_autoset", "output_attentions"),
    *("output_hidden_states",),
    *("id2label", "label2id", "num_labels", "problem_type"),
    *("is_encoder_decoder", "chunk_size_feed_forward"),
}
READ_KEYS = {
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"),
    *("hidden_act", "quantization_config", "partial_rotary_factor"),
}


def config_from_huggingface(raw: dict[str, Any]) -> LlamaConfig:
    """A LlamaConfig from the content of a config.json.

    Raises:
        MinllamaError: it is not a Llama, lacks a key, or needs something that minllama does not
            support.
    """
    model_type = raw.get("model_type")
    if model_type != "llama":
        raise MinllamaError(
            f"model_type is {model_type!r}, but minllama runs only 'llama'; choose a Llama model"
        )
    if quantization := raw.get("quantization_config"):
        known = isinstance(quantization, dict)
        method = quantization.get("quant_method") if known else quantization
        raise MinllamaError(
            f"the weights are quantized with {method!r}, which is not supported; use the "
            "unquantized checkpoint or a GGUF file"
        )
    if (activation := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise MinllamaError(f"hidden_act is {activation!r}; only 'silu' is supported")
    fields = {ours: raw[theirs] for ours, theirs in CONFIG_KEYS.items() if _given(raw, theirs)}
    if missing := [CONFIG_KEYS[ours] for ours in REQUIRED if ours not in fields]:
        raise MinllamaError(f"{', '.join(missing)} is missing; download the file again")
    fields = DEFAULTS | fields
    rope = _rope_parameters(raw)
    _check_rope(rope, raw)
    return LlamaConfig(
        **fields,
        rope_theta=_first_given(rope.get("rope_theta"), raw.get("rope_theta"), DEFAULT_THETA),
        rope_scaling=_scaling_from_huggingface(rope, raw, fields["max_seq_len"]),
    )


def ignored_keys(raw: dict[str, Any]) -> list[str]:
    """Keys of a config.json that are neither read nor known to be harmless."""
    ignored = sorted(set(raw) - set(CONFIG_KEYS.values()) - READ_KEYS - HARMLESS_KEYS)
    rope = _rope_parameters(raw)
    read = {SCALING_KEYS[field] for field in SCALING_FIELDS.get(_kind(rope), ())}
    unread = sorted(key for key in set(rope) - read - ROPE_KEYS if rope[key] is not None)
    return ignored + [f"{_rope_key(raw)}.{key}" for key in unread]


def rope_contradiction(raw: dict[str, Any]) -> str | None:
    """The `rope_parameters` that `rope_scaling` overrides, for a warning."""
    scaling, parameters = raw.get("rope_scaling"), raw.get("rope_parameters")
    if not scaling or not parameters:
        return None
    changes = {
        key: value
        for key, value in parameters.items()
        if value is not None and key in scaling and scaling[key] not in (None, value)
    }
    if _kind(parameters) != "default" and _kind(parameters) != _kind(scaling):
        changes = {"rope_type": _kind(parameters)} | changes
    elif _kind(parameters) == "default":
        changes.pop("rope_type", None)  # the default type loses no information
    if not changes:
        return None
    differences = ", ".join(f"{key} {value!r}" for key, value in changes.items())
    return (
        f"rope_scaling ({_kind(scaling)}) is used, but rope_parameters beside it has "
        f"{differences}; remove the wrong one"
    )


def _rope_key(raw: Mapping[str, Any]) -> str:
    """The key that takes precedence: as in transformers 5, the older one if it is set."""
    return "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("rope_scaling", "rope_parameters"):
        if raw.get(key) and not isinstance(raw[key], dict):
            raise MinllamaError(f"{key} is {raw[key]!r}"[:100] + ", not a JSON object")
    return raw.get(_rope_key(raw)) or {}


def _check_rope(rope: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    """Refuse rotary settings that are not a Llama's, or ambiguous."""
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise MinllamaError(
            f"{_rope_key(raw)} has separate settings for {', '.join(nested)[:100]}, but all "
            "layers of a Llama are equal; remove that level"
        )
    for where in (rope, raw):
        if (share := _first_given(where.get("partial_rotary_factor"), 1.0)) != 1.0:
            raise MinllamaError(
                f"partial_rotary_factor is {share!r}, but a Llama rotates whole heads (1)"
            )
    if _kind(rope) == "default" and not _given(rope, "rope_type") and _given(rope, "factor"):
        raise MinllamaError(
            f"{_rope_key(raw)} has a factor but no rope_type; add the type of scaling"
        )
    parameters = raw.get("rope_parameters") or {}
    if _rope_key(raw) == "rope_scaling" and not (
        _given(rope, "rope_theta") or _given(raw, "rope_theta")
    ):
        theta = _first_given(parameters.get("rope_theta"), DEFAULT_THETA)
        if theta != DEFAULT_THETA:
            raise MinllamaError(
                "rope_scaling takes precedence but has no rope_theta, and rope_parameters "
                f"beside it has {theta!r}, which transformers then ignores; write rope_theta "
                "into rope_scaling, or put the scaling into rope_parameters"
            )


def _kind(rope: Mapping[str, Any]) -> Any:
    return _first_given(rope.get("rope_type"), rope.get("type"), "default")


def _scaling_from_huggingface(
    rope: Mapping[str, Any], raw: Mapping[str, Any], max_seq_len: int
) -> RopeScaling | None:
    kind = _kind(rope)
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in SCALING_FIELDS:
        raise MinllamaError(
            f"rope scaling {kind!r} is unknown; known: default, {', '.join(SCALING_FIELDS)}"
        )
    fields = {
        ours: rope[SCALING_KEYS[ours]]
        for ours in SCALING_FIELDS[kind]
        if _given(rope, SCALING_KEYS[ours])
    }
    if kind == "yarn":
        for ours in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            if fields.get(ours) == 0:  # transformers treats 0 as unset
                del fields[ours]
        if "truncate" in rope and rope["truncate"] is None:  # and null for false
            fields["truncate"] = False
    if "original_max_seq_len" in SCALING_FIELDS[kind]:
        # The model's value precedes that of the scaling, as in transformers.
        of_model = raw.get("original_max_position_embeddings")
        of_scaling = fields.get("original_max_seq_len")
        fields["original_max_seq_len"] = _first_given(of_model, of_scaling, max_seq_len)
    if kind == "yarn" and "factor" not in fields:
        original = fields["original_max_seq_len"]
        # RopeScaling refuses invalid lengths.
        fields["factor"] = max_seq_len / original if original else 1.0
    required = REQUIRED_FIELDS[kind]
    if missing := [SCALING_KEYS[ours] for ours in required if ours not in fields]:
        raise MinllamaError(f"rope scaling {kind!r} has no {', '.join(missing)}")
    return RopeScaling(kind, **fields)


def config_to_huggingface(
    config: LlamaConfig, dtype: str, vocabulary: Vocabulary | None
) -> dict[str, Any]:
    """The content of a config.json that old and new versions of transformers read alike.

    Raises:
        MinllamaError: the format cannot represent this config.
    """
    if not config.causal:
        raise MinllamaError("a Hugging Face Llama is always causal, but this one is bidirectional")
    raw = {theirs: getattr(config, ours) for ours, theirs in CONFIG_KEYS.items()}
    raw |= {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "torch_dtype": dtype,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
    }
    if scaling := config.rope_scaling:
        if scaling.kind not in SCALING_FIELDS:
            raise MinllamaError(
                f"config.json cannot represent rope scaling {scaling.kind!r}, with a divisor per "
                "frequency; convert to gguf instead"
            )
        fields = {
            SCALING_KEYS[ours]: getattr(scaling, ours) for ours in SCALING_FIELDS[scaling.kind]
        }
        given = {key: value for key, value in fields.items() if value is not None}
        raw["rope_scaling"] = {"rope_type": scaling.kind, **given}
    if vocabulary is not None:
        raw |= {"bos_token_id": vocabulary.bos_id, "eos_token_id": eos_ids(vocabulary)}
    return raw


def eos_ids(vocabulary: Vocabulary) -> int | list[int] | None:
    """One id, or a list if several tokens end a text."""
    ids = dict.fromkeys([vocabulary.eos_id, *vocabulary.stop_ids])
    several = [i for i in ids if i is not None]
    return several if len(several) > 1 else vocabulary.eos_id


def _first_given(*values: Any) -> Any:
    """The first value that is not null."""
    return next((value for value in values if value is not None), None)


def _given(raw: Mapping[str, Any], key: str) -> bool:
    return raw.get(key) is not None
