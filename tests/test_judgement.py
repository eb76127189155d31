"""The metrics of a judgement, each against a slow loop or a library."""

import math
import random

import numpy as np
import pytest
from scipy import special, stats
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from reward.judging import metrics as judgement
from reward.judging.metrics import Floats, Judged, accuracy, interval
from tests.judgements import pairs


def random_judgement(count: int = 60, seed: int = 0, prompts: int = 25, votes: int = 1) -> Judged:
    """Random pairs, some with equal rewards or lengths; some are ties if `votes` is even."""
    draw = random.Random(seed)
    rewards = [[float(draw.randint(-4, 4)) / 2 for _ in range(count)] for _ in range(2)]
    lengths = [[draw.randint(1, 6) for _ in range(count)] for _ in range(2)]
    numbers = [draw.randrange(prompts) for _ in range(count)]
    preference = [draw.randint((votes + 1) // 2, votes) / votes for _ in range(count)]
    return pairs(
        np.array(rewards[0]) + 0.5,
        np.array(rewards[1]),
        tokens=(np.array(lengths[0]), np.array(lengths[1])),
        prompts=np.array(numbers),
        preference=np.array(preference),
    )


def with_margins(margin: Floats) -> Judged:
    """Certain pairs with these margins."""
    return pairs(margin, np.zeros(len(margin)))


def sigmoid(margin: float) -> float:
    return 1 / (1 + math.exp(-margin))


# --- the interval ----------------------------------------------------------------------------


def slow_interval(shares: list[float], prompts: list[int]) -> tuple[float, float]:
    """The accuracies that are not too far from the share that was found, by bisection.

    Too far is more than Student's t standard errors of as many independent draws as have the
    variance between prompts. The degrees of freedom are those of as many prompts of equal size.
    """
    names = sorted(set(prompts))
    groups = [
        [share for share, prompt in zip(shares, prompts, strict=True) if prompt == name]
        for name in names
    ]
    found, count = sum(shares) / len(shares), len(names)
    off = [sum(share - found for share in group) for group in groups]
    variance = sum(each**2 for each in off) / len(shares) ** 2 * count / (count - 1)
    draws = found * (1 - found) / variance
    kish = len(shares) ** 2 / sum(len(group) ** 2 for group in groups)
    quantile = stats.t(kish - 1).ppf(0.975)

    def too_far(accuracy: float) -> bool:
        return abs(found - accuracy) > quantile * math.sqrt(accuracy * (1 - accuracy) / draws)

    bounds = []
    for outside in (0.0, 1.0):
        inside = found
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if too_far(middle) else (middle, outside)
        bounds.append(inside)
    return bounds[0], bounds[1]


@pytest.mark.parametrize("seed", range(6))
def test_interval_has_the_accuracies_that_are_not_too_far(seed: int) -> None:
    draw = random.Random(seed)
    prompts = [draw.randrange(25) for _ in range(80)]
    right = [draw.choice([0.0, 0.5, 1.0, 1.0]) for _ in prompts]
    found = interval(np.array(right), np.array(prompts))
    assert found == pytest.approx(slow_interval(right, prompts))


def test_interval_of_independent_pairs_is_the_score_interval() -> None:
    """Up to n - 1 in the variance, and Student's t, which matter little for 2,000 prompts."""
    right = np.arange(2000) % 10 < 9
    found = interval(right.astype(float), np.arange(2000))
    expected = stats.binomtest(1800, 2000).proportion_ci(method="wilson")
    assert found == pytest.approx((expected.low, expected.high), abs=2e-5)


def test_pairs_of_one_prompt_count_as_one_draw() -> None:
    """Ten copies of every pair are not more evidence than one."""
    right = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.5])
    prompts = np.arange(8)
    once = interval(right, prompts)
    copied = interval(np.repeat(right, 10), np.repeat(prompts, 10))
    assert copied == pytest.approx(once)
    assert once[1] - once[0] > 0.4


def test_single_prompt_gives_no_information() -> None:
    assert interval(np.array([1.0, 1.0]), np.array([7, 7])) == (0.0, 1.0)


def test_interval_has_width_if_all_or_none_are_correct() -> None:
    """A model with an accuracy of 0.69 gets ten of ten prompts right with a chance of 1 in 40."""
    prompts = np.arange(20) % 10
    low, high = interval(np.ones(20), prompts)
    assert low**10 == pytest.approx(0.025)
    assert high == 1
    assert interval(np.zeros(20), prompts) == (0, 1 - low)


@pytest.mark.parametrize("prompts", [2, 5, 46])
def test_one_error_never_gives_a_better_interval_than_none(prompts: int) -> None:
    names = np.repeat(np.arange(prompts), 10)
    all_right, one_miss = np.ones(len(names)), np.ones(len(names))
    one_miss[0] = 0
    best, good = (interval(each, names) for each in (all_right, one_miss))
    assert good[0] <= best[0]
    assert good[1] <= best[1] == 1


