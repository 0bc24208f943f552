"""What fewer bits cost: perplexity, zero-shot accuracy and greedy agreement of each form.

    python benchmarks/quality.py [--sentences 1101] [FORM ...]

Perplexity is that of this repository's own prose (docs/design.md, CONTRIBUTING.md, CHANGELOG.md and
README.md, in that order) in pieces of 512 tokens. Accuracy is that of SST-5's dev lines (from the
data beside the repository; left out where there are none), zero-shot, with the settings of
`benchmarks/classification.py zero-shot`. Agreement is how many of 64 greedy tokens after each of 16
beginnings of 128 are float32's, counted up to the first that differs. `auto` is what `generate`
runs by itself on the machine at hand.

The default model comes as blocks of 4 and 8 bits, so `float32` here is those blocks' numbers. int8
and int4 quantize them again, from the bfloat16 folder that the other benchmarks make of them: of
blocks that take no more bits they would keep the numbers.
"""

import argparse
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from contenders import FOLDER
from torch import Tensor
from weight_files import make_weights

from minllama import GenerationOptions, Llama, LlamaZeroShotClassifier, Tokenizer, load_pretrained
from minllama.data.treebank import undo_treebank
from minllama.generation.decode import Decoder

ROOT = Path(__file__).resolve().parents[1]
PROSE = ("docs/design.md", "CONTRIBUTING.md", "CHANGELOG.md", "README.md")
DATA = ROOT.parent / "shared" / "data" / "sst-dev.txt"
WORDS = ("terrible", "bad", "okay", "good", "incredible")
PROMPT = "Review: {text}\nIn one word, this movie is"
FORMS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "auto": {"quantize": "auto"},
    "stored": {"dtype": torch.float32, "quantize": "stored"},
    "stored-int8-activations": {"quantize": "stored", "activations": "int8"},
    "int8": {"source": FOLDER / "bfloat16", "dtype": torch.float32, "quantize": "int8"},
    "int4": {"source": FOLDER / "bfloat16", "dtype": torch.float32, "quantize": "int4"},
}
PIECE, BEGINNINGS, READ, NEW = 512, 16, 128, 64


def pieces(tokenizer: Tokenizer) -> list[Tensor]:
    text = "\n\n".join((ROOT / name).read_text(encoding="utf-8") for name in PROSE)
    ids = torch.tensor(tokenizer.encode(text))
    return [piece for piece in ids.split(PIECE) if len(piece) == PIECE]


@torch.inference_mode()
def perplexity(model: Llama, texts: list[Tensor]) -> float:
    """Of each token but a piece's first: e to the mean loss."""
    total = 0.0
    for ids in texts:
        logits = model(ids.unsqueeze(0)).logits
        assert logits is not None
        total += torch.nn.functional.cross_entropy(
            logits[0, :-1].float(), ids[1:], reduction="sum"
        ).item()
    return math.exp(total / (len(texts) * (PIECE - 1)))


def accuracy(model: Llama, tokenizer: Tokenizer, n: int) -> float:
    lines = DATA.read_text(encoding="utf-8").splitlines()[:n]
    labels, texts = zip(*(line.split(" ||| ", 1) for line in lines), strict=True)
    classifier = LlamaZeroShotClassifier(model, tokenizer, WORDS, prompt=PROMPT)
    likeliest = classifier.predict_proba([undo_treebank(text) for text in texts]).argmax(-1)
    return float((likeliest == torch.tensor([int(label) for label in labels]).numpy()).mean())


def continuations(model: Llama, texts: list[Tensor]) -> list[list[int]]:
    options = GenerationOptions(max_new_tokens=NEW, ignore_eos=True)
    found = []
    for ids in texts[:BEGINNINGS]:
        decoder = Decoder(model, [ids[:READ].tolist()], options)
        found.append([token.id for tokens in decoder for token in tokens if token.id is not None])
    return found


def agreement(tokens: list[list[int]], reference: list[list[int]]) -> float:
    """Share of tokens before the first that differs."""
    same = 0
    for row, other in zip(tokens, reference, strict=True):
        differs = (i for i, (a, b) in enumerate(zip(row, other, strict=True)) if a != b)
        same += next(differs, len(row))
    return same / sum(map(len, reference))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("forms", nargs="*", choices=[[], *FORMS])
    parser.add_argument("--sentences", type=int, default=1101, help="of SST-5's dev lines")
    arguments = parser.parse_args()
    make_weights()
    tokenizer = Tokenizer.from_pretrained()
    texts = pieces(tokenizer)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; ")
    print(f"{len(texts)} pieces of {PIECE} tokens; {arguments.sentences} sentences\n")
    print("| form | MB | perplexity | SST-5, zero-shot | greedy agreement | seconds |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    reference = None
    for form in dict.fromkeys(["float32", *(arguments.forms or FORMS)]):
        start = time.perf_counter()
        model = load_pretrained(device="cpu", **FORMS[form])
        size = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 1e6
        tokens = continuations(model, texts)
        reference = reference or tokens
        if form not in (arguments.forms or FORMS):
            continue
        row = [form, f"{size:.0f}", f"{perplexity(model, texts):.3f}"]
        row.append(
            f"{accuracy(model, tokenizer, arguments.sentences):.3f}" if DATA.exists() else ""
        )
        row.append(f"{agreement(tokens, reference):.2f}")
        row.append(f"{time.perf_counter() - start:.0f}")
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
