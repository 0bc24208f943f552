"""`minllama info`: describe a checkpoint."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from minllama.cli.grouped import GroupedCommand, option
from minllama.cli.open import base_option, debug_option, ended_by_interrupts
from minllama.options.loading import LoadOptions
from minllama.text import cut, escaped, first_few, one_line, printable

if TYPE_CHECKING:
    from minllama.checkpoints.types import Checkpoint
    from minllama.model.config import LlamaConfig
    from minllama.tokenizer.vocabulary import Vocabulary

MAX_TEMPLATES = 20  # shown by name


@click.command("info", cls=GroupedCommand)
@click.argument("model", required=False)
@option(
    "--tokenizer", metavar="PATH", group="Model", help="Tokenizer: a file (also GGUF) or folder."
)
@base_option
@debug_option
def command(model: str | None, tokenizer: str | None, base: str | None) -> None:
    """Describe MODEL: a file, a folder or a Hugging Face id (default: the embedded model).

    MODEL may also be the folder of a classifier that `minllama train` wrote.
    """
    with ended_by_interrupts():
        from minllama.checkpoints.open import open_checkpoint
        from minllama.checkpoints.resolve import folder_of

    folder = None if model is None else folder_of(model)
    if folder is not None and (folder / "classifier.json").is_file():
        _show_classifier(folder)
        if not (folder / "config.json").is_file():
            return  # its base model is elsewhere

    checkpoint = open_checkpoint(model, tokenizer=tokenizer, base=base)
    for name, value in describe(checkpoint):
        click.echo(f"{name:<12} {one_line(value)}")


def _show_classifier(folder: Path) -> None:
    with ended_by_interrupts():
        from minllama.classification.storage.manifest import CLASSIFIER_FILE, in_words

    for name, value in in_words(folder / CLASSIFIER_FILE):
        click.echo(f"{name:<12} {printable(value)}")


def describe(checkpoint: "Checkpoint") -> list[tuple[str, str]]:
    """Pairs of name and value, for the terminal."""
    config = checkpoint.config
    tensors = checkpoint.tensors.values()
    stored = Counter[str]()
    n_parameters = 0
    for tensor in tensors:
        size = 1
        for side in tensor.shape:
            size *= side
        stored[tensor.stored_as] += size
        n_parameters += size
    stored_bytes = sum(tensor.stored_bytes for tensor in tensors)
    share = ", ".join(f"{kind} {_percent(n / n_parameters)}" for kind, n in stored.most_common())
    lines = [
        ("path", str(checkpoint.path)),
        ("family", f"Llama, {'causal' if config.causal else 'bidirectional'}"),
        ("format", checkpoint.format),
        ("shape", _shape(config)),
        ("parameters", f"{n_parameters:,}"),
        ("bytes", f"{stored_bytes:,}"),
        ("dtype", share),
        ("context", f"{config.context_len:,} tokens"),
        ("rope", _rope(config)),
        *_use(checkpoint),
        *_kernels(checkpoint),
        *_vocabulary(checkpoint.vocabulary),
        *_sampling(checkpoint),
    ]
    if checkpoint.ignored:
        lines.append(("not read", ", ".join(checkpoint.ignored)))
    return lines


def _use(checkpoint: "Checkpoint") -> list[tuple[str, str]]:
    """How the checkpoint runs; what a sequence classifier predicts."""
    head = checkpoint.head
    if head is None:
        return [("runs as", _runs_as(checkpoint))]
    from minllama.checkpoints.huggingface_head import (
        HEAD_WEIGHT,
        REGRESSION,
        SEQUENCE_CLASSIFIER,
        SEVERAL_LABELS,
    )
    from minllama.errors import naming
    from minllama.text import listed

    with naming(checkpoint.path):
        weight = checkpoint.tensors.get(HEAD_WEIGHT)
        n_outputs = weight.shape[0] if weight is not None and weight.shape else 0
        names = head.labels_of(n_outputs)
        problem = head.problem_of(n_outputs)
    labels = f"{len(names)} labels ({listed(names)})"
    predicts = {
        REGRESSION: "a number per text",
        SEVERAL_LABELS: f"any number of {labels} for each text",
    }.get(problem, f"one of {labels} for each text")
    return [
        ("head", f"{SEQUENCE_CLASSIFIER}: {predicts}"),
        ("opened by", "minllama classify, minllama evaluate, load_classifier()"),
    ]


def _runs_as(checkpoint: "Checkpoint") -> str:
    """How `generate` computes with the file on this machine by default."""
    from minllama.checkpoints.weight_format import has_blocks, resolve_weight_format
    from minllama.engine import cuda_graph
    from minllama.kernels.cpu.library import best_level, library
    from minllama.kernels.gpu import launch as gpu
    from minllama.kernels.hardware import LEVELS, fast_bfloat16

    weights = resolve_weight_format(checkpoint, LoadOptions(quantize="auto"))
    device, quantize = weights.device, weights.quantize
    if quantize is not None and not has_blocks(checkpoint):
        return f"the file's half-precision weights, computed in float32 ({LEVELS[best_level()]})"
    if quantize is not None:
        others = _rounded_again(checkpoint)
        blocks = "the file's quantized blocks" + (f", {others} in 8 bits" if others else "")
        text = f"{blocks} ({LEVELS[best_level()]})"
        return f"{text}; scores texts in bfloat16" if fast_bfloat16(device) else text
    name = str(weights.dtype).removeprefix("torch.")
    if device.type != "cpu":
        has_steps = cuda_graph.supports_config(checkpoint.config) and gpu.works(device)
        steps = "; decode steps in CUDA graphs" if has_steps else ""
        return f"{name} on {device.type}{steps}"
    compiled = LEVELS[best_level()] if library() is not None else "not compiled, so slow"
    return f"{name} ({compiled})"


def _kernels(checkpoint: "Checkpoint") -> list[tuple[str, str]]:
    """Which kernel computes passes of which size over these weights on this CPU, and why."""
    import torch

    from minllama.checkpoints.weight_format import has_blocks, resolve_weight_format
    from minllama.kernels.cpu.library import best_level, library
    from minllama.kernels.hardware import CHOICES, OF_PASSES, choice, fast_bfloat16

    reads = resolve_weight_format(checkpoint, LoadOptions(quantize="auto"), "read")
    weights = resolve_weight_format(checkpoint, LoadOptions(quantize="auto"))
    if weights.device.type != "cpu" or library() is None:
        return []
    if weights.quantize is not None and has_blocks(checkpoint):
        names = ["quantized", "quantized pass"]
    else:
        names = ["dense step", "dense pass"]
        if weights.dtype == torch.float32:
            names.append("upcast" if weights.quantize else "dense")
    is_long = "quantized" in names and fast_bfloat16("cpu")  # long passes are of bfloat16
    of_passes = torch.bfloat16 if is_long else weights.dtype
    dtypes = [of_passes if name in OF_PASSES else weights.dtype for name in names]
    rows = [
        (CHOICES[name][0], choice(name, best_level(), dtype))
        for name, dtype in zip(names, dtypes, strict=True)
    ]
    if is_long:
        what = "the same to score texts"
        rows.insert(1, (what, choice("quantized", best_level(), torch.bfloat16)))
    rows.append((CHOICES["attention"][0], choice("attention", best_level(), reads.dtype)))
    lines = [
        line
        for what, chosen in rows
        for line in (f"{what}: compiled code, {chosen.size}", f"  {chosen.reason}")
    ]
    return [("" if number else "kernels", line) for number, line in enumerate(lines)]


def _rounded_again(checkpoint: "Checkpoint") -> str:
    """The quantized types of a file that are converted to 8 bits; "" for none."""
    from minllama.quantization.modules import BITS

    block_formats = {stored.name for stored in BITS}
    matrices = [t for t in checkpoint.tensors.values() if len(t.shape) == 2 and t.blocks]
    return ", ".join(sorted({tensor.stored_as for tensor in matrices} - block_formats))


def _percent(share: float) -> str:
    return "< 0.1%" if share < 0.001 else f"{share:.1%}"


def _shape(config: "LlamaConfig") -> str:
    parts = [
        f"dim {config.dim}",
        f"layers {config.n_layers}",
        f"heads {config.n_heads}/{config.n_kv_heads} x {config.head_dim}",
        f"hidden {config.hidden_dim}",
        f"vocabulary {config.vocab_size:,}",
        "tied" if config.tie_embeddings else "untied",
    ]
    if config.attention_bias or config.ffn_bias:
        parts.append("biases")
    return ", ".join(parts)


def _rope(config: "LlamaConfig") -> str:
    text = f"theta {config.rope_theta:g}"
    if scaling := config.rope_scaling:
        text += f", {scaling.kind}"
        if scaling.kind != "factors":
            text += f" x {scaling.factor:g}"
        if scaling.original_max_seq_len:
            text += f" from {scaling.original_max_seq_len:,}"
    return text


def _vocabulary(vocabulary: "Vocabulary | None") -> list[tuple[str, str]]:
    if vocabulary is None:
        return [("tokenizer", "none; name one with --tokenizer")]
    ids = [
        f"{name} {token_id}"
        for name, token_id in (
            ("bos", vocabulary.bos_id),
            ("eos", vocabulary.eos_id),
            ("pad", vocabulary.pad_id),
        )
        if token_id is not None
    ]
    return [
        ("tokenizer", ", ".join([vocabulary.origin, *ids])),
        ("template", _templates(vocabulary)),
    ]


def _templates(vocabulary: "Vocabulary") -> str:
    template, names = vocabulary.chat_template, sorted(vocabulary.chat_templates)
    shown = first_few((escaped(cut(name, 40)) for name in names), MAX_TEMPLATES)
    if template is None:
        return f"none by default; by name: {shown}" if names else "none"
    text = f"chat, {len(template):,} characters"
    return f"{text}; by name: {shown}" if names else text


def _sampling(checkpoint: "Checkpoint") -> list[tuple[str, str]]:
    """The sampling options that the checkpoint recommends, if any."""
    from minllama.errors import CheckpointError
    from minllama.generation.checkpoint_defaults import sampling_defaults

    try:
        defaults = sampling_defaults(checkpoint)
    except CheckpointError as error:  # the rest of the description is still valid
        return [("sampling", str(error))]
    return [] if defaults is None else [("sampling", f"{defaults} (with --generation-config)")]