@pytest.mark.parametrize("prompts", [3, 6, 20, 60])
def test_interval_coverage_is_close_to_nominal(prompts: int) -> None:
    """Pairs of a prompt are correlated: each prompt has its own accuracy, 0.7 on average."""
    draw, held = np.random.default_rng(prompts), 0
    names = np.repeat(np.arange(prompts), 6)
    for _ in range(300):
        right = draw.random(len(names)) < draw.beta(2.1, 0.9, prompts)[names]
        low, high = interval(right.astype(float), names)
        held += low <= 0.7 <= high
    assert held / 300 > 0.93


@pytest.mark.parametrize("prompts", [10, 46, 100])
def test_interval_of_single_pairs_covers_every_accuracy(prompts: int) -> None:
    """Exact probabilities. The lower bound, for which people look at the interval, is safest."""
    errors = np.arange(prompts + 1)
    intervals = [
        interval((np.arange(prompts) >= count).astype(float), np.arange(prompts))
        for count in errors
    ]
    low, high = np.array(intervals).T
    for share in np.arange(0.5, 1, 0.005):
        probability = stats.binom(prompts, 1 - share).pmf(errors)
        assert probability[low > share].sum() < 0.03, share
        assert probability[high < share].sum() < (0.07 if share < 0.98 else 0.13), share
    assert (np.diff(low) < 0).all()


def test_prompts_with_few_of_the_pairs_count_less() -> None:
    """With an accuracy of 0.95, prompts of very unequal sizes, and few errors to resample."""
    draw, held, equal = np.random.default_rng(0), 0, np.ones(40)
    for _ in range(300):
        sizes = np.minimum(draw.pareto(1.2, 40) * 2 + 1, 200).astype(int)
        names = np.repeat(np.arange(40), sizes)
        right = draw.random(len(names)) < draw.beta(2.85, 0.15, 40)[names]
        low, high = interval(right.astype(float), names)
        held += low <= 0.95 <= high
    assert held / 300 > 0.93
    one_large = np.repeat(np.arange(40), [1000, *[1] * 39])
    low, _ = interval(np.ones(len(one_large)), one_large)
    assert low < interval(equal, np.arange(40))[0] / 10


def test_accuracy_of_no_pairs_is_none() -> None:
    assert accuracy(random_judgement().take(np.zeros(60, dtype=bool))) == {"pairs": 0}


# --- calibration -----------------------------------------------------------------------------


def test_losses_and_brier_score_match_scikit_learn() -> None:
    """Each pair is a sample of the class "the chosen answer is preferred"."""
    judged = random_judgement()
    shown = np.array([sigmoid(each) for each in judged.margin])
    ones = np.ones(len(judged))
    found = judgement.losses(judged.margin, judged.preference).mean()
    assert found == judgement.losses(judged.margin).mean()
    assert found == pytest.approx(log_loss(ones, shown, labels=[0, 1]))
    assert judgement.brier(judged) == pytest.approx(brier_score_loss(ones, shown))


@pytest.mark.parametrize("votes", [2, 3])
def test_losses_and_brier_score_of_votes_match_a_plain_loop(votes: int) -> None:
    judged = random_judgement(200, votes=votes)
    losses, squares = [], []
    for margin, preference in zip(judged.margin, judged.preference, strict=True):
        chosen = sigmoid(margin)
        losses.append(-preference * math.log(chosen) - (1 - preference) * math.log(1 - chosen))
        squares.append((preference - chosen) ** 2)
    found = judgement.losses(judged.margin, judged.preference)
    assert found == pytest.approx(np.array(losses))
    assert judgement.brier(judged) == pytest.approx(sum(squares) / 200)
    # No model has a lower loss than one that predicts each pair's share of votes.
    least = special.entr(judged.preference) + special.entr(1 - judged.preference)
    assert (found >= least).all()


def test_losses_of_large_margins_neither_overflow_nor_underflow() -> None:
    found = judgement.losses(np.array([-1e4, 1e4, 40.0]))
    assert found[0] == 1e4
    assert found[1] == 0
    assert found[2] == pytest.approx(math.exp(-40))


def slow_calibration_error(margins: list[float], preferences: list[float], bins: int) -> float:
    total = 0.0
    for index in range(bins):
        low, high = 0.5 + index / (2 * bins), 0.5 + (index + 1) / (2 * bins)
        inside = []
        for margin, preference in zip(margins, preferences, strict=True):
            confidence = sigmoid(abs(margin))
            if low <= confidence < high or (index == bins - 1 and confidence == 1):
                hit = 0.5 if margin == 0 else preference if margin > 0 else 1 - preference
                inside.append((confidence, hit))
        if inside:
            confidence = sum(each for each, _ in inside) / len(inside)
            accuracy = sum(hit for _, hit in inside) / len(inside)
            total += len(inside) / len(margins) * abs(confidence - accuracy)
    return total


