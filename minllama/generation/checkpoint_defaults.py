"""A checkpoint's recommended sampling: generation_config.json, GGUF's `general.sampling.*`.

Used only on request: `load_generation_options`, or --generation-config.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minllama.checkpoints.gguf_header import is_gguf, read_header
from minllama.checkpoints.json_object import read_object
from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.types import Checkpoint
from minllama.errors import CheckpointError, CheckpointWarning, OptionError, warn_caller
from minllama.options import GenerationOptions

FILE = "generation_config.json"
MAX_SHOWN = 60  # characters of one value in a message

# transformers' defaults if sampling is on and the file does not set them.
SAMPLED = {"temperature": 1.0, "top_k": 50}
# Used only if tokens are sampled (`do_sample`), and always used.
SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")
ALWAYS_APPLIED = ("repetition_penalty", "max_new_tokens")
# Unsupported settings that would change the text, with the values at which they do not.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ([], {}),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "dola_layers": (),
}
GGUF = "general.sampling."
GGUF_NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
GGUF_TEMPERATURE = 0.8  # llama.cpp's, if a file has only filters
# The other fields of `general.sampling` that the package gguf writes.
GGUF_FURTHER = (
    *("sequence", "xtc_probability", "xtc_threshold", "penalty_last_n"),
    *("mirostat", "mirostat_tau", "mirostat_eta"),
)
# Ids come from the written tokenizer, and the version from another writer.
NOT_OF_SAMPLING = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("transformers_version", "_from_model_config"),
}
GGUF_UNSUPPORTED = {"xtc_probability": (0,), "mirostat": (0,)}


@dataclass(frozen=True)
class SamplingDefaults:
    """A checkpoint's sampling settings.

    Attributes:
        origin: the file, for messages.
        options: fields of GenerationOptions.
        unsupported: its settings that are not implemented here.
        without_effect: names of sampling settings in a file without `do_sample`.
    """

    origin: str
    options: dict[str, Any]
    unsupported: dict[str, Any]
    without_effect: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The settings as one line."""
        shown = {name: value for name, value in self.options.items() if name != "temperature"}
        if temperature := self.options.get("temperature"):
            shown = {"temperature": temperature, **shown}
        else:
            shown = {"the most likely token": "", **shown}
        text = ", ".join(f"{name} {_shown(value)}".rstrip() for name, value in shown.items())
        if self.without_effect:
            text += f"; without effect, as do_sample is not true: {', '.join(self.without_effect)}"
        if self.unsupported:
            parts = (f"{name} {_shown(value)}" for name, value in self.unsupported.items())
            text += f"; not supported here: {', '.join(parts)}"
        return text

    def generation_options(self, changes: Mapping[str, Any] | None = None) -> GenerationOptions:
        """Options with these defaults, overridden by `changes`.

        Raises:
            OptionError: a value of either is out of its range.
        """
        changes = dict(changes or {})
        try:
            GenerationOptions(**self.options)
        except OptionError as error:
            raise CheckpointError(f"{self.origin}: {error}; leave its defaults out") from error
        return GenerationOptions(**{**self.options, **changes})


def load_generation_options(
    source: str | os.PathLike[str] | None = None, **changes: Any
) -> GenerationOptions:
    """Generation options as a checkpoint's makers recommend them, read as transformers reads them.

    Args:
        source: a file, a folder or a Hugging Face id; None for the embedded default model.
        changes: single options by name, which override the checkpoint's.

    Raises:
        CheckpointError: there is no such checkpoint, or its settings are damaged.
        OptionError: an option of `changes` is wrong.
    """
    defaults = sampling_defaults(open_checkpoint(source))
    if defaults is None:
        return GenerationOptions(**changes)
    return defaults.generation_options(changes)


def sampling_defaults(checkpoint: Checkpoint) -> SamplingDefaults | None:
    """A checkpoint's sampling settings; None without any.

    Raises:
        CheckpointError: the file that says it is damaged.
    """
    stated = _stated_settings(checkpoint)
    if stated is None:
        return None
    path, content = stated
    return _of_json(content, str(path)) if path.name == FILE else _of_gguf(content, path)


