"""Claims about imports: they point one way, and nothing heavy is loaded before it is needed."""

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "minllama"

# A module may import those of earlier rows, and of its own row.
ORDER = (
    ("text", "errors", "atomic"),
    ("options",),
    ("kernels",),
    ("model",),
    ("quantization",),
    ("tokenizer",),
    ("checkpoints",),
    ("engine",),
    ("generation",),
    ("lora",),
    ("data", "evaluation"),
    ("distributed",),
    ("classification",),
    ("training",),
    ("experiment",),
    ("benchmark", "labeling", "planning"),
    ("server",),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
HEAVY = (
    "datasets",
    "fastapi",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "llguidance",
    "numpy",
    "pandas",
    "prometheus_client",
    "pyarrow",
    "pydantic",
    "rich",
    "safetensors",
    "sentencepiece",
    "starlette",
    "tiktoken",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
    "uvicorn",
)
MOST_CODE_LINES, MOST_FUNCTION_LINES = 400, 60


def modules() -> dict[str, Path]:
    """The package's modules by their names: `minllama.model.llama`, `minllama.data`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room_of(module: str) -> str:
    """The part of the package that a module belongs to: `checkpoints` for `checkpoints.gguf`."""
    return module.split(".")[1] if "." in module else ""


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and module of each import from minllama, wherever in the source it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "minllama":
                while name not in MODULES:
                    name = name.rpartition(".")[0]
                yield node.lineno, name


GRAPH = {
    module: {name for _, name in imported(path.read_text(encoding="utf-8"))} - {module}
    for module, path in MODULES.items()
}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules of which each imports each other one, directly or not."""
    reached = {}
    for module in graph:
        seen: set[str] = set()
        todo = list(graph[module])
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += graph[name]
        reached[module] = seen
    groups = {
        frozenset(other for other in graph if other in seen and module in reached[other])
        for module, seen in reached.items()
        if module in seen
    }
    return [set(group) for group in groups]


def loaded_by(code: str) -> list[str]:
    """The modules that a fresh process has after `code`."""
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
    return names


def heavy_of(code: str) -> set[str]:
    return set(HEAVY).intersection(loaded_by(code))


def test_the_root_holds_packages_and_what_all_of_them_need() -> None:
    files = {path.name for path in PACKAGE.glob("*.py")}
    assert files == {"__init__.py", "__main__.py", "atomic.py", "errors.py", "text.py"}


def test_every_module_has_a_place_in_the_order() -> None:
    assert {room_of(module) for module in MODULES} - {""} == set(RANK)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "minllama"])
def test_imports_point_one_way(module: str) -> None:
    upward = {
        name for name in GRAPH[module] - {"minllama"} if RANK[room_of(name)] > RANK[room_of(module)]
    }
    assert upward == set()


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert circles(GRAPH) == []


def test_circles_of_any_size_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"d", "a"}}
    assert circles(graph) == [{"a", "b", "c"}]


def test_the_check_sees_imports_inside_functions() -> None:
    source = (
        "import minllama.cli\n"
        "from minllama import data, errors\n"
        "if TYPE_CHECKING:\n    from minllama.generation.api import generate\n"
        "def f():\n    from minllama.checkpoints.gguf import g\n"
        "import minllamas.other, torch\n"
    )
    assert sorted(imported(source)) == [
        (1, "minllama.cli"),
        (2, "minllama.data"),
        (2, "minllama.errors"),
        (4, "minllama.generation.api"),
        (6, "minllama.checkpoints.gguf"),
    ]


def code_lines(source: str) -> int:
    """Lines without blank ones, comments and docstrings."""
    lines: set[int] = set()
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip and token.type != tokenize.ENDMARKER:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines -= set(range(first.lineno, (first.end_lineno or 0) + 1))
    return len(lines)


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module: str) -> None:
    source = MODULES[module].read_text(encoding="utf-8")
    assert code_lines(source) <= MOST_CODE_LINES
    functions = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {f.name for f in functions if (f.end_lineno or 0) - f.lineno + 1 > MOST_FUNCTION_LINES}
    assert long == set()


def test_importing_minllama_loads_nothing_heavy() -> None:
    assert heavy_of("import minllama") == set()


def test_the_model_needs_only_torch_and_what_torch_brings() -> None:
    assert heavy_of("from minllama.model.llama import Llama") <= {"torch", "numpy"}


@pytest.mark.parametrize(
    "module",
    ["tokenizer.chat_template", "checkpoints.resolve", "data", "options", "model.config", "cli"],
)
def test_these_modules_load_nothing_heavy(module: str) -> None:
    assert heavy_of(f"import minllama.{module}") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    run = f"import runpy; sys.argv[1:] = {arguments!r}; runpy.run_module('minllama')"
    assert heavy_of(run.replace("'minllama')", "'minllama', run_name='__main__')")) == set()
