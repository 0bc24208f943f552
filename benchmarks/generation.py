"""Opening the default model, prefill and decode, beside transformers: `make bench-generation`.

Both run the same float32 weights on the same threads, in one process, in turns (A B A B); the table
gives medians. Needs the dev extra.
"""

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from minllama import GenerationOptions, Llama, Tokenizer, open_checkpoint
from minllama.checkpoints.source import resolve_source
from minllama.decoding import Decoder

ROUNDS = 5
NEW_TOKENS = 64
PREFILL_TOKENS = 512


def in_turns(one: Callable[[], float], other: Callable[[], float]) -> tuple[float, float]:
    """Medians of what each returns, called alternately."""
    results = [(one(), other()) for _ in range(ROUNDS)]
    ours, theirs = zip(*results, strict=True)
    return statistics.median(ours), statistics.median(theirs)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    gguf = resolve_source(None)

    def open_ours() -> Llama:
        return Llama.from_checkpoint(open_checkpoint(gguf), device="cpu")

    def open_theirs() -> torch.nn.Module:
        return transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )

    opening = in_turns(lambda: seconds(open_ours), lambda: seconds(open_theirs))

    ours = open_ours()
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = transformers.LlamaForCausalLM.from_pretrained(Path(folder)).eval()
    checkpoint = open_checkpoint(gguf)
    assert checkpoint.vocabulary is not None
    tokenizer = Tokenizer(checkpoint.vocabulary)
    prompt = tokenizer.encode("The old lighthouse keeper climbed the stairs once more, and")
    long_prompt = (prompt * PREFILL_TOKENS)[:PREFILL_TOKENS]
    options = GenerationOptions(max_new_tokens=NEW_TOKENS, ignore_eos=True)

    def decode_ours() -> float:
        decoder = Decoder(ours, [prompt], options)
        for _ in decoder:
            pass
        return decoder.timings.decode_rate

    def decode_theirs() -> float:
        ids = torch.tensor([prompt])
        settings = {
            "attention_mask": torch.ones_like(ids),
            "do_sample": False,
            "eos_token_id": None,
        }
        first = seconds(lambda: theirs.generate(ids, max_new_tokens=1, **settings))
        whole = seconds(lambda: theirs.generate(ids, max_new_tokens=NEW_TOKENS, **settings))
        return (NEW_TOKENS - 1) / (whole - first)

    def prefill_ours() -> float:
        with torch.inference_mode():
            took = seconds(lambda: ours(torch.tensor([long_prompt]), logits="last"))
        return PREFILL_TOKENS / took

    def prefill_theirs() -> float:
        with torch.inference_mode():
            took = seconds(lambda: theirs(torch.tensor([long_prompt]), logits_to_keep=1))
        return PREFILL_TOKENS / took

    decoding = in_turns(decode_ours, decode_theirs)
    prefilling = in_turns(prefill_ours, prefill_theirs)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, ")
    print(f"transformers {transformers.__version__}, float32, medians of {ROUNDS}\n")
    print("| task | minllama | transformers | ratio |")
    print("| --- | --- | --- | --- |")
    a, b = opening
    print(f"| open the 98 MB GGUF, seconds | {a:.2f} | {b:.1f} | {b / a:.1f} |")
    a, b = prefilling
    print(f"| prefill, {PREFILL_TOKENS} tokens, tokens/s | {a:.0f} | {b:.0f} | {a / b:.2f} |")
    a, b = decoding
    print(f"| decode, batch 1, tokens/s | {a:.1f} | {b:.1f} | {a / b:.2f} |")


if __name__ == "__main__":
    main()
