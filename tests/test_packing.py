"""Packs: every prompt once, in order, within the limit, without padding, every text recoverable."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset, Sequence, Value, concatenate_datasets

from reward.model.packing import (
    Texts,
    balanced,
    extremes,
    into_packs,
    pack,
    pair,
    rows_in,
    rows_of,
    split_to_fit,
    texts_of,
    tokens,
)


def random_lengths(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(1, 50) for _ in range(draw.randint(1, 30))]


def random_prompts(seed: int, most_texts: int = 4) -> list[Texts]:
    draw = random.Random(seed)

    def ids(least: int) -> list[int]:
        return [draw.randrange(1000) for _ in range(draw.randint(least, 9))]

    prompts = []
    for _ in range(draw.randint(1, 6)):
        prefix = ids(0)
        texts = [prefix + ids(1) for _ in range(draw.randint(1, most_texts))]
        prompts.append(Texts(texts, len(prefix)))
    return prompts


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("limit", [1, 64, 200, 10**6])
def test_plan_contains_every_prompt_once_and_in_order(seed: int, limit: int) -> None:
    lengths = random_lengths(seed)
    flat = [index for group in into_packs(lengths, limit) for index in group]
    assert flat == list(range(len(lengths)))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("limit", [1, 64, 200, 10**6])
def test_packs_are_within_the_limit_and_as_full_as_possible(seed: int, limit: int) -> None:
    lengths = random_lengths(seed)
    groups = into_packs(lengths, limit)
    for group in groups:
        assert sum(lengths[index] for index in group) <= limit or len(group) == 1
    for group, following in pairwise(groups):
        assert sum(lengths[index] for index in [*group, following[0]]) > limit


@pytest.mark.parametrize("arranged", ["whole", "in pieces", "selected"])
def test_rows_are_those_of_the_numpy_format(arranged: str) -> None:
    """1,500 rows with empty lists, in one piece or in more, and in another order."""
    draw = random.Random(0)
    rows = [
        {"a": [draw.randrange(9) for _ in range(draw.randint(0, 3))], "b": "x", "c": place}
        for place in range(1500)
    ]
    pieces = [Dataset.from_list(rows[:7]), Dataset.from_list(rows[7:])]
    dataset = concatenate_datasets(pieces) if arranged == "in pieces" else Dataset.from_list(rows)
    dataset = dataset.cast_column("a", Sequence(Value("int32")))  # as tokenized data
    if arranged == "selected":
        dataset = dataset.select(draw.sample(range(1500), 1400))
    expected = dataset.select_columns(["a", "c"]).with_format("numpy")
    places = [5, 1200, 3]
    for found, others in (
        (rows_of(dataset, ["a", "c"]), expected),
        (rows_in(dataset.with_format("arrow")[places]), [expected[place] for place in places]),
    ):
        for one, other in zip(found, others, strict=True):
            assert one["a"].dtype == np.int64
            assert one["a"].tolist() == other["a"].tolist()
            assert one["c"] == other["c"]


def test_plan_for_nothing_is_empty() -> None:
    assert into_packs([], 64) == []


def test_tokenized_pair_becomes_two_texts_of_a_prompt_chosen_first() -> None:
    row = {"input_ids_j": [1, 2, 3], "input_ids_k": [1, 2, 4, 5], "prefix_length": 2}
    texts = pair(row)
    assert (*map(list, texts.ids), texts.prefix) == ([1, 2, 3], [1, 2, 4, 5], 2)
    assert tokens(texts) == 5


@pytest.mark.parametrize(("limit", "sizes"), [(20, [2, 2, 1]), (26, [4, 1]), (5, [1] * 5)])
def test_texts_of_a_prompt_are_divided_if_a_pack_is_too_small(limit: int, sizes: list[int]) -> None:
    texts = [[0] * 10 + [place] * 4 for place in range(5)]
    parts = split_to_fit(texts_of(texts), limit)
    assert [len(part.ids) for part in parts] == sizes
    assert [ids for part in parts for ids in part.ids] == texts
    assert limit < 14 or all(tokens(part) <= limit for part in parts)


def test_pack_holds_whole_first_texts_then_suffixes_of_the_others() -> None:
    found = pack([Texts([[1, 2, 3], [1, 2, 4, 5]], 2), Texts([[6, 7], [8]], 0)])
    assert found.input_ids.tolist() == [[1, 2, 3, 6, 7, 4, 5, 8]]
    assert found.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert found.order.tolist() == [0, 2, 1, 3]
    assert found.layout.ends == [2, 4, 6, 7]


@pytest.mark.parametrize("seed", range(30))
def test_pack_contains_every_text_and_nothing_else(seed: int) -> None:
    prompts = random_prompts(seed)
    found = pack(prompts)
    layout, row = found.layout, found.input_ids[0]
    assert len(row) == sum(map(tokens, prompts))
    read = []
    for index in found.order.tolist():
        end, owner = layout.ends[index] + 1, layout.owner[index]
        start = layout.ends[owner] + 1 - layout.own[owner]
        places = [
            *range(start, start + layout.prefix[index]),
            *range(end - layout.own[index], end),
        ]
        assert found.position_ids[0, places].tolist() == list(range(len(places)))
        read.append(row[places].tolist())
    assert read == [list(text) for texts in prompts for text in texts.ids]
    assert layout.queries == layout.own
    assert layout.at_ends().queries == [1] * len(read)
    assert found.input_ids.dtype == found.position_ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("lengths", "size", "expected"),
    [
        ([5], 100, [0]),
        ([5, 9], 100, [1, 0]),
        ([5, 9], 1, [1, 0]),
        ([5, 9, 3, 7], 100, [1, 3, 0, 2]),
        ([5, 9, 3, 7], 17, [1, 0, 2]),
        ([5, 9, 3, 7], 16, [1, 2]),
        ([4000, 5, 5000, 6], 10**6, [2, 1]),
        ([4000, 5, 3000, 6], 10**6, [0, 3, 1]),
    ],
)
def test_extremes_are_the_longest_and_the_shortest_that_fit_with_it(
    lengths: list[int], size: int, expected: list[int]
) -> None:
    assert extremes(lengths, size) == expected


def test_packs_of_a_step_contain_each_prompt_once_and_are_balanced() -> None:
    draw = random.Random(0)
    for _ in range(200):
        lengths = draw.choices(range(20, 400), k=draw.randrange(1, 200))
        limit = draw.randrange(200, 8000)
        packs = balanced(lengths, limit)
        sizes = [sum(lengths[index] for index in each) for each in packs]
        assert sorted(index for each in packs for index in each) == [*range(len(lengths))]
        assert all(each == sorted(each) for each in packs)
        assert sizes == sorted(sizes, reverse=True)
        assert all(size <= limit or len(each) == 1 for size, each in zip(sizes, packs, strict=True))
        assert len(packs) in (1, 2, 4, len(lengths)) or len(packs) % 8 == 0
        assert sizes[0] - sizes[-1] <= max(lengths)


@pytest.mark.parametrize(
    ("tokens_per_pack", "count"),
    [(12800, 1), (12799, 2), (6400, 2), (6399, 4), (3199, 8), (1599, 16), (799, 24), (1, 128)],
)
def test_number_of_packs_suffices_and_can_be_shared_by_processes(
    tokens_per_pack: int, count: int
) -> None:
    assert len(balanced([100] * 128, tokens_per_pack)) == count
