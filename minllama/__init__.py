"""minllama: run, train and evaluate small Llama models for generation and classification.

Names are imported on first use, so that the command line's help needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minllama.text import VERSION

if TYPE_CHECKING:
    from minllama.checkpoints.open import open_checkpoint
    from minllama.checkpoints.types import Checkpoint
    from minllama.classification import (
        LlamaEmbeddingClassifier,
        LlamaZeroShotClassifier,
        load_classifier,
    )
    from minllama.classification.explain import Explanation, explain
    from minllama.data import Dataset, load_dataset
    from minllama.engine.base import Engine
    from minllama.engine.choose import engine_for
    from minllama.errors import (
        CheckpointError,
        ContextError,
        DataError,
        MinllamaError,
        OptionError,
        TokenizerError,
    )
    from minllama.evaluation.metrics import Evaluation, evaluate
    from minllama.evaluation.regression import RegressionEvaluation, evaluate_regression
    from minllama.evaluation.thresholds import Thresholds
    from minllama.generation.api import TextStream, generate, stream
    from minllama.generation.checkpoint_defaults import load_generation_options
    from minllama.generation.conversation import Conversation
    from minllama.generation.sequence_text import Generation
    from minllama.labeling.labeler import Labeler
    from minllama.lora import LoRALayer, add_lora_wrapper
    from minllama.model.config import LlamaConfig, RopeScaling
    from minllama.model.kv_cache import KVCache
    from minllama.model.llama import Llama, LlamaPreTrainedModel, load_pretrained
    from minllama.options import (
        DataOptions,
        GenerationOptions,
        LoRAOptions,
        PromptOptions,
        SamplingOptions,
    )
    from minllama.tokenizer.chat_template import ChatTemplate
    from minllama.tokenizer.tokenizer import Tokenizer
    from minllama.training.optimizer import AdamW

__version__ = VERSION

_HOMES = {
    "model.kv_cache": ("KVCache",),
    "tokenizer.chat_template": ("ChatTemplate",),
    "checkpoints.open": ("open_checkpoint",),
    "checkpoints.types": ("Checkpoint",),
    "classification": ("LlamaEmbeddingClassifier", "LlamaZeroShotClassifier", "load_classifier"),
    "classification.explain": ("Explanation", "explain"),
    "model.config": ("LlamaConfig", "RopeScaling"),
    "generation.conversation": ("Conversation",),
    "data": ("Dataset", "load_dataset"),
    "engine.base": ("Engine",),
    "engine.choose": ("engine_for",),
    "errors": (
        "CheckpointError",
        "ContextError",
        "DataError",
        "MinllamaError",
        "OptionError",
        "TokenizerError",
    ),
    "evaluation.metrics": ("Evaluation", "evaluate"),
    "generation.api": ("TextStream", "generate", "stream"),
    "generation.checkpoint_defaults": ("load_generation_options",),
    "generation.sequence_text": ("Generation",),
    "model.llama": ("Llama", "LlamaPreTrainedModel", "load_pretrained"),
    "labeling.labeler": ("Labeler",),
    "lora": ("LoRALayer", "add_lora_wrapper"),
    "training.optimizer": ("AdamW",),
    "options": (
        "DataOptions",
        "GenerationOptions",
        "LoRAOptions",
        "PromptOptions",
        "SamplingOptions",
    ),
    "evaluation.regression": ("RegressionEvaluation", "evaluate_regression"),
    "evaluation.thresholds": ("Thresholds",),
    "tokenizer.tokenizer": ("Tokenizer",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AdamW",
    "ChatTemplate",
    "Checkpoint",
    "CheckpointError",
    "ContextError",
    "Conversation",
    "DataError",
    "DataOptions",
    "Dataset",
    "Engine",
    "Evaluation",
    "Explanation",
    "Generation",
    "GenerationOptions",
    "KVCache",
    "Labeler",
    "Llama",
    "LlamaConfig",
    "LlamaEmbeddingClassifier",
    "LlamaPreTrainedModel",
    "LlamaZeroShotClassifier",
    "LoRALayer",
    "LoRAOptions",
    "MinllamaError",
    "OptionError",
    "PromptOptions",
    "RegressionEvaluation",
    "RopeScaling",
    "SamplingOptions",
    "TextStream",
    "Thresholds",
    "Tokenizer",
    "TokenizerError",
    "add_lora_wrapper",
    "engine_for",
    "evaluate",
    "evaluate_regression",
    "explain",
    "generate",
    "load_classifier",
    "load_dataset",
    "load_generation_options",
    "load_pretrained",
    "open_checkpoint",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'minllama' has no attribute {name!r}")
    value = getattr(import_module(f"minllama.{_HOME_OF[name]}"), name)
    globals()[name] = value  # the next access is an ordinary one
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
