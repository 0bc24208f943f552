"""The ASGI application: routes of every protocol behind what guards them."""

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from minllama.errors import MinllamaError
from minllama.server.auth import Keys
from minllama.server.description import describe_keys
from minllama.server.errors import RequestError, as_request_error
from minllama.server.middleware import AccessMiddleware, GuardMiddleware, logger
from minllama.server.routes import (
    chat,
    classify,
    completions,
    decisions,
    embeddings,
    health,
    models,
    ollama,
    ollama_embed,
    ollama_models,
    page,
    predict,
    responses,
    systemone,
    tokenize,
)
from minllama.server.routing import error_response
from minllama.server.service import Service
from minllama.server.validation import validation_error
from minllama.text import VERSION

# A protocol is a module with a `router`; its errors' form is in `errors.SHAPES`.
ROUTERS = (
    health.router,
    models.router,
    completions.router,
    chat.router,
    tokenize.router,
    ollama.router,
    ollama_embed.router,
    ollama_models.router,
    classify.router,
    predict.router,
    embeddings.router,
    responses.router,
    decisions.router,
    systemone.router,
    page.router,
)


def create_app(service: Service, keys: Keys | None = None) -> FastAPI:
    """An application that answers for a service.

    Args:
        service: with its options; the caller who runs the application calls its `start`, once the
            models are loaded.
        keys: of which requests must have one; None for everybody.
    """
    app = FastAPI(
        title="minllama",
        version=VERSION,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    app.state.service = service
    for router in ROUTERS:
        app.router.routes.extend(router.routes)  # one flat list, which can be looked through
    _answer_errors(app)
    if keys:
        describe_keys(app)
    # The last one added is the first to see a request.
    app.add_middleware(GuardMiddleware, service=service, keys=keys or Keys())
    if service.options.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.options.cors_origin,
            allow_methods=["GET", "POST", "OPTIONS"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    app.add_middleware(AccessMiddleware, service=service)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.service.close()


def _answer_errors(app: FastAPI) -> None:
    """Give errors the form of the protocol whose path it is."""

    async def of_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        field = getattr(request.scope.get("route"), "body_field", None)
        kind = None if field is None else field.field_info.annotation
        found = validation_error(error.errors(), kind if isinstance(kind, type) else None)
        return error_response(request.url.path, found)

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        words = {
            404: f"there is no {request.method} {request.url.path[:100]}",
            405: f"{request.url.path[:100]} is not called by {request.method}",
        }
        message = words.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        return error_response(
            request.url.path, RequestError(message, status=error.status_code, headers=headers)
        )

    async def of_minllama(request: Request, error: Exception) -> Response:
        found = as_request_error(error)
        if found.status == 500:
            logger.error("a request failed: %s", error)
        return error_response(request.url.path, found)

    app.add_exception_handler(RequestValidationError, of_validation)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(MinllamaError, of_minllama)
