"""How published forms store answers, and how they say which answer is better.

A form is a set of column names and the meaning of its verdict. Each class here reads the answers
of a record and the comparisons between them.
"""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal, NamedTuple, Protocol

from reward.data.columns import TIE
from reward.data.dialogue import as_messages, messages, role_of
from reward.data.records import CERTAIN, DECIMALS, BadRecord, Comparison
from reward.data.values import (
    Columns,
    JsonRecord,
    column_of,
    is_absent,
    is_blank,
    needed,
    normalized,
    value_at,
)


class UnknownVerdict(Exception):
    """A verdict whose value has no meaning in its form. The message names column and value."""


class Compared(NamedTuple):
    """The answers of a record, their names in error messages, and the comparisons between them."""

    answers: list[Any]
    names: Sequence[str]
    comparisons: list[Comparison]


def every_pair(columns: Sequence[str], chosen: list[Any], rejected: list[Any]) -> Compared:
    """Prefer every chosen answer to every rejected one. `columns` are where these are."""
    first = len(chosen)
    places = product(range(first), range(first, first + len(rejected)))
    names = [columns[0]] * first + [columns[1]] * len(rejected)
    return Compared(chosen + rejected, names, [Comparison(j, k) for j, k in places])


class Answers(Protocol):
    """How a form stores answers, and how it says which answer is better."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The paths of the texts."""

    @property
    def verdicts(self) -> tuple[str, ...]:
        """The paths of the verdict or the scores; empty if the column names say which is better."""
        return ()

    @property
    def description(self) -> str:
        """The form in words, for messages."""

    def compared(self, record: JsonRecord) -> Compared:
        """The answers of a record and their comparisons.

        Raises BadRecord if a value is missing or has the wrong type, UnknownVerdict for a verdict
        without a meaning.
        """


def answers_in(record: JsonRecord, path: str) -> list[Any]:
    """The answers in a column, none of them null. Raises BadRecord."""
    found = listed(needed(record, path))
    require_no_null(path, found)
    return found


def listed(value: Any) -> list[Any]:
    """The answers that a value holds, which is one answer or a list of them.

    A text, a message or a list of messages is one answer.
    """
    kinds = {type(item) for item in value} - {type(None)} if isinstance(value, list) else set()
    return list(value) if kinds in ({str}, {list}) else [value]


def require_no_null(path: str, values: list[Any]) -> None:
    """Raises BadRecord if one of the values is null."""
    if None in values:
        place = values.index(None) + 1
        raise BadRecord("missing_key", f"item {place} of {path!r} is null")


@dataclass(frozen=True)
class Preferred(Answers):
    """A column with the chosen answers and one with the rejected answers."""

    chosen: str
    rejected: str

    @property
    def columns(self) -> tuple[str, ...]:
        return self.chosen, self.rejected

    @property
    def description(self) -> str:
        return f"{self.chosen} and {self.rejected}"

    def compared(self, record: JsonRecord) -> Compared:
        return every_pair(self.columns, *(answers_in(record, path) for path in self.columns))


CANONICAL = Preferred("chosen", "rejected")


@dataclass(frozen=True)
class Continued(Answers):
    """A conversation whose last message is the chosen answer, and a column of rejected answers."""

    conversation: str
    rejected: str

    @property
    def columns(self) -> tuple[str, ...]:
        return self.conversation, self.rejected

    @property
    def description(self) -> str:
        return f"{self.conversation} with {self.rejected}"

    def compared(self, record: JsonRecord) -> Compared:
        turns, rejected = needed(record, self.conversation), answers_in(record, self.rejected)
        if not isinstance(turns, list):
            raise BadRecord("wrong_type", f"{self.conversation!r} is not a list of messages")
        turns = messages(self.conversation, turns)
        if not turns or role_of(turns[-1]) != "assistant":
            raise BadRecord(
                "empty", f"{self.conversation!r} does not end with an assistant message"
            )
        others = [
            turns[:-1] + as_messages(self.rejected, answer, "assistant") for answer in rejected
        ]
        return every_pair(self.columns, [turns], others)


@dataclass(frozen=True)
class Meaning:
    """Which values of a verdict prefer the first answer, the second, or neither."""

    first: tuple[Any, ...]
    second: tuple[Any, ...]
    tie: tuple[Any, ...] = ()

    @property
    def description(self) -> str:
        parts = [(self.first, "the first answer"), (self.second, "the second")]
        parts += [(self.tie, "a tie")] if self.tie else []
        return ", ".join(" or ".join(map(str, each)) + f" for {answer}" for each, answer in parts)

    def sign(self, value: Any) -> int | None:
        """1 if the first answer is better, -1 if the second is, 0 for a tie, None if unknown."""
        found = normalized(value)
        for sign, values in ((1, self.first), (-1, self.second), (0, self.tie)):
            if found in [normalized(known) for known in values]:
                return sign
        return None


