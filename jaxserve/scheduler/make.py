"""A policy from its name and options."""

import dataclasses
import importlib
import types
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

from jaxserve.config import SCHEDULING_POLICIES, reject_unknown
from jaxserve.errors import ConfigError
from jaxserve.scheduler.policy import Policy


def make_policy(name: str, options: Mapping[str, Any] | None = None, **parts: Any) -> Policy:
    """The policy of that name. `options` are what users may set: the fields of its dataclass.

    `parts` are what the engine has to offer (`cost`: the cost model; `capacity`: the executor's); a policy gets those
    that it has a field for.

    Raises:
      ConfigError: no such policy or option, or a value of the wrong type.
    """
    reject_unknown([name], SCHEDULING_POLICIES, what="scheduling policy")
    policy = policy_class(name)
    fields = {field.name: field for field in dataclasses.fields(policy) if field.init}
    known = [field for field in fields if field not in parts]
    options = dict(options or {})
    reject_unknown(options, known, what=f"option of the scheduling policy {name!r}:")
    hints = get_type_hints(policy)
    for option, value in options.items():
        _check_type(name, option, value, hints[option])
    return policy(**options, **{part: value for part, value in parts.items() if part in fields})


def policy_class(name: str) -> Any:
    """The dataclass in `policies/NAME.py`, which is called Name."""
    module = importlib.import_module(f"jaxserve.scheduler.policies.{name}")
    return getattr(module, name.title().replace("_", ""))


def _check_type(policy: str, option: str, value: Any, hint: Any) -> None:
    allowed = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed:
        allowed = (*allowed, int)
    plain = tuple(kind for kind in (get_origin(each) or each for each in allowed) if isinstance(kind, type))
    is_good = isinstance(value, plain) and (bool in plain or not isinstance(value, bool)) and value == value
    if plain and not is_good:
        names = " or ".join("None" if each is type(None) else each.__name__ for each in plain)
        raise ConfigError(f"option {option}={value!r:.60} of the scheduling policy {policy!r} must be a {names}")
