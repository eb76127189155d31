"""The loss, the correct and the margins against plain Python, number by number."""

import math
from collections.abc import Callable

import pytest
import torch

from reward.model.pairwise import correct, losses, margins

Figure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

CHOSEN = [0.0, 2.5, -1.0, 3.25, 1e-4, 80.0, -80.0]
REJECTED = [0.0, 1.0, 4.0, 3.25, 0.0, -80.0, 80.0]


def test_loss_is_minus_the_log_of_the_probability_that_chosen_wins() -> None:
    wanted = []
    for chosen, rejected in zip(CHOSEN, REJECTED, strict=True):
        margin = chosen - rejected
        if margin > 0:
            wanted.append(math.log1p(math.exp(-margin)))
        else:
            wanted.append(math.log1p(math.exp(margin)) - margin)
    found = losses(torch.tensor(CHOSEN), torch.tensor(REJECTED))
    assert found.tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-30)


def test_loss_of_an_undecided_model_is_ln_2() -> None:
    assert losses(torch.ones(3), torch.ones(3)).tolist() == pytest.approx([math.log(2)] * 3)


def test_gradient_of_the_loss_is_the_probability_of_the_wrong_order() -> None:
    chosen = torch.tensor(CHOSEN, requires_grad=True)
    losses(chosen, torch.tensor(REJECTED)).sum().backward()
    wanted = [
        -1 / (1 + math.exp(margin))
        for margin in (c - r for c, r in zip(CHOSEN, REJECTED, strict=True))
    ]
    assert chosen.grad is not None
    assert chosen.grad.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-30)


def test_a_hit_is_one_a_miss_is_none_a_tie_is_one_half() -> None:
    wanted = []
    for chosen, rejected in zip(CHOSEN, REJECTED, strict=True):
        wanted.append(0.5 if chosen == rejected else float(chosen > rejected))
    assert correct(torch.tensor(CHOSEN), torch.tensor(REJECTED)).tolist() == wanted


def test_margin_is_taken_in_fp32_even_of_half_precision_rewards() -> None:
    chosen = torch.tensor([256.0, 1.0]).bfloat16()
    rejected = torch.tensor([1.0, 0.5]).bfloat16()
    found = margins(chosen, rejected)
    assert found.dtype == torch.float32
    assert found.tolist() == [255.0, 0.5]


@pytest.mark.parametrize("function", [losses, correct, margins])
def test_every_figure_has_one_number_a_pair(function: Figure) -> None:
    assert function(torch.zeros(5), torch.ones(5)).shape == (5,)


@pytest.mark.parametrize("shapes", [((5, 1), (5,)), ((5,), (1, 5)), ((5, 1), (5, 1)), ((1,), (5,))])
@pytest.mark.parametrize("function", [losses, correct, margins])
def test_shapes_that_would_broadcast_are_refused(
    function: Figure, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    with pytest.raises(ValueError, match=r"wanted \[pairs\]"):
        function(torch.zeros(shapes[0]), torch.ones(shapes[1]))
