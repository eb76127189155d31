"""dataset.yaml: what the columns of a folder's files mean, and which of their records are used.

There is an entry for each file or pattern of files. Every key is optional. What an entry does not
say about the columns is recognized:

    ratings-*.csv:
      prompt: question               # a column, or a path: info.post, texts[0], answers[].text
      answers: [answer_a, answer_b]
      verdict: label
      first: [A, a]                  # the values that prefer the first answer
      second: [B, b]
      tie: [same]
      weight: trust                  # or preference, votes, margin: columns that grade a comparison
      where: {language: [en, zh]}    # only records with one of these values
      take: 5000                     # this many records, or a share such as 0.25, drawn by seed
      seed: 0
      split: train                   # or validation, or test
      source: ratings                # the value of the column source, by default the file's name
      license: cc-by-4.0             # for the model card, by its name on the Hub
"""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from reward.data.answers import Answers, Grades, Judged, Listed, Meaning, Order, Preferred
from reward.data.forms import Context
from reward.data.recognition import Known
from reward.data.suggestion import MAPPING
from reward.data.values import normalized
from reward.params import Rule, read_yaml, yaml_error
from reward.process import Fault, as_written

ORDERED: tuple[Order, ...] = ("ranks", "scores")
GRADED = ("preference", "margin", "weight")
# Keys that say which of two answers is better, and with what probability.
SOFT = ("votes", "preference")
# Keys about the records of a file, not about its columns.
RECORDS = ("take", "seed", "split", "source", "license")
BEFORE = ("prompt", "input", "system", "history")
Scalars = tuple[Any, ...]


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


COLUMN = Rule("the name of a column", _is_path)
OPTIONAL = Rule("the name of a column, or null for none", lambda v: v is None or _is_path(v))
COLUMNS = Rule("the name of a column, or a list of such names", _are_paths)
VALUES = Rule("a value or a list of values", _are_scalars)
KEYS = {
    **dict.fromkeys((*BEFORE, *GRADED), OPTIONAL),
    "votes": Rule("the name of a column, a list of two such names, or null", _may_be_votes),
    **dict.fromkeys(("chosen", "rejected", "verdict"), COLUMN),
    **dict.fromkeys(("answers", *ORDERED), COLUMNS),
    **dict.fromkeys(("first", "second", "tie"), VALUES),
    "order": Rule("best_first", lambda value: value == "best_first"),
    "where": Rule("columns, each with the values to keep", _are_conditions),
    "take": Rule("a number of records, or a share above 0 and below 1", _is_amount),
    "seed": Rule("an integer", lambda value: type(value) is int),
    "split": Rule("train, validation or test", lambda v: v in ("train", "validation", "test")),
    **dict.fromkeys(("source", "license"), Rule("a non-empty string", _is_path)),
}


@dataclass(frozen=True)
class Entry:
    """The entry of a file. `paths` are the columns that it names, each with its key."""

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
        """The entry of a file or of the pattern that it matches, or None.

        Raises a Fault if several patterns match.
        """
        if name in self.entries:
            return self.entries[name]
        found = [pattern for pattern in self.entries if fnmatchcase(name, pattern)]
        if len(found) > 1:
            patterns = " and ".join(found)
            raise Fault(f"{self.path}: {name} matches {patterns}, expected only one entry")
        return self.entries[found[0]] if found else None

    def require_files(self, names: list[str]) -> None:
        """Raises a Fault for an entry that matches no file."""
        for pattern in self.entries:
            if not any(fnmatchcase(name, pattern) or name == pattern for name in names):
                found = ", ".join(names)
                raise Fault(f"{self.path}: {pattern} matches none of the files {found}")


