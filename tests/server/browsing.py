"""A real browser for tests of the page."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

# npm's axe-core 4.14.1, which `make test` fetches; it is no part of the repository for its size.
AXE = Path(sys.prefix) / "axe-core" / "axe.min.js"
AXE_DIGEST = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser: Debian's headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    # Its sandbox does not work for root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """The page at a URL, in a window of its own that forgets everything.

    Nothing on it may fail, break the page's policy, or ask another server.
    """
    faults: list[str] = []
    origin = url.partition("#")[0]
    context = browser.new_context(**{"reduced_motion": "reduce", **options})
    context.set_default_timeout(30_000)
    page = context.new_page()

    def ask(request: Any) -> None:
        if not request.url.startswith((origin, "data:")):
            faults.append(f"asks {request.url}")

    def say(message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            faults.append(message.text)

    page.on("request", ask)
    page.on("console", say)
    page.on("pageerror", lambda error: faults.append(str(error)))
    try:
        page.goto(url)
        yield page
        assert faults == []
    finally:
        context.close()


def findings(page: Any) -> list[tuple[str, str]]:
    """What axe-core calls serious or critical: the rule and the element."""
    if not AXE.is_file():
        pytest.skip(f"needs {AXE}, which `make test` fetches from npm")
    script = AXE.read_bytes()
    assert sha256(script).hexdigest() == AXE_DIGEST, f"{AXE} is not the pinned file; remove it"
    page.evaluate(script.decode())  # by the debugger, to which the page's policy does not apply
    result = page.evaluate("axe.run()")
    return [
        (violation["id"], node["html"][:200])
        for violation in result["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]
