"""PEFT's adapters on transformers' tiny models, and ours on the same weights."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from minllama.model.llama import Llama
from tests.tiny import SHAPE, both

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@contextmanager
def unwarned() -> Iterator[None]:
    """Transformers and PEFT warn about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def their_adapter(folder: Path, **options: Any) -> tuple[peft.PeftModel, Llama]:
    """A random adapter of PEFT's, saved to `folder`/adapter, and our Llama of the same base."""
    theirs, ours = both(folder / "base")
    return _saved(theirs, folder, **options), ours


def their_classifier(folder: Path, **options: Any) -> tuple[peft.PeftModel, Llama]:
    """A random adapter of PEFT's with a head of 5 classes, and our Llama of the same base."""
    _, ours = both(folder / "base")
    return _saved(classifier_base(folder), folder, task_type="SEQ_CLS", **options), ours


def _saved(base: PreTrainedModel, folder: Path, **options: Any) -> peft.PeftModel:
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **options})
    with unwarned():
        model = peft.get_peft_model(base, config).eval()
        randomise(model)
        model.save_pretrained(folder / "adapter")
    return model


def classifier_base(folder: Path) -> LlamaForSequenceClassification:
    """Transformers' classifier around the model in `folder`/base, its head drawn anew."""
    with unwarned():
        return LlamaForSequenceClassification.from_pretrained(
            folder / "base", num_labels=5, pad_token_id=0
        ).eval()


def in_peft(folder: Path) -> peft.PeftModel:
    """The adapter in `folder`/adapter, as PEFT loads it onto transformers' model."""
    with unwarned():
        base = LlamaForCausalLM.from_pretrained(folder / "base").eval()
        return peft.PeftModel.from_pretrained(base, folder / "adapter").eval()


def randomise(model: torch.nn.Module) -> None:
    """Make every number of an adapter matter: lora_B starts at zero."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "score" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += noise * (0.1 if "lora_" in name else 1.0)


VOCAB_SIZE = SHAPE["vocab_size"]
