"""Tiny random models, ours and transformers', with the same weights."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from minllama.checkpoints.huggingface import write_huggingface
from minllama.checkpoints.open import open_checkpoint
from minllama.model.config import LlamaConfig, RopeScaling
from minllama.model.llama import Llama, load_pretrained

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


# Of a model of dim 64, hidden_dim 96, four heads, two of keys, and 61 tokens: what steps that read
# tensors by their address may get wrong.
VARIANTS: tuple[dict[str, Any], ...] = (
    {"tie_embeddings": False, "attention_bias": True, "ffn_bias": True},
    {"n_kv_heads": 1, "head_dim": 10},
    {"n_kv_heads": 4, "dim": 40, "hidden_dim": 50, "head_dim": 6},
    {"n_heads": 8, "n_kv_heads": 8, "vocab_size": 70, "rope_theta": 300.0},
)

# A changed value of each field of LlamaConfig, of the same model:
# `tests/engine/test_config_fields.py`.
SCALING = RopeScaling("llama3", factor=4.0, original_max_seq_len=8)
CHANGED_FIELDS: dict[str, dict[str, Any]] = {
    "dim": {"dim": 80, "head_dim": 16},
    "n_layers": {"n_layers": 3},
    "n_heads": {"n_heads": 8, "head_dim": 16},
    "vocab_size": {"vocab_size": 71},
    "n_kv_heads": {"n_kv_heads": 1},
    "head_dim": {"head_dim": 10},
    "hidden_dim": {"hidden_dim": 160},
    "max_seq_len": {"max_seq_len": 40},
    "norm_eps": {"norm_eps": 0.3},
    "rope_theta": {"rope_theta": 50.0},
    "rope_scaling": {"rope_scaling": SCALING},
    "tie_embeddings": {"tie_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "ffn_bias": {"ffn_bias": True},
    "causal": {"causal": False},
    "dropout": {"dropout": 0.5},
}


def their_model(**changes: Any) -> LlamaForCausalLM:
    """A transformers Llama whose every number matters: norms and biases are random too."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(TheirConfig(**{**SHAPE, **changes})).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(mean=1.0 if "norm" in name else 0.0, std=0.15)
    return model


def both(folder: Path, **changes: Any) -> tuple[LlamaForCausalLM, Llama]:
    """Transformers' model and ours, which has read what that one has written."""
    theirs = their_model(**changes)
    theirs.save_pretrained(folder)
    return theirs, load_pretrained(folder, device="cpu")


def our_model(seed: int = 0, **changes: Any) -> Llama:
    """A Llama of ours, in evaluation mode."""
    fields: dict[str, Any] = {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "hidden_dim": 48,
        "vocab_size": 61,
        "max_seq_len": 64,
    }
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(**{**fields, **changes})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def random_ids(batch: int, length: int, vocab_size: int = 61, seed: int = 0) -> torch.Tensor:
    """(batch, length) token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (batch, length), generator=generator)


def write_base(folder: Path, default_model: Path, max_seq_len: int) -> Path:
    """Write a tiny Llama with the default model's tokenizer to a folder, and return that."""
    vocabulary = open_checkpoint(default_model).vocabulary
    model = our_model(vocab_size=49152, max_seq_len=max_seq_len)
    write_huggingface(folder, model.config, model.state_dict(), vocabulary=vocabulary)
    return folder
