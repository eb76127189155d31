"""A form: what the columns of a file mean, and how its records are read.

Whatever the form, a record becomes a Raw record for `records.check`: the prompt (a text, a list of
messages, or none), the answers (texts or lists of messages), their comparisons, and all other
columns. `reward.data.recognition` finds the form of a file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from reward.data.answers import CANONICAL, UNGRADED, Answers, Grades, unless_other
from reward.data.dialogue import JsonMessage, as_messages, message, messages, spelling
from reward.data.records import (
    FIELDS,
    MEDIA,
    RENDERED,
    ROLES,
    TOOLS,
    BadRecord,
    Raw,
    by_turns,
    raw_pair,
    require_all_read,
)
from reward.data.transcripts import has_turns, marked_turns, repeats, shared_start, turns
from reward.data.values import JsonRecord, column_of, is_absent, is_blank, value_at

# Names of a prompt column that holds texts, messages, or either.
TEXTS = ("question", "instruction", "query", "post")
CONVERSATIONS = ("messages", "conversations", "conversation", "context", "dialogue")
PROMPTS = ("prompt", *TEXTS, *CONVERSATIONS, "history", "input")
# Columns that may repeat the chosen conversation.
REPEATING = frozenset({"messages", "conversations", "conversation"})
# summarize_from_feedback: the path to a post, and to an article in records without one.
POST, ARTICLE = "info.post", "info.article"


# --- the conversation before the answers -----------------------------------------------------


@dataclass(frozen=True)
class Context:
    """The paths of the columns that come before the answers, all of them optional.

    A system message and earlier turns may be in one of several columns. `rivals` are other columns
    that could be the prompt. A record in which one of them has a value of its own could be read in
    two ways.
    """

    prompt: str | None = None
    input: str | None = None
    system: tuple[str, ...] = ()
    history: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        named = (self.prompt, self.input, *self.system, *self.history)
        return tuple(path for path in named if path)

    @property
    def tools(self) -> str:
        """The path to the tools that may be beside the messages."""
        column, _, key = (self.prompt or "").partition(".")
        return f"{column}.{TOOLS}" if key == "messages" else TOOLS

    def prompt_of(self, record: JsonRecord) -> Any:
        """The prompt of a record: a text, a list of messages, or None. Raises BadRecord."""
        prompt = value_or_article(record, self.prompt) if self.prompt else None
        if spelling(prompt):
            prompt = [prompt]
        if isinstance(prompt, list):
            prompt = messages(self.prompt or "", prompt)
        return self._with_input(record, prompt)

    def before(self, record: JsonRecord) -> list[Any]:
        """The system message and the earlier turns, as messages. Raises BadRecord."""
        found = []
        for name, system in _only(record, self.system):
            if not isinstance(system, str):
                raise BadRecord("wrong_type", f"{name!r} is not a string{unless_other('system')}")
            found.append({"role": "system", "content": system})
        for name, history in _only(record, self.history):
            found += _turns(name, history)
        return found

    def _with_input(self, record: JsonRecord, prompt: Any) -> Any:
        more = value_at(record, self.input) if self.input else None
        if is_blank(more):
            return prompt
        if is_absent(prompt) or more == prompt:
            return more
        if not isinstance(more, str) or not isinstance(prompt, str):
            raise BadRecord(
                "wrong_type", f"{self.input!r} and {self.prompt!r} are not both strings"
            )
        rest = prompt.removesuffix(more)
        return prompt if rest != prompt and rest.endswith("\n") else f"{prompt}\n{more}"


def _only(record: JsonRecord, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    """The name and value of the only one of these columns that has a value, if one has.

    Raises BadRecord for several values.
    """
    found = [(name, value) for name in names if not is_blank(value := value_at(record, name))]
    if any(value != found[0][1] for _, value in found):
        both = " and ".join(name for name, _ in found)
        raise BadRecord("several_kinds", f"{both} differ; name one in dataset.yaml")
    return found[:1]


def _turns(name: str, history: Any) -> list[JsonMessage]:
    """Earlier turns as messages, from messages or from lists of a question and its answer."""
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
            return messages(name, history)
    raise BadRecord(
        "wrong_type",
        f"{name!r} is not a list of [question, answer] lists or of messages"
        f"{unless_other('history')}",
    )


def value_or_article(record: JsonRecord, path: str) -> Any:
    """The value at a path; for a post, that of the article in a record without a post."""
    found = value_at(record, path)
    return value_at(record, ARTICLE) if path == POST and is_absent(found) else found


# --- a form ----------------------------------------------------------------------------------

# Where the prompt is if the answers contain it: in their turns, in the words with which all of them
# begin, or in its own column, which they repeat.
Whole = Literal["", "turns", "words", "repeated"]
WHOLES: dict[Whole, str] = {
    "": "",
    "turns": " in Human: and Assistant: turns",
    "words": " that begin with their prompt",
    "repeated": " that repeat the prompt",
}


@dataclass(frozen=True)
class Form:
    """The meaning of a file's columns."""

    context: Context
    answers: Answers
    grades: Grades = UNGRADED
    whole: Whole = ""
    description: str = ""

    @cached_property
    def used(self) -> set[str]:
        """The columns that the form reads.

        A verdict is among them. It is not kept as a column, because it means nothing without the
        order of the answers in the file.
        """
        answers = (*self.answers.columns, *self.answers.verdicts)
        paths = (*self.context.columns, *answers, *self.grades.columns)
        return {*paths, *map(column_of, paths)}

    @cached_property
    def looked_at(self) -> set[str]:
        """The columns that need a conversion or a check if they have a value."""
        checked = {*MEDIA, *RENDERED, *self.context.rivals, TOOLS}
        return (self.used | checked) - {*FIELDS}

    @cached_property
    def is_canonical(self) -> bool:
        """Whether the form is prompt, chosen and rejected without any conversion."""
        named = self.context.prompt == "prompt" and self.answers == CANONICAL
        return named and not self.whole

    def read(self, record: Any) -> Raw:
        """A record with its prompt, answers and comparisons, for `records.check`.

        Raises BadRecord for a record that cannot be used, UnknownVerdict for an unknown verdict.
        """
        if not isinstance(record, dict):
            return raw_pair(record)
        if self.is_canonical and _is_canonical(record, self.looked_at):
            return raw_pair(record)
        require_all_read(record, self.used)
        self._refuse_rivals(record)
        before, prompt = self.context.before(record), self.context.prompt_of(record)
        found, names, comparisons = self.answers.compared(record)
        if len(found) > 2 and isinstance(prompt, list) and not all(map(spelling, prompt)):
            raise BadRecord("wrong_type", f"{self.context.prompt!r} is not a list of messages")
        if self.grades.columns:
            comparisons = self.grades.graded(record, comparisons)
        kept = {name: value for name, value in record.items() if name not in self.used}
        tools = value_at(record, self.context.tools)
        if is_absent(tools):
            tools = record.get(TOOLS)
        if TOOLS in kept or not is_absent(tools):
            kept[TOOLS] = tools
        prompt, answers = self._conversation(before, prompt, found, names)
        return Raw(prompt, answers, names, comparisons, kept)

    def _refuse_rivals(self, record: JsonRecord) -> None:
        for name in self.context.rivals:
            value = record.get(name)
            if is_absent(value) or any(value == record.get(column) for column in self.used):
                continue
            own = self.context.prompt or "a part of the answers"
            raise BadRecord(
                "several_kinds",
                f"{own} and {name} could both be the prompt; name one in dataset.yaml",
            )

    def _conversation(
        self, before: list[Any], prompt: Any, found: list[Any], names: Sequence[str]
    ) -> tuple[Any, list[Any]]:
        """The prompt and the answers with role and content, after the earlier messages."""
        answers = [_answer(*each) for each in zip(names, found, strict=True)]
        whole = "repeated" if self.whole == "words" and not is_blank(prompt) else self.whole
        match whole:
            case "turns":
                answers = by_turns(answers, names)
                _require_within(prompt, answers[0])
                prompt = None
            case "words":
                prompt, answers = _by_words(answers)
            case "repeated":
                answers = _without_prompt(prompt, answers, names)
        if isinstance(prompt, str) and whole != "words" and not self.is_canonical:
            prompt, answers = _in_turns(prompt, answers)
        if isinstance(prompt, list) and _ends_with_one(prompt, answers):
            prompt = prompt[:-1]
        if before:
            answers = [_after(before, prompt, answer) for answer in answers]
            if prompt is not None:
                prompt = _joined(before, as_messages("prompt", prompt, "user"))
        return prompt, answers


