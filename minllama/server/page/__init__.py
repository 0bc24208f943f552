"""The page that a server shows at `/`: one answer, which nothing else is fetched for.

Written by hand: `page.html` with `page.css` and the scripts in it. Its policy lets a browser run
and apply exactly these, by their digests, and call this server only.
"""

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

# One scope, in this order: the last one starts the page.
SCRIPTS = ("dom", "api", "code", "results", "questions", "decide", "write", "main")


@dataclass(frozen=True)
class Page:
    """A page and the headers that it is sent with.

    Attributes:
        content: HTML in UTF-8.
        headers: by name.
    """

    content: bytes
    headers: dict[str, str]


@cache
def page() -> Page:
    """The page, put together from its files."""
    style = _read("page.css")
    script = "\n".join(_read(f"{name}.js") for name in SCRIPTS)
    content = _read("page.html").replace("{{style}}", style).replace("{{script}}", script)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_digest(script)}",
            f"style-src {_digest(style)}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Page(content.encode(), headers)


def _read(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """A source of a content security policy: what has exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
