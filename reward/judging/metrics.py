"""What the rewards of compared answers say about a reward model, as pure functions.

All shapes are [comparisons]. A comparison is judged by its margin m = r_chosen - r_rejected, and
P(chosen is preferred) = sigmoid(m) (Bradley and Terry 1952). Equal rewards count as half correct. A
tie, where people prefer neither answer, is never correct or wrong.
"""

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

from reward.data.columns import TIE

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Figures = dict[str, float]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CONFIDENCE_BINS = 10
# The range in which the best temperature is searched for, relative to the mean |margin|.
COLDEST, HOTTEST = 1e-3, 1e3


@dataclass(frozen=True)
class Answers:
    """The compared answers, without repeats. Shapes [answers].

    `tokens` is the length without the shared prefix of the prompt's comparisons. `chosen` and
    `rejected` are the indices of the two answers of every comparison, [comparisons].
    """

    rewards: Floats
    tokens: Ints
    prompts: Ints
    chosen: Ints
    rejected: Ints


@dataclass(frozen=True)
class Judged:
    """Comparisons of two answers to a prompt. The chosen answer is never the worse one.

    `preference` is the probability that chosen is preferred, from 0.5, a tie, to 1. `prompts` are
    the numbers of the prompts, from 0. `answer_chosen` and `answer_rejected` are the numbers of the
    answers to a prompt. Lengths are in tokens. `prefix` is the length, including the prompt, of
    what both answers begin with in every comparison of the prompt.
    """

    chosen: Floats
    rejected: Floats
    tokens_chosen: Ints
    tokens_rejected: Ints
    prefix: Ints
    preference: Floats
    answer_chosen: Ints
    answer_rejected: Ints
    prompts: Ints

    @cached_property
    def margin(self) -> Floats:
        return self.chosen - self.rejected

    @cached_property
    def correct(self) -> Floats:
        return correct(self.margin)

    @cached_property
    def longer(self) -> Ints:
        """1 if the chosen answer is longer, -1 if it is shorter, else 0."""
        return np.sign(self.tokens_chosen - self.tokens_rejected)

    @cached_property
    def tied(self) -> Bools:
        return self.preference == TIE

    @cached_property
    def answers(self) -> Answers:
        prompts = np.concatenate([self.prompts, self.prompts])
        numbers = np.concatenate([self.answer_chosen, self.answer_rejected])
        key = prompts * (numbers.max(initial=0) + 1) + numbers
        _, first, place = np.unique(key, return_index=True, return_inverse=True)
        chosen, rejected = np.split(place, 2)
        tokens = np.concatenate(
            [self.tokens_chosen - self.prefix, self.tokens_rejected - self.prefix]
        )
        rewards = np.concatenate([self.chosen, self.rejected])
        return Answers(rewards[first], tokens[first], prompts[first], chosen, rejected)

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, rows: npt.NDArray[Any]) -> "Judged":
        return Judged(*(getattr(self, field.name)[rows] for field in fields(self)))

    def decided(self) -> "Judged":
        """The comparisons that are not ties."""
        return self.take(~self.tied)


# --- intervals -------------------------------------------------------------------------------


def interval(shares: Floats, prompts: Ints) -> tuple[float, float]:
    """95% interval of the mean of values from 0 to 1, each from a pair of the given prompt.

    Pairs of one prompt are not independent draws, so the sample is the prompts, not the pairs. This
    is the score interval (Wilson 1927) of the number of independent draws with the variance that is
    found between prompts (Korn and Graubard 1998), with quantiles of Student's t.

    That variance says too little if almost all prompts are alike, so the interval reaches at least
    to the bound of `unanimous`. A single prompt has the interval from 0 to 1.
    """
    _, group_of = np.unique(prompts, return_inverse=True)
    pairs, share = np.bincount(group_of), float(shares.mean())
    count = len(pairs)
    if count < 2:
        return 0.0, 1.0
    off = np.bincount(group_of, weights=shares - share)
    variance = np.square(off).sum() / pairs.sum() ** 2 * count / (count - 1)
    of_one_draw = share * (1 - share)
    quantile = stats.t.ppf(0.975, max(effective_count(prompts) - 1, 1))
    # The square of the quantile over the number of independent draws.
    z = float(quantile**2 * variance / of_one_draw) if of_one_draw else 0.0
    center, half_width = share + z / 2, math.sqrt(of_one_draw * z + (z / 2) ** 2)
    low, high = (center - half_width) / (1 + z), (center + half_width) / (1 + z)
    bound = unanimous(prompts)
    return max(0.0, min(low, bound)), min(1.0, max(high, 1 - bound))