@dataclass(frozen=True)
class Judged(Answers):
    """Two answers and a verdict."""

    first: str
    second: str
    verdict: str
    meaning: Meaning
    # The column with the number of the user's turn that was judged; later turns are left out.
    turn: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return self.first, self.second

    @property
    def verdicts(self) -> tuple[str, ...]:
        return (self.verdict,)

    @property
    def description(self) -> str:
        named = dict.fromkeys(column_of(path) for path in self.columns)
        return f"{' and '.join(named)} with {self.verdict} ({self.meaning.description})"

    def compared(self, record: JsonRecord) -> Compared:
        one, other, verdict = (needed(record, path) for path in (*self.columns, self.verdict))
        sign = self.meaning.sign(verdict)
        if sign is None:
            require_filled(repr(self.verdict), verdict)
            raise UnknownVerdict(
                f"{self.verdict} is {_shown(verdict)}, expected {self.meaning.description}; "
                "declare other values in dataset.yaml (answers, verdict, first, second, tie)"
            )
        turn = record.get(self.turn) if self.turn else None
        one, other = (until_turn(answer, turn) for answer in (one, other))
        found, names = [one, other], self.columns
        if sign < 0:
            found, names = found[::-1], names[::-1]
        return Compared(found, names, [CERTAIN if sign else Comparison(0, 1, TIE)])


def require_filled(name: str, value: Any) -> None:
    """Raises BadRecord for a verdict or rating that is blank, as null is in a table."""
    if is_blank(value):
        raise BadRecord("missing_key", f"{name} is empty")


def until_turn(answer: Any, turn: Any) -> Any:
    """A conversation up to the user's turn with this number, counted from 1, and its answer."""
    number = normalized(turn)
    if not isinstance(answer, list) or not isinstance(number, int | float):
        return answer
    starts = [place for place, item in enumerate(answer) if role_of(item) == "user"]
    return answer[: starts[int(number)]] if 1 <= number < len(starts) else answer


Order = Literal["ranks", "scores", "best_first"]
ORDERS: dict[Order, str] = {
    "ranks": "whole numbers from 1, where 1 is the best and equal numbers tie",
    "scores": "numbers, where more is better and equal numbers tie",
    "best_first": "the best answer first",
}


@dataclass(frozen=True)
class Listed(Answers):
    """Any number of answers, each with a rank or score, or listed best first.

    `ratings` are the ranks or scores. `answers` and `ratings` are each one path to a list, or one
    path per answer.
    """

    answers: tuple[str, ...]
    order: Order
    ratings: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return self.answers

    @property
    def verdicts(self) -> tuple[str, ...]:
        return self.ratings

    @property
    def description(self) -> str:
        found = " and ".join(self.answers)
        if self.order == "best_first":
            return f"{found} in order of preference"
        return f"{found} with {' and '.join(self.ratings)} ({ORDERS[self.order]})"

    def compared(self, record: JsonRecord) -> Compared:
        """Compare each answer with every other one. Raises as `Answers.compared` does."""
        found = self._values(record, self.answers)
        if self.order == "best_first":
            ratings = [-float(place) for place in range(len(found))]
        else:
            given = self._values(record, self.ratings)
            ratings = [self._rating(place, value) for place, value in enumerate(given)]
        if len(ratings) != len(found):
            name, other = self.answers[0], self.ratings[0]
            raise BadRecord(
                "wrong_type",
                f"{name!r} has {len(found)} values and {other!r} has {len(ratings)}, expected the "
                "same number",
            )
        comparisons = [
            Comparison(j, k, TIE if ratings[j] == ratings[k] else 1.0)
            if ratings[j] >= ratings[k]
            else Comparison(k, j)
            for j, k in combinations(range(len(found)), 2)
        ]
        return Compared(found, [f"answer {place + 1}" for place in range(len(found))], comparisons)

    def _values(self, record: JsonRecord, paths: tuple[str, ...]) -> list[Any]:
        if len(paths) > 1:
            return [needed(record, path) for path in paths]
        found = needed(record, paths[0])
        if not isinstance(found, list):
            raise BadRecord("wrong_type", f"{paths[0]!r} is not a list")
        require_no_null(paths[0], found)
        if len(found) < 2:
            raise BadRecord("empty", f"{paths[0]!r} has {len(found)} answers, expected two or more")
        return found

    def _rating(self, place: int, value: Any) -> float:
        several = len(self.ratings) > 1
        name = self.ratings[place if several else 0]
        require_filled(repr(name) if several else f"item {place + 1} of {name!r}", value)
        number = normalized(value)
        if isinstance(number, int | float) and math.isfinite(number):
            if self.order == "scores":
                return number
            if number >= 1 and number == int(number):
                return -number
        raise UnknownVerdict(
            f"{name} has {_shown(value)}, expected {ORDERS[self.order]}",
        )


# --- how certain a verdict is ----------------------------------------------------------------


