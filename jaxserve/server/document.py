"""The OpenAPI document: what FastAPI can see of the routes, with the bodies that they read by themselves and the errors."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from jaxserve.server.bodies import REFERENCE, documented

_ERRORS = {
    "400": "The request is not what it must be; `param` names the field at fault.",
    "401": "No key, or a wrong one.",
    "403": "The key, or the page that asks, may not do this.",
    "404": "There is no such thing here: a model, a file, a batch.",
    "413": "The body is too long.",
    "429": "Too many requests, or too many tokens; `Retry-After` says when to come back.",
    "500": "The server's fault; its log says more.",
    "503": "The model is being loaded, or too many requests are under way, or the server shuts down.",
    "504": "The request took longer than it may.",
}
_ONLY_FOR_BODIES = ("413", "429", "504")
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_METHODS = ("get", "post", "delete")


def describe(app: FastAPI) -> None:
    """Make the app tell all of it at /openapi.json."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(
                get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            )
        return app.openapi_schema

    app.openapi = document


def _completed(made: dict[str, Any]) -> dict[str, Any]:
    # FastAPI's own error schemas go: nobody gets them.
    schemas: dict[str, Any] = {"Error": _ERROR}
    for name, model in sorted(documented.items()):
        schema = model.model_json_schema(ref_template=REFERENCE)
        schemas |= schema.pop("$defs", {}) | {name: schema}
    made["components"] = {
        "schemas": schemas,
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    made["security"] = [{"key": []}, {}]  # without --api-key none is needed
    for path in made["paths"].values():
        for method in _METHODS:
            if method in path:
                _add_errors(path[method])
    return made


def _add_errors(operation: dict[str, Any]) -> None:
    answers = operation["responses"]
    answers.pop("422", None)
    has_body = "requestBody" in operation
    for status, description in _ERRORS.items():
        if has_body or status not in _ONLY_FOR_BODIES:
            content = {"application/json": {"schema": {"$ref": REFERENCE.format(model="Error")}}}
            answers.setdefault(status, {"description": description, "content": content})
