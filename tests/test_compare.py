"""Comparing two judgements: the verdict, and the evidence for it."""

import io
import random
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from reward.data.columns import PREFERENCE, TIE
from reward.judging import compare
from reward.judging.compare import (
    Comparison,
    align,
    interval_of_difference,
    interval_of_gain,
    mcnemar,
    report,
)
from reward.process import Fault, run

NAMES = ("main", "other")


def table(margins: list[float], ids: list[str] | None = None, each: int = 1) -> pa.Table:
    """Rewards as evaluate writes them, with `each` consecutive pairs per prompt."""
    return pa.table(
        {
            "id": ids or [f"id{index}" for index in range(len(margins))],
            "margin": pa.array(margins, pa.float32()),
            "prompt_id": [f"prompt{index // each}" for index in range(len(margins))],
        }
    )


def compared(first: list[float], second: list[float], each: int = 1) -> Comparison:
    return align(table(first, each=each), table(second, each=each), NAMES)


def test_clear_gain_is_better_and_clear_loss_is_worse() -> None:
    bad, good = [-1.0] * 30 + [1.0] * 30, [1.0] * 55 + [-1.0] * 5
    assert "verdict    other is better" in report(compared(bad, good), NAMES, False)
    assert "verdict    other is worse" in report(compared(good, bad), NAMES, False)


def test_identical_rewards_are_not_a_gain() -> None:
    draw = np.random.default_rng(0).normal(size=50).tolist()
    printed = report(compared(draw, draw), NAMES, False)
    assert "verdict    the difference may be noise" in printed
    assert "0 pairs for the better, 0 for the worse; McNemar's exact p = 1" in printed
    assert "difference +0.0000" in printed


def test_false_positive_rate_is_close_to_nominal() -> None:
    draw = np.random.default_rng(1)
    verdicts = []
    for _ in range(60):
        first, second = (draw.normal(0.5, 1, 80).tolist() for _ in range(2))
        verdicts.append("may be noise" in report(compared(first, second), NAMES, False))
    assert sum(verdicts) >= 51


def test_many_pairs_of_few_prompts_are_weak_evidence() -> None:
    """A gain on one prompt out of four stays weak, whether the prompt has two pairs or twenty."""
    for each in (2, 20):
        first = [1.0] * each * 3 + [-1.0] * each
        printed = report(compared(first, [1.0] * each * 4, each), NAMES, False)
        assert "may be noise" in printed


@pytest.mark.parametrize(
    ("prompts", "verdict"), [(1, "may be noise"), (5, "may be noise"), (6, "is better")]
)
def test_identical_gains_need_enough_prompts(prompts: int, verdict: str) -> None:
    """Resampled identical gains have no spread; six of six has a probability of 1/64 per side."""
    printed = report(compared([-1.0] * prompts * 3, [1.0] * prompts * 3, 3), NAMES, False)
    assert verdict in printed


def slow_interval(values: list[float], prompts: list[int], samples: int) -> tuple[float, float]:
    """The middle of the means over prompts drawn with replacement, with all of their pairs.

    It is the middle 95%, widened by the ratio of a t interval to a normal one without n / (n - 1).
    """
    draw = random.Random(1)
    names = sorted(set(prompts))
    means = []
    for _ in range(samples):
        found: list[float] = []
        for name in (draw.choice(names) for _ in names):
            found += [
                value for value, prompt in zip(values, prompts, strict=True) if prompt == name
            ]
        means.append(sum(found) / len(found))
    means.sort()
    count = len(names)
    tail = NormalDist().cdf(-((count / (count - 1)) ** 0.5) * stats.t(count - 1).ppf(0.975))
    return means[int(tail * samples)], means[int((1 - tail) * samples)]


@pytest.mark.parametrize("seed", range(3))
def test_interval_matches_resampled_prompts(seed: int) -> None:
    draw = random.Random(seed)
    prompts = [draw.randrange(25) for _ in range(80)]
    gain = [draw.choice([0.0, 0.0, -1.0, 0.5, 1.0]) for _ in prompts]
    found = interval_of_gain(np.array(gain), np.array(prompts))
    assert found == pytest.approx(slow_interval(gain, prompts, 2000), abs=0.04)