@dataclass(frozen=True)
class Grades:
    """The columns that say how certain a verdict is and how much it counts; None if there is none.

    `preference` is the probability that chosen, or the first of two answers, is preferred. `votes`
    are the numbers of votes for each answer, or a list of single votes with this `meaning`.
    `decisive` are those of these columns that alone say which answer is better, so every record
    needs a value there.
    """

    preference: str | None = None
    votes: tuple[str, ...] = ()
    meaning: Meaning | None = None
    margin: str | None = None
    weight: str | None = None
    decisive: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        named = (self.preference, *self.votes, self.margin, self.weight)
        return tuple(path for path in named if path)

    def description(self, columns: Columns) -> str:
        """The grading columns that a file has, in words that continue the description of a form."""
        votes = f" ({self.meaning.description})" if self.meaning else ""
        found = [
            path + votes * (path in self.votes)
            for path in self.columns
            if column_of(path) in columns
        ]
        return f" with {' and '.join(found)}" if found else ""

    def graded(self, record: JsonRecord, comparisons: list[Comparison]) -> list[Comparison]:
        """The comparisons of a record, with its preference, weight and margin.

        Raises BadRecord if there is no verdict, or a margin although no answer is certainly better.
        Raises UnknownVerdict for a value without a meaning.
        """
        preference = self._preference(record)
        if preference is None and self.decisive:
            raise BadRecord("missing_key", f"{' and '.join(self.decisive)!r} has no value")
        margin = _number(record, self.margin, 0.0)
        weight = _number(record, self.weight, 1.0)
        found = []
        for each in comparisons:
            p = each.preference if preference is None else round(preference, DECIMALS)
            j, k = (each.k, each.j) if p < TIE else (each.j, each.k)
            found.append(Comparison(j, k, max(p, 1 - p), weight, margin))
            if margin and found[-1].preference < 1:
                raise BadRecord(
                    "unsure_margin",
                    f"{self.margin!r} is {margin:g}, but no answer is certainly better; "
                    "expected a margin of 0, or a preference of 0 or 1",
                )
        return found

    def _preference(self, record: JsonRecord) -> float | None:
        share = self._share(record) if self.votes else None
        if share is not None:
            return share
        if self.preference is None or is_absent(value_at(record, self.preference)):
            return None
        return _number(record, self.preference, TIE, 1.0)

    def _share(self, record: JsonRecord) -> float | None:
        """The share of the votes for the first answer. A tied vote counts half for each answer."""
        given = [value_at(record, path) for path in self.votes]
        found = _from_json(given[0]) if len(given) == 1 else given
        if is_absent(found) or found == [None, None]:
            return None
        counts = self._counts(found) if isinstance(found, list) else None
        if counts is None or not sum(counts):
            expected = f"a list of votes, {self.meaning.description}" if self.meaning else COUNTS
            raise UnknownVerdict(
                f"{' and '.join(self.votes)} is {_shown(found)}, expected {expected}"
                f"{'' if len(given) > 1 else unless_other(self.votes[0])}"
            )
        first, second, equal = counts
        return (first + equal / 2) / (first + second + equal)

    def _counts(self, votes: list[Any]) -> tuple[float, float, float] | None:
        """The votes for the first answer, for the second and for a tie; None if unknown."""
        if self.meaning:
            signs = [self.meaning.sign(vote) for vote in votes]
            if None in signs:
                return None
            return signs.count(1), signs.count(-1), signs.count(0)
        numbers = [normalized(vote) for vote in votes]
        if len(numbers) != 2 or not all(_is_count(number) for number in numbers):
            return None
        return numbers[0], numbers[1], 0


UNGRADED = Grades()
COUNTS = "two whole numbers, the votes for each answer, not both 0"
# Losses are sums in fp32 of products of a weight and a margin, divided by the sum of the weights.
# With numbers above MOST, they may be infinite there, and so may the inverse of a sum of numbers
# below LEAST.
MOST, LEAST = 1e15, 1e-30
# What is expected of a number up to a limit.
EXPECTED = {
    1.0: "a number from 0 to 1, the probability that the first answer is preferred",
    MOST: "a number from 0 to 1e15",
}


def _is_count(number: Any) -> bool:
    return isinstance(number, int | float) and number >= 0 and number % 1 == 0


def _number(record: JsonRecord, path: str | None, default: float, most: float = MOST) -> float:
    """The number at a path, or the default if there is none. Less than LEAST counts as 0.

    Raises UnknownVerdict for any other value than a number from 0 to `most`.
    """
    value = value_at(record, path) if path else None
    if is_absent(value):
        return default
    number = normalized(value)
    if not isinstance(number, int | float) or not 0 <= number <= most:
        raise UnknownVerdict(
            f"{path} is {_shown(value)}, expected {EXPECTED[most]}{unless_other(path)}"
        )
    return number if number >= LEAST else 0.0


def unless_other(key: str | None) -> str:
    """The end of a message about a column that was recognized by its name."""
    return f" (if it means something else, write {key}: null in dataset.yaml)"


def _from_json(value: Any) -> Any:
    """The value of a text that is JSON, as in a cell of a table; any other value as it is."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _shown(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=repr)
    return shown if len(shown) <= 40 else f"{shown[:40]}…"
