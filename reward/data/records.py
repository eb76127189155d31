"""The preference record: what it may be, and what is wrong with one.

A record has `chosen` and `rejected`, texts or lists of {role, content} messages, and `prompt`: a
text, a list of messages, or nothing, when the two conversations stand whole in `chosen` and
`rejected`. Further columns with a single value are kept. A record that is only to be scored may
have any number of `answers`, or one `answer`, instead.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from reward.data.columns import RESERVED

ROLES = ("system", "user", "assistant", "tool")
FIELDS = ("prompt", "chosen", "rejected")
LAST_TURN = "\n\nAssistant:"

Message = tuple[str, str]
Messages = tuple[Message, ...]


class BadRecord(Exception):
    """A record that cannot be used: `reason` is a word to count by, the sentence for people."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


@dataclass(frozen=True)
class Pair:
    """A checked record. A text is one message of the user or the assistant."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    id: str
    columns: dict[str, str] = field(default_factory=dict)

    @cached_property
    def prompt_hash(self) -> int:
        """64 bits that are equal for equal prompts, whatever form they came in."""
        return hash64([self.prompt])

    @property
    def prompt_id(self) -> str:
        """The prompt's hash in hex, the column of the tokenized data."""
        return f"{self.prompt_hash:016x}"

    @cached_property
    def pair_hash(self) -> int:
        """64 bits that are equal for equal records."""
        return _bits(self.prompt_hash.to_bytes(8) + b"".join(self._answers))

    @cached_property
    def answers_hash(self) -> int:
        """64 bits that are equal for the same prompt and answers, whichever is the chosen one."""
        return _bits(self.prompt_hash.to_bytes(8) + b"".join(sorted(self._answers)))

    @cached_property
    def _answers(self) -> list[bytes]:
        return [_sha256(answer) for answer in (self.chosen, self.rejected)]


@dataclass(frozen=True)
class Candidates:
    """A prompt and the answers to it that are to be scored; an answer may be empty."""

    prompt: Messages
    answers: list[Messages]


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def _sha256(content: object) -> bytes:
    """SHA-256 of the compact JSON of `content` in UTF-8."""
    return hashlib.sha256(_ENCODER.encode(content).encode()).digest()


def _bits(digested: bytes) -> int:
    """The first 64 bits of the SHA-256 of some bytes."""
    return int.from_bytes(hashlib.sha256(digested).digest()[:8])


def hash64(content: object) -> int:
    """The first 64 bits of the SHA-256 of the compact JSON of `content`."""
    return int.from_bytes(_sha256(content)[:8])


def check(record: Any) -> Pair:
    """A raw record as a Pair. Raises BadRecord with one of the reasons `missing_key`,
    `wrong_type`, `unknown_role`, `not_text`, `empty`, `prompt_differs`, `identical_answers`."""
    if not isinstance(record, dict):
        raise BadRecord("wrong_type", f"is {_kind(record)}, wanted an object")
    for key in ("chosen", "rejected"):
        if key not in record:
            raise BadRecord("missing_key", f"{key!r} is missing, found {names_of(record)}")
    raw = [record.get(key) for key in FIELDS]
    prompt, chosen, rejected = _conversations(*raw)
    columns = _columns(record)
    try:
        identity = _sha256(raw).hex()[:16]
        "".join([*columns, *columns.values()]).encode()
    except (UnicodeEncodeError, TypeError) as error:
        raise BadRecord("not_text", f"holds what is no text: {error}") from None
    for key, messages in zip(FIELDS, (prompt, chosen, rejected), strict=True):
        if not all(content.strip() for _, content in messages):
            raise BadRecord("empty", f"{key!r} is empty")
    if chosen == rejected:
        raise BadRecord("identical_answers", "'chosen' and 'rejected' are the same")
    return Pair(prompt, chosen, rejected, identity, columns)


def candidates(record: Any) -> Candidates:
    """What a raw record has to score: the two answers of a pair, its `answers`, or its `answer`.

    Raises BadRecord as `check` does.
    """
    given = [key for key in ("answer", "answers") if isinstance(record, dict) and key in record]
    if not given:
        pair = check(record)
        return Candidates(pair.prompt, [pair.chosen, pair.rejected])
    if len(given) > 1 or {"chosen", "rejected"} & record.keys():
        wanted = "wanted 'answer', 'answers', or a pair"
        raise BadRecord("several_kinds", f"has {names_of(record)}, {wanted}")
    if "prompt" not in record:
        raise BadRecord("missing_key", f"'prompt' is missing, found {names_of(record)}")
    prompt = _messages("prompt", record["prompt"], "user")
    if not all(content.strip() for _, content in prompt):
        raise BadRecord("empty", "'prompt' is empty")
    answers = [
        _behind(prompt, key, _messages(key, value)) for key, value in _answers(record, given[0])
    ]
    try:
        _sha256([prompt, answers])
    except UnicodeEncodeError as error:
        raise BadRecord("not_text", f"holds what is no text: {error}") from None
    return Candidates(prompt, answers)


