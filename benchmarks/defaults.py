"""Which training parameters improve held-out accuracy: DVC experiments, with intervals.

    python -m benchmarks.defaults embedded
    python -m benchmarks.defaults confirmed --together train.learning_rate train.pairs_per_step
    python -m benchmarks.defaults real --data en.json zh.json -S base.name=models/smollm2

Six parameters, each at two levels, in eight runs per fold of the data: a fractional factorial
design (Box, Hunter and Hunter 2005, chapter 6), in which every run is informative about every
parameter. Each fold is held out and judged by the model that was trained on the others, so every
pair is judged once per run. Without --data the pairs are the training and validation pairs of the
sample; its test pairs stay unseen.

The effects are confounded with interactions of two parameters. Each training has only one seed, so
intervals cover the choice of pairs, not the randomness of training. --together replaces the design:
for each fold and seed, it compares the named parameters at their high levels with all parameters at
their low levels.

Needs a separate clone with everything committed, because the experiments overwrite params.yaml.
Existing runs are read, not repeated.
"""

import argparse
import io
import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet
from dvc import api
from tokenizers import Tokenizer
from tqdm import tqdm

from reward import params
from reward.data.columns import TIE
from reward.data.reading import read
from reward.data.records import check
from reward.data.splitting import split
from reward.judging.compare import interval_of_difference
from reward.judging.metrics import Floats, correct, losses
from reward.process import command_line
from stages.preprocess import Preprocess

FOLDS = Path("data/folds")
RESULTS = Path("benchmarks/results")
REWARDS = "reports/evaluate/rewards.parquet"
SEEDS = 3
Levels = npt.NDArray[np.int64]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Factor:
    """A parameter at two levels; `sign` and `parents` place it in the design.

    It is at its high level where the product of its sign and its parents' signs is +1.
    """

    key: str
    low: str
    high: str
    sign: int
    parents: tuple[int, ...]


FACTORS = (
    Factor("preprocess.append_eos", "false", "true", 1, (0,)),
    Factor("train.learning_rate", "2e-4", "1e-3", 1, (2,)),
    Factor("train.warmup_steps", "0.3", "0.05", -1, (0, 1)),
    Factor("lora.lora_dropout", "0.1", "0", -1, (0, 2)),
    Factor("train.pairs_per_step", "8", "4", -1, (1, 2)),
    Factor(
        "lora.target_modules", f"[{','.join(LINEAR[:3])}]", f"[{','.join(LINEAR)}]", 1, (0, 1, 2)
    ),
)
# The screening design: [runs, factors], +1 where a factor is at its high level.
DESIGN = np.array(
    [
        [
            factor.sign * int(np.prod([signs[parent] for parent in factor.parents]))
            for factor in FACTORS
        ]
        for signs in product((-1, 1), repeat=3)
    ]
)


def main() -> None:
    options = parse()
    pairs = kept(options)
    write_folds(options, pairs)
    design = together(options.together) if options.together else DESIGN
    runs = list(product(range(options.held), range(len(design))))
    for fold, row in tqdm(runs, desc="experiments"):
        run(options.name, design[row], row, fold, options.set_param)
    report = as_markdown(options, design, *judged(options, len(design)))
    print(report)
    (RESULTS / f"defaults-{options.name}.md").write_text(report, encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = command_line("benchmarks.defaults", __doc__)
    parser.add_argument("name", help="name of the experiments")
    parser.add_argument("--data", nargs="*", type=Path, default=[], help="preference files")
    parser.add_argument("--folds", type=int, default=3, help="number of folds")
    parser.add_argument(
        "--held", type=int, help="number of folds to hold out in turn, by default all"
    )
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer for --cut")
    parser.add_argument(
        "--cut",
        nargs=2,
        type=int,
        metavar=("PROMPT", "ANSWER"),
        help="keep this many last tokens of prompts and first tokens of answers",
    )
    parser.add_argument(
        "--together",
        nargs="*",
        metavar="KEY",
        help="compare these parameters at high levels with all at low levels",
    )
    parser.add_argument(
        "-S", "--set-param", action="append", default=[], help="KEY=VALUE for every run"
    )
    options = parser.parse_args()
    options.held = options.held or options.folds
    return options


def together(keys: Sequence[str]) -> Levels:
    """All parameters at low levels, then those of `keys` at high levels, for every seed."""
    chosen = [1 if factor.key in keys else -1 for factor in FACTORS]
    return np.repeat([[-1] * len(FACTORS), chosen], SEEDS, axis=0)


# --- data ------------------------------------------------------------------------------------


def kept(options: argparse.Namespace) -> list[dict[str, str]]:
    """The records to divide into folds, cut if --cut is given."""
    if not options.data:
        return sample()
    records = [record for path in options.data for _, record in read(path)]
    if not options.cut:
        return records
    tokenizer = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    prompt, answer = options.cut

    def cut(text: str, part: slice) -> str:
        return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids[part])

    return [
        {"prompt": cut(record["prompt"], slice(-prompt, None))}
        | {side: cut(record[side], slice(answer)) for side in ("chosen", "rejected")}
        for record in records
    ]


def sample() -> list[dict[str, str]]:
    """The sample's records that are not among the test pairs of the default run."""
    group = params.load("preprocess", Preprocess)
    records = [record for _, record in read(Path(group.data))]
    prompts = np.array([check(record).prompt_hash for record in records], dtype=np.uint64)
    parts = split(prompts, group.validation_fraction, group.test_fraction, group.seed)
    return [record for record, part in zip(records, parts, strict=True) if part != 2]


