"""A policy from its name and options."""

import importlib
from collections.abc import Mapping
from typing import Any

from jaxserve.config import SCHEDULING_POLICIES, from_options, reject_unknown
from jaxserve.scheduler.policy import Policy


def make_policy(name: str, options: Mapping[str, Any] | None = None, **parts: Any) -> Policy:
    """The policy of that name. `options` are what users may set: the fields of its dataclass.

    `parts` are what the engine has to offer (`cost`: the cost model; `capacity`: the executor's); a policy gets those
    that it has a field for.

    Raises:
      ConfigError: no such policy or option, or a value of the wrong type.
    """
    reject_unknown([name], SCHEDULING_POLICIES, what="scheduling policy")
    return from_options(policy_class(name), options, what=f"scheduling policy {name!r}", **parts)


def policy_class(name: str) -> Any:
    """The dataclass in `policies/NAME.py`, which is called Name."""
    module = importlib.import_module(f"jaxserve.scheduler.policies.{name}")
    return getattr(module, name.title().replace("_", ""))
