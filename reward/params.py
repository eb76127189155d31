"""Strict, typed loading of one group of params.yaml.

A group is a frozen dataclass in the module that owns it, with one annotated field per key:

    r: Annotated[int, Rule("a positive integer", lambda r: r > 0)]

The code has no defaults, so every key is in params.yaml. One message lists all faults of a group.
"""

import math
import re
import types
import typing
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml

from reward.process import Fault, as_written, one_line

Group = TypeVar("Group")

# Keys of earlier versions. The message for such a key says what happened to it.
GONE = {
    "base.trust_remote_code": "was removed: code that comes with a model never runs",
    "evaluate.sets": "was renamed to preprocess.sets",
    "export.tokens_per_pack": "was removed: export uses evaluate.tokens_per_pack",
    "preprocess.test_data": "was removed: put files named test* in the folder preprocess.data",
    "train.head_margin": "was removed: the head is always scaled to 0.05",
    "train.head_seed": "was removed: the head uses train.seed",
}


# The groups that were loaded from each file, as they were then.
loaded: dict[tuple[Path, str], dict[str, Any]] = {}


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words and as a test. In a group, it has the right type."""

    expected: str
    holds: Callable[[Any], bool] = lambda value: True


Text = Annotated[str, Rule("a non-empty string", lambda text: bool(text.strip()))]
Positive = Annotated[int, Rule("a positive integer", lambda number: number > 0)]
Seed = Annotated[int, Rule("an integer from 0 to 4294967295", lambda seed: 0 <= seed < 2**32)]
Switch = Annotated[bool, Rule("true or false")]
AboveZero = Annotated[float, Rule("a number above 0", lambda number: number > 0)]
ZeroOrMore = Annotated[float, Rule("a non-negative number", lambda number: number >= 0)]
Fraction = Annotated[
    float, Rule("a number from 0 up to but not including 1", lambda share: 0 <= share < 1)
]


def load(name: str, kind: type[Group], path: Path = Path("params.yaml")) -> Group:
    """The group `name` of `path` as an instance of the dataclass `kind`.

    Raises a Fault that lists every unknown, removed, missing, mistyped and out-of-range key of the
    group.
    """
    values = _read(name, path)
    loaded[path, name] = values
    return _typed(name, values, kind, path)


def checked(name: str, kind: type[Group], path: Path = Path("params.yaml")) -> Group:
    """The same for a stage whose outputs do not depend on the group. It may change meanwhile."""
    return _typed(name, _read(name, path), kind, path)


def changed() -> list[str]:
    """The keys of the loaded groups that have other values now, each with both values.

    Raises a Fault if a file cannot be read any more.
    """
    found = []
    for (path, name), before in loaded.items():
        now = _read(name, path)
        found += [
            f"{name}.{key} from {as_written(before.get(key))} to {as_written(now.get(key))}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
    return found


def _typed(name: str, values: dict[str, Any], kind: type[Group], path: Path) -> Group:
    hints = typing.get_type_hints(kind, include_extras=True)
    unknown = f"is unknown, expected one of {', '.join(hints)}"
    faults = [
        f"{name}.{key} {GONE.get(f'{name}.{key}', unknown)}" for key in values.keys() - hints.keys()
    ]
    typed = {}
    for key, hint in hints.items():
        type_of_key, rule = _parts(hint)
        if key not in values:
            faults.append(f"{name}.{key} is missing, must be {rule.expected}")
        elif not (_is_a(values[key], type_of_key) and rule.holds(values[key])):
            faults.append(f"{name}.{key} is {as_written(values[key])}, must be {rule.expected}")
        else:
            typed[key] = float(values[key]) if type_of_key is float else values[key]
    if faults:
        raise Fault("\n".join(f"{path}: {fault}" for fault in sorted(faults)))
    return kind(**typed)


def _read(name: str, path: Path) -> dict[str, Any]:
    try:
        document = read_yaml(path)
    except FileNotFoundError:
        raise Fault(
            f"{path} does not exist in the folder {Path.cwd()}, expected the root of the project"
        ) from None
    except OSError as error:
        raise Fault(f"{path} cannot be read: {error.strerror}; expected the parameters") from None
    except (yaml.YAMLError, ValueError) as error:
        raise Fault(f"{path}: broken YAML: {yaml_error(error)}") from None
    group = document.get(name) if isinstance(document, dict) else None
    if not isinstance(group, dict):
        raise Fault(
            f"{path}: the group {name} is {as_written(group)}, must be a mapping of keys to values"
        )
    return {str(key): value for key, value in group.items()}


def _parts(hint: Any) -> tuple[Any, Rule]:
    """The type of a field and its rule. A Literal needs no rule, because it lists its values."""
    if typing.get_origin(hint) is Annotated:
        kind, rule = typing.get_args(hint)
        return kind, rule
    return hint, Rule("one of " + ", ".join(map(str, typing.get_args(hint))))


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a YAML value has a type. 1 is also a float. True is not an int, nor NaN a float."""
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


