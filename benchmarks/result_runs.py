"""The runs of `results.py`: a group is a function that adds to what came out."""

import csv
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from result_files import Results
from result_processes import add_info, called, command, ran
from result_training import ASK, train, train_by_hand

Score = Literal["sum", "token-mean", "byte-mean", "pmi", "contextual", "batch"]
PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
)
LONG = "The keeper of the lighthouse counted ships, and the ships counted him. " * 9
FORMS: dict[str, dict[str, Any]] = {
    "auto": {"quantize": "auto"},
    "stored": {"quantize": "stored"},
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
}
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
SAMPLED = {"temperature": 0.9, "seed": 7}
GENERATIONS: dict[str, dict[str, Any]] = {
    "samples": {"n": 3, "logprobs": 0, **SAMPLED},
    "top-p": {"top_p": 0.8, **SAMPLED},
    "top-k": {"top_k": 5, **SAMPLED},
    "min-p": {"min_p": 0.1, **SAMPLED},
    "penalty": {"repetition_penalty": 1.3},
    "everything": {"top_p": 0.9, "top_k": 40, "min_p": 0.02, "repetition_penalty": 1.1, **SAMPLED},
    "stop": {"stop": (".", " the ", "\n    ")},
    "stop token": {"stop_token_ids": (28, " a")},
    "special": {"special": True, "skip_special_tokens": False, "ignore_eos": True},
    "lookup": {"prompt_lookup": 3, "max_new_tokens": 40},
    "schema": {"json_schema": SCHEMA, "max_new_tokens": 40},
    "regex": {"regex": r" [A-Z][a-z]+(, [A-Z][a-z]+){2}\."},
}
SCORES: tuple[Score, ...] = ("sum", "token-mean", "byte-mean", "pmi", "contextual", "batch")
LABELS = ("complaint", "praise", "question", "request")


def generations(form: str) -> dict[str, Any]:
    """Greedy tokens with log-probabilities; for two forms also all else that generation knows."""
    import minllama

    model = minllama.load_pretrained(device="cpu", **FORMS[form])
    tokenizer = minllama.Tokenizer.from_pretrained()
    has_constraints = find_spec("llguidance") is not None

    def texts(prompts: Sequence[str], **options: Any) -> list[dict[str, Any]]:
        options = {"max_new_tokens": 16, **options}
        return [
            {
                "tokens": one.token_ids,
                "text": one.text,
                "reason": one.finish_reason,
                "logprobs": one.logprobs and [[t.logprob, t.alternatives] for t in one.logprobs],
            }
            for one in minllama.generate(model, tokenizer, list(prompts), **options)
        ]

    found: dict[str, Any] = {
        "ragged": texts(PROMPTS, logprobs=2),
        "alone": [texts([prompt], logprobs=2)[0] for prompt in PROMPTS],
        "long": texts([LONG], logprobs=2),
    }
    if form in ("auto", "float32"):
        for name, options in GENERATIONS.items():
            if has_constraints or not {"json_schema", "regex"} & set(options):
                found[name] = texts([LONG + PROMPTS[0], *PROMPTS[1:]], **options)
        found |= more_generations(model, tokenizer)
    return found


def more_generations(model: Any, tokenizer: Any) -> dict[str, Any]:
    """A stream's pieces, a conversation, a cache that is read on, the model itself."""
    import minllama

    options = minllama.GenerationOptions(max_new_tokens=12)
    talk = minllama.Conversation(model, tokenizer, options, system="Be brief.")
    answers = []
    for question in ("What is a llama?", "And a horse?"):
        pieces = [piece.text for piece in talk.answer(question)]
        assert talk.stream is not None
        result = talk.stream.results[0]
        answers.append([result.prompt_ids, result.token_ids, pieces])
    ids = torch.tensor([tokenizer.encode(LONG)])
    with torch.inference_mode():
        cache = model.new_cache(1, ids.size(1))
        model(ids[:, :70], cache=cache, logits=None)
        last = model(ids[:, 70:], cache=cache, logits="last").logits
        hidden, logits = model(ids[:, :40])
    streamed: dict[str, list[str]] = {}
    for piece in minllama.stream(model, tokenizer, PROMPTS, max_new_tokens=10, stop=["."]):
        streamed.setdefault(f"row {piece.row}", []).append(piece.text)
    return {
        "stream": streamed,
        "conversation": answers,
        "model.generate": [
            model.generate(ids[:, :9].expand(2, -1), 8, temperature, seed=3).tolist()
            for temperature in (0.0, 1.0)
        ],
        "logits after a cache": last[0, :16].tolist(),
        "logits": [logits[0, -1, :16].tolist(), hidden[0, -1, :16].tolist()],
    }


