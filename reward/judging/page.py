"""A single HTML page with the judgements: prompts, answers and rewards. It works offline."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from reward.data.columns import (
    ANSWERS,
    ID,
    MARGIN,
    PREFERENCE,
    PROMPT_ID,
    REWARDS,
    TEST_SET,
    TIE,
    TOKENS,
)
from reward.outputs import with_bar, write_text

TEMPLATE = Path(__file__).with_suffix(".html")
MOST_PAIRS = 10_000
MOST_CHARACTERS = 50_000_000


class Prompt(NamedTuple):
    """The text of a prompt, and of its answers by number."""

    text: str
    answers: dict[int, str]

    @property
    def characters(self) -> int:
        return len(self.text) + sum(map(len, self.answers.values()))


Key = tuple[str, str]


def write(
    path: Path,
    table: pa.Table,
    prompts: Mapping[Key, Prompt],
    slices: Mapping[str, Sequence[str]],
) -> None:
    """Write the page of the pairs of `table`; `prompts` is keyed by test set and prompt_id.

    `slices` are the columns to filter by, with their values. If there are more than MOST_PAIRS
    pairs or MOST_CHARACTERS of text, the page has those with the lowest margins; a tie counts as
    zero.
    """
    keys = list(zip(table[TEST_SET].to_pylist(), table[PROMPT_ID].to_pylist(), strict=True))
    tied = [preference == TIE for preference in table[PREFERENCE].to_pylist()]
    margins = table[MARGIN].to_pylist()
    kept = sorted(range(len(table)), key=lambda row: 0.0 if tied[row] else margins[row])
    kept = kept[:MOST_PAIRS]
    places: dict[Key, int] = {}
    pairs, characters = [], 0
    records = zip(kept, table.take(kept).to_pylist(), strict=True)
    for row, record in with_bar(records, "page of judgements", "pairs"):
        characters += 0 if keys[row] in places else prompts[keys[row]].characters
        if characters > MOST_CHARACTERS:
            break
        pairs.append(
            {
                "id": record[ID],
                "prompt": places.setdefault(keys[row], len(places)),
                "answers": [record[name] for name in ANSWERS],
                "margin": record[MARGIN],
                "preference": record[PREFERENCE],
                "slices": {name: record[name] for name in slices},
            }
        )
    shown = f"the {len(pairs)} with the lowest margins of " if len(pairs) < len(table) else ""
    content = {
        "summary": f"{shown}{len(table)} test pairs",
        "slices": dict(slices),
        "prompts": judged_prompts(table, keys, {key: prompts[key] for key in places}),
        "pairs": pairs,
    }
    # No text may end the script element that contains it.
    data = json.dumps(content, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    write_text(path, TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", data))


def judged_prompts(
    table: pa.Table, keys: Sequence[Key], prompts: Mapping[Key, Prompt]
) -> list[dict[str, object]]:
    """The prompts with all of their answers; rewards and lengths are from the table."""
    figures: dict[Key, dict[int, tuple[float, int]]] = {key: {} for key in prompts}
    for side in zip(ANSWERS, REWARDS, TOKENS, strict=True):
        columns = (table[name].to_pylist() for name in side)
        for key, answer, *found in zip(keys, *columns, strict=True):
            if key in figures:
                figures[key][answer] = (found[0], found[1])
    return [
        {
            "text": prompt.text,
            "answers": [
                {"number": number, "text": prompt.answers[number], "reward": reward, "tokens": size}
                for number, (reward, size) in sorted(figures[key].items())
            ],
        }
        for key, prompt in prompts.items()
    ]


def readable(messages: str) -> str:
    """A JSON list of messages in readable form: one as its text, several with their roles."""
    found = json.loads(messages)
    if len(found) == 1 and found[0].keys() == {"role", "content"}:
        return str(found[0]["content"])
    return "\n\n".join(map(_with_role, found))


def _with_role(message: dict[str, Any]) -> str:
    parts = {key: value for key, value in message.items() if key not in ("role", "content")}
    more = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in parts.items()]
    # A message that only calls tools may have null as its content.
    return "\n".join([f"{message['role']}: {message['content'] or ''}", *more])
