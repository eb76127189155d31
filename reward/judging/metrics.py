"""What the rewards of pairs say about a reward model, as pure functions. All shapes [pairs].

A pair is judged by its margin m = r_chosen - r_rejected, and P(chosen is preferred) = sigmoid(m)
(Bradley and Terry 1952). A tie counts as half right.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Figures = dict[str, float]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CONFIDENCE_BINS = 10
# What a best temperature is looked for between.
COLDEST, HOTTEST = 1e-3, 1e3


@dataclass(frozen=True)
class Judged:
    """Rewards and lengths of pairs; `prompts` numbers their prompts from 0, lengths in tokens."""

    chosen: Floats
    rejected: Floats
    tokens_chosen: Ints
    tokens_rejected: Ints
    prompts: Ints

    @cached_property
    def margin(self) -> Floats:
        return self.chosen - self.rejected

    @cached_property
    def correct(self) -> Floats:
        return correct(self.margin)

    @cached_property
    def longer(self) -> Ints:
        """1 where the chosen answer is the longer one, -1 where the shorter, else 0."""
        return np.sign(self.tokens_chosen - self.tokens_rejected)

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, rows: npt.NDArray[Any]) -> "Judged":
        return Judged(
            self.chosen[rows],
            self.rejected[rows],
            self.tokens_chosen[rows],
            self.tokens_rejected[rows],
            self.prompts[rows],
        )


@dataclass(frozen=True)
class Resampling:
    """How intervals come about: resamples of the prompts, from a seed."""

    samples: int
    seed: int

    def interval(self, values: Floats, prompts: Ints) -> tuple[float, float]:
        """95% interval of the mean: percentile bootstrap over prompts, not over pairs.

        Pairs of one prompt are no independent draws (Efron and Tibshirani 1993, chapter 8). There
        must be two prompts at least.
        """
        _, group_of = np.unique(prompts, return_inverse=True)
        pairs = np.bincount(group_of)
        result = stats.bootstrap(
            (np.bincount(group_of, weights=values), pairs),
            lambda sums, sizes, axis: sums.sum(axis=axis) / sizes.sum(axis=axis),
            paired=True,
            vectorized=True,
            n_resamples=self.samples,
            batch=max(1, 10_000_000 // len(pairs)),
            method="percentile",
            rng=np.random.default_rng(self.seed),
        ).confidence_interval
        return float(result.low), float(result.high)

    def interval_of_share(self, right: Floats, prompts: Ints) -> tuple[float, float]:
        """The same for values from 0 to 1, and no narrower than the number of prompts allows.

        Resamples of few values that are much alike say too little of those that were not seen: the
        interval reaches at least to the exact binomial bound of prompts that are all right, and of
        prompts that are all wrong (Clopper and Pearson 1934). A single prompt tells nothing.
        """
        count = len(np.unique(prompts))
        if count < 2:
            return 0.0, 1.0
        low, high = self.interval(right, prompts)
        bound = 0.025 ** (1 / count)
        return min(low, bound), max(high, 1 - bound)

    def accuracy(self, judged: Judged) -> Figures:
        """Accuracy with its interval, and what was judged; of no pairs their number alone."""
        if not len(judged):
            return {"pairs": 0}
        low, high = self.interval_of_share(judged.correct, judged.prompts)
        return {
            "accuracy": float(judged.correct.mean()),
            "low": low,
            "high": high,
            "pairs": len(judged),
            "prompts": len(np.unique(judged.prompts)),
        }


def correct(margin: Floats) -> Floats:
    """1 where the chosen answer has the higher reward, 0 where the lower, 0.5 at a tie."""
    return np.heaviside(margin, 0.5)


def losses(margin: Floats) -> Floats:
    """-log sigmoid(margin) (Ouyang et al. 2022, equation 1)."""
    return -special.log_expit(margin)


def spread(values: Floats) -> Figures:
    """Mean, population deviation and quantiles."""
    found = np.quantile(values, QUANTILES).tolist()
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        **{f"q{100 * share:02.0f}": value for share, value in zip(QUANTILES, found, strict=True)},
    }


# --- calibration -----------------------------------------------------------------------------


def calibration(judged: Judged, seed: int) -> dict[str, float | None]:
    """How far probabilities can be believed, and the temperature that mends them.

    `temperature` is fitted on all pairs. `loss_at_temperature` is the loss of each half of the
    prompts at the temperature of the other. None where no finite temperature is best.
    """
    prompts = np.unique(judged.prompts)
    drawn = np.random.default_rng(seed).permutation(prompts)[: len(prompts) // 2]
    inside = np.isin(judged.prompts, drawn)
    halves = judged.margin[inside], judged.margin[~inside]
    first, second = map(temperature, halves)
    crossed = None
    if first is not None and second is not None:
        scaled = np.concatenate([halves[0] / second, halves[1] / first])
        crossed = float(losses(scaled).mean())
    return {
        "expected_error": expected_calibration_error(judged.margin),
        "brier": brier(judged.margin),
        "temperature": temperature(judged.margin),
        "loss_at_temperature": crossed,
    }


def reliability(margin: Floats) -> list[Figures]:
    """For each bin of confidence that has pairs: mean confidence, accuracy, pairs.

    Confidence is the probability of the answer that the model prefers, from 0.5 to 1.
    """
    confidence = special.expit(np.abs(margin))
    right = correct(margin)
    # A confidence of 1 is in the last bin.
    bins = np.minimum(((confidence - 0.5) * 2 * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    return [
        {
            "confidence": float(confidence[bins == index].mean()),
            "accuracy": float(right[bins == index].mean()),
            "pairs": int((bins == index).sum()),
        }
        for index in np.unique(bins).tolist()
    ]


def expected_calibration_error(margin: Floats) -> float:
    """Mean distance of accuracy and confidence over the bins, by their pairs (Guo et al. 2017)."""
    return sum(
        each["pairs"] / len(margin) * abs(each["accuracy"] - each["confidence"])
        for each in reliability(margin)
    )


def brier(margin: Floats) -> float:
    """Mean square of 1 - P(chosen is preferred) (Brier 1950)."""
    return float(np.square(special.expit(-margin)).mean())


def temperature(margin: Floats) -> float | None:
    """The T that minimizes the mean loss of margins / T (Guo et al. 2017, section 4.2).

    The loss is convex in 1 / T. Where no pair is wrong, colder is better without end; where the
    mean margin is not positive, hotter is. None in both cases.
    """
    if not len(margin) or not margin.mean() > 0 > margin.min():
        return None
    result = optimize.minimize_scalar(
        lambda logarithm: losses(margin / np.exp(logarithm)).mean(),
        bounds=(np.log(COLDEST), np.log(HOTTEST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(result.x))


# --- length ----------------------------------------------------------------------------------


def length_audit(judged: Judged, resampling: Resampling) -> dict[str, Any]:
    """Whether the model likes an answer, or its length.

    `longer_accuracy` is that of preferring the longer answer. `correlation` is Spearman's rank
    correlation (1904) of reward and length within pairs: of their differences between an answer
    and the other one, in which the prompt has no part. None where one of them is constant.
    """
    difference = judged.tokens_chosen - judged.tokens_rejected
    rewards = np.concatenate([judged.margin, -judged.margin])
    tokens = np.concatenate([difference, -difference])
    varied = len(np.unique(rewards)) > 1 and len(np.unique(tokens)) > 1
    return {
        "longer_accuracy": float(np.heaviside(judged.longer.astype(float), 0.5).mean()),
        "correlation": float(stats.spearmanr(rewards, tokens).statistic) if varied else None,
        "chosen_longer": resampling.accuracy(judged.take(judged.longer > 0)),
        "chosen_shorter": resampling.accuracy(judged.take(judged.longer < 0)),
        "equal": resampling.accuracy(judged.take(judged.longer == 0)),
    }


# --- curves ----------------------------------------------------------------------------------


def roc(judged: Judged, points: int = 200) -> list[Figures]:
    """The ROC of rewards as scores of "this is a chosen answer" (Fawcett 2006, algorithm 1).

    At most about `points` of it.
    """
    scores = np.concatenate([judged.chosen, judged.rejected])
    good = np.concatenate([np.ones(len(judged)), np.zeros(len(judged))])
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.diff(scores[order], append=np.nan))
    true = np.concatenate([[0.0], np.cumsum(good[order])[last] / len(judged)])
    false = np.concatenate([[0.0], np.cumsum(1 - good[order])[last] / len(judged)])
    kept = np.unique(np.linspace(0, len(true) - 1, points).round().astype(int))
    return [
        {"false_positives": float(false[index]), "true_positives": float(true[index])}
        for index in kept
    ]


def histogram(margin: Floats, bins: int = 30) -> list[Figures]:
    """Pairs by margin, in bins of equal width; a bin is given by its middle.

    `density` is the share of the pairs per unit of margin, which runs of other spreads share as a
    scale. The first and the last bin are empty.
    """
    counts, edges = np.histogram(margin, bins=bins)
    width = edges[1] - edges[0]
    middles = edges[0] + width * (np.arange(-1, bins + 1) + 0.5)
    return [
        {
            "margin": round(float(middle), 4),
            "density": count / (len(margin) * width),
            "pairs": count,
        }
        for middle, count in zip(middles, [0, *counts.tolist(), 0], strict=True)
    ]


def by_length_difference(judged: Judged, resampling: Resampling, groups: int = 8) -> list[Figures]:
    """Accuracy in groups of like difference of length, chosen less rejected, in tokens."""
    difference = judged.tokens_chosen - judged.tokens_rejected
    edges = np.unique(np.quantile(difference, np.linspace(0, 1, groups + 1)))
    group_of = np.searchsorted(edges[1:-1], difference, side="right")
    return [
        {"difference": float(np.median(difference[group_of == group]))}
        | resampling.accuracy(judged.take(group_of == group))
        for group in np.unique(group_of)
    ]
