"""Packs of texts: rows of tokens without padding that hold shared prefixes only once.

The texts of a prompt, such as the two of a pair, begin with the same tokens. A pack is a single row
of tokens:

    [ prefix and rest of the first text ] of every prompt, then [ rest ] of every other text

The positions of each rest continue where its prefix ends. Attention is causal, so a text that sees
only its prefix and itself has the same reward and the same gradient as in a row of its own.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapreplace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from reward.data.columns import IDS, PREFIX
from reward.data.prefixes import prefix_length

if TYPE_CHECKING:
    from datasets import Dataset


# The columns of tokenized pairs that packs are built from.
COLUMNS = [*IDS, PREFIX]
# The most tokens of a full pack for a check; a larger one might not fit in memory.
ENOUGH = 4096


@dataclass(frozen=True)
class Texts:
    """The texts of one prompt as ids. All begin with the same `prefix` ids and are longer."""

    ids: Sequence[Sequence[int]]
    prefix: int


@dataclass(frozen=True)
class Layout:
    """Which keys the queries of a row see: one entry for each text, in the order of the row.

    A text has `own` tokens in the row. Before them, it sees the first `prefix` tokens of the text
    `owner`, which is the text itself if it is the first of its prompt. `queries` is the number of
    its queries, counted from its end: the last query sees all these keys, the one before it all
    but the last key, and so on.
    """

    queries: list[int]
    own: list[int]
    prefix: list[int]
    owner: list[int]

    @property
    def ends(self) -> list[int]:
        """The index in the row of each text's last token."""
        return [end - 1 for end in accumulate(self.own)]

    def at_ends(self) -> "Layout":
        """The same layout with one query for each text, its last."""
        return replace(self, queries=[1] * len(self.own))


@dataclass(frozen=True)
class Pack:
    """The texts of some prompts in one row.

    `input_ids` and `position_ids` are [1, tokens]. `order` is [texts]: the indices in the layout of
    the first prompt's texts, then those of the second prompt's, and so on.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: Layout
    order: Tensor


def texts_of(ids: Sequence[Sequence[int]]) -> Texts:
    """The texts of one prompt, with their longest common prefix."""
    first, *others = map(np.asarray, ids)
    return Texts(ids, min((prefix_length(first, other) for other in others), default=0))


def pair(row: Mapping[str, Any]) -> Texts:
    """A tokenized pair: chosen, then rejected."""
    return Texts([row[name] for name in IDS], int(row[PREFIX]))


def pairs_of(dataset: "Dataset") -> list[Texts]:
    """All pairs of a tokenized dataset."""
    return [pair(row) for row in rows_of(dataset, COLUMNS)]


def rows_of(dataset: "Dataset", columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Some columns of all rows of a dataset, lists as int64 arrays."""
    for table in dataset.select_columns(list(columns)).with_format("arrow").iter(1000):
        yield from rows_in(cast(pa.Table, table))


