"""Whether a reward model likes an answer, or its length, as pure functions."""

from dataclasses import replace
from typing import Any

import numpy as np
from scipy import stats

from reward.judging.metrics import Figures, Floats, Ints, Judged, Resampling, half

# Of Cleveland's LOWESS, as in R: the share of the points that a fit is of, and how often points
# that are far off lose weight.
SHARE, REWEIGHTINGS = 2 / 3, 3
# How many places a curve is fitted at; between them it is a straight line.
PLACES = 100


def length_audit(judged: Judged, resampling: Resampling) -> dict[str, Any]:
    """Whether the model likes an answer, or its length. Ties are left out.

    `longer_accuracy` is that of preferring the longer answer. `adjusted` is what is left when
    length is taken out of the rewards.
    """
    decided = judged.decided()
    return {
        "longer_accuracy": float(np.heaviside(decided.longer.astype(float), 0.5).mean()),
        "correlation": correlation(decided),
        "chosen_longer": resampling.accuracy(decided.take(decided.longer > 0)),
        "chosen_shorter": resampling.accuracy(decided.take(decided.longer < 0)),
        "equal": resampling.accuracy(decided.take(decided.longer == 0)),
        "adjusted": adjusted_audit(judged, resampling),
    }


def correlation(judged: Judged) -> float | None:
    """Spearman's rank correlation (1904) of reward and length within pairs.

    It is that of their differences between an answer and the other one, in which the prompt has no
    part. None where one of them is constant.
    """
    difference = judged.tokens_chosen - judged.tokens_rejected
    rewards = np.concatenate([judged.margin, -judged.margin])
    tokens = np.concatenate([difference, -difference])
    varied = len(np.unique(rewards)) > 1 and len(np.unique(tokens)) > 1
    return float(stats.spearmanr(rewards, tokens).statistic) if varied else None


def by_length_difference(judged: Judged, resampling: Resampling, groups: int = 8) -> list[Figures]:
    """Accuracy in groups of like difference of length, chosen less rejected, in tokens."""
    judged = judged.decided()
    difference = judged.tokens_chosen - judged.tokens_rejected
    edges = np.unique(np.quantile(difference, np.linspace(0, 1, groups + 1)))
    group_of = np.searchsorted(edges[1:-1], difference, side="right")
    return [
        {"difference": float(np.median(difference[group_of == group]))}
        | resampling.accuracy(judged.take(group_of == group))
        for group in np.unique(group_of)
    ]


# --- length taken out ------------------------------------------------------------------------


def adjusted_audit(judged: Judged, resampling: Resampling) -> dict[str, Any]:
    """Accuracy and the correlation with length, when length is taken out of the rewards.

    Of a single prompt the number of pairs alone.
    """
    if len(np.unique(judged.prompts)) < 2:
        return {"pairs": 0}
    answers, rewards = judged.answers, adjusted(judged, resampling.seed)
    left = replace(judged, chosen=rewards[answers.chosen], rejected=rewards[answers.rejected])
    return {**resampling.accuracy(left), "correlation": correlation(left.decided())}


def adjusted(judged: Judged, seed: int) -> Floats:
    """The reward of each answer less what answers of its length have: [answers].

    The mean reward at a length is estimated by LOWESS (Huang et al. 2024, "Post-hoc Reward
    Calibration: A Case Study on Length Bias"), for each half of the prompts on the other half, so
    that no answer has a part in what is taken from it. There must be two prompts at least.
    """
    answers = judged.answers
    inside = half(answers.prompts, seed)
    result = answers.rewards.copy()
    for part in (inside, ~inside):
        result[part] -= lowess(answers.tokens[~part], answers.rewards[~part], answers.tokens[part])
    return result


def length_curve(judged: Judged, seed: int) -> list[Figures]:
    """The mean reward at each length of an answer, as it is and with length taken out.

    Where length was taken out well the second is flat. Of a single prompt there is no curve.
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
    """Locally weighted regression of y on x, at other x: [points], [points] and [places].

    Cleveland 1979, "Robust locally weighted regression and smoothing scatterplots": at each place a
    straight line by the nearest SHARE of the points, with tricube weights; points that are far off
    lose weight (bisquare) REWEIGHTINGS times. Outside of the points the curve is constant.
    """
    places = places_of(x)
    weights = np.ones(len(x))
    for _ in range(REWEIGHTINGS):
        curve = np.array([local_mean(x, y, weights, place) for place in places])
        off = np.abs(y - np.interp(x, places, curve))
        scale = 6 * np.median(off)
        # Where half of the points are on the curve, none is far off by a scale of its own.
        if scale < 1e-7 * off.mean() or not scale:
            break
        weights = np.square(1 - np.square(np.minimum(off / scale, 1)))
    curve = np.array([local_mean(x, y, weights, place) for place in places])
    return np.interp(at, places, curve)


def places_of(x: Ints) -> Ints:
    """Where a curve over x is fitted: at all of its values, or at PLACES of its quantiles."""
    values = np.unique(x)
    if len(values) <= PLACES:
        return values
    return np.unique(np.quantile(x, np.linspace(0, 1, PLACES), method="nearest"))


def local_mean(x: Ints, y: Floats, weights: Floats, place: int) -> float:
    """The value at a place of the line through the points around it."""
    distance = np.abs(x - place)
    count = max(1, int(SHARE * len(x) + 1e-7))
    reach = np.partition(distance, count - 1)[count - 1]
    near = (distance == 0).astype(float)
    if reach:
        near = (1 - np.minimum(distance / reach, 1) ** 3) ** 3
    # Where all points around it are far off, they are all that is known.
    near = near * weights if (near * weights).any() else near
    near /= near.sum()
    center, mean = near @ x, near @ y
    variance = near @ np.square(x - center)
    if np.sqrt(variance) <= 1e-3 * np.ptp(x):
        return float(mean)
    slope = near @ ((x - center) * y) / variance
    return float(mean + slope * (place - center))