def test_interval_of_few_prompts_is_wider_than_the_middle_of_their_means() -> None:
    draw, prompts = random.Random(0), [*range(8)]
    values = [draw.random() for _ in prompts]
    found = interval_of_difference(np.array(values), np.array(prompts))
    assert found == pytest.approx(slow_interval(values, prompts, 20_000), abs=0.01)
    means = np.random.default_rng(1).choice(values, (20_000, 8)).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert found[0] < low - 0.02
    assert found[1] > high + 0.02


@pytest.mark.parametrize(("prompts", "each"), [(20, 1), (20, 3), (2, 1)])
def test_no_change_in_some_prompts_does_not_exclude_changes_in_others(
    prompts: int, each: int
) -> None:
    """If more than `share` of all prompts changed, it would be unlikely to see none of them."""
    low, high = interval_of_gain(np.zeros(prompts * each), np.arange(prompts * each) % prompts)
    share = 1 - 0.025 ** (1 / prompts)
    assert (low, high) == pytest.approx((-share, share))
    assert interval_of_gain(np.zeros(each), np.zeros(each, dtype=int)) == (-1, 1)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (5, 5), (12, 3), (0, 7), (1, 0)])
def test_mcnemar_matches_the_exact_binomial_test(better: int, worse: int) -> None:
    gain = np.array([1.0] * better + [-1.0] * worse + [0.0] * 9)
    total = better + worse
    tails = sum(
        stats.binom.pmf(k, total, 0.5)
        for k in range(total + 1)
        if stats.binom.pmf(k, total, 0.5) <= stats.binom.pmf(better, total, 0.5) * (1 + 1e-9)
    )
    assert mcnemar(gain) == pytest.approx(tails if total else 1.0)


def test_equal_rewards_count_half() -> None:
    found = compared([0.0, 1.0, -1.0], [1.0, 0.0, 0.0])
    assert found.gain.tolist() == [0.5, -0.5, 0.5]


def test_ties_are_left_out() -> None:
    """In a revision without the preference column, no pair is a tie."""
    preference = pa.array([1.0, 0.5, 0.75])
    first = table([1.0, -1.0, 2.0]).append_column("preference", preference)
    second = table([-1.0, 1.0, 3.0])
    for one, other in ((first, second), (second, first), (first, first)):
        assert align(one, other, NAMES).ids == ["id0", "id2"]
    assert align(second, second, NAMES).ids == ["id0", "id1", "id2"]


def test_pairs_are_matched_by_id_and_others_are_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = table([1.0, -1.0, 2.0], ["a", "b", "c"]), table([5.0, 3.0], ["c", "b"])
    found = align(first, second, NAMES)
    assert found.ids == ["b", "c"]
    assert [margins.tolist() for margins in found.margins] == [[-1.0, 2.0], [3.0, 5.0]]
    assert "left out: 1 pair that only one of the two has judged" in capsys.readouterr().err
    with pytest.raises(Fault, match="have no judged pairs in common"):
        align(first, table([1.0], ["z"]), NAMES)
    tied = first.append_column(PREFERENCE, pa.array([TIE] * 3))
    with pytest.raises(Fault, match="have only ties in common"):
        align(tied, tied, NAMES)


def test_pair_that_is_twice_in_a_set_is_not_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (
        table([1.0, 1.0, -1.0], ["a", "a", "b"]),
        table([2.0, 2.0, 3.0], ["a", "a", "b"]),
    )
    assert align(first, second, NAMES).ids == ["a", "a", "b"]
    assert capsys.readouterr().err == ""
    align(first, table([2.0, 2.0], ["a", "c"]), NAMES)
    assert "left out: 2 pairs that only one of the two has judged" in capsys.readouterr().err


def test_pairs_that_flipped_are_listed_largest_change_first() -> None:
    found = compared([-1.0] * 12 + [1.0], [float(n) for n in range(1, 13)] + [-9.0])
    shown = report(found, NAMES, False).splitlines()
    assert "better id11  margin -1.0000 -> +12.0000" in shown[4]
    assert shown[-1] == "  and 3 more (--all)"
    everything = report(found, NAMES, True).splitlines()
    assert len(everything) == 4 + 13
    assert any("worse  id12  margin +1.0000 -> -9.0000" in line for line in everything)


