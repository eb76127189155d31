"""Conversation to text: by a text with two fields, or by a chat template in Jinja."""

from collections.abc import Mapping
from typing import Any

from reward.data.records import TOOLS, BadRecord, Message, Messages, parts_of

# What a chat template may raise besides Jinja's own errors: it is a program that meets a record.
ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
NEEDS_CHAT = "which only preprocess.template chat can render"


def fill(template: str, messages: Messages) -> str:
    """A question and its answer in a text with the fields {prompt} and {answer}.

    Raises BadRecord for any other conversation, and for what a text has no field for.
    """
    for message in messages:
        for part in parts_of(message):
            raise BadRecord(part, f"has {part}, {NEEDS_CHAT}")
    roles = [message[0] for message in messages]
    if roles != ["user", "assistant"]:
        found = "a system message" if "system" in roles else "several turns"
        raise BadRecord("needs_chat", f"has {found}, {NEEDS_CHAT}")
    head, _, rest = template.partition("{prompt}")
    middle, _, tail = rest.partition("{answer}")
    return head + messages[0][1] + middle + messages[1][1] + tail


def render_chat(template: str, messages: Messages, tokens: Mapping[str, str]) -> str:
    """A conversation as `apply_chat_template` of transformers renders it.

    `tokens` are the special tokens by their names. Raises BadRecord where the template fails.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tools = [tool for message in messages for tool in parts_of(message).get(TOOLS, [])]
    try:
        text = _compile_jinja_template(template).render(
            messages=[_as_dict(message) for message in messages if message[0] != TOOLS],
            tools=tools or None,
            documents=None,
            add_generation_prompt=False,
            **tokens,
        )
    except (TemplateError, *ERRORS) as error:
        raise BadRecord("chat_template", f"the chat template refuses it: {error}") from None
    return str(text)


def _as_dict(message: Message) -> dict[str, Any]:
    """A message as chat templates read it; some know the reasoning by its older name."""
    parts = parts_of(message)
    alias = {"thinking": parts["reasoning_content"]} if "reasoning_content" in parts else {}
    return alias | {"role": message[0], "content": message[1]} | parts
