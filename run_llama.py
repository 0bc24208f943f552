"""The classic script: generate, prompt, finetune or lora, from one command.

A thin caller of the package with the arguments that the course project around minllama made
common. `minllama train | evaluate | classify` do more; `--help` of both says what.

    python run_llama.py --option generate
    python run_llama.py --option prompt --dev D --test T --label-names M
    python run_llama.py --option finetune --train F --dev D --test T --epochs 5 --lr 2e-5
    python run_llama.py --option lora --train F --dev D --test T --epochs 3 --lr 3e-4
"""

import argparse
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minllama.errors import MinllamaError

if TYPE_CHECKING:
    from minllama.cli.waiting import ConsoleReporter
    from minllama.evaluation.report import ReportedSplit
    from minllama.model.llama import Llama
    from minllama.options import DataOptions
    from minllama.tokenizer.tokenizer import Tokenizer

STORY = "The old lighthouse keeper had not spoken to anyone for weeks. One evening, however,"
QUESTION = "{text} Is this movie {labels}? This movie is"
METHODS = {"finetune": "full", "lora": "lora"}
FLAGS = {"max_len": "--max_sentence_len", "dropout": "--hidden_dropout_prob"}  # of our options
LEARNING_RATES = {"finetune": 2e-5, "lora": 3e-4}


