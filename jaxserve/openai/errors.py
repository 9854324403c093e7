"""Errors as OpenAI's API tells them: {"error": {"message", "type", "param", "code"}} and a status."""

from typing import Any

from pydantic import ValidationError

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
    fault = faults[0]
    context = fault.get("ctx", {})
    where = [part for part in fault["loc"] if isinstance(part, int) or _is_field(part)]
    param = context.get("param") or "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in where).lstrip(".")
    if fault["type"] == "json_invalid":
        return ApiError(f"the body is not JSON: {context.get('error', fault['msg'])}", code="invalid_json")
    if "param" in context:
        return ApiError(fault["msg"], param=context["param"], code=context.get("code"))
    message = str(context["error"]) if fault["type"] == "value_error" else _lowered(fault["msg"])
    arms = {str(each["loc"][1]) for each in faults if len(each["loc"]) > 1 and each["loc"][0] == fault["loc"][0]}
    if arms - {str(part) for part in where}:  # pydantic has tried all forms that the field may have
        param, message = str(fault["loc"][0]), "it has none of the forms that it may have"
    message = f"{param}: {message}" if param else message
    return ApiError(message, param=param or None, code=context.get("code"))


def _is_field(part: str) -> bool:
    """Whether it names a field, and not the arm of a union that pydantic has tried."""
    return part.isidentifier() and part not in ("str", "int", "float", "bool", "dict", "list") and "-" not in part


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]
