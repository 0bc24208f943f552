"""A stand-in for the Hugging Face hub: its endpoints for models and data sets, on a local port.

Serves repositories from memory, counts what it is asked for, and can be told to fail as the real
one does. Knows nothing of minllama.
"""

import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Repository:
    """One repository: its files in each revision, and who may read it.

    Attributes:
        files: path -> content, on `main`.
        revisions: further revision -> its files.
        gated: files are for the bearer of `token` only, the listing for everyone.
        private: nobody else even sees that it exists.
        token: the token that opens it.
    """

    files: dict[str, bytes]
    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    token: str = "hf_secret"

    def commit(self, revision: str) -> str | None:
        """The commit that `revision`, a name or a commit itself, stands for."""
        for name in ("main", *self.revisions):
            commit = hashlib.sha1(name.encode()).hexdigest()
            if revision in (name, commit):
                return commit
        return None

    def files_at(self, commit: str) -> dict[str, bytes]:
        trees = {"main": self.files, **self.revisions}
        return next(files for name, files in trees.items() if self.commit(name) == commit)


@dataclass
class Request:
    """One request as it arrived."""

    method: str
    path: str
    range: str | None
    authorization: str | None


class Hub:
    """The stand-in.

    Attributes:
        url: its address, for HF_ENDPOINT.
        repositories: `owner/name` -> repository.
        requests: all that were made, oldest first.
        breaks_after: file -> bytes after which the connection breaks, once.
        is_down: answer everything with 503.
        breaks_for_good: a file whose connection broke answers 503 from then on.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.breaks_after: dict[str, int] = {}
        self.is_down = False
        self.breaks_for_good = False
        self.broken: set[str] = set()

    def downloads(self) -> list[str]:
        """The files whose content was asked for, in order of name."""
        paths = [request.path for request in self.requests if request.method == "GET"]
        return sorted(
            path.split("/resolve/")[1].split("/", 1)[1] for path in paths if "/resolve/" in path
        )


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that serves as long as the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ThreadingHTTPServer

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = urllib.parse.unquote(self.path.split("?")[0])
        authorization = self.headers["Authorization"]
        hub.requests.append(Request(self.command, path, self.headers["Range"], authorization))
        match = re.fullmatch(
            r"/api/(models|datasets)/(?P<repo>[^/]+/[^/]+)((/revision|(?P<tree>/tree))/(?P<revision>[^/]+)(/(?P<folder>.+))?)?"
            r"|/(datasets/)?(?P<file_repo>[^/]+/[^/]+)/resolve/(?P<file_revision>[^/]+)/(?P<file>.+)",
            path,
        )
        if hub.is_down or match is None or (self.command == "GET" and match["file"] in hub.broken):
            return self._fail(503, None, "down for maintenance")
        repository = hub.repositories.get(match["repo"] or match["file_repo"])
        allowed = repository is not None and authorization == f"Bearer {repository.token}"
        if repository is None or (repository.private and not allowed):
            # As on the real hub, an unknown repository is a matter of rights to the anonymous.
            return self._fail(404 if authorization else 401, "RepoNotFound", "Repository not found")
        revision = match["file_revision"] or match["revision"] or "main"
        if (commit := repository.commit(revision)) is None:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.files_at(commit)
        if match["file"] is None:
            folder = match["folder"]
            if folder is not None and not any(name.startswith(f"{folder}/") for name in files):
                return self._fail(404, "EntryNotFound", f"{folder} does not exist")
            return self._send_json(
                _tree(files, folder) if match["tree"] else _info(match["repo"], commit, files)
            )
        if repository.gated and not allowed:
            return self._fail(
                401 if authorization is None else 403, "GatedRepo", "Access is restricted"
            )
        if match["file"] not in files:
            return self._fail(404, "EntryNotFound", "Entry not found")
        return self._send_file(hub, match["file"], files[match["file"]], commit)

    def _send_file(self, hub: Hub, name: str, content: bytes, commit: str) -> None:
        start = 0
        if (asked := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")) is not None:
            start = int(asked[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in hub.breaks_after:
            if hub.breaks_for_good:
                hub.broken.add(name)
            self.wfile.write(content[start : hub.breaks_after.pop(name)])
            self.close_connection = True
            return
        self.wfile.write(content[start:])

    def _send_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int, code: str | None, message: str) -> None:
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _info(repo: str, commit: str, files: dict[str, bytes]) -> dict[str, object]:
    siblings = [{"rfilename": name} for name in files]
    return {"id": repo, "modelId": repo, "sha": commit, "private": False, "siblings": siblings}


def _tree(files: dict[str, bytes], folder: str | None) -> list[dict[str, object]]:
    return [
        {
            "type": "file",
            "path": name,
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
        }
        for name, content in files.items()
        if folder is None or name.startswith(f"{folder}/")
    ]
