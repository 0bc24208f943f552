"""Claims about files on the command line: options of their form are read by every command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiment_cases import examples


def minllama(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "minllama", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=120)


@pytest.mark.parametrize(
    ("content", "options", "texts"),
    [
        (b'id,text\n1,"two\nlines"\n2,b\n', (), ["two\nlines", "b"]),
        ("text;x\ncaf\xe9;1\n".encode("cp1252"), ("--encoding", "windows-1252"), ["caf\xe9"]),
        (b"1^a\n2^b\n", ("--separator", "^", "--columns", "id,text"), ["a", "b"]),
    ],
)
def test_what_is_piped_in_is_classified_as_what_it_is(
    base: Path, content: bytes, options: tuple[str, ...], texts: list[str]
) -> None:
    given = ("-m", base, "--device", "cpu", "--labels", "good,bad", "-i", "-")
    result = minllama("classify", *given, *options, stdin=content)
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == texts


@pytest.mark.slow
def test_a_classifier_is_trained_and_evaluated_on_cp1252_without_a_header(
    base: Path, tmp_path: Path
) -> None:
    rows = [f"{label}\t\xe9t\xe9: {text}\n" for label, text in examples(24, seed=1)]
    data = tmp_path / "x.txt"
    data.write_bytes("".join(rows).encode("cp1252"))
    options = ("--encoding", "cp1252", "--columns", "label,text")
    source = ("--method", "frozen", "--layer", "1", "--pooling", "last", "-m", base)
    output = tmp_path / "out"
    result = minllama("train", "--train", data, *options, *source, "--device", "cpu", "-o", output)
    assert result.returncode == 0, result.stderr
    assert b"of 24 rows of" in result.stderr
    settings = json.loads((output / "metrics.json").read_text())["settings"]["data"]
    assert (settings["encoding"], settings["columns"]) == ("cp1252", "label,text")
    result = minllama("evaluate", output, "--data", data, *options)
    assert result.returncode == 0, result.stderr
    for wrong, words in (
        ((), b"\xc3\xa9t\xc3\xa9: "),
        ((), b"--data-format tsv --columns label,text; read it with --encoding cp1252"),
        (("--encoding", "cp125"), b"is not a text encoding that Python knows; did you mean cp125"),
    ):
        result = minllama("evaluate", output, "--data", data, *wrong)
        assert result.returncode == 2
        assert words in result.stderr.splitlines()[-1]
        assert b"Traceback" not in result.stderr
