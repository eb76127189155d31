"""Figures of a judgement, each against a slow loop, or against the library that has it."""

import math
import random

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from reward.judging import metrics as judgement
from reward.judging.metrics import Floats, Ints, Judged, Resampling

RESAMPLING = Resampling(samples=2000, seed=0)


def some(count: int = 60, seed: int = 0, prompts: int = 25) -> Judged:
    """Random pairs, some of them ties, some of equal length."""
    draw = random.Random(seed)
    rewards = [[float(draw.randint(-4, 4)) / 2 for _ in range(count)] for _ in range(2)]
    lengths = [[draw.randint(1, 6) for _ in range(count)] for _ in range(2)]
    return Judged(
        np.array(rewards[0]) + 0.5,
        np.array(rewards[1]),
        np.array(lengths[0]),
        np.array(lengths[1]),
        np.array([draw.randrange(prompts) for _ in range(count)]),
    )


def sigmoid(margin: float) -> float:
    return 1 / (1 + math.exp(-margin))


# --- the interval ----------------------------------------------------------------------------


def slow_interval(values: list[float], prompts: list[int], samples: int) -> tuple[float, float]:
    """Draw prompts with their pairs, with replacement; the middle 95% of the means."""
    draw = random.Random(1)
    names = sorted(set(prompts))
    means = []
    for _ in range(samples):
        found: list[float] = []
        for name in (draw.choice(names) for _ in names):
            found += [
                value for value, prompt in zip(values, prompts, strict=True) if prompt == name
            ]
        means.append(sum(found) / len(found))
    means.sort()
    return means[int(0.025 * samples)], means[int(0.975 * samples)]


@pytest.mark.parametrize("seed", range(3))
def test_interval_is_that_of_resampled_prompts(seed: int) -> None:
    draw = random.Random(seed)
    prompts = [draw.randrange(25) for _ in range(80)]
    right = [draw.choice([0.0, 0.5, 1.0, 1.0]) for _ in prompts]
    found = RESAMPLING.interval_of_share(np.array(right), np.array(prompts))
    assert found == pytest.approx(slow_interval(right, prompts, 2000), abs=0.02)


def test_pairs_of_one_prompt_count_as_one_draw() -> None:
    """Ten copies of every pair are no more evidence than one."""
    right = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.5])
    prompts = np.arange(8)
    once = RESAMPLING.interval_of_share(right, prompts)
    copied = RESAMPLING.interval_of_share(np.repeat(right, 10), np.repeat(prompts, 10))
    assert copied == pytest.approx(once)
    assert once[1] - once[0] > 0.4


def test_a_single_prompt_tells_nothing() -> None:
    assert RESAMPLING.interval_of_share(np.array([1.0, 1.0]), np.array([7, 7])) == (0.0, 1.0)


def test_interval_follows_its_seed() -> None:
    right, prompts = np.array([1.0, 0.0] * 20), np.arange(40)
    other = Resampling(50, 1).interval_of_share(right, prompts)
    assert other == Resampling(50, 1).interval_of_share(right, prompts)
    assert other != Resampling(50, 2).interval_of_share(right, prompts)


def test_all_right_or_all_wrong_is_not_certain() -> None:
    """Ten prompts without a miss: a model that is right in 0.69 of prompts does it in 1 of 40."""
    prompts = np.arange(20) % 10
    low, high = RESAMPLING.interval_of_share(np.ones(20), prompts)
    assert low**10 == pytest.approx(0.025)
    assert high == 1
    assert RESAMPLING.interval_of_share(np.zeros(20), prompts) == (0, 1 - low)


@pytest.mark.parametrize("prompts", [2, 5, 46])
def test_one_miss_never_gives_a_better_interval_than_none(prompts: int) -> None:
    names = np.repeat(np.arange(prompts), 10)
    all_right, one_miss = np.ones(len(names)), np.ones(len(names))
    one_miss[0] = 0
    best, good = (RESAMPLING.interval_of_share(each, names) for each in (all_right, one_miss))
    assert good[0] <= best[0]
    assert good[1] <= best[1] == 1


@pytest.mark.parametrize("prompts", [3, 6, 20, 60])
def test_intervals_hold_the_truth_nearly_as_often_as_they_say(prompts: int) -> None:
    """Pairs of a prompt are alike: each prompt has a difficulty of its own, 0.7 on average."""
    draw, held = np.random.default_rng(prompts), 0
    names = np.repeat(np.arange(prompts), 6)
    for _ in range(300):
        right = draw.random(len(names)) < draw.beta(2.1, 0.9, prompts)[names]
        low, high = Resampling(300, 0).interval_of_share(right.astype(float), names)
        held += low <= 0.7 <= high
    assert held / 300 > 0.89