# --- YAML ------------------------------------------------------------------------------------

TAG = "tag:yaml.org,2002:"
# Unquoted scalars that are not strings: the tag, the pattern, the possible first characters.
SCHEMA = (
    ("null", "~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", "[-+]?(0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9_]+)", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?|\.[0-9_]+([eE][-+][0-9]+)?"
        r"|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", "<<", "<"),
)


def yaml_error(error: Exception) -> str:
    """What is wrong with a YAML file and where, in one line."""
    return one_line(error).replace('in "<byte string>",', "at")


def read_yaml(file: Path | bytes) -> Any:
    """The document of a YAML file as DVC reads it, except that dates stay strings as written.

    Raises OSError, yaml.YAMLError for broken YAML and for keys that occur twice, and ValueError for
    a number without digits.
    """
    return yaml.load(file.read_bytes() if isinstance(file, Path) else file, _Loader)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML 1.2's core schema, in which 1e-5 is a number, no is a string and 010 is ten.

    PyYAML itself implements YAML 1.1. As in DVC's reader, numbers may have underscores or be
    binary, and `<<` merges mappings.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self._flattened: set[yaml.Node] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put the keys that `<<` merges before the node's own keys, which may not occur twice.

        Of several merged mappings, the first one counts. PyYAML calls this again for a node that
        another one merges. By then, the merged keys are among its own keys, and a key that
        overrides one of them is not a duplicate. PyYAML's own way differs between its versions.
        """
        if node in self._flattened:
            return
        self._flattened.add(node)
        keys: set[Hashable] = set()
        merged: list[tuple[yaml.Node, yaml.Node]] = []
        own: list[tuple[yaml.Node, yaml.Node]] = []
        for pair in node.value:
            merges = pair[0].tag == f"{TAG}merge"
            key = pair[0].tag if merges else self.construct_object(pair[0], deep=True)
            if not isinstance(key, Hashable) or key in keys:
                found = "unhashable" if not isinstance(key, Hashable) else "duplicate"
                raise _broken(node, f"found {found} key", pair[0])
            keys.add(key)
            if merges:
                merged = self._merged(node, pair[1])
            else:
                own.append(pair)
        node.value = merged + own

    def _merged(
        self, node: yaml.MappingNode, value: yaml.Node
    ) -> list[tuple[yaml.Node, yaml.Node]]:
        """The keys and values that `<<: value` merges; of equal keys, the last one counts."""
        found = []
        for part in reversed(value.value) if isinstance(value, yaml.SequenceNode) else [value]:
            if not isinstance(part, yaml.MappingNode):
                raise _broken(node, "expected a mapping or a list of mappings after <<", part)
            self.flatten_mapping(part)
            found += part.value
        return found

    def integer(self, node: yaml.ScalarNode) -> int:
        """The integer of a node, in the base given by its prefix, by default ten."""
        text = self.construct_scalar(node).replace("_", "")
        return int(text, {"0b": 2, "0o": 8, "0x": 16}.get(text.lstrip("-+")[:2], 10))


def _broken(node: yaml.MappingNode, problem: str, place: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(
        "while constructing a mapping", node.start_mark, problem, place.start_mark
    )


_Loader.add_constructor(f"{TAG}int", _Loader.integer)
for _name, _pattern, _first in SCHEMA:
    _Loader.add_implicit_resolver(TAG + _name, re.compile(f"({_pattern})$"), list(_first))
