"""Keep the classifier of a rung in a folder, and open it again on the model that is in memory."""

from pathlib import Path

from minllama.classification import LlamaEmbeddingClassifier, save_classifier
from minllama.classification.base import Classifier
from minllama.classification.experts import LlamaExpertsClassifier
from minllama.classification.storage.head import (
    HEAD_FILE,
    VOCABULARY_FILE,
    read_head,
    read_tfidf,
)
from minllama.classification.storage.manifest import (
    CLASSIFIER_FILE,
    build,
    described_by,
    read_checked,
)
from minllama.classification.storage.save_load import CARD_FILE
from minllama.lora.peft_files import load_adapter
from minllama.model.llama import Llama
from minllama.options import PromptOptions
from minllama.tokenizer.tokenizer import Tokenizer


def save_candidate(classifier: Classifier, folder: Path, tokenizer: str | None) -> None:
    """Write a classifier; see `save_classifier`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_classifier(classifier, folder, tokenizer=tokenizer)


def load_candidate(folder: Path, llama: Llama, tokenizer: Tokenizer) -> Classifier:
    """Read a classifier of the same run, on the model that it was trained on.

    Args:
        folder: that `save_candidate` wrote.
        llama: the base, without adapters; they are added.
        tokenizer: its tokenizer.

    Raises:
        CheckpointError: a file is missing, damaged or changed.
    """
    path = folder / CLASSIFIER_FILE
    content = read_checked(path)
    if content["weights"] == "adapter":
        load_adapter(llama, folder)
    llama.requires_grad_(False)
    with described_by(path):
        prompt = PromptOptions(**content["prompt"])
        classifier = build(content, llama, tokenizer, content["labels"], prompt)
    digests = content["sha256"]
    if isinstance(classifier, LlamaEmbeddingClassifier | LlamaExpertsClassifier):
        read_head(folder, classifier, digests.get(HEAD_FILE))
    if isinstance(classifier, LlamaExpertsClassifier) and content["tfidf"]:
        digest = digests.get(VOCABULARY_FILE)
        classifier.tfidf = read_tfidf(folder, len(classifier.labels), digest)
    return classifier.eval()


def size_on_disk(folder: Path) -> int:
    """Bytes of a classifier's files, without its model card."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != CARD_FILE)
    return sum(path.stat().st_size for path in files)