def write_folds(options: argparse.Namespace, records: Sequence[dict[str, str]]) -> None:
    """Write each fold and its complement as files; the pairs of a prompt stay together."""
    pairs = [check(record) for record in records]
    prompts = sorted({pair.prompt_hash for pair in pairs})
    fold_of = {prompt: index % options.folds for index, prompt in enumerate(prompts)}
    for fold in range(options.folds):
        folder = FOLDS / options.name / str(fold)
        folder.mkdir(parents=True, exist_ok=True)
        for name, held_back in (("test", True), ("rest", False)):
            lines = [
                json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n"
                for record, pair in zip(records, pairs, strict=True)
                if (fold_of[pair.prompt_hash] == fold) == held_back
            ]
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


# --- experiments -----------------------------------------------------------------------------


def run(name: str, levels: Levels, row: int, fold: int, settings: Sequence[str]) -> None:
    """Run the experiment of a row of the design and a fold, unless it exists."""
    full_name = experiment(name, row, fold)
    if exists(full_name):
        return
    folder = FOLDS / name / str(fold)
    values = {
        "preprocess.data": str(folder),
        "preprocess.validation_fraction": "0.01",
        "preprocess.on_bad_record": "drop",
        "train.seed": str((row + fold) % SEEDS),
    }
    for factor, level in zip(FACTORS, levels, strict=True):
        values[factor.key] = factor.high if level > 0 else factor.low
    arguments = [f"{key}={value}" for key, value in values.items()] + list(settings)
    subprocess.run([*command(full_name, arguments), "--quiet"], check=True)


def exists(full_name: str) -> bool:
    """Whether an experiment with this name exists."""
    listed = subprocess.run(
        ["dvc", "exp", "list", "--name-only"], check=True, capture_output=True, text=True
    )
    return full_name in listed.stdout.split()


def command(full_name: str, settings: Sequence[str]) -> list[str]:
    """The command that runs an experiment up to its evaluation, with this name and parameters."""
    flags = [part for setting in settings for part in ("--set-param", setting)]
    return ["dvc", "exp", "run", "--name", full_name, *flags, "evaluate"]


def rewards_of(full_name: str) -> pa.Table:
    """The rewards of an experiment's test pairs."""
    return pyarrow.parquet.read_table(io.BytesIO(api.read(REWARDS, rev=full_name, mode="rb")))


def experiment(name: str, row: int, fold: int) -> str:
    return f"{name}-{row}-{fold}"


def judged(options: argparse.Namespace, runs: int) -> tuple[Floats, Floats, npt.NDArray[np.str_]]:
    """Margins, [runs, pairs], and preference and prompt of each pair, in the same order."""
    rows = []
    for row in range(runs):
        tables = [
            rewards_of(experiment(options.name, row, fold)).select(
                ["id", "prompt_id", "preference", "margin"]
            )
            for fold in range(options.held)
        ]
        rows.append({record["id"]: record for table in tables for record in table.to_pylist()})
    ids = sorted(set.intersection(*(set(row) for row in rows)))
    margins = np.array([[row[key]["margin"] for key in ids] for row in rows], dtype=np.float64)
    first = [rows[0][key] for key in ids]
    preference = np.array([record["preference"] for record in first])
    return margins, preference, np.array([record["prompt_id"] for record in first])


# --- the tables ------------------------------------------------------------------------------


def effects(design: Levels) -> Iterator[tuple[list[Factor], Levels]]:
    """Yield each group of factors that vary together, and its levels: [runs]."""
    columns = design.T.tolist()
    for levels in map(list, dict.fromkeys(map(tuple, columns))):
        if len(set(levels)) > 1:
            yield (
                [factor for factor, each in zip(FACTORS, columns, strict=True) if each == levels],
                np.array(levels),
            )


def as_markdown(
    options: argparse.Namespace,
    design: Levels,
    margins: Floats,
    preference: Floats,
    prompts: npt.NDArray[np.str_],
) -> str:
    """The effects of the parameters and the results of the runs. Ties count only in the loss."""
    numbers = np.unique(prompts, return_inverse=True)[1]
    decided = preference != TIE
    right, loss = correct(margins)[:, decided], losses(margins, preference)
    lines = [
        f"# Parameters at two levels: {options.name}",
        "",
        f"Written by `benchmarks.defaults`: {margins.shape[1]} pairs of {numbers.max() + 1} "
        f"prompts, each judged once in each of {len(design)} runs, {options.held} of "
        f"{options.folds} folds held out in turn, over {SEEDS} seeds. "
        f"{' '.join(options.set_param)}",
        "",
        "| parameter | low | high | accuracy, 95% interval | loss, 95% interval |",
        "|---|---|---|---:|---:|",
    ]
    for factors, levels in effects(design):
        cells = [
            ", ".join(getattr(factor, name) for factor in factors)
            for name in ("key", "low", "high")
        ]
        for values, of in ((right, numbers[decided]), (loss, numbers)):
            effect = values[levels > 0].mean(0) - values[levels < 0].mean(0)
            low, high = interval_of_difference(effect, of)
            cells.append(f"{effect.mean():+.4f} ({low:+.4f} to {high:+.4f})")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| run | parameters at their high level | accuracy | loss |",
        "|---:|---|---:|---:|",
    ]
    for row, levels in enumerate(design):
        changed = [factor.key for factor, level in zip(FACTORS, levels, strict=True) if level > 0]
        lines.append(
            f"| {row} | {', '.join(changed) or 'none'} | {right[row].mean():.4f} "
            f"| {loss[row].mean():.4f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
