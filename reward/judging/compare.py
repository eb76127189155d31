"""Compare two reward models: is the second one better, or could the difference be noise?

    python -m reward.judging.compare main my-experiment

Takes two revisions of this repository (branches, tags, commits, names of experiments, or
"workspace") or folders that reward.serving.judge wrote. Compares their rewards pair by pair, on the
test pairs or on an extra test set.
"""

import argparse
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
import yaml
from scipy import stats

from reward.data.columns import ID, MARGIN, PREFERENCE, PROMPT_ID, TIE
from reward.judging.metrics import Floats, Ints, correct, unanimous
from reward.params import read_yaml
from reward.process import Fault, command_line, counted, one_line, run

REPORTS, LOCK, PARAMS = Path("reports/evaluate"), Path("dvc.lock"), Path("params.yaml")
# The stages whose parameters determine an evaluation.
BEFORE = ("fetch", "preprocess", "train", "evaluate")
# What reading a YAML or JSON file raises that is not what was expected.
BROKEN = (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError)
FIGURES = "figures.json"
# The columns of rewards without which nothing can be compared.
NEEDED = (ID, PROMPT_ID, MARGIN)
WORKSPACE = "workspace"
Read = Callable[[Path], bytes]
RESAMPLES, SEED = 10_000, 0
SHOWN = 10


@dataclass(frozen=True)
class Comparison:
    """Two judgements of the same pairs, without ties; all shapes [pairs]."""

    ids: list[str]
    prompts: Ints
    margins: tuple[Floats, Floats]

    @property
    def correct(self) -> tuple[Floats, Floats]:
        """1 if correct, 0 if wrong, 0.5 if the rewards are equal."""
        first, second = map(correct, self.margins)
        return first, second

    @property
    def gain(self) -> Floats:
        """By how much the second is more correct than the first: from -1 to 1."""
        first, second = self.correct
        return second - first


def main() -> None:
    options = parse()
    names = (options.first, options.second)
    first, second = (rewards_of(name, options.set) for name in names)
    found = align(first, second, names)
    print(report(found, names, options.all))


def parse() -> argparse.Namespace:
    parser = command_line("reward.judging.compare", __doc__)
    parser.add_argument("first", help='a revision, an experiment, "workspace", or a folder')
    parser.add_argument("second", help="the model that may be better, named in the same way")
    parser.add_argument("--set", metavar="NAME", help="compare on this extra test set")
    parser.add_argument("--all", action="store_true", help="list all pairs whose verdict changed")
    return parser.parse_args()


def rewards_of(name: str, set_name: str | None) -> pa.Table:
    """The rewards of the test pairs or of an extra test set, at a revision or in a folder.

    Raises a Fault if there are none, if they are broken, or if another model has been trained
    since.
    """
    folder, read = Path(name), Path.read_bytes
    if not (folder / FIGURES).is_file():
        folder, read = REPORTS, partial(at_revision, name) if name != WORKSPACE else read
        require_current(name, read)
    file = "rewards.parquet"
    if set_name is not None:
        file = f"sets/{set_name}.parquet"
        content = content_of(folder / FIGURES, read)
        try:
            judged = dict(json.loads(content).get("sets", {}))
        except BROKEN:
            raise Fault(
                f"{name}: {FIGURES} is broken, expected the figures of an evaluation"
            ) from None
        if set_name not in judged:
            sets = ", ".join(sorted(judged)) or "none at all"
            raise Fault(f"--set is {set_name}, but the extra test sets of {name} are: {sets}")
    try:
        # Without threads, because those of pyarrow may abort a process that exits at once.
        content = content_of(folder / file, read)
        table = pyarrow.parquet.read_table(io.BytesIO(content), use_threads=False)
    except pa.ArrowException as error:
        raise Fault(f"{name}: {file} cannot be read ({error}); run dvc repro first") from None
    require_rewards(table, f"{name}: {file}")
    return table


def require_rewards(table: pa.Table, where: str) -> None:
    """Raises a Fault unless each row of a table has what is compared, with a finite margin."""
    names = table.column_names
    if lacking := [name for name in NEEDED if name not in names or table[name].null_count]:
        raise Fault(
            f"{where} has rows without {', '.join(lacking)}, expected {', '.join(NEEDED)} in each"
        )
    margins = table[MARGIN]
    if not pa.types.is_floating(margins.type) or not np.isfinite(margins.to_numpy()).all():
        raise Fault(f"{where} has a margin that is not a finite number, expected only finite ones")


