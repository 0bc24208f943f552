"""Classifiers' folders, ours and those of transformers."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from minllama.classification.storage.manifest import CLASSIFIER_FILE, _digest
from tests.faults.mutations import Mutator, safetensors
from tests.faults.mutations import json_values as json_mutator
from tests.faults.read_models import CONFIG, tiny_folder
from tests.faults.reader import Reader, reader, writing


@reader(
    *(f"classifier.json of {kind}" for kind in ("head", "two", "many", "numbers", "words")),
    *(f"head.safetensors of {kind}" for kind in ("head", "many", "numbers", "experts")),
    *("classifier.json of experts", "vocabulary.json of experts"),
)
def classifier_file(folder: Path, name: str) -> Reader:
    """Files of a classifier's folder, with and without the digests that vouch for them."""
    from minllama.atomic import sha256_of
    from minllama.classification import load_classifier
    from tests.server.heads import write_heads

    file, _, kind = name.partition(" of ")
    base = tiny_folder(folder / "base", CONFIG.replace(max_seq_len=128))
    place = write_heads(folder, base)[kind]
    manifest = (place / CLASSIFIER_FILE).read_bytes()

    def open_bytes(data: bytes) -> None:
        # A few keep the old digests, so that what was changed is refused; most get new ones.
        (place / file).write_bytes(data)
        new = data if file == CLASSIFIER_FILE else manifest
        if len(data) % 8:
            new = resealed(new, {} if file == CLASSIFIER_FILE else {file: sha256_of(data)})
        (place / CLASSIFIER_FILE).write_bytes(new)
        classifier = load_classifier(place, device="cpu")
        if classifier.scale is None:
            classifier.predict_proba(["a fine film", "x"])
        else:
            classifier.predict_values(["a fine film", "x"])

    mutate: Mutator = safetensors if file.endswith("safetensors") else json_mutator
    return Reader([(place / file).read_bytes()], open_bytes, mutate)


def resealed(manifest: bytes, digests: Mapping[str, str]) -> bytes:
    """A classifier.json with the digests that its content has now, if that can be said."""
    try:
        content = json.loads(manifest)
        content["sha256"].update(digests)
        content["sha256"][CLASSIFIER_FILE] = _digest(content)
        return json.dumps(content).encode()
    except Exception:  # it is no longer a manifest
        return manifest


@reader("sequence classifier config.json", "sequence classifier model.safetensors")
def sequence_classifier(folder: Path, name: str) -> Reader:
    from safetensors.torch import load_file, save_file

    from minllama.classification import load_classifier

    model = tiny_folder(folder / "hf")
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0}
    config |= {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    (model / "config.json").write_text(json.dumps(config))
    state = load_file(model / "model.safetensors")
    state.pop("lm_head.weight", None)
    save_file(state | {"score.weight": torch.randn(2, CONFIG.dim)}, model / "model.safetensors")
    path = model / name.rpartition(" ")[2]
    seeds = [path.read_bytes()]
    mutate: Mutator = safetensors
    if name.endswith("json"):
        more = {"problem_type": "regression", "num_labels": 1, "id2label": {"0": "x"}}
        seeds.append(json.dumps(config | more).encode())
        mutate = json_mutator

    def read() -> None:
        classifier = load_classifier(model, device="cpu")
        if classifier.scale is None:
            classifier.predict_proba(["a fine film"])
        else:
            classifier.predict_values(["a fine film"])

    return Reader(seeds, writing(path, read), mutate)
