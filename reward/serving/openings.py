"""What the template has before a prompt and before an answer, by which a whole text is known.

A text that another template has rendered, or none, has a reward that means nothing. A text template
has the same words in every text. What a chat template has in every text is not said by its source,
a program, so a few conversations of all kinds are rendered, and of what they have in common only
special tokens count, and a word directly after one: the rest may depend on what is said.
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
# No two prompts end alike, so that nothing that is said is taken for the template's.
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
    """What whole texts begin with under a template, and have before an answer."""

    def __init__(self, encoder: Encoder, bos: str | None) -> None:
        self._encoder, self._bos = encoder, bos

    def complete(self, text: str) -> str:
        """A whole text as the template begins one: white space before it goes, a missing bos comes.

        Tokenizers that mark words by the space before them decode one after a bos. Raises BadRecord
        for a text that the template cannot have made.
        """
        if not text.strip():
            return text
        firsts = [first for first, *_ in self._fixed]
        if all(first and not first[0].isspace() for first in firsts):
            text = text.lstrip()
        if self._bos and all(first.startswith(self._bos) for first in firsts):
            text = self._bos + text.removeprefix(self._bos)
        if not any(has(text, parts) for parts in self._fixed):
            shown = " or ".join(repr("...".join((*parts, ""))) for parts in self._fixed)
            raise BadRecord(
                "template",
                f"the text begins with {text[:SHOWN]!r}, expected one that the reward model's own "
                f"template has rendered, as {shown}",
            )
        return text

    @cached_property
    def _fixed(self) -> list[tuple[str, ...]]:
        """What texts have in this order, from their beginning on: all of one of these."""
        if self._encoder.template.chat_template is not None:
            return [self._of_chats()]
        around = divide(self._encoder.template.template)
        fixed: list[tuple[str, ...]] = [(around.head, around.middle)]
        if around.before is not None and around.after is not None:
            fixed.append((around.before, around.after + around.head, around.middle))
        return fixed

    def _of_chats(self) -> tuple[str, ...]:
        """The special tokens that all conversations begin with, and the last one before an answer.

        To the latter belongs what follows it up to a white space. Without such a token the first
        is empty, and the other one is left out.
        """
        before = [self._before(*asked) for asked in product(PROMPTS, ANSWERS)]
        found = [text for text in before if text is not None]
        head, rest = "", common(found)
        while token := self._first(rest):
            head, rest = head + token, rest.removeprefix(token)
        latest = common([self._from_last(text[len(head) :]) for text in found])
        return (head, latest.split()[0]) if self._first(latest) else (head,)

    def _before(self, prompt: Messages, answer: Messages) -> str | None:
        """What comes before the answer's words; None where the template does not render it."""
        try:
            before, _, _ = self._encoder.render(prompt, answer).rpartition(MARK)
        except BadRecord:
            return None
        return before

    def _first(self, text: str) -> str:
        """The longest special token that a text begins with, or nothing."""
        return max(filter(text.startswith, self._encoder.special), key=len, default="")

    def _from_last(self, text: str) -> str:
        """A text from its last special token on; nothing where it has none."""
        place = max((text.rfind(token) for token in self._encoder.special), default=-1)
        return text[place:] if place >= 0 else ""


def has(text: str, parts: tuple[str, ...]) -> bool:
    """Whether a text begins with the first part and has the others after it, in their order."""
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
    """What all of some texts begin with: the two that are furthest apart in order decide."""
    first, last = min(texts, default=""), max(texts, default="")
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(mark for mark, _ in alike)
