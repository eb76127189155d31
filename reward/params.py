"""Strict, typed loading of one group of params.yaml.

A group is a frozen dataclass that stands in the module which owns it, one annotated field a key:

    r: Annotated[int, Rule("a positive integer", lambda r: r > 0)]

Code holds no default: every key stands in params.yaml, every fault is named in one message.
"""

import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from reward.process import Fault

Group = TypeVar("Group")


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words and as a test of a value of the right type."""

    wanted: str
    holds: Callable[[Any], bool] = lambda value: True


Text = Annotated[str, Rule("a text that is not empty", lambda text: bool(text.strip()))]
Positive = Annotated[int, Rule("a positive integer", lambda number: number > 0)]
Seed = Annotated[int, Rule("an integer from 0 to 4294967295", lambda seed: 0 <= seed < 2**32)]
Switch = Annotated[bool, Rule("true or false")]
AboveZero = Annotated[float, Rule("a number above 0", lambda number: number > 0)]
ZeroOrMore = Annotated[float, Rule("a number of 0 or more", lambda number: number >= 0)]
Fraction = Annotated[
    float, Rule("a number from 0 up to, not including, 1", lambda share: 0 <= share < 1)
]


def load(name: str, kind: type[Group], path: Path = Path("params.yaml")) -> Group:
    """The group `name` of `path` as an instance of the dataclass `kind`.

    Raises a Fault that lists every unknown, missing, mistyped and out-of-range key of the group.
    """
    values = _read(name, path)
    hints = typing.get_type_hints(kind, include_extras=True)
    unknown = values.keys() - hints.keys()
    faults = [f"{name}.{key} is unknown, known are {', '.join(hints)}" for key in unknown]
    for key, hint in hints.items():
        if key not in values:
            faults.append(f"{name}.{key} is missing, must be {_wanted(hint)}")
        elif not _conforms(values[key], hint):
            faults.append(f"{name}.{key} is {values[key]!r}, must be {_wanted(hint)}")
    if faults:
        raise Fault("\n".join(f"{path}: {fault}" for fault in sorted(faults)))
    return kind(**{key: _typed(values[key], hint) for key, hint in hints.items()})


def _read(name: str, path: Path) -> dict[str, Any]:
    try:
        document = YAML(typ="safe").load(path)
    except FileNotFoundError:
        raise Fault(f"{path} is not here, wanted in the folder {Path.cwd()}") from None
    except OSError as error:
        raise Fault(f"{path} cannot be read: {error.strerror}; wanted the parameters") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise Fault(f"{path}: broken YAML: {' '.join(str(error).split())}") from None
    group = document.get(name) if isinstance(document, dict) else None
    if not isinstance(group, dict):
        raise Fault(f"{path}: the group {name} is {group!r}, must be a list of keys and values")
    return {str(key): value for key, value in group.items()}


def _base(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _wanted(hint: Any) -> str:
    if typing.get_origin(hint) is Annotated:
        return str(typing.get_args(hint)[1].wanted)
    return "one of " + ", ".join(str(choice) for choice in typing.get_args(hint))


def _conforms(value: Any, hint: Any) -> bool:
    if not _is_a(value, _base(hint)):
        return False
    rules = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
    return all(rule.holds(value) for rule in rules)


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a YAML value has a type; true is no integer, an integer is a number, NaN is none."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (types.UnionType, typing.Union):
        return any(_is_a(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(_is_a(item, arguments[0]) for item in value)
    if type(value) is int and abs(value) >= 2**63:
        return False
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def _typed(value: Any, hint: Any) -> Any:
    return float(value) if _base(hint) is float else value