def unanimous(prompts: Ints) -> float:
    """The lower bound of the 95% interval of a share of 1: exact (Clopper and Pearson 1934)."""
    return float(0.025 ** (1 / effective_count(prompts)))


def effective_count(prompts: Ints) -> float:
    """How many prompts of equal size would say as much as those of the pairs (Kish 1965)."""
    _, pairs = np.unique(prompts, return_counts=True)
    return float(pairs.sum() ** 2 / np.square(pairs).sum())


def of_prompts(values: Floats, least: float = 0.0) -> Figures:
    """Mean, with its interval, of one value per prompt, from `least` to 1."""
    width = 1 - least
    bounds = interval((values - least) / width, np.arange(len(values)))
    low, high = (least + width * bound for bound in bounds)
    return {"mean": float(values.mean()), "low": low, "high": high, "prompts": len(values)}


def accuracy(judged: Judged) -> Figures:
    """Accuracy with its interval, and the numbers of pairs and prompts. Ties are left out.

    Without pairs, the result has only their number.
    """
    judged = judged.decided()
    if not len(judged):
        return {"pairs": 0}
    low, high = interval(judged.correct, judged.prompts)
    return {
        "accuracy": float(judged.correct.mean()),
        "low": low,
        "high": high,
        "pairs": len(judged),
        "prompts": len(np.unique(judged.prompts)),
    }


# --- basic figures ---------------------------------------------------------------------------


def correct(margin: Floats) -> Floats:
    """1 if the chosen answer has the higher reward, 0 if the lower, 0.5 for equal rewards."""
    return np.heaviside(margin, 0.5)


def losses(margin: Floats, preference: Floats | float = 1.0) -> Floats:
    """The cross-entropy -p log sigmoid(m) - (1 - p) log sigmoid(-m) of preferences p.

    For a certain preference it is -log sigmoid(m) (Ouyang et al. 2022, equation 1).
    """
    likelihood = preference * special.log_expit(margin)
    return -(likelihood + (1 - preference) * special.log_expit(-margin))


def spread(values: Floats) -> Figures:
    """Mean, population standard deviation and quantiles."""
    found = np.quantile(values, QUANTILES).tolist()
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        **{f"q{100 * share:02.0f}": value for share, value in zip(QUANTILES, found, strict=True)},
    }


# --- calibration -----------------------------------------------------------------------------


def calibration(judged: Judged, seed: int) -> dict[str, float | None]:
    """How far the probabilities can be trusted, and the temperature that corrects them.

    All but `expected_error` include ties, whose preference is one half. `temperature` is fitted on
    all pairs. `loss_at_temperature` is the loss of each half of the prompts at the temperature
    fitted on the other half. Each of the two is None if no finite temperature is best.
    """
    inside = half(judged.prompts, seed)
    halves = judged.take(inside), judged.take(~inside)
    first, second = map(temperature, halves)
    crossed = None
    if first is not None and second is not None:
        scaled = np.concatenate([halves[0].margin / second, halves[1].margin / first])
        preference = np.concatenate([each.preference for each in halves])
        crossed = float(losses(scaled, preference).mean())
    return {
        "expected_error": expected_calibration_error(judged.decided()),
        "brier": brier(judged),
        "temperature": temperature(judged),
        "loss_at_temperature": crossed,
    }


