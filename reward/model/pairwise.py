"""The Bradley-Terry model of a preference, as pure functions of rewards. All shapes [pairs].

P(chosen is preferred) = sigmoid(r_chosen - r_rejected): Bradley and Terry 1952, "Rank analysis of
incomplete block designs"; as a loss for reward models: Ouyang et al. 2022, equation 1.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def chosen_and_rejected(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards of chosen and of rejected, out of those of both sides pair by pair, [2 * pairs]."""
    chosen, rejected = rewards.view(-1, 2).unbind(1)
    return chosen, rejected


def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected) of every pair, in fp32."""
    return -logsigmoid(margins(chosen, rejected))


def correct(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen answer has the higher reward, 0 where the lower, one half at a tie."""
    return torch.heaviside(margins(chosen, rejected), torch.tensor(0.5, device=chosen.device))


def margins(chosen: Tensor, rejected: Tensor) -> Tensor:
    """r_chosen - r_rejected in fp32. Raises ValueError unless both have one and the same shape."""
    if chosen.shape != rejected.shape or chosen.dim() != 1:
        raise ValueError(f"rewards of shapes {chosen.shape} and {rejected.shape}, wanted [pairs]")
    return chosen.float() - rejected.float()
