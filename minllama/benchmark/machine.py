"""What a measurement was made on: processor, threads, versions, and the commit of a checkout."""

import os
import platform
import subprocess
from pathlib import Path

import torch

from minllama.kernels.cpu.library import best_level, library
from minllama.kernels.hardware import LEVELS, cpu_can, processor
from minllama.text import VERSION

ROOT = Path(__file__).resolve().parents[2]  # of a checkout, if it is one
ARITHMETIC = {
    "bfloat16": ("avx512_bf16", "bf16"),
    "AMX": ("amx_bf16",),
    "float16": ("avx512_fp16",),
}


def describe_machine(device: torch.device) -> dict[str, str]:
    """Names and values, in the order in which they are shown."""
    found = {"processor": processor(), "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
    instructions = LEVELS[best_level()] if library() is not None else "compiled code is missing"
    with_arithmetic = [name for name, words in ARITHMETIC.items() if cpu_can(*words)]
    found["instructions"] = ", ".join([instructions, *with_arithmetic])
    found |= {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "minllama": VERSION,
    }
    if (commit := commit_of(ROOT)) is not None:
        found["commit"] = commit
    return found


def commit_of(folder: Path) -> str | None:
    """The short name of a checkout's commit, with a + if files differ; None if it is none."""
    if not (folder / ".git").exists():
        return None

    def git(*words: str) -> str:
        environment = {name: v for name, v in os.environ.items() if not name.startswith("GIT_")}
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
            env=environment,
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