def generate(results: Results) -> None:
    for form in FORMS:
        called(results, f"generate {form}", partial(generations, form))
    short = ("--max-new-tokens", "8")
    for name, arguments, stdin in (
        ("json", (PROMPTS[0], "--json", "--n", "2", "--temperature", "1", "--seed", "7"), ""),
        ("logprobs", (PROMPTS[1], "--json", "--logprobs", "2"), ""),
        ("tiny", (PROMPTS[0], "-m", "base", "--dtype", "float32", "--json", "--logprobs", "1"), ""),
        ("tiny bfloat16", (PROMPTS[0], "-m", "base", "--dtype", "bfloat16", "--json"), ""),
        ("tiny int8", (PROMPTS[0], "-m", "base", "--quantize", "int8", "--json"), ""),
        ("tiny int4", (PROMPTS[0], "-m", "base", "--quantize", "int4", "--json"), ""),
    ):
        ended = ran(results, f"generate cli {name}", "generate", *arguments, *short, stdin=stdin)
        lines = ended.out.splitlines()
        results.add_json(f"generate cli {name}", [json.loads(line) for line in lines])
    printed: tuple[tuple[str, tuple[str, ...], str], ...] = (
        ("text", ("generate", PROMPTS[2]), ""),
        ("stdin", ("generate", "Then"), "Two llamas met on a bridge.\n"),
        ("chat", ("generate", "What is a llama?", "--chat", "--system", "Be brief."), ""),
        ("special", ("generate", "<|im_start|>user\nHi<|im_end|>", "--special"), ""),
        ("session", ("chat", "--system", "Be brief."), "What is a llama?\n/reset\nAnd a horse?\n"),
    )
    for name, options, stdin in printed:
        ended = ran(results, f"generate cli {name}", *options, *short, stdin=stdin)
        results.values[f"generate cli {name}"] = ended.out


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "[{{ m.role | upper }}] {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[ASSISTANT]{% endif %}"
)


def rendered() -> dict[str, Any]:
    """What a template makes of messages."""
    import minllama

    template = minllama.ChatTemplate(TEMPLATE, bos_token="<s>")
    messages = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "What is <s> [/INST]?"},
    ]
    return {
        "rendered": template.render(messages),
        "rendered without a prompt": template.render(messages, add_generation_prompt=False),
    }