def _is_canonical(record: JsonRecord, looked_at: set[str]) -> bool:
    """Whether a record needs no conversion, or lacks an answer, which the check then reports.

    The columns `looked_at` may be null, or repeat the chosen answer, as `messages` of UltraFeedback
    does. An empty text in one of them would be kept as an extra column.
    """
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if is_absent(chosen) or is_absent(rejected):
        return True
    prompt = record.get("prompt")
    if isinstance(prompt, list) and prompt and _has_role(prompt[-1], "assistant"):
        return False
    for name in looked_at.intersection(record):
        value = record[name]
        if value == "" or not (is_absent(value) or (name in REPEATING and value == chosen)):
            return False
    for value in (prompt, chosen, rejected):
        if type(value) is not str and value is not None and not _are_plain(value):
            return False
    return type(chosen) is type(rejected)


def _are_plain(value: Any) -> bool:
    """Whether a value is a list of messages with the keys role and content, and with text only."""
    if type(value) is not list:
        return False
    for item in value:
        if type(item) is not dict or type(item.get("content")) is not str:
            return False
        if item.get("role") not in ROLES:
            return False
    return True


def _answer(key: str, value: Any) -> Any:
    """An answer: a text, or messages with role and content."""
    if isinstance(value, dict):
        return [message(key, value)]
    return messages(key, value) if isinstance(value, list) else value


