"""All records together: which repeat or contradict others, and how prompts are split.

A record is a few 64-bit hashes here, so that millions of them fit in memory.
"""

import numpy as np
import numpy.typing as npt

from reward.data.records import hash64

Hashes = npt.NDArray[np.uint64]


def among(values: Hashes, known: Hashes) -> npt.NDArray[np.bool_]:
    """Which of the values stand among the known ones. Shape [values]."""
    known = np.sort(known)
    left, right = (np.searchsorted(known, values, side) for side in ("left", "right"))
    return np.asarray(left != right)


def duplicates(pairs: Hashes) -> npt.NDArray[np.bool_]:
    """Which records repeat an earlier one. Shape [records] in and out."""
    order = np.argsort(pairs, kind="stable")
    repeated = np.zeros(len(pairs), dtype=bool)
    repeated[order[1:]] = pairs[order[1:]] == pairs[order[:-1]]
    return repeated


def contradictions(pairs: Hashes, answers: Hashes) -> npt.NDArray[np.bool_]:
    """Which records another one contradicts: same prompt and answers, chosen the other way round.

    Shapes [records]. Every record of a contradiction is named, for nothing tells which is right.
    """
    order = np.lexsort((pairs, answers))
    left, right = order[:-1], order[1:]
    mixed = (answers[left] == answers[right]) & (pairs[left] != pairs[right])
    return among(answers, answers[right[mixed]])


def split(prompts: Hashes, validation: float, test: float, seed: int) -> npt.NDArray[np.int8]:
    """0 for train, 1 for validation, 2 for test, the same for all records of a prompt.

    The share of prompts is the nearest to the one asked for, at least one prompt where the share
    is above 0. A prompt's rank is a hash of it and the seed, so the order of records is nothing.
    """
    # np.unique and np.isin hash, which takes several times the memory and the time of sorting.
    unique = np.unique_counts(prompts).values
    ranks = np.fromiter((hash64([seed, int(prompt)]) for prompt in unique), np.uint64, len(unique))
    sizes = [max(1, round(share * len(unique))) if share else 0 for share in (test, validation)]
    parts = np.zeros(len(unique), dtype=np.int8)
    order = np.argsort(ranks, kind="stable")
    parts[order[: sizes[0]]] = 2
    parts[order[sizes[0] : sum(sizes)]] = 1
    return np.asarray(parts[np.searchsorted(unique, prompts)])
