"""Evaluate the reward model on the test pairs.

    python -m stages.evaluate

Reads data/tokenized/test, the extra test sets in data/tokenized/sets, models/base and
models/adapter. Writes metrics/evaluate.json and, in reports/evaluate, the rewards of all test pairs
(rewards.parquet) and of the extra sets (sets/), all figures (figures.json), the data of the plots,
and a page with all judgements (index.html).
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from peft import PeftModel

from reward import params
from reward.after_training import Evaluate
from reward.data import tokenized
from reward.data.columns import (
    ANSWER,
    PACK_SIZE,
    PROMPT,
    PROMPT_ID,
    RESPONSE,
    TEST_SET,
    TEST_SPLIT,
)
from reward.judging import page
from reward.judging.evaluation import (
    TestSet,
    as_judged,
    as_table,
    has_best,
    in_order,
    load_sets,
    measure,
    measure_sets,
    report,
    slices_as_rows,
    write_rewards,
)
from reward.judging.length import by_length_difference, length_curve
from reward.judging.metrics import Figures, Judged, histogram, reliability, roc
from reward.model import group
from reward.model.base import Quantization, load
from reward.model.launching import distribute
from reward.model.packing import full_pack
from reward.model.pairwise import margins
from reward.model.rankings import rankings_of, sides
from reward.model.scoring import require_exact, score
from reward.outputs import whole_folder, write_json
from reward.process import Fault, threads
from reward.stage import run_stage

BASE = Path("models/base")
ADAPTER = Path("models/adapter")
TEST = Path("data/tokenized/test")
SETS = Path("data/tokenized/sets")
REPORTS = Path("reports/evaluate")
PAGE = REPORTS / "index.html"
METRICS = Path("metrics/evaluate.json")


def main() -> None:
    options = params.load("evaluate", Evaluate)
    quantization = params.load("quantization", Quantization)
    test = tokenized.load(TEST, BASE)
    torch.set_num_threads(threads())
    model = load(BASE, ADAPTER, quantization)
    sets = load_sets(SETS, BASE)
    datasets = [test, *(each.pairs for each in sets)]
    require_exact(model, full_pack(datasets, options.tokens_per_pack))
    table, *extra = [rewards_of(model, each, options.tokens_per_pack) for each in datasets]
    if not group.leads():
        return
    judged = as_judged(table)
    figures = measure(table, judged, options.seed)
    figures["sets"] = measure_sets(sets, extra)
    with whole_folder(REPORTS) as folder:
        write_rewards(folder, table, sets, extra)
        for name, rows in curves(judged, options.seed).items():
            write_json(folder / f"{name}.json", rows)
        write_json(folder / "slices.json", slices_to_plot(figures))
        write_page(folder / PAGE.name, sets, [table, *extra], figures)
        write_json(folder / "figures.json", figures)
    write_json(METRICS, headline(figures))
    report(figures, TEST)
    print(f"written    {REPORTS}, {METRICS}")
    print(f"look at    {PAGE} for the judgements, and `dvc plots show` for the curves")


def rewards_of(model: PeftModel, dataset: Dataset, tokens_per_pack: int) -> pa.Table:
    """The rewards of a dataset's pairs as a table, with the size of the packs in its metadata.

    In half precision, rounding depends on the size of the packs. Raises a Fault for rewards that
    are not finite.
    """
    ranked = rankings_of(dataset)
    found = score(model, [each.texts for each in ranked], tokens_per_pack)
    j, k, rows = sides(found, ranked)
    chosen, rejected = torch.empty(2, len(rows))
    chosen[rows], rejected[rows] = j, k
    require_finite(chosen, rejected)
    size = {PACK_SIZE: str(tokens_per_pack).encode()}
    return as_table(dataset, chosen.numpy(), rejected.numpy()).replace_schema_metadata(size)


def require_finite(chosen: torch.Tensor, rejected: torch.Tensor) -> None:
    """Raises a Fault for rewards that are not finite."""
    margin = margins(chosen, rejected)
    if broken := int((~margin.isfinite()).sum()):
        raise Fault(
            f"{ADAPTER}: the rewards of {broken} of {len(margin)} pairs are not finite; "
            "set quantization.compute_dtype to float32, which has the widest range"
        )


def curves(judged: Judged, seed: int) -> dict[str, list[Figures]]:
    """The data of the plots of the test pairs, except the slices."""
    decided = judged.decided()
    return {
        "margins": histogram(decided.margin),
        "roc": roc(decided),
        "reliability": reliability(decided),
        "length": by_length_difference(decided),
        "length_curve": length_curve(judged, seed),
    }


def slices_to_plot(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The slices as the plots show them. DVC would put a `</script>` of a name into its page."""
    return [row | {"slice": row["slice"].replace("<", "‹")} for row in slices_as_rows(figures)]


def headline(figures: dict[str, Any]) -> dict[str, Any]:
    """The content of metrics/evaluate.json: the numbers by which runs are compared.

    `dvc exp show --drop '.*/.*'` leaves out the names with a slash.
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


def write_page(
    path: Path,
    sets: list[TestSet],
    tables: list[pa.Table],
    figures: dict[str, Any],
) -> None:
    """Write the page of all judgements, where each extra test set is a slice."""
    paths = {TEST_SPLIT: TEST} | {each.name: SETS / each.name for each in sets}
    marked = [
        table.append_column(TEST_SET, pa.array([name] * len(table)))
        for name, table in zip(paths, tables, strict=True)
    ]
    prompts = {
        (name, prompt_id): prompt
        for name, folder in paths.items()
        for prompt_id, prompt in prompts_of(tokenized.load_answers(folder, BASE)).items()
    }
    slices: dict[str, list[str]] = {TEST_SET: [*paths]} if sets else {}
    for by in (figures["by"], *(each["by"] for each in figures["sets"].values())):
        for name, values in by.items():
            slices[name] = in_order({*slices.get(name, []), *values})
    table = pa.concat_tables(marked, promote_options="permissive")
    page.write(path, table, prompts, slices)


def prompts_of(answers: Dataset) -> dict[str, page.Prompt]:
    """The prompts of a split with their answers, by prompt id, as text for the page."""
    result: dict[str, page.Prompt] = {}
    for row in answers.select_columns([PROMPT_ID, ANSWER, PROMPT, RESPONSE]):
        if row[PROMPT_ID] not in result:
            result[row[PROMPT_ID]] = page.Prompt(page.readable(row[PROMPT]), {})
        result[row[PROMPT_ID]].answers[row[ANSWER]] = page.readable(row[RESPONSE])
    return result


if __name__ == "__main__":
    run_stage("stages.evaluate", __doc__, lambda: distribute(main, "stages.evaluate"))
