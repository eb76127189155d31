"""Where the answers of a form are, and how it says which of them is better.

A published form names columns; what its verdict means is part of it. Each gives the comparisons of
a record: chosen and rejected, and how many of them are ties.
"""

import json
import math
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal, NamedTuple, Protocol

from reward.data.dialogue import message, messages
from reward.data.records import BadRecord
from reward.data.values import Record, needed, plain, top


class Unmeant(Exception):
    """A verdict with a value to which its form gives no meaning; the sentence names both."""


class Compared(NamedTuple):
    """Chosen and rejected of each comparison of a record, and how many comparisons are ties."""

    pairs: list[tuple[Any, Any]]
    ties: int


class Answers(Protocol):
    """Where the answers of a form are and how it says which is better."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The paths of the texts."""

    @property
    def verdicts(self) -> tuple[str, ...]:
        """The paths of what says which answer is better; none where the columns' names do."""

    @property
    def said(self) -> str:
        """The form in the words of its columns."""

    def compared(self, record: Record) -> Compared:
        """Raises BadRecord for what is missing, Unmeant for a verdict without a meaning."""


def answers_in(value: Any) -> list[Any]:
    """The answers that a column holds: a text, a message or messages are one, a list is several."""
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) for item in value):
            return value
    return [value]


@dataclass(frozen=True)
class Preferred:
    """Columns with the chosen answers and with the rejected ones."""

    chosen: str
    rejected: str

    @property
    def columns(self) -> tuple[str, ...]:
        return self.chosen, self.rejected

    @property
    def verdicts(self) -> tuple[str, ...]:
        return ()

    @property
    def said(self) -> str:
        return f"{self.chosen} and {self.rejected}"

    def compared(self, record: Record) -> Compared:
        both = [answers_in(needed(record, path)) for path in self.columns]
        return Compared(list(product(*both)), 0)


CANONICAL = Preferred("chosen", "rejected")


@dataclass(frozen=True)
class Continued:
    """A conversation whose last message is the chosen answer, and a column of rejected ones."""

    conversation: str
    rejected: str

    @property
    def columns(self) -> tuple[str, ...]:
        return self.conversation, self.rejected

    @property
    def verdicts(self) -> tuple[str, ...]:
        return ()

    @property
    def said(self) -> str:
        return f"{self.conversation} with {self.rejected}"

    def compared(self, record: Record) -> Compared:
        spoken, rejected = (needed(record, path) for path in self.columns)
        if not isinstance(spoken, list):
            raise BadRecord("wrong_type", f"{self.conversation!r} is not a list of messages")
        spoken = messages(self.conversation, spoken)
        if not spoken or not isinstance(spoken[-1], dict) or spoken[-1]["role"] != "assistant":
            raise BadRecord("empty", f"{self.conversation!r} does not end with an answer")
        others = [
            spoken[:-1] + as_messages(self.rejected, answer, "assistant")
            for answer in answers_in(rejected)
        ]
        return Compared([(spoken, other) for other in others], 0)


@dataclass(frozen=True)
class Meaning:
    """Which values of a verdict prefer the first answer, which the second, which neither."""

    first: tuple[Any, ...]
    second: tuple[Any, ...]
    tie: tuple[Any, ...] = ()

    @property
    def said(self) -> str:
        parts = [(self.first, "the first answer"), (self.second, "the second")]
        parts += [(self.tie, "a tie")] if self.tie else []
        return ", ".join(f"{_listed(values)} for {meant}" for values, meant in parts)

    def sign(self, value: Any) -> int | None:
        """1 if the first answer is better, -1 if the second is, 0 for a tie, None if unknown."""
        found = plain(value)
        for sign, values in ((1, self.first), (-1, self.second), (0, self.tie)):
            if found in [plain(meant) for meant in values]:
                return sign
        return None


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(str(value) for value in values)


@dataclass(frozen=True)
class Judged:
    """Two answers and a verdict."""

    first: str
    second: str
    verdict: str
    meaning: Meaning

    @property
    def columns(self) -> tuple[str, ...]:
        return self.first, self.second

    @property
    def verdicts(self) -> tuple[str, ...]:
        return (self.verdict,)

    @property
    def said(self) -> str:
        tops = dict.fromkeys(top(path) for path in self.columns)
        return f"{' and '.join(tops)} with {self.verdict} ({self.meaning.said})"

    def compared(self, record: Record) -> Compared:
        one, other, verdict = (needed(record, path) for path in (*self.columns, self.verdict))
        sign = self.meaning.sign(verdict)
        if sign is None:
            raise Unmeant(f"{self.verdict} is {_shown(verdict)}, expected {self.meaning.said}")
        if sign == 0:
            return Compared([], 1)
        return Compared([(one, other) if sign > 0 else (other, one)], 0)


Order = Literal["ranks", "scores", "best_first"]
ORDERS: dict[Order, str] = {
    "ranks": "whole numbers from 1, where 1 is the best and equal numbers tie",
    "scores": "numbers, where more is better and equal numbers tie",
    "best_first": "the best answer first",
}


@dataclass(frozen=True)
class Listed:
    """Any number of answers with a rank or score each, or in their order.

    `answers` and `worths` are one path to a list each, or a path for each answer.
    """

    answers: tuple[str, ...]
    order: Order
    worths: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return self.answers

    @property
    def verdicts(self) -> tuple[str, ...]:
        return self.worths

    @property
    def said(self) -> str:
        found = " and ".join(self.answers)
        if self.order == "best_first":
            return f"{found} in order of preference"
        return f"{found} with {' and '.join(self.worths)} ({ORDERS[self.order]})"

    def compared(self, record: Record) -> Compared:
        """Every two answers, the better one chosen."""
        found = self._values(record, self.answers)
        if self.order == "best_first":
            worths = [-float(place) for place in range(len(found))]
        else:
            worths = [self._worth(value) for value in self._values(record, self.worths)]
        if len(worths) != len(found):
            name, other = self.answers[0], self.worths[0]
            raise BadRecord(
                "wrong_type", f"{name!r} has {len(found)} values and {other!r} has {len(worths)}"
            )
        pairs, ties = [], 0
        for (one, left), (other, right) in combinations(zip(found, worths, strict=True), 2):
            if left == right:
                ties += 1
            else:
                pairs.append((one, other) if left > right else (other, one))
        return Compared(pairs, ties)

    def _values(self, record: Record, paths: tuple[str, ...]) -> list[Any]:
        if len(paths) > 1:
            return [needed(record, path) for path in paths]
        found = needed(record, paths[0])
        if not isinstance(found, list):
            raise BadRecord("wrong_type", f"{paths[0]!r} is not a list")
        for place, value in enumerate(found, start=1):
            if value is None:
                raise BadRecord("missing_key", f"{paths[0]!r} has nothing in place {place}")
        if len(found) < 2:
            raise BadRecord("empty", f"{paths[0]!r} holds {len(found)} value, expected two or more")
        return found

    def _worth(self, value: Any) -> float:
        number = plain(value)
        if isinstance(number, float) and math.isfinite(number):
            if self.order == "scores":
                return number
            if number >= 1 and number == int(number):
                return -number
        raise Unmeant(
            f"{self.worths[0]} has {_shown(value)}, expected {ORDERS[self.order]}",
        )


def _shown(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=repr)
    return shown if len(shown) <= 40 else f"{shown[:40]}…"


def as_messages(key: str, value: Any, role: str) -> list[Any]:
    """A text as one message of `role`, a message as a list of one, messages as they are."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return messages(key, value) if isinstance(value, list) else [message(key, value)]
