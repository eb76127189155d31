"""Judge the reward model on the test pairs.

    python -m stages.evaluate

Reads data/tokenized/test, the further test sets of evaluate.sets, models/base and models/adapter.
Writes the rewards of every test pair to reports/evaluate/rewards.parquet, beside it those of the
further sets in sets/, what the plots show and a page to read the judgements on, index.html; and
metrics/evaluate.json.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from datasets import Dataset
from peft import PeftModel

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
from stages.params import Positive, Seed, Text
from stages.process import Fault, run
from stages.sets import TestSet, load_sets
from stages.tokens import Encoder, Template

BASE = Path("models/base")
ADAPTER = Path("models/adapter")
TRAINED_ON = (Path("data/tokenized/train"), Path("data/tokenized/validation"))
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

    sets: Text
    tokens_per_pack: Positive
    bootstrap_samples: Positive
    seed: Seed


def main() -> None:
    group = params.load("evaluate", Evaluate)
    quantization = params.load("quantization", Quantization)
    test = load_split(TEST, BASE)
    model = load(BASE, ADAPTER, quantization)
    encoder = Encoder(BASE, Template.load(ADAPTER / "template.json"))
    sets = load_sets(Path(group.sets), encoder)
    datasets = [test, *(each.pairs for each in sets)]
    require_exact(model, max((pair for each in datasets for pair in pairs_of(each)), key=tokens))
    table, *further = [rewards_of(model, each, group.tokens_per_pack) for each in datasets]
    judged, resampling = as_judged(table), Resampling(group.bootstrap_samples, group.seed)
    metrics = measure(table, judged, resampling)
    metrics["sets"] = measure_sets(sets, further, resampling)
    with whole_folder(REPORTS) as folder:
        pyarrow.parquet.write_table(table, folder / REWARDS.name)
        (folder / "sets").mkdir()
        for each, rewards in zip(sets, further, strict=True):
            pyarrow.parquet.write_table(rewards, folder / "sets" / f"{each.name}.parquet")
        for name, rows in (
            ("margins", histogram(judged.margin)),
            ("slices", slices_as_rows(metrics)),
            ("roc", receiver(judged)),
            ("reliability", reliability(judged.margin)),
            ("length", by_length_difference(judged, resampling)),
        ):
            write_json(folder / f"{name}.json", rows)
        write_page(folder / PAGE.name, sets, datasets, [table, *further], encoder, metrics)
    write_json(METRICS, metrics)
    report(metrics)


def rewards_of(model: PeftModel, dataset: Dataset, tokens_per_pack: int) -> pa.Table:
    """The rewards of a dataset's pairs as a table."""
    chosen, rejected = sides(score(model, pairs_of(dataset), tokens_per_pack))
    require_finite(chosen, rejected)
    return as_table(dataset, chosen, rejected)


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


def as_judged(table: pa.Table) -> Judged:
    """The pairs as the figures need them."""
    return Judged(
        chosen=table["reward_chosen"].to_numpy().astype(np.float64),
        rejected=table["reward_rejected"].to_numpy().astype(np.float64),
        tokens_chosen=table["tokens_chosen"].to_numpy(),
        tokens_rejected=table["tokens_rejected"].to_numpy(),
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


def measure_sets(
    sets: list[TestSet], tables: list[pa.Table], resampling: Resampling
) -> dict[str, dict[str, Any]]:
    """Accuracy on every further set; which of its pairs were cut, left out, or have leaked."""
    splits = [load_split(path, BASE) for path in TRAINED_ON] if sets else []
    trained_on = {prompt_id for split in splits for prompt_id in split["prompt_id"]}
    result = {}
    for each, table in zip(sets, tables, strict=True):
        judged = as_judged(table)
        result[each.name] = {
            **resampling.accuracy(judged),
            "cut": each.cut,
            "left_out": each.left_out,
            "leaked": each.leaked(trained_on),
            "by": by_slice(table, judged, resampling),
        }
    return result


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


def slices_as_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each slice of the test pairs, and for each further set."""
    return [
        {"slice": f"{column}: {value}"}
        | {name: figures[name] for name in ("accuracy", "low", "high", "pairs")}
        for column, values in (metrics["by"] | {"test set": metrics["sets"]}).items()
        for value, figures in values.items()
    ]


def write_page(
    path: Path,
    sets: list[TestSet],
    datasets: list[Dataset],
    tables: list[pa.Table],
    encoder: Encoder,
    metrics: dict[str, Any],
) -> None:
    """The page of all judgements; where there are further sets, they are a slice of it."""
    names = ["test split", *(each.name for each in sets)]
    marked = [
        table.append_column("test set", pa.array([name] * len(table)))
        for name, table in zip(names, tables, strict=True)
    ]
    ids = [(pair.ids[0], pair.ids[1]) for each in datasets for pair in pairs_of(each)]
    slices: dict[str, list[str]] = {"test set": names} if sets else {}
    for by in (metrics["by"], *(each["by"] for each in metrics["sets"].values())):
        for name, values in by.items():
            slices[name] = sorted({*slices.get(name, []), *values})
    table = pa.concat_tables(marked, promote_options="permissive")
    page.write(path, table, ids, encoder, slices)


def report(metrics: dict[str, Any]) -> None:
    further = f"; {', '.join(metrics['sets'])}" if metrics["sets"] else ""
    print(f"read       {TEST}, {metrics['pairs']} pairs of {metrics['prompts']} prompts{further}")
    print(
        f"accuracy   {metrics['accuracy']:.4f} (95% interval {metrics['accuracy_low']:.4f} to "
        f"{metrics['accuracy_high']:.4f}), {metrics['ties']} ties"
    )
    print(
        f"loss       {metrics['loss']:.4f}, margin {metrics['margin_mean']:+.4f} "
        f"with deviation {metrics['margin_std']:.4f}"
    )
    fit, audit = metrics["calibration"], metrics["length"]
    mended = "no temperature is best"
    if fit["loss_at_temperature"] is not None:
        mended = f"loss {fit['loss_at_temperature']:.4f} at temperature {fit['temperature']:.3g}"
    print(
        f"confidence off by {fit['expected_error']:.4f} on average, Brier score "
        f"{fit['brier']:.4f}, {mended}"
    )
    correlation = audit["correlation"]
    print(
        f"length     the longer answer is right in {audit['longer_accuracy']:.4f}, correlation of "
        f"reward and length {'none' if correlation is None else f'{correlation:+.4f}'}"
    )
    rows = slices_as_rows(metrics)
    width = max((len(row["slice"]) for row in rows), default=0)
    for row in rows:
        print(
            f"  {row['slice']:<{width}}  {row['accuracy']:.4f} "
            f"({row['low']:.4f} to {row['high']:.4f}) of {row['pairs']} pairs"
        )
    for name, figures in metrics["sets"].items():
        if figures["leaked"]:
            print(
                f"note       {figures['leaked']} of {figures['pairs']} pairs of {name} have a "
                "prompt that the model was trained on"
            )
        if figures["cut"] or figures["left_out"]:
            print(
                f"note       of {name} {figures['cut']} prompts were cut, and "
                f"{figures['left_out']} pairs left out: their texts are too long"
            )
    print(f"written    {REPORTS}, {METRICS}")
    print(f"look at    {PAGE} for the judgements themselves, dvc plots show for the curves")


if __name__ == "__main__":
    run(main)