def half(prompts: Ints, seed: int) -> Bools:
    """Which rows belong to a random half of the prompts."""
    names = np.unique(prompts)
    return np.isin(prompts, np.random.default_rng(seed).permutation(names)[: len(names) // 2])


def reliability(judged: Judged) -> list[Figures]:
    """Mean confidence, accuracy and number of pairs of each confidence bin that has pairs.

    Confidence is the probability of the answer that the model prefers, from 0.5 to 1. Accuracy is
    the mean preference for that answer. If all preferences are certain, that is the share of
    correct pairs.
    """
    confidence = special.expit(np.abs(judged.margin))
    right = 0.5 + (judged.correct - 0.5) * (2 * judged.preference - 1)
    # A confidence of 1 belongs to the last bin.
    bins = np.minimum(((confidence - 0.5) * 2 * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    return [
        {
            "confidence": float(confidence[bins == index].mean()),
            "accuracy": float(right[bins == index].mean()),
            "pairs": int((bins == index).sum()),
        }
        for index in np.unique(bins).tolist()
    ]


def expected_calibration_error(judged: Judged) -> float:
    """Mean |accuracy - confidence| over the bins, weighted by pairs (Guo et al. 2017)."""
    return sum(
        each["pairs"] / len(judged) * abs(each["accuracy"] - each["confidence"])
        for each in reliability(judged)
    )


def brier(judged: Judged) -> float:
    """Mean square of preference - P(chosen is preferred) (Brier 1950)."""
    # p - sigmoid(m), without cancellation when both are near 1.
    error = judged.preference * special.expit(-judged.margin)
    error -= (1 - judged.preference) * special.expit(judged.margin)
    return float(np.square(error).mean())


def temperature(judged: Judged) -> float | None:
    """The T that minimizes the mean loss of margins / T (Guo et al. 2017, section 4.2).

    The loss is convex in 1 / T. If no margin contradicts a vote, the loss falls as T goes to 0. If
    margins and votes disagree on average, it falls as T grows without limit. In both cases the
    result is None, and also if T is outside the range that is searched, which is relative to the
    mean |margin|.
    """
    margin, preference = judged.margin, judged.preference
    against = (margin < 0) | ((margin > 0) & (preference < 1))
    if not against.any() or not ((2 * preference - 1) * margin).mean() > 0:
        return None
    size = np.abs(margin).mean()
    result = optimize.minimize_scalar(
        lambda logarithm: losses(margin / size / np.exp(logarithm), preference).mean(),
        bounds=(np.log(COLDEST), np.log(HOTTEST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    found = float(np.exp(result.x))
    return found * float(size) if COLDEST * 1.001 < found < HOTTEST / 1.001 else None


# --- ties ------------------------------------------------------------------------------------


def ties(judged: Judged) -> dict[str, Any]:
    """How far apart the rewards of tied answers are, compared with those of other pairs.

    `margin` and `margin_of_others` are the spreads of |margin|. `area` is the area under the ROC
    curve of |margin| as a score for "this is not a tie" (Mann and Whitney 1947). It is 1 if every
    tie has a smaller |margin| than all other pairs, and 0.5 if |margin| says nothing about ties.
    Without ties, or without other pairs, the result has only the number of ties.
    """
    size = np.abs(judged.margin)
    on_ties, on_others = size[judged.tied], size[~judged.tied]
    if not len(on_ties) or not len(on_others):
        return {"pairs": len(on_ties)}
    larger = stats.mannwhitneyu(on_others, on_ties).statistic
    return {
        "pairs": len(on_ties),
        "area": float(larger / len(on_ties) / len(on_others)),
        "margin": spread(on_ties),
        "margin_of_others": spread(on_others),
    }


# --- curves ----------------------------------------------------------------------------------


def roc(judged: Judged, points: int = 200) -> list[Figures]:
    """The ROC curve of rewards as scores for "this is a chosen answer", at most `points` points.

    Fawcett 2006, algorithm 1.
    """
    scores = np.concatenate([judged.chosen, judged.rejected])
    good = np.concatenate([np.ones(len(judged)), np.zeros(len(judged))])
    order = np.argsort(-scores, kind="stable")
    # The last of each run of equal scores. NaN differs from every score, so the end counts, too.
    last = np.flatnonzero(np.diff(scores[order], append=np.nan))
    true = np.concatenate([[0.0], np.cumsum(good[order])[last] / len(judged)])
    false = np.concatenate([[0.0], np.cumsum(1 - good[order])[last] / len(judged)])
    kept = np.unique(np.linspace(0, len(true) - 1, points).round().astype(int))
    return [
        {"false_positives": float(false[index]), "true_positives": float(true[index])}
        for index in kept
    ]


def histogram(margin: Floats, bins: int = 30) -> list[Figures]:
    """Pairs by margin, in bins of equal width. `margin` is the middle of the bin.

    `density` is the share of the pairs per unit of margin, so runs with different spreads can be
    drawn on one scale. The first and the last bin are empty.
    """
    counts, edges = np.histogram(margin, bins=bins)
    width = edges[1] - edges[0]
    middles = edges[0] + width * (np.arange(-1, bins + 1) + 0.5)
    # At least four, and more if the bins are so narrow that they would look alike.
    digits = max(4, 2 - math.floor(math.log10(width)))
    return [
        {
            "margin": round(float(middle), digits),
            "density": count / (len(margin) * width),
            "pairs": count,
        }
        for middle, count in zip(middles, [0, *counts.tolist(), 0], strict=True)
    ]
