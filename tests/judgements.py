"""Judgements for tests of metrics: single pairs, and several answers to a prompt."""

from collections.abc import Sequence

import numpy as np

from reward.judging.metrics import Floats, Ints, Judged

Comparison = tuple[int, int, float]


def pairs(
    chosen: Floats,
    rejected: Floats,
    tokens: tuple[Ints, Ints] | None = None,
    prompts: Ints | None = None,
    preference: Floats | None = None,
) -> Judged:
    """Pairs of distinct answers, by default each with its own prompt and all of one length."""
    count = len(chosen)
    ones: Ints = np.ones(count, dtype=np.int64)
    numbers = np.arange(count)
    return Judged(
        chosen,
        rejected,
        *(tokens or (ones, ones)),
        0 * ones,
        np.ones(count) if preference is None else preference,
        2 * numbers,
        2 * numbers + 1,
        numbers if prompts is None else prompts,
    )


def answered(prompts: Sequence[tuple[Sequence[float], Sequence[Comparison]]]) -> Judged:
    """Judgements from each prompt's rewards and its comparisons (better, worse, preference)."""
    rows = [
        (rewards[j], rewards[k], preference, j, k, prompt)
        for prompt, (rewards, compared) in enumerate(prompts)
        for j, k, preference in compared
    ]
    chosen, rejected, preference, j, k, prompt = map(np.array, zip(*rows, strict=True))
    ones: Ints = np.ones(len(rows), dtype=np.int64)
    return Judged(
        chosen.astype(float), rejected.astype(float), ones, ones, 0 * ones, preference, j, k, prompt
    )
