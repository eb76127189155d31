"""A form: what the columns of a file mean, and how a record of it becomes pairs.

Whatever the form, its pairs are plain dicts as `records.check` takes them: `prompt` (a text, a list
of messages, or none), `chosen`, `rejected` (texts or lists of messages), `tools`, and the columns
that are neither prompt nor answer. `reward.data.recognition` finds the form of a file.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any, Literal, NamedTuple, Protocol

from reward.data.dialogue import (
    Message,
    has_turns,
    message,
    messages,
    shared_start,
    spelling,
    turns,
)
from reward.data.records import FIELDS, ROLES, BadRecord, names_of

Record = dict[str, Any]
# Columns that may hold the chosen conversation once more.
REPEATING = frozenset({"messages", "conversations", "conversation"})
# Columns of which the model would see nothing: a record with a value there cannot be used.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class Unmeant(Exception):
    """A verdict with a value to which its form gives no meaning; the sentence names both."""


class Pairs(NamedTuple):
    """The pairs of a record, and how many of its comparisons are ties."""

    records: list[Any]
    ties: int


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
    def said(self) -> str:
        """The form in the words of its columns."""

    def compared(self, record: Record) -> Compared:
        """Raises BadRecord for what is missing, Unmeant for a verdict without a meaning."""


# --- values of a record ----------------------------------------------------------------------


def is_absent(value: Any) -> bool:
    """Null and what is empty count as if the column were not there."""
    return not value and (value is None or isinstance(value, str | list | dict))


def value_at(record: Record, path: str) -> Any:
    """The value of a column, or of a path: `info.post`, `texts[0]`, `answers[].text` (a list).

    None where there is nothing.
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


def top(path: str) -> str:
    """The column of a path."""
    return re.split(r"[.\[]", path, maxsplit=1)[0]


def needed(record: Record, path: str) -> Any:
    """The value at a path. Raises BadRecord where there is none."""
    value = value_at(record, path)
    if value is None:
        raise BadRecord("missing_key", f"{path!r} is missing, found {names_of(record)}")
    return value


# --- answers ---------------------------------------------------------------------------------


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
    def said(self) -> str:
        return f"{self.chosen} and {self.rejected}"

    def compared(self, record: Record) -> Compared:
        both = [answers_in(needed(record, path)) for path in self.columns]
        return Compared(list(product(*both)), 0)


@dataclass(frozen=True)
class Continued:
    """A conversation whose last message is the chosen answer, and a column of rejected ones."""

    conversation: str
    rejected: str

    @property
    def columns(self) -> tuple[str, ...]:
        return self.conversation, self.rejected

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


def plain(value: Any) -> Any:
    """A verdict as it is compared: a number, or a text; `1`, `1.0` and `"1"` are the same."""
    if not isinstance(value, int | float | str):
        return repr(value).lower()
    text = str(value).strip()
    try:
        return float(text)
    except ValueError:
        return text.lower() if text.lower() in ("true", "false") else text


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


# --- the conversation before the answers -----------------------------------------------------


