"""The app's description in OpenAPI, with what FastAPI does not know of: keys."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from minllama.server.auth import OPEN_PATHS

SCHEME = "key"


def describe_keys(app: FastAPI) -> None:
    """Let `/openapi.json` say which operations need a key."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemes = found.setdefault("components", {}).setdefault("securitySchemes", {})
            schemes[SCHEME] = {"type": "http", "scheme": "bearer"}
            for path, operations in found["paths"].items():
                for operation in operations.values():
                    operation["security"] = [] if path in OPEN_PATHS else [{SCHEME: []}]
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
