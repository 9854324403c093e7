"""The page at `/`: files of this package, and nothing of anybody else."""

import functools
import hashlib
from importlib import resources

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.openai.errors import ApiError

router = APIRouter(include_in_schema=False)

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_HEADERS = {
    # Scripts and styles are files from here, and nothing may turn text into elements or scripts (trusted types).
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for every time, and answered with 304: a new version is seen at once
}


@functools.cache
def _files() -> dict[str, tuple[bytes, str, str]]:
    """Name -> content, type, ETag. Only these names are ever served, so no path can lead elsewhere."""
    files = {}
    for item in (resources.files("jaxserve.server") / "page").iterdir():
        kind = item.name.rpartition(".")[2]
        if kind in _TYPES:
            content = item.read_bytes()
            files[item.name] = content, _TYPES[kind], f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return files


def _answer(request: Request, name: str) -> Response:
    if name not in _files():
        raise ApiError(f"the page has no file {name[:100]!r}", status=404)
    content, kind, tag = _files()[name]
    headers = _HEADERS | {"ETag": tag}
    known = [part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")]
    if tag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=kind, headers=headers)


@router.get("/")
async def index(request: Request) -> Response:
    """The playground. It holds no data, so it is served without a key; what it shows, it asks for with one."""
    return _answer(request, "index.html")


@router.get("/page/{name}")
async def file(request: Request, name: str) -> Response:
    """A script, style or picture of the playground."""
    return _answer(request, name)
