"""Convert messages and conversations in any known spelling to messages with role and content.

Anything else is left unchanged, because `records.check` reports what is wrong with it.
"""

from typing import Any

from reward.data.records import BadRecord

# The keys of a message's role and of its content.
SPELLINGS = (("role", "content"), ("role", "text"), ("from", "value"))
SPEAKERS = {
    **{"system": "system", "user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant"},
    **{"tool": "tool", "function": "tool", "observation": "tool"},
}

JsonMessage = dict[str, Any]


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


def are_replies(items: list[Any]) -> bool:
    """Whether these are answers as messages of the assistant, or as lists of messages."""
    return bool(items) and all(
        are_spoken(item) and (isinstance(item, list) or role_of(item) == "assistant")
        for item in items
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
