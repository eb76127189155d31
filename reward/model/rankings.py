"""Rankings: the comparisons of a prompt's answers, grouped so that each answer is computed once.

A row of the tokenized data compares two texts, j and k. A ranking holds the texts of one prompt and
their comparisons. For n answers it has n texts, whereas the n (n - 1) / 2 pairs have n (n - 1).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

from reward.data.columns import ANSWERS, IDS, PROMPT_ID
from reward.model.packing import Texts, rows_of, texts_of, to_device, tokens

COLUMNS = [PROMPT_ID, *ANSWERS, *IDS]


class Comparison(NamedTuple):
    """The row of a comparison, and the indices of its two sides among the texts."""

    row: int
    j: int
    k: int


@dataclass(frozen=True)
class Ranking:
    """The texts of one prompt and their comparisons."""

    texts: Texts
    comparisons: Sequence[Comparison]


def rankings(rows: Iterable[Mapping[str, Any]]) -> list[Ranking]:
    """Tokenized rows grouped by prompt. Prompts and answers are in order of first appearance."""
    texts: dict[str, dict[int, Sequence[int]]] = {}
    compared: dict[str, list[Comparison]] = {}
    for index, row in enumerate(rows):
        known = texts.setdefault(row[PROMPT_ID], {})
        answers = [int(row[name]) for name in ANSWERS]
        for answer, ids in zip(answers, IDS, strict=True):
            known.setdefault(answer, row[ids])
        places = {answer: place for place, answer in enumerate(known)}
        found = Comparison(index, *(places[answer] for answer in answers))
        compared.setdefault(row[PROMPT_ID], []).append(found)
    return [Ranking(texts_of([*texts[prompt].values()]), compared[prompt]) for prompt in texts]


def rankings_of(dataset: Dataset) -> list[Ranking]:
    """All rankings of a tokenized dataset."""
    return rankings(rows_of(dataset, COLUMNS))


def divided(ranking: Ranking, tokens_per_pack: int) -> list[Ranking]:
    """A ranking in parts that fit into a pack; each comparison is in exactly one of them.

    A text may be in several parts. A comparison that is too long gets its own part.
    """
    texts, rest = ranking.texts, list(ranking.comparisons)
    if tokens(texts) <= tokens_per_pack:
        return [ranking]
    own = [len(ids) - texts.prefix for ids in texts.ids]
    # Comparisons among the first answers come first, so a part has many comparisons of few texts.
    rest.sort(key=lambda each: (max(each.j, each.k), min(each.j, each.k)))
    parts = []
    while rest:
        held = {rest[0].j, rest[0].k}
        for _, j, k in rest:
            if texts.prefix + sum(own[text] for text in held | {j, k}) <= tokens_per_pack:
                held |= {j, k}
        parts.append(_part(texts, sorted(held), [each for each in rest if held >= {*each[1:]}]))
        rest = [each for each in rest if not held >= {*each[1:]}]
    return parts


def _part(texts: Texts, held: list[int], comparisons: Iterable[Comparison]) -> Ranking:
    places = {text: place for place, text in enumerate(held)}
    return Ranking(
        texts_of([texts.ids[text] for text in held]),  # which may share more than all texts do
        [Comparison(row, places[j], places[k]) for row, j, k in comparisons],
    )


def sides(rewards: Tensor, ranked: Sequence[Ranking]) -> tuple[Tensor, Tensor, Tensor]:
    """The rewards of j, the rewards of k and the row of every comparison: [comparisons] each.

    `rewards` holds the rewards of all texts, ranking by ranking. The rows are on the CPU.
    """
    start, found = 0, []
    for ranking in ranked:
        found += [(row, start + j, start + k) for row, j, k in ranking.comparisons]
        start += len(ranking.texts.ids)
    # Contiguous, because copying a strided tensor would wait for the GPU.
    row, j, k = torch.tensor(found).T.contiguous()
    # index_select, because its gradient is summed in a fixed order on a CPU, and on a GPU with
    # deterministic kernels.
    one, other = (rewards.index_select(0, to_device(place, rewards.device)) for place in (j, k))
    return one, other, row
