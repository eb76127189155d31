"""The Bradley-Terry model of preferences, as pure functions of rewards. All shapes are [pairs].

P(j is preferred to k) = sigmoid(r_j - r_k): Bradley and Terry 1952, "Rank analysis of incomplete
block designs"; as a loss for reward models: Ouyang et al. 2022, equation 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from reward.data.columns import PREFERENCE, TARGET_MARGIN, TIE, WEIGHT
from reward.model.packing import to_device


@dataclass(frozen=True)
class Labels:
    """The labels of pairs, from the columns GRADES of the data, fp32: [pairs] each.

    `preference` is the probability that j is preferred, 0.5 for a tie. `weight` is how much a pair
    counts. `margin` is the target margin, which the difference of the rewards should exceed.
    """

    preference: Tensor
    weight: Tensor
    margin: Tensor

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> "Labels":
        """The labels of tokenized pairs, on the CPU.

        Raises ValueError if an uncertain pair has a margin, because swapping its two sides would
        change the loss.
        """
        preference, weight, margin = (
            torch.from_numpy(np.asarray(columns[name][:], dtype=np.float32))
            for name in (PREFERENCE, WEIGHT, TARGET_MARGIN)
        )
        if ((margin != 0) & (preference != 1)).any():
            raise ValueError("a pair has a margin, but its preference is not 1")
        return cls(preference, weight, margin)

    @classmethod
    def certain(cls, pairs: int) -> "Labels":
        """The labels of pairs in which j is preferred, with weight 1 and no margin."""
        return cls(torch.ones(pairs), torch.ones(pairs), torch.zeros(pairs))

    @property
    def decided(self) -> Tensor:
        """Which pairs are not ties."""
        return self.preference != TIE

    def take(self, rows: Tensor | npt.NDArray[np.int64]) -> "Labels":
        """The labels of the pairs with these indices."""
        return Labels(self.preference[rows], self.weight[rows], self.margin[rows])

    def to(self, device: torch.device) -> "Labels":
        """The labels on a device."""
        return Labels(*to_device(torch.stack([self.preference, self.weight, self.margin]), device))


def losses(j: Tensor, k: Tensor, labels: Labels, center: float = 0.0) -> Tensor:
    """The weighted loss of every pair, in fp32.

    With d = r_j - r_k, the loss of a certain pair is -log sigmoid(d - margin) (Touvron et al. 2023,
    "Llama 2", equation 2). The loss of a pair with preference p is the cross-entropy
    -p log sigmoid(d) - (1 - p) log sigmoid(-d). The term `center` times (r_j + r_k)^2 is added to
    keep rewards around zero (Eisenstein et al. 2023, "Helping or herding?").
    """
    difference = margins(j, k) - same_shape(j, labels.margin)
    preference, weight = same_shape(j, labels.preference), same_shape(j, labels.weight)
    likelihood = preference * logsigmoid(difference) + (1 - preference) * logsigmoid(-difference)
    if center:
        return weight * (center * (j.float() + k.float()).square() - likelihood)
    return -weight * likelihood


def correct(j: Tensor, k: Tensor) -> Tensor:
    """1 where j has the higher reward, 0 where k has, and 0.5 where they are equal."""
    found = margins(j, k)
    return torch.heaviside(found, found.new_full((), 0.5))


def margins(j: Tensor, k: Tensor) -> Tensor:
    """r_j - r_k in fp32. Raises ValueError unless both are [pairs]."""
    if j.dim() != 1:
        raise ValueError(f"rewards of shape {tuple(j.shape)}, expected [pairs]")
    return j.float() - same_shape(j, k).float()


def same_shape(rewards: Tensor, other: Tensor) -> Tensor:
    """Returns `other`. Raises ValueError if it would be broadcast to the shape of `rewards`."""
    if rewards.shape != other.shape:
        raise ValueError(
            f"shapes {tuple(rewards.shape)} and {tuple(other.shape)}, expected one for each pair"
        )
    return other
