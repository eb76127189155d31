"""One page on which the judgements can be read: prompts, answers, rewards. It needs no network."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from reward.data.columns import CONVERSATION
from reward.outputs import watched, write_text

TEMPLATE = Path(__file__).with_suffix(".html")
MOST_PAIRS = 10_000
MOST_CHARACTERS = 50_000_000
FIGURES = ("reward_chosen", "reward_rejected", "margin", "tokens_chosen", "tokens_rejected")


def write(
    path: Path,
    table: pa.Table,
    texts: Sequence[Sequence[str]],
    slices: Mapping[str, Sequence[str]],
) -> None:
    """The page of the pairs of `table`, whose prompt, chosen and rejected are `texts`.

    `slices` are the columns to filter by, and their values. Of more than MOST_PAIRS pairs, or
    MOST_CHARACTERS of their texts, it has those with the lowest margins.
    """
    margins = table["margin"].to_pylist()
    kept = sorted(range(len(margins)), key=margins.__getitem__)[:MOST_PAIRS]
    pairs, characters = [], 0
    records = zip(kept, table.take(kept).to_pylist(), strict=True)
    for row, record in watched(records, "page of judgements", "pairs"):
        characters += sum(map(len, texts[row]))
        if characters > MOST_CHARACTERS:
            break
        figures = {name: record[name] for name in FIGURES}
        slice_of = {name: record[name] for name in slices}
        pairs.append(
            {"id": record["id"]}
            | dict(zip(CONVERSATION, texts[row], strict=True))
            | figures
            | {"slices": slice_of}
        )
    shown = f"the {len(pairs)} with the lowest margins of " if len(pairs) < len(table) else ""
    content = {
        "summary": f"{shown}{len(table)} test pairs",
        "slices": dict(slices),
        "pairs": pairs,
    }
    # Nothing in a text may end the script element that holds it.
    data = json.dumps(content, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    write_text(path, TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", data))
