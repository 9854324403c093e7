"""What an answer must look like: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*`."""

import re
from typing import Any, Literal, NamedTuple

from jaxserve.errors import JaxserveError
from jaxserve.openai.errors import ApiError, api_error
from jaxserve.openai.fields import Body, JsonObject

Constraint = dict[str, Any]  # what SamplingParams.structured_outputs takes


class Asked(NamedTuple):
    """A constraint, and the field that asked for it."""

    field: str
    constraint: Constraint


class ResponseFormat(Body):
    """Chat's form; `json_schema` holds `name`, `schema` and `strict`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonObject | None = None

    def constraint(self) -> Constraint | None:
        """None: anything goes.

        Raises:
          ApiError: the schema is missing.
        """
        if self.type == "json_schema":
            return {"json": schema_in(self.json_schema or {}, "response_format.json_schema")}
        return {"json_object": True} if self.type == "json_object" else None


class GuidedFields(Body):
    """How vLLM asked for a form before `structured_outputs`."""

    guided_json: JsonObject | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def guided(self) -> dict[str, Constraint | None]:
        """The constraint of each field."""
        names = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
        given = {name: getattr(self, name) for name in names}
        return {name: None if v is None else {name.removeprefix("guided_"): v} for name, v in given.items()}


def schema_in(holder: dict[str, Any], where: str) -> dict[str, Any]:
    """The schema beside its name. Schemas are always obeyed, whatever `strict` says.

    Raises:
      ApiError: there is none.
    """
    unknown = holder.keys() - {"type", "name", "schema", "strict", "description"}
    if unknown:
        name = min(unknown)
        raise ApiError(f"{where}: unknown field {name[:60]!r}", param=f"{where}.{name[:60]}", code="unknown_field")
    schema = holder.get("schema")
    if not isinstance(schema, dict):
        raise ApiError(f"{where}.schema must be a JSON schema", param=f"{where}.schema")
    return schema


def only_one(**given: Constraint | None) -> Asked | None:
    """The constraint that was given.

    Raises:
      ApiError: there are several.
    """
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) > 1:
        names = " and ".join(sorted(found))
        raise ApiError(f"{names} cannot be obeyed together; give one", param=max(found))
    return next((Asked(name, value) for name, value in found.items()), None)


def told_with(error: str, field: str) -> ApiError:
    """What is wrong with a constraint, told with the field that it came from."""
    return ApiError(re.sub(r"structured_outputs(\.\w+)?", field, error, count=1), param=field)


def at_fault(error: JaxserveError, field: str) -> ApiError:
    """What a caller is told of an error: of a constraint, with the field that asked for it, if one did."""
    return told_with(str(error), field) if field and "structured_outputs" in str(error) else api_error(error)
