"""Suggest an entry of dataset.yaml for a file whose columns are not a known form."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward.data.answers import Answers, Judged, Listed
from reward.data.dialogue import are_messages, are_replies
from reward.data.forms import PROMPTS
from reward.data.reading import separator_of
from reward.data.records import in_words, shortened
from reward.data.values import Columns, are_labels, are_numbers, are_texts, columns_of
from reward.process import Fault

MAPPING = "dataset.yaml"
# Placeholders for what only the user knows.
COLUMN, VALUE, KEY = "COLUMN", "VALUE", "KEY"

Entry = dict[str, Any]
BETTER = ("chosen", "prefer", "better", "good", "accept", "positive", "win", "好", "优")
WORSE = ("reject", "worse", "bad", "negative", "lose", "loser", "差", "劣")
# A name such as non_preferred, less_preferred or unaccepted means the opposite of the word in it.
NEGATED = re.compile(rf"(non|not|un|dis|less|least)[^a-z]*({'|'.join(BETTER)})")
WRITTEN = ("answer", "response", "output", "completion", "summary", "reply", "回答", "答案")
ASKED = ("prompt", "question", "query", "instruction", "input", "ask", "user", "问", "题", "指令")
VERDICTS = ("prefer", "label", "winner", "better", "choice", "verdict", "vote", "best", "选", "胜")
RANKERS = ("rank", "score", "rating")
# The two characters in which the names of two answers differ.
TWINS = [{*both} for both in ("01", "12", "ab", "AB", "jk", "xy", "左右", "甲乙", "一二")]


@dataclass(frozen=True)
class Unrecognized:
    """A file of unknown form; `alone` if params.yaml names the file and not its folder."""

    path: Path
    alone: bool

    def fault(self, found: str, *entries: Entry) -> Fault:
        """A Fault that says what was found, and gives the entries that would decide."""
        folder = f"set preprocess.data to {self.path.parent} and " if self.alone else ""
        ways = " or ".join(flow(self.path.name, entry) for entry in entries)
        mapping = self.path.parent / MAPPING
        return Fault(f"{self.path}: {found}; {folder}write in {mapping}: {ways}")


def entry_of(answers: Answers) -> Entry:
    """The entry that declares these answers."""
    if isinstance(answers, Judged):
        meaning = answers.meaning
        entry: Entry = {"answers": [*answers.columns], "verdict": answers.verdict}
        entry |= {"first": [*meaning.first], "second": [*meaning.second]}
        return entry | ({"tie": [*meaning.tie]} if meaning.tie else {})
    if isinstance(answers, Listed):
        texts, ratings = (
            paths[0] if len(paths) == 1 else [*paths]
            for paths in (answers.answers, answers.ratings)
        )
        return {"answers": texts, answers.order: ratings}
    return dict(zip(("chosen", "rejected"), answers.columns, strict=True))


def flow(name: str, entry: Entry) -> str:
    """An entry of dataset.yaml on one line, which the user can copy."""
    parts = ", ".join(f"{key}: {_value(value)}" for key, value in entry.items())
    return f"{_scalar(name)}: {{{parts}}}"


def _value(value: Any) -> str:
    """A value of an entry. Names as long as texts are cut: the first row was not a header."""
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return _scalar(shortened(value) if isinstance(value, str) else value)


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        safe = re.fullmatch(r"[^\W\d]([\w.() /-]*[\w.()/-])?", value)
        word = value.lower() not in ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
        return value if safe and word else json.dumps(value, ensure_ascii=False)
    return json.dumps(value, default=str)


def unknown(columns: Columns, unread: Unrecognized) -> Fault:
    """The Fault to raise for columns that are not a known form."""
    entry, notes = _guess(columns)
    missing = [key for key, value in entry.items() if value in (COLUMN, VALUE) or key == KEY]
    verb = "is" if len(missing) == 1 else "are"
    problem = (
        f": {', '.join(missing)} {verb} missing"
        if missing
        else "; the entry that follows is a guess at what they mean, so check it"
    )
    names = in_words(columns)
    if separator_of(unread.path):
        names += " (the first row is read as the header)"
    subject = f"the columns {names} match" if len(columns) > 1 else f"the column {names} matches"
    found = f"{subject} no known format{problem}"
    return unread.fault("; ".join([found, *notes]), entry)


def _guess(columns: Columns) -> tuple[Entry, list[str]]:
    """The entry as far as the columns show it, and notes on what the user must fill in."""
    texts = [name for name, values in columns.items() if _can_be_text(values)]
    twins = _twins(texts)
    lists = [name for name, values in columns.items() if _can_be_answers(values)]
    if twins:
        return _guessed_verdict(columns, {"answers": [*twins]}, texts)
    if lists and not _like(texts, BETTER):
        # Answers are longer than the names of the models that wrote them.
        longest = max(lists, key=lambda name: len(json.dumps(columns[name], default=str)))
        return _guessed_order(columns, longest)
    worse = [name for name in texts if NEGATED.search(name.lower()) or _like([name], WORSE)]
    better = _like([name for name in texts if name not in worse], BETTER)
    entry = {"chosen": better or COLUMN, "rejected": worse[0] if worse else COLUMN}
    return guessed_prompt(columns, entry), []


def guessed_prompt(columns: Columns, entry: Entry) -> Entry:
    """The entry with its prompt: a column named like one, or the only text that is left."""
    used = set(json.dumps([*entry.values()], ensure_ascii=False).split('"'))
    left = [name for name, values in columns.items() if name not in used and _can_be_text(values)]
    known = [name for name in PROMPTS if name in left]
    prompt = known[0] if known else _like(left, ASKED) or (left[0] if len(left) == 1 else COLUMN)
    return {"prompt": prompt} | {key: value for key, value in entry.items() if key != "prompt"}


def _guessed_verdict(columns: Columns, entry: Entry, texts: list[str]) -> tuple[Entry, list[str]]:
    """The entry of two answers with the column that may say which one is better, and notes."""
    labels = [name for name in columns if name not in texts and are_labels(columns[name])]
    numbers = _twins([name for name in labels if are_numbers(columns[name])])
    verdict = _like(labels, VERDICTS) or (labels[0] if len(labels) == 1 else None)
    notes: list[str] = []
    if numbers and (verdict in numbers or not _like(labels, VERDICTS)):
        key, notes = _guessed_key(numbers[0], " and ".join(numbers))
        entry |= {key: [*numbers]}
    else:
        entry |= {"verdict": verdict or COLUMN, "first": VALUE, "second": VALUE}
    if "verdict" in entry and verdict:
        one, other = entry["answers"]
        values = ", ".join(sorted({_scalar(value) for value in columns[verdict]})[:6])
        meaning = f"first: the value that prefers {one}, second: the value that prefers {other}"
        notes = [f"{verdict} has {values} ({meaning})"]
    return guessed_prompt(columns, entry), notes


def _guessed_key(number: str, named: str) -> tuple[str, list[str]]:
    """The key for numbers, and notes if their name does not say whether 1 is the best."""
    for key, words in (("ranks", ("rank",)), ("scores", ("score", "rating", "reward"))):
        if any(word in number.lower() for word in words):
            return key, []
    return KEY, [f"{KEY} is ranks if 1 is the best value of {named}, or scores if more is better"]


def _guessed_order(columns: Columns, name: str) -> tuple[Entry, list[str]]:
    """The entry of a list of answers, and notes."""
    items = [item for value in columns[name] for item in value]
    entry: Entry = {"answers": name}
    tail = ""
    number = next((key for key in columns if _like([key], RANKERS)), None)
    inside = columns_of(items) if all(isinstance(item, dict) for item in items) else {}
    rated = next((f"{name}[].{key}" for key in inside if are_numbers(inside[key])), None)
    if rated or (inside and not are_replies(items)):
        text = next((key for key in inside if _can_be_text(inside[key])), COLUMN)
        entry, tail, number = {"answers": f"{name}[].{text}"}, f".{text}", rated
    if number:
        key, notes = _guessed_key(number, number)
        return guessed_prompt(columns, entry | {key: number}), notes
    verdict = _like([key for key in columns if are_labels(columns[key])], VERDICTS)
    if verdict and all(len(value) == 2 for value in columns[name]):
        both = [f"{name}[{place}]{tail}" for place in range(2)]
        return _guessed_verdict(columns, {"answers": both}, [])
    says = f"{verdict} cannot say" if verdict else "no column says"
    notes = [f"{says} which of {name} is better (VALUE: best_first if the best comes first)"]
    return guessed_prompt(columns, entry | {"order": VALUE}), notes


def _like(names: list[str], words: tuple[str, ...]) -> str | None:
    """The first column whose name contains one of the words."""
    return next((name for name in names if any(word in name.lower() for word in words)), None)


def _twins(names: list[str]) -> tuple[str, str] | None:
    """Two columns whose names differ only in a number or letter, as answer_a and answer_b do.

    Those that are named like answers come first, before comments on answers, for example.
    """
    names = sorted(names, key=lambda name: not _like([name], WRITTEN))
    for one in names:
        for other in names:
            if len(one) == len(other) and one < other:
                differ = [{a, b} for a, b in zip(one, other, strict=True) if a != b]
                if len(differ) == 1 and differ[0] in TWINS:
                    return one, other
    return None


def _can_be_text(values: list[Any]) -> bool:
    if all(are_messages(value) for value in values):
        return True
    return are_texts(values) and not are_labels(values)


def _can_be_answers(values: list[Any]) -> bool:
    """Whether these are lists of texts, of objects that are not messages, or of replies."""
    return all(
        isinstance(value, list)
        and all(isinstance(item, str | dict) for item in value)
        and not are_messages(value)
        for value in values
    ) or all(isinstance(value, list) and len(value) > 1 and are_replies(value) for value in values)
