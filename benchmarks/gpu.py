"""Decode and prefill on a GPU, beside transformers: a model of Llama-3.2-1B's shape, bfloat16.

    python benchmarks/gpu.py [--device cuda] [--layers 16] [--rounds 5]

Random weights, the same for both; the two take turns, and medians are compared. Ours also with the
weights in 8 and 4 bits, beside the same bfloat16 model of theirs. The share of the card's memory
bandwidth is that of reading each weight once per step, beside a sum over a gigabyte that is
measured here. Without a GPU it says so; `--device cpu --layers 1` tries the code.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from contenders import their_decode_rate

from minllama import GenerationOptions, Llama, LlamaConfig, engine_for
from minllama.generation.decode import Decoder

SHAPE = {
    "dim": 2048,
    "n_heads": 32,
    "n_kv_heads": 8,
    "head_dim": 64,
    "hidden_dim": 8192,
    "vocab_size": 128256,
    "max_seq_len": 8192,
    "rope_theta": 500000.0,
    "tie_embeddings": True,
}
BATCHES, PROMPT, NEW = (1, 32), 512, 64
KEPT = {"bfloat16": None, "8 bits": "int8", "4 bits": "int4"}


def models(layers: int, device: torch.device) -> tuple[dict[str, Llama], Any]:
    """Ours by how their weights are kept, and theirs, all with the same weights."""
    import tempfile

    import transformers

    transformers.logging.set_verbosity_error()
    with torch.device("meta"):
        first = Llama(LlamaConfig(n_layers=layers, **SHAPE))
    first = first.to_empty(device="cpu").to(torch.bfloat16)
    torch.manual_seed(0)
    first.init_weights()
    with tempfile.TemporaryDirectory() as folder:
        first.save_pretrained(folder)
        load = transformers.LlamaForCausalLM.from_pretrained
        theirs = load(folder, dtype=torch.bfloat16).to(device).eval()
        ours = {
            name: Llama.from_pretrained(folder, dtype="bfloat16", device=device, quantize=how)
            for name, how in KEPT.items()
        }
    return ours, theirs


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a sum over a gigabyte."""
    numbers = torch.ones(2**28, device=device)
    return max(numbers.nbytes / seconds(numbers.sum, device) for _ in range(5))


def decode(model: Any, ids: torch.Tensor, device: torch.device) -> float:
    """Tokens per second, all rows together."""
    if isinstance(model, Llama):
        options = GenerationOptions(max_new_tokens=NEW, ignore_eos=True)
        decoder = Decoder(model, ids.tolist(), options)
        for _ in decoder:
            pass
        return decoder.timings.decode_rate

    return their_decode_rate(model, ids, NEW)


def prefill(model: Any, ids: torch.Tensor, device: torch.device) -> float:
    """Tokens per second, all rows together."""
    with torch.inference_mode():
        if isinstance(model, Llama):
            engine = engine_for(model)
            took = seconds(lambda: engine.forward(ids, engine.new_cache(*ids.shape)), device)
        else:
            took = seconds(lambda: model(ids, logits_to_keep=1), device)
    return ids.numel() / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print("| task | weights | minllama | transformers | ratio | of the memory bandwidth |")
    print("| --- | --- | --- | --- | --- | --- |")
    tasks = [
        (f"{name}, batch {batch}, tokens/s", measure, batch)
        for batch in BATCHES
        for name, measure in (("decode", decode), ("prefill", prefill))
    ]
    if arguments.device == "cuda" and not torch.cuda.is_available():
        for name, _, _ in tasks:
            print(f"| {name} | bfloat16 | not measured: no GPU | | | |")
        return
    device = torch.device(arguments.device)
    ours, theirs = models(arguments.layers, device)
    speed = bandwidth(device)
    for kept, model in ours.items():
        read = sum(x.nbytes for x in (*model.parameters(), *model.buffers())) / speed
        for name, measure, batch in tasks:
            ids = torch.randint(0, SHAPE["vocab_size"], (batch, PROMPT), device=device)
            rates: list[list[float]] = [[], []]
            for turn in range(arguments.rounds + 1):  # the first warms up
                for found, contender in zip(rates, (model, theirs), strict=True):
                    rate = measure(contender, ids, device)
                    found += [rate] if turn else []
            a, b = map(statistics.median, rates)
            share = f"{a / batch * read:.0%}" if measure is decode else ""
            print(f"| {name} | {kept} | {a:.4g} | {b:.4g} | {a / b:.2f} | {share} |", flush=True)


if __name__ == "__main__":
    main()
