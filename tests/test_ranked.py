"""Metrics of more than two answers to a prompt, against scipy, scikit-learn and slow loops."""

import itertools
import random

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import ndcg_score

from reward.judging.metrics import Judged
from reward.judging.rankings import Ranking, best_of_n, by_prompt, kendall_tau, ndcg, rankings
from tests.judgements import Comparison, answered

Prompt = tuple[list[float], list[Comparison]]


def compared(ranks: list[int]) -> list[Comparison]:
    """All comparisons of answers with these ranks; 1 is the best, and equal ranks tie."""
    return [
        (*((a, b) if ranks[a] <= ranks[b] else (b, a)), 0.5 if ranks[a] == ranks[b] else 1.0)
        for a, b in itertools.combinations(range(len(ranks)), 2)
    ]


def drawn(seed: int, most: int = 7) -> tuple[list[float], list[int]]:
    """Random rewards and ranks of some answers; both may contain equal values."""
    draw = random.Random(seed)
    count = draw.randint(3, most)
    return (
        [draw.randint(-3, 3) / 2 for _ in range(count)],
        [draw.randint(1, 4) for _ in range(count)],
    )


def ranking(rewards: list[float], comparisons: list[Comparison]) -> Ranking:
    [found] = by_prompt(answered([(rewards, comparisons)]))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_kendalls_tau_of_all_pairs_matches_scipy(seed: int) -> None:
    rewards, ranks = drawn(seed)
    found = kendall_tau(ranking(rewards, compared(ranks)))
    expected = stats.kendalltau(rewards, [-rank for rank in ranks], variant="b").statistic
    assert found == pytest.approx(0 if np.isnan(expected) else expected)


def test_kendalls_tau_counts_only_the_compared_pairs() -> None:
    """Two of three decided pairs are correct; one tie has equal rewards, the other does not."""
    some = [(0, 1, 1.0), (1, 2, 1.0), (3, 0, 1.0), (3, 4, 0.5), (2, 4, 0.5)]
    found = kendall_tau(ranking([3.0, 2.0, 1.0, 0.0, 0.0], some))
    assert found == pytest.approx((2 - 1) / np.sqrt(3 * 4))


@pytest.mark.parametrize("seed", range(40))
def test_ndcg_matches_scikit_learn(seed: int) -> None:
    rewards, ranks = drawn(seed)
    won = [0.0] * len(ranks)
    for better, worse, preference in compared(ranks):
        won[better] += 1 if preference == 1 else 0.5
        won[worse] += 0 if preference == 1 else 0.5
    assert ndcg(ranking(rewards, compared(ranks))) == pytest.approx(ndcg_score([won], [rewards]))


@pytest.mark.parametrize("seed", range(40))
def test_best_of_n_is_the_share_of_highest_rewards_on_best_answers(seed: int) -> None:
    rewards, ranks = drawn(seed)
    highest = [answer for answer, reward in enumerate(rewards) if reward == max(rewards)]
    hits = [ranks[answer] == min(ranks) for answer in highest]
    found = best_of_n(ranking(rewards, compared(ranks)))
    assert found == pytest.approx((sum(hits) / len(hits), ranks.count(min(ranks)) / len(ranks)))


def test_best_answers_are_those_to_which_no_other_is_preferred() -> None:
    """Answers that were never compared with each other may both be best; no answer wins a tie."""
    some = [(0, 1, 1.0), (2, 1, 0.75), (2, 3, 0.5)]
    assert best_of_n(ranking([0.0, 1.0, 2.0, -1.0], some)) == (1, 0.75)
    assert best_of_n(ranking([0.0, 3.0, 2.0, -1.0], some)) == (0, 0.75)
    cycle = [(0, 1, 1.0), (1, 2, 1.0), (2, 0, 1.0)]
    assert best_of_n(ranking([0.0, 1.0, 2.0], cycle)) is None


def mixed() -> tuple[list[Prompt], Judged]:
    """Rankings of 3 to 7 answers, and prompts that are not rankings: pairs, and only ties."""
    some: list[Prompt] = [
        (rewards, compared(ranks)) for rewards, ranks in map(drawn, range(30)) if len({*ranks}) > 1
    ]
    others: list[Prompt] = [
        ([1.0, 0.0], [(0, 1, 1.0)]),
        ([1.0, 0.0, 2.0], compared([1, 1, 1])),
        ([1.0, 1.0], [(0, 1, 0.5)]),
    ]
    judged = answered([*some[:10], *others, *some[10:]])
    return some, judged.take(np.random.default_rng(0).permutation(len(judged)))


def test_figures_are_means_over_the_prompts_with_rankings() -> None:
    some, judged = mixed()
    found = rankings(judged)
    for name, figure in (("kendall_tau", kendall_tau), ("ndcg", ndcg)):
        values = [figure(ranking(*each)) for each in some]
        assert found[name]["mean"] == pytest.approx(sum(values) / len(values))
        assert found[name]["low"] < found[name]["mean"] < found[name]["high"]
        assert found[name]["prompts"] == len(some)
    best = [best_of_n(ranking(*each)) for each in some]
    shares, chances = zip(*(each for each in best if each), strict=True)
    assert found["best_of_n"]["mean"] == pytest.approx(sum(shares) / len(some))
    assert found["best_of_n"]["chance"] == pytest.approx(sum(chances) / len(some))
    decided = [
        (rewards[j], rewards[k])
        for rewards, comparisons in some
        for j, k, preference in comparisons
        if preference > 0.5
    ]
    right = [0.5 if j == k else float(j > k) for j, k in decided]
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
    assert (found["pairs"], found["prompts"]) == (len(right), len(some))
    assert found["answers"] == sum(len(rewards) for rewards, _ in some)


def test_intervals_match_resampled_prompts() -> None:
    some, judged = mixed()
    values = [kendall_tau(ranking(*each)) for each in some]
    draw = random.Random(0)
    means = sorted(sum(draw.choice(values) for _ in values) / len(values) for _ in range(4000))
    found = rankings(judged)["kendall_tau"]
    assert (found["low"], found["high"]) == pytest.approx((means[100], means[3900]), abs=0.03)


def test_best_order_has_the_highest_figures_and_its_reverse_the_lowest() -> None:
    ranks = [1, 2, 3, 4]
    best = rankings(answered([([4.0, 3.0, 2.0, 1.0], compared(ranks))] * 5))
    worst = rankings(answered([([1.0, 2.0, 3.0, 4.0], compared(ranks))] * 5))
    for name, least in (("best_of_n", 0), ("kendall_tau", -1), ("ndcg", None)):
        assert best[name]["mean"] == best[name]["high"] == 1
        if least is not None:
            assert worst[name]["mean"] == worst[name]["low"] == least
    assert best["best_of_n"]["low"] == pytest.approx(0.025 ** (1 / 5))
    assert best["kendall_tau"]["low"] == pytest.approx(2 * 0.025 ** (1 / 5) - 1)
    assert (best["accuracy"], worst["accuracy"]) == (1, 0)


def test_no_rankings_give_no_figures() -> None:
    pair, tied = ([1.0, 0.0], [(0, 1, 1.0)]), ([1.0, 0.0, 2.0], compared([1, 1, 1]))
    assert rankings(answered([pair, tied])) == {"prompts": 0}
    cycle = ([0.0, 1.0, 2.0], [(0, 1, 1.0), (1, 2, 1.0), (2, 0, 1.0)])
    found = rankings(answered([cycle]))
    assert found["best_of_n"] == {"prompts": 0}
    assert found["kendall_tau"]["prompts"] == 1
