"""The values of records, by path or by column, and tests of what they are."""

import math
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from reward.data.records import BadRecord, names_of

# A record as it is in a file; `records.Record` is a checked one.
JsonRecord = dict[str, Any]
# The values of each column, by its name.
Columns = dict[str, list[Any]]

# The largest whole number below which every one is a float. Ids may be larger.
EXACT = 2**53


def is_absent(value: Any) -> bool:
    """Whether a value is null or empty, which counts as a missing column."""
    return not value and (value is None or isinstance(value, str | list | dict))


def is_blank(value: Any) -> bool:
    """Whether a value is absent or only white space."""
    return is_absent(value) or (isinstance(value, str) and not value.strip())


def value_at(record: JsonRecord, path: str) -> Any:
    """The value of a column, or of a path: `info.post`, `texts[0]`, `answers[].text` (a list).

    None if there is none.
    """
    if path in record:
        return record[path]
    return _descend(record, re.findall(r"[^.\[\]]+|\[\d*\]", path))


def _descend(value: Any, steps: list[str]) -> Any:
    for place, step in enumerate(steps):
        if step == "[]":
            listed = value if isinstance(value, list) else []
            return [_descend(item, steps[place + 1 :]) for item in listed] or None
        if step.startswith("["):
            index = int(step[1:-1])
            value = value[index] if isinstance(value, list) and index < len(value) else None
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value


def column_of(path: str) -> str:
    """The column that a path begins with."""
    return re.split(r"[.\[]", path, maxsplit=1)[0]


def needed(record: JsonRecord, path: str) -> Any:
    """The value at a path. Raises BadRecord if there is none."""
    value = value_at(record, path)
    if value is None:
        found = "is null" if path in record else f"is missing, found {names_of(record)}"
        raise BadRecord("missing_key", f"{path!r} {found}")
    return value


def normalized(value: Any) -> Any:
    """A value as it is compared with others: `1`, `1.0` and `"1"` become the same."""
    if not isinstance(value, int | float | str):
        return repr(value).lower()
    text = str(value).strip()
    try:
        number = float(text)
    except ValueError:
        return text.lower() if text.lower() in ("true", "false") else text
    if EXACT <= abs(number) < math.inf:
        with suppress(ValueError):
            return int(text)
    return number


def columns_of(records: Iterable[JsonRecord]) -> Columns:
    """The values of each column, without absent ones."""
    columns: Columns = {}
    for record in records:
        for name, value in record.items():
            if not is_absent(value):
                columns.setdefault(name, []).append(value)
    return columns


def are_texts(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) for value in values)


def are_labels(values: list[Any]) -> bool:
    """Whether these are numbers, or texts as short as "A>B" or "tie (bothbad)"."""
    return all(
        isinstance(value, int | float)
        or (isinstance(value, str) and len(value) <= 13 and re.fullmatch(r"\w[\w .<>=()-]*", value))
        for value in values
    )


def are_numbers(values: list[Any]) -> bool:
    return bool(values) and all(
        isinstance(value, int | float) or isinstance(normalized(value), int | float)
        for value in values
    )


def begins_like_number(value: Any) -> bool:
    """Whether a value is a number, or a text such as "0.5", ",5", "25%" or "1 point"."""
    return type(value) in (int, float) or (
        isinstance(value, str) and re.match(r"\s*[-+]?[.,]?\d", value) is not None
    )
