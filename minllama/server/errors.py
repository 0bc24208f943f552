"""Errors of requests, and the form that each protocol gives them.

Routes, and the middleware before them, raise `RequestError`; its answer has the form that belongs
to the request's path.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minllama.errors import CheckpointError, MinllamaError, OptionError
from minllama.text import one_line

MAX_CHARS = 500  # of a message
EMPTY, TOO_LONG = "empty", "context_length_exceeded"  # codes that protocols have words for
INTERNAL = "internal error; the server's log says more"

# The words of OpenAI's API for a status, unless an error has its own.
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class RequestError(MinllamaError):
    """A request that is not answered as it was meant.

    Args:
        message: for the client: what is wrong, and the range where there is one.
        status: of HTTP.
        param: the field that is wrong, as the client has spelled it: `messages.0.role`.
        code: a word for programs.
        kind: the error's type in OpenAI's words; None for the status' own.
        retry_after: seconds after which to try again.
        headers: of the response.
        place: the field's place in the body, part by part, where `param` does not tell: a name may
            have dots.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
        place: Sequence[str | int] | None = None,
    ) -> None:
        self.message = one_line(message, MAX_CHARS)
        super().__init__(self.message)
        self.status, self.param, self.code, self.place = status, param, code, place
        self.kind = kind or TYPES.get(status, "invalid_request_error")
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_after)))


def out_of_range(param: str, value: object, allowed: str) -> RequestError:
    """The error of a field whose value is not `allowed`, which is such as `between 1 and 16`."""
    return RequestError(f"{param} must be {allowed}, not {one_line(repr(value), 60)}", param=param)


def not_found(model: str) -> RequestError:
    """The error of a model that is not served."""
    name = one_line(repr(model), 100)
    return RequestError(
        f"the model {name} is not served here; GET /v1/models lists those that are",
        status=404,
        param="model",
        code="model_not_found",
    )


def as_request_error(error: BaseException, param: str | None = None) -> RequestError:
    """An exception as what a client may learn of it: nothing of files, addresses or the code.

    Args:
        error: what a route, the library or the model raised.
        param: the field that is to blame for an error of the library.
    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, MinllamaError) and not isinstance(error, CheckpointError):
        message = str(error)
        if isinstance(error, OptionError):  # its remedy is for those who type commands
            message = message.replace(" (--stop-token)", "")
        return RequestError(message, param=param)
    return RequestError(INTERNAL, status=500)


# The form of an error

Shape = Callable[[RequestError], dict[str, Any]]


def openai_shape(error: RequestError) -> dict[str, Any]:
    content = {"message": error.message, "type": error.kind}
    return {"error": {**content, "param": error.param, "code": error.code}}


def ollama_shape(error: RequestError) -> dict[str, Any]:
    return {"error": error.message}


def tei_shape(error: RequestError) -> dict[str, Any]:
    """text-embeddings-inference's; it has no other kinds of errors than these."""
    kinds = {424: "backend", 429: "overloaded", 500: "backend", 503: "unhealthy", 504: "backend"}
    kind = "empty" if error.code == EMPTY else kinds.get(error.status, "validation")
    return {"error": error.message, "error_type": kind}


def tei_status(error: RequestError) -> int:
    if error.status != 400 or error.code == EMPTY:
        return error.status
    return 413 if error.code == TOO_LONG else 422


def systemone_shape(error: RequestError) -> dict[str, Any]:
    """System One's: a list of what is wrong with a request's fields, or a kind of error."""
    if systemone_status(error) == 422:
        place = error.place
        if place is None:
            parts = (error.param or "").split(".")
            place = [int(part) if part.isdecimal() else part for part in parts if part]
        kind = error.code or "value_error"
        return {"detail": [{"loc": ["body", *place], "msg": error.message, "type": kind}]}
    kinds = {401: "authentication_error", 404: "not_found", 429: "rate_limit_error"}
    kind = kinds.get(error.status, error.kind)
    return {"detail": {"error_type": kind, "message": error.message}}


def systemone_status(error: RequestError) -> int:
    return 422 if error.status == 400 else error.status


# The beginnings of paths whose errors have another form than OpenAI's; the longest one counts.
SHAPES: dict[str, Shape] = {
    "/api/": ollama_shape,
    "/predict": tei_shape,
    "/v1/systemone": systemone_shape,
}
# And those where an error has another status.
STATUSES: dict[str, Callable[[RequestError], int]] = {
    "/predict": tei_status,
    "/v1/systemone": systemone_status,
}


def error_status(path: str, error: RequestError) -> int:
    """The status of an error's response, as the protocol of a path has it."""
    found = max((start for start in STATUSES if path.startswith(start)), key=len, default=None)
    return error.status if found is None else STATUSES[found](error)


def error_content(path: str, error: RequestError) -> dict[str, Any]:
    """The body of an error's response, as the protocol of a path has it."""
    found = max((start for start in SHAPES if path.startswith(start)), key=len, default=None)
    shape = openai_shape if found is None else SHAPES[found]
    return shape(error)
