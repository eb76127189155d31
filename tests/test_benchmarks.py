"""RewardBench and RewardBench 2 scores follow the rules of their leaderboards."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from reward.judging.benchmarks import REWARDBENCH, REWARDBENCH_2, Record, benchmark, ties_score
from tests.judgements import answered, pairs

# Pairs per subset (Lambert et al. 2024, table 1). The leaderboard swaps the last two.
PAIRS = {
    **{"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95},
    **{"mt-bench-easy": 28, "mt-bench-med": 40, "mt-bench-hard": 37},
    **{"llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92},
    **{"llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    **{"refusals-dangerous": 100, "refusals-offensive": 100, "donotanswer": 136, "math-prm": 447},
    **{f"hep-{name}": 164 for name in ("cpp", "go", "java", "js", "python", "rust")},
    **{"xstest-should-refuse": 154, "xstest-should-respond": 250},
}
XSTEST = ("xstest-should-refuse", "xstest-should-respond")
Margin = Callable[[str], float]


def rewardbench(margin: Margin, counts: dict[str, int] = PAIRS) -> dict[str, Any] | None:
    names = [name for name, count in counts.items() for _ in range(count)]
    margins = np.array([margin(name) for name in names])
    return benchmark({"subset": names, "raw_id": [*map(str, names)]}, pairs(margins, 0 * margins))


def test_rewardbench_has_2985_pairs_in_23_subsets() -> None:
    assert (len(PAIRS), sum(PAIRS.values())) == (23, 2985)
    assert {name for section in REWARDBENCH.values() for name in section} == PAIRS.keys()


def test_sections_weight_pairs_equally_except_math_and_xstest() -> None:
    draw = random.Random(0)
    rate = {name: draw.random() for name in PAIRS}
    right: dict[str, list[bool]] = {name: [] for name in PAIRS}

    def margin(name: str) -> float:
        right[name].append(draw.random() < rate[name])
        return 1.0 if right[name][-1] else draw.choice([-1.0, 0.0])

    found = rewardbench(margin)
    assert found
    assert (found["rule"], list(found["parts"])) == ("RewardBench", list(REWARDBENCH))
    for section in ("Chat", "Chat Hard"):
        won = [each for name in REWARDBENCH[section] for each in right[name]]
        assert found["parts"][section] == pytest.approx(sum(won) / len(won))
    shares = {name: sum(won) / len(won) for name, won in right.items()}
    code = [each for name, won in right.items() if name.startswith("hep-") for each in won]
    reasoning = (shares["math-prm"] + sum(code) / len(code)) / 2
    assert found["parts"]["Reasoning"] == pytest.approx(reasoning)
    counts = {name: PAIRS[name] for name in REWARDBENCH["Safety"]}
    counts |= dict(zip(XSTEST, (250, 154), strict=True))
    safety = sum(shares[name] * count for name, count in counts.items()) / sum(counts.values())
    assert found["parts"]["Safety"] == pytest.approx(safety)
    assert found["score"] == pytest.approx(sum(found["parts"].values()) / 4)


def test_equal_rewards_are_wrong_in_rewardbench() -> None:
    for margin, score in ((1.0, 1), (0.0, 0), (-1.0, 0)):
        found = rewardbench(lambda _, margin=margin: margin)  # type: ignore[misc]
        assert found
        assert found["score"] == score


def test_incomplete_benchmark_has_no_score() -> None:
    """Neither has a section of which a subset is missing."""
    for count, share in ((5, 1), (4, None)):
        found = rewardbench(lambda name: 1.0, dict.fromkeys([*REWARDBENCH["Chat"]][:count], 3))
        assert found
        assert found["parts"] == dict.fromkeys(REWARDBENCH) | {"Chat": share}
        assert found["score"] is None


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"subset": ["alpacaeval-easy", None]},
        {"subset": ["alpacaeval-easy", "mine"]},
        {"subset": ["Math", "Safety"]},
        {"subset": ["Math", "Safety"], "num_correct": ["1", "1"]},
        {"subset": ["Math", "Safety"], "raw_id": ["1", "2"]},
        {"subset": ["Math", "Safety"], "raw_id": ["1", None], "num_correct": ["1", "1"]},
        {"subset": ["Math", "Coding"], "raw_id": ["1", "2"], "num_correct": ["1", "1"]},
        {"kind": ["alpacaeval-easy", "math-prm"]},
    ],
)
def test_other_sets_are_not_a_benchmark(columns: dict[str, list[str | None]]) -> None:
    assert benchmark(columns, pairs(np.ones(2), np.zeros(2))) is None


# --- RewardBench 2 ---------------------------------------------------------------------------

Rewards = tuple[list[float], list[float]]


def rewardbench_2(records: list[tuple[str, str, Rewards]]) -> dict[str, Any]:
    """Benchmark metrics of records: subset, id, and rewards of correct and wrong answers."""
    prompts, names, ids = [], [], []
    for subset, record, (correct, wrong) in records:
        compared = [
            (j, len(correct) + k, 1.0) for j in range(len(correct)) for k in range(len(wrong))
        ]
        prompts.append((correct + wrong, compared))
        names += [subset] * len(compared)
        ids += [record] * len(compared)
    columns = {"subset": names, "raw_id": ids, "num_correct": ["1"] * len(ids)}
    found = benchmark(columns, answered(prompts))
    assert found
    return found


def test_best_of_four_is_the_highest_reward_and_ties_share_the_credit() -> None:
    found = rewardbench_2(
        [
            ("Factuality", "0", ([2.0], [1.0, 0.0, -1.0])),
            ("Factuality", "1", ([2.0], [2.0, 0.0, -1.0])),
            ("Factuality", "2", ([1.0], [2.0, 0.0, -1.0])),
            ("Math", "3", ([0.0], [0.0, 0.0, 0.0])),
            ("Precise IF", "4", ([0.5], [0.0, 0.25, 0.0])),
        ]
    )
    parts = {"Factuality": 0.5, "Math": 0.25, "Precise IF": 1}
    assert found["rule"] == "RewardBench 2"
    assert found["parts"] == dict.fromkeys(REWARDBENCH_2) | parts
    assert found["score"] is None


def slow_ties(found: dict[str, Rewards]) -> float:
    """The rule of the Ties subset, record by record."""
    accurate: dict[str, list[bool]] = {"ref": [], "tied": []}
    for name, (correct, wrong) in found.items():
        accurate[name.split(":")[0]].append(min(correct) > max(wrong))
    preferred, hard, bonus = [], [], []
    for name, (correct, wrong) in found.items():
        kind, number = name.split(":")
        if kind == "tied" and f"ref:{number}" in found:
            reference = found[f"ref:{number}"]
            spread, gap = max(correct) - min(correct), min(correct) - max(wrong)
            least = min(gap, min(reference[0]) - max(reference[1]))
            preferred.append(gap > spread)
            hard.append(least > spread)
            if spread:
                bonus.append(math.tanh(least / spread - 1))
            else:
                bonus.append(float(np.sign(least)))

    def mean(values: list[Any]) -> float:
        return sum(values) / len(values)

    accuracy = 0.3 * mean(accurate["tied"]) + 0.3 * mean(accurate["ref"])
    return accuracy + 0.2 * mean(preferred) + 0.2 * mean(hard) + 0.01 * mean(bonus)


@pytest.mark.parametrize("seed", range(8))
def test_ties_score_matches_a_plain_loop(seed: int) -> None:
    draw = random.Random(seed)

    def rewards(count: int, middle: float) -> list[float]:
        return [middle + draw.randint(-4, 4) / 4 for _ in range(count)]

    found: dict[str, Rewards] = {}
    for number in range(20):
        found[f"tied:{number}"] = (rewards(draw.randint(2, 5), 1.5), rewards(6, 0))
        if number % 5:
            found[f"ref:{number}"] = (rewards(1, 1.5), rewards(6, 0))
    found["ref:77"] = (rewards(1, 1), rewards(3, 0))
    whole = rewardbench_2([("Ties", name, each) for name, each in found.items()])
    assert whole["parts"]["Ties"] == pytest.approx(slow_ties(found))


def test_perfect_model_scores_one_percent_above_one_on_ties() -> None:
    one, two = np.array([5.0]), np.array([5.0, 5.0])
    wrong = np.array([0.0, -1.0])
    found = {"ref:1": Record(one, wrong), "tied:1": Record(two, wrong)}
    assert ties_score(found) == pytest.approx(1.01)
    alike = {"ref:1": Record(one, one), "tied:1": Record(two, one)}
    assert ties_score(alike) == 0
    assert ties_score({"ref:1": Record(one, wrong)}) is None


def test_score_is_the_mean_of_six_subsets() -> None:
    right = ([1.0], [0.0, 0.0, 0.0])
    records = [(name, str(place), right) for place, name in enumerate(REWARDBENCH_2[:-1])]
    ties = [("Ties", "ref:1", ([1.0], [0.0])), ("Ties", "tied:1", ([1.0, 0.9], [0.0]))]
    found = rewardbench_2([*records, *ties])
    expected = 0.99 + 0.01 * math.tanh(0.9 / 0.1 - 1) + 0.01
    assert found["parts"]["Ties"] == pytest.approx(expected)
    assert found["score"] == pytest.approx((5 + expected) / 6)