def _answers(record: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    """Each answer with what messages call it."""
    found = record[key]
    if key == "answer":
        return [(key, found)]
    if not isinstance(found, list):
        raise BadRecord("wrong_type", f"{key!r} is {_kind(found)}, wanted a list of answers")
    if not found:
        raise BadRecord("empty", f"{key!r} is an empty list")
    return [(f"answers[{index}]", value) for index, value in enumerate(found)]


def _conversations(prompt: Any, chosen: Any, rejected: Any) -> tuple[Messages, Messages, Messages]:
    """Prompt, chosen and rejected as messages, nothing of the prompt left in the answers."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            prompt, chosen, rejected = _split_texts(chosen, rejected)
        head = _messages("prompt", prompt, "user")
        return head, (("assistant", chosen),), (("assistant", rejected),)
    for key, value, other in (("chosen", chosen, rejected), ("rejected", rejected, chosen)):
        if isinstance(value, str) and isinstance(other, list):
            raise BadRecord("wrong_type", f"{key!r} is a text, wanted both lists, or both texts")
    answers = _messages("chosen", chosen), _messages("rejected", rejected)
    head = _shared_prompt(*answers)
    if prompt is not None:
        asked = _messages("prompt", prompt, "user")
        # The answers may repeat the prompt, and may begin with a system message that it lacks.
        if tuple(message for message in head if message[0] != "system") != asked:
            head = asked
    elif not any(role == "user" for role, _ in head):
        raise BadRecord("missing_key", "'prompt' is missing, and the first messages differ")
    return head, _behind(head, "chosen", answers[0]), _behind(head, "rejected", answers[1])


def _behind(prompt: Messages, key: str, messages: Messages) -> Messages:
    """The answer in messages that may repeat their prompt."""
    repeated = messages[: len(prompt)] == prompt
    answer = messages[len(prompt) :] if repeated else messages
    if not answer or answer[-1][0] != "assistant":
        raise BadRecord("empty", f"{key!r} has no answer of the assistant's after the prompt")
    if answer[0][0] != "assistant":
        raise BadRecord(
            "prompt_differs",
            f"{key!r} begins with another message than the prompt: {answer[0][1][:40]!r}",
        )
    return answer


def _shared_prompt(chosen: Messages, rejected: Messages) -> Messages:
    """The messages with which both begin, up to the last one that is not the assistant's."""
    count = 0
    for index, (left, right) in enumerate(zip(chosen, rejected, strict=False), start=1):
        if left != right:
            break
        if left[0] != "assistant":
            count = index
    return chosen[:count]


def _messages(key: str, value: Any, role: str = "assistant") -> Messages:
    """A list of messages, or a text as one message of `role`."""
    if isinstance(value, str):
        return ((role, value),)
    if not isinstance(value, list):
        wanted = "a text or a list of messages"
        raise BadRecord("wrong_type", f"{key!r} is {_kind(value)}, wanted {wanted}")
    if not value:
        raise BadRecord("empty", f"{key!r} is an empty list")
    return tuple(_message(key, item) for item in value)


def _message(key: str, item: Any) -> Message:
    if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
        found = f"has {names_of(item)}" if isinstance(item, dict) else f"is {_kind(item)}"
        raise BadRecord("wrong_type", f"a message of {key!r} {found}, wanted role and content")
    role, content = item["role"], item["content"]
    if role not in ROLES:
        raise BadRecord("unknown_role", f"{key!r} has the role {role!r}, known: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise BadRecord("wrong_type", f"a content in {key!r} is {_kind(content)}, wanted a text")
    return role, content


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two conversations in the form of HH, cut behind the last turn marker that they share.

    Without a marker nothing tells the prompt from answers that happen to begin alike.
    """
    cut = len(chosen)
    while (cut := chosen.rfind(LAST_TURN, 0, cut)) >= 0:
        head = chosen[: cut + len(LAST_TURN)]
        if rejected.startswith(head):
            return head, chosen[len(head) :], rejected[len(head) :]
    raise BadRecord(
        "missing_key",
        f"'prompt' is missing, and the answers are no conversations that share {LAST_TURN!r}",
    )


def _columns(record: dict[str, Any]) -> dict[str, str]:
    """The further single values as texts; one named like a column of ours is kept as raw_<name>."""
    return {
        f"raw_{key}" if key in RESERVED else key: str(value)
        for key, value in record.items()
        if key not in FIELDS and isinstance(value, str | int | float)
    }


def _kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    names |= {bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    names[bytes] = "bytes"
    return names.get(type(value), f"a {type(value).__name__}")


def names_of(record: dict[str, Any]) -> str:
    shown = (key if key.isprintable() else repr(key) for key in sorted(record))
    return "the keys " + ", ".join(shown) if record else "no key"
