"""`torchrun -m minllama`: what is printed, by which process, and what is refused."""

import sys
from pathlib import Path

import pytest

from tests.distributed.launching import torchrun

pytestmark = pytest.mark.slow
MODEL = ("--dtype", "float32", "--quantize", "none", "--device", "cpu")


def train(
    data: Path, output: Path, *more: str, source: Path | str | None = None
) -> tuple[str, ...]:
    """`minllama train` on a source, the file train.txt by default."""
    return (
        *("-m", "--", "minllama", "train", "--train", str(source or data / "train.txt")),
        *("--dev", str(data / "dev.txt"), "-m", str(data / "base"), "-o", str(output), *MODEL),
        *more,
    )


def said(stderr: str) -> list[str]:
    """What minllama has printed, without the launcher's own lines."""
    return [line for line in stderr.splitlines() if line.startswith("minllama: ")]


def test_only_the_first_process_prints(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ended = torchrun(2, *train(data, output, "--method", "lora", "--r", "2", "--epochs", "1"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count(f"wrote {output}: the classifier") == 1
    assert (ended.stdout + ended.stderr).count("dev: Right on") == 1
    assert (output / "classifier.json").exists()
    assert not list(tmp_path.glob(".*"))  # neither locks nor temporary files

    evaluate = ("evaluate", str(output), "--data", str(data / "test.txt"))
    together = torchrun(2, "-m", "--", "minllama", *evaluate)
    assert together.returncode == 0, together.stderr
    alone = torchrun(1, "-m", "--", "minllama", *evaluate)
    assert together.stdout == alone.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "auto"), "--method auto chooses by the time that methods take"),
        (("--method", "lora", "--epochs", "0"), "epochs"),
        (("--method", "lora", "--label-column", "no"), "no column 'no'; set --label-column"),
    ],
)
def test_what_several_processes_cannot_do_is_one_line(
    data: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    ended = torchrun(2, *train(data, tmp_path / "run", *more))
    assert ended.returncode != 0
    (line,) = said(ended.stderr)
    assert message in line
    assert not (tmp_path / "run").exists()


def test_standard_input_is_refused(data: Path, tmp_path: Path) -> None:
    ended = torchrun(2, *train(data, tmp_path / "run", "--method", "lora", source="-"))
    assert ended.returncode != 0
    (line,) = said(ended.stderr)
    assert "2 processes cannot all read standard input" in line


def test_other_commands_run_in_one_process(tmp_path: Path) -> None:
    ended = torchrun(2, "-m", "--", "minllama", "generate", "Once")
    assert ended.returncode != 0
    assert said(ended.stderr)[0] == (
        "minllama: minllama generate runs in one process, not in 2; start it without torchrun"
    )


def test_processes_that_read_other_files_are_refused(data: Path, tmp_path: Path) -> None:
    """As on hosts whose files differ: each process reads the file of its number."""
    for rank, n_rows in enumerate((20, 24)):
        lines = (data / "train.txt").read_text().splitlines(keepends=True)[:n_rows]
        (tmp_path / f"train-{rank}.txt").write_text("".join(lines))
    script = tmp_path / "start.sh"
    script.write_text(f'exec {sys.executable} -m "${{@//RANK/$RANK}}"\n')
    source = tmp_path / "train-RANK.txt"
    arguments = train(data, tmp_path / "run", "--method", "lora", "--layer", "1", source=source)[2:]
    ended = torchrun(2, "bash", script, *arguments, options=("--no-python",))
    assert ended.returncode != 0
    assert any("process 1 of 2 differs from the first" in line for line in said(ended.stderr))
