"""What is served: models, adapters and classifiers by name, each base model read once."""

import datetime
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from minllama.checkpoints.load import load_with
from minllama.checkpoints.open import CLASSIFIER_FILE, open_base, open_checkpoint
from minllama.checkpoints.peft import is_adapter
from minllama.checkpoints.peft_config import read_adapter_config
from minllama.checkpoints.resolve import canonical_name, folder_of, resolve_source, source_of
from minllama.checkpoints.types import Checkpoint
from minllama.checkpoints.weight_format import resolve_weight_format
from minllama.classification.base import Classifier
from minllama.classification.decisions.decide import DecisionModel
from minllama.classification.storage.base_model import BaseModels
from minllama.classification.storage.save_load import load_classifier_with
from minllama.engine.base import Engine
from minllama.engine.choose import engine_for
from minllama.errors import MinllamaError, OptionError
from minllama.generation.checkpoint_defaults import SamplingDefaults, sampling_defaults
from minllama.generation.conversation import chat_template
from minllama.lora.peft_files import load_adapter
from minllama.model.llama import Llama
from minllama.options.loading import LoadOptions
from minllama.server.calibration import calibration_of
from minllama.server.errors import RequestError, not_found
from minllama.text import shown
from minllama.tokenizer.chat_template import ChatTemplate
from minllama.tokenizer.tokenizer import Tokenizer

Kind = Literal["model", "adapter", "classifier"]
DEFAULT = "default"  # names the first of all models, where none is called so
KIND_WORDS: Mapping[Kind, str] = {
    "model": "language model",
    "adapter": "language model with an adapter",
    "classifier": "classifier",
}


@dataclass(eq=False)
class ServedModel:
    """A model, adapter or classifier that requests name.

    Attributes:
        id: its name.
        kind: what it is; a `classifier` answers with labels and generates nothing.
        llama: the model; adapters and heads on one base share its tensors.
        tokenizer: of the model.
        engine: runs the model; models with one engine share a scheduler.
        classifier: the head and what belongs to it; None for a language model.
        defaults: how the model's makers sample from it; None where they do not say.
        released: the day of its files.
        created: when it was loaded, seconds since 1970.
        calibration: of a classifier; see `minllama.server.calibration`.
        deciders: what answers questions with it, for each caller; see `minllama.server.deciding`.
    """

    id: str
    kind: Kind
    llama: Llama = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    engine: Engine = field(repr=False)
    classifier: Classifier | None = field(default=None, repr=False)
    defaults: SamplingDefaults | None = field(default=None, repr=False)
    released: str = ""
    created: int = 0
    calibration: Mapping[str, Any] | None = field(default=None, repr=False)
    deciders: OrderedDict[str, DecisionModel] = field(default_factory=OrderedDict, repr=False)
    _template_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def context_len(self) -> int:
        return self.llama.config.context_len

    @property
    def description(self) -> str:
        """A few words for people."""
        config = self.llama.config
        words = f"{KIND_WORDS[self.kind]}, {config.n_layers} layers of width {config.dim}"
        if self.classifier is not None:
            words += f", {len(self.classifier.labels)} labels"
        return f"{words}, context of {config.context_len} tokens"

    def generative(self) -> "ServedModel":
        """Itself.

        Raises:
            RequestError: it is a classifier, which generates nothing.
        """
        if self.kind == "classifier":
            raise RequestError(
                f"{self.id} is a classifier, which generates no text; name a language model",
                param="model",
            )
        return self

    @cached_property
    def _template(self) -> ChatTemplate:
        return chat_template(self.tokenizer)

    def template(self) -> ChatTemplate:
        """Its chat template.

        Raises:
            RequestError: it has none, or several and no default.
        """
        try:
            with self._template_lock:
                return self._template
        except MinllamaError as error:
            raise RequestError(
                f"{self.id} has no chat template; it continues text: use /v1/completions",
                param="model",
            ) from error