def arguments() -> argparse.ArgumentParser:
    """The classic command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--option", choices=("generate", "prompt", "finetune", "lora"), default="generate")
    add("--train", help="labelled lines: `label ||| sentence`, or any file `minllama train` reads")
    add("--dev", help="as --train; evaluated, and predicted to --dev_out")
    add("--test", help="as --train, or without labels (-1); predicted to --test_out")
    add("--label-names", help="JSON file {name: number}; the names are what prompt asks for")
    add("--skip-bad-rows", action="store_true", help="leave out rows that cannot be used")
    add("--pretrained-model-path", help="any checkpoint; without it the embedded default model")
    add("--tokenizer", help="where none lies beside the model, as for llama2.c's .pt")
    add("--max_sentence_len", type=int, help="shorten texts to so many tokens")
    add("--seed", type=int, default=1337)
    add("--epochs", type=int, default=5)
    add("--batch_size", type=int, default=8)
    add("--lr", type=float, help="2e-5 for finetune and 3e-4 for lora without it")
    add("--hidden_dropout_prob", type=float, default=0.3)
    add("--use_gpu", action="store_true")
    add("--dev_out", default="dev-output.txt", help="predictions as `label ||| sentence`")
    add("--test_out", default="test-output.txt")
    add("--generated_sentence_low_temp_out", default="generated-sentence-temp-0.txt")
    add("--generated_sentence_high_temp_out", default="generated-sentence-temp-1.txt")
    add("--output", help="folder of the trained classifier (default runs/OPTION-EPOCHS-LR)")
    add("--force", action="store_true", help="replace an earlier run in that folder")
    add("--resume", action="store_true", help="continue an interrupted run in that folder")
    return parser


def main(given: list[str] | None = None) -> int:
    """Run one option; 0 done, 2 the user's mistake, in one line."""
    args = arguments().parse_args(given)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that it lacks is no reason to end
            stream.reconfigure(errors="replace")
    try:
        {"generate": generate, "prompt": prompt}.get(args.option, train)(args)
    except (MinllamaError, OSError) as error:
        said = " ".join(str(error).split())
        name, _, rest = said.partition(" ")
        print(f"run_llama.py: {FLAGS.get(name, name)} {rest}".rstrip(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def generate(args: argparse.Namespace) -> None:
    """The same prompt at temperature 0 and at 1, each into its file."""
    from minllama.generation.api import generate as generate_texts

    check_outputs(args, "generated_sentence_low_temp_out", "generated_sentence_high_temp_out")
    model, tokenizer = open_model(args)
    for temperature, path in (
        (0.0, args.generated_sentence_low_temp_out),
        (1.0, args.generated_sentence_high_temp_out),
    ):
        (result,) = generate_texts(
            model,
            tokenizer,
            [STORY],
            max_new_tokens=75,
            temperature=temperature,
            seed=args.seed,
        )
        write_lines(path, [STORY + result.text])
        print(f"temperature {temperature:g}, written to {path}:\n{STORY}{result.text}\n")


def prompt(args: argparse.Namespace) -> None:
    """Zero-shot: which label's name is likeliest after each sentence and a question?"""
    from minllama.data import load_dataset, read_label_names
    from minllama.experiment import evaluate_classifier
    from minllama.experiment.build import make_zero_shot
    from minllama.experiment.predict import described
    from minllama.experiment.splits import without_placeholders
    from minllama.options import PromptOptions, ZeroShotOptions

    need(args, "label_names", "dev")
    check_outputs(args, *prediction_files(args))
    names = read_label_names(args.label_names)
    options = data_options(args)
    splits = {
        name: load_dataset(path, options, label_names=list(names.values()), needs_labels=False)
        for name, path in (("dev", args.dev), ("test", args.test))
        if path is not None
    }
    model, tokenizer = open_model(args)
    classifier = make_zero_shot(
        model,
        tokenizer,
        list(names.values()),
        PromptOptions(prompt=QUESTION, max_len=args.max_sentence_len),
        ZeroShotOptions(),
    )
    reporter = console()
    reporter.message(described(classifier))
    for name, split in splits.items():
        measured = without_placeholders(split)
        for notice in measured.notices:
            reporter.message(str(notice))
        progress = reporter.advance(f"reading {name}", len(split))
        reported = evaluate_classifier(classifier, measured, name, progress=progress)
        reporter.close()
        tell(args, reported, [str(number) for number in names])


def train(args: argparse.Namespace) -> None:
    """Train a head on the last token, with all weights or with adapters; then predict."""
    from minllama.data import read_label_names
    from minllama.evaluation.report import ReportedSplit
    from minllama.experiment import Experiment, run_experiment
    from minllama.options import ClassifierOptions, PromptOptions, TrainingOptions

    need(args, "train", "dev")
    check_outputs(args, *prediction_files(args))
    if args.output == "":
        raise MinllamaError("the name of --output is empty; name a folder, or leave it away")
    lr = LEARNING_RATES[args.option] if args.lr is None else args.lr
    output = args.output or f"runs/{args.option}-{args.epochs}-{lr:g}"
    reporter = console()
    try:
        outcome = run_experiment(
            Experiment(
                train=args.train,
                dev=args.dev,
                test=args.test,
                output=Path(output),
                model=args.pretrained_model_path,
                tokenizer=args.tokenizer,
                device=device(args),
                data=data_options(args),
                prompt=PromptOptions(max_len=args.max_sentence_len),
                classifier=ClassifierOptions(
                    method=METHODS[args.option],
                    layer="all",
                    pooling="last",
                    dropout=args.hidden_dropout_prob,
                ),
                training=TrainingOptions(
                    epochs=args.epochs,
                    batch_size=args.batch_size,
                    lr=lr,
                    head_lr=lr,  # the classic script has one
                    seed=args.seed,
                ),
                llama_changes={"dropout": args.hidden_dropout_prob},
            ),
            force=args.force,
            resume=args.resume,
            reporter=reporter,
        )
    except KeyboardInterrupt:
        if (Path(output) / "checkpoint").exists():
            said = f"interrupted; {output} has a checkpoint: --resume continues it"
            print(said, file=sys.stderr)
        raise
    finally:
        reporter.close()
    # Files of the course have numbers, and so have the predictions, whatever the classes' names.
    written = list(outcome.report.label_names)
    if args.label_names is not None:
        written = [str(number) for number in read_label_names(args.label_names)]
    for reported in outcome.report.splits:
        assert isinstance(reported, ReportedSplit)  # and no numbers
        tell(args, reported, written, multi_label=outcome.report.multi_label)
    print(f"classifier and report: {output}")


def tell(
    args: argparse.Namespace,
    split: "ReportedSplit",
    labels: list[str],
    *,
    multi_label: bool = False,
) -> None:
    """Print a split's accuracy, if it has labels, and write its predictions."""
    from minllama.evaluation.metrics import predictions

    path = {"dev": args.dev_out, "test": args.test_out}[split.name]
    chosen = predictions(split.probabilities, multi_label=multi_label)
    rows = zip(chosen, split.texts, strict=True)
    lines = [
        f"{','.join(labels[i] for i in row.nonzero()[0])} ||| {' '.join(text.split())}"
        for row, text in rows
    ]
    write_lines(path, lines)
    said = "no labels to compare with"
    if split.evaluation is not None:
        said = f"accuracy {split.evaluation.accuracy:.3f}"
    print(f"{split.name}: {said}; predictions in {path}")


def open_model(args: argparse.Namespace) -> "tuple[Llama, Tokenizer]":
    """The checkpoint that the arguments name, and its tokenizer."""
    from minllama.cli.open import open_model as open_checkpoint_and_model
    from minllama.options.loading import LoadOptions

    model, tokenizer, _ = open_checkpoint_and_model(
        args.pretrained_model_path, LoadOptions(tokenizer=args.tokenizer, device=device(args))
    )
    return model, tokenizer


def device(args: argparse.Namespace) -> str:
    """`cuda` if the GPU is asked for, else `cpu`."""
    if not args.use_gpu:
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise MinllamaError("--use_gpu: torch sees no CUDA device here; leave it away")
    return "cuda"


def console() -> "ConsoleReporter":
    """Lines and bars on standard error."""
    from minllama.cli.waiting import ConsoleReporter

    return ConsoleReporter()


def need(args: argparse.Namespace, *names: str) -> None:
    """Refuse to begin without these arguments."""
    for name in names:
        if getattr(args, name) is None:
            flag = "--" + name.replace("_", "-")
            raise MinllamaError(f"--option {args.option} needs {flag} FILE; --help says more")


def data_options(args: argparse.Namespace) -> "DataOptions":
    """How the files of examples are read."""
    from minllama.options import DataOptions

    return DataOptions(label_names=args.label_names, skip_bad_rows=args.skip_bad_rows)


def prediction_files(args: argparse.Namespace) -> list[str]:
    """The arguments that name the files of predictions which will be written."""
    return ["dev_out"] if args.test is None else ["dev_out", "test_out"]


def check_outputs(args: argparse.Namespace, *names: str) -> None:
    """Refuse before the work what cannot be written after it, or would replace what is read."""
    from minllama.atomic import check_file_writable
    from minllama.data import is_source

    for i, name in enumerate(names):
        path = getattr(args, name)
        for other in names[:i]:
            if Path(path).resolve() == Path(getattr(args, other)).resolve():
                raise MinllamaError(f"--{name} and --{other} are both {path}; name another")
        for read in ("train", "dev", "test", "label_names", "pretrained_model_path", "tokenizer"):
            source = getattr(args, read)
            if source is not None and any(is_source(path, file) for file in files_of(source)):
                flag = read.replace("_", "-")
                raise MinllamaError(f"--{name} {path} is a file of --{flag}; name another")
        check_file_writable(path)


def files_of(source: str) -> list[str]:
    """What is read of a source: itself, or the files of a folder."""
    folder = Path(source).expanduser()
    return [str(path) for path in folder.iterdir()] if folder.is_dir() else [source]


def write_lines(path: str, lines: list[str]) -> None:
    """Write a file whole or not at all."""
    from minllama.atomic import atomic_file

    with atomic_file(path) as temporary:
        text = "".join(f"{line}\n" for line in lines)
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
