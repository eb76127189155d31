"""Pairs to packs: no padding, and what texts share held once.

The two texts of a pair begin alike: they share their prompt. A pack is a single row of tokens,

    [ prefix and rest of chosen ] of every pair, then [ rest of rejected ] of every pair,

in which a rest takes up the positions where its prefix ends. Attention is causal, so a text that
sees its prefix and itself alone has the reward, and gives the gradient, that it has by itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapreplace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reward.data.columns import IDS, PREFIX
from reward.data.prefixes import prefix_length

if TYPE_CHECKING:
    from datasets import Dataset


# What a row of tokenized pairs must have to become a part of a pack.
COLUMNS = [*IDS, PREFIX]
ENOUGH = 4096


@dataclass(frozen=True)
class Texts:
    """The texts of one prompt as ids; all begin with the same `prefix` ids and have one more."""

    ids: Sequence[Sequence[int]]
    prefix: int


@dataclass(frozen=True)
class Layout:
    """Which keys the queries of a row see: one entry for each text, in the order of the row.

    A text has `own` tokens in the row and sees, before them, the first `prefix` tokens of the text
    `owner` (itself, if it comes first of its prompt). Its `queries` are its last ones: the last
    sees all these keys, the one before it all but the last, and so on.
    """

    queries: list[int]
    own: list[int]
    prefix: list[int]
    owner: list[int]

    @property
    def firsts(self) -> int:
        """How many texts come first of their prompt; in the row they are before all others."""
        return sum(index == owner for index, owner in enumerate(self.owner))

    @property
    def ends(self) -> list[int]:
        """Where in the row each text has its last token."""
        return [end - 1 for end in accumulate(self.own)]

    def at_ends(self) -> "Layout":
        """The same with one query for each text: its last."""
        return replace(self, queries=[1] * len(self.own))


@dataclass(frozen=True)
class Pack:
    """The texts of some prompts in one row.

    `input_ids` and `position_ids` are [1, tokens]. `order` is [texts]: where in the layout the
    texts of the first prompt are, then those of the second, and so on.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: Layout
    order: Tensor


def texts_of(ids: Sequence[Sequence[int]]) -> Texts:
    """The texts of one prompt, with all that they begin with in common."""
    first, *others = map(np.asarray, ids)
    return Texts(ids, min((prefix_length(first, other) for other in others), default=0))


def pair(row: Mapping[str, Any]) -> Texts:
    """A tokenized pair: chosen, then rejected."""
    return Texts([row[name] for name in IDS], int(row[PREFIX]))


def pairs_of(dataset: "Dataset") -> list[Texts]:
    """All pairs of a tokenized dataset."""
    return [pair(row) for row in dataset.select_columns(COLUMNS).with_format("numpy")]


def tokens(texts: Texts) -> int:
    """The tokens that the texts of a prompt take up in a pack."""
    return sum(map(len, texts.ids)) - (len(texts.ids) - 1) * texts.prefix


def into_packs(lengths: Sequence[int], tokens_per_pack: int) -> list[list[int]]:
    """Indices of prompts, in the order given, cut into packs of at most `tokens_per_pack` tokens.

    A prompt whose texts are longer by themselves is a pack of its own.
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

    As many packs of at most `tokens_per_pack` tokens as are needed, but 2, 4 or a multiple of 8 if
    they are several, so that as many processes have the same work. A prompt goes, the longest
    first, where the fewest tokens are (Graham 1969, "Bounds on multiprocessing timing anomalies").
    One whose texts are too long by themselves is a pack of its own.
    """
    longest_first = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    needed = -(-sum(lengths) // tokens_per_pack)
    while True:
        count = min(len(lengths), even(needed))
        held = [(0, number) for number in range(count)]
        packs: list[list[int]] = [[] for _ in range(count)]
        for index in longest_first:
            tokens, number = held[0]
            packs[number].append(index)
            heapreplace(held, (tokens + lengths[index], number))
        if all(size <= tokens_per_pack or len(packs[number]) == 1 for size, number in held):
            return [
                sorted(packs[number]) for _, number in sorted(held, key=lambda at: (-at[0], at[1]))
            ]
        needed = count + 1


def even(count: int) -> int:
    """The least of 1, 2, 4 and the multiples of 8 that is not below the count."""
    return next((least for least in (1, 2, 4) if count <= least), -(-count // 8) * 8)


def within(texts: Texts, tokens_per_pack: int) -> list[Texts]:
    """The texts of a prompt, as many at a time as fit into a pack, and at least one."""
    own = [len(ids) - texts.prefix for ids in texts.ids]
    return [
        Texts([texts.ids[index] for index in indices], texts.prefix)
        for indices in into_packs(own, tokens_per_pack - texts.prefix)
    ]


def extremes(lengths: Sequence[int], tokens_per_pack: int) -> list[int]:
    """Indices of a full pack: the longest prompt, then the shortest ones that fit beside it.

    The shortest of all is the last, and is there whether it fits or not, if there are two. At most
    ENOUGH tokens: more might not fit in memory.
    """
    *others, longest = sorted(range(len(lengths)), key=lengths.__getitem__)
    held = accumulate((lengths[index] for index in others), initial=lengths[longest])
    fitting = sum(size <= min(tokens_per_pack, ENOUGH) for size in held) - 1
    return [longest, *reversed(others[: max(1, fitting)])]


def pack(prompts: Sequence[Texts]) -> Pack:
    """One pack of the given prompts' texts; each has at least one."""
    # Prompt, text of it, tokens before the text's own: the first texts of all, then the others.
    parts = [(prompt, 0, 0) for prompt in range(len(prompts))]
    parts += [
        (prompt, text, texts.prefix)
        for prompt, texts in enumerate(prompts)
        for text in range(1, len(texts.ids))
    ]
    ids = [prompts[prompt].ids[text] for prompt, text, _ in parts]
    prefix = [before for _, _, before in parts]
    own = [len(text) - before for text, before in zip(ids, prefix, strict=True)]
    layout = Layout(own, own, prefix, [prompt for prompt, _, _ in parts])
    return Pack(
        in_a_row(np.asarray(text[before:]) for text, before in zip(ids, prefix, strict=True)),
        in_a_row(np.arange(before, len(text)) for text, before in zip(ids, prefix, strict=True)),
        layout,
        torch.tensor(sorted(range(len(parts)), key=parts.__getitem__)),
    )


def in_a_row(pieces: Iterable[npt.NDArray[Any]]) -> Tensor:
    """The pieces one after the other: [1, tokens], int64."""
    return torch.from_numpy(np.concatenate(list(pieces), dtype=np.int64))[None]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device.

    A copy from pageable memory waits until the GPU has done all that it was told; this one, from
    pinned memory, takes its turn.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
