"""Packs: every pair once, in order, within the limit, and read where its text ends."""

import random
from itertools import pairwise

import pytest
import torch

from stages.packing import pack, plan, tokens


def row(chosen: list[int], rejected: list[int]) -> dict[str, list[int]]:
    return {"input_ids_j": chosen, "input_ids_k": rejected}


def random_lengths(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(1, 50) for _ in range(draw.randint(1, 30))]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("limit", [1, 64, 200, 10**6])
def test_plan_holds_every_pair_once_and_in_order(seed: int, limit: int) -> None:
    lengths = random_lengths(seed)
    flat = [index for group in plan(lengths, limit) for index in group]
    assert flat == list(range(len(lengths)))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("limit", [1, 64, 200, 10**6])
def test_a_pack_is_within_the_limit_and_takes_the_next_pair_if_it_fits(
    seed: int, limit: int
) -> None:
    lengths = random_lengths(seed)
    groups = plan(lengths, limit)
    for group in groups:
        size = 2 * len(group) * max(lengths[index] for index in group)
        assert size <= limit or len(group) == 1
    for group, following in pairwise(groups):
        larger = [*group, following[0]]
        assert 2 * len(larger) * max(lengths[index] for index in larger) > limit


def test_no_pairs_need_no_pack() -> None:
    assert plan([], 100) == []


def test_size_of_a_pair_is_that_of_its_longer_side() -> None:
    assert tokens(row([1, 2, 3], [4])) == 3
    assert tokens(row([1], [4, 5])) == 2


def test_pack_holds_chosen_first_then_rejected_padded_on_the_right() -> None:
    found = pack([row([11, 12, 13], [21]), row([31, 32], [41, 42, 43, 44])])
    assert found.input_ids.tolist() == [
        [11, 12, 13, 0],
        [31, 32, 0, 0],
        [21, 0, 0, 0],
        [41, 42, 43, 44],
    ]
    assert found.attention_mask.tolist() == [
        [1, 1, 1, 0],
        [1, 1, 0, 0],
        [1, 0, 0, 0],
        [1, 1, 1, 1],
    ]
    assert found.last.tolist() == [2, 1, 0, 3]


def test_reward_is_read_at_the_last_token_even_if_it_is_the_padding_id() -> None:
    found = pack([row([5, 0], [0, 0, 0]), row([5], [6, 7, 0])])
    ends = found.input_ids[torch.arange(4), found.last]
    assert found.last.tolist() == [1, 0, 2, 2]
    assert ends.tolist() == [0, 5, 0, 0]
    assert found.attention_mask.sum(1).tolist() == [2, 1, 3, 3]
