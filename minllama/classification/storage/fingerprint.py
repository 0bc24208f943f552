"""Fingerprint a model: its config, and digests of all of its weights and of its tokenizer.

Weights are digested as a checkpoint provides them, under minllama's names and in its layout, before
conversion to the dtype in use: the same model in another format has the same fingerprint, and a
single changed value changes it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minllama.atomic import sha256_of
from minllama.checkpoints.types import Checkpoint
from minllama.lora import lora_layers
from minllama.model.config import LlamaConfig
from minllama.model.llama import Llama
from minllama.quantization.modules import QuantizedWeight, quantized, quantized_weights
from minllama.tokenizer.vocabulary import Vocabulary

# The first is said in classifier.json, for a checkpoint does not; the second is training's.
OF_USE = ("causal", "dropout")
CHUNK = 2**20  # numbers that are digested at a time, so that they stay in the caches


class WeightsDigest:
    """The digest of a checkpoint's weights, computed in a thread while they are loaded.

    Attributes:
        checkpoint: the same one, whose tensors are digested as they are loaded.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._digests: dict[str, Future[bytes]] = {}
        self._last: Future[bytes] | None = None
        tensors = {
            name: dataclasses.replace(tensor, load=partial(self._load, name, tensor.load))
            for name, tensor in checkpoint.tensors.items()
        }
        self.checkpoint = dataclasses.replace(checkpoint, tensors=tensors)

    def hexdigest(self) -> str:
        """SHA-256 in hexadecimal, including tensors that were not loaded."""
        total = hashlib.sha256()
        for name, tensor in self.checkpoint.tensors.items():
            if name not in self._digests:  # its blocks were taken as they are
                tensor.load()
        for name in sorted(self.checkpoint.tensors):
            total.update(self._digests[name].result())
        self._thread.shutdown()
        return total.hexdigest()

    def _load(self, name: str, load: Callable[[], Tensor]) -> Tensor:
        tensor = load()
        if self._last is not None:
            self._last.result()  # or memory would hold all that are yet to be digested
        self._last = self._digests[name] = self._thread.submit(_digest, name, tensor)
        return tensor


def weights_digest(checkpoint: Checkpoint) -> str:
    """The digest of all weights of a checkpoint, without loading a model."""
    return WeightsDigest(checkpoint).hexdigest()


def weights_digest_of_source(llama: Llama, checkpoint: Checkpoint) -> str | None:
    """The digest of a checkpoint's weights; None if the Llama's base differs from it.

    Adapters are left out, merged ones as well.
    """
    digest = WeightsDigest(checkpoint)
    stored, dense, weights = digest.checkpoint.tensors, _dense_tensors(llama), _quantized(llama)
    if stored.keys() != dense.keys() | weights.keys():
        return None
    for name, tensor in dense.items():
        loaded = stored[name].load().to(device=tensor.device, dtype=tensor.dtype)
        if not torch.equal(loaded, tensor):  # shapes are compared as well
            return None
    for name, weight in weights.items():
        if llama.quantize is None or not weight.is_made_of(
            quantized(name, stored[name], llama.quantize)
        ):
            return None
    return digest.hexdigest()


def comparable_config(config: LlamaConfig) -> dict[str, Any]:
    """A checkpoint's config, as it is after a round trip through JSON."""
    fields = dataclasses.asdict(config)
    said: dict[str, Any] = json.loads(
        json.dumps({name: value for name, value in fields.items() if name not in OF_USE})
    )
    return said


def config_changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two configs, for a message."""
    return [
        f"its {name} is {now.get(name)}, was {was.get(name)}"
        for name in dict.fromkeys((*was, *now))
        if was.get(name) != now.get(name)
    ]


def tokenizer_digest(vocabulary: Vocabulary) -> str:
    """SHA-256 of all that decides which ids a text becomes."""
    settings = {
        name: getattr(vocabulary, name)
        for name in ("bos_id", "eos_id", "add_bos", "add_eos", "chat_template")
    }
    settings["form"] = vocabulary.storage_format
    if vocabulary.flags or not vocabulary.legacy:  # others keep the digest that they had
        settings |= {"flags": vocabulary.flags, "legacy": vocabulary.legacy}
    data = vocabulary.data
    if vocabulary.storage_format == "tokenizers":
        # Who writes a tokenizer.json again lays it out in another way.
        data = json.dumps(json.loads(data), sort_keys=True).encode()
    return sha256_of(json.dumps(settings, sort_keys=True).encode() + data)


def _digest(name: str, tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {tuple(tensor.shape)} ".encode())
    for chunk in tensor.detach().reshape(-1).split(CHUNK):
        # float32 holds each number of the narrower types as it is.
        wide = chunk if chunk.dtype == torch.float64 else chunk.float()
        digest.update(wide.contiguous().numpy())
    return digest.digest()


def base_tensors(llama: Llama) -> Mapping[str, Tensor]:
    """The weights of a Llama without its adapters, by the names that a checkpoint has for them.

    Weights of quantized modules are dequantized, in float32. Those of which each process has some
    rows are gathered one at a time, as they are read.
    """
    dense = _dense_tensors(llama)
    numbers = {name: weight.dequantize() for name, weight in _quantized(llama).items()}
    return {**dense, **numbers} if numbers else dense


def _quantized(llama: Llama) -> dict[str, QuantizedWeight]:
    """The quantized matrices of a Llama, by the names of their weights."""
    return {
        name.replace(".base.", "."): weight for name, weight in quantized_weights(llama).items()
    }


def _dense_tensors(llama: Llama) -> Mapping[str, Tensor]:
    """The dense weights, without adapters."""
    if llama.shards is not None:
        of_processes: Mapping[str, Tensor] = llama.shards.tensors
        return of_processes
    layers, weights = lora_layers(llama), _quantized(llama)
    tensors = {}
    for name, tensor in llama.state_dict().items():
        if ".adapters." in name:
            continue
        ours = name.replace(".base.", ".")
        owner, _, kind = ours.rpartition(".")
        if f"{owner}.weight" in weights and kind != "bias":
            continue
        is_adapted = owner in layers and kind == "weight"
        tensors[ours] = layers[owner].unmerged_weight if is_adapted else tensor
    return tensors
