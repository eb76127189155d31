"""Rankings: every answer once, every comparison in one part, every reward from its own text."""

import random
from typing import Any

import pytest
import torch

from reward.model.packing import tokens
from reward.model.rankings import Comparison, Ranking, divided, rankings, sides

Row = dict[str, Any]


def rows_of(seed: int, prompts: int = 4) -> list[Row]:
    """Shuffled comparisons of the answers to some prompts; most answers appear in several."""
    draw = random.Random(seed)
    rows = []
    for prompt in range(prompts):
        shared = [draw.randrange(1000) for _ in range(draw.randint(0, 8))]
        answers = [
            [*shared, 1000 + answer, *(draw.randrange(1000) for _ in range(draw.randint(0, 6)))]
            for answer in range(draw.randint(2, 6))
        ]
        found = [(j, k) for j in range(len(answers)) for k in range(len(answers)) if j != k]
        for j, k in draw.sample(found, draw.randint(1, len(found))):
            sides = {"answer_j": j, "answer_k": k}
            ids = {"input_ids_j": answers[j], "input_ids_k": answers[k]}
            rows.append({"prompt_id": str(prompt)} | sides | ids)
    draw.shuffle(rows)
    return rows


def slow_prefix(texts: list[list[int]]) -> int:
    shared = 0
    while all(len(text) > shared + 1 and text[shared] == texts[0][shared] for text in texts):
        shared += 1
    return shared


def compared_ids(ranked: list[Ranking]) -> list[tuple[int, list[int], list[int]]]:
    """The row, the ids of j and the ids of k of every comparison."""
    return sorted(
        (each.row, [*ranking.texts.ids[each.j]], [*ranking.texts.ids[each.k]])
        for ranking in ranked
        for each in ranking.comparisons
    )


def expected_ids(rows: list[Row]) -> list[tuple[int, list[int], list[int]]]:
    return [(index, row["input_ids_j"], row["input_ids_k"]) for index, row in enumerate(rows)]


@pytest.mark.parametrize("seed", range(20))
def test_each_answer_appears_once_and_comparisons_refer_to_their_answers(seed: int) -> None:
    rows = rows_of(seed)
    found = rankings(rows)
    assert compared_ids(found) == expected_ids(rows)
    for ranking in found:
        texts = [[*ids] for ids in ranking.texts.ids]
        assert len({*map(tuple, texts)}) == len(texts)
        assert ranking.texts.prefix == slow_prefix(texts)
    assert len(found) == len({row["prompt_id"] for row in rows})


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("limit", [1, 12, 20, 30, 10**6])
def test_parts_fit_and_contain_every_comparison_once(seed: int, limit: int) -> None:
    rows = rows_of(seed)
    parts = [part for ranking in rankings(rows) for part in divided(ranking, limit)]
    assert compared_ids(parts) == expected_ids(rows)
    for part in parts:
        assert tokens(part.texts) <= limit or len(part.texts.ids) == 2
        used = {text for each in part.comparisons for text in (each.j, each.k)}
        assert used == {*range(len(part.texts.ids))}


def test_ranking_that_fits_is_one_part() -> None:
    ranking = rankings(rows_of(seed=0, prompts=1))[0]
    assert divided(ranking, tokens(ranking.texts)) == [ranking]
    assert len(divided(ranking, tokens(ranking.texts) - 1)) > 1


def test_parts_of_a_full_ranking_have_many_comparisons_of_few_texts() -> None:
    """If 4 of 6 answers fit, the first four form one part with all of their comparisons."""
    rows = [
        {"prompt_id": "p", "answer_j": j, "answer_k": k}
        | {"input_ids_j": [7, 7, 10 + j], "input_ids_k": [7, 7, 10 + k]}
        for j in range(6)
        for k in range(j + 1, 6)
    ]
    [ranking] = rankings(rows)
    parts = divided(ranking, 6)
    assert len(parts[0].comparisons) == 6
    assert sum(len(part.texts.ids) for part in parts) < 2 * len(rows)


def test_part_shares_the_longest_prefix_of_its_own_texts() -> None:
    """So a comparison alone takes as many tokens as its pair."""
    ids = [[7, 1, 2, 3, 4], [7, 1, 2, 3, 5], [7, 9, 9, 9, 9]]
    rows = [
        {"prompt_id": "p", "answer_j": 0, "answer_k": k, "input_ids_j": ids[0], "input_ids_k": two}
        for k, two in enumerate(ids[1:], 1)
    ]
    [ranking] = rankings(rows)
    assert ranking.texts.prefix == 1
    assert [tokens(part.texts) for part in divided(ranking, 6)] == [6, 9]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [12, 10**6])
def test_sides_have_the_rewards_of_their_rows(seed: int, limit: int) -> None:
    rows = rows_of(seed)
    parts = [part for ranking in rankings(rows) for part in divided(ranking, limit)]
    texts = [ids for part in parts for ids in part.texts.ids]
    rewards = torch.tensor([float(hash(tuple(map(int, ids))) % 10007) for ids in texts])
    j, k, row = sides(rewards, parts)
    for name, found in (("input_ids_j", j), ("input_ids_k", k)):
        expected = [float(hash(tuple(rows[index][name])) % 10007) for index in row]
        assert found.tolist() == expected
    assert sorted(row.tolist()) == [*range(len(rows))]


def test_gradient_of_a_reward_is_the_sum_over_its_comparisons() -> None:
    [ranking] = rankings(
        [
            {"prompt_id": "p", "answer_j": j, "answer_k": k}
            | {"input_ids_j": [j], "input_ids_k": [k]}
            for j, k in ((0, 1), (0, 2), (2, 1))
        ]
    )
    assert [*ranking.comparisons] == [Comparison(0, 0, 1), Comparison(1, 0, 2), Comparison(2, 2, 1)]
    rewards = torch.zeros(3, requires_grad=True)
    j, k, _ = sides(rewards, [ranking])
    (j - k).sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [2, -2, 0]
