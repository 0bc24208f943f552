"""Claims about words: phrases that have a better one do not come back to where people read them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from minllama.cli.docs import cli_reference

ROOT = Path(__file__).resolve().parent.parent
# A regular expression for whole words, and what to write instead.
BETTER = {
    r"leav(?:e|es|ing) (?:it|them|this|that|--[\w-]+) away|leave away": "omit it",
    r"parted by": "separated by",
    r"(?:go|goes|going|went|gone) on with": "resume, continue",
    r"(?:goes|going|gone) on (?:from|behind)": "resumes from, continues after",
    r"(?:is|was|were|be|been) (?:told|said) (?:of|to)": "is reported, receives",
    r"asked for": "requested, selected",
    r"who(?:ever)? (?:asks|needs|listens|wants|calls)": "the caller",
    r"whoever": "the caller, the user",
    r"the code as it is|of the code as it|code as it is now": "at commit abc1234",
    r"by the hour|(?:slow|quiet|middling) hour|other hours": "noisy host: median [min, max] of n",
    r"in turns": "interleaved",
    r"anew": "again",
    r"take(?:s|n)? apart": "dequantize",
    r"in numbers|(?:its|the file's) numbers|the numbers of": "dense weights, values",
    r"whole numbers?": "integers",
    r"hung up|is heard": "has hooks registered",
    r"the doors?": "entry points",
    r"bring(?:s)? it back": "restore it",
    r"bring it with": "install it with",
    r"mend(?:ed|s)?": "fix",
    r"how it fared": "Evaluation",
    r"how it came about": "Training",
    r"(?:is|was|were) cut": "interrupted, truncated, split",
    r"cut off": "truncated",
    r"in the place of": "instead of, replaces",
    r"next to nothing": "almost nothing",
    r"to the bit": "bit for bit",
    r"knows? nothing of": "(say who calls it, what goes in and out)",
    r"is no (?:finite )?number": "is not a number",
    r"(?:is|are) there (?:twice|already)": "duplicate, already exists",
    r"has no words for": "cannot represent",
    r"a word of": "one of",
    r"row's room": "remaining token budget",
    r"known by its": "identified by its",
    r"as it was saved": "the original",
    r"likeliest": "most likely",
    r"set aside": "held out",
    r"be it (?:of|with|in|a)": "even",
    r"lies (?:beside|in|there|where)": "is beside, is in",
    r"is meant\?": "did you mean ...?",
    r"widen(?:s|ed|ing)?": "upcast",
    r"for ever": "forever",
    # Spelling is American.
    r"(?:un|de)?quantis\w*": "quantize",
    r"(?:un)?normalis\w*": "normalize",
    r"\w*(?:colour|behaviour|neighbour|favour)\w*": "color, behavior, neighbor, favor",
    r"(?:recogn|organ|initial|serial|summar|optim|general)is(?:e|es|ed|ing)": "-ize",
    r"(?:un)?labelled (?:texts?|rows?|examples?|data|sentences?)": "labeled",
}
PATTERNS = [
    (re.compile(rf"(?<![\w-])(?:{phrase})(?![\w-])", re.IGNORECASE), better)
    for phrase, better in BETTER.items()
]


def found(text: str) -> list[str]:
    """The phrases in a text, each with its place and its better word."""
    return [
        f"line {number}: {match.group()!r} -> {better}"
        for number, line in enumerate(text.splitlines(), 1)
        for pattern, better in PATTERNS
        for match in pattern.finditer(line)
    ]


def read_by_people(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of a module's docstrings, messages and other strings of several words."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            # Phrases may go over the end of a line.
            yield node.lineno, re.sub(r"\s+", " ", node.value)


def modules() -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / "minllama").rglob("*.py"))


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", modules(), ids=str)
def test_strings_of_a_module_use_the_better_words(path: Path) -> None:
    hits = [
        f"line {line}: {hit.partition(': ')[2]}"
        for line, text in read_by_people((ROOT / path).read_text(encoding="utf-8"))
        for hit in found(text)
    ]
    assert not hits, "\n".join(hits)


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_pages_use_the_better_words(path: Path) -> None:
    hits = found(path.read_text(encoding="utf-8"))
    assert not hits, "\n".join(hits)


def test_help_uses_the_better_words() -> None:
    hits = found(re.sub(r"\s+", " ", cli_reference()))
    assert not hits, "\n".join(hits)


@pytest.mark.parametrize(
    ("text", "hits"),
    [
        ("the file is cut off; leave --dtype away", ["cut off", "is cut", "leave --dtype away"]),
        ("Quantised weights in\nwhole numbers", ["Quantised", "whole numbers"]),
        ("The file is truncated; omit --dtype. A recommended amendment.", []),
    ],
)
def test_the_finder_finds_phrases_and_nothing_else(text: str, hits: list[str]) -> None:
    assert sorted(re.findall(r"'(.*?)' ->", "\n".join(found(text)))) == sorted(hits)


def test_the_finder_reads_docstrings_messages_and_parts_of_f_strings() -> None:
    source = 'def f(x):\n    """Made anew."""\n    raise ValueError(f"{x} is no number, {x}")\n'
    texts = [text for _, text in read_by_people(source)]
    assert [hit for text in texts for hit in found(text)] == [
        "line 1: 'anew' -> again",
        "line 1: 'is no number' -> is not a number",
    ]
