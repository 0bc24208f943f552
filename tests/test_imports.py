"""Claims about imports: they point one way, and nothing heavy is loaded before it is needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "minllama"

# A module may import those of earlier rows, and of its own row.
ORDER = (
    ("text", "patterns", "errors"),
    (
        "options",
        "text_files",
        "config",
        "json_file",
        "lock",
        "atomic",
        "treebank",
        "heap",
        "native",
        "gpu",
    ),
    ("module_patterns",),
    ("vocabulary", "data", "adapter_config"),
    ("checkpoints",),
    (
        *("tokenizer", "chat", "template_worker", "generation_config"),
        *("rope", "cache", "lookup", "sampling"),
    ),
    ("linear", "widening"),
    ("quantization",),
    ("decoding", "stop_strings", "view", "wanted", "loading", "runner"),
    ("native_step", "graph_step"),
    ("pretrained", "short_pass"),
    ("llama", "constraint"),
    ("generation",),
    ("conversation",),
    ("prompts",),
    ("lora", "optimizer"),
    ("adapter_files",),
    ("thresholds", "ranking"),
    ("bootstrap",),
    ("evaluation", "baselines", "regression"),
    ("paired",),
    ("classifier",),
    ("schedule", "losses", "objective", "progress", "training_state", "training_run", "training"),
    ("report",),
    ("experiment",),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
HEAVY = (
    "datasets",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "llguidance",
    "numpy",
    "pandas",
    "pyarrow",
    "rich",
    "safetensors",
    "sentencepiece",
    "tiktoken",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
)


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to: `checkpoints` for checkpoints/gguf.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and part of each import from minllama, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("minllama."):
                yield node.lineno, name.split(".")[1]


def loaded_by(code: str) -> set[str]:
    """The heavy modules that a fresh process has after `code`."""
    program = f"import sys\ntry:\n    {code}\nfinally:\n    print('|', *sys.modules)"
    finished = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    names = finished.stdout.rpartition("|")[2].split()
    assert "minllama" in names, finished.stderr
    return {name for name in HEAVY if name in names}


def test_every_module_has_a_place_in_the_order() -> None:
    assert {part_of(path) for path in modules()} == set(RANK)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    upward = [
        f"{path.name}:{line} imports {imported}"
        for line, imported in imported_parts(path)
        # `from minllama import __version__` is no module, and is the same for all.
        if imported != "__version__" and RANK[imported] > RANK[part]
    ]
    assert upward == []


def test_the_check_sees_imports_inside_functions(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "import minllama.cli\n"
        "from minllama import llama, cache\n"
        "if TYPE_CHECKING:\n    from minllama.generation import generate\n"
        "def f():\n    from minllama.checkpoints.gguf import g\n"
        "import minllamas.other, torch\n"
    )
    assert sorted(imported_parts(file)) == [
        (1, "cli"),
        (2, "cache"),
        (2, "llama"),
        (4, "generation"),
        (6, "checkpoints"),
    ]


def test_importing_minllama_loads_nothing_heavy() -> None:
    assert loaded_by("import minllama") == set()


def test_the_model_needs_only_torch_and_what_torch_brings() -> None:
    assert loaded_by("from minllama.llama import Llama") <= {"torch", "numpy"}


@pytest.mark.parametrize(
    "module", ["chat", "checkpoints.source", "data", "options", "config", "cli"]
)
def test_these_modules_load_nothing_heavy(module: str) -> None:
    allowed = {"torch", "numpy"} if module.startswith("checkpoints") else set()
    assert loaded_by(f"import minllama.{module}") <= allowed


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    run = f"import runpy; sys.argv[1:] = {arguments!r}; runpy.run_module('minllama')"
    assert loaded_by(run.replace("'minllama')", "'minllama', run_name='__main__')")) == set()
