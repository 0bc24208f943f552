"""Models: Hugging Face folders, llama2.c's and Meta's files, whole or in shards."""

import io
import json
import struct
from pathlib import Path
from typing import Any

import torch

from minllama.checkpoints.huggingface import write_huggingface
from minllama.checkpoints.llama2c import write_llama2c_bin
from minllama.checkpoints.open import open_checkpoint
from minllama.engine.choose import engine_for
from minllama.generation.checkpoint_defaults import load_generation_options
from minllama.model.config import LlamaConfig
from minllama.model.llama import Llama
from minllama.tokenizer.tokenizer import Tokenizer
from tests.faults.mutations import Mutator, safetensors
from tests.faults.mutations import json_values as json_mutator
from tests.faults.read_tokenizers import byte_vocabulary, use_tokenizer
from tests.faults.reader import Reader, reader, writing

# Grouped heads, a head dimension of its own, biases: more fields that a file can get wrong.
CONFIG = LlamaConfig(
    dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=24, vocab_size=259, max_seq_len=32
)


def run_model(path: Path) -> None:
    """Load a model, and read three tokens and one more through its engine and its modules."""
    checkpoint = open_checkpoint(path)
    llama = Llama.from_checkpoint(checkpoint).eval()
    ids = torch.tensor([[0, llama.config.vocab_size - 1]])
    engine = engine_for(llama)
    cache = engine.new_cache(1, 3)
    engine.forward(ids, cache)
    engine.forward(ids[:, :1], cache)
    load_generation_options(path)
    vocabulary = checkpoint.vocabulary
    if vocabulary is not None:
        use_tokenizer(Tokenizer(vocabulary))


def tiny_state(config: LlamaConfig = CONFIG) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    llama = Llama(config)
    for parameter in llama.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return llama.state_dict()


def tiny_folder(folder: Path, config: LlamaConfig = CONFIG, **options: Any) -> Path:
    """A Hugging Face folder of a tiny Llama with its tokenizer."""
    vocabulary = byte_vocabulary(folder.with_name(folder.name + "-words"))
    write_huggingface(folder, config, tiny_state(config), vocabulary=vocabulary, **options)
    return folder


@reader("model.safetensors", "config.json", "generation_config.json")
def huggingface_file(folder: Path, name: str) -> Reader:
    model = tiny_folder(folder / "hf")
    seeds = [(model / name).read_bytes()]
    mutate: Mutator = json_mutator
    if name == "model.safetensors":
        half = tiny_folder(folder / "half", dtype=torch.bfloat16)
        seeds.append((half / name).read_bytes())
        mutate = safetensors
    elif name == "config.json":
        config = json.loads(seeds[0])
        for scaling in (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "attention_factor": 1.1},
            {"type": "linear", "factor": 2.0},
        ):
            scaling = {"original_max_position_embeddings": 16, **scaling}
            seeds.append(json.dumps({**config, "rope_scaling": scaling}).encode())
        seeds.append(json.dumps({**config, "rope_parameters": {"rope_theta": 1e4}}).encode())
    else:
        seeds.append(b'{"temperature": 0.5, "top_p": 0.9, "eos_token_id": [1, 2], "top_k": 3}')
    return Reader(seeds, writing(model / name, lambda: run_model(model)), mutate)


@reader("model.safetensors.index.json", "a shard")
def shard(folder: Path, name: str) -> Reader:
    from safetensors.torch import load_file, save_file

    model = tiny_folder(folder / "hf")
    state = sorted(load_file(model / "model.safetensors").items())
    (model / "model.safetensors").unlink()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {}
    for i, part in enumerate((state[:3], state[3:])):
        save_file(dict(part), model / names[i])
        weight_map |= {key: names[i] for key, _ in part}
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 50000}, "weight_map": weight_map}))
    path = model / names[0] if name == "a shard" else index
    mutate: Mutator = safetensors if name == "a shard" else json_mutator
    return Reader([path.read_bytes()], writing(path, lambda: run_model(model)), mutate)


@reader("llama2c.bin")
def llama2c_bin(folder: Path) -> Reader:
    path, seeds = folder / "model.bin", []
    for config in (CONFIG, CONFIG.replace(tie_embeddings=True, vocab_size=40)):
        write_llama2c_bin(path, config, tiny_state(config))
        seeds.append(path.read_bytes())
    seeds.append(llama2c_int8())
    return Reader(seeds, writing(path, lambda: run_model(path)))


def llama2c_int8() -> bytes:
    """A file of llama2.c's version 2: int8 groups of 8 values, each with a scale (export.py)."""
    dim, hidden, layers, heads, vocab = 16, 24, 1, 4, 40
    numbers = (dim, hidden, layers, heads, heads, vocab, 32)
    out = struct.pack("<II7iBi", 0x616B3432, 2, *numbers, 1, 8)
    out += bytes(256 - len(out))
    out += struct.pack(f"<{dim * 3}f", *[1.0] * dim * 3)
    sizes = [vocab * dim, *[dim * dim] * 4, *[dim * hidden] * 3]
    for size in sizes:
        out += bytes(range(7)) * (size // 7) + bytes(size % 7)
        out += struct.pack(f"<{size // 8}f", *[0.01] * (size // 8))
    return out


def torch_bytes(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


PICKLED = {"_use_new_zipfile_serialization": False}


@reader("llama2c.pt")
def llama2c_pt(folder: Path) -> Reader:
    from tests.checkpoints.test_llama2c import ARGS, TIED, state_of, their_name

    path = folder / "ckpt.pt"
    state = {their_name(name): tensor for name, tensor in state_of(TIED).items()}
    whole = {
        "model": state,
        "model_args": {**ARGS, "n_layers": 2},
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "always_save": False},
    }
    seeds = [torch_bytes(whole), torch_bytes(whole, **PICKLED)]
    return Reader(seeds, writing(path, lambda: run_model(path)))


@reader("consolidated.00.pth", "params.json")
def meta_file(folder: Path, name: str) -> Reader:
    from tests.checkpoints.test_meta import PARAMS, cut, whole_model, write

    model = write(folder / "meta", cut(whole_model(), 1, 0))
    seeds = [(model / name).read_bytes()]
    if name.endswith("pth"):
        seeds.append(torch_bytes(cut(whole_model(), 1, 0)[0], **PICKLED))
        return Reader(seeds, writing(model / name, lambda: run_model(model)))
    seeds.append(json.dumps({**PARAMS, "use_scaled_rope": True, "rope_theta": 1e4}).encode())
    return Reader(seeds, writing(model / name, lambda: run_model(model)), json_mutator)


@reader("pytorch_model.bin")
def pickled_huggingface(folder: Path) -> Reader:
    from safetensors.torch import load_file

    model = tiny_folder(folder / "hf")
    state = load_file(model / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.bfloat16)
    (model / "model.safetensors").unlink()
    path = model / "pytorch_model.bin"
    seeds = [torch_bytes(state), torch_bytes(state, **PICKLED)]
    return Reader(seeds, writing(path, lambda: run_model(model)))
