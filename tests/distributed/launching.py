"""Start processes with `torchrun`, as users do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HANGS = 540  # seconds after which a run counts as hanging


def torchrun(
    size: int, *command: str | Path, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a command in `size` processes on this machine."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(size), *options),
            *map(str, command),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )


def run_jobs(size: int, *, options: tuple[str, ...] = (), **asked: Any) -> Any:
    """Do jobs of `tests.distributed.jobs` in `size` processes."""
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in asked.items()}
    worker = ROOT / "tests" / "distributed" / "jobs.py"
    return torchrun(size, worker, json.dumps(asked), options=options)