def require_current(name: str, read: Read) -> None:
    """Raises a Fault unless the evaluation is that of the model and the parameters that are there.

    For example, `dvc exp run train` leaves the evaluation of the model before, and an experiment
    that has not run has the one of the commit that it began with. The test pairs are not compared,
    because DVC records them as a part of an output. A workspace without dvc.lock was evaluated
    without DVC, so nothing is known of it.
    """
    if name == WORKSPACE and not LOCK.exists():
        return
    content = content_of(LOCK, read)
    try:
        stages = read_yaml(content)["stages"]
        made = {out["path"]: out["md5"] for each in stages.values() for out in each.get("outs", ())}
        deps = stages.get("evaluate", {}).get("deps", ())
        used: dict[str, Any] = {}  # the groups of params.yaml with which the stages ran
        for stage in BEFORE:
            used |= stages.get(stage, {}).get("params", {}).get(str(PARAMS), {})
    except BROKEN:
        raise Fault(f"{name}: {LOCK} is broken, expected what dvc repro writes") from None
    if used:
        require_same(name, used, read)
    for dep in deps:
        if made.get(dep["path"], dep["md5"]) != dep["md5"]:
            raise Fault(
                f"{name}: {dep['path']} has changed since evaluate ran, expected an evaluation of "
                "it; run dvc repro or dvc exp run without the name of a stage"
            )


def require_same(name: str, used: dict[str, Any], read: Read) -> None:
    """Raises a Fault if params.yaml has other values than those with which the stages ran."""
    try:
        here = read_yaml(content_of(PARAMS, read)) or {}
        changed = [
            f"{group}.{key}"
            for group, values in used.items()
            for key in sorted(values.keys() | here[group].keys())
            if values.get(key) != here[group].get(key)
        ]
    except BROKEN:
        raise Fault(f"{name}: {PARAMS} is broken, expected the parameters of evaluate") from None
    if changed:
        raise Fault(
            f"{name}: {', '.join(changed)} in {PARAMS} changed since evaluate ran, expected an "
            "evaluation with these parameters; run dvc repro, or wait until the experiment has run"
        )


def content_of(path: Path, read: Read) -> bytes:
    """What `read` returns for a path of the project. Raises a Fault if it cannot be read."""
    try:
        return read(path)
    except OSError as error:
        raise Fault(f"{path} cannot be read ({error}); run dvc repro first") from None


def at_revision(name: str, path: Path) -> bytes:
    """A file of the project at a revision. Raises a Fault if there is none."""
    from dvc import api

    try:
        # DVC takes the path from the root of the repository, in which the project may be a folder.
        git = ["git", "rev-parse", "--show-prefix"]
        prefix = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        content: bytes = api.read(f"{prefix}{path.as_posix()}", rev=name, mode="rb")
    # Git, DVC, its index of data, which is a package of its own, and remotes have their own errors.
    except Exception as error:
        raise Fault(
            f"{name}: {path} cannot be read there ({one_line(error)}), expected a revision or an "
            "experiment that was evaluated, with its DVC cache, or run dvc pull"
        ) from None
    return content


def align(first: pa.Table, second: pa.Table, names: tuple[str, str]) -> Comparison:
    """The pairs that both have judged, without ties, in the order of the first."""
    common = {*first[ID].to_pylist()} & {*second[ID].to_pylist()}
    first, second = map(decided, (first, second))
    places = {key: index for index, key in enumerate(second[ID].to_pylist())}
    ids = first[ID].to_pylist()
    rows = [index for index, key in enumerate(ids) if key in places]
    if not rows:
        problem = "have only ties" if common else "have no judged pairs"
        raise Fault(f"{names[0]} and {names[1]} {problem} in common, expected pairs to compare")
    # A set may have the same pair twice, so its rows are not counted.
    if others := len(places.keys() ^ ids):
        print(
            f"note       left out: {counted(others, 'pair')} that only one of the two has judged",
            file=sys.stderr,
        )
    taken = [places[ids[index]] for index in rows]
    prompts: npt.NDArray[Any] = first[PROMPT_ID].to_numpy()[rows]
    return Comparison(
        [ids[index] for index in rows],
        np.unique(prompts, return_inverse=True)[1],
        (margins_of(first, rows), margins_of(second, taken)),
    )


