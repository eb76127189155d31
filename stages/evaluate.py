"""Judge the reward model on the test pairs.

    python -m stages.evaluate

Reads data/tokenized/test, the further test sets beside it, models/base and models/adapter. Writes
the rewards of every test pair to reports/evaluate/rewards.parquet, beside it those of the further
sets in sets/, all figures in figures.json, what the plots show and a page to read the judgements
on, index.html; and metrics/evaluate.json.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from datasets import Dataset
from peft import PeftModel

from reward import params
from reward.data import tokenized
from reward.data.columns import (
    ANSWER,
    ANSWERS,
    GRADES,
    ID,
    IDS,
    MARGIN,
    MASKS,
    PREFERENCE,
    PREFIX,
    PROMPT,
    PROMPT_ID,
    RESPONSE,
    REWARDS,
    TEST_SET,
    TOKENS,
    WEIGHT,
)
from reward.data.rows import shown
from reward.judging import page
from reward.judging.benchmarks import benchmark
from reward.judging.length import by_length_difference, length_audit, length_curve
from reward.judging.metrics import (
    Figures,
    Judged,
    Resampling,
    calibration,
    histogram,
    losses,
    reliability,
    roc,
    spread,
    ties,
)
from reward.judging.rankings import rankings
from reward.model import group
from reward.model.base import Quantization, load
from reward.model.launching import distribute
from reward.model.packing import Texts, extremes, pairs_of, tokens
from reward.model.pairwise import margins
from reward.model.rankings import rankings_of, sides
from reward.model.scoring import require_exact, score
from reward.outputs import recorded, whole_folder, write_json, writing
from reward.params import Positive, Seed
from reward.process import Fault, run, threads

BASE = Path("models/base")
ADAPTER = Path("models/adapter")
TEST = Path("data/tokenized/test")
SETS = Path("data/tokenized/sets")
REPORTS = Path("reports/evaluate")
JUDGED = REPORTS / "rewards.parquet"
PAGE = REPORTS / "index.html"
METRICS = Path("metrics/evaluate.json")
# RewardBench has 23 subsets.
SLICE_VALUES = 30

Slices = dict[str, dict[str, Figures]]


@dataclass(frozen=True)
class Evaluate:
    """The group `evaluate` of params.yaml, where each key is described."""

    tokens_per_pack: Positive
    bootstrap_samples: Positive
    seed: Seed


@dataclass(frozen=True)
class TestSet:
    """A further test set; `notes` are how many of its pairs were cut, left out, and have leaked."""

    name: str
    pairs: Dataset
    notes: dict[str, int]


def main() -> None:
    options = params.load("evaluate", Evaluate)
    quantization = params.load("quantization", Quantization)
    test = tokenized.load(TEST, BASE)
    torch.set_num_threads(threads())
    model = load(BASE, ADAPTER, quantization)
    sets = load_sets()
    datasets = [test, *(each.pairs for each in sets)]
    require_exact(model, full_pack(datasets, options.tokens_per_pack))
    table, *further = [rewards_of(model, each, options.tokens_per_pack) for each in datasets]
    if not group.leads():
        return
    judged, resampling = as_judged(table), Resampling(options.bootstrap_samples, options.seed)
    figures = measure(table, judged, resampling)
    figures["sets"] = measure_sets(sets, further, resampling)
    with whole_folder(REPORTS) as folder:
        with writing(folder):
            pyarrow.parquet.write_table(table, folder / JUDGED.name)
            (folder / "sets").mkdir()
            for each, rewards in zip(sets, further, strict=True):
                pyarrow.parquet.write_table(rewards, folder / "sets" / f"{each.name}.parquet")
        for name, rows in curves(judged, resampling).items():
            write_json(folder / f"{name}.json", rows)
        write_json(folder / "slices.json", slices_as_rows(figures))
        write_page(folder / PAGE.name, sets, [table, *further], figures)
        write_json(folder / "figures.json", figures)
    write_json(METRICS, headline(figures))
    report(figures)


def load_sets() -> list[TestSet]:
    """The further test sets that preprocess has tokenized, in the order of their names."""
    return [
        TestSet(name, tokenized.load(SETS / name, BASE), notes)
        for name, notes in recorded(SETS / "index.json").items()
    ]


def full_pack(datasets: Iterable[Dataset], tokens_per_pack: int) -> list[Texts]:
    """The longest pair of all and the shortest ones that fill a pack with it, the shortest last."""
    pairs = [pair for each in datasets for pair in pairs_of(each)]
    return [pairs[index] for index in extremes([*map(tokens, pairs)], tokens_per_pack)]


def rewards_of(model: PeftModel, dataset: Dataset, tokens_per_pack: int) -> pa.Table:
    """The rewards of a dataset's pairs as a table, whose metadata has the size of the packs.

    In half precision packs of another size round otherwise.
    """
    ranked = rankings_of(dataset)
    found = score(model, [each.texts for each in ranked], tokens_per_pack)
    j, k, rows = sides(found, ranked)
    chosen, rejected = torch.empty(2, len(rows))
    chosen[rows], rejected[rows] = j, k
    require_finite(chosen, rejected)
    packs = {b"tokens_per_pack": str(tokens_per_pack).encode()}
    return as_table(dataset, chosen, rejected).replace_schema_metadata(packs)


def require_finite(chosen: torch.Tensor, rejected: torch.Tensor) -> None:
    """Raises a Fault for rewards that are not finite."""
    margin = margins(chosen, rejected)
    if broken := int((~margin.isfinite()).sum()):
        raise Fault(
            f"{ADAPTER}: the rewards of {broken} of {len(margin)} test pairs are not finite; "
            "quantization.compute_dtype float32 has the widest range"
        )


def as_table(test: Dataset, chosen: torch.Tensor, rejected: torch.Tensor) -> pa.Table:
    """One row a comparison: id, rewards, margin, lengths in tokens, and what people said of it.

    After its prompt_id it has the kept columns.
    """
    known = [PREFIX, PREFERENCE, WEIGHT, *ANSWERS, PROMPT_ID]
    kept = [name for name in test.column_names if name not in (ID, *IDS, *MASKS, *GRADES, *known)]
    return pa.table(
        {
            ID: test[ID],
            **dict(zip(REWARDS, (chosen.numpy(), rejected.numpy()), strict=True)),
            MARGIN: margins(chosen, rejected).numpy(),
            **{name: list(map(len, test[ids])) for name, ids in zip(TOKENS, IDS, strict=True)},
        }
        | {name: test[name] for name in (*known, *kept)}
    )


def kept_columns(table: pa.Table) -> dict[str, list[str | None]]:
    """The columns that come from the records."""
    first = table.column_names.index(PROMPT_ID) + 1
    return {name: table[name].to_pylist() for name in table.column_names[first:]}


def as_judged(table: pa.Table) -> Judged:
    """The comparisons as the figures need them."""
    chosen, rejected = (table[name].to_numpy().astype(np.float64) for name in REWARDS)
    prompts = np.unique(table[PROMPT_ID].to_numpy(), return_inverse=True)[1]
    tokens_chosen, tokens_rejected, prefixes, answer_chosen, answer_rejected = (
        table[name].to_numpy().astype(np.int64) for name in (*TOKENS, PREFIX, *ANSWERS)
    )
    # What all answers begin with is what those of each comparison do.
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


def measure(table: pa.Table, judged: Judged, resampling: Resampling) -> dict[str, Any]:
    """All figures of the test pairs, which docs/evaluation.md describes key by key.

    Raises a Fault if all of them are ties.
    """
    overall, decided = resampling.accuracy(judged), judged.decided()
    if not len(decided):
        raise Fault(f"{TEST}: all {len(judged)} pairs are ties, expected some that are not")
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
        "calibration": calibration(judged, resampling.seed),
        "length": length_audit(judged, resampling),
        "ties": ties(judged),
        "rankings": rankings(judged, resampling),
        "by": by_slice(table, judged, resampling),
    }


def curves(judged: Judged, resampling: Resampling) -> dict[str, list[Figures]]:
    """What the plots show of the test pairs, besides their slices."""
    decided = judged.decided()
    return {
        "margins": histogram(decided.margin),
        "roc": roc(decided),
        "reliability": reliability(decided),
        "length": by_length_difference(decided, resampling),
        "length_curve": length_curve(judged, resampling.seed),
    }


def measure_sets(
    sets: list[TestSet], tables: list[pa.Table], resampling: Resampling
) -> dict[str, dict[str, Any]]:
    """Accuracy on every further set; which of its pairs were cut, left out, or have leaked."""
    result = {}
    for each, table in zip(sets, tables, strict=True):
        judged = as_judged(table)
        result[each.name] = {
            **resampling.accuracy(judged),
            **each.notes,
            "ties": ties(judged),
            "rankings": rankings(judged, resampling),
            "benchmark": benchmark(kept_columns(table), judged),
            "by": by_slice(table, judged, resampling),
        }
    return result


def by_slice(table: pa.Table, judged: Judged, resampling: Resampling) -> Slices:
    """Accuracy by every value of every kept column that has few enough values to be a slice.

    A value that only ties have is left out.
    """
    result: Slices = {}
    for name, column in kept_columns(table).items():
        values = in_order({value for value in column if value is not None})
        if 0 < len(values) <= SLICE_VALUES:
            places = np.array(column, dtype=object)
            found = {
                value: resampling.accuracy(judged.take(np.flatnonzero(places == value)))
                for value in values
            }
            result[name] = {value: each for value, each in found.items() if each["pairs"]}
    return {name: values for name, values in result.items() if values}


def headline(figures: dict[str, Any]) -> dict[str, Any]:
    """The content of metrics/evaluate.json: what runs are compared by.

    A name with a slash is left out of a short table: --drop '.*/.*'.
    """
    ranked, sets = figures["rankings"], figures["sets"]
    return {
        "accuracy": figures["accuracy"],
        "low": figures["accuracy_low"],
        "high": figures["accuracy_high"],
        "loss": figures["loss"],
        "test/margin": figures["margin_mean"],
        "test/equal_rewards": figures["equal_rewards"],
        "test/calibration_error": figures["calibration"]["expected_error"],
        **({"test/best_of_n": ranked["best_of_n"]["mean"]} if has_best(ranked) else {}),
        **{f"sets/{name}": found["accuracy"] for name, found in sets.items() if found["pairs"]},
        **{
            f"sets/{name}/score": found["benchmark"]["score"]
            for name, found in sets.items()
            if found["benchmark"] and found["benchmark"]["score"] is not None
        },
    }


def has_best(ranked: dict[str, Any]) -> bool:
    """Whether there are prompts with more than two answers, and a best one among them."""
    return bool(ranked["prompts"] and ranked["best_of_n"]["prompts"])


def in_order(values: Iterable[str]) -> list[str]:
    """Numbers by their size, then all other texts by their letters."""

    def place(value: str) -> tuple[bool, float, str]:
        number = re.fullmatch(r"-?\d+(\.\d+)?", value)
        return number is None, float(value) if number else 0.0, value

    return sorted(values, key=place)


def slices_as_rows(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each slice of the test pairs, and for each further set."""
    return [
        {"slice": f"{column}: {value}"}
        | {name: found[name] for name in ("accuracy", "low", "high", "pairs")}
        for column, values in (figures["by"] | {TEST_SET: figures["sets"]}).items()
        for value, found in values.items()
        if found["pairs"]
    ]