def as_messages(key: str, value: Any, role: str) -> list[Any]:
    """A text as one message of `role`, a message as a list of one, messages as they are."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return messages(key, value) if isinstance(value, list) else [message(key, value)]


@dataclass(frozen=True)
class Context:
    """The columns before the answers, by their paths; none of them needs to be there.

    `rivals` are columns that may hold nothing but what is known already: a record in which one
    does could be read in two ways.
    """

    prompt: str | None = None
    input: str | None = None
    system: str | None = None
    history: str | None = None
    rivals: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        named = (self.prompt, self.input, self.system, self.history)
        return tuple(path for path in named if path)

    def prompt_of(self, record: Record) -> Any:
        """The prompt of a record: a text, or a list of messages where there is more than one."""
        for name in MEDIA:
            if not is_absent(record.get(name)):
                raise BadRecord("not_text", f"{name!r} has a value, expected texts only")
        asked = value_at(record, self.prompt) if self.prompt else None
        if spelling(asked):
            asked = [asked]
        if isinstance(asked, list):
            asked = messages(self.prompt or "", asked)
        return self._with_input(record, asked)

    def before(self, record: Record) -> list[Any]:
        """The messages of the system and of earlier turns."""
        found = []
        system = value_at(record, self.system) if self.system else None
        if not is_absent(system):
            if not isinstance(system, str):
                raise BadRecord("wrong_type", f"{self.system!r} is not a text")
            found.append({"role": "system", "content": system})
        history = value_at(record, self.history) if self.history else None
        return found if is_absent(history) else found + self._turns(history)

    def _with_input(self, record: Record, asked: Any) -> Any:
        more = value_at(record, self.input) if self.input else None
        if is_absent(more) or (isinstance(more, str) and not more.strip()):
            return asked
        if is_absent(asked):
            return more
        if not isinstance(more, str) or not isinstance(asked, str):
            raise BadRecord("wrong_type", f"{self.input!r} and {self.prompt!r} are not both texts")
        return f"{asked}\n{more}"

    def _turns(self, history: Any) -> list[Message]:
        """Earlier turns: questions with their answers in lists of two, or messages."""
        if isinstance(history, list):
            if all(isinstance(turn, list) for turn in history):
                if all([type(text) for text in turn] == [str, str] for turn in history):
                    speakers = ("user", "assistant")
                    return [
                        {"role": role, "content": text}
                        for turn in history
                        for role, text in zip(speakers, turn, strict=True)
                    ]
            elif all(isinstance(turn, dict) for turn in history):
                return messages(self.history or "", history)
        raise BadRecord(
            "wrong_type", f"{self.history!r} is not a list of questions with their answers"
        )


# --- a form ----------------------------------------------------------------------------------

# How texts without a prompt hold it, or that they repeat the prompt that there is.
Whole = Literal["", "turns", "words", "repeated"]
WHOLES: dict[Whole, str] = {
    "": "",
    "turns": " in turns of Human: and Assistant:",
    "words": " that begin with their prompt",
    "repeated": " that repeat the prompt",
}


@dataclass(frozen=True)
class Form:
    """What a file's columns mean."""

    context: Context
    answers: Answers
    whole: Whole = ""
    said: str = ""
    # Derived: the columns that are prompt or answers, those that may not be passed over, and
    # whether they are called prompt, chosen and rejected, and no text is whole.
    used: frozenset[str] = field(init=False)
    looked_at: frozenset[str] = field(init=False)
    is_canonical: bool = field(init=False)

    def __post_init__(self) -> None:
        used = {top(path) for path in (*self.context.columns, *self.answers.columns)}
        if isinstance(self.answers, Judged):
            # Once read it says nothing more: which answer came first in the file is gone.
            used.add(top(self.answers.verdict))
        looked_at = (used | {*MEDIA, *self.context.rivals, "tools"}) - set(FIELDS)
        named = self.context.prompt == "prompt" and self.answers == CANONICAL
        object.__setattr__(self, "used", frozenset(used))
        object.__setattr__(self, "looked_at", frozenset(looked_at))
        object.__setattr__(self, "is_canonical", named and not self.whole)

    def pairs(self, record: Any) -> Pairs:
        """The pairs of a record, as `records.check` takes them.

        Raises BadRecord for a record that cannot be used, Unmeant where its verdict means nothing.
        """
        if not isinstance(record, dict):
            return Pairs([record], 0)
        if self.is_canonical and _is_canonical(record, self.looked_at):
            return Pairs([record], 0)
        self._refuse_rivals(record)
        before, prompt = self.context.before(record), self.context.prompt_of(record)
        compared = self.answers.compared(record)
        if len(compared.pairs) > 1 and isinstance(prompt, list) and not all(map(spelling, prompt)):
            raise BadRecord("wrong_type", f"{self.context.prompt!r} is not a list of messages")
        kept = {name: value for name, value in record.items() if name not in self.used}
        if "tools" in kept:
            kept["tools"] = _tools(kept["tools"])
        pairs = [kept | self._pair(before, prompt, *both) for both in compared.pairs]
        return Pairs(pairs, compared.ties)

    def _refuse_rivals(self, record: Record) -> None:
        for name in self.context.rivals:
            value = record.get(name)
            if is_absent(value) or any(value == record.get(column) for column in self.used):
                continue
            names = [*filter(None, [self.context.prompt]), name]
            raise BadRecord("several_kinds", f"has a prompt in each of {' and '.join(names)}")

    def _pair(self, before: list[Any], prompt: Any, chosen: Any, rejected: Any) -> Record:
        """One canonical record."""
        names = self.answers.columns[:2] if len(self.answers.columns) > 1 else ("answer",) * 2
        both = [_answer(name, side) for name, side in zip(names, (chosen, rejected), strict=True)]
        prompt, chosen, rejected = WHOLE_TEXTS[self.whole](prompt, *both)
        if isinstance(prompt, str) and self.whole != "words" and has_turns_at_its_end(prompt):
            prompt = prompt if self.is_canonical else turns(prompt)
        if before:
            chosen, rejected = (_behind(before, prompt, side) for side in (chosen, rejected))
            if prompt is not None:
                prompt = _joined(before, as_messages("prompt", prompt, "user"))
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


