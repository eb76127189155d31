"""The gate of export: the rewards of all clients must match those of evaluate.

`run_clients` runs the clients on the folder in a new process. `measure` compares their rewards.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from reward.data.columns import REWARDS
from reward.exporting import clients
from reward.exporting.clients import CLIENT, FORM, LEFT_OUT, ORIGINAL, PACKED, PACKS, Request
from reward.exporting.inputs import EOS, PAIR, Client, Form
from reward.model.base import base_record
from reward.outputs import write_json
from reward.process import LAUNCHER

# Rewards of pairs, [pairs, 2]: chosen, rejected.
Rewards = npt.NDArray[np.float64]
Figures = dict[str, float]
LARGEST, MEDIAN = "difference_max", "difference_median"
ByClient = dict[str, dict[str, Figures]]


def run_clients(request: Request, elsewhere: Path) -> subprocess.CompletedProcess[str]:
    """Run reward.exporting.clients on a request. The clients write `elsewhere`/found.parquet.

    Their progress is shown, and what they write to stderr is in the result. A base from the Hub is
    linked into a Hub cache, so no client downloads it.
    """
    hub_cache(elsewhere / "hub", Path(request.base))
    (elsewhere / "empty").mkdir()
    write_json(elsewhere / "request.json", asdict(request))
    path = [str(Path(clients.__file__).parents[2]), os.environ.get("PYTHONPATH")]
    variables = {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HF_HUB_CACHE": str(elsewhere / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(elsewhere),
        LAUNCHER: str(os.getpid()),
    }
    # PATH may name the interpreter relative to this folder, but the clients run in another.
    python = Path(sys.executable).absolute()
    return subprocess.run(
        [python, "-m", clients.__name__, str(elsewhere / "request.json")],
        cwd=elsewhere / "empty",
        env=os.environ | variables,
        stdout=sys.__stderr__,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


def hub_cache(cache: Path, base: Path) -> None:
    """Build a Hub cache that holds a base under the name and commit that it came from."""
    record = base_record(base)
    if record["kind"] != "hub":
        return
    repository = cache / f"models--{record['name'].replace('/', '--')}"
    snapshot, reference = (repository / part / record["revision"] for part in ("snapshots", "refs"))
    snapshot.mkdir(parents=True)
    reference.parent.mkdir()
    reference.write_text(record["revision"])
    for name in record["files"]:
        (snapshot / name).symlink_to(base.absolute() / name)


def select_pairs(
    lengths: npt.NDArray[np.integer], evaluated: Rewards, most: int, seed: int
) -> list[int]:
    """The indices of at most `most` pairs, many of them where differences are most likely.

    A quarter of them are the longest pairs, a quarter those with the closest rewards, and the rest
    are random. The order is ascending. `lengths` is [pairs], `evaluated` [pairs, 2].
    """
    if len(lengths) <= most:
        return [*range(len(lengths))]
    longest = np.argsort(-lengths, kind="stable")
    closest = np.argsort(np.abs(evaluated[:, 0] - evaluated[:, 1]), kind="stable")
    found = dict.fromkeys(longest[: most // 4].tolist())
    others = [index for index in closest.tolist() if index not in found]
    found |= dict.fromkeys(others[: most // 4])
    rest = [index for index in range(len(lengths)) if index not in found]
    return sorted([*found, *random.Random(seed).sample(rest, most - len(found))])


def rewards_of(table: pa.Table) -> Rewards:
    """Both rewards of every row: [rows, 2]."""
    return np.stack([table[name].to_numpy() for name in REWARDS], axis=1).astype(np.float64)


def measure(
    found: pa.Table,
    selected: Sequence[Client],
    evaluated: Rewards,
    decided: npt.NDArray[np.bool_],
    mixture: bool = False,
) -> dict[str, Any]:
    """The figures of each client for each form of its input.

    Rewards of texts that end in eos are compared with those of packs with eos. `evaluated` is
    [pairs, 2]. `decided`, [pairs], is false for ties, which accuracy leaves out. Clients that did
    not fit in memory are listed as left out.
    """
    of_ended = rows(found, PACKS, EOS)
    ended = np.full_like(evaluated, np.nan)
    ended[of_ended[PAIR].to_numpy()] = rewards_of(of_ended)
    left_out = json.loads(found.schema.metadata[LEFT_OUT])
    by_client = {
        client.name: {
            form.name: difference(
                rows(found, client, form), ended if form.ended else evaluated, decided, mixture
            )
            for form in client.forms
            if (client, form) != (PACKS, EOS)
        }
        for client in selected
        if client.name not in left_out
    }
    metrics: dict[str, Any] = {
        "pairs": len(evaluated),
        "clients": by_client,
        "left_out": left_out,
    }
    original = rows(found, ORIGINAL, PACKED)
    if len(original):
        metrics[ORIGINAL.name] = difference(original, evaluated, decided)
    return metrics


def rows(found: pa.Table, client: Client, form: Form) -> pa.Table:
    """The rewards that a client computed in a form."""
    return found.filter((pc.field(CLIENT) == client.name) & (pc.field(FORM) == form.name))


def difference(
    found: pa.Table, expected: Rewards, decided: npt.NDArray[np.bool_], mixture: bool = False
) -> Figures:
    """How far the rewards of some pairs are from the expected ones, and the number of pairs.

    If all of them are ties, there is no accuracy.

    The figures of a mixture of experts have the median, too, by which it is judged. If two of its
    experts are almost tied for a token, rounding decides between them, so the rewards of a few
    texts differ by far more than rounding errors.
    """
    if not len(found):
        return {"pairs": 0}
    pairs = found[PAIR].to_numpy()
    here, there = rewards_of(found), expected[pairs]
    apart, margin = np.abs(here - there), here[:, 0] - here[:, 1]
    judged = margin[decided[pairs]]
    figures = {
        "pairs": len(here),
        LARGEST: three_digits(apart.max()),
        "difference_mean": three_digits(apart.mean()),
        "flips": int((np.sign(margin) != np.sign(there[:, 0] - there[:, 1])).sum()),
    }
    if len(judged):
        figures["accuracy"] = float(np.heaviside(judged, 0.5).mean())
    if mixture:
        figures[MEDIAN] = three_digits(float(np.median(apart)))
    return figures


def three_digits(number: float) -> float:
    return float(f"{number:.3g}")
