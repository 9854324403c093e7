"""Command-line flags generated from config dataclasses, so that each option, default and help text exists once."""

import argparse
import dataclasses
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_args, get_origin, get_type_hints

from jaxserve.config import nearest


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse, and answer an unknown flag with the nearest known one. A mistake exits with code 2."""
    args, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        flag = unknown[0].split("=")[0]
        hint = nearest(flag, sorted(set(re.findall(r"--[a-z0-9][a-z0-9-]*", parser.format_help()))))
        parser.exit(2, f"{parser.prog}: unknown option {flag}" + (f"; did you mean {hint}?\n" if hint else "\n"))
    return args


def add_dataclass_flags(
    parser: argparse.ArgumentParser,
    config_type: type,
    title: str,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    texts: Mapping[str, str] = MappingProxyType({}),
    defaults: Mapping[str, Any] = MappingProxyType({}),
    groups: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """One flag per field (but those to `skip`, or `only` some): `max_num_seqs: int` -> `--max-num-seqs`, a bool ->
    `--x / --no-x`.

    Help and choices come from the field's metadata, or help from `texts`; `defaults` are a command's own, for the
    help text. With `groups`, a title for the first field of each, there are several; `title` stands before theirs. Flags
    that are not given leave no trace in the namespace; `given` collects the others.
    """
    group = None if groups else parser.add_argument_group(title)
    hints = get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        if field.name in groups:
            group = parser.add_argument_group(f"{title}, {groups[field.name]}")
        if field.name not in skip and field.init and (not only or field.name in only):
            assert group is not None, "the first field begins a group"
            flag = "--" + field.name.replace("_", "-")
            default = defaults.get(field.name, field.default)
            options = flag_options(field, hints[field.name], texts.get(field.name, ""), default)
            group.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, **options)


def given(args: argparse.Namespace, config_type: type) -> dict[str, Any]:
    """The options of `config_type` that the user gave, as keyword arguments for it."""
    names = [field.name for field in dataclasses.fields(config_type)]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def flag_options(field: dataclasses.Field[Any], hint: Any, text: str, default: Any) -> dict[str, Any]:
    """What `add_argument` needs for a field: type, action, choices, help."""
    text = str(field.metadata.get("help", text)).replace("%", "%%")
    shown = "" if default in (None, "", (), dataclasses.MISSING) else f" (default: {default})"
    options: dict[str, Any] = {"help": f"{text}{shown}".strip()}
    if field.metadata.get("choices"):
        return options | {"choices": field.metadata["choices"]}
    hint = without_none(hint)
    origin = get_origin(hint)
    if hint is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    if hint in (int, float, str):
        return options | {"type": hint, "metavar": {int: "N", float: "X", str: "TEXT"}[hint]}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return options | {"type": json_object(get_args(hint)), "metavar": "JSON"}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        item = next((arg for arg in get_args(hint) if arg in (int, float)), str)
        options["help"] += "; may be repeated"
        return options | {"type": item, "action": "append", "metavar": "N" if item is int else "TEXT"}
    return options | {"type": json_value, "metavar": "JSON"}


def without_none(hint: Any) -> Any:
    """`int | None` -> `int`; `str | Sequence[str] | None` -> `Sequence[str]`: a flag that repeats is both."""
    if get_origin(hint) not in (types.UnionType, typing.Union):
        return hint
    arms = [arm for arm in get_args(hint) if arm is not type(None)]
    sequences = [arm for arm in arms if isinstance(get_origin(arm), type)]
    return sequences[0] if sequences else float if set(arms) == {int, float} else arms[0]


def json_value(text: str) -> Any:
    """Any JSON value; argparse turns the failure into its usual message."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error.msg} at character {error.pos})") from None


def json_object(key_and_value: tuple[Any, ...]) -> Any:
    """A parser for `{"50": -2.5}`: JSON knows only text keys, so they become the key type of the mapping."""
    key_type = key_and_value[0] if key_and_value and key_and_value[0] in (int, float) else str

    def read(text: str) -> dict[Any, Any]:
        value = json_value(text)
        if not isinstance(value, dict):
            raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
        try:
            return {key_type(key): item for key, item in value.items()}
        except ValueError:
            raise argparse.ArgumentTypeError(f"the keys of {text!r} must be of type {key_type.__name__}") from None

    return read
