"""`minllama merge`: merge a classifier's adapter into its weights."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minllama.atomic import check_folder_writable, check_replaceable
from minllama.cli.convert import write
from minllama.cli.grouped import GroupedCommand, option
from minllama.cli.open import (
    classifier_options,
    debug_option,
    ended_by_interrupts,
    pick,
    torch_dtype,
)
from minllama.errors import MinllamaError
from minllama.options.loading import LoadOptions
from minllama.text import one_line

if TYPE_CHECKING:
    import torch

    from minllama.classification import Classifier


@click.command("merge", cls=GroupedCommand)
@click.argument("classifier")
@click.argument("dst")
@option(
    "--to",
    "target",
    type=click.Choice(["hf"]),
    group="Output",
    common=True,
    help="Write transformers' LlamaForSequenceClassification, if it can represent CLASSIFIER.",
)
@option("--force", is_flag=True, group="Output", help="Replace DST if it exists.")
@classifier_options
@debug_option
def command(
    classifier: str,
    dst: str,
    target: str | None,
    force: bool,
    **values: Any,
) -> None:
    """Write CLASSIFIER to DST as a complete model that needs no base model.

    A PEFT adapter's folder becomes a Hugging Face folder, as with minllama convert.
    """
    loading = pick(LoadOptions, values)
    _check_target(dst, force=force)
    with ended_by_interrupts():
        from minllama.checkpoints.open import CLASSIFIER_FILE, open_checkpoint
        from minllama.checkpoints.peft import is_adapter
        from minllama.checkpoints.peft_config import read_adapter_config
        from minllama.checkpoints.resolve import folder_of, source_of
        from minllama.classification.storage.save_load import (
            load_classifier_with,
            weight_format_in_training,
        )
        from minllama.experiment.output_folder import RECORDS, check_not_base

    source = folder_of(classifier)
    is_of_peft = not (source / CLASSIFIER_FILE).is_file() and is_adapter(source)
    if is_of_peft and not read_adapter_config(source).has_head:
        checkpoint = open_checkpoint(source, tokenizer=loading.tokenizer, base=loading.base)
        write(checkpoint, dst, "hf", loading.dtype)
        return
    as_trained = replace(loading, quantize=weight_format_in_training(source))
    loaded = load_classifier_with(source, as_trained)
    dtype = torch_dtype(loading.dtype)
    check_not_base(Path(dst), loaded.llama.source and source_of(loaded.llama.source))
    if target == "hf":
        _write_for_transformers(loaded, dst, dtype, removes=RECORDS)
    else:
        _write_merged(loaded, source, dst, dtype)


def _check_target(dst: str, *, force: bool) -> None:
    """Refuse what cannot be written before a model is read."""
    if not dst:
        raise MinllamaError("DST is empty; name a folder to write")
    check_replaceable(dst)
    if Path(dst).exists() and not force:
        raise MinllamaError(f"{dst} exists; --force replaces it")
    check_folder_writable(dst)


def _write_merged(
    classifier: "Classifier", source: Path, dst: str, dtype: "torch.dtype | None"
) -> None:
    """Write a minllama classifier with its adapter merged, and the records of its training."""
    from minllama.classification.storage.save_load import (
        classifier_settings,
        merge_classifier,
        save_classifier,
    )
    from minllama.experiment.evaluate import saved_headlines, saved_verdicts
    from minllama.experiment.output_folder import RECORDS, copy_records

    metrics, verdicts = saved_headlines(source), saved_verdicts(source)
    drift = merge_classifier(classifier, dtype=dtype)
    merged = {"merged from": str(source), "largest drift of a logit": float(f"{drift:.2g}")}
    save_classifier(
        classifier,
        dst,
        training={**classifier_settings(source), **merged},
        metrics=metrics,
        verdicts=verdicts,
        also=lambda folder: copy_records(source, folder),
        removes=RECORDS,  # of an earlier run in `dst`
    )
    click.echo(one_line(f"wrote {dst}; the largest drift of a logit is {drift:.2g}"), err=True)


def _write_for_transformers(
    classifier: "Classifier",
    dst: str,
    dtype: "torch.dtype | None",
    *,
    removes: Collection[str],
) -> None:
    """Write a LlamaForSequenceClassification folder, with any adapter merged."""
    from minllama.classification.storage.save_load import merge_classifier
    from minllama.classification.storage.transformers_export import (
        check_exportable,
        save_for_transformers,
    )
    from minllama.lora import adapter_names

    check_exportable(classifier)
    drift = ""
    if adapter_names(classifier.llama):
        drift = f"; the largest drift of a logit is {merge_classifier(classifier, dtype=dtype):.2g}"
    elif dtype is not None:
        classifier.llama.to(dtype)
    for note in save_for_transformers(classifier, dst, removes=removes):
        click.echo(one_line(note), err=True)
    wrote = f"wrote {dst} for transformers (LlamaForSequenceClassification){drift}"
    click.echo(one_line(wrote), err=True)
