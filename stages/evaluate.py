"""Judge the reward model on the test pairs.

    python -m stages.evaluate

Reads data/tokenized/test, models/base and models/adapter. Writes the rewards of every pair to
reports/evaluate/rewards.parquet, what the plots show beside it, and metrics/evaluate.json.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet
import torch
from datasets import Dataset
from scipy import stats

from stages import params
from stages.model import Quantization, load, require_exact, score
from stages.outputs import whole_folder, write_json
from stages.packing import load_split, pairs_of, tokens
from stages.pairwise import hits, losses, margins, sides
from stages.params import Positive, Seed
from stages.process import Fault, run

BASE = Path("models/base")
ADAPTER = Path("models/adapter")
TEST = Path("data/tokenized/test")
REPORTS = Path("reports/evaluate")
METRICS = Path("metrics/evaluate.json")
IDS = ("input_ids_j", "attention_mask_j", "input_ids_k", "attention_mask_k", "prefix_length")
SLICE_VALUES = 20
BINS = 30

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evaluate:
    """The group `evaluate` of params.yaml, where each key is described."""

    tokens_per_pack: Positive
    bootstrap_samples: Positive
    seed: Seed


def main() -> None:
    group = params.load("evaluate", Evaluate)
    quantization = params.load("quantization", Quantization)
    test = load_split(TEST, BASE)
    model = load(BASE, ADAPTER, quantization)
    pairs = pairs_of(test)
    require_exact(model, max(pairs, key=tokens))
    chosen, rejected = sides(score(model, pairs, group.tokens_per_pack))
    table = as_table(test, chosen, rejected)
    metrics = judge(table, chosen, rejected, group)
    with whole_folder(REPORTS) as folder:
        pyarrow.parquet.write_table(table, folder / "rewards.parquet")
        write_json(folder / "margins.json", histogram(margins(chosen, rejected).double().numpy()))
        write_json(folder / "slices.json", slices_as_rows(metrics["by"]))
    write_json(METRICS, metrics)
    report(metrics)


def as_table(test: Dataset, chosen: torch.Tensor, rejected: torch.Tensor) -> pa.Table:
    """One row a pair: id, rewards, margin, lengths in tokens, and the kept columns."""
    kept = [name for name in test.column_names if name not in ("id", *IDS)]
    return pa.table(
        {
            "id": test["id"],
            "reward_chosen": chosen.numpy(),
            "reward_rejected": rejected.numpy(),
            "margin": margins(chosen, rejected).numpy(),
            "tokens_chosen": [len(ids) for ids in test["input_ids_j"]],
            "tokens_rejected": [len(ids) for ids in test["input_ids_k"]],
        }
        | {name: test[name] for name in kept}
    )


def judge(
    table: pa.Table, chosen: torch.Tensor, rejected: torch.Tensor, group: Evaluate
) -> dict[str, Any]:
    """The content of metrics/evaluate.json. Raises a Fault for rewards that are not finite."""
    right = hits(chosen, rejected).double().numpy()
    margin = margins(chosen, rejected).double().numpy()
    if broken := int((~np.isfinite(margin)).sum()):
        raise Fault(
            f"{ADAPTER}: the rewards of {broken} of {len(margin)} test pairs are not finite; "
            "quantization.compute_dtype float32 has the widest range"
        )
    prompts = np.unique(table["prompt_id"].to_numpy(), return_inverse=True)[1]
    low, high = interval(right, prompts, group)
    return {
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "pairs": len(right),
        "prompts": int(prompts.max()) + 1,
        "ties": int((margin == 0).sum()),
        "loss": losses(chosen, rejected).double().mean().item(),
        "margin_mean": float(margin.mean()),
        "margin_std": float(margin.std()),
        "by": by_slice(table, right, prompts, group),
    }


def by_slice(
    table: pa.Table, right: Floats, prompts: npt.NDArray[np.int64], group: Evaluate
) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy by every value of every kept column that has few enough values to be a slice."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name in table.column_names[table.column_names.index("tokens_rejected") + 1 :]:
        column = table[name].to_numpy()
        values = sorted({value for value in column if value is not None})
        if name == "prompt_id" or not 0 < len(values) <= SLICE_VALUES:
            continue
        result[name] = {}
        for value in values:
            rows = np.flatnonzero(column == value)
            low, high = interval(right[rows], prompts[rows], group)
            result[name][value] = {
                "accuracy": float(right[rows].mean()),
                "low": low,
                "high": high,
                "pairs": len(rows),
            }
    return result


def interval(right: Floats, prompts: npt.NDArray[np.int64], group: Evaluate) -> tuple[float, float]:
    """95% interval of the accuracy: percentile bootstrap over prompts, not over pairs.

    Pairs of one prompt are no independent draws (Efron and Tibshirani 1993, chapter 8). Where all
    pairs are right, or all wrong, resampling says nothing, and the exact binomial bound takes its
    place, with prompts as the draws (Clopper and Pearson 1934). With a single prompt nothing is
    known, and the interval is 0 to 1.
    """
    _, group_of = np.unique(prompts, return_inverse=True)
    pairs = np.bincount(group_of)
    if len(pairs) < 2:
        return 0.0, 1.0
    if right.min() == right.max() != 0.5:
        bound = 0.025 ** (1 / len(pairs))
        return (bound, 1.0) if right.min() else (0.0, 1 - bound)
    result = stats.bootstrap(
        (np.bincount(group_of, weights=right), pairs),
        lambda hits, sizes, axis: hits.sum(axis=axis) / sizes.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=group.bootstrap_samples,
        batch=max(1, 10_000_000 // len(pairs)),
        method="percentile",
        rng=np.random.default_rng(group.seed),
    ).confidence_interval
    return float(result.low), float(result.high)


def histogram(margin: Floats) -> list[dict[str, float]]:
    """Pairs by margin, in bins of equal width; a bin is given by its middle."""
    counts, edges = np.histogram(margin, bins=BINS)
    middles = (edges[:-1] + edges[1:]) / 2
    return [
        {"margin": round(float(middle), 4), "pairs": int(count)}
        for middle, count in zip(middles, counts, strict=True)
    ]


def slices_as_rows(by: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    return [
        {"slice": f"{column}: {value}", **figures}
        for column, values in by.items()
        for value, figures in values.items()
    ]


def report(metrics: dict[str, Any]) -> None:
    print(
        f"accuracy   {metrics['accuracy']:.4f} (95% interval {metrics['accuracy_low']:.4f} to "
        f"{metrics['accuracy_high']:.4f}) of {metrics['pairs']} pairs, {metrics['ties']} ties"
    )
    print(
        f"loss       {metrics['loss']:.4f}, margin {metrics['margin_mean']:+.4f} "
        f"with deviation {metrics['margin_std']:.4f}"
    )
    for row in slices_as_rows(metrics["by"]):
        print(
            f"  {row['slice']:<28} {row['accuracy']:.4f} ({row['low']:.4f} to {row['high']:.4f}) "
            f"of {row['pairs']} pairs"
        )


if __name__ == "__main__":
    run(main)
