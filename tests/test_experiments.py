"""Benchmarks that compare: the design and folds of defaults, bag of words, scaling."""

import argparse
import json
import math
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import bag_of_words, defaults, scaling
from benchmarks.bag_of_words import Pair
from benchmarks.defaults import DESIGN, FACTORS, Levels
from reward.data.records import check

# --- defaults --------------------------------------------------------------------------------


def test_design_is_balanced_and_orthogonal_and_starts_at_the_low_levels() -> None:
    runs, factors = DESIGN.shape
    assert (runs, factors) == (8, len(FACTORS))
    assert (DESIGN.sum(0) == 0).all()
    np.testing.assert_array_equal(DESIGN.T @ DESIGN, runs * np.eye(factors))
    assert (DESIGN[0] == -1).all()


@pytest.mark.parametrize(
    ("design", "first"),
    [
        (DESIGN, "train.learning_rate | 2e-4 | 1e-3"),
        (
            defaults.together(["train.learning_rate", "train.pairs_per_step"]),
            "train.learning_rate, train.pairs_per_step | 2e-4, 8 | 1e-3, 4",
        ),
    ],
)
def test_effect_is_attributed_to_the_parameters_that_vary_with_it(
    design: Levels, first: str
) -> None:
    """Only runs with a high learning rate are right, all with the same certainty."""
    options: Any = argparse.Namespace(name="x", folds=3, held=3, set_param=[])
    levels = design[:, [factor.key for factor in FACTORS].index("train.learning_rate")]
    margins = np.repeat(levels[:, None].astype(float), 4, axis=1)
    report = defaults.as_markdown(options, design, margins, np.ones(4), np.array([*"ppqr"]))
    rows = [line for line in report.splitlines() if line.endswith(") |")]
    nothing = "0.0000 (+0.0000 to +0.0000)"
    assert [line for line in rows if line.replace("-0.0", "+0.0").count(nothing) != 2] == [
        f"| {first} | +1.0000 (+1.0000 to +1.0000) | -1.0000 (-1.0000 to -1.0000) |"
    ]


def test_effects_on_accuracy_ignore_ties() -> None:
    """Of four pairs, one is a tie, on which the margin makes no difference to the accuracy."""
    options: Any = argparse.Namespace(name="x", folds=3, held=3, set_param=[])
    margins, preference = np.array([[1.0, -1, 1, -1]] * len(DESIGN)), np.array([1, 1, 1, 0.5])
    report = defaults.as_markdown(options, DESIGN, margins, preference, np.array([*"ppqr"]))
    on_ties, others = (math.log1p(math.exp(-1)) + n for n in (0.5, 1 / 3))
    loss = (on_ties + 3 * others) / 4
    assert report.splitlines()[-1].endswith(f" | {2 / 3:.4f} | {loss:.4f} |")


def test_folds_hold_out_each_record_once_and_keep_prompts_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "FOLDS", tmp_path)
    records = [
        {"prompt": f"问 {index % 7}", "chosen": f"yes {index:2}", "rejected": "no"}
        for index in range(20)
    ]
    defaults.write_folds(argparse.Namespace(name="x", folds=3), records)
    held_back = []
    for fold in range(3):
        test, rest = (
            [*map(json.loads, (tmp_path / "x" / str(fold) / name).read_text().splitlines())]
            for name in ("test.jsonl", "rest.jsonl")
        )
        assert {each["prompt"] for each in test}.isdisjoint(each["prompt"] for each in rest)
        assert sorted(test + rest, key=itemgetter("chosen")) == records
        held_back += test
    assert sorted(held_back, key=itemgetter("chosen")) == records


# --- bag of words ----------------------------------------------------------------------------


def test_bag_of_words_has_the_ids_of_preprocess() -> None:
    records = json.loads(bag_of_words.PAIRS.read_text(encoding="utf-8"))[:20]
    assert [Pair(**record).id for record in records] == [check(record).ids[0] for record in records]


# --- scaling ---------------------------------------------------------------------------------


def test_time_of_a_step_in_rounds_and_with_the_first_free_process() -> None:
    packs = [5, 4, 3, 2, 1]
    assert scaling.in_rounds(packs, 2) == 5 + 3 + 1
    assert scaling.to_first_free(packs, 2) == 5 + 2 + 1  # the other one has 4 + 3
    assert scaling.busy([packs, [2]], 2, [9, 2]) == pytest.approx(17 / 22)
