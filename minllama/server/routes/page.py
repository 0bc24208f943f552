"""The page for people, at `/`."""

from fastapi import Response

from minllama.server.page import page
from minllama.server.routing import router as make_router

router = make_router()


@router.get("/", include_in_schema=False)
@router.head("/", include_in_schema=False)
async def show_page() -> Response:
    """The page; it is the same for everybody, so it needs no key, and asks for one itself."""
    shown = page()
    return Response(shown.content, headers=shown.headers, media_type="text/html")
