"""Reward and length: the audit and the adjustment, against slow loops and known curves."""

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from reward.judging import length
from reward.judging.metrics import Floats, Ints, Judged, accuracy
from tests.judgements import pairs

SEED = 0


def random_judgement(count: int, seed: int = 0, prompts: int = 25, votes: int = 1) -> Judged:
    """Random pairs, some with equal rewards or lengths; some are ties if `votes` is even."""
    draw = np.random.default_rng(seed)
    return pairs(
        draw.integers(-4, 5, count) / 2 + 0.5,
        draw.integers(-4, 5, count) / 2,
        (draw.integers(1, 7, count), draw.integers(1, 7, count)),
        draw.integers(0, prompts, count),
        draw.integers((votes + 1) // 2, votes + 1, count) / votes,
    )


def test_length_audit_matches_a_plain_loop() -> None:
    judged = random_judgement(120)
    found = length.length_audit(judged, SEED)
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
def test_preference_for_length_is_detected(sign: float, correlation: float) -> None:
    lengths: Ints = np.arange(1, 41)
    rewards: Floats = sign * lengths.astype(float)
    judged = pairs(rewards[:20], rewards[20:], (lengths[:20], lengths[20:]))
    found = length.length_audit(judged, SEED)
    assert found["correlation"] == pytest.approx(correlation)
    assert found["longer_accuracy"] == 0
    assert found["chosen_longer"] == found["equal"] == {"pairs": 0}
    assert found["chosen_shorter"]["accuracy"] == (0 if sign > 0 else 1)


def test_constant_rewards_have_no_correlation() -> None:
    judged = pairs(np.zeros(4), np.zeros(4), (np.arange(4), np.arange(4)))
    assert length.length_audit(judged, SEED)["correlation"] is None


def test_every_pair_is_in_one_group_of_length_difference() -> None:
    judged = random_judgement(100)
    rows = length.by_length_difference(judged)
    assert sum(row["pairs"] for row in rows) == 100
    differences = [row["difference"] for row in rows]
    assert differences == sorted(differences)
    mean = sum(row["accuracy"] * row["pairs"] for row in rows) / 100
    assert mean == pytest.approx(judged.correct.mean())


def test_pairs_of_equal_length_form_one_group() -> None:
    [row] = length.by_length_difference(pairs(np.arange(9.0), np.zeros(9)))
    assert row["pairs"] == 9


@pytest.mark.parametrize(("equal", "longer"), [(60, 40), (95, 5), (5, 95)])
def test_different_lengths_are_different_groups(equal: int, longer: int) -> None:
    """Unless one of them is so rare that it is in the last group anyway."""
    tokens = np.array([5] * equal + [15] * longer)
    count = equal + longer
    judged = pairs(np.arange(float(count)), np.zeros(count), (tokens, np.full(count, 5)))
    rows = length.by_length_difference(judged)
    expected = [equal, longer] if longer > count / 8 else [count]
    assert [row["pairs"] for row in rows] == expected


def test_audit_ignores_ties() -> None:
    judged = random_judgement(200, votes=2)
    found, decided = (length.length_audit(each, SEED) for each in (judged, judged.decided()))
    assert 50 < judged.tied.sum() < 150
    assert {**found, "adjusted": None} == {**decided, "adjusted": None}
    groups = length.by_length_difference(judged)
    assert groups == length.by_length_difference(judged.decided())


# --- adjustment for length -------------------------------------------------------------------

# Speeds and stopping distances of cars (Ezekiel 1930), and lowess(cars) in R 4.
SPEED = [
    *(4, 4, 7, 7, 8, 9, 10, 10, 10, 11, 11, 12, 12, 12, 12, 13, 13, 13, 13, 14, 14, 14, 14, 15, 15),
    *(15, 16, 16, 17, 17, 17, 18, 18, 18, 18, 19, 19, 19, 20, 20, 20, 20, 20, 22, 23, 24, 24, 24),
    *(24, 25),
]
DISTANCE = [
    *(2, 10, 4, 22, 16, 10, 18, 26, 34, 17, 28, 14, 20, 24, 28, 26, 34, 34, 46, 26, 36, 60, 80, 20),
    *(26, 54, 32, 40, 32, 40, 50, 42, 56, 76, 84, 36, 46, 68, 32, 48, 52, 56, 64, 66, 54, 70, 92),
    *(93, 120, 85),
]
SMOOTH = {4: 4.965459, 7: 13.124495, 8: 15.858633, 9: 18.579691, 10: 21.280313, 11: 24.129277}
SMOOTH |= {12: 27.119549, 13: 30.027276, 14: 32.962506, 15: 36.757728, 16: 40.435075}
SMOOTH |= {17: 43.463492, 18: 46.885479, 19: 50.793152, 20: 56.491224, 22: 67.585824}
SMOOTH |= {23: 73.079695, 24: 78.643164, 25: 84.328698}


def test_lowess_matches_r() -> None:
    speeds: Ints = np.array([*SMOOTH])
    found = length.lowess(np.array(SPEED), np.array(DISTANCE, dtype=float), speeds)
    assert found == pytest.approx(np.array([*SMOOTH.values()]), abs=1e-6)


def slow_lowess(x: list[int], y: list[float], at: list[int]) -> list[float]:
    """Cleveland 1979, point by point."""
    count = int(2 / 3 * len(x) + 1e-7)
    robust = [1.0] * len(x)

    def smooth(place: int) -> float:
        reach = sorted(abs(each - place) for each in x)[count - 1]
        weights = [
            max(0.0, 1 - (abs(each - place) / reach) ** 3) ** 3 * extra
            for each, extra in zip(x, robust, strict=True)
        ]
        slope, intercept = np.polyfit(x, y, 1, w=np.sqrt(weights))
        return float(slope * place + intercept)

    for _ in range(3):
        off = [abs(each - smooth(place)) for place, each in zip(x, y, strict=True)]
        scale = 6 * float(np.median(off))
        robust = [max(0.0, 1 - (each / scale) ** 2) ** 2 for each in off]
    return [smooth(place) for place in at]


@pytest.mark.parametrize("seed", range(4))
def test_lowess_matches_a_plain_loop(seed: int) -> None:
    """Includes lengths outside the range of the points, and outliers."""
    draw = random.Random(seed)
    x = [draw.randint(0, 60) for _ in range(70)]
    y = [math.sin(each / 9) + draw.gauss(0, 0.1) + (draw.random() < 0.05) * 50 for each in x]
    at = [each for each in range(5, 55) if each in x]
    found = length.lowess(np.array(x), np.array(y), np.array(at))
    assert found == pytest.approx(np.array(slow_lowess(x, y, at)), abs=1e-9)
    outside = length.lowess(np.array(x), np.array(y), np.array([min(x) - 9, max(x) + 9]))
    assert outside == pytest.approx(np.array(slow_lowess(x, y, [min(x), max(x)])), abs=1e-9)


def test_curve_of_many_lengths_is_fitted_at_some_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = np.random.default_rng(0)
    x: Ints = draw.integers(0, 900, 1000)
    y: Floats = np.sqrt(x) + draw.normal(0, 1, 1000)
    assert len(length.places_of(x)) == length.PLACES
    some = length.lowess(x, y, x)
    monkeypatch.setattr(length, "PLACES", 1000)
    assert len(length.places_of(x)) > 500
    assert some == pytest.approx(length.lowess(x, y, x), abs=0.01)


def test_long_vectors_are_multiplied_in_parts() -> None:
    """BLAS, which takes several threads for longer ones, gets no more values than LONGEST."""
    lengths = []

    class Watched(np.ndarray[tuple[int], np.dtype[np.float64]]):
        def __matmul__(self, other: Any) -> Any:
            lengths.append(len(self))
            return np.asarray(self) @ other

    one, other = np.random.default_rng(0).normal(size=(2, 2 * length.LONGEST + 1))
    expected = math.fsum(one * other)
    assert length.dot(one.view(Watched), other) == pytest.approx(expected)
    assert lengths == [length.LONGEST, length.LONGEST, 1]


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([5, 5, 5, 5], [1.0, 2.0, 3.0, 4.0], 2.5),
        ([5] * 9, [3.0] * 9, 3),
        ([1, 2, 3, 4, 5], [7.0] * 5, 7),
        ([5, 5, 5, 5, 9], [1.0, 1.0, 1.0, 1.0, 8.0], 1),
        ([5, 9], [1.0, 3.0], 1),
    ],
)
def test_lowess_handles_few_lengths_and_equal_rewards(
    x: list[int], y: list[float], expected: float
) -> None:
    found = length.lowess(np.array(x), np.array(y), np.array([5]))
    assert found == pytest.approx(expected)