@pytest.mark.parametrize(
    ("options", "file"), [([], "rewards.parquet"), (["--set", "mine"], "sets/mine.parquet")]
)
def test_revisions_are_read_from_dvc_and_the_workspace_from_disk(
    options: list[str],
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = compare.REPORTS / file
    path.parent.mkdir(parents=True)
    pq.write_table(table([1.0] * 20), path)
    content = io.BytesIO()
    pq.write_table(table([-1.0] * 20), content)
    figures = compare.REPORTS / "figures.json"
    figures.write_text('{"sets": {"mine": {}}}', encoding="utf-8")
    asked = []

    def read(path: str, rev: str, mode: str) -> bytes:
        if Path(path) == figures:
            return figures.read_bytes()
        if path == "dvc.lock":
            return b"stages: {}"
        asked.append((path, rev, mode))
        return content.getvalue()

    monkeypatch.setattr("dvc.api.read", read)
    monkeypatch.setattr(sys, "argv", ["compare", "main", "workspace", *options])
    compare.main()
    assert asked == [(f"reports/evaluate/{file}", "main", "rb")]
    printed = capsys.readouterr().out
    assert "workspace is better" in printed
    assert "accuracy   0.0000 for main, 1.0000 for workspace, 20 pairs of 20 prompts" in printed


@pytest.mark.parametrize(
    ("figures", "found"),
    [('{"sets": {"one": {}, "by_hand": {}}}', "by_hand, one"), ('{"sets": {}}', "none at all")],
)
def test_set_that_was_not_judged_is_reported_with_those_that_were(
    figures: str, found: str, tmp_path: Path
) -> None:
    (tmp_path / "figures.json").write_text(figures, encoding="utf-8")
    message = f"--set is mine, but the extra test sets of {tmp_path} are: {found}"
    with pytest.raises(Fault, match=f"^{re.escape(message)}$"):
        compare.rewards_of(str(tmp_path), "mine")


@pytest.mark.parametrize("figures", ["{", "[]", '{"sets": ["mine"]}', '{"sets": null}'])
def test_broken_figures_are_reported(figures: str, tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text(figures, encoding="utf-8")
    message = f"{tmp_path}: figures.json is broken, expected the figures of an evaluation"
    with pytest.raises(Fault, match=f"^{re.escape(message)}$"):
        compare.rewards_of(str(tmp_path), "mine")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"id": None}, "rows without id"),
        ({"prompt_id": ["prompt", None]}, "rows without prompt_id"),
        ({"id": None, "margin": [1.0, None]}, "rows without id, margin"),
        ({"margin": [1.0, float("nan")]}, "a margin that is not a finite number"),
        ({"margin": ["1.0", "2.0"]}, "a margin that is not a finite number"),
    ],
)
def test_broken_rewards_are_reported(
    change: dict[str, list[object] | None], found: str, tmp_path: Path
) -> None:
    (tmp_path / "figures.json").write_text("{}", encoding="utf-8")
    columns = table([1.0, 2.0]).to_pydict() | change
    rewards = pa.table({name: values for name, values in columns.items() if values is not None})
    pq.write_table(rewards, tmp_path / "rewards.parquet")
    message = f"{tmp_path}: rewards.parquet has {found}, expected "
    with pytest.raises(Fault, match=f"^{re.escape(message)}"):
        compare.rewards_of(str(tmp_path), None)


def test_revision_whose_rewards_are_not_in_the_cache_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class DataIndexDirError(Exception):
        """Like that of dvc_data, which is not an error of DVC."""

    def read(*_: object, **__: object) -> bytes:
        raise DataIndexDirError("failed to load directory ('reports', 'evaluate')")

    monkeypatch.setattr("dvc.api.read", read)
    with pytest.raises(Fault, match=r"^main: .* cannot be read there \(failed to load directory"):
        compare.rewards_of("main", None)


