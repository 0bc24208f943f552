"""What runs printed and wrote, as JSON that can be compared: `results.py`.

Machine-readable files are taken as they are, weights as digests; times, versions and paths are
masked; what people read is kept apart.
"""

import hashlib
import json
import platform
import re
import sys
from html import unescape
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Keys of JSON files whose values are of a run and not of its results.
VOLATILE = {
    "created", "decode_seconds", "examples_per_second", "minllama", "prefill_seconds", "seconds",
    "sha256", "tokens_per_second", "versions",
}  # fmt: skip
SENTENCES = {"notes", "title", "verdict"}  # keys of JSON files whose values people read
MASKS = (
    (r"\d{4}-\d\d-\d\dT[\d:.+]+|\d+ \w+ \d{4}, \d\d:\d\d UTC", "DATE"),
    (r"[\d.,]+ (tokens|examples|texts)/s", r"N \1/s"),
    (r"[\d.,]+ (s|seconds|minutes|min)\b|\b\d+:\d\d\b", "TIME"),
)
MISSING = "(missing)"


class Results:
    """What came out so far: results, and what people read.

    Args:
        folder: where the runs read and write; its path is masked.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values: dict[str, Any] = {}
        self.wording: dict[str, Any] = {}
        self.failures: list[str] = []

    def mask(self, text: str) -> str:
        """Without what another run would have otherwise."""
        text = text.replace(str(self.folder), "FOLDER").replace(sys.prefix, "PREFIX")
        text = re.sub(r"PREFIX[\w./-]*/", "PREFIX/", text)
        text = text.replace(platform.python_version(), "VERSION")
        for package in ("torch", "minllama"):
            text = re.sub(rf"\b{re.escape(version(package))}", "VERSION", text)
        for pattern, name in MASKS:
            text = re.sub(pattern, name, text)
        return text

    def add_text(self, key: str, text: str) -> None:
        """Something that people read, as its lines."""
        if text:
            self.wording[key] = self.mask(text).splitlines()

    def add_json(self, key: str, value: Any) -> None:
        """JSON that a run printed or wrote; its sentences go to the wording."""
        self.values[key] = self._machine_readable(key, value)

    def _machine_readable(self, key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self._machine_readable(key, part) for part in value]
        if isinstance(value, str):
            return self.mask(value)
        if not isinstance(value, dict):
            return value
        kept = {}
        for name, part in value.items():
            if name in SENTENCES and isinstance(part, str | list):
                self.add_text(f"{key} {name}", part if isinstance(part, str) else "\n".join(part))
            if name in SENTENCES | VOLATILE:
                kept[name] = sorted(part) if name == "sha256" and isinstance(part, dict) else "..."
            else:
                kept[name] = self._machine_readable(key, part)
        return kept

    def add_files(self, key: str, path: Path) -> None:
        """A file that a run wrote, or all those of a folder."""
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        names = [str(file.relative_to(path)) if path.is_dir() else file.name for file in files]
        self.values[f"{key} files"] = names if path.exists() else MISSING
        if path.exists():
            for name, file in zip(names, files, strict=True):
                self._add_file(f"{key}/{name}", file)

    def _add_file(self, key: str, path: Path) -> None:
        kind = path.suffix
        if kind == ".safetensors":
            self.values[key] = tensors_of(path)
        elif path.name in ("tokenizer.json", "tokenizer_config.json"):
            self.values[key] = sha256(path.read_bytes())
        elif kind == ".json":
            self.add_json(key, json.loads(path.read_text(encoding="utf-8")))
        elif kind == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            self.add_json(key, [json.loads(line) for line in lines])
        elif kind == ".html":
            self._add_page(key, path.read_text(encoding="utf-8"))
        elif kind == ".md":
            self.add_text(key, path.read_text(encoding="utf-8"))
        elif kind in (".csv", ".tsv", ".txt", ".jinja"):
            self.values[key] = self.mask(path.read_text(encoding="utf-8")).splitlines()
        else:
            self.values[key] = sha256(path.read_bytes())

    def _add_page(self, key: str, page: str) -> None:
        """A report: the numbers of its tables are results, its text and figures are wording."""
        page = re.sub(r"(?s)<style>.*?</style>", "", page)
        cells = [unescape(plain(cell)) for cell in re.findall(r"(?s)<td.*?</td>", page)]
        self.values[f"{key} cells"] = [
            self.mask(cell) for cell in cells if re.fullmatch(r"[-+\d., %to]*\d[-+\d., %to]*", cell)
        ]
        self.add_text(key, re.sub(r"(?s)<svg.*?</svg>", figure, page))
        self.wording[key] = plain_lines("\n".join(self.wording[key]))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def plain(page: str) -> str:
    """The text of HTML in one line."""
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def plain_lines(page: str) -> list[str]:
    """The text of HTML, a line for each line that has any."""
    return [text for line in page.splitlines() if (text := unescape(plain(line)))]


def figure(match: re.Match[str]) -> str:
    """A figure's digest, without ids, which are drawn, and its date."""
    drawn = re.sub(r'(id|href|clip-path)="[^"]*"|(?s:<metadata>.*?</metadata>)', "", match[0])
    return f"\n[figure {sha256(drawn.encode())[:16]}]\n"


def tensors_of(path: Path) -> dict[str, str]:
    """Of a safetensors file: its bytes, its metadata, and each tensor's form and bytes."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, found = json.loads(data[8 : 8 + size]), {"": sha256(data)}
    for name, entry in sorted(header.items()):
        if name == "__metadata__":
            found[name] = json.dumps(entry, sort_keys=True)
        else:
            first, end = (8 + size + offset for offset in entry["data_offsets"])
            found[name] = f"{entry['dtype']} {entry['shape']} {sha256(data[first:end])[:16]}"
    return found