def decided(table: pa.Table) -> pa.Table:
    """The rows that are not ties. Older tables have no column of preferences, and no ties."""
    if PREFERENCE not in table.column_names:
        return table
    return table.filter(pa.compute.not_equal(table[PREFERENCE], TIE))


def margins_of(table: pa.Table, rows: list[int]) -> Floats:
    return np.asarray(table[MARGIN].to_numpy()[rows], dtype=np.float64)


def interval_of_difference(values: Floats, prompts: Ints) -> tuple[float, float]:
    """95% interval of the mean difference between two models that have judged the same pairs.

    A percentile bootstrap over prompts, because pairs of one prompt are not independent draws
    (Efron and Tibshirani 1993, chapter 8). Percentiles of a few prompts are too close, so they are
    expanded as a t interval would be (Hesterberg 2015, "What Teachers Should Know About the
    Bootstrap"). There must be at least two prompts.
    """
    _, group_of = np.unique(prompts, return_inverse=True)
    pairs = np.bincount(group_of)
    count = len(pairs)
    tail = stats.norm.sf(math.sqrt(count / (count - 1)) * stats.t.ppf(0.975, count - 1))
    result = stats.bootstrap(
        (np.bincount(group_of, weights=values), pairs),
        lambda sums, sizes, axis: sums.sum(axis=axis) / sizes.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        # Larger batches leave the processor's cache, which takes three times as long.
        batch=max(1, 200_000 // count),
        confidence_level=1 - 2 * tail,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(result.low), float(result.high)


def interval_of_gain(gain: Floats, prompts: Ints) -> tuple[float, float]:
    """The same for differences in correctness, from -1 to 1.

    If all prompts have the same gain, such as 0, resamples have no spread. Then the interval has
    room for as many different prompts as there may be without one in the sample.
    """
    if len(np.unique(prompts)) < 2:
        return -1.0, 1.0
    low, high = interval_of_difference(gain, prompts)
    if low < high:
        return low, high
    alike = unanimous(prompts)
    return alike * low - (1 - alike), alike * high + (1 - alike)


def mcnemar(gain: Floats) -> float:
    """The exact p-value of the numbers of improved and worsened pairs (McNemar 1947).

    A change from or to equal rewards counts by its direction. The test assumes independent pairs.
    Pairs of one prompt are not independent, so the verdict is based on the interval.
    """
    better, changed = int((gain > 0).sum()), int((gain != 0).sum())
    return float(stats.binomtest(better, changed).pvalue) if changed else 1.0


def report(found: Comparison, names: tuple[str, str], everything: bool) -> str:
    """The lines to print, the answer first."""
    gain, prompts = found.gain, len(np.unique(found.prompts))
    low, high = interval_of_gain(gain, found.prompts)
    better, worse = int((gain > 0).sum()), int((gain < 0).sum())
    verdict = "the difference may be noise"
    if low > 0 or high < 0:
        verdict = f"{names[1]} is {'better' if low > 0 else 'worse'}"
    first, second = (float(right.mean()) for right in found.correct)
    lines = [
        f"verdict    {verdict}",
        f"accuracy   {first:.4f} for {names[0]}, {second:.4f} for {names[1]}, "
        f"{counted(len(gain), 'pair')} of {counted(prompts, 'prompt')}",
        f"difference {gain.mean():+.4f} (95% interval {low:+.4f} to {high:+.4f}, paired, "
        "over prompts)",
        f"changed    {counted(better, 'pair')} for the better, {worse} for the worse; "
        f"McNemar's exact p = {mcnemar(gain):.3g}, assuming independent pairs",
    ]
    changed = sorted(np.flatnonzero(gain), key=lambda row: -abs(np.subtract(*found.margins)[row]))
    for row in changed if everything else changed[:SHOWN]:
        before, after = (margin[row] for margin in found.margins)
        direction = "better" if gain[row] > 0 else "worse "
        lines.append(f"  {direction} {found.ids[row]}  margin {before:+.4f} -> {after:+.4f}")
    if len(changed) > SHOWN and not everything:
        lines.append(f"  and {len(changed) - SHOWN} more (--all)")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
