"""The page for people at ``/``: files of the package, served as they are."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

from swifti2v.shipped import PACKAGE

FOLDERS = (PACKAGE / "serving" / "page", PACKAGE / "look")
"""HTML and JavaScript of the page, and the style that all pages share."""
KINDS = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


def add_page(app: FastAPI) -> None:
    """Add a route for each file; no path comes from a client."""
    for file in sorted(file for folder in FOLDERS for file in folder.iterdir()):
        path = "/" if file.name == "index.html" else f"/{file.name}"
        app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)(_answer_with(file))


def _answer_with(file: Path) -> Callable[[], Awaitable[FileResponse]]:
    async def answer() -> FileResponse:
        # Browsers ask each time whether it changed: after an upgrade no file meets an older one.
        headers = {"Cache-Control": "no-cache"}
        return FileResponse(file, media_type=KINDS[file.suffix], headers=headers)

    return answer
