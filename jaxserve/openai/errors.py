"""Errors as OpenAI's API tells them: {"error": {"message", "type", "param", "code"}} and a status."""

from collections.abc import Sequence
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from jaxserve.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    DeviceError,
    JaxserveError,
    RequestError,
    UnavailableError,
)

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that gets no answer. `message` is for people, `code` for programs, `param` names the field at fault."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """The error object, as a response has it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def api_error(error: JaxserveError) -> ApiError:
    """What a caller is told of an error of ours."""
    message = str(error)
    if isinstance(error, UnavailableError):
        return ApiError(message, status=503, code="unavailable")
    if isinstance(error, DeviceError):
        return ApiError(message, status=500, code="device_error")
    if isinstance(error, CapacityError):
        return ApiError(message, code="context_length_exceeded")
    # A checkpoint that has been loaded is only at fault where a request asks for what it lacks: a chat template that works.
    if isinstance(error, RequestError | ConfigError | CheckpointError):
        too_long = "max_model_len" in message
        return ApiError(message, code="context_length_exceeded" if too_long else None)
    return ApiError(message, status=500, code="internal_error")


def of_validation(error: ValidationError) -> ApiError:
    """The first of the faults that a body has. The value at fault is never repeated: it may be a whole prompt."""
    faults = error.errors(include_url=False, include_input=False)
    fault, is_clear = _likeliest(faults)
    context, param = fault.get("ctx", {}), _path(fault["loc"])
    if fault["type"] == "json_invalid":
        return ApiError(f"the body is not JSON: {context.get('error', fault['msg'])}", code="invalid_json")
    if "param" in context:
        return ApiError(fault["msg"], param=context["param"], code=context.get("code"))
    if not is_clear:
        return ApiError(f"{param}: it has none of the forms that it may have, which /openapi.json tells", param=param)
    message = str(context["error"]) if fault["type"] == "value_error" else _lowered(fault["msg"])
    return ApiError(f"{param}: {message}" if param else message, param=param or None, code=context.get("code"))


def _likeliest(faults: Sequence[ErrorDetails]) -> tuple[ErrorDetails, bool]:
    """Of the faults of the first field at fault the deepest one: where a field has several forms, pydantic tries all of
    them, and comes farthest with the one that was meant. Returns whether that is one form only; else the path to the
    field is all that can be said."""
    mine = [fault for fault in faults if fault["loc"][:1] == faults[0]["loc"][:1]]
    deepest = max(len(fault["loc"]) for fault in mine)
    best = [fault for fault in mine if len(fault["loc"]) == deepest]
    forms = {tuple(part for part in fault["loc"] if not _is_step(part)) for fault in best}
    if len(forms) == 1:  # a thing of another type lacks all fields of ours: its type is what is wrong
        return next((fault for fault in best if fault["loc"][-1:] == ("type",)), best[0]), True
    fork = next(place for place, part in enumerate(best[0]["loc"]) if not _is_step(part))
    return cast(ErrorDetails, best[0] | {"loc": best[0]["loc"][:fork]}), False


def _path(place: Sequence[int | str]) -> str:
    """`messages[0].content`, without the forms that were tried on the way."""
    steps = [part for part in place if _is_step(part)]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in steps).lstrip(".")


def _is_step(part: int | str) -> bool:
    """Whether it names a field or counts items, and is not a form of a union that pydantic has tried."""
    if isinstance(part, int):
        return True
    return part.isidentifier() and part[0].islower() and part not in ("str", "int", "float", "bool", "dict", "list")


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]
