"""One page on which the judgements can be read: prompts, answers, rewards. It needs no network."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from tokenizers import Tokenizer

from stages.outputs import writing
from stages.pairs import FIELDS, LAST_TURN
from stages.tokens import Template, common_start

TEMPLATE = Path(__file__).with_suffix(".html")
MOST_PAIRS = 10_000
FIGURES = ("reward_chosen", "reward_rejected", "margin", "tokens_chosen", "tokens_rejected")


def write(
    path: Path,
    table: pa.Table,
    ids: Sequence[tuple[Sequence[int], Sequence[int]]],
    base: Path,
    template: Template,
    slices: Mapping[str, Sequence[str]],
) -> None:
    """The page of the pairs of `table`, whose ids of chosen and rejected are `ids`.

    `slices` are the columns to filter by, and their values.
    Of more than MOST_PAIRS pairs it has those with the lowest margins.
    """
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    margins = table["margin"].to_pylist()
    kept = sorted(range(len(margins)), key=margins.__getitem__)[:MOST_PAIRS]
    pairs = []
    for row, record in zip(kept, table.take(kept).to_pylist(), strict=True):
        chosen, rejected = (tokenizer.decode(side, skip_special_tokens=False) for side in ids[row])
        texts = dict(zip(FIELDS, split(template, chosen, rejected), strict=True))
        figures = {name: round(record[name], 6) for name in FIGURES}
        slice_of = {name: record[name] for name in slices}
        pairs.append({"id": record["id"]} | texts | figures | {"slices": slice_of})
    shown = f"{len(pairs)} of " if len(pairs) < len(table) else ""
    content = {
        "summary": f"{shown}{len(table)} test pairs",
        "slices": dict(slices),
        "pairs": pairs,
    }
    # Nothing in a text may end the script element that holds it.
    data = json.dumps(content, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    with writing(path):
        page = TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", data)
        path.write_text(page, encoding="utf-8")


def split(template: Template, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt and answers of two texts, as well as the texts alone can tell.

    The prompt is what both begin with, up to the last place where the template, or else a turn, or
    else a line, lets an answer begin.
    """
    head, _, rest = template.template.partition("{prompt}")
    middle, _, tail = rest.partition("{answer}")
    shared = common_start(chosen, rejected)
    mark = next((mark for mark in (middle, LAST_TURN, "\n") if mark and mark in shared), "")
    if not mark:
        return "", chosen, rejected
    cut = shared.rindex(mark)
    behind = cut + len(mark)
    prompt = chosen[:cut].removeprefix(head) if mark == middle else chosen[:behind]
    return prompt, chosen[behind:].removesuffix(tail), rejected[behind:].removesuffix(tail)
