"""The README's commands and programs run as they stand there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.running import running

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (.+)$", README, flags=re.MULTILINE)
PROGRAMS = re.findall(r"```python\n(.+?)```", README, flags=re.DOTALL)

ADDRESS = "http://127.0.0.1:8000"  # of `minllama serve`

pytestmark = pytest.mark.slow


def call(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def transcript(command: str) -> list[str]:
    """What the README shows below a command, up to the next or the end of the block."""
    shown = README.partition(f"$ {command}\n")[2]
    return re.split(r"^(?:\$ |```)", shown, maxsplit=1, flags=re.MULTILINE)[0].splitlines()


def without_rates(lines: list[str]) -> list[str]:
    return [re.sub(r"[\d.]+ tokens/s", "N tokens/s", line) for line in lines]


def without_numbers(lines: list[str]) -> list[str]:
    """What a classifier prints, but for figures, which are a little different on other machines.

    Which of two close labels comes first may differ as well, so lines are compared as a set, and
    which layers a classifier reads.
    """
    masked = [re.sub(r"[ -]*\d+(\.\d+)?%?", " N", line).rstrip() for line in lines]
    heads = (
        r"(layer N (weighted-mean|mean|last)|TF-IDF|label words)( x N)?|N heads that count alike"
    )
    experts = rf"^(({heads})(, )?)+"
    return sorted(re.sub(experts, "experts", m).replace("head on", "heads on") for m in masked)


def of_every_machine(lines: list[str]) -> list[str]:
    """What `minllama info` prints, but for the path and what this CPU is good at."""
    names = [line.split("  ")[0] for line in lines]
    assert {"path", "runs as"} <= set(names), lines
    own = {"path", "runs as", "kernels", ""}
    return [line for name, line in zip(names, lines, strict=True) if name not in own]


CLASSIFIERS = ("minllama train", "minllama classify", "minllama evaluate")


def test_every_minllama_command_runs_and_prints_what_is_shown(default_model, tmp_path):
    pytest.importorskip("llguidance")
    commands = [command for command in COMMANDS if command.startswith("minllama ")]
    assert len(commands) >= 8
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for command in commands:
        done = call([sys.executable, "-m", *shlex.split(command)], tmp_path)
        assert done.returncode == 0, (command, done.stderr)
        if shown := transcript(command):
            printed = (done.stdout + done.stderr).splitlines()
            if command == "minllama info":
                shown, printed = of_every_machine(shown), of_every_machine(printed)
            alike = without_numbers if command.startswith(CLASSIFIERS) else without_rates
            assert alike(printed) == alike(shown), command


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_every_program_runs(program, default_model, tmp_path):
    if ADDRESS in program:
        pytest.importorskip("openai")
        with running({"default": None}) as server:
            program = program.replace(ADDRESS, server.url)
            done = call([sys.executable, "-c", program], tmp_path)
        assert "Paris" in done.stdout, done.stderr
        return
    done = call([sys.executable, "-W", "error", "-c", program], tmp_path)
    assert done.returncode == 0, done.stderr


def test_make_demo_tells_a_story_and_trains_a_classifier():
    if not (ROOT / ".venv" / ".runs").exists():
        pytest.skip("needs the .venv that make sets up")
    assert shutil.which("make")
    assert {"make demo", "make test"} <= set(COMMANDS)
    done = call(["make", "demo"], ROOT)
    assert done.returncode == 0, done.stderr
    assert "Once upon a time" in done.stdout
    assert re.search(r"decode \d+ tokens, [\d.]+ tokens/s", done.stderr)
    assert (ROOT / "runs" / "demo-lora" / "report.html").exists()
    untrained, trained = (
        float(accuracy) for accuracy in re.findall(r"this classifier +([\d.]+)%", done.stdout)
    )
    assert 60 < untrained < trained


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_its_figures_are_measured():
    assert "@@" not in README
