"""The preference record: what it may contain, and the check that reports what is wrong with it.

A record has `chosen` and `rejected`, each a text or a list of {role, content} messages. It has a
`prompt`, which is a text or a list of messages, unless `chosen` and `rejected` are whole
conversations. Other forms have any number of answers and their comparisons. A message may also have
PARTS, and a record may have `tools`, a list of JSON schemas. Extra columns are kept if their value
is a string, a number or a boolean. A record that is only scored may have `answers`, any number of
them, or one `answer` instead.
"""

import hashlib
import json
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from json.encoder import encode_basestring
from typing import Any, NamedTuple

from reward.data.columns import RESERVED, TIE
from reward.data.transcripts import has_turns, repeats, turns
from reward.process import as_written

ROLES = ("system", "user", "assistant", "tool")
PAIR = ("chosen", "rejected")
SCORED = ("answer", "answers")
FIELDS = ("prompt", *PAIR)
# Decimals of a preference. Without rounding, votes of 0.7, 0.2 and 0.6 are not a tie in float64,
# and 0.50000001 is one only in float32, in which training computes.
DECIMALS = 6
# Answers may begin with a prompt of at most this many bytes by chance, such as a greeting.
GREETING = 15
# Keys that a message may have besides role and content, which chat templates render.
PARTS = ("reasoning_content", "tool_calls", "name", "tool_call_id")
# Keys that a message must not have, because no code here reads them.
UNREAD = (
    *("audio", "images", "videos"),
    *("function_call", "reasoning", "thinking", "thought", "tool_plan"),
)
# Columns that a text model cannot see.
MEDIA = {
    "pixel_values",
    *(
        f"{kind}{part}{plural}"
        for kind in ("image", "img", "video", "audio")
        for part in ("", "_path", "_file", "_url", "_base64")
        for plural in ("", "s")
    ),
}
# Columns besides messages and tools that chat templates may render, which no code here reads.
RENDERED = ("documents", "functions", "chat_template_kwargs")
TOOLS = "tools"
# The columns before the answers: their keys in dataset.yaml, and the names that are recognized.
BEFORE = {
    "input": ("input",),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history", "chat_history", "conversation_history"),
}
# Messages give at most this many names, and this many characters of each.
MOST_NAMES, LONGEST_NAME = 20, 80
# The types of JSON in words, and bytes, which Parquet has.
KINDS: dict[type, str] = {
    **{str: "a string", list: "a list", dict: "an object", bytes: "bytes"},
    **{bool: "a boolean", int: "a number", float: "a number", type(None): "null"},
}

# Role, content and, for a message with PARTS, their compact JSON. A prompt with tools begins with a
# message of the role TOOLS, so the tools go wherever the prompt goes.
Message = tuple[str, ...]
Messages = tuple[Message, ...]


class BadRecord(Exception):
    """A record that cannot be used. `reason` is a key for counting, the message is for people."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


class Comparison(NamedTuple):
    """Two answers of a record, by their indices j and k; j is the preferred one.

    `preference` is the probability that j is preferred, from 0.5, a tie, to 1. `weight` is how much
    the comparison counts, and `margin` by how much j is better, 0 unless j is certainly better.
    """

    j: int
    k: int
    preference: float = 1.0
    weight: float = 1.0
    margin: float = 0.0

    @property
    def grades(self) -> tuple[float, float, float]:
        """The values of the columns GRADES."""
        return self.preference, self.weight, self.margin


CERTAIN = Comparison(0, 1)


class Raw(NamedTuple):
    """An unchecked record, separated into prompt, answers and other columns.

    `names` are what error messages call the answers. `columns` may include FIELDS, which are
    ignored.
    """

    prompt: Any
    answers: list[Any]
    names: Sequence[str]
    comparisons: list[Comparison]
    columns: dict[str, Any]


@dataclass(frozen=True)
class Record:
    """A checked record, in which every text has become a message.

    `ids` are the ids of the comparisons. `faults` say why other comparisons were left out.
    """

    prompt: Messages
    answers: list[Messages]
    comparisons: list[Comparison]
    ids: list[str]
    columns: dict[str, str]
    faults: list[BadRecord]

    @cached_property
    def prompt_hash(self) -> int:
        """64 bits that are equal for equal prompts, in whatever form they were written."""
        return _hash(f"[{as_lists(self.prompt)}]")

    @property
    def prompt_id(self) -> str:
        """The prompt's hash in hex, as in the column prompt_id of the tokenized data."""
        return f"{self.prompt_hash:016x}"


