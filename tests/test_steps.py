"""Steps are planned before training: every row once per epoch, and whole prompts if requested."""

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from reward.model.steps import StepOf, Steps, planned

PROMPTS = [*"aabacbbdeecfgghhhhhhhi"]


def plan(step_of: StepOf, epochs: float = 1, max_steps: int = -1, seed: int = 0) -> list[list[int]]:
    return [rows.tolist() for rows in planned(PROMPTS, 4, step_of, epochs, max_steps, seed)]


@pytest.mark.parametrize("step_of", ["pairs", "prompts"])
@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_epoch_uses_every_row_once(step_of: StepOf, epochs: int) -> None:
    counts = Counter(row for step in plan(step_of, epochs) for row in step)
    assert counts == dict.fromkeys(range(len(PROMPTS)), epochs)


def test_steps_of_pairs_have_the_requested_size() -> None:
    assert [len(step) for step in plan("pairs", 2)] == [4, 4, 4, 4, 4, 2] * 2


@pytest.mark.parametrize("seed", range(5))
def test_steps_take_whole_prompts_until_they_have_enough(seed: int) -> None:
    steps = plan("prompts", seed=seed)
    for step in steps:
        sizes = Counter(PROMPTS[row] for row in step)
        assert all(size == PROMPTS.count(prompt) for prompt, size in sizes.items())
        assert step == steps[-1] or len(step) >= 4
        last = PROMPTS[step[-1]]
        assert len(step) - sizes[last] < 4


@pytest.mark.parametrize("step_of", ["pairs", "prompts"])
def test_each_epoch_and_seed_has_its_own_order(step_of: StepOf) -> None:
    once, twice = plan(step_of, 1), plan(step_of, 2)
    assert twice[: len(once)] == once
    assert len({str(once), str(twice[len(once) :]), str(plan(step_of, seed=1))}) == 3


@pytest.mark.parametrize(
    ("epochs", "steps"), [(0.01, 1), (0.5, 3), (0.51, 4), (1, 6), (1.5, 9), (2.01, 13)]
)
def test_fraction_of_an_epoch_is_that_fraction_of_its_steps(epochs: float, steps: int) -> None:
    assert len(plan("pairs", epochs)) == steps
    assert plan("pairs", 3)[:steps] == plan("pairs", epochs)


@pytest.mark.parametrize("steps", range(1, 31))
def test_rounding_of_a_fraction_adds_no_step(steps: int) -> None:
    prompts = [str(row) for row in range(80)]
    assert len(planned(prompts, 8, "pairs", steps / 10, -1, 0)) == steps


@pytest.mark.parametrize("epochs", [0.5, 1, 2])
@pytest.mark.parametrize("most", [1, 3, 6, 7, 20])
def test_max_steps_ends_the_epochs_early_and_never_adds_steps(epochs: float, most: int) -> None:
    assert plan("pairs", epochs, most) == plan("pairs", epochs)[:most]


def test_step_has_the_texts_and_labels_of_its_rows() -> None:
    count = 6
    dataset = Dataset.from_dict(
        {
            "prompt_id": [*"aabbbc"],
            "answer_j": [0, 0, 0, 1, 0, 0],
            "answer_k": [1, 2, 1, 2, 2, 1],
            "input_ids_j": [[row] for row in range(count)],
            "input_ids_k": [[10 + row] for row in range(count)],
            "preference": [1.0, 0.5, 0.75, 1.0, 1.0, 1.0],
            "weight": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            "margin": [0.0, 0.0, 0.0, 1.0, 2.0, 3.0],
        }
    )
    steps = Steps(dataset, [np.array([5, 2]), np.array([1, 0, 4])])
    assert steps.sizes().tolist() == [2, 3]
    assert [len(ranking.texts.ids) for ranking in steps[0].rankings] == [2, 2]
    [first, second] = steps[1].rankings
    # The second step has rows 1 and 0, which share answer 0, and row 4.
    assert [*map(list, first.texts.ids)] == [[1], [11], [10]]
    assert [*first.comparisons] == [(0, 0, 1), (1, 0, 2)]
    assert [*second.comparisons] == [(2, 0, 1)]
    assert steps[1].labels.weight.tolist() == [2, 1, 5]
    assert steps[1].labels.preference.tolist() == [0.5, 1, 1]
    assert steps[1].labels.margin.tolist() == [0, 0, 2]
