"""A checked pair with its ids, as a row of the tokenized data."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reward.data import tokenized
from reward.data.columns import ANSWERS, CONVERSATION, GRADES, ID, IDS, PREFIX, PROMPT_ID
from reward.data.prefixes import prefix_length
from reward.data.records import BadRecord, Message, Messages, Pair, compact_json, parts_of

Ids = list[int]


def as_row(pair: Pair, ids: Sequence[Sequence[int]], texts: Sequence[str]) -> dict[str, Any]:
    """The row of a pair whose chosen and rejected sides have these ids, of these texts.

    Raises BadRecord `identical_tokens` for a pair that no model can tell apart.
    """
    if ids[0] == ids[1]:
        raise BadRecord("identical_tokens", "both answers give the same ids")
    sides = [np.array(each, dtype=np.int32) for each in ids]
    messages = (pair.prompt, pair.chosen, pair.rejected)
    return {
        ID: pair.id,
        PROMPT_ID: pair.prompt_id,
        **dict(zip(IDS, sides, strict=True)),
        PREFIX: prefix_length(*sides),
        **dict(zip(CONVERSATION, map(as_json, messages), strict=True)),
        **dict(zip(tokenized.TEXTS, texts, strict=True)),
        tokenized.KEPT: list(pair.columns.items()),
    }


def late_columns(numbers: npt.NDArray[np.integer]) -> dict[str, npt.NDArray[Any]]:
    """What is known of rows only at the end: the numbers of their answers, and their grades."""
    columns = dict(zip(ANSWERS, numbers.T, strict=True))
    grades = dict(zip(GRADES, (1.0, 1.0, 0.0), strict=True))
    return columns | {name: np.full(len(numbers), grade) for name, grade in grades.items()}


def hash_of(ids: Ids) -> int:
    """64 bits that are equal for equal ids."""
    return int.from_bytes(hashlib.sha256(np.array(ids, dtype=np.int32).tobytes()).digest()[:8])


def as_json(messages: Messages) -> str:
    """Messages as a JSON list of objects, with all that they have."""
    return compact_json([as_dict(message) for message in messages])


def as_dict(message: Message) -> dict[str, Any]:
    return {"role": message[0], "content": message[1], **parts_of(message)}


def shown(messages: str) -> str:
    """Such a JSON list as a person reads it: one message alone, several with their roles."""
    found = json.loads(messages)
    if len(found) == 1 and found[0].keys() == {"role", "content"}:
        return str(found[0]["content"])
    return "\n\n".join(map(_with_role, found))


def _with_role(message: dict[str, Any]) -> str:
    parts = {key: value for key, value in message.items() if key not in ("role", "content")}
    more = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in parts.items()]
    return "\n".join([f"{message['role']}: {message['content']}", *more])