CANONICAL = Preferred("chosen", "rejected")


def _is_canonical(record: Record, looked_at: frozenset[str]) -> bool:
    """Whether a record is one already, or lacks an answer: the check needs it as it is.

    Columns that are looked at may be empty, or repeat an answer, as `messages` of UltraFeedback.
    """
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if is_absent(chosen) or is_absent(rejected):
        return True
    for name in looked_at.intersection(record):
        value = record[name]
        if not is_absent(value) and not (name in REPEATING and value == chosen):
            return False
    for value in (record.get("prompt"), chosen, rejected):
        if type(value) is not str and value is not None and not _are_plain(value):
            return False
    return type(chosen) is type(rejected)


def _are_plain(value: Any) -> bool:
    """Whether these are messages that are spelled with role and content, and texts alone."""
    if type(value) is not list:
        return False
    for item in value:
        if type(item) is not dict or type(item.get("content")) is not str:
            return False
        if item.get("role") not in ROLES:
            return False
    return True


def _answer(key: str, value: Any) -> Any:
    """An answer: a text, or messages by role and content."""
    if isinstance(value, dict):
        return [message(key, value)]
    return messages(key, value) if isinstance(value, list) else value


def _tools(value: Any) -> Any:
    """The tools of a record, which some files hold as JSON in a text."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except ValueError:
        raise BadRecord("wrong_type", "'tools' is a text that is not JSON") from None


def _joined(before: list[Any], asked: list[Any]) -> list[Any]:
    """Earlier messages and the prompt's own; a system message that is in both appears once."""
    systems = [[each for each in part if _speaks(each, "system")] for part in (before, asked)]
    if all(systems):
        if systems[0][0]["content"] != systems[1][0]["content"]:
            raise BadRecord("prompt_differs", "'system' differs from the prompt's system message")
        before = [each for each in before if not _speaks(each, "system")]
        return [*asked[:1], *before, *asked[1:]]
    return [*before, *asked]


def _speaks(item: Any, role: str) -> bool:
    return isinstance(item, dict) and item.get("role") == role


def _behind(before: list[Any], prompt: Any, answer: Any) -> Any:
    """An answer that is a whole conversation begins as the prompt does, with what was before."""
    whole = isinstance(answer, list) and answer and not _speaks(answer[0], "assistant")
    if whole:
        return _joined(before, answer)
    if isinstance(answer, str) and prompt is None:
        raise BadRecord("missing_key", "'prompt' is missing")
    return answer


# --- texts that are whole conversations ------------------------------------------------------


def has_turns_at_its_end(text: str) -> bool:
    """Whether a prompt is a conversation in the form of HH that awaits the assistant."""
    return has_turns(text) and text.rstrip().endswith("\n\nAssistant:")


def _as_is(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    return prompt, chosen, rejected


def _by_turns(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    del prompt
    for key, text in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(text, str) or not has_turns(text):
            raise BadRecord("missing_key", f"{key!r} has no turns of Human: and Assistant:")
    return None, turns(chosen), turns(rejected)


def _by_words(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    del prompt
    cut = 0
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = shared_start(chosen, rejected)
    if not cut:
        raise BadRecord("missing_key", "'prompt' is missing, and the answers begin differently")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _without_prompt(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    for key, text in (("chosen", chosen), ("rejected", rejected)):
        if not repeats(prompt, text):
            raise BadRecord("prompt_differs", f"{key!r} does not begin with the prompt")
    if has_turns_at_its_end(prompt):
        return turns(prompt), chosen[len(prompt) :].strip(), rejected[len(prompt) :].strip()
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def repeats(prompt: Any, answer: Any) -> bool:
    """Whether an answer is a text that begins with its prompt."""
    return isinstance(prompt, str) and isinstance(answer, str) and answer.startswith(prompt)


WHOLE_TEXTS: dict[Whole, Callable[[Any, Any, Any], tuple[Any, Any, Any]]] = {
    "": _as_is,
    "turns": _by_turns,
    "words": _by_words,
    "repeated": _without_prompt,
}
