"""Who comes in: keys, and pages of other web sites in somebody's browser. Pure ASGI; chunks of a stream pass untouched."""

import ipaddress
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.openai.errors import ApiError
from jaxserve.server.caller import Caller
from jaxserve.server.json import error_response
from jaxserve.server.keys import Keys

# Without a key: whether the server lives and takes requests, one bit each, since probes of Kubernetes and of load balancers
# bring none; and the files of the page, which are the same for everybody.
_OPEN = frozenset(("/health", "/ready", "/"))
_OPEN_FOLDER = "/page/"
_SAFE = frozenset(
    ("GET", "HEAD", "OPTIONS")
)  # they change nothing, and browsers do not show their answers to other sites
_LOCAL = frozenset(("localhost", "ip6-localhost"))


class Door:
    """Asks for a key, and puts whose it is into the scope, as `caller`."""

    def __init__(self, app: ASGIApp, keys: Keys):
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or _is_open(scope):
            return await self._app(scope, receive, send)
        given = headers_of(scope, (b"authorization",)).get(b"authorization", b"")
        client = self._keys.client_of(given)
        if client is None:
            reason = "this key is not known here" if given else "this server needs a key"
            told = ApiError(f"{reason}; send it as `Authorization: Bearer KEY`", status=401, code="invalid_api_key")
            return await error_response(told, headers={"www-authenticate": "Bearer"})(scope, receive, send)
        scope["caller"] = Caller(client)
        return await self._app(scope, receive, send)


class Origins:
    """Refuses what pages of other web sites send through a visitor's browser.

    Browsers keep answers from such pages, but not requests from us: a form can post to any address, also of this machine.
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str]):
        self._app = app
        self._allowed = frozenset(origin.rstrip("/").encode("latin-1", "replace").lower() for origin in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http" and scope["method"] not in _SAFE:
            found = headers_of(scope, (b"origin", b"host", b"sec-fetch-site"))
            if b"origin" in found and not self._may(found):
                origin = found[b"origin"].decode("latin-1")[:100]
                told = ApiError(
                    f"pages of {origin!r} may not call this server; it can be started with --cors-allow-origin {origin}",
                    status=403,
                    code="origin_not_allowed",
                )
                return await error_response(told)(scope, receive, send)
        return await self._app(scope, receive, send)

    def _may(self, found: Mapping[bytes, bytes]) -> bool:
        origin = found[b"origin"].lower()
        if origin in self._allowed or b"*" in self._allowed:
            return True
        if b"sec-fetch-site" in found:  # newer browsers say it, and no page can change it
            return found[b"sec-fetch-site"] in (b"same-origin", b"none")
        return origin.partition(b"://")[2] == found.get(b"host", b"").lower()


class Hosts:
    """Refuses requests for names that this machine does not have.

    For servers without keys that listen on this machine only. A web site can give its own name our address (DNS rebinding),
    and then a browser takes us for a part of that site and shows it everything; but it calls us by that name.
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str]):
        self._app = app
        self._allowed = _LOCAL | {host.lower() for host in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http":
            host = headers_of(scope, (b"host",)).get(b"host", b"").decode("latin-1")
            if not self._may(host):
                told = ApiError(
                    f"this server is not {host[:100]!r}; it can be started with --allowed-host, or with a key",
                    status=403,
                    code="host_not_allowed",
                )
                return await error_response(told)(scope, receive, send)
        return await self._app(scope, receive, send)

    def _may(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return not host or name in self._allowed or is_local(name)  # HTTP/1.0 has no names


def is_local(host: str) -> bool:
    """Whether an address is of this machine only."""
    try:
        return host.lower() in _LOCAL or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def headers_of(scope: Scope, names: tuple[bytes, ...]) -> dict[bytes, bytes]:
    """Some headers; of those that come twice the last."""
    return {name: value for name, value in scope["headers"] if name in names}


def _is_open(scope: Scope) -> bool:
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path in _OPEN or path.startswith(_OPEN_FOLDER)
