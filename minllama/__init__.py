"""minllama: small Llamas that classify and generate, on the machine you have.

Names are imported when they are first used, so that the command line's help needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minllama.cache import KVCache
    from minllama.chat import ChatTemplate
    from minllama.checkpoints import Checkpoint, open_checkpoint
    from minllama.classifier import (
        LlamaEmbeddingClassifier,
        LlamaZeroShotClassifier,
        load_classifier,
    )
    from minllama.config import LlamaConfig, RopeScaling
    from minllama.conversation import Conversation
    from minllama.data import Dataset, load_dataset
    from minllama.errors import (
        CheckpointError,
        ContextError,
        DataError,
        MinllamaError,
        OptionError,
        TokenizerError,
    )
    from minllama.evaluation import Evaluation, evaluate
    from minllama.generation import Generation, TextStream, generate, stream
    from minllama.generation_config import load_generation_options
    from minllama.llama import Llama, LlamaPreTrainedModel, load_pretrained
    from minllama.lora import LoRALayer, add_lora_wrapper
    from minllama.optimizer import AdamW
    from minllama.options import (
        DataOptions,
        GenerationOptions,
        LoRAOptions,
        PromptOptions,
        SamplingOptions,
    )
    from minllama.thresholds import Thresholds
    from minllama.tokenizer import Tokenizer

__version__ = "0.1.0"

_HOMES = {
    "cache": ("KVCache",),
    "chat": ("ChatTemplate",),
    "checkpoints": ("Checkpoint", "open_checkpoint"),
    "classifier": ("LlamaEmbeddingClassifier", "LlamaZeroShotClassifier", "load_classifier"),
    "config": ("LlamaConfig", "RopeScaling"),
    "conversation": ("Conversation",),
    "data": ("Dataset", "load_dataset"),
    "errors": (
        "CheckpointError",
        "ContextError",
        "DataError",
        "MinllamaError",
        "OptionError",
        "TokenizerError",
    ),
    "evaluation": ("Evaluation", "evaluate"),
    "generation": ("Generation", "TextStream", "generate", "stream"),
    "generation_config": ("load_generation_options",),
    "llama": ("Llama", "LlamaPreTrainedModel", "load_pretrained"),
    "lora": ("LoRALayer", "add_lora_wrapper"),
    "optimizer": ("AdamW",),
    "options": (
        "DataOptions",
        "GenerationOptions",
        "LoRAOptions",
        "PromptOptions",
        "SamplingOptions",
    ),
    "thresholds": ("Thresholds",),
    "tokenizer": ("Tokenizer",),
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
    "Evaluation",
    "Generation",
    "GenerationOptions",
    "KVCache",
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
    "RopeScaling",
    "SamplingOptions",
    "TextStream",
    "Thresholds",
    "Tokenizer",
    "TokenizerError",
    "add_lora_wrapper",
    "evaluate",
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