def test_lowess_uses_outliers_where_there_is_nothing_else() -> None:
    x, y = np.array([5] * 8 + [9, 9]), np.array([0.0, 1, 2, 3] * 2 + [60, -40])
    assert length.lowess(x, y, np.array([5, 9])) == pytest.approx([1.5, 10])


def judgement_favouring_length(seed: int = 0, prompts: int = 60) -> Judged:
    """All pairs of six answers per prompt, ranked by quality; the reward adds a curve of length."""
    draw = np.random.default_rng(seed)
    rows = []
    for prompt in range(prompts):
        quality, own = draw.normal(0, 1, 6), draw.integers(5, 200, 6)
        rewards = quality + 6 * np.sqrt(own / 200)
        prefix = draw.integers(10, 500)
        for j in range(6):
            for k in range(j):
                better, worse = (j, k) if quality[j] > quality[k] else (k, j)
                sides = (rewards[better], rewards[worse], own[better], own[worse])
                rows.append((*sides, prefix, 1.0, better, worse, prompt))
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    for tokens in columns[2:4]:
        tokens += columns[4]
    return Judged(*columns)


def test_adjustment_for_length_recovers_quality() -> None:
    judged = judgement_favouring_length()
    found = length.length_audit(judged, SEED)
    before, after = accuracy(judged), found["adjusted"]
    assert before["accuracy"] < 0.8
    assert after["accuracy"] > 0.93
    assert found["correlation"] > 0.6
    assert abs(after["correlation"]) < 0.1
    assert (after["pairs"], after["prompts"]) == (len(judged), 60)


