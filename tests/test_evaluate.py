"""The evaluation: every figure against a slow loop, every file against what it promises."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from datasets import load_from_disk

from stages import evaluate, preprocess
from stages.evaluate import Evaluate, interval
from stages.outputs import digests
from stages.packing import Texts
from stages.process import Fault

from .conftest import write_pairs

Scorer = Callable[[dict[str, Any]], tuple[float, float]]
GROUP = Evaluate(tokens_per_pack=4096, bootstrap_samples=2000, seed=0)


@pytest.fixture
def judged(
    workspace: Path, set_params: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Scorer], dict[str, Any]]:
    """Run the stage with a function of a row in the model's place; returns its metrics."""
    write_pairs(workspace / "data" / "raw" / "pairs.json", 100)
    set_params("preprocess", validation_fraction=0.1, test_fraction=0.2)
    preprocess.main()

    def run(scorer: Scorer) -> dict[str, Any]:
        def score(_: None, pairs: list[Texts], __: int) -> torch.Tensor:
            rows = load_from_disk(evaluate.TEST)
            assert [len(texts.ids[0]) for texts in pairs] == [len(x) for x in rows["input_ids_j"]]
            return torch.tensor([reward for row in rows for reward in scorer(row)])

        monkeypatch.setattr(evaluate, "load", lambda *_: None)
        monkeypatch.setattr(evaluate, "require_exact", lambda *_: None)
        monkeypatch.setattr(evaluate, "score", score)
        evaluate.main()
        content: dict[str, Any] = json.loads(evaluate.METRICS.read_text())
        return content

    return run


def by_id(row: dict[str, Any]) -> tuple[float, float]:
    """Rewards that say nothing, with some ties among them."""
    draw = random.Random(str((row["input_ids_j"], row["input_ids_k"])))
    return float(draw.randint(0, 3)), float(draw.randint(0, 3))


def test_a_constant_scorer_is_right_half_of_the_time(
    judged: Callable[[Scorer], dict[str, Any]],
) -> None:
    metrics = judged(lambda row: (0.25, 0.25))
    assert metrics["accuracy"] == 0.5
    assert metrics["accuracy_low"] == metrics["accuracy_high"] == 0.5
    assert metrics["ties"] == metrics["pairs"] == 20
    assert metrics["loss"] == pytest.approx(math.log(2))
    assert metrics["margin_mean"] == metrics["margin_std"] == 0


def test_an_oracle_is_always_right_and_its_opposite_never(
    judged: Callable[[Scorer], dict[str, Any]],
) -> None:
    assert judged(lambda row: (1.0, 0.0))["accuracy"] == 1
    assert judged(lambda row: (0.0, 1.0))["accuracy"] == 0


def test_figures_are_those_of_a_plain_loop(judged: Callable[[Scorer], dict[str, Any]]) -> None:
    metrics = judged(by_id)
    rows = list(load_from_disk("data/tokenized/test"))
    figures: dict[str, list[float]] = {"all": [], "rude": [], "short": []}
    margins, losses, ties = [], [], 0
    for row in rows:
        chosen, rejected = by_id(row)
        hit = 0.5 if chosen == rejected else float(chosen > rejected)
        ties += chosen == rejected
        margins.append(chosen - rejected)
        losses.append(math.log1p(math.exp(rejected - chosen)))
        figures["all"].append(hit)
        figures[row["kind"]].append(hit)
    mean = sum(margins) / len(margins)
    assert ties > 0
    assert metrics["accuracy"] == pytest.approx(sum(figures["all"]) / len(rows))
    assert metrics["ties"] == ties
    assert metrics["pairs"] == len(rows)
    assert metrics["prompts"] == len({row["prompt_id"] for row in rows})
    assert metrics["loss"] == pytest.approx(sum(losses) / len(rows))
    assert metrics["margin_mean"] == pytest.approx(mean)
    assert metrics["margin_std"] == pytest.approx(
        math.sqrt(sum((margin - mean) ** 2 for margin in margins) / len(margins))
    )
    assert metrics["by"].keys() == {"kind"}
    for kind in ("rude", "short"):
        found = metrics["by"]["kind"][kind]
        assert found["accuracy"] == pytest.approx(sum(figures[kind]) / len(figures[kind]))
        assert found["pairs"] == len(figures[kind])
        assert 0 <= found["low"] <= found["accuracy"] <= found["high"] <= 1