def test_accuracy_of_no_pairs_is_none() -> None:
    assert RESAMPLING.accuracy(some().take(np.zeros(60, dtype=bool))) == {"pairs": 0}


# --- calibration -----------------------------------------------------------------------------


def test_losses_and_brier_score_are_those_of_scikit_learn() -> None:
    """A pair is a case of the class "the chosen answer is preferred"."""
    margin = some().margin
    shown = np.array([sigmoid(each) for each in margin])
    ones = np.ones(len(margin))
    assert judgement.losses(margin).mean() == pytest.approx(log_loss(ones, shown, labels=[0, 1]))
    assert judgement.brier(margin) == pytest.approx(brier_score_loss(ones, shown))


def test_losses_of_large_margins_neither_overflow_nor_vanish() -> None:
    found = judgement.losses(np.array([-1e4, 1e4, 40.0]))
    assert found[0] == 1e4
    assert found[1] == 0
    assert found[2] == pytest.approx(math.exp(-40))


def slow_calibration_error(margins: list[float], bins: int) -> float:
    total = 0.0
    for index in range(bins):
        low, high = 0.5 + index / (2 * bins), 0.5 + (index + 1) / (2 * bins)
        inside = []
        for margin in margins:
            confidence = sigmoid(abs(margin))
            if low <= confidence < high or (index == bins - 1 and confidence == 1):
                hit = 0.5 if margin == 0 else float(margin > 0)
                inside.append((confidence, hit))
        if inside:
            confidence = sum(each for each, _ in inside) / len(inside)
            accuracy = sum(hit for _, hit in inside) / len(inside)
            total += len(inside) / len(margins) * abs(confidence - accuracy)
    return total


@pytest.mark.parametrize("seed", range(4))
def test_expected_calibration_error_is_that_of_a_plain_loop(seed: int) -> None:
    margin = np.random.default_rng(seed).normal(0.5, 2, 200)
    margin[:20] = 0
    margin[20] = 800
    found = judgement.expected_calibration_error(margin)
    assert found == pytest.approx(slow_calibration_error(margin.tolist(), 10))
    assert sum(each["pairs"] for each in judgement.reliability(margin)) == 200


def test_calibration_error_is_small_for_true_probabilities_and_large_for_boasting() -> None:
    draw = np.random.default_rng(0)
    logits = np.abs(draw.normal(0, 1.5, 20_000))
    signs = np.where(draw.random(20_000) < 1 / (1 + np.exp(-logits)), 1, -1)
    assert judgement.expected_calibration_error(signs * logits) < 0.01
    assert judgement.expected_calibration_error(signs * logits * 5) > 0.1
    assert judgement.temperature(signs * logits) == pytest.approx(1, abs=0.05)
    assert judgement.temperature(signs * logits * 5) == pytest.approx(5, rel=0.05)


def test_no_temperature_is_better_than_the_one_found() -> None:
    margin = some(200).margin
    found = judgement.temperature(margin)
    assert found
    best = min(np.exp(np.linspace(-5, 5, 2001)), key=lambda t: judgement.losses(margin / t).mean())
    assert found == pytest.approx(best, rel=0.01)


def test_temperature_is_judged_on_other_prompts_than_it_is_fitted_on() -> None:
    judged = some(200, prompts=40)
    found = judgement.calibration(judged, seed=3)
    assert found["temperature"] == judgement.temperature(judged.margin)
    drawn = np.random.default_rng(3).permutation(40)[:20]
    inside = np.array([prompt in drawn for prompt in judged.prompts])
    losses = []
    for part in (inside, ~inside):
        by = judgement.temperature(judged.margin[~part])
        assert by
        losses += [math.log1p(math.exp(-margin / by)) for margin in judged.margin[part].tolist()]
    assert found["loss_at_temperature"] == pytest.approx(sum(losses) / 200)


@pytest.mark.parametrize("margins", [[], [1.0, 2.0], [0.0], [-1.0, 0.5], [-1.0, 1.0]])
def test_where_no_finite_temperature_is_best_there_is_none(margins: list[float]) -> None:
    assert judgement.temperature(np.array(margins)) is None


def test_all_right_and_a_single_prompt_have_no_loss_at_a_temperature() -> None:
    right = Judged(np.ones(8), np.zeros(8), np.arange(8), np.arange(8), np.arange(8))
    single = some(200, prompts=1)
    assert judgement.calibration(right, 0)["loss_at_temperature"] is None
    assert judgement.calibration(single, 0)["loss_at_temperature"] is None
    assert judgement.calibration(single, 0)["temperature"] is not None


# --- length ----------------------------------------------------------------------------------


