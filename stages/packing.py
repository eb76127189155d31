"""Pairs to packs: what one forward pass works on.

A pack is a padded batch of the two sides of a few pairs, and where in it the rewards stand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Row = Mapping[str, Any]
COLUMNS = ["input_ids_j", "input_ids_k"]


@dataclass(frozen=True)
class Pack:
    """n pairs: chosen in the first half of the rows, rejected in the second.

    `input_ids` and `attention_mask` are [2n, length], padded on the right; `last` is [2n], the
    index of each row's last token, where its reward is read. Padding never decides what is read,
    so the id it has does not matter.
    """

    input_ids: Tensor
    attention_mask: Tensor
    last: Tensor

    def to(self, device: torch.device) -> "Pack":
        return Pack(self.input_ids.to(device), self.attention_mask.to(device), self.last.to(device))


def tokens(row: Row) -> int:
    """The length of the longer side of a tokenized pair."""
    return max(len(row["input_ids_j"]), len(row["input_ids_k"]))


def plan(lengths: Sequence[int], tokens_per_pack: int) -> list[list[int]]:
    """Indices of pairs, in the order given, cut into packs of at most `tokens_per_pack` tokens.

    Padding counts. A pair that is longer by itself is a pack of its own.
    """
    packs: list[list[int]] = []
    longest = 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if not packs or 2 * (len(packs[-1]) + 1) * longest > tokens_per_pack:
            packs.append([])
            longest = length
        packs[-1].append(index)
    return packs


def pack(rows: Sequence[Row]) -> Pack:
    """One pack of the given tokenized pairs."""
    sides = [row["input_ids_j"] for row in rows] + [row["input_ids_k"] for row in rows]
    lengths = torch.tensor([len(side) for side in sides])
    input_ids = torch.zeros(len(sides), int(lengths.max()), dtype=torch.long)
    for row, side in zip(input_ids, sides, strict=True):
        row[: len(side)] = torch.tensor(side)
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return Pack(input_ids, attention_mask, lengths - 1)
