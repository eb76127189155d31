"""Judge the reward model on the test pairs.

    python -m stages.evaluate

Reads data/tokenized/test, models/base and models/adapter. Writes the rewards of every pair to
reports/evaluate/rewards.parquet, beside it what the plots show and a page to read the judgements
on, index.html, and metrics/evaluate.json.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from datasets import Dataset

from stages import page, params
from stages.judgement import (
    Figures,
    Judged,
    Resampling,
    by_length_difference,
    calibration,
    histogram,
    length_audit,
    losses,
    receiver,
    reliability,
    spread,
)
from stages.model import Quantization, load, require_exact, score
from stages.outputs import whole_folder, write_json
from stages.packing import load_split, pairs_of, tokens
from stages.pairwise import margins, sides
from stages.params import Positive, Seed
from stages.process import Fault, run
from stages.tokens import Template

BASE = Path("models/base")
ADAPTER = Path("models/adapter")
TEST = Path("data/tokenized/test")
REPORTS = Path("reports/evaluate")
REWARDS = REPORTS / "rewards.parquet"
PAGE = REPORTS / "index.html"
METRICS = Path("metrics/evaluate.json")
IDS = ("input_ids_j", "attention_mask_j", "input_ids_k", "attention_mask_k", "prefix_length")
SLICE_VALUES = 20

Slices = dict[str, dict[str, Figures]]


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
    require_finite(chosen, rejected)
    table = as_table(test, chosen, rejected)
    judged, resampling = as_judged(test, table), Resampling(group.bootstrap_samples, group.seed)
    metrics = measure(table, judged, resampling)
    with whole_folder(REPORTS) as folder:
        pyarrow.parquet.write_table(table, folder / REWARDS.name)
        for name, rows in (
            ("margins", histogram(judged.margin)),
            ("slices", slices_as_rows(metrics["by"])),
            ("roc", receiver(judged)),
            ("reliability", reliability(judged.margin)),
            ("length", by_length_difference(judged, resampling)),
        ):
            write_json(folder / f"{name}.json", rows)
        ids = [(texts.ids[0], texts.ids[1]) for texts in pairs]
        template = Template.load(ADAPTER / "template.json")
        page.write(folder / PAGE.name, table, ids, BASE, template, metrics["by"])
    write_json(METRICS, metrics)
    report(metrics)


def require_finite(chosen: torch.Tensor, rejected: torch.Tensor) -> None:
    """Raises a Fault for rewards that are not finite."""
    margin = margins(chosen, rejected)
    if broken := int((~margin.isfinite()).sum()):
        raise Fault(
            f"{ADAPTER}: the rewards of {broken} of {len(margin)} test pairs are not finite; "
            "quantization.compute_dtype float32 has the widest range"
        )


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


def as_judged(test: Dataset, table: pa.Table) -> Judged:
    """The pairs as the figures need them; the length of an answer is that behind the prefix."""
    prefix = np.asarray(test["prefix_length"])
    return Judged(
        chosen=table["reward_chosen"].to_numpy().astype(np.float64),
        rejected=table["reward_rejected"].to_numpy().astype(np.float64),
        tokens_chosen=table["tokens_chosen"].to_numpy() - prefix,
        tokens_rejected=table["tokens_rejected"].to_numpy() - prefix,
        prompts=np.unique(table["prompt_id"].to_numpy(), return_inverse=True)[1],
    )


def measure(table: pa.Table, judged: Judged, resampling: Resampling) -> dict[str, Any]:
    """The content of metrics/evaluate.json, which the README describes key by key."""
    overall = resampling.accuracy(judged)
    return {
        "accuracy": overall["accuracy"],
        "accuracy_low": overall["low"],
        "accuracy_high": overall["high"],
        "pairs": len(judged),
        "prompts": int(judged.prompts.max()) + 1,
        "ties": int((judged.margin == 0).sum()),
        "loss": float(losses(judged.margin).mean()),
        **{f"margin_{name}": value for name, value in spread(judged.margin).items()},
        "chosen_mean": float(judged.chosen.mean()),
        "chosen_std": float(judged.chosen.std()),
        "rejected_mean": float(judged.rejected.mean()),
        "rejected_std": float(judged.rejected.std()),
        "calibration": calibration(judged, resampling.seed),
        "length": length_audit(judged, resampling),
        "by": by_slice(table, judged, resampling),
    }


def by_slice(table: pa.Table, judged: Judged, resampling: Resampling) -> Slices:
    """Accuracy by every value of every kept column that has few enough values to be a slice."""
    result: Slices = {}
    for name in table.column_names[table.column_names.index("tokens_rejected") + 1 :]:
        column = table[name].to_numpy()
        values = sorted({value for value in column if value is not None})
        if name != "prompt_id" and 0 < len(values) <= SLICE_VALUES:
            result[name] = {
                value: resampling.accuracy(judged.take(np.flatnonzero(column == value)))
                for value in values
            }
    return result


def slices_as_rows(by: Slices) -> list[dict[str, Any]]:
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
    fit, audit = metrics["calibration"], metrics["length"]
    print(
        f"believed   off by {fit['expected_error']:.4f} on average, Brier score "
        f"{fit['brier']:.4f}, best temperature {fit['temperature']:.3g}"
    )
    print(
        f"length     the longer answer is right in {audit['longer_accuracy']:.4f}; reward and "
        f"length correlate by {audit['correlation'] or 0:+.4f}"
    )
    for row in slices_as_rows(metrics["by"]):
        print(
            f"  {row['slice']:<28} {row['accuracy']:.4f} ({row['low']:.4f} to {row['high']:.4f}) "
            f"of {row['pairs']} pairs"
        )
    print(f"read       {PAGE} shows the judgements themselves, dvc plots show the curves")


if __name__ == "__main__":
    run(main)