@pytest.mark.parametrize("seed", range(4))
def test_expected_calibration_error_matches_a_plain_loop(seed: int) -> None:
    margin = np.random.default_rng(seed).normal(0.5, 2, 200)
    margin[:20] = 0
    margin[20] = 800
    preference = np.random.default_rng(seed).choice([2 / 3, 1.0], 200)
    judged = pairs(margin, np.zeros(200), preference=preference)
    found = judgement.expected_calibration_error(judged)
    assert found == pytest.approx(slow_calibration_error(margin.tolist(), preference.tolist(), 10))
    assert sum(each["pairs"] for each in judgement.reliability(judged)) == 200


def test_calibration_error_is_small_for_true_probabilities_and_large_for_overconfidence() -> None:
    draw = np.random.default_rng(0)
    logits = np.abs(draw.normal(0, 1.5, 20_000))
    signs = np.where(draw.random(20_000) < 1 / (1 + np.exp(-logits)), 1, -1)
    true, overconfident = with_margins(signs * logits), with_margins(signs * logits * 5)
    assert judgement.expected_calibration_error(true) < 0.01
    assert judgement.expected_calibration_error(overconfident) > 0.1
    assert judgement.temperature(true) == pytest.approx(1, abs=0.05)
    assert judgement.temperature(overconfident) == pytest.approx(5, rel=0.05)


def test_model_that_predicts_the_share_of_votes_is_calibrated() -> None:
    """The votes of every pair match its margin; the second model triples all margins."""
    margin = np.random.default_rng(0).uniform(0.01, 3, 500)
    honest = pairs(margin, np.zeros(500), preference=special.expit(margin))
    overconfident = pairs(3 * margin, np.zeros(500), preference=special.expit(margin))
    assert judgement.expected_calibration_error(honest) == pytest.approx(0, abs=1e-12)
    assert judgement.brier(honest) == pytest.approx(0, abs=1e-12)
    assert judgement.temperature(honest) == pytest.approx(1, abs=1e-4)
    assert judgement.temperature(overconfident) == pytest.approx(3, abs=1e-3)


@pytest.mark.parametrize("votes", [1, 2, 3])
def test_fitted_temperature_has_the_lowest_loss(votes: int) -> None:
    judged = random_judgement(200, votes=votes)
    found = judgement.temperature(judged)
    assert found
    best = min(
        np.exp(np.linspace(-5, 5, 2001)),
        key=lambda t: judgement.losses(judged.margin / t, judged.preference).mean(),
    )
    assert found == pytest.approx(best, rel=0.01)


@pytest.mark.parametrize("votes", [1, 2])
def test_temperature_is_evaluated_on_held_out_prompts(votes: int) -> None:
    judged = random_judgement(200, prompts=40, votes=votes)
    found = judgement.calibration(judged, seed=3)
    assert found["temperature"] == judgement.temperature(judged)
    assert found["brier"] == judgement.brier(judged)
    assert found["expected_error"] == judgement.expected_calibration_error(judged.decided())
    drawn = np.random.default_rng(3).permutation(40)[:20]
    inside = np.array([prompt in drawn for prompt in judged.prompts])
    losses = []
    for part in (inside, ~inside):
        by = judgement.temperature(judged.take(~part))
        assert by
        for margin, preference in zip(judged.margin[part], judged.preference[part], strict=True):
            right, wrong = math.log1p(math.exp(-margin / by)), math.log1p(math.exp(margin / by))
            losses.append(preference * right + (1 - preference) * wrong)
    assert found["loss_at_temperature"] == pytest.approx(sum(losses) / 200)


@pytest.mark.parametrize("margins", [[], [1.0, 2.0], [0.0], [-1.0, 0.5], [-1.0, 1.0]])
def test_temperature_is_none_without_a_finite_optimum(margins: list[float]) -> None:
    assert judgement.temperature(with_margins(np.array(margins))) is None


def test_temperature_grows_with_the_margins_and_has_a_limit() -> None:
    margins = np.array([1.0, 2.0, 3.0, -0.5])
    found = judgement.temperature(with_margins(margins))
    assert found is not None
    for scale in (1e-9, 1e9):
        scaled = judgement.temperature(with_margins(margins * scale))
        assert scaled == pytest.approx(found * scale)
    assert judgement.temperature(with_margins(np.array([1.0001, -1.0]))) is None


