"""Convert between PEFT's adapter_config.json and LoRAOptions.

Settings that minllama does not implement are refused: an adapter that is only partly applied
computes something that nobody trained. `minllama.checkpoints.peft` and `minllama.lora.peft_files`
call it.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from minllama.checkpoints.json_object import read_object
from minllama.checkpoints.module_patterns import first_matches
from minllama.errors import CheckpointError, naming
from minllama.options import LoRAOptions

CONFIG_FILE = "adapter_config.json"
HEAD = "score"
"""The name of a sequence classifier's head on a transformers Llama."""

CLASSIFICATION, LANGUAGE_MODEL = "SEQ_CLS", "CAUSAL_LM"
_MAX_BYTES = 2**22
_TASKS = (CLASSIFICATION, LANGUAGE_MODEL, "FEATURE_EXTRACTION", None)
_HEADS = ("classifier", HEAD)  # both are what PEFT writes; a Llama has only the second

# Other initializations. The rest (pissa, olora, loftq, corda) change the base.
_INITIAL_WEIGHTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# Any other is a regular expression; the file's tensors show which layers it matched.
_PLAIN_LAYERS: tuple[Any, ...] = (None, "", [], "layers", ["layers"])
_READ = {
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
# Settings of training, initialization or other kinds of layers: they do not affect outputs.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "velora_config",
}


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter's config in PEFT's terms; modules have Hugging Face's names.

    Attributes:
        options: rank, scale and kind.
        targets: names, or ends of names, of the adapted modules; None for a regular expression,
            which is untrusted and not evaluated; the file's tensors determine the modules instead.
        excluded: names that `targets` does not mean.
        layers: indices of the adapted layers; None for all.
        ranks, alphas: regular expression -> rank or lora_alpha of the modules that it matches and
            no earlier one does.
        task_type: SEQ_CLS, CAUSAL_LM, FEATURE_EXTRACTION or None.
        base_model_name: its base model; None if not given.
    """

    options: LoRAOptions
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    ranks: Mapping[str, Any] = field(default_factory=dict)
    alphas: Mapping[str, Any] = field(default_factory=dict)
    task_type: str | None = None
    has_head: bool = False
    base_model_name: str | None = None

    def adapts(self, module: str) -> bool:
        """Whether a linear layer, such as `model.layers.0.self_attn.q_proj`, is adapted."""
        assert self.targets is not None
        if any(_is_called(module, name) for name in self.excluded):
            return False
        if module in self.targets:  # named in full: regardless of the selected layers
            return True
        if self.layers is not None and _layer_of(module) not in self.layers:
            return False
        return "all-linear" in self.targets or any(_is_called(module, t) for t in self.targets)

    def options_of(self, modules: Sequence[str]) -> list[LoRAOptions]:
        """The options of each module: with its own rank and scale, if it has them.

        Args:
            modules: full names from the model's root, as in PEFT.

        Raises:
            MinllamaError: a pattern cannot be matched, or its value is not a rank or scale.
        """
        ranks = _values_by_pattern("rank_pattern", self.ranks, modules, self.options.r)
        alphas = _values_by_pattern("alpha_pattern", self.alphas, modules, self.options.lora_alpha)
        return [
            replace(self.options, r=r, lora_alpha=alpha)
            for r, alpha in zip(ranks, alphas, strict=True)
        ]


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read a folder's adapter_config.json.

    Raises:
        CheckpointError: it is missing or damaged, or needs something that minllama does not
            support.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {CONFIG_FILE}; name a PEFT adapter's folder")
    raw = read_object(path, max_bytes=_MAX_BYTES)
    with naming(path):
        _refuse_unsupported(raw)
        return _parse(raw)


def write_adapter_config(folder: Path, config: AdapterConfig) -> None:
    """Write adapter_config.json into a folder."""
    assert config.targets is not None
    options = asdict(config.options)
    content = {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name,
        "inference_mode": True,
        **options,
        "lora_alpha": _plain(config.options.lora_alpha),
        "target_modules": list(config.targets),
        "layers_to_transform": None if config.layers is None else list(config.layers),
        "layers_pattern": None if config.layers is None else "layers",
        "rank_pattern": dict(config.ranks),
        "alpha_pattern": {name: _plain(alpha) for name, alpha in config.alphas.items()},
        "modules_to_save": list(_HEADS) if config.has_head else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def describe(
    modules: Mapping[str, LoRAOptions], *, base_model_name: str | None, has_head: bool
) -> AdapterConfig:
    """The config of an adapter from the options of its modules.

    Args:
        modules: Hugging Face's name -> options, which agree in all but rank and scale.
        base_model_name: its base model.
        has_head: whether it includes a sequence classifier's head.
    """
    ranks = {name: options.r for name, options in modules.items()}
    alphas = {name: options.lora_alpha for name, options in modules.items()}
    common = replace(
        next(iter(modules.values())), r=_commonest(ranks), lora_alpha=_commonest(alphas)
    )
    # In most adapters each layer has the same modules; else each is named in full.
    layers = sorted({_layer_of(name) for name in modules})
    ends = sorted({name.rpartition(".")[2] for name in modules})
    is_regular = len(modules) == len(layers) * len(ends)
    return AdapterConfig(
        options=common,
        targets=tuple(ends if is_regular else modules),
        layers=tuple(layers) if is_regular else None,
        ranks={name: r for name, r in ranks.items() if r != common.r},
        alphas={name: alpha for name, alpha in alphas.items() if alpha != common.lora_alpha},
        task_type=CLASSIFICATION if has_head else LANGUAGE_MODEL,
        has_head=has_head,
        base_model_name=base_model_name,
    )


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(
            f"an adapter of type {raw.get('peft_type')!r}; only LORA (with rsLoRA and DoRA) is "
            "supported; merge the adapter with PEFT"
        )
    values: dict[str, tuple[Any, ...]] = {
        "bias": (None, "none"),
        "init_lora_weights": _INITIAL_WEIGHTS,
        "task_type": _TASKS,
    }
    refused = [f"{key}={raw[key]!r}" for key, known in values.items() if raw.get(key) not in known]
    refused += [
        f"{key}={value!r}"[:100]
        for key, value in raw.items()
        if key not in _READ | _WITHOUT_EFFECT and value not in (None, False, [], {}, "")
    ]
    if extra := [name for name in _names(raw, "modules_to_save") or () if name not in _HEADS]:
        refused.append(f"modules_to_save={extra!r}")
    if refused:
        raise CheckpointError(
            f"not supported: {', '.join(refused)}; merge the adapter into its base with PEFT "
            "(merge_and_unload) and load the result"
        )


def _parse(raw: Mapping[str, Any]) -> AdapterConfig:
    options = LoRAOptions(
        # A key that an older PEFT did not write has PEFT's default, which is not always ours.
        r=raw.get("r", 8),
        lora_alpha=raw.get("lora_alpha", 8),
        lora_dropout=raw.get("lora_dropout", 0.0),
        use_rslora=raw.get("use_rslora", False),
        use_dora=raw.get("use_dora", False),
    )
    targets = raw.get("target_modules")
    by_pattern = isinstance(targets, str) and targets.lower() != "all-linear"
    by_pattern = by_pattern or isinstance(raw.get("exclude_modules"), str) or targets is None
    by_pattern = by_pattern or raw.get("layers_pattern") not in _PLAIN_LAYERS
    task = raw.get("task_type")
    base = raw.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise CheckpointError(f"base_model_name_or_path must be a string, not {base!r}")
    return AdapterConfig(
        options=options,
        targets=None if by_pattern else _targets(raw),
        excluded=() if by_pattern else _names(raw, "exclude_modules") or (),
        layers=_layers(raw.get("layers_to_transform")),
        ranks=_pattern(raw, "rank_pattern"),
        alphas=_pattern(raw, "alpha_pattern"),
        task_type=task,
        # PEFT adds the head to `modules_to_save` of every sequence classifier, named or not.
        has_head=task == CLASSIFICATION or HEAD in (_names(raw, "modules_to_save") or ()),
        base_model_name=base,
    )


def _targets(raw: Mapping[str, Any]) -> tuple[str, ...]:
    if isinstance(raw["target_modules"], str):
        return ("all-linear",)
    return _names(raw, "target_modules") or ()


def _names(raw: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    names = raw.get(key)
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{key} must be a list of names, not {names!r}"[:200])
    return tuple(names)


def _layers(layers: Any) -> tuple[int, ...] | None:
    if layers is None or layers == []:
        return None
    layers = layers if isinstance(layers, list) else [layers]
    if not all(type(layer) is int for layer in layers):
        raise CheckpointError(f"layers_to_transform must be integers, not {layers!r}"[:200])
    return tuple(layers)


def _pattern(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    pattern = raw.get(key) or {}
    if not isinstance(pattern, dict):
        raise CheckpointError(f"{key} must be an object, not {pattern!r}"[:200])
    return pattern


def _is_called(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _values_by_pattern(
    setting: str, pattern: Mapping[str, Any], modules: Sequence[str], default: Any
) -> list[Any]:
    values = list(pattern.values())
    indices = first_matches(setting, list(pattern), modules) if values else [None] * len(modules)
    return [default if index is None else values[index] for index in indices]


def _layer_of(module: str) -> int:
    """The number in `model.layers.3.mlp.up_proj`, or in `layers.3.mlp.up_proj`."""
    return int(module.partition("layers.")[2].partition(".")[0])


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _plain(number: float) -> float:
    """4 rather than 4.0: lora_alpha is an integer in PEFT, and some readers require it."""
    return int(number) if number == int(number) else number
