"""One page on which the judgements can be read: prompts, answers, rewards. It needs no network."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from reward.data.records import FIELDS, LAST_TURN
from reward.data.tokens import Encoder, common_start
from reward.outputs import watched, write_text

TEMPLATE = Path(__file__).with_suffix(".html")
MOST_PAIRS = 10_000
MOST_CHARACTERS = 50_000_000
FIGURES = ("reward_chosen", "reward_rejected", "margin", "tokens_chosen", "tokens_rejected")


def write(
    path: Path,
    table: pa.Table,
    ids: Sequence[tuple[Sequence[int], Sequence[int]]],
    encoder: Encoder,
    slices: Mapping[str, Sequence[str]],
) -> None:
    """The page of the pairs of `table`, whose ids of chosen and rejected are `ids`.

    `slices` are the columns to filter by, and their values. Of more than MOST_PAIRS pairs, or
    MOST_CHARACTERS of their texts, it has those with the lowest margins.
    """
    margins = table["margin"].to_pylist()
    kept = sorted(range(len(margins)), key=margins.__getitem__)[:MOST_PAIRS]
    frame, pairs, characters = encoder.frame(), [], 0
    records = zip(kept, table.take(kept).to_pylist(), strict=True)
    for row, record in watched(records, "page of judgements", "pairs"):
        texts = dict(zip(FIELDS, split(frame, *map(encoder.decode, ids[row])), strict=True))
        characters += sum(map(len, texts.values()))
        if characters > MOST_CHARACTERS:
            break
        figures = {name: record[name] for name in FIGURES}
        slice_of = {name: record[name] for name in slices}
        pairs.append({"id": record["id"]} | texts | figures | {"slices": slice_of})
    shown = f"the {len(pairs)} with the lowest margins of " if len(pairs) < len(table) else ""
    content = {
        "summary": f"{shown}{len(table)} test pairs",
        "slices": dict(slices),
        "pairs": pairs,
    }
    # Nothing in a text may end the script element that holds it.
    data = json.dumps(content, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    write_text(path, TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", data))


def split(frame: tuple[str, str, str], chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt and answers of two texts, as well as the texts alone can tell.

    `frame` is what the template has before the prompt, behind it, and behind the answer. The prompt
    is what both texts begin with, up to the last place where the template, or else a turn, or else
    a line, lets an answer begin.
    """
    head, middle, tail = frame
    shared = common_start(chosen, rejected)
    mark = next((mark for mark in (middle, LAST_TURN, "\n") if mark and mark in shared), "")
    if not mark:
        return "", chosen, rejected
    cut = shared.rindex(mark)
    behind = cut + len(mark)
    prompt = chosen[:cut].removeprefix(head) if mark == middle else chosen[:behind]
    return prompt, chosen[behind:].removesuffix(tail), rejected[behind:].removesuffix(tail)