def test_length_audit_is_that_of_a_plain_loop() -> None:
    judged = some(120)
    found = judgement.length_audit(judged, RESAMPLING)
    groups: dict[str, list[float]] = {"chosen_longer": [], "chosen_shorter": [], "equal": []}
    longer = []
    for chosen, rejected, left, right in zip(
        judged.chosen, judged.rejected, judged.tokens_chosen, judged.tokens_rejected, strict=True
    ):
        hit = 0.5 if chosen == rejected else float(chosen > rejected)
        name = "equal" if left == right else "chosen_longer" if left > right else "chosen_shorter"
        groups[name].append(hit)
        longer.append({"equal": 0.5, "chosen_longer": 1.0, "chosen_shorter": 0.0}[name])
    assert found["longer_accuracy"] == pytest.approx(sum(longer) / len(longer))
    for name, hits in groups.items():
        assert found[name]["accuracy"] == pytest.approx(sum(hits) / len(hits))
        assert found[name]["pairs"] == len(hits)
        assert found[name]["low"] <= found[name]["accuracy"] <= found[name]["high"]
    rewards, lengths = [], []
    for pair in range(len(judged)):
        for sign in (1, -1):
            rewards.append(sign * (judged.chosen[pair] - judged.rejected[pair]))
            lengths.append(sign * (judged.tokens_chosen[pair] - judged.tokens_rejected[pair]))
    ranks = [stats.rankdata(values) for values in (rewards, lengths)]
    assert found["correlation"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize(("sign", "correlation"), [(1.0, 1.0), (-1.0, -1.0)])
def test_a_model_that_likes_length_is_found_out(sign: float, correlation: float) -> None:
    lengths: Ints = np.arange(1, 41)
    rewards: Floats = sign * lengths.astype(float)
    judged = Judged(rewards[:20], rewards[20:], lengths[:20], lengths[20:], np.arange(20))
    found = judgement.length_audit(judged, RESAMPLING)
    assert found["correlation"] == pytest.approx(correlation)
    assert found["longer_accuracy"] == 0
    assert found["chosen_longer"] == found["equal"] == {"pairs": 0}
    assert found["chosen_shorter"]["accuracy"] == (0 if sign > 0 else 1)


def test_a_constant_has_no_correlation() -> None:
    judged = Judged(np.zeros(4), np.zeros(4), np.arange(4), np.arange(4), np.arange(4))
    assert judgement.length_audit(judged, RESAMPLING)["correlation"] is None


# --- curves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_roc_has_the_area_that_scikit_learn_finds(seed: int) -> None:
    judged = some(80, seed)
    curve = judgement.roc(judged, points=10_000)
    false, true = ([each[name] for each in curve] for name in ("false_positives", "true_positives"))
    scores = np.concatenate([judged.chosen, judged.rejected])
    labels = np.repeat([1, 0], 80)
    assert np.trapezoid(true, false) == pytest.approx(roc_auc_score(labels, scores))
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)


def test_roc_of_many_pairs_is_a_few_points() -> None:
    draw, ones = np.random.default_rng(0), np.ones(5000, int)
    judged = Judged(draw.normal(1, 1, 5000), draw.normal(0, 1, 5000), ones, ones, np.arange(5000))
    curve = judgement.roc(judged)
    assert len(curve) <= 200
    assert curve[0] == {"false_positives": 0, "true_positives": 0}
    assert curve[-1] == {"false_positives": 1, "true_positives": 1}


def test_groups_of_length_difference_hold_every_pair_once() -> None:
    judged = some(100)
    rows = judgement.by_length_difference(judged, RESAMPLING)
    assert sum(row["pairs"] for row in rows) == 100
    differences = [row["difference"] for row in rows]
    assert differences == sorted(differences)
    mean = sum(row["accuracy"] * row["pairs"] for row in rows) / 100
    assert mean == pytest.approx(judged.correct.mean())


def test_groups_of_pairs_of_one_length_are_one() -> None:
    ones = np.ones(9, int)
    judged = Judged(np.arange(9.0), np.zeros(9), ones, ones, np.arange(9))
    [row] = judgement.by_length_difference(judged, RESAMPLING)
    assert row["pairs"] == 9


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
        assert abs(inside - row["pairs"]) <= 2  # the middle is rounded


def test_spread_is_that_of_a_plain_loop() -> None:
    values = [3.0, 1.0, 2.0, 10.0, 4.0]
    found = judgement.spread(np.array(values))
    mean = sum(values) / 5
    assert found["mean"] == mean
    assert found["std"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 5))
    assert found["q50"] == 3
    # Linear between the sorted values: of five, the share q is at place 4q.
    assert found["q05"] == pytest.approx(1 + 0.2)
    assert found["q25"] == 2
    assert found["q75"] == 4
    assert found["q95"] == pytest.approx(4 + 0.8 * 6)
    assert list(found) == ["mean", "std", "q05", "q25", "q50", "q75", "q95"]