def settings_for_huggingface(checkpoint: Checkpoint) -> dict[str, Any]:
    """The generation_config.json of a folder made from `checkpoint`, without token ids.

    All settings of a folder; those of a GGUF file that have a name there.

    Raises:
        CheckpointError: as for `sampling_defaults`.
    """
    stated = _stated_settings(checkpoint)
    if stated is None:
        return {}
    path, content = stated
    if path.name == FILE:
        return {key: value for key, value in content.items() if key not in NOT_OF_SAMPLING}
    defaults = _of_gguf(content, path)
    options = {} if defaults is None else defaults.options
    if options.get("temperature") == 0:
        others = {name: value for name, value in options.items() if name not in SAMPLING_ONLY}
        return {"do_sample": False, **others}
    return {"do_sample": True, **options} if options else {}


def settings_for_gguf(checkpoint: Checkpoint) -> dict[str, Any]:
    """Fields `general.sampling.*` for a GGUF file made from `checkpoint`.

    Of a folder that has samples drawn: what transformers would draw them by. Where that makes no
    sense there are none, and a warning.

    Raises:
        CheckpointError: the file that says it is damaged.
    """
    stated = _stated_settings(checkpoint)
    if stated is None:
        return {}
    path, content = stated
    if path.name != FILE:
        fields = {GGUF + key: content.get(GGUF + key) for key in (*GGUF_NAMES, *GGUF_FURTHER)}
        return {key: v for key, v in fields.items() if type(v) in (int, float, str)}
    try:
        defaults = _of_json(content, str(path))
        if defaults is None or not defaults.options.get("temperature"):
            return {}
        defaults.generation_options()  # checks every value
    except CheckpointError as error:
        warn_caller(f"{error}; none are written to the GGUF file", CheckpointWarning)
        return {}
    return {
        GGUF + key: defaults.options[name] if name == "top_k" else float(defaults.options[name])
        for key, name in GGUF_NAMES.items()
        if name in defaults.options
    }


def _stated_settings(checkpoint: Checkpoint) -> tuple[Path, Mapping[str, Any]] | None:
    """The file with sampling settings, and its content; an adapter may use its base's."""
    for path in filter(None, (checkpoint.path, checkpoint.base_path)):
        if path.is_dir() and (path / FILE).is_file():
            return path / FILE, read_object(path / FILE)
        if path.is_file() and is_gguf(path):
            return path, read_header(path).fields
    return None


def _of_json(content: Mapping[str, Any], where: str) -> SamplingDefaults | None:
    """As in transformers: null is unset, and nothing is sampled unless `do_sample` is true."""
    stated = {name: value for name, value in content.items() if value is not None}
    known = ("do_sample", "stop_strings", *SAMPLING_ONLY, *ALWAYS_APPLIED, *UNSUPPORTED)
    if not any(name in stated for name in known):
        return None
    draws = stated.get("do_sample", False)
    if not isinstance(draws, bool):
        raise CheckpointError(f"{where}: do_sample is {_shown(draws)}, not true or false")
    if draws:
        options = {name: stated.get(name, SAMPLED.get(name)) for name in SAMPLING_ONLY}
    else:
        options = {"temperature": 0.0}
    options |= {name: stated[name] for name in ALWAYS_APPLIED if name in stated}
    if stops := stated.get("stop_strings"):
        options["stop"] = stops
    unsupported = {
        name: stated[name]
        for name, neutral in UNSUPPORTED.items()
        if name in stated and stated[name] not in neutral
    }
    without_effect = () if draws else tuple(name for name in SAMPLING_ONLY if name in stated)
    return SamplingDefaults(where, _given(options), unsupported, without_effect)


def _of_gguf(fields: Mapping[str, Any], path: Path) -> SamplingDefaults | None:
    options = {name: fields[GGUF + key] for key, name in GGUF_NAMES.items() if GGUF + key in fields}
    if not options:
        return None
    # Stored as float32: 0.6 is 0.60000002.
    options = {n: float(f"{v:.6g}") if isinstance(v, float) else v for n, v in options.items()}
    options.setdefault("temperature", GGUF_TEMPERATURE)
    unsupported = {
        name: fields[GGUF + name]
        for name, neutral in GGUF_UNSUPPORTED.items()
        if fields.get(GGUF + name, 0) not in neutral
    }
    return SamplingDefaults(str(path), options, unsupported)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _shown(value: Any) -> str:
    """A value from a file, printable and short."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if not isinstance(value, float | int | str):
        text = json.dumps(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
