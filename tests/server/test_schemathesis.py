"""What schemathesis makes of the server's own description finds no fault in it."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.running import running

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "ignored_auth",
)
KEY = "a-key-of-the-tests"
SEED = 20261129


@pytest.mark.parametrize(
    ("n_examples", "n_cases"), [(2, 300), pytest.param(100, 2000, marks=pytest.mark.slow)]
)
def test_generated_requests_find_no_fault(
    long_base: Path, tmp_path: Path, n_examples: int, n_cases: int
) -> None:
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("needs schemathesis")
    bounds = {"requests_per_second": 0.0, "max_tokens": 16, "max_queue": 4096}
    with running({"tiny": long_base}, keys=(KEY,), **bounds) as server:
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
            *("--phases", "examples,coverage,fuzzing,stateful", "--seed", str(SEED)),
            *("--max-examples", str(n_examples), "--checks", ",".join(CHECKS)),
            *("-H", f"Authorization: Bearer {KEY}", "--no-color", "--generation-database", "none"),
        ]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=550, check=False
        )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) generated", done.stdout)
    assert found is not None, done.stdout[-2000:]
    assert int(found[1]) >= n_cases
