"""How a model judges test sets: the table of rewards, all figures and the printed report."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from datasets import Dataset

from reward.data import tokenized
from reward.data.columns import (
    ANSWERS,
    COMPARISON,
    ID,
    IDS,
    MARGIN,
    PREFERENCE,
    PREFIX,
    PROMPT_ID,
    RESERVED,
    REWARDS,
    TEST_SET,
    TOKENS,
    WEIGHT,
)
from reward.judging.benchmarks import benchmark
from reward.judging.length import length_audit
from reward.judging.metrics import Figures, Judged, accuracy, calibration, losses, spread, ties
from reward.judging.rankings import rankings
from reward.outputs import recorded, with_bar, writing
from reward.process import Fault, counted

# The most values of a column that slices the pairs. RewardBench has 23 subsets.
SLICE_VALUES = 30
# The most characters of a slice's name in the printed report.
WIDEST = 60

Slices = dict[str, dict[str, Figures]]


@dataclass(frozen=True)
class TestSet:
    """An extra test set; `notes` count its pairs that were left out or have leaked."""

    name: str
    pairs: Dataset
    notes: dict[str, int]


def load_sets(folder: Path, base: Path) -> list[TestSet]:
    """The extra test sets that preprocess has tokenized, sorted by name."""
    return [
        TestSet(name, tokenized.load(folder / name, base), notes)
        for name, notes in recorded(folder / "index.json").items()
    ]


def as_table(
    test: Dataset, chosen: npt.NDArray[np.float32], rejected: npt.NDArray[np.float32]
) -> pa.Table:
    """One row per comparison: id, rewards, margin, lengths in tokens, and the kept columns."""
    known = [PREFIX, PREFERENCE, WEIGHT, *ANSWERS, PROMPT_ID]
    kept = [name for name in test.column_names if name not in COMPARISON]
    return pa.table(
        {
            ID: test[ID][:],
            **dict(zip(REWARDS, (chosen, rejected), strict=True)),
            MARGIN: chosen - rejected,
            **{
                name: pc.list_value_length(test.data[ids]).cast(pa.int64())
                for name, ids in zip(TOKENS, IDS, strict=True)
            },
        }
        | {name: test[name][:] for name in (*known, *kept)}
    )


def as_judged(table: pa.Table) -> Judged:
    """The comparisons in the form that the figures need."""
    chosen, rejected = (table[name].to_numpy().astype(np.float64) for name in REWARDS)
    prompts = np.unique(table[PROMPT_ID].to_numpy(), return_inverse=True)[1]
    tokens_chosen, tokens_rejected, prefixes, answer_chosen, answer_rejected = (
        table[name].to_numpy().astype(np.int64) for name in (*TOKENS, PREFIX, *ANSWERS)
    )
    # If the comparisons are connected, this is the common prefix of all answers to the prompt.
    shared = np.full(prompts.max(initial=0) + 1, prefixes.max(initial=0))
    np.minimum.at(shared, prompts, prefixes)
    return Judged(
        chosen,
        rejected,
        tokens_chosen,
        tokens_rejected,
        shared[prompts],
        table[PREFERENCE].to_numpy(),
        answer_chosen,
        answer_rejected,
        prompts,
    )


def kept_columns(table: pa.Table) -> dict[str, list[str | None]]:
    """The columns that come from the records, which have no RESERVED names."""
    return {name: table[name].to_pylist() for name in table.column_names if name not in RESERVED}


def measure(table: pa.Table, judged: Judged, seed: int) -> dict[str, Any]:
    """All figures of the test pairs; docs/evaluation.md describes each key.

    `seed` draws the halves of the prompts on which calibration and the effect of length are fitted.

    Raises a Fault if all pairs are ties.
    """
    overall, decided = accuracy(judged), judged.decided()
    if not len(decided):
        raise Fault(f"all {len(judged)} test pairs are ties, expected some that are not")
    return {
        "accuracy": overall["accuracy"],
        "accuracy_low": overall["low"],
        "accuracy_high": overall["high"],
        "pairs": overall["pairs"],
        "prompts": overall["prompts"],
        "equal_rewards": int((decided.margin == 0).sum()),
        "loss": float(losses(judged.margin, judged.preference).mean()),
        **{f"margin_{name}": value for name, value in spread(decided.margin).items()},
        "chosen_mean": float(decided.chosen.mean()),
        "chosen_std": float(decided.chosen.std()),
        "rejected_mean": float(decided.rejected.mean()),
        "rejected_std": float(decided.rejected.std()),
        "calibration": calibration(judged, seed),
        "length": length_audit(judged, seed),
        "ties": ties(judged),
        "rankings": rankings(judged),
        "by": by_slice(table, judged),
    }


def measure_sets(sets: list[TestSet], tables: list[pa.Table]) -> dict[str, dict[str, Any]]:
    """Accuracy on every extra test set, and how many of its pairs were left out or have leaked."""
    result = {}
    for each, table in zip(sets, tables, strict=True):
        judged = as_judged(table)
        result[each.name] = {
            **accuracy(judged),
            **each.notes,
            "ties": ties(judged),
            "rankings": rankings(judged),
            "benchmark": benchmark(kept_columns(table), judged),
            "by": by_slice(table, judged),
        }
    return result


def by_slice(table: pa.Table, judged: Judged) -> Slices:
    """Accuracy for every value of each kept column with at most SLICE_VALUES values.

    A value that only ties have is left out.
    """
    columns = {
        name: (np.array(column, dtype=object), values)
        for name, column in kept_columns(table).items()
        if len(values := in_order({value for value in column if value is not None})) <= SLICE_VALUES
    }
    slices = [(name, value) for name, (_, values) in columns.items() for value in values]
    result: Slices = {}
    for name, value in with_bar(slices, "accuracy of slices", "slices"):
        found = accuracy(judged.take(np.flatnonzero(columns[name][0] == value)))
        if found["pairs"]:
            result.setdefault(name, {})[value] = found
    return result


def in_order(values: Iterable[str]) -> list[str]:
    """Numbers by size, then all other texts alphabetically."""

    def place(value: str) -> tuple[bool, float, str]:
        number = re.fullmatch(r"-?\d+(\.\d+)?", value)
        return number is None, float(value) if number else 0.0, value

    return sorted(values, key=place)


def slices_as_rows(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each slice of the test pairs, and for each extra test set."""
    return [
        {"slice": f"{column}: {value}"}
        | {name: found[name] for name in ("accuracy", "low", "high", "pairs")}
        for column, values in (figures["by"] | {TEST_SET: figures["sets"]}).items()
        for value, found in values.items()
        if found["pairs"]
    ]


