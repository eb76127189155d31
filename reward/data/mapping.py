"""dataset.yaml: what the columns of a folder's files mean, and which of their records are taken.

An entry for each file, or pattern of files; every key may be left out, and what an entry does not
say of the columns is recognized:

    ratings-*.csv:
      prompt: question               # a column, or a path: info.post, texts[0], answers[].text
      answers: [answer_a, answer_b]
      verdict: label
      first: [A, a]                  # the values that prefer the first answer
      second: [B, b]
      tie: [same]
      weight: trust                  # or preference, votes, margin: columns that grade a comparison
      where: {language: [en, zh]}    # only records with one of these values
      take: 5000                     # as many records, or a share such as 0.25, drawn by seed
      seed: 0
      split: train                   # or validation, or test
      source: ratings                # the value of the column source, the file's name otherwise
      license: cc-by-4.0             # for the model card, by its name on the Hub
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from reward.data.answers import Answers, Grades, Judged, Listed, Meaning, Order, Preferred
from reward.data.forms import Context
from reward.data.recognition import Known
from reward.data.suggestion import MAPPING
from reward.data.values import plain
from reward.params import read_yaml
from reward.process import Fault

ORDERED: tuple[Order, ...] = ("ranks", "scores")
GRADED = ("preference", "margin", "weight")
# What says of two answers which is better, and how surely.
SURE = ("votes", "preference")
# What is said of the records of a file, and not of their columns.
RECORDS = ("take", "seed", "split", "source", "license")
BEFORE = ("prompt", "input", "system", "history")
Scalars = tuple[Any, ...]


class Kind(NamedTuple):
    """What the value of a key must be, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are_paths(value: Any) -> bool:
    several = isinstance(value, list) and len(value) > 1 and all(map(_is_path, value))
    return _is_path(value) or several


def _may_be_votes(value: Any) -> bool:
    return value is None or (_are_paths(value) and (isinstance(value, str) or len(value) == 2))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _are_scalars(value: Any) -> bool:
    return _is_scalar(value) or (isinstance(value, list) and all(map(_is_scalar, value)))


def _is_amount(value: Any) -> bool:
    if type(value) is float:
        return 0 < value < 1
    return type(value) is int and value > 0


def _are_conditions(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_are_scalars, value.values()))


COLUMN = Kind("the name of a column", _is_path)
OPTIONAL = Kind("the name of a column, or null for none", lambda v: v is None or _is_path(v))
COLUMNS = Kind("the name of a column, or a list of such names", _are_paths)
VALUES = Kind("a value or a list of values", _are_scalars)
KEYS = {
    **dict.fromkeys((*BEFORE, *GRADED), OPTIONAL),
    "votes": Kind("the name of a column, a list of two such names, or null", _may_be_votes),
    **dict.fromkeys(("chosen", "rejected", "verdict"), COLUMN),
    **dict.fromkeys(("answers", *ORDERED), COLUMNS),
    **dict.fromkeys(("first", "second", "tie"), VALUES),
    "order": Kind("best_first", lambda value: value == "best_first"),
    "where": Kind("columns with the values that records must have", _are_conditions),
    "take": Kind("a number of records, or a share above 0 and below 1", _is_amount),
    "seed": Kind("an integer", lambda value: type(value) is int),
    "split": Kind("train, validation or test", lambda v: v in ("train", "validation", "test")),
    **dict.fromkeys(("source", "license"), Kind("a text", _is_path)),
}


@dataclass(frozen=True)
class Entry:
    """What is said of a file; `paths` are the columns that it names, by the key that names them."""

    known: Known = field(default_factory=Known)
    paths: tuple[tuple[str, str], ...] = ()
    where: tuple[tuple[str, Scalars], ...] = ()
    take: int | float | None = None
    seed: int = 0
    split: str | None = None
    source: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class Mapping:
    """The entries of a dataset.yaml, by file or pattern."""

    path: Path
    entries: dict[str, Entry]

    def entry(self, name: str) -> Entry | None:
        """The entry of a file: its own, or that of the pattern. Raises a Fault for two patterns."""
        if name in self.entries:
            return self.entries[name]
        found = [pattern for pattern in self.entries if fnmatchcase(name, pattern)]
        if len(found) > 1:
            patterns = " and ".join(found)
            raise Fault(f"{self.path}: {name} has two entries, {patterns}; expected one")
        return self.entries[found[0]] if found else None

    def require_files(self, names: list[str]) -> None:
        """Raises a Fault for an entry that no file has."""
        for pattern in self.entries:
            if not any(fnmatchcase(name, pattern) or name == pattern for name in names):
                found = ", ".join(names)
                raise Fault(f"{self.path}: {pattern} is no file here, expected some of {found}")


