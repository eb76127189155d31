"""What needs all records at once: duplicates, contradictions, votes, and the split by prompt.

Here, a record is a few 64-bit hashes, so millions of records fit in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from reward.data.columns import TIE
from reward.data.records import DECIMALS, Messages, hash64
from reward.data.transcripts import prompt_ends

Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.integer]
Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

PORTIONS = 64


def among(values: Hashes, known: Hashes) -> Flags:
    """Which of the values are among the known ones. Shape [values]."""
    known = np.sort(known)
    left, right = (np.searchsorted(known, values, side) for side in ("left", "right"))
    return np.asarray(left != right)


def combined(*parts: Hashes) -> Hashes:
    """Combine hashes into one that depends on their order, with the finalizer of splitmix64.

    Steele et al. 2014. All shapes are the same.
    """
    found = np.zeros_like(parts[0])
    for part in parts:
        found = found * np.uint64(0x9E3779B97F4A7C15) + part
        found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found ^= found >> np.uint64(31)
    return found


def duplicates(pairs: Hashes) -> Flags:
    """Which records repeat an earlier one. Shape [records] in and out."""
    order = np.argsort(pairs, kind="stable")
    repeated = np.zeros(len(pairs), dtype=bool)
    repeated[order[1:]] = pairs[order[1:]] == pairs[order[:-1]]
    return repeated


def mixed(groups: Hashes, members: Hashes) -> Flags:
    """Which records belong to a group whose members differ. Shapes [records]."""
    order = np.lexsort((members, groups))
    left, right = order[:-1], order[1:]
    differ = (groups[left] == groups[right]) & (members[left] != members[right])
    return among(groups, groups[right[differ]])


def contradictions(verdicts: Hashes, answers: Hashes) -> Flags:
    """Which records contradict another one: the same prompt and answers with a different verdict.

    Shapes [records]. All records of a contradiction count, because no one knows which is right.
    """
    return mixed(answers, verdicts)


class Ballots(NamedTuple):
    """The verdict of each record on its two answers. Shapes [records].

    `answers` are equal for the same prompt and the same two answers in either order, and `verdicts`
    for the same preference between them. `first` is the probability that the answer with the
    smaller hash is preferred.
    """

    answers: Hashes
    verdicts: Hashes
    first: Floats
    weight: Floats
    margin: Floats


class Votes(NamedTuple):
    """Which records are votes on a common pair, and what becomes of them.

    `cast` are the votes, and `merged` those of them that are merged into another one: [records].
    `rows` are the records that they are merged into, followed by their new grades: [pairs].
    """

    cast: Flags
    merged: Flags
    rows: Indices
    preference: Floats
    weight: Floats
    margin: Floats


def count_votes(ballots: Ballots, columns: Hashes) -> Votes:
    """Merge records with the same prompt and the same two answers that differ in another column.

    These are several annotators' votes on one pair. The first record of the majority represents all
    of them. Its preference is the share of the total weight that prefers its answer, its weight is
    the mean weight, and its margin is the mean margin, by weight, or 0 if anyone disagrees. Records
    with equal verdicts and equal `columns` are a single vote. `columns` are hashes: [records].
    """
    answers, verdicts, first, weight, margin = ballots
    _, group, size = np.unique(answers, return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    starts = np.cumsum(size) - size

    def each(reduce: np.ufunc, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A reduction over each record's group: [records]."""
        return np.asarray(reduce.reduceat(values[order], starts)[group])

    cast = each(np.minimum, columns) != each(np.maximum, columns)
    is_new = ~duplicates(combined(verdicts, columns))
    counted = weight * is_new
    for_first, for_second = each(np.add, counted * first), each(np.add, counted * (1 - first))
    total = for_first + for_second
    share = np.round(for_first / total, DECIMALS)
    preference = np.round(np.maximum(share, 1 - share), DECIMALS)
    fits = (share == TIE) | ((first > TIE) == (share > TIE)) & (first != TIE)
    rows = np.arange(len(answers))
    stays = rows == each(np.minimum, np.where(fits, rows, len(answers)))
    agreed = np.where(preference == 1, each(np.add, counted * margin) / total, 0)
    weight = total / each(np.add, is_new.astype(np.int64))
    kept = np.flatnonzero(cast & stays)
    return Votes(cast, cast & ~stays, kept, preference[kept], weight[kept], agreed[kept])