def test_adjustment_of_an_answer_does_not_depend_on_its_prompt() -> None:
    judged = judgement_favouring_length(prompts=20)
    answers, found = judged.answers, length.adjusted(judged, 3)
    drawn = np.random.default_rng(3).permutation(20)[:10]
    inside = np.array([prompt in drawn for prompt in answers.prompts])
    for part in (inside, ~inside):
        others = answers.tokens[~part], answers.rewards[~part]
        taken = length.lowess(*others, answers.tokens[part])
        assert found[part] == pytest.approx(answers.rewards[part] - taken)
    # Raising the rewards of a prompt raises its adjusted rewards by the same amount.
    more = np.where(judged.prompts == 0, 5.0, 0.0)
    raised = replace(judged, chosen=judged.chosen + more, rejected=judged.rejected + more)
    half = inside == inside[answers.prompts == 0][0]
    expected = found[half] + np.where(answers.prompts[half] == 0, 5.0, 0.0)
    assert length.adjusted(raised, 3)[half] == pytest.approx(expected)


def test_each_answer_counts_once_however_often_it_is_compared() -> None:
    judged = judgement_favouring_length(prompts=20)
    assert len(judged.answers.rewards) == 120
    twice = judged.take(np.repeat(np.arange(len(judged)), 2))
    assert length.adjusted(twice, 0) == pytest.approx(length.adjusted(judged, 0))
    assert (judged.answers.tokens < 200).all()


def test_curve_is_flat_after_adjustment() -> None:
    rows = length.length_curve(judgement_favouring_length(), 0)
    tokens, rewards, left = (
        np.array([row[name] for row in rows]) for name in ("tokens", "reward", "adjusted")
    )
    assert (np.diff(tokens) > 0).all()
    assert np.ptp(rewards) > 3
    assert np.ptp(left) < 0.5


def test_single_prompt_cannot_be_adjusted() -> None:
    judged = random_judgement(20, prompts=1)
    assert length.length_audit(judged, SEED)["adjusted"] == {"pairs": 0}
    assert length.length_curve(judged, 0) == []


def test_adjusted_correlation_leaves_out_ties() -> None:
    judged = random_judgement(200, votes=2)
    answers, rewards = judged.answers, length.adjusted(judged, SEED)
    left = replace(judged, chosen=rewards[answers.chosen], rejected=rewards[answers.rejected])
    found = length.length_audit(judged, SEED)["adjusted"]["correlation"]
    assert found == length.correlation(left.decided()) != length.correlation(left)
