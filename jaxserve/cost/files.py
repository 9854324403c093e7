"""Cost models as JSON: written by `scripts/calibrate.py`, named by the engine option `cost_model`. Files are not trusted."""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxserve.cost.forms import Fitted, Roofline
from jaxserve.cost.model import CostModel, Host
from jaxserve.errors import ConfigError

_FORMAT = 1
_FORMS = {"roofline": Roofline, "fitted": Fitted}
_LARGEST = 1e30
_MOST_POINTS = 4096  # of a curve
_MOST_BYTES = 1 << 22  # of a file

T = TypeVar("T")


def save(model: CostModel, path: Path) -> None:
    """Write a model to a file."""
    path.write_text(json.dumps(to_json(model), indent=2) + "\n")


def load(path: str | Path) -> CostModel:
    """Read a model from a file.

    Raises:
      ConfigError: the file cannot be read, or is none.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise ConfigError(f"cost_model={str(path)!r} is larger than {_MOST_BYTES} bytes, so it is no cost model")
        value = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"cost_model={str(path)!r} cannot be read: {error!s:.200}", remedy="Make one with scripts/calibrate.py"
        ) from None
    try:
        return from_json(value)
    except ConfigError as error:
        raise ConfigError(f"cost_model={str(path)!r}: {error}", remedy="Make one with scripts/calibrate.py") from None


def to_json(model: CostModel) -> dict[str, Any]:
    """A model as JSON's values."""
    form = next(name for name, kind in _FORMS.items() if isinstance(model.device, kind))
    values = dataclasses.asdict(model)
    return {"format": _FORMAT} | values | {"device": {"form": form} | values["device"]}


def from_json(value: Any) -> CostModel:
    """The model that `to_json` was given.

    Raises:
      ConfigError: anything else; the message names the field.
    """
    fields = dict(_mapping(value, "a cost model"))
    if fields.pop("format", None) != _FORMAT:
        raise ConfigError(f"it is no cost model of format {_FORMAT}")
    device = dict(_mapping(fields.pop("device", None), "device"))
    form = device.pop("form", None)
    if not isinstance(form, str) or form not in _FORMS:
        raise ConfigError(f"device.form={form!r:.40} must be one of {', '.join(_FORMS)}")
    host = _made(Host, _mapping(fields.pop("host", {}), "host"), "host.")
    rest = _made(CostModel, fields, "", given={"device": _made(_FORMS[form], device, "device."), "host": host})
    if rest.hidden > 1:
        raise ConfigError(f"hidden={rest.hidden:g} must be at most 1")
    return rest


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be an object, not {value!r:.60}")
    return value


def _made(kind: type[T], values: Mapping[str, Any], prefix: str, given: Mapping[str, Any] | None = None) -> T:
    """A dataclass from values, each checked by the type of its field."""
    made, given = dict[str, Any](given or {}), given or {}
    fields = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    for name, value in values.items():
        if name not in fields or name in given:
            raise ConfigError(f"unknown field {prefix + str(name)!r:.80}")
        made[name] = _checked(prefix + name, value, str(getattr(fields[name].type, "__name__", fields[name].type)))
    for name, field in fields.items():
        if name not in made and field.default is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{name} is missing")
    return kind(**made)


def _checked(name: str, value: Any, kind: str) -> Any:
    if kind == "str":
        if not isinstance(value, str) or len(value) > 200:
            raise ConfigError(f"{name} must be a short text, not {value!r:.60}")
        return value
    if kind == "bool":
        if not isinstance(value, bool):
            raise ConfigError(f"{name}={value!r:.60} must be true or false")
        return value
    if kind.startswith("tuple"):
        return _curve(name, value)
    return _number(name, value, above=name.endswith("_per_s"))


def _number(name: str, value: Any, *, above: bool = False) -> float:
    good = (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(float(min(value, _LARGEST)))
    )
    if not good or not 0 <= value <= _LARGEST or (above and not value):
        raise ConfigError(f"{name}={value!r:.60} must be a finite number {'above 0' if above else 'of at least 0'}")
    return float(value)


def _curve(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Points (tokens, seconds) with both ascending."""
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= _MOST_POINTS:
        raise ConfigError(f"{name} must be a list of 1 to {_MOST_POINTS} points, not {value!r:.60}")
    points = list[tuple[int, float]]()
    for point in value:
        if not isinstance(point, (list, tuple)) or len(point) != 2 or not _is_count(point[0]):
            raise ConfigError(f"{name}: a point must be [tokens, seconds], not {point!r:.60}")
        points.append((point[0], _number(f"{name}: the seconds", point[1])))
    for (left, left_s), (right, right_s) in itertools.pairwise(points):
        if left >= right or left_s > right_s:
            raise ConfigError(f"{name}: tokens must ascend, and seconds not fall, but {right} tokens come after {left}")
    return tuple(points)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1 << 30