def rows_in(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows of a table, lists as int64 arrays.

    The numpy format of datasets gives the same arrays, but takes 2 to 20 times as long.
    """
    columns = []
    for column in table.combine_chunks().columns:
        if pa.types.is_nested(column.type):
            ends = pc.list_value_length(column).to_numpy().cumsum()
            numbers = pc.list_flatten(column).to_numpy().astype(np.int64)
            columns.append(np.split(numbers, ends)[:-1])
        else:
            columns.append(column.to_pylist())
    for row in zip(*columns, strict=True):
        yield dict(zip(table.column_names, row, strict=True))


def tokens(texts: Texts) -> int:
    """How many tokens the texts of a prompt take in a pack."""
    return sum(map(len, texts.ids)) - (len(texts.ids) - 1) * texts.prefix


def lengths_of(dataset: "Dataset") -> npt.NDArray[np.integer]:
    """How many `tokens` each pair of a tokenized dataset takes: [pairs]."""
    chosen, rejected = (pc.list_value_length(dataset.data[name]) for name in IDS)
    found: npt.NDArray[np.integer] = pc.add(chosen, rejected).to_numpy()
    return found - dataset.data[PREFIX].to_numpy()


def into_packs(lengths: Sequence[int], tokens_per_pack: int) -> list[list[int]]:
    """Indices of prompts, in the given order, cut into packs of at most `tokens_per_pack` tokens.

    A prompt with more tokens than that gets its own pack.
    """
    packs: list[list[int]] = []
    held = 0
    for index, length in enumerate(lengths):
        held += length
        if not packs or held > tokens_per_pack:
            packs.append([])
            held = length
        packs[-1].append(index)
    return packs


def balanced(lengths: Sequence[int], tokens_per_pack: int) -> list[list[int]]:
    """Indices of prompts in packs of nearly equal size, the largest pack first.

    There are as many packs as are needed for at most `tokens_per_pack` tokens each, rounded up to
    1, 2, 4 or a multiple of 8, so that 2, 4 or 8 processes get equal work. From the longest prompt
    to the shortest, each goes into the pack with the fewest tokens (Graham 1969, "Bounds on
    multiprocessing timing anomalies"). A prompt that is too long gets its own pack.
    """
    longest_first = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    needed = -(-sum(lengths) // tokens_per_pack)
    while True:
        count = min(len(lengths), rounded_up(needed))
        held = [(0, number) for number in range(count)]
        packs: list[list[int]] = [[] for _ in range(count)]
        for index in longest_first:
            size, number = held[0]
            packs[number].append(index)
            heapreplace(held, (size + lengths[index], number))
        if all(size <= tokens_per_pack or len(packs[number]) == 1 for size, number in held):
            return [
                sorted(packs[number]) for _, number in sorted(held, key=lambda at: (-at[0], at[1]))
            ]
        needed = count + 1


def rounded_up(count: int) -> int:
    """The count rounded up to 1, 2, 4 or a multiple of 8."""
    return next((least for least in (1, 2, 4) if count <= least), -(-count // 8) * 8)


def split_to_fit(texts: Texts, tokens_per_pack: int) -> list[Texts]:
    """The texts of a prompt, split so that each part fits into a pack or is a single text."""
    own = [len(ids) - texts.prefix for ids in texts.ids]
    return [
        Texts([texts.ids[index] for index in indices], texts.prefix)
        for indices in into_packs(own, tokens_per_pack - texts.prefix)
    ]


def extremes(lengths: Sequence[int], tokens_per_pack: int) -> list[int]:
    """Indices of a full pack: the longest prompt, then as many of the shortest as also fit.

    The shortest prompt of all is the last, and is included even if it does not fit. The pack has at
    most ENOUGH tokens unless the longest and the shortest prompt alone have more.
    """
    *others, longest = sorted(range(len(lengths)), key=lengths.__getitem__)
    held = accumulate((lengths[index] for index in others), initial=lengths[longest])
    fitting = sum(size <= min(tokens_per_pack, ENOUGH) for size in held) - 1
    return [longest, *reversed(others[: max(1, fitting)])]


def full_pack(datasets: Sequence["Dataset"], tokens_per_pack: int) -> list[Texts]:
    """The longest pair of all and the shortest pairs that fill up its pack, the shortest last."""
    parts = [each.select_columns(COLUMNS).with_format("numpy") for each in datasets]
    rows: ConcatDataset[Mapping[str, Any]] = ConcatDataset(parts)
    lengths = np.concatenate([*map(lengths_of, datasets)])
    return [pair(rows[index]) for index in extremes(lengths.tolist(), tokens_per_pack)]


def pack(prompts: Sequence[Texts]) -> Pack:
    """One pack with the given prompts' texts; each prompt has at least one."""
    # (prompt, text, tokens before the text's own): the first texts of all prompts, then the others.
    parts = [(prompt, 0, 0) for prompt in range(len(prompts))]
    parts += [
        (prompt, text, texts.prefix)
        for prompt, texts in enumerate(prompts)
        for text in range(1, len(texts.ids))
    ]
    ids = [prompts[prompt].ids[text] for prompt, text, _ in parts]
    prefix = [before for _, _, before in parts]
    own = [len(text) - before for text, before in zip(ids, prefix, strict=True)]
    # The first texts come first in the row, so the index of a prompt is also that of its first
    # text, which owns the prefix.
    layout = Layout(own, own, prefix, [prompt for prompt, _, _ in parts])
    return Pack(
        as_row(np.asarray(text[before:]) for text, before in zip(ids, prefix, strict=True)),
        as_row(np.arange(before, len(text)) for text, before in zip(ids, prefix, strict=True)),
        layout,
        torch.tensor(sorted(range(len(parts)), key=parts.__getitem__)),
    )


def as_row(pieces: Iterable[npt.NDArray[Any]]) -> Tensor:
    """The concatenated pieces: [1, tokens], int64."""
    return torch.from_numpy(np.concatenate(list(pieces), dtype=np.int64))[None]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without waiting for the GPU.

    A copy from pageable memory blocks until the GPU has finished all queued work. A copy from
    pinned memory is only queued, so the CPU can continue.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
