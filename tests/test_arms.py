"""Experiments with arms and seeds: the contents of an arm, and the table of results."""

import argparse
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from benchmarks import arms, votes
from benchmarks.arms import Arm, as_markdown
from reward.data.columns import ANSWERS, PREFIX, TOKENS


@pytest.mark.parametrize(
    ("cast", "share", "majority"),
    [
        ([1, 1, 1], 1.0, 1.0),
        ([1, 2, 2], 1 / 3, 0.0),
        ([1, 2, 0], 0.5, 0.5),
        ([0, 0, 1], 2 / 3, 1.0),
    ],
)
def test_votes_give_a_share_and_a_majority(cast: list[int], share: float, majority: float) -> None:
    record = {"votes": cast}
    assert votes.share(record) == pytest.approx(share)
    assert votes.majority(record) == majority


def test_record_of_an_arm_has_the_preference_for_the_first_answer() -> None:
    record = {"instruction": "ask", "input": "", "response1": "a", "response2": "b", "votes": [2]}
    expected = {"instruction": "ask", "chosen": "a", "rejected": "b", "preference": 0.25}
    assert votes.graded(record, 0.25) == expected
    assert votes.graded(record | {"input": "in"}, 0.25) == expected | {"input": "in"}


def test_arm_is_parsed_into_name_and_parameters() -> None:
    assert Arm.of("pairs:") == Arm("pairs", ())
    assert Arm.of("b:lora.r=8,train.seed=1") == Arm("b", ("lora.r=8", "train.seed=1"))


def rewards(*margins: float) -> pa.Table:
    """Four comparisons for two prompts, the last one a tie."""
    return pa.table(
        {"prompt_id": ["p", "p", "q", "q"], "preference": [1.0, 1, 1, 0.5], "margin": [*margins]}
        | {"reward_chosen": [*margins], "reward_rejected": [0.0] * 4}
        | {name: [1, 1, 2, 2] for name in (*TOKENS, PREFIX, *ANSWERS)}
    )


def test_arms_are_compared_with_the_first_ignoring_ties(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second arm is correct in 3 of 3 and 2 of 3, the first in 1 of 3 and 2 of 3."""
    monkeypatch.setattr(arms, "LOGS", tmp_path)
    found = [Arm("first", ()), Arm("second", ("lora.r=8",))]
    for arm in found:
        for seed in (0, 1):
            (tmp_path / f"x-{arm.name}-{seed}.log").write_text(f"speed      {seed + 2}.5 pairs/s\n")
    tables = {
        "first": [rewards(1, -1, -1, 9), rewards(1, 1, -1, 9)],
        "second": [rewards(1, 1, 1, -9), rewards(1, -1, 1, -9)],
    }
    options: Any = argparse.Namespace(name="x", seeds=2, set_param=["base.name=b"])
    report = as_markdown(options, found, tables)
    assert "test pairs: 4, of 2 prompts; ties: 1; seeds: 2" in report
    assert "| first | 0.5000 | 0.3333 to 0.6667 |" in report
    assert "| second | 0.8333 | 0.6667 to 1.0000 |" in report
    assert "| second | +0.3333 | +0.0000 to +1.0000 |" in report
    # Half of the prompts have no wrong margins, so no temperature is best for them.
    assert report.count("| nan | 3.0 |") == 2


def test_loss_at_temperature_matches_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arms, "LOGS", tmp_path)
    (tmp_path / "x-only-0.log").write_text("")
    # In both prompts 3 of 4 votes prefer the answer that wins by 1: the best T is 1 / ln 3.
    table = rewards(1, 1, 1, 1)
    table = table.set_column(1, "preference", pa.array([0.75] * 4))
    [loss] = arms.found("x", Arm("only", ()), [table]).calibrated
    assert loss == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), abs=1e-6)
