"""`minllama merge`: a classifier's adapter becomes part of its weights."""

from pathlib import Path

import click

from minllama.atomic import check_folder_writable, check_replaceable
from minllama.cli.common import (
    classifier_options,
    debug_option,
    ended_by_interrupts,
    torch_dtype,
)
from minllama.cli.convert import write
from minllama.errors import MinllamaError
from minllama.text import one_line


@click.command("merge")
@click.argument("classifier")
@click.argument("dst")
@click.option("--force", is_flag=True, help="Replace DST where it exists.")
@classifier_options
@debug_option
def command(
    classifier: str,
    dst: str,
    force: bool,
    base: str | None,
    tokenizer: str | None,
    dtype: str | None,
    device: str | None,
) -> None:
    """Write CLASSIFIER to DST as a model of its own, which needs no base model any more.

    A PEFT adapter's folder becomes a Hugging Face folder, as by minllama convert.
    """
    if not dst:
        raise MinllamaError("the name of DST is empty; name a folder to write")
    check_replaceable(dst)
    if Path(dst).exists() and not force:
        raise MinllamaError(f"{dst} exists; --force replaces it")
    check_folder_writable(dst)
    with ended_by_interrupts():
        from minllama.checkpoints import CLASSIFIER_FILE, open_checkpoint
        from minllama.checkpoints.adapter import is_adapter
        from minllama.checkpoints.source import source_of
        from minllama.classifier import load_classifier
        from minllama.classifier.files import (
            classifier_settings,
            form_in_training,
            merge_classifier,
            save_classifier,
        )
        from minllama.experiment.folder import RECORDS, check_not_base, copy_records
        from minllama.experiment.measuring import saved_headlines, saved_verdicts

    source = Path(classifier)
    if not (source / CLASSIFIER_FILE).is_file() and is_adapter(source):
        write(open_checkpoint(source, tokenizer=tokenizer, base=base), dst, "hf", dtype)
        return
    loaded = load_classifier(
        source,
        model=base,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        quantize=form_in_training(source),
    )
    check_not_base(Path(dst), loaded.llama.source and source_of(loaded.llama.source))
    metrics, verdicts = saved_headlines(source), saved_verdicts(source)
    drift = merge_classifier(loaded, dtype=torch_dtype(dtype))
    merged = {"merged from": classifier, "largest drift of a logit": float(f"{drift:.2g}")}
    save_classifier(
        loaded,
        dst,
        training={**classifier_settings(source), **merged},
        metrics=metrics,
        verdicts=verdicts,
        also=lambda folder: copy_records(source, folder),
        removes=RECORDS,  # those of what was there before
    )
    click.echo(one_line(f"wrote {dst}; the largest drift of a logit is {drift:.2g}"), err=True)
