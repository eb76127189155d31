"""The beginning of whole texts, by which a text from another template is recognized.

The reward of a text that another template, or none, has rendered means nothing. A text template
puts the same words into every text. A chat template is a program, so its source does not show what
all of its texts have in common. Therefore a few conversations of all kinds are rendered. Of their
common parts, only special tokens count, and the word directly after the last one. Everything else
may depend on the conversation.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from itertools import product, takewhile
from typing import Any

from reward.data.records import TOOLS, BadRecord, Messages
from reward.data.templates import divide
from reward.data.tokens import MARK, Encoder


def call(name: str) -> dict[str, Any]:
    """A call of a function without arguments."""
    return {"type": "function", "function": {"name": name, "arguments": {}}}


TOOL = {"name": "look_up", "description": "t", "parameters": {"type": "object", "properties": {}}}
# All prompts end differently, so that no content is mistaken for a part of the template.
PROMPTS: tuple[Messages, ...] = (
    (("user", "a"),),
    (("user", "b"),),
    (("system", "c"), ("user", "d")),
    (("user", "e"), ("assistant", "f"), ("user", "g")),
    (("assistant", "h"), ("user", "i")),
    ((TOOLS, "", json.dumps({TOOLS: [{"type": "function", "function": TOOL}]})), ("user", "j")),
    (
        ("user", "k"),
        ("assistant", "", json.dumps({"tool_calls": [call("look_up")]})),
        ("tool", "l"),
    ),
)
ANSWERS: tuple[Messages, ...] = (
    (("assistant", MARK),),
    (("assistant", MARK, json.dumps({"reasoning_content": "r"})),),
    (("assistant", MARK, json.dumps({"name": "n"})),),
    (("assistant", "", json.dumps({"tool_calls": [call(MARK)]})),),
)
SHOWN = 40


class Openings:
    """What all whole texts of a template begin with, and what they have before an answer."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def complete(self, text: str) -> str:
        """A whole text with the beginning of the template: no extra white space, and with bos.

        Tokenizers that mark words by the space before them cause the extra white space, because
        they decode a space after bos. Raises BadRecord for a text that the template cannot have
        rendered.
        """
        if not text.strip():
            return text  # which Endings refuses with a clearer reason
        firsts = [first for first, *_ in self._fixed]
        if all(first and not first[0].isspace() for first in firsts):
            text = text.lstrip()
        if (bos := self._encoder.bos) and all(first.startswith(bos) for first in firsts):
            text = bos + text.removeprefix(bos)
        if not any(has(text, parts) for parts in self._fixed):
            shown = " or ".join(repr("...".join((*parts, ""))) for parts in self._fixed)
            raise BadRecord(
                "template",
                f"the text begins with {text[:SHOWN]!r}, expected one rendered with the reward "
                f"model's own template, such as {shown}",
            )
        return text

    @cached_property
    def _fixed(self) -> list[tuple[str, ...]]:
        """Alternatives. A text must have all parts of one of them in order, from its beginning."""
        if self._encoder.template.chat_template is not None:
            return [self._of_chats()]
        parts = divide(self._encoder.template.template)
        fixed: list[tuple[str, ...]] = [(parts.head, parts.middle)]
        if parts.has_system:
            fixed.append((parts.before, parts.after + parts.head, parts.middle))
        return fixed

    def _of_chats(self) -> tuple[str, ...]:
        """The special tokens that all conversations begin with, and the last one before an answer.

        The latter includes what follows it up to the next white space. Without special tokens, the
        first part is empty and the second one is missing.
        """
        before = [self._before(*asked) for asked in product(PROMPTS, ANSWERS)]
        found = [text for text in before if text is not None]
        head, rest = "", common(found)
        while token := self._first(rest):
            head, rest = head + token, rest.removeprefix(token)
        latest = common([self._from_last(text[len(head) :]) for text in found])
        return (head, latest.split()[0]) if self._first(latest) else (head,)

    def _before(self, prompt: Messages, answer: Messages) -> str | None:
        """The text before the answer's words; None if the template cannot render it."""
        try:
            before, _, _ = self._encoder.render(prompt, answer).rpartition(MARK)
        except BadRecord:
            return None
        return before

    def _first(self, text: str) -> str:
        """The longest special token that a text begins with, or an empty string."""
        return max(filter(text.startswith, self._encoder.special), key=len, default="")

    def _from_last(self, text: str) -> str:
        """A text from its last special token on, or an empty string if it has none."""
        place = max((text.rfind(token) for token in self._encoder.special), default=-1)
        return text[place:] if place >= 0 else ""


def has(text: str, parts: tuple[str, ...]) -> bool:
    """Whether a text begins with the first part and has the others after it, in order."""
    first, *others = parts
    if not text.startswith(first):
        return False
    end = len(first)
    for part in others:
        if (place := text.find(part, end)) < 0:
            return False
        end = place + len(part)
    return True


def common(texts: Sequence[str]) -> str:
    """The longest common prefix of texts: that of the first and the last in sorted order."""
    first, last = min(texts, default=""), max(texts, default="")
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(mark for mark, _ in alike)
