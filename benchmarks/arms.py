"""How parameters affect a reward model: an experiment with several arms and seeds.

    python -m benchmarks.arms step-of pairs: prompts:train.step_of=prompts
    python -m benchmarks.arms soft soft:preprocess.data=data/soft hard:preprocess.data=data/hard

An arm is a name, a colon, and parameters separated by commas. The other arms are compared with the
first. Each arm is trained once per seed, as a DVC experiment, and judged on the same test pairs.
Intervals are for the mean over the seeds and come from resampled prompts. The table also has the
range over the seeds.

Needs a separate clone with everything committed, because the experiments overwrite params.yaml.
Existing runs are read, not repeated. The report is benchmarks/results/arms-NAME.md.
"""

import argparse
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from benchmarks.defaults import RESULTS, command, exists, rewards_of
from reward.judging.compare import interval_of_difference
from reward.judging.evaluation import as_judged
from reward.judging.metrics import Floats, calibration, correct, losses
from reward.process import command_line

LOGS = Path("data/arms")


@dataclass(frozen=True)
class Arm:
    """A name, and the parameters that differ from params.yaml."""

    name: str
    settings: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> "Arm":
        name, _, settings = text.partition(":")
        return cls(name, tuple(filter(None, settings.split(","))))


@dataclass(frozen=True)
class Found:
    """The results of an arm: [seeds, pairs], but [seeds] for `calibrated` and `speed`."""

    right: Floats
    loss: Floats
    calibrated: Floats
    speed: Floats


def main() -> None:
    options = parse()
    arms = [Arm.of(text) for text in options.arms]
    runs = [(arm, seed) for seed in range(options.seeds) for arm in arms]
    for arm, seed in tqdm(runs, desc="experiments"):
        run(options.name, arm, seed, options.set_param)
    tables = {arm.name: tables_of(options.name, arm, options.seeds) for arm in arms}
    report = as_markdown(options, arms, tables)
    print(report)
    (RESULTS / f"arms-{options.name}.md").write_text(report, encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = command_line("benchmarks.arms", __doc__)
    parser.add_argument("name", help="name of the experiment")
    parser.add_argument("arms", nargs="+", help="NAME:KEY=VALUE,KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds per arm")
    parser.add_argument(
        "-S", "--set-param", action="append", default=[], help="KEY=VALUE for every run"
    )
    return parser.parse_args()


def run(name: str, arm: Arm, seed: int, settings: Sequence[str]) -> None:
    """Run the experiment of an arm and a seed, unless it exists."""
    full_name, log = experiment(name, arm, seed), log_of(name, arm, seed)
    if exists(full_name):
        return
    # An experiment leaves its parameters in the working tree.
    subprocess.run(["git", "restore", "params.yaml"], check=True)
    values = [f"train.seed={seed}", *settings, *arm.settings]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        subprocess.run(command(full_name, values), check=True, stdout=output)


def experiment(name: str, arm: Arm, seed: int) -> str:
    return f"{name}-{arm.name}-{seed}"


def log_of(name: str, arm: Arm, seed: int) -> Path:
    return LOGS / f"{experiment(name, arm, seed)}.log"


# --- results ---------------------------------------------------------------------------------


def tables_of(name: str, arm: Arm, seeds: int) -> list[pa.Table]:
    """The rewards of the test pairs for each seed, sorted by the ids of the pairs."""
    return [rewards_of(experiment(name, arm, seed)).sort_by("id") for seed in range(seeds)]


def found(name: str, arm: Arm, tables: Sequence[pa.Table]) -> Found:
    """The results of an arm from its tables, one per seed; ties have no accuracy."""
    margins = np.array([table["margin"].to_numpy() for table in tables], dtype=np.float64)
    preference = tables[0]["preference"].to_numpy()
    loss = losses(margins, preference)
    right = np.where(preference == 0.5, np.nan, correct(margins))
    fitted = [calibration(as_judged(table), seed=0)["loss_at_temperature"] for table in tables]
    speeds = [speed(name, arm, seed) for seed in range(len(tables))]
    return Found(right, loss, np.array(fitted, dtype=np.float64), np.array(speeds))


def speed(name: str, arm: Arm, seed: int) -> float:
    """Pairs per second, as training printed it; NaN if the log has no such line."""
    path = log_of(name, arm, seed)
    line = re.search(r"^speed +([\d.]+) pairs/s", path.read_text("utf-8"), re.M)
    return float(line[1]) if line else float("nan")


def as_markdown(
    options: argparse.Namespace, arms: Sequence[Arm], tables: dict[str, list[pa.Table]]
) -> str:
    """The tables of the arms, and of their differences from the first arm."""
    first = tables[arms[0].name][0]
    prompts = np.unique(first["prompt_id"].to_numpy(), return_inverse=True)[1]
    results = {arm.name: found(options.name, arm, tables[arm.name]) for arm in arms}
    decided = ~np.isnan(results[arms[0].name].right[0])
    lines = [
        f"# {options.name}: {', '.join(arm.name for arm in arms)}",
        "",
        "Written by `python -m benchmarks.arms`, which says what is measured and how.",
        "",
        f"- test pairs: {len(first)}, of {prompts.max() + 1} prompts; ties: "
        f"{int((~decided).sum())}; seeds: {options.seeds}",
        *(f"- {arm.name}: {', '.join(arm.settings) or 'params.yaml unchanged'}" for arm in arms),
        *([f"- all arms: {', '.join(options.set_param)}"] if options.set_param else []),
        "",
        "| arm | accuracy | by seed | loss | by seed | loss at its best temperature | pairs/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm in arms:
        each = results[arm.name]
        right, loss = each.right[:, decided].mean(axis=1), each.loss.mean(axis=1)
        lines.append(
            f"| {arm.name} | {right.mean():.4f} | {ranged(right)} | {loss.mean():.4f} | "
            f"{ranged(loss)} | {each.calibrated.mean():.4f} | {np.median(each.speed):.1f} |"
        )
    base = results[arms[0].name]
    lines += [
        "",
        f"| minus {arms[0].name} | accuracy | 95% interval | loss | 95% interval |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for arm in arms[1:]:
        each = results[arm.name]
        right = (each.right - base.right)[:, decided].mean(axis=0)
        loss = (each.loss - base.loss).mean(axis=0)
        lines.append(
            f"| {arm.name} | {right.mean():+.4f} | {interval(right, prompts[decided])} | "
            f"{loss.mean():+.4f} | {interval(loss, prompts)} |"
        )
    return "\n".join(lines) + "\n"


def ranged(values: Floats) -> str:
    return f"{values.min():.4f} to {values.max():.4f}"


def interval(values: Floats, prompts: np.ndarray) -> str:
    low, high = interval_of_difference(values, prompts)
    return f"{low:+.4f} to {high:+.4f}"


if __name__ == "__main__":
    main()