def _joined(before: list[Any], prompt: list[Any]) -> list[Any]:
    """The earlier messages, then those of the prompt. What is in both appears once.

    That may be the system message, all earlier messages, and the user's last message.
    """
    systems = [[each for each in part if _has_role(each, "system")] for part in (before, prompt)]
    if all(systems) and systems[0][0].get("content") != systems[1][0].get("content"):
        raise BadRecord("prompt_differs", "the system message differs from the one in the prompt")
    if all(systems) or any(_has_role(each, "system") for each in prompt[:1]):
        others = [each for each in before if not _has_role(each, "system")]
        return [*prompt[:1], *_joined(others, prompt[1:])]
    if prompt[: len(before)] == before:
        return prompt
    if before[-1:] == prompt[:1] and _has_role(before[-1], "user"):
        before = before[:-1]
    return [*before, *prompt]


def _ends_with_one(prompt: list[Any], answers: list[Any]) -> bool:
    """Whether the last message of a prompt is one of the answers."""
    return any(
        _has_role(last, "assistant") and (last.get("content") in answers or [last] in answers)
        for last in prompt[-1:]
    )


def _has_role(item: Any, role: str) -> bool:
    return isinstance(item, dict) and item.get("role") == role


def _after(before: list[Any], prompt: Any, answer: Any) -> Any:
    """An answer. If it is a whole conversation, it gets the earlier messages too."""
    whole = isinstance(answer, list) and answer and not _has_role(answer[0], "assistant")
    if whole:
        return _joined(before, answer)
    if isinstance(answer, str) and prompt is None:
        raise BadRecord("missing_key", "'prompt' is missing")
    return answer


# --- texts that are whole conversations ------------------------------------------------------


def awaits_assistant(text: str) -> bool:
    """Whether a prompt is a conversation as in HH that ends with the assistant's turn."""
    return has_turns(text) and text.rstrip().endswith("\n\nAssistant:")


def _in_turns(prompt: str, answers: list[Any]) -> tuple[Any, list[Any]]:
    """A prompt with turns as messages, and the answers without it.

    Answers that are conversations may begin with the prompt as one message. Then nothing changes.
    """
    awaits = awaits_assistant(prompt)
    found = turns(prompt) if awaits else marked_turns(prompt)
    whole = {"role": "user", "content": prompt}
    if not found or any(isinstance(answer, list) and whole in answer for answer in answers):
        return prompt, answers
    if all(repeats(prompt, answer) for answer in answers):
        answers = [answer[len(prompt) :] for answer in answers]
    if awaits:
        answers = [answer.strip() if isinstance(answer, str) else answer for answer in answers]
    return found, answers


def _require_within(prompt: Any, answer: list[JsonMessage]) -> None:
    """Raises BadRecord for a prompt that is not in the messages of an answer."""
    if is_blank(prompt):
        return
    own = prompt if isinstance(prompt, list) else turns(prompt)
    if not all(each in answer for each in own or [{"role": "user", "content": prompt.strip()}]):
        raise BadRecord("prompt_differs", "the turns of the answers lack the prompt")


def _by_words(answers: list[Any]) -> tuple[str, list[Any]]:
    first, *others = answers
    cut = 0
    if all(isinstance(text, str) for text in answers):
        cut = min(shared_start(first, other) for other in others)
    if not cut:
        raise BadRecord("missing_key", "'prompt' is missing, and the answers begin differently")
    return first[:cut], [text[cut:] for text in answers]


def _without_prompt(prompt: Any, answers: list[Any], names: Sequence[str]) -> list[Any]:
    for key, text in zip(names, answers, strict=True):
        if not repeats(prompt, text):
            raise BadRecord("prompt_differs", f"{key!r} does not begin with the prompt")
    return [text[len(prompt) :] for text in answers]
