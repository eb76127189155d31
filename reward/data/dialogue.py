"""Convert messages and conversations in any known spelling to messages with role and content.

Anything else is left unchanged, because `records.check` reports what is wrong with it. HH is
Anthropic's data set hh-rlhf.
"""

import re
import unicodedata
from typing import Any

from reward.data.records import BadRecord

# The keys of a message's role and of its content.
SPELLINGS = (("role", "content"), ("role", "text"), ("from", "value"))
SPEAKERS = {
    **{"system": "system", "user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant"},
    **{"tool": "tool", "function": "tool", "observation": "tool"},
}
# HH has a few turns of "Hum:" where "Human:" was meant.
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Hum|Assistant):")
FIRST_TURN = re.compile(r"\s*(?:Human|Hum):")
# In HelpSteer2, between the turns of a prompt, which begins and ends with the user's. NeMo-Aligner
# marks the system message and the first turn, too, and ends with the assistant's.
MARKED_TURN = re.compile(r"(?:\A|\n)<extra_id_[01]>(System|User|Assistant)\n")
SENTENCE_END = re.compile(r"[。！？!?…；][」』”’）)]*")

Message = dict[str, Any]


def spelling(item: Any) -> tuple[str, str] | None:
    """The keys of a message's role and content, or None if the item is not a message."""
    if isinstance(item, dict):
        for keys in SPELLINGS:
            if keys[0] in item and keys[1] in item:
                return keys
    return None


def are_messages(value: Any) -> bool:
    """Whether a value is a list of messages in any spelling."""
    return isinstance(value, list) and bool(value) and all(spelling(item) for item in value)


def are_spoken(value: Any) -> bool:
    """Whether a value is a message or messages, and not other data with the keys from and value."""
    listed = value if isinstance(value, list) else [value]
    return are_messages(listed) and any(
        "role" in item or (isinstance(item["from"], str) and item["from"] in SPEAKERS)
        for item in listed
    )


def are_conversations(value: Any) -> bool:
    """Whether a value is a list of messages, and not all of them are the assistant's."""
    return are_messages(value) and any(role_of(item) != "assistant" for item in value)


def role_of(item: Any) -> Any:
    """The role of a message under its usual name, or None if there is none."""
    key, _ = spelling(item) or SPELLINGS[0]
    role = item.get(key) if isinstance(item, dict) else None
    return SPEAKERS.get(role, role) if isinstance(role, str) else role


def message(key: str, item: Any) -> Any:
    """A message with the keys role and content; its other keys are kept.

    Raises BadRecord `not_text` for a part of the content that is not text, such as an image.
    """
    keys = spelling(item)
    if keys is None:
        return item
    role, content = (item[name] for name in keys)
    known = role_of(item)
    words = _joined(key, content) if isinstance(content, list) else content
    if keys == SPELLINGS[0] and known is role and words is content:
        return item
    others = {name: value for name, value in item.items() if name not in keys}
    return {"role": known, "content": words, **others}


def messages(key: str, value: list[Any]) -> list[Any]:
    """Messages with role and content. Raises BadRecord as `message` does."""
    return [message(key, item) for item in value]


def as_messages(key: str, value: Any, role: str) -> list[Any]:
    """A list of messages, made from a text (one message of `role`), a message or a list of them."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return messages(key, value) if isinstance(value, list) else [message(key, value)]


def _joined(key: str, parts: list[Any]) -> Any:
    """The text of a content that is a list of parts, or the list itself if it is malformed."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or "type" not in part:
            return parts
        if part["type"] != "text":
            kind = str(part["type"])[:40]
            raise BadRecord(
                "not_text", f"a message of {key!r} has a part of type {kind!r}, expected text only"
            )
        text = next((part[name] for name in ("text", "value") if part.get(name) is not None), None)
        if not isinstance(text, str):
            return parts
        texts.append(text)
    return "".join(texts)


# --- texts that are whole conversations ------------------------------------------------------


def has_turns(text: str) -> bool:
    """Whether a text is a conversation as in HH, in turns that begin with Human: or Assistant:."""
    return bool(FIRST_TURN.match(text)) and "\n\nAssistant:" in text


def turns(text: str) -> list[Message]:
    """The messages of a conversation as in HH. An empty last turn, as in a prompt, is left out."""
    _, *parts = TURN.split(text)
    speakers, contents = parts[::2], parts[1::2]
    found = [
        {"role": "assistant" if speaker == "Assistant" else "user", "content": content.strip()}
        for speaker, content in zip(speakers, contents, strict=True)
    ]
    return found[:-1] if found and not found[-1]["content"] else found


def marked_turns(text: str) -> list[Message] | None:
    """The messages of a prompt as in HelpSteer2 or NeMo-Aligner; None without marks of turns.

    An empty system message and an empty last turn are left out.
    """
    first, *parts = MARKED_TURN.split(text)
    if not parts:
        return None
    speakers, contents = parts[::2], parts[1::2]
    if first or speakers[0] == "Assistant":
        speakers, contents = ["User", *speakers], [first, *contents]
    found = [
        {"role": speaker.lower(), "content": content}
        for speaker, content in zip(speakers, contents, strict=True)
    ]
    found = [each for each in found if each["role"] != "system" or each["content"].strip()]
    return found[:-1] if found[-1:] == [{"role": "assistant", "content": ""}] else found


def shared_start(chosen: str, rejected: str) -> int:
    """The length of the prompt with which two texts begin, in characters.

    The prompt ends with the last word that they share, without the white space after it, and is
    shorter than either text. Chinese and Japanese have no white space between words. There, it ends
    with the last shared sentence, or else with the last shared character.
    """
    shorter = min(len(chosen.rstrip()), len(rejected.rstrip()))
    differ = (place for place in range(shorter) if chosen[place] != rejected[place])
    cut = max(0, min(next(differ, shorter), shorter - 1))
    while cut and any(_within_word(text, cut) for text in (chosen, rejected)):
        cut -= 1
    if cut and _is_ideographic(chosen[cut - 1]):
        ends = [found.end() for found in SENTENCE_END.finditer(chosen, 0, cut)]
        cut = ends[-1] if ends else cut
    return len(chosen[:cut].rstrip())


def _within_word(text: str, cut: int) -> bool:
    """Whether a cut would split a word, or a letter from its combining mark."""
    before, after = text[cut - 1], text[cut]
    if unicodedata.combining(after):
        return True
    if before.isspace() or after.isspace():
        return False
    return not (_is_ideographic(before) or _is_ideographic(after))


def _is_ideographic(character: str) -> bool:
    """Whether a character belongs to a script without white space between words.

    Punctuation marks of these scripts count too.
    """
    return unicodedata.east_asian_width(character) in "WF" and not "가" <= character <= "힣"
