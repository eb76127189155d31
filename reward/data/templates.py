"""Turn a conversation into text, with a text template or with a chat template in Jinja."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from reward.data.records import TOOLS, BadRecord, Message, Messages, function_of, parts_of
from reward.process import Fault

# How many characters of a text are searched first.
WINDOW = 4096
# The most characters that are searched for parts of a conversation that are not in order.
SEARCHED = 1 << 28
# A chat template is a program, so it may raise these in addition to Jinja's own errors.
ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# Jinja compiles it to Python code, which may be nested too deeply or have too large a number.
NOT_COMPILED = (RecursionError, SyntaxError, ValueError)
NEEDS_CHAT = "but only preprocess.template chat can render such a conversation"
NEEDS_SYSTEM = "but only preprocess.template chat, or one with {system}, can render it"
# The strftime codes that give the same text for a date on every platform.
DIRECTIVES = "aAbBcdHIjmMpSUwWxXyY"
SHOWN = 40
# A text template: {prompt}, then {answer}, and before them optionally a line with {system}.
FIELDS = re.compile(
    r"(?:(?P<before>.*)\{system\}(?P<after>[^\n]*\n+))?"
    r"(?P<head>.*)\{prompt\}(?P<middle>.*)\{answer\}(?P<tail>.*)",
    re.DOTALL,
)
FIELD = re.compile(r"\{(system|prompt|answer)\}")
# A field as Jinja writes it.
DOUBLED = re.compile(rf"\{{{FIELD.pattern}\}}")


class TextTemplate(NamedTuple):
    """A text template, divided at its fields.

    `before` is the text before {system}, and `after` is the rest of its line with the line breaks.
    Both are empty if the template has no {system}. `head` is the text from there to {prompt},
    `middle` the text from there to {answer}, and `tail` the rest.
    """

    before: str
    after: str
    head: str
    middle: str
    tail: str

    @property
    def has_system(self) -> bool:
        """Whether the template has {system}: if so, a line break follows it."""
        return bool(self.after)

    def opening(self, system: str | None) -> str:
        """The text before the prompt. Without a system message, its line is left out."""
        return self.head if system is None else self.before + system + self.after + self.head


@cache
def divide(template: str) -> TextTemplate:
    """Split a text template at its fields.

    A template has {prompt}, then {answer}, and optionally {system} on a line before them, each
    once. Raises ValueError for any other text.
    """
    found = FIELDS.fullmatch(template)
    if found is None or len(FIELD.findall(template)) > 2 + (found["before"] is not None):
        raise ValueError(template)
    return TextTemplate(**found.groupdict(default=""))


def fill(template: str, messages: Messages) -> str:
    """Fill a text template with a question, its answer, and an optional system message.

    Raises BadRecord for any other conversation, and for a system message if the template has no
    {system}.
    """
    parts = divide(template)
    for message in messages:
        for part in parts_of(message):
            raise BadRecord(part, f"has {part}, {NEEDS_CHAT}")
    roles = [message[0] for message in messages]
    system = messages[0][1] if roles[0] == "system" and parts.has_system else None
    if roles[system is not None :] != ["user", "assistant"]:
        if not parts.has_system and "system" in roles:
            raise BadRecord("needs_chat", f"has a system message, {NEEDS_SYSTEM}")
        found = "several turns" if "user" in roles else "no user message"
        raise BadRecord("needs_chat", f"has {found}, {NEEDS_CHAT}")
    (_, prompt, *_), (_, answer, *_) = messages[-2:]
    return parts.opening(system) + prompt + parts.middle + answer + parts.tail


def read_chat_template(path: Path) -> str:
    """The chat template of a Jinja file, or of a tokenizer configuration in JSON.

    Raises a Fault if the file has none, or a broken one.
    """
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    where = f"params.yaml: preprocess.chat_template {path}"
    try:
        text = path.read_text(encoding="utf-8")
        template = json.loads(text).get("chat_template") if path.suffix == ".json" else text
    except (OSError, ValueError, AttributeError) as error:
        raise Fault(f"{where} cannot be read ({error}), expected a Jinja file") from None
    if not isinstance(template, str) or not template.strip():
        raise Fault(
            f"{where} has no chat template, which preprocess.template chat needs; expected a Jinja "
            "file, such as that of the instruction-tuned model with the same tokenizer"
        )
    try:
        _compile_jinja_template(template)
    except TemplateSyntaxError as error:
        raise Fault(f"{where}: line {error.lineno} is broken: {error.message}") from None
    except NOT_COMPILED as error:
        raise Fault(f"{where} cannot be compiled ({error}), expected a simpler template") from None
    return template


def render_chat(template: str, messages: Messages, tokens: Mapping[str, str]) -> str:
    """Render a conversation as `apply_chat_template` of transformers does.

    `tokens` are the special tokens by name. Raises BadRecord if the template fails, or leaves out
    part of a message.
    """
    try:
        text = _rendered(template, messages, tokens)
        require_whole(text, messages)
        _require_tools(text, template, messages, tokens)
    except RecursionError:
        raise BadRecord("chat_template", "has a value that is nested too deeply") from None
    except MemoryError:
        raise BadRecord("chat_template", "the chat template fails: not enough memory") from None
    return text


def _rendered(template: str, messages: Messages, tokens: Mapping[str, str]) -> str:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tools = [tool for message in messages for tool in parts_of(message).get(TOOLS, [])]
    try:
        rendered = _compile_jinja_template(template).render(
            messages=[_as_dict(message) for message in messages if message[0] != TOOLS],
            tools=tools or None,
            documents=None,
            add_generation_prompt=False,
            **tokens,
        )
        text = str(rendered)
        text.encode()  # fails if the template made half characters, which no tokenizer takes
    except (TemplateError, *ERRORS) as error:
        raise BadRecord("chat_template", f"the chat template fails: {error}") from None
    return text


def _require_tools(text: str, template: str, messages: Messages, tokens: Mapping[str, str]) -> None:
    """Raise BadRecord `not_rendered` if the text is the same without the tools.

    Their names do not show that, because calls have them too.
    """
    if messages[0][0] != TOOLS:
        return
    try:
        without = _rendered(template, messages[1:], tokens)
    except BadRecord:
        return
    if text == without:
        raise BadRecord("not_rendered", "the chat template leaves out the tools")


def _as_dict(message: Message) -> dict[str, Any]:
    """A message for chat templates, some of which read the reasoning under an older name."""
    parts = parts_of(message)
    alias = {"thinking": parts["reasoning_content"]} if "reasoning_content" in parts else {}
    return alias | {"role": message[0], "content": message[1]} | parts


def dated(template: str, date: str | None) -> str:
    """A chat template that prints `date`, in ISO form, instead of today's date.

    Templates get today's date from `strftime_now`, a function that transformers passes in. A macro
    of the same name in the template hides that function, so every loader prints the date of
    training. Raises a Fault if the template prints a date and `date` is None.
    """
    if "strftime_now" not in template:
        return template
    if date is None:
        raise Fault("the chat template prints today's date, expected a fixed date")
    day = datetime.date.fromisoformat(date)
    codes = {f"%{letter}": day.strftime(f"%{letter}") for letter in DIRECTIVES}
    codes |= {f"%-{code[1]}": value.lstrip("0") or "0" for code, value in codes.items()}
    filters = "".join(
        f" | replace({json.dumps(code)}, {json.dumps(value)})"
        for code, value in codes.items()
        if code in template
    )
    macro = "{%- macro strftime_now(format) -%}{{ format" + filters + " }}{%- endmacro -%}"
    # Jinja drops a line break after a tag, but not after a value, so an empty value keeps it.
    return macro + "{{ '' }}" + template


def require_whole(text: str, messages: Messages) -> None:
    """Raise BadRecord `not_rendered` for the first part of a conversation missing from its text.

    Some chat templates cut reasoning out of answers, drop system messages, or ignore tools.
    Contents must appear in order, except for white space around them and JSON escapes. Names of
    tools and speakers may be anywhere. The id of a tool call is only a link, so it may be missing.
    """
    search, end, named = _Search(text), 0, 0
    for number, message in enumerate(messages, start=messages[0][0] != TOOLS):
        parts, start = parts_of(message), end
        contents = {"reasoning_content": parts.get("reasoning_content", ""), "content": message[1]}
        for part, words in contents.items():
            for piece in re.split("</?think>", words):
                end = _end_of(piece.strip(), text, end)
                if end < 0:
                    raise _left_out(part, piece, number, message)
        names = [function_of(tool)["name"] for tool in parts.get(TOOLS, [])]
        for name in filter(None, [*names, parts.get("name")]):
            named = text.find(name, named)
            if named < 0 and (named := text.find(name)) < 0:
                raise _left_out("name", name, number, message)
        search.begin(start)
        for call in map(function_of, parts.get("tool_calls", [])):
            search.begin_call()
            for words in filter(None, (call["name"], *_arguments(call, search))):
                if not search.finds(words):
                    raise _left_out("tool_calls", words, number, message)


def _end_of(words: str, text: str, start: int, near: bool = False) -> int:
    """Where some words end in a text, plain or JSON-escaped once or twice, or -1.

    The search widens in steps, so a form that is near is found before the whole text is searched
    for the others. `near` ends it after the first step.
    """
    reach = WINDOW + len(words)
    place = text.find(words, start, start + reach)
    if place >= 0:
        return place + len(words)
    once = json.dumps(words, ensure_ascii=False)[1:-1]
    twice = json.dumps(once, ensure_ascii=False)[1:-1]
    while True:
        for form in (words, once, twice):
            place = text.find(form, start, start + reach + len(form))
            if place >= 0:
                return place + len(form)
        if near or reach >= len(text) - start:
            return -1
        reach *= 4


class _Search:
    """Finds the words of tool calls in a text, each near the one before, as most are in order.

    Otherwise the time would grow with the square of their number. Words that are not near are
    searched for from the beginning of their call, and then of their message, until the work is
    more than SEARCHED characters.
    """

    def __init__(self, text: str) -> None:
        self.text, self.searched = text, 0
        self.begin(0)

    def begin(self, start: int) -> None:
        """Go to the beginning of a message."""
        self.start = self.call = self.near = self.last = start

    def begin_call(self) -> None:
        """Go to the beginning of a call, after all words of the calls before it."""
        self.call = self.near = self.last

    def trial(self, words: Sequence[str]) -> bool:
        """Whether all of some words are in the text, without going there."""
        before = self.near, self.last
        found = all(map(self.finds, words))
        self.near, self.last = before
        return found

    def finds(self, words: str) -> bool:
        """Whether the words are in the text. Raises BadRecord if too many are not in order."""
        end = _end_of(words, self.text, self.near, near=True)
        for start in (self.call, self.start):
            if end < 0:
                end = _end_of(words, self.text, start)
                self.searched += (end if end >= 0 else len(self.text)) - start
        if self.searched > SEARCHED:
            raise BadRecord(
                "not_rendered",
                "has too many values in tool calls that the chat template renders in another order",
            )
        if end >= 0:
            self.near, self.last = end, max(end, self.last)
        return end >= 0


def _arguments(call: dict[str, Any], search: _Search) -> list[str]:
    """The strings in the arguments of a call, or the whole JSON if the text contains it as is."""
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError):
            found = _texts_in(json.loads(arguments))
            if search.trial(found) or not search.trial([arguments.strip()]):
                return found
    return _texts_in(arguments)


def _texts_in(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value.strip()]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in _texts_in(item)] if isinstance(value, list) else []


def _left_out(part: str, words: str, number: int, message: Message) -> BadRecord:
    who = "the tools" if message[0] == TOOLS else f"message {number} ({message[0]})"
    shown = words.strip()
    shown = repr(shown) if len(shown) <= SHOWN else f"{shown[:SHOWN]!r}..."
    return BadRecord("not_rendered", f"the chat template leaves out {part} of {who}: {shown}")
