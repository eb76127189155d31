"""A checked record with its ids, as a row of the scratch table."""

import hashlib
from collections.abc import Callable, Sequence
from json.encoder import encode_basestring
from typing import Any, NamedTuple

import numpy as np

from reward.data.columns import TIE
from reward.data.prefixes import TokenIds, prefix_length
from reward.data.records import (
    BadRecord,
    Comparison,
    Message,
    Messages,
    Record,
    compact_json,
    parts_of,
)
from reward.data.tokenized import Row, TokenizedComparison


class Kept(NamedTuple):
    """The comparisons of a record that are usable with its ids, and the faults of the others."""

    comparisons: list[Comparison]
    compared: list[TokenizedComparison]
    faults: list[BadRecord]


def compare(
    record: Record,
    ids: Sequence[TokenIds],
    max_length: int,
    unknown: Callable[[TokenIds, TokenIds], str | None],
) -> Kept:
    """The comparisons of a record whose two answers have different ids, at most max_length each.

    `ids` are the ids of each answer with its prompt, and `unknown` says which of them the base
    lacks. A comparison with longer ids is the fault `over_length`, and one with an unknown id is
    `unknown_id`. One with equal ids, which no model can tell apart, is the fault
    `identical_tokens`, except that a tie is left out without a fault.
    """
    kept, compared, faults = [], [], []
    for name, each in zip(record.ids, record.comparisons, strict=True):
        left, right = ids[each.j], ids[each.k]
        longest = max(len(left), len(right))
        if longest > max_length:
            faults.append(
                BadRecord("over_length", f"has {longest} tokens, expected at most {max_length}")
            )
        elif found := unknown(left, right):
            faults.append(BadRecord("unknown_id", f"has {found}"))
        elif len(left) != len(right) or not np.array_equal(left, right):
            kept.append(each)
            compared.append(TokenizedComparison(name, each.j, each.k, prefix_length(left, right)))
        elif each.preference != TIE:
            faults.append(BadRecord("identical_tokens", "both answers have the same ids"))
    return Kept(kept, compared, faults)


def as_row(
    record: Record,
    ids: Sequence[TokenIds],
    texts: Sequence[str],
    compared: Sequence[TokenizedComparison],
) -> Row:
    """The row of a record whose answers have these ids and texts."""
    prompt, *responses = map(as_json, (record.prompt, *record.answers))
    return Row(record.prompt_id, prompt, record.columns, ids, responses, texts, compared)


def hash_of(ids: TokenIds) -> int:
    """64 bits that are equal for equal ids."""
    return int.from_bytes(hashlib.sha256(ids.tobytes()).digest()[:8])


def as_json(messages: Messages) -> str:
    """Messages as a JSON list of objects, with all of their parts."""
    return f"[{','.join(map(_object, messages))}]"


def _object(message: Message) -> str:
    """A message as compact JSON. Most messages have no parts and take this faster way."""
    if len(message) > 2:
        return compact_json(as_dict(message))
    role, content = map(encode_basestring, message)
    return f'{{"role":{role},"content":{content}}}'


def as_dict(message: Message) -> dict[str, Any]:
    """A message as an object with role, content and its other parts."""
    return {"role": message[0], "content": message[1], **parts_of(message)}