def write_rewards(
    folder: Path, table: pa.Table, sets: list[TestSet], tables: list[pa.Table]
) -> None:
    """Write the rewards of the test pairs and of every extra test set, where compare reads them."""
    with writing(folder):
        pyarrow.parquet.write_table(table, folder / "rewards.parquet")
        (folder / "sets").mkdir()
        for each, rewards in zip(sets, tables, strict=True):
            pyarrow.parquet.write_table(rewards, folder / "sets" / f"{each.name}.parquet")


def has_best(ranked: dict[str, Any]) -> bool:
    """Whether some prompts have more than two answers, and a best one among them."""
    return bool(ranked["prompts"] and ranked["best_of_n"]["prompts"])


def report(figures: dict[str, Any], read: Path) -> None:
    """Print the main figures of the split `read` and of the extra test sets."""
    extra = f"; {', '.join(figures['sets'])}" if figures["sets"] else ""
    size = f"{counted(figures['pairs'], 'pair')} of {counted(figures['prompts'], 'prompt')}"
    print(f"read       {read}, {size}{extra}")
    print(
        f"accuracy   {figures['accuracy']:.4f} (95% interval {figures['accuracy_low']:.4f} to "
        f"{figures['accuracy_high']:.4f}), {figures['equal_rewards']} with equal rewards"
    )
    print(
        f"loss       {figures['loss']:.4f}, margin {figures['margin_mean']:+.4f} "
        f"with standard deviation {figures['margin_std']:.4f}"
    )
    report_calibration(figures["calibration"])
    report_length(figures["length"])
    report_ties(figures["ties"])
    report_rankings(figures["rankings"])
    report_slices(slices_as_rows(figures))
    for name, found in figures["sets"].items():
        report_set(name, found)


