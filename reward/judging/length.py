"""Whether a reward model prefers answers for their length, as pure functions."""

from dataclasses import replace
from typing import Any

import numpy as np
from scipy import stats

from reward.judging.metrics import Figures, Floats, Ints, Judged, accuracy, half

# Parameters of Cleveland's LOWESS as in R: the share of the points in each local fit, and the
# number of repeated fits with less weight for outliers.
SHARE, REWEIGHTINGS = 2 / 3, 3
# The most places at which a curve is fitted; between them it is linear.
PLACES = 100
# BLAS multiplies longer vectors in several threads. On a busy machine that takes ten times as long,
# and the last digits depend on the number of threads.
LONGEST = 10_000


def length_audit(judged: Judged, seed: int) -> dict[str, Any]:
    """Whether the model prefers answers for their length. Ties are left out.

    `longer_accuracy` is the accuracy of preferring the longer answer. `adjusted` is the result
    after the effect of length is removed from the rewards.
    """
    decided = judged.decided()
    return {
        "longer_accuracy": float(np.heaviside(decided.longer.astype(float), 0.5).mean()),
        "correlation": correlation(decided),
        "chosen_longer": accuracy(decided.take(decided.longer > 0)),
        "chosen_shorter": accuracy(decided.take(decided.longer < 0)),
        "equal": accuracy(decided.take(decided.longer == 0)),
        "adjusted": adjusted_audit(judged, seed),
    }


def correlation(judged: Judged) -> float | None:
    """Spearman's rank correlation (1904) of reward and length within pairs.

    It is taken over the differences between the two answers, which do not depend on the prompt.
    None if one of the two is constant.
    """
    difference = judged.tokens_chosen - judged.tokens_rejected
    rewards = np.concatenate([judged.margin, -judged.margin])
    tokens = np.concatenate([difference, -difference])
    varied = len(np.unique(rewards)) > 1 and len(np.unique(tokens)) > 1
    return float(stats.spearmanr(rewards, tokens).statistic) if varied else None


def by_length_difference(judged: Judged, groups: int = 8) -> list[Figures]:
    """Accuracy in groups of similar length difference, chosen minus rejected, in tokens."""
    judged = judged.decided()
    difference = judged.tokens_chosen - judged.tokens_rejected
    inner = np.quantile(difference, np.linspace(0, 1, groups + 1)[1:-1])
    group_of = np.searchsorted(inner, difference, side="right")
    return [
        {"difference": float(np.median(difference[group_of == group]))}
        | accuracy(judged.take(group_of == group))
        for group in np.unique(group_of)
    ]


# --- the effect of length removed ------------------------------------------------------------


def adjusted_audit(judged: Judged, seed: int) -> dict[str, Any]:
    """Accuracy and correlation with length after its effect is removed from the rewards.

    If there is only one prompt, the result has only `pairs`, which is 0.
    """
    if len(np.unique(judged.prompts)) < 2:
        return {"pairs": 0}
    answers, rewards = judged.answers, adjusted(judged, seed)
    left = replace(judged, chosen=rewards[answers.chosen], rejected=rewards[answers.rejected])
    return {**accuracy(left), "correlation": correlation(left.decided())}


def adjusted(judged: Judged, seed: int) -> Floats:
    """The reward of each answer minus the mean reward at its length: [answers].

    LOWESS estimates that mean (Huang et al. 2024, "Post-hoc Reward Calibration: A Case Study on
    Length Bias"). The mean for each half of the prompts is estimated from the other half, so that
    no answer influences what is subtracted from it. There must be at least two prompts.
    """
    answers = judged.answers
    inside = half(answers.prompts, seed)
    result = answers.rewards.copy()
    for part in (inside, ~inside):
        result[part] -= lowess(answers.tokens[~part], answers.rewards[~part], answers.tokens[part])
    return result


def length_curve(judged: Judged, seed: int) -> list[Figures]:
    """The mean reward at each answer length, with and without the effect of length.

    If the effect was removed well, the second curve is flat. A single prompt has no curve.
    """
    if len(np.unique(judged.prompts)) < 2:
        return []
    answers = judged.answers
    places = places_of(answers.tokens)
    rewards, left = (
        lowess(answers.tokens, values, places)
        for values in (answers.rewards, adjusted(judged, seed))
    )
    return [
        {"tokens": int(place), "reward": float(reward), "adjusted": float(rest)}
        for place, reward, rest in zip(places, rewards, left, strict=True)
    ]


def lowess(x: Ints, y: Floats, at: Ints) -> Floats:
    """Locally weighted regression of y on x, [points], evaluated at the values `at`, [places].

    Cleveland 1979, "Robust locally weighted regression and smoothing scatterplots": a straight line
    at each place, fitted to the nearest SHARE of the points with tricube weights. Outliers lose
    weight (bisquare) in REWEIGHTINGS repeated fits. Outside the points the curve is constant.
    """
    places = places_of(x)
    weights = np.ones(len(x))
    for _ in range(REWEIGHTINGS):
        curve = np.array([local_mean(x, y, weights, place) for place in places])
        off = np.abs(y - np.interp(x, places, curve))
        scale = 6 * np.median(off)
        # If half of the points are on the curve, the scale is 0 and defines no outliers.
        if scale < 1e-7 * off.mean() or not scale:
            break
        weights = np.square(1 - np.square(np.minimum(off / scale, 1)))
    curve = np.array([local_mean(x, y, weights, place) for place in places])
    return np.interp(at, places, curve)


def places_of(x: Ints) -> Ints:
    """Where a curve over x is fitted: at all values of x, or at PLACES of its quantiles."""
    values = np.unique(x)
    if len(values) <= PLACES:
        return values
    return np.unique(np.quantile(x, np.linspace(0, 1, PLACES), method="nearest"))


def local_mean(x: Ints, y: Floats, weights: Floats, place: int) -> float:
    """The value at a place of the line fitted to the points around it."""
    distance = np.abs(x - place)
    count = max(1, int(SHARE * len(x) + 1e-7))
    reach = np.partition(distance, count - 1)[count - 1]
    near = (distance == 0).astype(float)
    if reach:
        near = (1 - np.minimum(distance / reach, 1) ** 3) ** 3
    # If all points around the place are outliers, there is nothing better to use.
    near = near * weights if (near * weights).any() else near
    near /= near.sum()
    center, mean = dot(near, x), dot(near, y)
    variance = dot(near, np.square(x - center))
    if not np.ptp(x) or np.sqrt(variance) <= 1e-3 * np.ptp(x):
        return float(mean)
    slope = dot(near, (x - center) * y) / variance
    return float(mean + slope * (place - center))


def dot(one: Floats, other: Floats | Ints) -> float:
    """The scalar product, as the sum of those of parts with at most LONGEST values."""
    parts = (slice(start, start + LONGEST) for start in range(0, len(one), LONGEST))
    return float(sum(one[part] @ other[part] for part in parts))