def test_rewards_of_every_pair_are_kept_in_order_with_its_columns(
    judged: Callable[[Scorer], dict[str, Any]],
) -> None:
    judged(by_id)
    found = pyarrow.parquet.read_table(evaluate.REPORTS / "rewards.parquet").to_pylist()
    wanted = [
        {
            "id": row["id"],
            "reward_chosen": by_id(row)[0],
            "reward_rejected": by_id(row)[1],
            "margin": by_id(row)[0] - by_id(row)[1],
            "tokens_chosen": len(row["input_ids_j"]),
            "tokens_rejected": len(row["input_ids_k"]),
            "prompt_id": row["prompt_id"],
            "kind": row["kind"],
        }
        for row in load_from_disk("data/tokenized/test")
    ]
    assert found == wanted


def test_plots_show_every_pair_and_every_slice(judged: Callable[[Scorer], dict[str, Any]]) -> None:
    metrics = judged(by_id)
    histogram = json.loads((evaluate.REPORTS / "margins.json").read_text())
    slices = json.loads((evaluate.REPORTS / "slices.json").read_text())
    assert sum(entry["pairs"] for entry in histogram) == metrics["pairs"]
    assert [row["slice"] for row in slices] == ["kind: rude", "kind: short"]
    assert [row["accuracy"] for row in slices] == [
        metrics["by"]["kind"][kind]["accuracy"] for kind in ("rude", "short")
    ]


def test_same_rewards_give_the_same_bytes(judged: Callable[[Scorer], dict[str, Any]]) -> None:
    judged(by_id)
    first = digests(evaluate.REPORTS), evaluate.METRICS.read_bytes()
    judged(by_id)
    assert first[0].keys() == {"margins.json", "rewards.parquet", "slices.json"}
    assert (digests(evaluate.REPORTS), evaluate.METRICS.read_bytes()) == first


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_rewards_that_are_not_finite_stop_the_stage(
    judged: Callable[[Scorer], dict[str, Any]], broken: float
) -> None:
    with pytest.raises(Fault, match="rewards of 20 of 20 test pairs are not finite"):
        judged(lambda row: (broken, 0.0))
    assert not evaluate.REPORTS.exists()
    assert not evaluate.METRICS.exists()


# --- the interval ----------------------------------------------------------------------------


def slow_interval(right: list[float], prompts: list[int], samples: int) -> tuple[float, float]:
    """Draw prompts with their pairs, with replacement; the middle 95% of the accuracies."""
    draw = random.Random(1)
    names = sorted(set(prompts))
    accuracies = []
    for _ in range(samples):
        hits: list[float] = []
        for name in (draw.choice(names) for _ in names):
            hits += [hit for hit, prompt in zip(right, prompts, strict=True) if prompt == name]
        accuracies.append(sum(hits) / len(hits))
    accuracies.sort()
    return accuracies[int(0.025 * samples)], accuracies[int(0.975 * samples)]


@pytest.mark.parametrize("seed", range(3))
def test_interval_is_that_of_resampled_prompts(seed: int) -> None:
    draw = random.Random(seed)
    prompts = [draw.randrange(25) for _ in range(80)]
    right = [draw.choice([0.0, 0.5, 1.0, 1.0]) for _ in prompts]
    found = interval(np.array(right), np.array(prompts), GROUP)
    assert found == pytest.approx(slow_interval(right, prompts, 2000), abs=0.02)


def test_pairs_of_one_prompt_count_as_one_draw() -> None:
    """Ten copies of every pair are no more evidence than one."""
    right = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.5])
    prompts = np.arange(8)
    once = interval(right, prompts, GROUP)
    copied = interval(np.repeat(right, 10), np.repeat(prompts, 10), GROUP)
    assert copied == pytest.approx(once)
    assert once[1] - once[0] > 0.4


def test_a_single_prompt_tells_nothing() -> None:
    assert interval(np.array([1.0, 1.0]), np.array([7, 7]), GROUP) == (0.0, 1.0)


def test_interval_follows_its_seed() -> None:
    right, prompts = np.array([1.0, 0.0] * 20), np.arange(40)
    other = Evaluate(tokens_per_pack=1, bootstrap_samples=50, seed=1)
    again = Evaluate(tokens_per_pack=1, bootstrap_samples=50, seed=1)
    third = Evaluate(tokens_per_pack=1, bootstrap_samples=50, seed=2)
    assert interval(right, prompts, other) == interval(right, prompts, again)
    assert interval(right, prompts, other) != interval(right, prompts, third)


def test_all_right_or_all_wrong_is_not_certain() -> None:
    """Ten prompts without a miss: a model that is right in 0.69 of prompts does it in 1 of 40."""
    group, prompts = Evaluate(4096, 100, 0), np.arange(20) % 10
    low, high = interval(np.ones(20), prompts, group)
    assert low**10 == pytest.approx(0.025)
    assert high == 1
    assert interval(np.zeros(20), prompts, group) == (0, 1 - low)
