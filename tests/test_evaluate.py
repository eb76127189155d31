"""The evaluation: every metric against a slow loop, and the contents of every file."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, load_from_disk

from reward import params
from reward.after_training import Evaluate
from reward.data.columns import IDS
from reward.judging import evaluation
from reward.judging.benchmarks import REWARDBENCH
from reward.model.packing import Texts
from reward.outputs import digest, digests
from reward.process import Fault
from stages import evaluate, preprocess
from tests.forked import evaluate_within, require_done, run_in_group
from tests.support import SetParams, set_params, write_pairs

KNOWN = ("prefix_length", "preference", "weight", "answer_j", "answer_k", "prompt_id")
Scorer = Callable[[dict[str, Any]], tuple[float, float]]


@pytest.fixture
def judged(
    workspace: Path, set_params: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Scorer], dict[str, Any]]:
    """Run the stage with a function that scores rows instead of the model; return its figures."""
    write_pairs(workspace / "data" / "raw" / "pairs.json", 100)
    set_params("preprocess", validation_fraction=0.1, test_fraction=0.2)
    preprocess.main()
    evaluate.ADAPTER.mkdir()
    shutil.copy("data/tokenized/template.json", evaluate.ADAPTER)

    def run(scorer: Scorer) -> dict[str, Any]:
        def score(_: None, prompts: list[Texts], tokens_per_pack: int) -> torch.Tensor:
            assert tokens_per_pack == params.load("evaluate", Evaluate).tokens_per_pack
            rewards = {
                tuple(row[name]): reward
                for row in load_from_disk(evaluate.TEST)
                for name, reward in zip(IDS, scorer(row), strict=True)
            }
            texts = [tuple(map(int, ids)) for texts in prompts for ids in texts.ids]
            assert sorted(texts) == sorted(rewards)
            return torch.tensor([rewards[ids] for ids in texts])

        monkeypatch.setattr(evaluate, "load", lambda *_: None)
        monkeypatch.setattr(evaluate, "require_exact", lambda *_: None)
        monkeypatch.setattr(evaluate, "score", score)
        evaluate.main()
        content: dict[str, Any] = json.loads((evaluate.REPORTS / "figures.json").read_text())
        return content

    return run


def arbitrary_rewards(row: dict[str, Any]) -> tuple[float, float]:
    """Uninformative rewards, some of which are equal."""
    draw = random.Random(str((row["input_ids_j"], row["input_ids_k"])))
    return float(draw.randint(0, 3)), float(draw.randint(0, 3))


def test_constant_scorer_has_accuracy_one_half(
    judged: Callable[[Scorer], dict[str, Any]],
) -> None:
    metrics = judged(lambda row: (0.25, 0.25))
    assert metrics["accuracy"] == 0.5
    assert metrics["accuracy_low"] == metrics["accuracy_high"] == 0.5
    assert metrics["equal_rewards"] == metrics["pairs"] == 20
    assert metrics["ties"] == {"pairs": 0}
    assert metrics["rankings"]["kendall_tau"]["mean"] == 0
    assert metrics["loss"] == pytest.approx(math.log(2))
    assert metrics["margin_mean"] == metrics["margin_std"] == 0
    assert metrics["calibration"]["expected_error"] == 0
    assert metrics["calibration"]["brier"] == 0.25
    assert metrics["length"]["correlation"] is None


def test_interval_of_a_random_scorer_contains_one_half(
    judged: Callable[[Scorer], dict[str, Any]],
) -> None:
    draw = random.Random(5)
    metrics = judged(lambda row: (draw.random(), draw.random()))
    assert metrics["accuracy_low"] < 0.5 < metrics["accuracy_high"]


def test_oracle_is_always_correct_and_its_opposite_never(
    judged: Callable[[Scorer], dict[str, Any]],
) -> None:
    oracle, inverted = judged(lambda row: (1.0, 0.0)), judged(lambda row: (0.0, 1.0))
    assert (oracle["accuracy"], inverted["accuracy"]) == (1, 0)
    assert (oracle["chosen_mean"], oracle["rejected_mean"]) == (1, 0)
    assert oracle["loss"] < math.log(2) < inverted["loss"]


def test_figures_match_a_plain_loop(judged: Callable[[Scorer], dict[str, Any]]) -> None:
    metrics = judged(arbitrary_rewards)
    rows = list(load_from_disk("data/tokenized/test"))
    figures: dict[str, list[float]] = {"all": [], "rude": [], "short": []}
    rewards: dict[str, list[float]] = {"chosen": [], "rejected": []}
    margins, losses, ties = [], [], 0
    for row in rows:
        chosen, rejected = arbitrary_rewards(row)
        hit = 0.5 if chosen == rejected else float(chosen > rejected)
        ties += chosen == rejected
        margins.append(chosen - rejected)
        rewards["chosen"].append(chosen)
        rewards["rejected"].append(rejected)
        losses.append(math.log1p(math.exp(rejected - chosen)))
        figures["all"].append(hit)
        figures[row["kind"]].append(hit)
    mean = sum(margins) / len(margins)
    assert ties > 0
    assert metrics["accuracy"] == pytest.approx(sum(figures["all"]) / len(rows))
    assert metrics["equal_rewards"] == ties
    assert metrics["pairs"] == len(rows)
    assert metrics["prompts"] == len({row["prompt_id"] for row in rows})
    assert metrics["loss"] == pytest.approx(sum(losses) / len(rows))
    assert metrics["margin_mean"] == pytest.approx(mean)
    assert metrics["margin_std"] == pytest.approx(
        math.sqrt(sum((margin - mean) ** 2 for margin in margins) / len(margins))
    )
    for side, values in rewards.items():
        center = sum(values) / len(values)
        variance = sum((value - center) ** 2 for value in values) / len(values)
        assert metrics[f"{side}_mean"] == pytest.approx(center)
        assert metrics[f"{side}_std"] == pytest.approx(math.sqrt(variance))
    assert metrics["by"].keys() == {"kind"}
    for kind in ("rude", "short"):
        found = metrics["by"]["kind"][kind]
        assert found["accuracy"] == pytest.approx(sum(figures[kind]) / len(figures[kind]))
        assert found["pairs"] == len(figures[kind])
        assert 0 <= found["low"] <= found["accuracy"] <= found["high"] <= 1


def test_rewards_of_every_pair_are_written_in_order_with_its_columns(
    judged: Callable[[Scorer], dict[str, Any]],
) -> None:
    judged(arbitrary_rewards)
    found = pyarrow.parquet.read_table(evaluate.REPORTS / "rewards.parquet").to_pylist()
    expected = [
        {
            "id": row["id"],
            "reward_chosen": arbitrary_rewards(row)[0],
            "reward_rejected": arbitrary_rewards(row)[1],
            "margin": arbitrary_rewards(row)[0] - arbitrary_rewards(row)[1],
            "tokens_chosen": len(row["input_ids_j"]),
            "tokens_rejected": len(row["input_ids_k"]),
            **{name: row[name] for name in KNOWN},
            "kind": row["kind"],
        }
        for row in load_from_disk("data/tokenized/test")
    ]
    assert found == expected


def test_plots_show_every_pair_and_every_slice(judged: Callable[[Scorer], dict[str, Any]]) -> None:
    metrics = judged(arbitrary_rewards)
    histogram = json.loads((evaluate.REPORTS / "margins.json").read_text())
    slices = json.loads((evaluate.REPORTS / "slices.json").read_text())
    assert sum(entry["pairs"] for entry in histogram) == metrics["pairs"]
    assert [row["slice"] for row in slices] == ["kind: rude", "kind: short"]
    assert [row["accuracy"] for row in slices] == [
        metrics["by"]["kind"][kind]["accuracy"] for kind in ("rude", "short")
    ]


def test_metrics_file_holds_only_the_headline_figures(
    judged: Callable[[Scorer], dict[str, Any]],
) -> None:
    figures = judged(arbitrary_rewards)
    assert json.loads(evaluate.METRICS.read_text()) == {
        "accuracy": figures["accuracy"],
        "low": figures["accuracy_low"],
        "high": figures["accuracy_high"],
        "loss": figures["loss"],
        "test/margin": figures["margin_mean"],
        "test/equal_rewards": figures["equal_rewards"],
        "test/calibration_error": figures["calibration"]["expected_error"],
        "test/best_of_n": figures["rankings"]["best_of_n"]["mean"],
    }


def test_values_of_a_slice_are_sorted_numerically() -> None:
    values = {"10", "2", "-1", "b", "a", "1.5", "1e3", "nan"}
    assert evaluation.in_order(values) == ["-1", "1.5", "2", "10", "1e3", "a", "b", "nan"]


def test_same_rewards_give_the_same_bytes(judged: Callable[[Scorer], dict[str, Any]]) -> None:
    judged(arbitrary_rewards)
    first = digests(evaluate.REPORTS), evaluate.METRICS.read_bytes()
    judged(arbitrary_rewards)
    plots = ("length", "length_curve", "margins", "reliability", "roc", "slices")
    assert first[0].keys() == {"figures.json", "index.html", "rewards.parquet"} | {
        f"{name}.json" for name in plots
    }
    assert (digests(evaluate.REPORTS), evaluate.METRICS.read_bytes()) == first


def test_halves_of_the_prompts_depend_on_the_seed(
    judged: Callable[[Scorer], dict[str, Any]], set_params: SetParams
) -> None:
    found = set()
    for seed in (0, 1):
        set_params("evaluate", seed=seed)
        figures = judged(arbitrary_rewards)
        found.add((figures["accuracy_low"], figures["length"]["adjusted"]["correlation"]))
    [low] = {low for low, _ in found}
    assert len(found) == 2
    assert 0 < low < figures["accuracy"]


def test_threads_and_packs_are_those_that_were_asked_for(
    judged: Callable[[Scorer], dict[str, Any]],
    set_params: SetParams,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, packs = Mock(), Mock()
    monkeypatch.setattr(torch, "set_num_threads", threads)
    monkeypatch.setattr(evaluate, "full_pack", packs)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    set_params("evaluate", tokens_per_pack=512)
    judged(arbitrary_rewards)
    assert (threads.mock_calls, packs.call_args.args[1]) == ([call(7)], 512)
    written = pyarrow.parquet.read_schema(evaluate.REPORTS / "rewards.parquet")
    assert written.metadata[b"tokens_per_pack"] == b"512"


def graded(preference: list[float], margin: list[float], **columns: list[str]) -> pa.Table:
    """Comparisons of three answers to each prompt, as judged by evaluate."""
    count = len(preference)
    return pa.table(
        {
            "id": [f"id{row}" for row in range(count)],
            "reward_chosen": margin,
            "reward_rejected": [0.0] * count,
            "margin": margin,
            "tokens_chosen": [20 + row for row in range(count)],
            "tokens_rejected": [20] * count,
            "prefix_length": [8 + row % 3 for row in range(count)],
            "preference": preference,
            "weight": [float(1 + row) for row in range(count)],
            "answer_j": [row % 3 for row in range(count)],
            "answer_k": [(row + 1) % 3 for row in range(count)],
            "prompt_id": [f"prompt{row // 3}" for row in range(count)],
            **columns,
        }
    )


def measured(table: pa.Table) -> dict[str, Any]:
    return evaluation.measure(table, evaluation.as_judged(table), 0)


def test_ties_count_only_in_loss_and_calibration() -> None:
    preference, margin = [1.0, 0.5, 0.75] * 4, [2.0, 9.0, -1.0] * 4
    table = graded(preference, margin, kind=["a", "b", "a"] * 4)
    found, decided = measured(table), measured(table.filter(pc.not_equal(table["preference"], 0.5)))
    same = ("accuracy", "pairs", "margin_mean", "chosen_mean", "by")
    assert {name: found[name] for name in same} == {name: decided[name] for name in same}
    assert (found["accuracy"], found["pairs"], found["ties"]["pairs"]) == (0.5, 8, 4)
    assert found["ties"]["area"] == 0
    assert found["by"] == {"kind": {"a": found["by"]["kind"]["a"]}}
    losses = [math.log1p(math.exp(-2)), (math.log1p(math.exp(-9)) + math.log1p(math.exp(9))) / 2]
    losses += [0.75 * math.log1p(math.exp(1)) + 0.25 * math.log1p(math.exp(-1))]
    assert found["loss"] == pytest.approx(sum(losses) / 3)
    curves, others = (
        evaluate.curves(each, 0)
        for each in (evaluation.as_judged(table), evaluation.as_judged(table).decided())
    )
    assert len(curves.pop("length_curve")) > len(others.pop("length_curve"))
    assert curves == others


def test_accuracy_of_slices_shows_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    def watched(slices: list[tuple[str, str]], *_: str) -> list[tuple[str, str]]:
        shown.extend(slices)
        return slices

    monkeypatch.setattr(evaluation, "with_bar", watched)
    found = measured(graded([1.0] * 3, [1.0] * 3, kind=["a", "b", "a"]))["by"]
    assert shown == [(name, value) for name, values in found.items() for value in values]
    assert found["kind"].keys() == {"a", "b"}


def test_weights_are_ignored() -> None:
    preference, margin = [1.0, 0.5, 0.75] * 4, [2.0, 9.0, -1.0] * 4
    table = graded(preference, margin)
    alike = table.set_column(table.column_names.index("weight"), "weight", pa.array([1.0] * 12))
    assert measured(table) == measured(alike)


def test_shared_prefix_of_all_answers_is_the_shortest_of_any_two() -> None:
    judged = evaluation.as_judged(graded([1.0] * 6, [1.0] * 6))
    assert judged.prefix.tolist() == [8] * 6
    assert sorted(judged.answers.prompts.tolist()) == [0, 0, 0, 1, 1, 1]


def test_judging_needs_pairs_that_are_not_ties() -> None:
    with pytest.raises(Fault, match="all 3 test pairs are ties, expected some"):
        measured(graded([0.5] * 3, [1.0] * 3))


def test_set_of_only_ties_has_no_accuracy() -> None:
    table = graded([0.5] * 3, [1.0, 2.0, 3.0], kind=["a", "b", "c"])
    each = evaluation.TestSet("even", Dataset.from_dict({}), {"leaked": 1, "bad": 0, "too_long": 0})
    sets = evaluation.measure_sets([each], [table])
    assert sets["even"]["pairs"] == 0
    assert sets["even"]["by"] == {}
    figures = measured(graded([1.0] * 6, [1.0] * 6)) | {"sets": sets}
    assert not any(name.startswith("sets/") for name in evaluate.headline(figures))
    assert evaluation.slices_as_rows(figures) == []
    evaluation.report(figures, evaluate.TEST)


def test_rewardbench_set_has_a_score_and_a_slice_for_each_subset() -> None:
    names = [name for section in REWARDBENCH.values() for name in section]
    table = graded([1.0] * 23, [1.0] * 22 + [-1.0], subset=names)
    each = evaluation.TestSet(
        "bench", Dataset.from_dict({}), {"leaked": 0, "bad": 0, "too_long": 0}
    )
    sets = evaluation.measure_sets([each], [table])
    assert sets["bench"]["by"]["subset"].keys() == {*names}
    assert sets["bench"]["benchmark"]["score"] == pytest.approx(1 - 164 / 1968 / 4)
    figures = measured(graded([1.0] * 6, [1.0] * 6)) | {"sets": sets}
    found = evaluate.headline(figures)
    assert found["sets/bench"] == pytest.approx(22 / 23)
    assert found["sets/bench/score"] == sets["bench"]["benchmark"]["score"]
    some = evaluation.measure_sets([each], [table.slice(0, 3)])
    assert some["bench"]["benchmark"]["score"] is None
    assert "sets/bench/score" not in evaluate.headline(figures | {"sets": some})


def test_column_with_few_values_slices_the_pairs() -> None:
    columns = {f"{count} values": [str(row % count) for row in range(62)] for count in (30, 31)}
    figures = measured(graded([1.0] * 62, [1.0] * 62, **columns))
    assert {name: len(values) for name, values in figures["by"].items()} == {"30 values": 30}


def test_odd_names_of_slices_neither_break_the_report_nor_the_plots(
    capsys: pytest.CaptureFixture[str],
) -> None:
    kinds = ["</script><b>", "a\x1b[31m\nb", "long " * 100, "好"]
    figures = measured(graded([1.0] * 4, [1.0] * 4, kind=kinds)) | {"sets": {}}
    evaluation.report(figures, evaluate.TEST)
    printed = capsys.readouterr().out
    assert "  kind: a\\x1b[31m\\nb " in printed
    assert "  kind: 好 " in printed
    assert max(map(len, printed.splitlines())) < 130
    assert not any("<" in row["slice"] for row in evaluate.slices_to_plot(figures))
    assert "</script><b>" in figures["by"]["kind"]


@pytest.mark.parametrize(
    ("temperature", "loss", "said"),
    [
        (None, None, "no finite temperature is best"),
        (0.68, None, "temperature 0.68 is best, but not for both halves of the prompts"),
        (0.68, 0.25, "loss 0.2500 at temperature 0.68"),
    ],
)
def test_report_says_which_temperature_is_best(
    capsys: pytest.CaptureFixture[str], temperature: float | None, loss: float | None, said: str
) -> None:
    figures = measured(graded([1.0] * 4, [1.0] * 4)) | {"sets": {}}
    figures["calibration"] |= {"temperature": temperature, "loss_at_temperature": loss}
    evaluation.report(figures, evaluate.TEST)
    assert f", {said}\n" in capsys.readouterr().out


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_non_finite_rewards_stop_the_stage(
    judged: Callable[[Scorer], dict[str, Any]], broken: float
) -> None:
    with pytest.raises(Fault, match="rewards of 20 of 20 pairs are not finite"):
        judged(lambda row: (broken, 0.0))
    assert not evaluate.REPORTS.exists()
    assert not evaluate.METRICS.exists()


def test_bytes_do_not_depend_on_the_number_of_processes(project: Path, tmp_path: Path) -> None:
    """Also if memory runs out in only one of them."""
    set_params("evaluate", tokens_per_pack=250)
    shutil.rmtree(evaluate.REPORTS)
    evaluate.METRICS.unlink()
    elsewhere = shutil.copytree(project, tmp_path / "elsewhere")
    found = []
    for size in (1, 2):
        require_done(run_in_group(size, evaluate_within, 100, str(elsewhere)))
        found.append((digests(evaluate.REPORTS), digest(evaluate.METRICS)))
        shutil.rmtree(evaluate.REPORTS)
    assert found[0] == found[1]
    assert not (elsewhere / evaluate.REPORTS).exists()
    assert not (elsewhere / evaluate.METRICS).exists()