def read_mapping(folder: Path) -> Mapping | None:
    """The dataset.yaml of a folder, or None. Raises a Fault that lists everything wrong with it."""
    path = folder / MAPPING
    for other in (path.with_suffix(".yml"), path.with_name("Dataset.yaml")):
        if other.exists() and not path.exists():
            raise Fault(f"{other} is not read; rename it to {MAPPING}")
    try:
        document = read_yaml(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Fault(f"{path} cannot be read: {error.strerror}; expected a readable file") from None
    except (yaml.YAMLError, ValueError) as error:
        raise Fault(f"{path}: broken YAML: {yaml_error(error)}") from None
    if not isinstance(document, dict):
        raise Fault(f"{path} has no entries, expected the name of a file and the keys of its entry")
    faults = [
        f"{path}: {name}: {fault}" for name, entry in document.items() for fault in _faults(entry)
    ]
    if faults:
        raise Fault("\n".join(faults))
    return Mapping(path, {str(name): _entry(entry or {}) for name, entry in document.items()})


def _faults(entry: Any) -> list[str]:
    """What is wrong with an entry."""
    if entry is None:
        return []
    if not isinstance(entry, dict):
        return [f"is {as_written(entry)}, expected keys and values"]
    faults = [
        f"{key} is unknown, expected one of {', '.join(KEYS)}" for key in entry if key not in KEYS
    ]
    faults += [
        f"{key} is {as_written(entry[key])}, expected {rule.expected}"
        for key, rule in KEYS.items()
        if key in entry and not rule.holds(entry[key])
    ]
    return faults or _conflicts(entry)


def _conflicts(entry: dict[str, Any]) -> list[str]:
    """Keys of an entry that contradict each other."""
    pair, ways = {"chosen", "rejected"} & entry.keys(), ("verdict", *ORDERED, "order", *SOFT)
    given = [way for way in ways if entry.get(way) is not None]
    if pair or "answers" not in entry:
        given = [way for way in given if way not in SOFT]
    faults = []
    if len(pair) == 1 or (pair and "answers" in entry):
        faults.append("expected chosen and rejected, or answers")
    if len(given) != ("answers" in entry):
        return [*faults, f"expected answers with one of {', '.join(ways)}"]
    answers = _listed(entry, "answers")
    # One margin cannot be that of every comparison in a ranking.
    for key in ("verdict", *SOFT, "margin"):
        if entry.get(key) is not None and len(answers) not in (0, 2):
            faults.append(f"{key} needs two columns in answers")
    valued = {"first", "second", "tie"} & entry.keys()
    if "verdict" in entry and not {"first", "second"} <= entry.keys():
        faults.append("verdict needs first and second, the values that prefer each answer")
    elif valued and not ("verdict" in entry or _is_path(entry.get("votes"))):
        faults.append("first, second and tie need a verdict, or a single column of votes")
    elif valued and not {"first", "second"} <= entry.keys():
        faults.append("single votes need first and second, the values that prefer each answer")
    if entry.get("votes") and entry.get("preference"):
        faults.append("votes and preference both say how certain a verdict is, expected only one")
    meanings = [
        normalized(value) for key in ("first", "second", "tie") for value in _listed(entry, key)
    ]
    if len({*meanings}) != len(meanings):
        faults.append("first, second and tie share a value, expected one meaning for each value")
    for way in filter(entry.__contains__, ORDERED):
        columns = _listed(entry, way)
        if type(entry[way]) is not type(entry["answers"]):
            faults.append(f"answers and {way} must both be one column, or both a list of columns")
        elif len(columns) != len(answers):
            faults.append(
                f"{way} has {len(columns)} columns, answers has {len(answers)}, expected as many"
            )
    return faults


def _listed(entry: dict[str, Any], key: str) -> Scalars:
    """The values of a key, which may be a list or a single value."""
    found = entry.get(key, [])
    return tuple(found) if isinstance(found, list) else (found,)


def _entry(entry: dict[str, Any]) -> Entry:
    named: dict[str, Any] = {key: entry[key] for key in BEFORE if key in entry}
    for key in named.keys() & {"system", "history"}:
        named[key] = (named[key],) if named[key] else ()
    graded = {key: entry[key] for key in GRADED if key in entry}
    known = Known(
        Context(**named),
        _answers(entry),
        Grades(
            **graded,
            votes=tuple(filter(None, _listed(entry, "votes"))),
            meaning=_meaning(entry) if {"votes", "first"} <= entry.keys() else None,
            decisive=_soft(entry) if "answers" in entry and "verdict" not in entry else (),
        ),
        frozenset({*named, *graded, *(["votes"] if "votes" in entry else [])}),
    )
    columns = ("chosen", "rejected", "answers", "verdict", *ORDERED, "votes", *graded)
    paths = [(key, path) for key in (*named, *columns) for path in _listed(entry, key) if path]
    conditions = entry.get("where", {})
    where = tuple((str(path), _listed(conditions, path)) for path in conditions)
    paths += [("where", path) for path, _ in where]
    rest = {key: entry[key] for key in RECORDS if key in entry}
    return Entry(known, tuple(paths), where, **rest)


def _soft(entry: dict[str, Any]) -> tuple[str, ...]:
    """The columns of votes or of preferences that an entry names."""
    return tuple(str(path) for way in SOFT for path in _listed(entry, way) if path)


def _meaning(entry: dict[str, Any]) -> Meaning:
    """Which answer the values of a verdict, or of single votes, prefer."""
    return Meaning(*(_listed(entry, key) for key in ("first", "second", "tie")))


def _answers(entry: dict[str, Any]) -> Answers | None:
    if "chosen" in entry:
        return Preferred(entry["chosen"], entry["rejected"])
    if "answers" not in entry:
        return None
    if "verdict" in entry:
        first, second = entry["answers"]
        return Judged(first, second, entry["verdict"], _meaning(entry))
    if _soft(entry):
        return Preferred(*entry["answers"])
    for way in ORDERED:
        if way in entry:
            return Listed(_listed(entry, "answers"), way, _listed(entry, way))
    return Listed(_listed(entry, "answers"), "best_first")