def test_one_dissenting_vote_gives_a_finite_temperature() -> None:
    right = pairs(np.ones(2), np.zeros(2), preference=np.array([1.0, 0.75]))
    assert judgement.temperature(right) == pytest.approx(1 / special.logit(0.875), rel=1e-3)
    tied = pairs(np.ones(2), np.zeros(2), preference=np.array([0.5, 0.5]))
    assert judgement.temperature(tied) is None


def test_loss_at_temperature_needs_errors_and_several_prompts() -> None:
    right, single = with_margins(np.ones(8)), random_judgement(200, prompts=1)
    assert judgement.calibration(right, 0)["loss_at_temperature"] is None
    assert judgement.calibration(single, 0)["loss_at_temperature"] is None
    assert judgement.calibration(single, 0)["temperature"] is not None


# --- ties ------------------------------------------------------------------------------------


def test_ties_are_neither_correct_nor_wrong() -> None:
    judged = random_judgement(200, votes=2)
    assert 50 < judged.tied.sum() < 150
    found = accuracy(judged)
    right = [
        0.5 if margin == 0 else float(margin > 0)
        for margin, preference in zip(judged.margin, judged.preference, strict=True)
        if preference > 0.5
    ]
    assert found == accuracy(judged.decided())
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["pairs"] == len(right)
    assert accuracy(judged.take(judged.tied)) == {"pairs": 0}


@pytest.mark.parametrize("seed", range(3))
def test_area_for_ties_matches_scikit_learn(seed: int) -> None:
    judged = random_judgement(200, seed, votes=2)
    found = judgement.ties(judged)
    size = np.abs(judged.margin)
    assert found["area"] == pytest.approx(roc_auc_score(~judged.tied, size))
    assert found["pairs"] == judged.tied.sum()
    assert found["margin"] == judgement.spread(size[judged.tied])
    assert found["margin_of_others"] == judgement.spread(size[~judged.tied])
    assert judgement.ties(judged.decided()) == {"pairs": 0}
    assert judgement.ties(judged.take(judged.tied)) == {"pairs": found["pairs"]}


def test_small_margins_for_ties_give_the_full_area() -> None:
    preference = np.array([0.5, 0.5, 1.0, 1.0])
    for margin, area in (([0.1, -0.1, -3.0, 2.0], 1), ([2.0, -2.0, 1.0, -1.0], 0)):
        judged = pairs(np.array(margin), np.zeros(4), preference=preference)
        assert judgement.ties(judged)["area"] == area


# --- curves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_area_under_roc_matches_scikit_learn(seed: int) -> None:
    judged = random_judgement(80, seed)
    curve = judgement.roc(judged, points=10_000)
    false, true = ([each[name] for each in curve] for name in ("false_positives", "true_positives"))
    scores = np.concatenate([judged.chosen, judged.rejected])
    labels = np.repeat([1, 0], 80)
    assert np.trapezoid(true, false) == pytest.approx(roc_auc_score(labels, scores))
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)


def test_roc_of_many_pairs_has_few_points() -> None:
    draw = np.random.default_rng(0)
    judged = pairs(draw.normal(1, 1, 5000), draw.normal(0, 1, 5000))
    curve = judgement.roc(judged)
    assert len(curve) <= 200
    assert curve[0] == {"false_positives": 0, "true_positives": 0}
    assert curve[-1] == {"false_positives": 1, "true_positives": 1}


def test_histogram_counts_every_margin() -> None:
    margin = np.random.default_rng(0).normal(size=500)
    rows = judgement.histogram(margin)
    assert sum(row["pairs"] for row in rows) == 500
    assert rows[0]["pairs"] == rows[-1]["pairs"] == 0
    width = rows[1]["margin"] - rows[0]["margin"]
    assert sum(row["density"] * width for row in rows) == pytest.approx(1, rel=1e-3)
    for row in rows:
        low, high = row["margin"] - width / 2, row["margin"] + width / 2
        inside = sum(low < each < high for each in margin.tolist())
        assert abs(inside - row["pairs"]) <= 2  # bin centers are rounded


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0])
def test_bins_of_small_margins_differ(scale: float) -> None:
    rows = judgement.histogram(np.random.default_rng(0).normal(size=500) * scale)
    assert len({row["margin"] for row in rows}) == len(rows)


def test_spread_matches_a_plain_loop() -> None:
    values = [3.0, 1.0, 2.0, 10.0, 4.0]
    found = judgement.spread(np.array(values))
    mean = sum(values) / 5
    assert found["mean"] == mean
    assert found["std"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 5))
    assert found["q50"] == 3
    # Linear interpolation between the sorted values: for five of them, quantile q is at index 4q.
    assert found["q05"] == pytest.approx(1 + 0.2)
    assert found["q25"] == 2
    assert found["q75"] == 4
    assert found["q95"] == pytest.approx(4 + 0.8 * 6)
    assert list(found) == ["mean", "std", "q05", "q25", "q50", "q75", "q95"]
