"""How well rewards rank more than two answers to a prompt, as pure functions."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from reward.judging.metrics import Bools, Floats, Ints, Judged, accuracy, of_prompts


@dataclass(frozen=True)
class Ranking:
    """The answers to one prompt, and which of them people compared.

    `rewards` is [answers]. `chosen` and `rejected` are the indices of the two answers of each
    comparison, and `tied` is whether it is a tie, [comparisons].
    """

    rewards: Floats
    chosen: Ints
    rejected: Ints
    tied: Bools


def rankings(judged: Judged) -> dict[str, Any]:
    """Figures of the prompts with more than two answers that are not all tied.

    `accuracy` is over their pairs. All others are means over the prompts, with intervals. Without
    such prompts, the result has only their number.
    """
    several = np.bincount(judged.answers.prompts) > 2
    decided = np.bincount(judged.prompts, ~judged.tied) > 0
    kept = judged.take((several & decided)[judged.prompts])
    if not len(kept):
        return {"prompts": 0}
    found = list(by_prompt(kept))
    best = [each for each in map(best_of_n, found) if each]
    return {
        "answers": len(kept.answers.rewards),
        **accuracy(kept),
        "best_of_n": of_prompts(np.array([share for share, _ in best]))
        | {"chance": float(np.mean([chance for _, chance in best]))}
        if best
        else {"prompts": 0},
        "kendall_tau": of_prompts(np.array([*map(kendall_tau, found)]), least=-1.0),
        "ndcg": of_prompts(np.array([*map(ndcg, found)])),
    }


def by_prompt(judged: Judged) -> Iterator[Ranking]:
    """The rankings of all prompts, in the order of their numbers."""
    answers = judged.answers
    order = np.argsort(judged.prompts, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(judged.prompts[order])) + 1):
        first, end = np.searchsorted(answers.prompts, judged.prompts[rows[0]] + np.arange(2))
        yield Ranking(
            answers.rewards[first:end],
            answers.chosen[rows] - first,
            answers.rejected[rows] - first,
            judged.tied[rows],
        )


def best_of_n(ranking: Ranking) -> tuple[float, float] | None:
    """Whether the answer with the highest reward is a best one, and the probability by chance.

    A best answer is one to which no other is preferred. If several answers have the highest reward,
    the result is the share of best ones among them. It is None if another answer is preferred to
    each, as in a cycle.
    """
    best = np.ones(len(ranking.rewards), dtype=bool)
    best[ranking.rejected[~ranking.tied]] = False
    if not best.any():
        return None
    highest = ranking.rewards == ranking.rewards.max()
    return float(best[highest].mean()), float(best.mean())


def kendall_tau(ranking: Ranking) -> float:
    """Kendall's tau-b (1945) of rewards and preferences, over the compared pairs.

    0 if all rewards are equal.
    """
    sign = np.sign(ranking.rewards[ranking.chosen] - ranking.rewards[ranking.rejected])
    apart = np.count_nonzero(~ranking.tied) * np.count_nonzero(sign)
    return float(sign[~ranking.tied].sum() / np.sqrt(apart)) if apart else 0.0


def ndcg(ranking: Ranking) -> float:
    """The normalized discounted cumulative gain (Järvelin and Kekäläinen 2002) of the ranking.

    The gain of an answer is the number of comparisons it won, a tie counting half. Answers with
    equal rewards share their places.
    """
    count, tied = len(ranking.rewards), ranking.tied
    gain = np.bincount(ranking.chosen, np.where(tied, 0.5, 1.0), count)
    gain += np.bincount(ranking.rejected, np.where(tied, 0.5, 0.0), count)
    discount = 1 / np.log2(np.arange(count) + 2)
    _, group, size = np.unique(-ranking.rewards, return_inverse=True, return_counts=True)
    shared = np.add.reduceat(discount, np.cumsum(size) - size) / size
    return float(gain @ shared[group] / (np.sort(gain)[::-1] @ discount))