def report_calibration(fit: dict[str, Any]) -> None:
    temperature, loss = fit["temperature"], fit["loss_at_temperature"]
    if loss is not None:
        corrected = f"loss {loss:.4f} at temperature {temperature:.3g}"
    elif temperature is not None:
        corrected = f"temperature {temperature:.3g} is best, but not for both halves of the prompts"
    else:
        corrected = "no finite temperature is best"
    print(
        f"confidence off by {fit['expected_error']:.4f} on average, Brier score "
        f"{fit['brier']:.4f}, {corrected}"
    )


def report_length(audit: dict[str, Any]) -> None:
    correlation = audit["correlation"]
    print(
        f"length     the longer answer is correct in {audit['longer_accuracy']:.4f} of pairs, "
        "correlation of reward and length "
        f"{'none' if correlation is None else f'{correlation:+.4f}'}"
    )
    if audit["adjusted"]["pairs"]:
        print(
            f"           adjusted for length, the accuracy is {audit['adjusted']['accuracy']:.4f}"
        )


def report_slices(rows: list[dict[str, Any]]) -> None:
    names = [shortened(row["slice"]) for row in rows]
    width = max(map(len, names), default=0)
    for name, row in zip(names, rows, strict=True):
        print(
            f"  {name:<{width}}  {row['accuracy']:.4f} "
            f"({row['low']:.4f} to {row['high']:.4f}) of {counted(row['pairs'], 'pair')}"
        )


def shortened(name: str) -> str:
    """A slice's name for one line of a terminal, which must not get control characters."""
    shown = name if name.isprintable() else repr(name)[1:-1]
    return shown if len(shown) <= WIDEST else f"{shown[: WIDEST - 1]}…"


def report_ties(found: dict[str, Any]) -> None:
    if found["pairs"]:
        print(
            f"ties       {counted(found['pairs'], 'pair')}, neither correct nor wrong; "
            f"median |margin| {found['margin']['q50']:.4f} of ties and "
            f"{found['margin_of_others']['q50']:.4f} of other pairs, "
            f"area under the ROC curve {found['area']:.4f}"
        )


def report_rankings(found: dict[str, Any]) -> None:
    if not found["prompts"]:
        return
    best = ""
    if has_best(found):
        best = "best of n {mean:.4f} (by chance {chance:.4f}), ".format_map(found["best_of_n"])
    print(
        f"rankings   of {found['answers']} answers to {counted(found['prompts'], 'prompt')}: {best}"
        f"Kendall's tau-b {found['kendall_tau']['mean']:+.4f}, NDCG {found['ndcg']['mean']:.4f}"
    )


def report_set(name: str, found: dict[str, Any]) -> None:
    """Print the score of an extra test set by its leaderboard's rule, and what to know about it."""
    if scored := found["benchmark"]:
        parts = {"score": scored["score"]} | scored["parts"]
        shown = [f"{part} {value:.4f}" for part, value in parts.items() if value is not None]
        print(
            f"{name}: {', '.join(shown) or 'no part is complete'}, by the rule of {scored['rule']}"
        )
    if found["leaked"]:
        pairs = found["pairs"] + found["ties"]["pairs"]
        print(
            f"note       {name}: the prompts of {found['leaked']} of its {counted(pairs, 'pair')} "
            "are also in the training or validation split"
        )
    if found["bad"]:
        print(f"note       left out of {name}: {counted(found['bad'], 'bad record')}")
    if found["too_long"]:
        print(f"note       left out of {name} as too long: {counted(found['too_long'], 'pair')}")
