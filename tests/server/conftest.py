"""A server of a tiny model, for tests that leave it as it is."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from minllama.server.run import HttpServer
from tests.server.running import running


@pytest.fixture(scope="package")
def long_base(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Path:
    """The tiny model with room for tools and schemas in its context."""
    from minllama.checkpoints.huggingface import write_huggingface
    from minllama.checkpoints.open import open_checkpoint
    from tests.tiny import our_model

    folder = tmp_path_factory.mktemp("long")
    vocabulary = open_checkpoint(default_model).vocabulary
    model = our_model(vocab_size=49152, max_seq_len=1024)
    write_huggingface(folder, model.config, model.state_dict(), vocabulary=vocabulary)
    return folder


@pytest.fixture(scope="package")
def server(long_base: Path) -> Iterator[HttpServer]:
    """The model `tiny`, without keys."""
    with running({"tiny": long_base}) as server:
        yield server
