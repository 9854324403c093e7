"""Who asks, and what a request says to the scheduler: from its key, its headers and its body, in this order."""

import dataclasses
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request

from jaxserve.openai.errors import ApiError, of_validation
from jaxserve.openai.fields import MetaFields
from jaxserve.server.state import state_of

# Headers for clients that cannot change bodies; the body's own fields go first.
_HEADERS = {
    "x-client": "client",
    "x-program": "program",
    "x-parents": "parents",
    "x-stage": "stage",
    "x-priority": "priority",
    "x-deadline-ms": "deadline_ms",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
    """`client` is the one that the key stands for; empty without keys."""

    client: str = ""


def caller_of(request: Request) -> Caller:
    """Who has sent a request; the middleware that checks keys has put it there."""
    return request.scope.get("caller") or Caller()


def meta_of(request: Request, body: MetaFields) -> dict[str, Any]:
    """Fields of `Request` for the scheduler.

    Raises:
      ApiError: a header that is no number where one is wanted, or a client that the key does not stand for.
    """
    meta = _from_headers(request) | body.meta()
    config, expiry = state_of(request).config, request.scope.get("expiry")
    if config.enforce_deadlines and expiry is not None and "deadline_s" in meta:
        expiry.within(meta["deadline_s"], "the request was not answered within the deadline_ms that it came with")
    return owned(meta, caller_of(request), isolate=config.isolate_clients)


def owned(meta: dict[str, Any], caller: Caller, *, isolate: bool) -> dict[str, Any]:
    """The same as said by a caller: names stand for things of its own, and of nobody else.

    Raises:
      ApiError: a client that the key does not stand for.
    """
    client = caller.client or meta.get("client", "")
    if caller.client:
        if meta.get("client", client) != client:
            raise ApiError(f"this key belongs to client {client!r}", status=403, param="client", code="wrong_client")
        # No client has a slash in its name, so no two clients can mean the same.
        meta = meta | {name: f"{client}/{meta[name]}" for name in ("program", "pin", "namespace") if meta.get(name)}
        meta["client"] = client
    if isolate:
        meta = meta | {"namespace": f"{client!r}/{meta.get('namespace', '')}"}
    return meta


def headers_meta(request: Request) -> dict[str, Any]:
    """What the headers alone say: for all requests of a batch. Not `owned` yet."""
    return _from_headers(request)


def _from_headers(request: Request) -> dict[str, Any]:
    given = {name: request.headers[header] for header, name in _HEADERS.items() if header in request.headers}
    found: dict[str, Any] = dict(given)
    if "parents" in found:
        found["parents"] = [part.strip() for part in given["parents"].split(",") if part.strip()]
    for name in ("priority", "deadline_ms"):
        if name in found:
            try:
                found[name] = float(given[name])
            except ValueError:
                raise ApiError(f"header x-{name.replace('_', '-')} must be a number", param=name) from None
    try:
        return MetaFields(**found).meta() if found else {}
    except ValidationError as error:
        told = of_validation(error)
        name = str(told.param)
        message = told.message.replace(name, f"header x-{name.replace('_', '-')}", 1)
        raise ApiError(message, param=name) from None