def number_answers(prompts: Hashes, answers: Hashes) -> Indices:
    """Number the answers to each prompt 0, 1, ... in the order in which they appear.

    Equal hashes mean the same prompt and, within a prompt, the same answer. Shapes [comparisons]
    and [comparisons, 2], like that of the numbers.
    """
    prompt = np.repeat(prompts, 2)
    keys = combined(prompt, answers.ravel())
    order = np.argsort(keys, kind="stable")
    is_new = np.ones(len(keys), dtype=bool)
    is_new[1:] = keys[order[1:]] != keys[order[:-1]]
    # Where each answer first appears. Counting these places within a prompt numbers its answers.
    first = np.sort(order[is_new])
    by_prompt = np.argsort(prompt[first], kind="stable")
    _, sizes = np.unique_counts(prompt[first])
    number = np.zeros(len(keys), dtype=np.int32)
    number[first[by_prompt]] = places_within(sizes)
    number[order] = number[order[is_new]][np.cumsum(is_new) - 1]
    return number.reshape(-1, 2)


def first_places(prompts: Hashes, numbers: Indices) -> Indices:
    """The flat indices into `numbers` at which each answer first appears: [answers].

    They are in the order of prompts and, within a prompt, of numbers. `prompts` is [comparisons]
    and `numbers` is from `number_answers`.
    """
    prompt, number = np.repeat(prompts, 2), numbers.ravel()
    order = np.lexsort((number, prompt))
    left, right = order[:-1], order[1:]
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (number[left] != number[right]) | (prompt[left] != prompt[right])
    first = order[is_new]
    # A prompt first appears with its answer 0.
    begins = number[first] == 0
    return first[np.argsort(first[begins][np.cumsum(begins) - 1], kind="stable")]


def places_within(sizes: Indices) -> Indices:
    """0, 1, ... for each group, one group after another, given the sizes of the groups."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def portions(prompts: Hashes, selected: Flags) -> Iterator[Indices]:
    """The indices of the selected records in PORTIONS portions; those of a prompt are in one.

    What compares the records of a prompt takes less memory for one portion after another.
    """
    portion = np.ascontiguousarray(prompts).view(np.uint8)[:: prompts.itemsize] % PORTIONS
    for each in range(PORTIONS):
        yield np.flatnonzero(selected & (portion == each))


def beginnings(prompt: Messages) -> list[int]:
    """The hashes of all prompts that this one continues, shortest first.

    Each equals the `prompt_hash` of a record with that prompt. The last message may itself be a
    text in turns.
    """
    *before, (role, text, *parts) = prompt
    found = [prompt[:end] for end in range(1, len(prompt))]
    found += [(*before, (role, text[:end], *parts)) for end in prompt_ends(text)]
    return [hash64([each]) for each in found]


@dataclass(frozen=True)
class Prompts:
    """The prompts of some records, as hashes.

    `own` is the prompt of each record: [records]. `begun` are the beginnings of all prompts, and
    `owner` the index of the record that each belongs to: [beginnings].
    """

    own: Hashes
    owner: Indices
    begun: Hashes

    def take(self, rows: Flags) -> "Prompts":
        """The prompts of the records selected by `rows`: [records]."""
        kept = rows[self.owner]
        return Prompts(self.own[rows], (np.cumsum(rows) - 1)[self.owner[kept]], self.begun[kept])

    def shared_with(self, others: "Prompts") -> Flags:
        """Which of these equal, begin or continue one of the others: [records]."""
        found = among(self.own, np.concatenate([others.own, others.begun]))
        found[self.owner[among(self.begun, others.own)]] = True
        return found

    @property
    def families(self) -> Hashes:
        """The family of every record: [records]. A prompt and those that continue it are a family.

        A dialogue that continues an earlier record shares its first turns, so both must be in the
        same split. All prompts of a family begin with its shortest one, which therefore identifies
        the family.
        """
        known = among(self.begun, self.own)
        members, first = np.unique(self.owner[known], return_index=True)
        found = self.own.copy()
        found[members] = self.begun[known][first]
        return found


def split(prompts: Hashes, validation: float, test: float, seed: int) -> npt.NDArray[np.int8]:
    """0 for train, 1 for validation, 2 for test, the same for all records of a prompt.

    Each share of prompts is as close as possible to the requested one, with at least one prompt if
    the share is above 0. A prompt's rank is a hash of it and the seed, so the order of records does
    not matter.
    """
    # np.unique and np.isin use hash tables, which take several times the memory and time of
    # sorting.
    unique = np.unique_counts(prompts).values
    ranks = np.fromiter((hash64([seed, int(prompt)]) for prompt in unique), np.uint64, len(unique))
    sizes = [max(1, round(share * len(unique))) if share else 0 for share in (test, validation)]
    parts = np.zeros(len(unique), dtype=np.int8)
    order = np.argsort(ranks, kind="stable")
    parts[order[: sizes[0]]] = 2
    parts[order[sizes[0] : sum(sizes)]] = 1
    return np.asarray(parts[np.searchsorted(unique, prompts)])
