"""minllama: small Llamas that classify and generate, on the machine you have.

Names are imported when they are first used, so that the command line's help needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minllama.cache import KVCache
    from minllama.chat import ChatTemplate
    from minllama.checkpoints import Checkpoint, open_checkpoint
    from minllama.config import LlamaConfig, RopeScaling
    from minllama.conversation import Conversation
    from minllama.errors import (
        CheckpointError,
        ContextError,
        MinllamaError,
        OptionError,
        TokenizerError,
    )
    from minllama.generation import Generation, TextStream, generate, stream
    from minllama.llama import Llama, LlamaPreTrainedModel, load_pretrained
    from minllama.options import GenerationOptions, SamplingOptions
    from minllama.tokenizer import Tokenizer

__version__ = "0.1.0"

_HOMES = {
    "cache": ("KVCache",),
    "chat": ("ChatTemplate",),
    "checkpoints": ("Checkpoint", "open_checkpoint"),
    "config": ("LlamaConfig", "RopeScaling"),
    "conversation": ("Conversation",),
    "errors": ("CheckpointError", "ContextError", "MinllamaError", "OptionError", "TokenizerError"),
    "generation": ("Generation", "TextStream", "generate", "stream"),
    "llama": ("Llama", "LlamaPreTrainedModel", "load_pretrained"),
    "options": ("GenerationOptions", "SamplingOptions"),
    "tokenizer": ("Tokenizer",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ChatTemplate",
    "Checkpoint",
    "CheckpointError",
    "ContextError",
    "Conversation",
    "Generation",
    "GenerationOptions",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "LlamaPreTrainedModel",
    "MinllamaError",
    "OptionError",
    "RopeScaling",
    "SamplingOptions",
    "TextStream",
    "Tokenizer",
    "TokenizerError",
    "generate",
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
