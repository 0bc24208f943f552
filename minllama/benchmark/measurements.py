"""Rates of one kind of work: functions that do it once and return units of work per second.

`minllama bench` and the repository's comparison with its peers measure with them.
"""

import time
from collections.abc import Sequence

import torch

from minllama.classification import LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from minllama.data import Dataset
from minllama.engine.choose import engine_for
from minllama.experiment.build import make_trainable
from minllama.generation.decode import Decoder
from minllama.model.llama import Llama
from minllama.options import GenerationOptions, LoRAOptions, TrainingOptions
from minllama.tokenizer.tokenizer import Tokenizer
from minllama.training.trainer import fit

LABELS = ("terrible", "bad", "okay", "good", "incredible")
PROMPT = "{text}\nIn one word, this movie is"
TRAINING_BATCH, TRAINING_STEPS = 16, 8
FIRST_STEPS = 2  # in which memory is allocated, and kernels are chosen
SENTENCES = (
    "A slow first hour pays off in a last act that nobody in the audience saw coming.",
    "The actors do what they can with a script that explains every joke twice.",
    "Beautiful pictures, a warm score, and characters that one would like to meet again.",
    "It wants to be a thriller and a romance at once, and manages neither of the two.",
    "There is more life in the ten minutes at the market than in most films of this year.",
    "The plot has holes through which a freight train could pass at full speed.",
    "Funny, sad, and at the right moments very quiet; a small film with a large heart.",
    "After the third explosion I began to count the tiles of the ceiling instead.",
    "Her performance alone is worth the ticket, even if the rest is only solid work.",
    "A remake without a single idea of its own, shot as if it were an advertisement.",
    "What begins as a simple story about two brothers grows into a portrait of a town.",
    "The dialogue sounds like people who have read about people but never met any.",
    "I laughed more than I expected to, and left with a song that will not go away.",
    "Competent, well lit, and forgotten by the time the parking garage comes into view.",
    "The children in it are wonderful, and the dog deserves a prize of its own.",
    "Two and a half hours long, and every one of them feels like a school day in June.",
)


def texts(n: int) -> list[str]:
    """Return different texts of one and two sentences, some 28 tokens on average."""
    found = []
    for number in range(n):
        turn, place = divmod(number, len(SENTENCES))
        other = f" {SENTENCES[(place + turn) % len(SENTENCES)]}" if turn % 2 else ""
        found.append(f"{SENTENCES[place]}{other} ({turn + 1})")
    return found


def random_prompt(vocab_size: int, length: int, seed: int = 0) -> list[int]:
    """Token ids; what they are does not change what reading them costs."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
    return ids


def prefill_rate(llama: Llama, prompt: Sequence[int]) -> float:
    """Tokens of a prompt that are read per second."""
    engine, ids = engine_for(llama), torch.tensor([list(prompt)], device=llama.device)
    with torch.inference_mode():
        began = time.perf_counter()
        logits = engine.forward(ids, engine.new_cache(1, len(prompt))).logits
        assert logits is not None
        logits.flatten()[0].item()  # which waits for a GPU
        return len(prompt) / (time.perf_counter() - began)


def decode_rate(llama: Llama, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
    """Tokens per second after the first, of all sequences together, with greedy decoding."""
    options = GenerationOptions(max_new_tokens=new_tokens, ignore_eos=True)
    decoder = Decoder(llama, [list(prompt) for prompt in prompts], options)
    for _ in decoder:
        pass
    rate: float = decoder.timings.decode_rate
    return rate


def scoring_rate(classifier: LlamaZeroShotClassifier, some: Sequence[str]) -> float:
    """Texts per second whose label words are scored."""
    began = time.perf_counter()
    classifier.predict_logits(some)
    return len(some) / (time.perf_counter() - began)


def zero_shot(llama: Llama, tokenizer: Tokenizer) -> LlamaZeroShotClassifier:
    """A classifier with five label words."""
    return LlamaZeroShotClassifier(llama, tokenizer, list(LABELS), prompt=PROMPT)


def trained(llama: Llama, tokenizer: Tokenizer, lora: LoRAOptions) -> LlamaEmbeddingClassifier:
    """A classifier with low-rank adapters that can be trained."""
    classifier = LlamaEmbeddingClassifier(llama, tokenizer, list(LABELS))
    make_trainable(classifier, "lora", lora)
    return classifier


def training_rate(
    classifier: LlamaEmbeddingClassifier, some: Sequence[str], options: TrainingOptions
) -> float:
    """Examples per second of the training loop, without its first steps."""
    labels = [number % len(LABELS) for number in range(len(some))]
    data = Dataset(list(some), labels, list(LABELS), source="benchmark")
    result = fit(classifier, data, None, options)
    rates = [float(row["examples_per_second"]) for row in result.history[FIRST_STEPS:]]
    return len(rates) / sum(1 / rate for rate in rates)