def read_mapping(folder: Path) -> Mapping | None:
    """The dataset.yaml of a folder, if it has one. Raises a Fault that lists all that is wrong."""
    path = folder / MAPPING
    for other in (path.with_suffix(".yml"), path.with_name("Dataset.yaml")):
        if other.exists() and not path.exists():
            raise Fault(f"{other} is not read, expected the name {MAPPING}")
    try:
        document = read_yaml(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Fault(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise Fault(f"{path}: broken YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise Fault(f"{path} holds no entries, expected the name of a file with keys below it")
    faults = [
        f"{path}: {name}: {fault}" for name, said in document.items() for fault in _faults(said)
    ]
    if faults:
        raise Fault("\n".join(faults))
    return Mapping(path, {str(name): _entry(said or {}) for name, said in document.items()})


def _faults(said: Any) -> list[str]:
    """What is wrong with an entry."""
    if said is None:
        return []
    if not isinstance(said, dict):
        return [f"is {said!r}, expected keys and values"]
    faults = [f"{key} is unknown, known are {', '.join(KEYS)}" for key in said if key not in KEYS]
    faults += [
        f"{key} is {said[key]!r}, expected {kind.expected}"
        for key, kind in KEYS.items()
        if key in said and not kind.holds(said[key])
    ]
    return faults or _misfits(said)


def _misfits(said: dict[str, Any]) -> list[str]:
    """Keys of an entry that do not go together."""
    pair, ways = {"chosen", "rejected"} & said.keys(), ("verdict", *ORDERED, "order", *SURE)
    given = [way for way in ways if said.get(way) is not None]
    if pair or "answers" not in said:
        given = [way for way in given if way not in SURE]
    faults = []
    if len(pair) == 1 or (pair and "answers" in said):
        faults.append("expected chosen and rejected, or answers")
    if ("answers" in said) != (len(given) == 1):
        return [*faults, f"expected answers with one of {', '.join(ways)}"]
    for way in ("verdict", *SURE):
        if way in given and (not isinstance(said["answers"], list) or len(said["answers"]) != 2):
            faults.append(f"{way} needs two columns in answers")
    valued = {"first", "second", "tie"} & said.keys()
    if "verdict" in said and not {"first", "second"} <= said.keys():
        faults.append("verdict needs first and second, the values that prefer each answer")
    elif valued and not ("verdict" in said or _is_path(said.get("votes"))):
        faults.append("first, second and tie need verdict or votes, of which they are values")
    elif valued and not {"first", "second"} <= said.keys():
        faults.append("single votes need first and second, the values that prefer each answer")
    if said.get("votes") and said.get("preference"):
        faults.append("votes and preference say the same, expected one of them")
    meanings = [plain(value) for key in ("first", "second", "tie") for value in _listed(said, key)]
    if len({*meanings}) != len(meanings):
        faults.append("first, second and tie have a value in common, expected one meaning for each")
    for way in ORDERED:
        if way in said and type(said[way]) is not type(said.get("answers")):
            faults.append(f"answers and {way} are not both one column, or one for each answer")
        elif way in said and isinstance(said[way], list) and len(said[way]) != len(said["answers"]):
            faults.append(f"{way} has {len(said[way])} columns, answers {len(said['answers'])}")
    return faults


def _listed(said: dict[str, Any], key: str) -> Scalars:
    """The values of a key, which may be a single one."""
    found = said.get(key, [])
    return tuple(found) if isinstance(found, list) else (found,)


def _entry(said: dict[str, Any]) -> Entry:
    named = {key: said[key] for key in BEFORE if key in said}
    graded = {key: said[key] for key in GRADED if key in said}
    known = Known(
        Context(**named),
        _answers(said),
        Grades(**graded, votes=_votes(said), meaning=_meaning(said) if "votes" in said else None),
        frozenset({*named, *graded, *(["votes"] if "votes" in said else [])}),
    )
    columns = ("chosen", "rejected", "answers", "verdict", *ORDERED, "votes", *graded)
    paths = [(key, path) for key in (*named, *columns) for path in _listed(said, key) if path]
    conditions = said.get("where", {})
    where = tuple((str(path), _listed(conditions, path)) for path in conditions)
    paths += [("where", path) for path, _ in where]
    rest = {key: said[key] for key in RECORDS if key in said}
    return Entry(known, tuple(paths), where, **rest)


def _votes(said: dict[str, Any]) -> tuple[str, ...]:
    return tuple(path for path in _listed(said, "votes") if path)


def _meaning(said: dict[str, Any]) -> Meaning | None:
    """Which answer the values of a verdict, or single votes, prefer."""
    if "first" not in said:
        return None
    return Meaning(*(_listed(said, key) for key in ("first", "second", "tie")))


def _answers(said: dict[str, Any]) -> Answers | None:
    if "chosen" in said:
        return Preferred(said["chosen"], said["rejected"])
    if "answers" not in said:
        return None
    if "verdict" in said:
        meaning = _meaning(said) or Meaning((), ())
        first, second = said["answers"]
        return Judged(first, second, said["verdict"], meaning)
    if any(said.get(way) for way in SURE):
        return Preferred(*said["answers"])
    for way in ORDERED:
        if way in said:
            return Listed(_listed(said, "answers"), way, _listed(said, way))
    return Listed(_listed(said, "answers"), "best_first")