class Registry:
    """Served models by name.

    Args:
        names: what each is called, and what to open: a path, an id, or None for the default model.
        aliases: further names -> what they are for: one of `names`, a path or an id.
        loading: how to load models; its `quantize` of None means the format of a classifier that
            stands on the model, and else the fastest.

    Attributes:
        models: name -> model; empty until `load`.
    """

    def __init__(
        self,
        names: Mapping[str, str | None],
        aliases: Mapping[str, str] | None = None,
        loading: LoadOptions | None = None,
    ) -> None:
        self._sources, self._aliases = dict(names), dict(aliases or {})
        self._loading = loading or LoadOptions()
        self._bases = BaseModels()
        self._engines: dict[Llama, Engine] = {}
        self.models: dict[str, ServedModel] = {}

    def load(self) -> None:
        """Open and read everything.

        Raises:
            MinllamaError: something cannot be opened.
        """
        known = {canonical_name(source): name for name, source in self._sources.items()}
        for alias, target in self._aliases.items():
            if target not in self._sources and canonical_name(target) not in known:
                self._sources[alias] = source_of(target)
        kinds = {name: kind_of(source) for name, source in self._sources.items()}
        loaded: dict[str, ServedModel] = {}
        # Classifiers first: a base model takes the format that they were trained on.
        for kind in ("classifier", "adapter", "model"):
            for name, source in self._sources.items():
                if kinds[name] == kind:
                    loaded[name] = self._open(name, source, kind)
        for alias, target in self._aliases.items():
            if alias not in loaded:
                name = target if target in loaded else known[canonical_name(target)]
                loaded[alias] = replace(loaded[name], id=alias, _template_lock=threading.Lock())
        self.models = {name: loaded[name] for name in (*self._sources, *loaded)}

    def get(self, name: str | None = None) -> ServedModel:
        """The model of a name; the first one for None.

        Raises:
            RequestError: none is served under that name (404).
        """
        if name in self.models:
            return self.models[name]
        if name not in (None, DEFAULT):
            raise not_found(name)
        return next(iter(self.models.values()))

    def first(self, kind: Literal["generative", "classifier"]) -> ServedModel | None:
        """The first one that generates, or that classifies; None where there is none."""
        found = (
            m for m in self.models.values() if (m.kind == "classifier") == (kind != "generative")
        )
        return next(found, None)

    def _open(self, name: str, source: str | None, kind: Kind) -> ServedModel:
        released = _day_of(source)
        created = int(time.time())
        if kind == "classifier":
            assert source is not None
            quantize = self._loading.quantize
            classifier = load_classifier_with(
                source, replace(self._loading, quantize=quantize), self._bases
            )
            llama, words = classifier.llama, classifier.tokenizer
            engine = self._engine(llama)
            return ServedModel(
                *(name, kind, llama, words, engine, classifier),
                released=released,
                created=created,
                calibration=calibration_of(classifier, resolve_source(source)),
            )
        checkpoint = open_checkpoint(
            source, tokenizer=self._loading.tokenizer, base=self._base_for(kind)
        )
        checkpoint.check_language_model()
        words = Tokenizer.from_checkpoint(checkpoint)
        if kind == "adapter":
            folder = resolve_source(source)
            base = open_base(folder, self._loading.base)
            llama = self._language_model(base, to_change=True)
            load_adapter(llama, folder)
            llama.requires_grad_(False)
        else:
            llama = self._language_model(checkpoint)
        defaults = sampling_defaults(checkpoint)
        engine = self._engine(llama)
        return ServedModel(
            *(name, kind, llama, words, engine),
            defaults=defaults,
            released=released,
            created=created,
        )

    def _base_for(self, kind: Kind) -> str | None:
        return self._loading.base if kind == "adapter" else None  # type: ignore[return-value]

    def _language_model(self, checkpoint: Checkpoint, *, to_change: bool = False) -> Llama:
        """A model that generates, in the format of those on the same weights where one is free."""
        loading = self._loading
        if loading.quantize is None:
            formats = self._bases.loaded_formats(checkpoint)
            if formats and loading.dtype is None:
                llama, _ = self._bases.load(checkpoint, formats[0], to_change=to_change)
                return llama
            loading = replace(loading, quantize="auto")
        weights = resolve_weight_format(checkpoint, loading)
        if len(self._sources) == 1 and not to_change:
            return load_with(Llama, checkpoint, weights)
        return self._bases.load(checkpoint, weights, to_change=to_change)[0]

    def _engine(self, llama: Llama) -> Engine:
        if llama not in self._engines:
            self._engines[llama] = engine_for(llama)
        return self._engines[llama]


def kind_of(source: str | None) -> Kind:
    """What is at a path or has an id.

    Raises:
        MinllamaError: it cannot be opened.
    """
    folder = None if source is None else folder_of(source)
    if folder is None or not folder.is_dir():
        return "model"
    if (folder / CLASSIFIER_FILE).is_file():
        return "classifier"
    if is_adapter(folder):
        return "classifier" if read_adapter_config(folder).has_head else "adapter"
    return "model" if open_checkpoint(source).head is None else "classifier"


def name_of(source: str | None) -> str:
    """What a model is called where nobody has named it: its file's or folder's name, or its id."""
    if source is None:
        return resolve_source(None).stem
    path = Path(source).expanduser()
    if not path.exists():  # an id
        return source
    path = path.resolve()
    return path.name if path.is_dir() else path.stem


def named(
    sources: Sequence[str | None], aliases: Mapping[str, str] | None = None
) -> dict[str, str | None]:
    """Names for sources; where two would have the same, an alias is the second one's.

    Raises:
        OptionError: two would have the same name, and there is no alias.
    """
    names: dict[str, str | None] = {}
    further = {canonical_name(source): alias for alias, source in (aliases or {}).items()}
    for source in sources:
        name = name_of(source)
        if name in names:
            name = further.get(canonical_name(source), name)
        if name in names:
            raise OptionError(
                f"two models would be called {shown(name)}; give one another name: "
                f"--alias NAME={source}"
            )
        names[name] = source
    return names


def parsed_aliases(aliases: Sequence[str]) -> dict[str, str]:
    """`NAME=MODEL` as name -> model.

    Raises:
        OptionError: one is not of that form, or a name is given twice.
    """
    found: dict[str, str] = {}
    for alias in aliases:
        name, _, source = alias.partition("=")
        if not name or not source:
            raise OptionError(f"--alias {shown(alias)}: give it as NAME=MODEL")
        if name in found:
            raise OptionError(f"--alias {shown(name)} is given twice; choose another name")
        found[name] = source
    return found


def _day_of(source: str | None) -> str:
    """The day of a source's files, as 2026-11-29."""
    try:
        changed = resolve_source(source).stat().st_mtime
    except (OSError, MinllamaError):
        changed = time.time()
    return datetime.datetime.fromtimestamp(changed, datetime.UTC).strftime("%Y-%m-%d")
