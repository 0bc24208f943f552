"""What schemathesis makes of the server's own description finds no fault in it."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.heads import write_heads
from tests.server.running import running

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "ignored_auth",
)
KEY = "a-key-of-the-tests"
HEADERS = {"Authorization": f"Bearer {KEY}"}
SEED = 20261129


def described(url: str, names: list[str]) -> dict[str, Any]:
    """The server's description, in which models have the names that are served, or any other."""
    found: dict[str, Any] = httpx.get(f"{url}/openapi.json", headers=HEADERS).json()
    for schema in found["components"]["schemas"].values():
        if (field := schema.get("properties", {}).get("model")) is not None:
            schema["properties"]["model"] = {"anyOf": [{"enum": names}, field]}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("n_examples", "n_cases"), [(60, 2000)])
def test_generated_requests_find_no_fault(
    long_base: Path, tmp_path: Path, n_examples: int, n_cases: int
) -> None:
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("needs schemathesis")
    heads = write_heads(tmp_path / "heads", long_base)
    bounds = {"requests_per_second": 0.0, "max_tokens": 16, "max_queue": 4096}
    with running({"tiny": long_base, **heads}, keys=(KEY,), **bounds) as server:
        description = tmp_path / "openapi.json"
        description.write_text(json.dumps(described(server.url, ["tiny", *heads])))
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", str(description)),
            *("--url", server.url, "-H", f"Authorization: {HEADERS['Authorization']}"),
            *("--phases", "examples,coverage,fuzzing,stateful", "--seed", str(SEED)),
            *("--max-examples", str(n_examples), "--checks", ",".join(CHECKS)),
            *("--no-color", "--generation-database", "none"),
        ]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
        )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) generated", done.stdout)
    assert found is not None, done.stdout[-2000:]
    assert int(found[1]) >= n_cases