@dataclass(frozen=True)
class Candidates:
    """A prompt and the answers to be scored; an answer may be empty."""

    prompt: Messages
    answers: list[Messages]


# Created once, because json.dumps creates a new encoder for each call with options.
compact_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def hash64(content: object) -> int:
    """The first 64 bits of the SHA-256 of the compact JSON of `content` in UTF-8."""
    return _hash(compact_json(content))


def as_lists(messages: Messages) -> str:
    """Messages as compact JSON: a list of lists of strings."""
    lists = [",".join(map(encode_basestring, message)) for message in messages]
    return f"[[{'],['.join(lists)}]]"


def raw_pair(record: Any) -> Raw:
    """A record with `chosen` and `rejected`. Raises BadRecord for any other."""
    if not isinstance(record, dict):
        raise BadRecord("wrong_type", f"is {_kind(record)}, expected an object")
    for key in PAIR:
        if key not in record:
            raise BadRecord("missing_key", f"{key!r} is missing, found {names_of(record)}")
    both = [record["chosen"], record["rejected"]]
    return Raw(record.get("prompt"), both, PAIR, [CERTAIN], record)


def check(record: Any) -> Record:
    """Check a Raw record, or an object with chosen and rejected.

    Raises BadRecord with one of the reasons `missing_key`, `wrong_type`, `unknown_role`, `unread`,
    `not_text`, `empty`, `prompt_differs`, `identical_answers`, `no_weight`.
    """
    raw = record if isinstance(record, Raw) else raw_pair(record)
    prompt, answers = _conversations(raw)
    tools, columns = _tools(raw.columns), _columns(raw.columns)
    opening = _opening(tools)
    try:
        ids = _identities(raw, tools)
        "".join([*columns, *columns.values()]).encode()
    except (UnicodeEncodeError, TypeError) as error:
        raise BadRecord("not_text", f"has a value that is not valid text: {error}") from None
    for key, messages in zip(("prompt", *raw.names), (prompt, *answers), strict=True):
        _require_words(key, messages)
    kept, faults = [], []
    for place, found in enumerate(raw.comparisons):
        if not found.weight:
            faults.append(BadRecord("no_weight", "has a weight of 0"))
        elif answers[found.j] != answers[found.k]:
            kept.append(place)
        elif found.preference != TIE:
            both = f"{raw.names[found.j]!r} and {raw.names[found.k]!r}"
            faults.append(BadRecord("identical_answers", f"{both} are the same"))
    if faults and not kept:
        raise faults[0]
    comparisons = [raw.comparisons[place] for place in kept]
    ids = [ids[place] for place in kept]
    return Record(opening + prompt, answers, comparisons, ids, columns, faults)


def _identities(raw: Raw, tools: Any) -> list[str]:
    """The id of each comparison: a hash of the JSON of [prompt, chosen, rejected] and any tools."""
    prompt, *answers = map(compact_json, (raw.prompt, *raw.answers))
    rest = f",{compact_json(tools)}" if tools else ""
    texts = (f"[{prompt},{answers[each.j]},{answers[each.k]}{rest}]" for each in raw.comparisons)
    return [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]


def candidates(record: Any) -> Candidates:
    """The answers of a record to be scored: those of a pair, its `answers`, or its `answer`.

    A prompt that all of them repeat is removed, as in training. Raises BadRecord as `check` does.
    """
    if not isinstance(record, dict) or is_pair(record):
        pair = check(record)
        return Candidates(pair.prompt, pair.answers)
    given, expected = values_of(record, SCORED), "expected 'answer', 'answers', or a pair"
    if len(given) > 1 or (given and values_of(record, PAIR)):
        raise BadRecord("several_kinds", f"has {names_of(record)}, {expected}")
    if not (given := given or [key for key in SCORED if key in record]):
        raise BadRecord("missing_key", f"has {names_of(record)}, {expected}")
    if "prompt" not in record:
        raise BadRecord("missing_key", f"'prompt' is missing, found {names_of(record)}")
    require_all_read(record)
    require_no_context(record)
    prompt = _prompt(record["prompt"])
    _require_words("prompt", prompt)
    named = _answers(record, given[0])
    texts = _without_text(record["prompt"], [value for _, value in named])
    answers = [
        _without_prompt(prompt, key, _messages(key, value))
        for (key, _), value in zip(named, texts, strict=True)
    ]
    prompt = _opening(_tools(record)) + prompt
    try:
        hash64([prompt, answers])
    except UnicodeEncodeError as error:
        raise BadRecord("not_text", f"has a value that is not valid text: {error}") from None
    return Candidates(prompt, answers)