def write_page(
    path: Path,
    sets: list[TestSet],
    tables: list[pa.Table],
    figures: dict[str, Any],
) -> None:
    """The page of all judgements; where there are further sets, they are a slice of it."""
    paths = {"test split": TEST} | {each.name: SETS / each.name for each in sets}
    marked = [
        table.append_column(TEST_SET, pa.array([name] * len(table)))
        for name, table in zip(paths, tables, strict=True)
    ]
    prompts = {
        (name, prompt_id): prompt
        for name, folder in paths.items()
        for prompt_id, prompt in prompts_of(tokenized.answers(folder, BASE)).items()
    }
    slices: dict[str, list[str]] = {TEST_SET: [*paths]} if sets else {}
    for by in (figures["by"], *(each["by"] for each in figures["sets"].values())):
        for name, values in by.items():
            slices[name] = in_order({*slices.get(name, []), *values})
    table = pa.concat_tables(marked, promote_options="permissive")
    page.write(path, table, prompts, slices)


def prompts_of(answers: Dataset) -> dict[str, page.Prompt]:
    """The prompts of a split by their ids, as people read them."""
    result: dict[str, page.Prompt] = {}
    for row in answers.select_columns([PROMPT_ID, ANSWER, PROMPT, RESPONSE]):
        if row[PROMPT_ID] not in result:
            result[row[PROMPT_ID]] = page.Prompt(shown(row[PROMPT]), {})
        result[row[PROMPT_ID]].answers[row[ANSWER]] = shown(row[RESPONSE])
    return result