LOCK = """
stages:
  fetch: {{outs: [{{path: models/base, md5: b1}}]}}
  preprocess: {{outs: [{{path: data/tokenized, md5: t9}}]}}
  train:
    deps: [{{path: models/base, md5: b1}}]
    outs: [{{path: models/adapter, md5: a2}}]
  evaluate:
    deps:
    - {{path: data/tokenized/test, md5: t1}}
    - {{path: models/adapter, md5: {adapter}}}
    - {{path: models/base, md5: b1}}
"""


def test_rewards_of_a_model_before_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `dvc exp run train` leaves them."""
    monkeypatch.chdir(tmp_path)
    compare.REPORTS.mkdir(parents=True)
    pq.write_table(table([1.0]), compare.REPORTS / "rewards.parquet")
    compare.rewards_of("workspace", None)
    compare.LOCK.write_text(LOCK.format(adapter="a2"), encoding="utf-8")
    compare.rewards_of("workspace", None)
    compare.LOCK.write_text(LOCK.format(adapter="a1"), encoding="utf-8")
    with pytest.raises(Fault, match=r"^workspace: models/adapter has changed since evaluate ran"):
        compare.rewards_of("workspace", None)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ("{rate: 1e-05, rank: 2}", None),
        ("{rate: 0.00001, rank: 2}", None),
        ("{rate: 1e-05, rank: 3}", "train.rank in params.yaml changed since evaluate ran"),
        ("{rate: 1e-05}", "train.rank in params.yaml changed since evaluate ran"),
        ("[", "params.yaml is broken, expected the parameters of evaluate"),
        ("2", "params.yaml is broken, expected the parameters of evaluate"),
    ],
)
def test_rewards_of_other_parameters_are_refused(
    values: str, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an edit, or of an experiment that is still in the queue."""
    monkeypatch.chdir(tmp_path)
    compare.REPORTS.mkdir(parents=True)
    pq.write_table(table([1.0]), compare.REPORTS / "rewards.parquet")
    trained = "  train: {params: {params.yaml: {train: {rate: 1e-05, rank: 2}}}, outs: []}\n"
    compare.LOCK.write_text(f"stages:\n{trained}", encoding="utf-8")
    compare.PARAMS.write_text(f"train: {values}\nexport: {{a: 1}}\n", encoding="utf-8")
    with pytest.raises(Fault, match=f"^workspace: {found}") if found else nullcontext():
        compare.rewards_of("workspace", None)


@pytest.mark.parametrize("content", ["<<<<<<< HEAD", "", "schema: '2.0'", "stages:"])
def test_broken_lock_is_reported(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    compare.LOCK.write_text(content, encoding="utf-8")
    with pytest.raises(Fault, match=r"^workspace: dvc\.lock is broken, expected what"):
        compare.rewards_of("workspace", None)


def test_project_may_be_a_folder_of_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / "a" / "project").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "project")
    monkeypatch.setattr("dvc.api.read", lambda path, rev, mode: path.encode())
    assert compare.at_revision("main", compare.LOCK) == b"a/project/dvc.lock"


@pytest.mark.parametrize("name", ["no-such-thing", "workspace"])
def test_missing_revision_or_rewards_are_reported(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare", name, name])
    with pytest.raises(SystemExit) as caught:
        run(compare.main)
    assert caught.value.code == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "expected" in printed or "run dvc repro" in printed


@pytest.mark.parametrize("stage", ["fetch", "preprocess", "train", "evaluate"])
def test_rewards_of_other_parameters_of_any_stage_are_refused(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    compare.REPORTS.mkdir(parents=True)
    pq.write_table(table([1.0]), compare.REPORTS / "rewards.parquet")
    ran = f"  {stage}: {{params: {{params.yaml: {{group: {{key: 1}}}}}}, outs: []}}\n"
    compare.LOCK.write_text(f"stages:\n{ran}", encoding="utf-8")
    compare.PARAMS.write_text("group: {key: 2}\n", encoding="utf-8")
    with pytest.raises(Fault, match=r"^workspace: group\.key in params\.yaml changed since"):
        compare.rewards_of("workspace", None)