def is_pair(record: Any) -> bool:
    """Whether a record has the keys of a pair, and no answers to be scored."""
    keys = record.keys() if isinstance(record, dict) else set()
    return {*PAIR} <= keys and not values_of(record, SCORED)


def values_of(record: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Those of some keys whose value is not null, which tables have where records have no key."""
    return [name for name in names if record.get(name) is not None]


def require_no_context(record: dict[str, Any]) -> None:
    """Raises BadRecord for a value in a column that is read beside pairs only."""
    for name in chain(*BEFORE.values()):
        if _is_given(record.get(name)):
            raise BadRecord(
                "unread",
                f"{name!r} has a value, which is read only with 'chosen' and 'rejected'; expected "
                "it in the prompt",
            )


def _is_given(value: Any) -> bool:
    """Whether a value is more than null, NaN, false, empty or white space."""
    return bool(value) and value == value and bool(str(value).strip())


def require_all_read(record: dict[str, Any], used: Container[str] = ()) -> None:
    """Raises BadRecord for a value in one of MEDIA or RENDERED that a template could render.

    The columns in `used` have another meaning.
    """
    for name in sorted(MEDIA & record.keys()):
        if name not in used and _is_given(record[name]):
            raise BadRecord(
                "not_text",
                f"{name!r} has a value, expected text only; remove the column if the answers do "
                "not depend on it",
            )
    for name in RENDERED:
        if name not in used and _has_items(record.get(name)):
            raise BadRecord(
                "unread",
                f"{name!r} has a value, which is not supported; remove the column if the answers "
                "do not depend on it",
            )


def _has_items(value: Any) -> bool:
    """Whether a value is a list or an object with more than nulls, or may be one as JSON."""
    if isinstance(value, str):
        return value.lstrip().startswith(("[", "{"))
    items = value.values() if isinstance(value, dict) else value
    return isinstance(value, dict | list) and any(item is not None for item in items)


def _answers(record: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    """Each answer with its name in error messages."""
    found = record[key]
    if key == "answer":
        return [(key, found)]
    if not isinstance(found, list):
        raise BadRecord("wrong_type", f"{key!r} is {_kind(found)}, expected a list of answers")
    if not found:
        raise BadRecord("empty", f"{key!r} is an empty list")
    return [(f"answers[{index}]", value) for index, value in enumerate(found)]


def _conversations(raw: Raw) -> tuple[Messages, list[Messages]]:
    """The prompt and the answers as messages. A repeated prompt is removed from answers."""
    prompt, answers, names, *_ = raw
    if all(isinstance(answer, str) for answer in answers):
        if prompt is not None:
            answers = _without_text(prompt, answers)
            return _prompt(prompt), [(("assistant", each),) for each in answers]
        try:
            answers = by_turns(answers, names)
        except BadRecord as fault:
            raise BadRecord(fault.reason, f"'prompt' is missing, and {fault}") from None
    if any(isinstance(answer, list) for answer in answers):
        for key, value in zip(names, answers, strict=True):
            if isinstance(value, str):
                found = f"{key!r} is a string while another answer is a list"
                raise BadRecord("wrong_type", f"{found}, expected all strings or all lists")
    conversations = [_messages(key, value) for key, value in zip(names, answers, strict=True)]
    head = _shared_prompt(conversations)
    if prompt is not None:
        given = _prompt(prompt)
        # The answers may repeat the prompt, and may begin with a system message that it lacks.
        if tuple(message for message in head if message[0] != "system") != given:
            head = given
    elif not any(message[0] == "user" for message in head):
        raise BadRecord("missing_key", "'prompt' is missing, and the first messages differ")
    return head, [_without_prompt(head, *each) for each in zip(names, conversations, strict=True)]


def _without_prompt(prompt: Messages, key: str, messages: Messages) -> Messages:
    """The messages of an answer without the prompt, which they may repeat."""
    repeated = messages[: len(prompt)] == prompt
    answer = messages[len(prompt) :] if repeated else messages
    if not answer or answer[-1][0] != "assistant":
        raise BadRecord("empty", f"{key!r} has no assistant message after the prompt")
    if answer[0][0] != "assistant":
        raise BadRecord(
            "prompt_differs",
            f"{key!r} begins with a message that is not in the prompt: {answer[0][1][:40]!r}",
        )
    return answer


def _shared_prompt(answers: list[Messages]) -> Messages:
    """The messages with which all answers begin, up to the last one not from the assistant."""
    count = 0
    for index, (message, *others) in enumerate(zip(*answers, strict=False), start=1):
        if any(other != message for other in others):
            break
        if message[0] != "assistant":
            count = index
    return answers[0][:count]


def _prompt(value: Any) -> Messages:
    """A prompt as messages. Raises BadRecord if the assistant has the last one, as in an answer."""
    found = _messages("prompt", value, "user")
    if found[-1][0] == "assistant":
        raise BadRecord(
            "prompt_differs",
            "the last message of 'prompt' is the assistant's and none of the answers",
        )
    return found


def _messages(key: str, value: Any, role: str = "assistant") -> Messages:
    """A list of messages, or a text as one message of `role`."""
    if isinstance(value, str):
        return ((role, value),)
    if not isinstance(value, list):
        expected = "expected a string or a list of messages"
        raise BadRecord("wrong_type", f"{key!r} is {_kind(value)}, {expected}")
    if not value:
        raise BadRecord("empty", f"{key!r} is an empty list")
    found = tuple(_message(key, item) for item in value if not _is_empty_system(item))
    if not found:
        raise BadRecord("empty", f"{key!r} is empty")
    return found


def _is_empty_system(item: Any) -> bool:
    """Whether a message is an empty system message, which means that there is none."""
    if not isinstance(item, dict) or item.get("role") != "system" or "content" not in item:
        return False
    if any(item.get(part) for part in PARTS):
        return False
    content = item["content"]
    return content is None or (isinstance(content, str) and not content.strip())


def _message(key: str, item: Any) -> Message:
    parts = _parts(key, item) if isinstance(item, dict) else {}
    optional = {"content"} if "tool_calls" in parts else set()
    if not isinstance(item, dict) or not {"role", "content"} - optional <= item.keys():
        found = f"has {names_of(item)}" if isinstance(item, dict) else f"is {_kind(item)}"
        raise BadRecord("wrong_type", f"a message of {key!r} {found}, expected role and content")
    role, content = item["role"], item.get("content")
    if role not in ROLES:
        raise BadRecord(
            "unknown_role",
            f"a message of {key!r} has the role {as_written(role)}, expected one of "
            f"{', '.join(ROLES)}",
        )
    if content is None and "tool_calls" in parts:
        return role, "", _parts_text(key, parts | {"content": None})
    if not isinstance(content, str):
        raise BadRecord(
            "wrong_type",
            f"the content of a message of {key!r} is {_kind(content)}, expected a string",
        )
    return (role, content, _parts_text(key, parts)) if parts else (role, content)


def _parts(key: str, item: dict[str, Any]) -> dict[str, Any]:
    """The PARTS of a message that are not empty."""
    for part in UNREAD:
        if item.get(part):
            raise BadRecord("unread", f"a message of {key!r} has {part!r}, which is not supported")
    parts = {part: item[part] for part in PARTS if item.get(part)}
    for part, value in parts.items():
        if part == "tool_calls":
            _require_functions(f"'tool_calls' in {key!r}", value)
        elif not isinstance(value, str):
            found = f"{part!r} in {key!r} is {_kind(value)}"
            raise BadRecord("wrong_type", f"{found}, expected a string")
    return parts


def _tools(record: dict[str, Any]) -> Any:
    """The tools of a record, which some files store as a JSON string; None if there are none."""
    tools = record.get(TOOLS)
    if tools and isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise BadRecord("wrong_type", f"{TOOLS!r} is a string that is not JSON") from None
    if not tools:
        return None
    _require_functions(f"{TOOLS!r}", tools)
    return tools


def _opening(tools: Any) -> Messages:
    """The tools of a record as a message to put before its prompt, or no message."""
    return ((TOOLS, "", _parts_text(TOOLS, {TOOLS: tools})),) if tools else ()


def _require_functions(where: str, value: Any) -> None:
    if not isinstance(value, list):
        raise BadRecord("wrong_type", f"{where} is {_kind(value)}, expected a list of objects")
    for item in value:
        if not isinstance(item, dict) or not isinstance(function_of(item).get("name"), str):
            found = f"has {names_of(item)}" if isinstance(item, dict) else f"is {_kind(item)}"
            raise BadRecord(
                "wrong_type", f"an item of {where} {found}, expected a function with a name"
            )


def function_of(item: dict[str, Any]) -> dict[str, Any]:
    """The function of a tool or a call, which may be nested under `function`."""
    inner = item.get("function")
    return inner if isinstance(inner, dict) else item


def _parts_text(key: str, parts: Mapping[str, Any]) -> str:
    try:
        return compact_json(parts)
    except TypeError as error:
        raise BadRecord("not_text", f"{key!r} contains a value that is not JSON: {error}") from None
    except RecursionError:
        raise BadRecord("not_text", f"{key!r} has a value that is nested too deeply") from None


def parts_of(message: Message) -> dict[str, Any]:
    """The parts of a message besides role and text, including `content` if it is null."""
    parts: dict[str, Any] = json.loads(message[2]) if len(message) > 2 else {}
    return parts


def _require_words(key: str, messages: Messages) -> None:
    """Raises BadRecord if one of the messages is empty and calls no tool."""
    empty = [not each[1].strip() and "tool_calls" not in parts_of(each) for each in messages]
    if any(empty):
        which = "" if all(empty) else "a message of "
        raise BadRecord("empty", f"{which}{key!r} is empty")


def _without_text(prompt: Any, answers: list[Any]) -> list[Any]:
    """Text answers without the prompt that they repeat.

    They are returned unchanged unless all of them begin with the whole text of the prompt, and it
    is too long for a coincidence.
    """
    if not isinstance(prompt, str):
        return answers
    for answer in answers:
        if not repeats(prompt, answer):
            return answers
    if is_greeting(prompt):
        return answers
    return [answer[len(prompt) :] for answer in answers]


def is_greeting(prompt: str) -> bool:
    """Whether a prompt is so short that answers may begin with it by chance."""
    return len(prompt.encode(errors="replace")) <= GREETING


def by_turns(answers: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """The messages of answers that are whole conversations as in HH. Raises BadRecord."""
    for key, text in zip(names, answers, strict=True):
        if not isinstance(text, str) or not has_turns(text):
            raise BadRecord("missing_key", f"{key!r} has no Human: and Assistant: turns")
    return [turns(text) for text in answers]


def _columns(record: dict[str, Any]) -> dict[str, str]:
    """The extra columns that are kept, as strings, under names that are not RESERVED."""
    return {
        _free(key, record): str(value)
        for key, value in record.items()
        if key not in (*FIELDS, TOOLS) and isinstance(value, str | int | float)
    }


def _free(name: str, taken: Container[str]) -> str:
    """The name of a column; one that is RESERVED gets `raw_` before it until it is free."""
    if name in RESERVED:
        name = f"raw_{name}"
        while name in taken:
            name = f"raw_{name}"
    return name


def _kind(value: Any) -> str:
    """The type of a value in the words of JSON."""
    return KINDS.get(type(value), f"a {type(value).__name__}")


def names_of(record: dict[str, Any]) -> str:
    """The keys of a record in words, for messages."""
    if not record:
        return "no keys"
    return f"the {'key' if len(record) == 1 else 'keys'} {in_words(sorted(record))}"


def in_words(names: Collection[str]) -> str:
    """Names in a list, for messages: only the first of many, and the beginnings of long ones."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(map(_visible, islice(names, MOST_NAMES))) + more


def _visible(name: str) -> str:
    """A name, in quotes if it is empty, begins or ends with white space or cannot be printed."""
    name = shortened(name)
    return name if name.isprintable() and name and name == name.strip() else repr(name)


def shortened(name: str) -> str:
    """A name, or only the beginning of one that is as long as a text."""
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."