def report(figures: dict[str, Any]) -> None:
    further = f"; {', '.join(figures['sets'])}" if figures["sets"] else ""
    print(f"read       {TEST}, {figures['pairs']} pairs of {figures['prompts']} prompts{further}")
    print(
        f"accuracy   {figures['accuracy']:.4f} (95% interval {figures['accuracy_low']:.4f} to "
        f"{figures['accuracy_high']:.4f}), {figures['equal_rewards']} with equal rewards"
    )
    print(
        f"loss       {figures['loss']:.4f}, margin {figures['margin_mean']:+.4f} "
        f"with deviation {figures['margin_std']:.4f}"
    )
    fit, audit = figures["calibration"], figures["length"]
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
    if audit["adjusted"]["pairs"]:
        print(f"           with length taken out accuracy is {audit['adjusted']['accuracy']:.4f}")
    report_ties(figures["ties"])
    report_rankings(figures["rankings"])
    rows = slices_as_rows(figures)
    width = max((len(row["slice"]) for row in rows), default=0)
    for row in rows:
        print(
            f"  {row['slice']:<{width}}  {row['accuracy']:.4f} "
            f"({row['low']:.4f} to {row['high']:.4f}) of {row['pairs']} pairs"
        )
    for name, found in figures["sets"].items():
        if found["benchmark"]:
            report_benchmark(name, found["benchmark"])
        if found["leaked"]:
            pairs = found["pairs"] + found["ties"]["pairs"]
            print(
                f"note       {found['leaked']} of {pairs} pairs of {name} have a "
                "prompt that the model was trained on"
            )
        if found["bad"]:
            print(f"note       {found['bad']} records of {name} are bad, and were left out")
        if found["too_long"]:
            print(f"note       {found['too_long']} pairs of {name} are too long, and were left out")
    print(f"written    {REPORTS}, {METRICS}")
    print(f"look at    {PAGE} for the judgements themselves, dvc plots show for the curves")


def report_ties(found: dict[str, Any]) -> None:
    if found["pairs"]:
        print(
            f"ties       {found['pairs']} pairs, which are neither right nor wrong; |margin| "
            f"{found['margin']['q50']:.4f} at the median, {found['margin_of_others']['q50']:.4f} "
            f"of others, area {found['area']:.4f}"
        )


def report_rankings(found: dict[str, Any]) -> None:
    if not found["prompts"]:
        return
    best = ""
    if has_best(found):
        best = "best of n {mean:.4f} (by chance {chance:.4f}), ".format_map(found["best_of_n"])
    print(
        f"rankings   of {found['answers']} answers to {found['prompts']} prompts: {best}"
        f"Kendall's tau-b {found['kendall_tau']['mean']:+.4f}, NDCG {found['ndcg']['mean']:.4f}"
    )


def report_benchmark(name: str, found: dict[str, Any]) -> None:
    parts = {"score": found["score"]} | found["parts"]
    shown = ", ".join(f"{part} {value:.4f}" for part, value in parts.items() if value is not None)
    print(f"{name}: {shown}, by the rule of {found['rule']}")


if __name__ == "__main__":
    run(lambda: distribute(main, "stages.evaluate", useful=lambda gpus: gpus))