def chat(results: Results) -> None:
    called(results, "chat api", rendered)
    (results.folder / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    options = ("--chat-template", "chat.jinja", "--system", "Be brief.", "--max-new-tokens", "8")
    ask = ("generate", "What is a llama?", "--chat", *options, "--json")
    ended = ran(results, "chat own template", *ask)
    results.add_json("chat own template", [json.loads(line) for line in ended.out.splitlines()])
    ended = ran(results, "chat session", "chat", *options, stdin="Hello\nAnd now?\n")
    results.values["chat session"] = ended.out


def label_scores() -> dict[str, Any]:
    """Every digit of what label words get, and of a text's vectors."""
    import minllama

    tokenizer = minllama.Tokenizer.from_pretrained()
    lines = Path("few.csv").read_text(encoding="utf-8").splitlines()
    texts = [row["text"] for row in csv.DictReader(lines)]
    found: dict[str, Any] = {}
    for form in ("auto", "float32"):
        model = minllama.load_pretrained(device="cpu", **FORMS[form])
        for score in SCORES:
            classifier = minllama.LlamaZeroShotClassifier(
                model, tokenizer, LABELS, prompt=ASK, score=score, label_words=("bad", "very good",
                "open question", "wish"),
            )  # fmt: skip
            if score == "batch":
                classifier.fit_prior(texts)
            found[f"{form} {score}"] = classifier.predict_logits(texts[:8]).tolist()
        shots = [("It broke at once.", "complaint"), ("I love it!", "praise")]
        few = minllama.LlamaZeroShotClassifier(model, tokenizer, LABELS, prompt=ASK, shots=shots)
        found[f"{form} shots"] = few.predict_proba(texts[:8]).tolist()
        for pooling in ("last", "mean", "weighted-mean"):
            head = minllama.LlamaEmbeddingClassifier(model, tokenizer, LABELS, pooling, layer=16)
            ids = torch.tensor([tokenizer.encode(LONG)[:30]] * 2)
            mask = torch.arange(30) < torch.tensor([[30], [17]])
            with torch.inference_mode():
                vectors = head.eval().compute_embeddings(ids, mask)
            found[f"{form} vectors {pooling}"] = vectors[:, :16].tolist()
    return found


def classify(results: Results) -> None:
    called(results, "classify api", label_scores)
    ask = ("--labels", ",".join(LABELS), "--prompt", ASK)
    for score in SCORES:
        key = f"classify {score}"
        ended = ran(results, key, "classify", *ask, "--score", score, "--input", "few.csv")
        results.add_json(key, [json.loads(line) for line in ended.out.splitlines()])
    for name, options in {
        "text": ("--text", "Where is it?", "--text", "It broke."),
        "chat": ("--text", "Where is it?", "--json", "--chat", "--system", "You sort messages."),
        "none": ("--text", "Where is it?", "--json", "--quantize", "none"),
        "prior": ("--text", "Where is it?", "--json", "--score", "pmi", "--prior-strength", "0.5"),
        "short": ("--text", LONG, "--json", "--max-len", "40", "--keep-end"),
    }.items():
        ended = ran(results, f"classify {name}", "classify", *ask, *options)
        results.values[f"classify {name}"] = results.mask(ended.out).splitlines()


def convert(results: Results) -> None:
    """A tiny model into every format and dtype, and back."""
    add_info(results, "convert info default")
    add_info(results, "convert info tiny", "base")
    for form, dtypes in (
        ("hf", ("", "float32", "bfloat16", "float16")),
        ("gguf", ("", "float32", "bfloat16", "float16", "q8_0")),
        ("llama2c", ("",)),
    ):
        for dtype in dtypes:
            ending = {"hf": "", "gguf": ".gguf", "llama2c": ".bin"}[form]
            key, output = f"convert {form} {dtype or 'stored'}", f"tiny-{form}-{dtype}{ending}"
            options = ("--dtype", dtype) if dtype else ()
            ran(results, key, "convert", "base", output, "--to", form, *options)
            results.add_files(key, results.folder / output)
    for name in ("tiny-gguf-q8_0.gguf", "tiny-gguf-.gguf", "tiny-llama2c-.bin", "tiny-hf-float16"):
        key, output = f"convert back {name}", f"back-{name}"
        tokenizer = ("--tokenizer", "base") if name.endswith(".bin") else ()
        ran(results, key, "convert", name, output, "--to", "hf", *tokenizer)
        results.add_files(key, results.folder / output)
        add_info(results, f"convert info {name}", name, *tokenizer)
        said = ("generate", PROMPTS[0], "-m", name, *tokenizer, "--max-new-tokens", "6", "--json")
        ended = ran(results, f"convert run {name}", *said, "--logprobs", "1")
        results.add_json(
            f"convert run {name}", [json.loads(line) for line in ended.out.splitlines()]
        )


COMMANDS = ("generate", "chat", "train", "evaluate", "classify", "merge", "info", "convert")


def help_pages(results: Results) -> None:
    """Names of commands and options, their choices and defaults are results, pages are wording."""
    page = command(results, "--help").out
    results.add_text("help minllama", page)
    listed = page.partition("Commands:")[2]
    results.values["help commands"] = sorted(re.findall(r"(?m)^  (\w+) ", listed))
    results.values["help version"] = command(results, "--version").status
    for name in COMMANDS:
        page = command(results, name, "--help").out
        results.add_text(f"help {name}", page)
        options = re.split(r"(?m)^  (?=-)", page)[1:]
        found = {}
        for text in sorted(" ".join(option.split()) for option in options):
            flags = [word.strip(",") for word in text.split()[:2] if word.startswith("-")]
            choices = re.findall(r"\[[a-z][\w-]*(?:\|[\w-]+)+\]", text)
            defaults = re.findall(r"\(default ([^()]*)\)", text)
            found[", ".join(flags)] = " ".join([*choices, *defaults])
        results.values[f"help {name}"] = found


MISTAKES: dict[str, tuple[str, ...]] = {
    "no command": (),
    "unknown command": ("generat", "x"),
    "unknown option": ("generate", "x", "--temprature", "1"),
    "out of range": ("generate", "x", "--top-p", "2"),
    "no such model": ("generate", "x", "-m", "./nowhere"),
    "broken model": ("info", "few.csv"),
    "not cached": ("info", "nobody/nothing"),
    "empty prompt": ("generate", ""),
    "too long": ("generate", "x " * 200, "-m", "base"),
    "schema": ("generate", "x", "--json-schema", "{"),
    "no data": ("train", "--train", "nowhere.csv", "-o", "bad"),
    "no column": ("train", "--train", "shop-dev.csv", "--label-column", "class", "-o", "bad"),
    "idle option": ("train", "--train", "dev.txt", "--method", "frozen", "--r", "8", "-o", "bad"),
    "prompt": ("train", "--train", "dev.txt", "-m", "base", "--prompt", "no", "-o", "bad"),
    "layer": (
        "train", "--train", "dev.txt", "-m", "base", "--method", "frozen", "--layer", "9",
        "-o", "bad",
    ),
    "one label": ("classify", "--labels", "a", "--text", "x"),
    "no classifier": ("classify", "base", "--text", "x"),
    "not there": ("convert", "base", "few.csv", "--to", "gguf"),
    "no resume": ("train", "--train", "dev.txt", "-m", "base", "--resume", "-o", "bad"),
}  # fmt: skip


def mistakes(results: Results) -> None:
    """Exit statuses and what was left behind are results, error lines are wording."""
    for name, arguments in MISTAKES.items():
        ended = command(results, *arguments)
        lines = ended.err.splitlines()
        results.values[f"mistakes {name}"] = {
            "status": ended.status,
            "printed": bool(ended.out),
            "last line is ours": bool(lines) and lines[-1].startswith("minllama: "),
            "output": (results.folder / "bad").exists(),
        }
        results.add_text(f"mistakes {name}", ended.err)


GROUPS: dict[str, Callable[[Results], None]] = {
    "help": help_pages,
    "mistakes": mistakes,
    "convert": convert,
    "steps": train_by_hand,
    "train": train,
    "classify": classify,
    "generate": generate,
    "chat": chat,
}
