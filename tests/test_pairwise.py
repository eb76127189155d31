"""Losses, correct counts and margins against plain Python, number by number."""

import math
import random
from collections.abc import Callable

import pytest
import torch

from reward.model.pairwise import Labels, correct, losses, margins

Figure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

CHOSEN = [0.0, 2.5, -1.0, 3.25, 1e-4, 80.0, -80.0]
REJECTED = [0.0, 1.0, 4.0, 3.25, 0.0, -80.0, 80.0]


def certain_losses(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return losses(chosen, rejected, Labels.certain(len(chosen)))


def log_sigmoid(number: float) -> float:
    return -math.log1p(math.exp(-number)) if number > 0 else number - math.log1p(math.exp(number))


def test_loss_is_the_negative_log_probability_that_chosen_wins() -> None:
    expected = [-log_sigmoid(one - other) for one, other in zip(CHOSEN, REJECTED, strict=True)]
    found = certain_losses(torch.tensor(CHOSEN), torch.tensor(REJECTED))
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-30)


def test_loss_of_an_undecided_model_is_ln_2() -> None:
    assert certain_losses(torch.ones(3), torch.ones(3)).tolist() == pytest.approx([math.log(2)] * 3)


def test_gradient_of_the_loss_is_the_probability_of_the_wrong_order() -> None:
    chosen = torch.tensor(CHOSEN, requires_grad=True)
    certain_losses(chosen, torch.tensor(REJECTED)).sum().backward()
    expected = [
        -1 / (1 + math.exp(margin))
        for margin in (c - r for c, r in zip(CHOSEN, REJECTED, strict=True))
    ]
    assert chosen.grad is not None
    assert chosen.grad.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-30)


# --- labels ----------------------------------------------------------------------------------


def random_pairs(seed: int, count: int = 40) -> list[tuple[float, float, float, float, float]]:
    """Rewards of j and k, preference, weight and margin; only certain pairs have a margin."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        preference = draw.choice([0.5, 1.0, draw.uniform(0.5, 1)])
        margin = draw.choice([0.0, draw.uniform(0, 3)]) if preference == 1 else 0.0
        rewards = draw.gauss(0, 4), draw.gauss(0, 4)
        found.append((*rewards, preference, draw.uniform(0.1, 3), margin))
    return found


def slow_loss(
    j: float, k: float, preference: float, weight: float, margin: float, center: float
) -> float:
    if preference == 1:
        entropy = -log_sigmoid(j - k - margin)
    else:
        entropy = -preference * log_sigmoid(j - k) - (1 - preference) * log_sigmoid(k - j)
    return weight * (entropy + center * (j + k) ** 2)


@pytest.mark.parametrize("center", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_loss_of_graded_pairs_matches_a_plain_loop(seed: int, center: float) -> None:
    pairs = random_pairs(seed)
    j, k, *labels = torch.tensor(pairs).unbind(1)
    found = losses(j, k, Labels(*labels), center)
    assert found.tolist() == pytest.approx(
        [slow_loss(*pair, center) for pair in pairs], rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize("center", [0.0, 0.01])
def test_gradients_of_graded_pairs_match_fp64_differences(center: float) -> None:
    pairs = random_pairs(seed=3)
    j, k, *labels = torch.tensor(pairs).unbind(1)
    j.requires_grad_(), k.requires_grad_()
    losses(j, k, Labels(*labels), center).sum().backward()
    step = 1e-5
    for side, found in enumerate((j.grad, k.grad)):
        assert found is not None
        for (one, other, *of), gradient in zip(pairs, found.tolist(), strict=True):
            graded = of[0], of[1], of[2]
            there, here = (
                slow_loss(
                    one + (side == 0) * way, other + (side == 1) * way, *graded, center=center
                )
                for way in (step, -step)
            )
            slope = (there - here) / (2 * step)
            assert gradient == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_soft_label_pulls_the_margin_to_its_log_odds() -> None:
    j = torch.tensor([math.log(0.8 / 0.2), 0.0], requires_grad=True)
    labels = Labels(torch.tensor([0.8, 0.5]), torch.ones(2), torch.zeros(2))
    losses(j, torch.zeros(2), labels).sum().backward()
    assert j.grad is not None
    assert j.grad.tolist() == pytest.approx([0, 0], abs=1e-6)


def test_swapped_sides_with_the_opposite_preference_have_the_same_loss() -> None:
    j, k, preference, weight, _ = torch.tensor(random_pairs(seed=4)).unbind(1)
    nothing = torch.zeros(len(j))
    found = losses(j, k, Labels(preference, weight, nothing), 0.1)
    swapped = losses(k, j, Labels(1 - preference, weight, nothing), 0.1)
    assert swapped.tolist() == pytest.approx(found.tolist(), rel=1e-5)


def columns(**values: list[float]) -> dict[str, list[float]]:
    return {"preference": [1.0, 0.7], "weight": [1.0, 1.0], "margin": [0.0, 0.0]} | values


def test_margin_of_an_uncertain_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="a pair has a margin, but its preference is not 1"):
        Labels.of(columns(margin=[0.0, 1.0]))


def test_labels_are_taken_by_row() -> None:
    taken = Labels.of(columns(margin=[2.0, 0.0], weight=[3.0, 4.0])).take(torch.tensor([1, 0, 1]))
    assert taken.preference.tolist() == pytest.approx([0.7, 1.0, 0.7])
    assert (taken.weight.tolist(), taken.margin.tolist()) == ([4, 3, 4], [0, 2, 0])


# --- shapes ----------------------------------------------------------------------------------


def test_correct_is_one_half_for_equal_rewards() -> None:
    expected = []
    for chosen, rejected in zip(CHOSEN, REJECTED, strict=True):
        expected.append(0.5 if chosen == rejected else float(chosen > rejected))
    assert correct(torch.tensor(CHOSEN), torch.tensor(REJECTED)).tolist() == expected


def test_margins_of_half_precision_rewards_are_fp32() -> None:
    chosen = torch.tensor([256.0, 1.0]).bfloat16()
    rejected = torch.tensor([1.0, 0.5]).bfloat16()
    found = margins(chosen, rejected)
    assert found.dtype == torch.float32
    assert found.tolist() == [255.0, 0.5]


@pytest.mark.parametrize("function", [certain_losses, correct, margins])
def test_every_function_returns_one_number_per_pair(function: Figure) -> None:
    assert function(torch.zeros(5), torch.ones(5)).shape == (5,)


@pytest.mark.parametrize("shapes", [((5, 1), (5,)), ((5,), (1, 5)), ((5, 1), (5, 1)), ((1,), (5,))])
@pytest.mark.parametrize("function", [certain_losses, correct, margins])
def test_shapes_that_would_broadcast_are_refused(
    function: Figure, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    with pytest.raises(ValueError, match=r"expected \[pairs\]|one for each pair"):
        function(torch.zeros(shapes[0]), torch.ones(shapes[1]))


@pytest.mark.parametrize("part", ["preference", "weight", "margin"])
def test_labels_that_would_broadcast_are_refused(part: str) -> None:
    labels = {name: torch.ones(5) for name in ("preference", "weight", "margin")}
    for shape in ((1,), (5, 1), (4,)):
        with pytest.raises(ValueError, match="one for each pair"):
            losses(torch.ones(5), torch.zeros(5), Labels(**labels | {part: torch.ones(shape)}))
