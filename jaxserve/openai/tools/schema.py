"""JSON schemas that leave a model no choice but to call a function."""

from collections.abc import Mapping, Sequence
from typing import Any

NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_NOT_SCHEMAS = ("const", "enum", "default", "examples")  # data, in which "$ref" means nothing


def any_of(functions: Sequence[Mapping[str, Any]], *, parallel: bool = True) -> dict[str, Any]:
    """A list of calls of these functions, at least one: `[{"name": "f", "parameters": {...}}, ...]`.

    Functions are OpenAI's: `name`, and `parameters` if there are any. `forced.rules` reads what comes of it.
    """
    calls = []
    for index, function in enumerate(functions):
        place = f"#/items/anyOf/{index}/properties/parameters"
        call = {"name": {"const": function["name"]}, "parameters": moved(parameters(function), place)}
        calls.append({"type": "object", "properties": call, "required": list(call), "additionalProperties": False})
    schema = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    return schema if parallel else schema | {"maxItems": 1}


def parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of one function's arguments; nothing given means that it takes none."""
    return dict(function.get("parameters") or NO_PARAMETERS)


def moved(schema: Any, place: str) -> Any:
    """A schema that will stand at `place` of a larger one: references to its own root follow it there."""
    if isinstance(schema, Mapping):
        return {key: _moved_entry(key, value, place) for key, value in schema.items()}
    return [moved(item, place) for item in schema] if isinstance(schema, list) else schema


def _moved_entry(key: str, value: Any, place: str) -> Any:
    if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
        return place + value[1:]
    return value if key in _NOT_SCHEMAS else moved(value, place)
