"""Whether the server is alive and ready, and its metrics."""

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from minllama.server.routing import router as make_router
from minllama.server.routing import service_of

router = make_router()


@router.get("/health")
async def health() -> dict[str, str]:
    """The process is alive and its event loop runs."""
    return {"status": "ok"}


@router.get("/ready", responses={503: {"description": "Loading, or shutting down."}})
async def ready(request: Request) -> JSONResponse:
    """The models are loaded, and requests are accepted."""
    state = service_of(request).state
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(service_of(request).metrics.page(), media_type=CONTENT_TYPE_LATEST)
