"""Export the reward model: an adapter and a merged model with the same rewards in every client.

    python -m stages.export

Reads models/base, models/adapter, data/tokenized/test and the output of evaluate. Writes
models/export, reports/export/figures.json and metrics/export.json, but only if the export passes
its check: a new process loads the folder from another path, through links, with each client of
reward.exporting.clients, and the rewards must be those of the evaluation.
"""

import gc
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet
import torch
from datasets import Dataset

from reward import params
from reward.after_training import Export, require_libraries
from reward.data import tokenized
from reward.data.columns import ID, PACK_SIZE, PREFERENCE, TIE, TOKENS
from reward.exporting import card, gate
from reward.exporting.clients import FOUND, ORIGINAL, PACKS, Request, select
from reward.exporting.exported import TRAINING, Trained, write_card, write_exported
from reward.exporting.gate import LARGEST, MEDIAN, ByClient, Figures
from reward.exporting.inputs import Client
from reward.model.base import DTYPES, Quantization
from reward.outputs import (
    link_folder,
    partial_folder,
    read_json,
    recorded,
    whole_folder,
    write_json,
)
from reward.process import Fault, counted, threads
from reward.stage import run_stage

BASE = Path("models/base")
ADAPTER = Path("models/adapter")
EXPORT = Path("models/export")
TEST = Path("data/tokenized/test")
LICENSES = Path("data/tokenized/licenses.json")
REWARDS = Path("reports/evaluate/rewards.parquet")
EVALUATED = Path("reports/evaluate/figures.json")
REPORTS = Path("reports/export")
METRICS = Path("metrics/export.json")


def main() -> None:
    options = params.load("export", Export)
    quantization = params.load("quantization", Quantization)
    require_libraries(options)
    torch.set_num_threads(threads())
    evaluated = read_evaluated(tokenized.load(TEST, BASE))
    tokens_per_pack = pack_size(evaluated)
    trained = Trained(BASE, ADAPTER, quantization, recorded(EVALUATED), licenses())
    require_shown(ADAPTER / TRAINING)
    clients = select(options.clients, merged=options.merge != "none")
    rewards, decided = gate.rewards_of(evaluated), evaluated[PREFERENCE].to_numpy() != TIE
    compared = gate.select_pairs(longer(evaluated), rewards, options.pairs, options.seed)
    with whole_folder(EXPORT) as folder:
        facts = write_exported(folder, trained, options.merge)
        found = score_elsewhere(folder, options.clients, tokens_per_pack, compared)
        figures = gate.measure(found, clients, rewards, decided, facts.mixture)
        require_alike(figures["clients"], clients, options, quantization, rewards.std())
        write_card(folder, replace(facts, left_out=figures["left_out"]))
    with whole_folder(REPORTS) as folder:
        write_json(folder / "figures.json", figures)
    write_json(METRICS, headline(figures))
    report(figures)


def read_evaluated(test: Dataset) -> pa.Table:
    """The rewards of evaluate. Raises a Fault if they cannot be read or belong to other pairs."""
    try:
        table = pyarrow.parquet.read_table(REWARDS)
    except FileNotFoundError:
        raise Fault(f"{REWARDS} does not exist; run dvc repro") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise Fault(f"{REWARDS} cannot be read ({error}); run dvc repro") from None
    if table[ID].to_pylist() != test[ID][:]:
        raise Fault(f"{REWARDS} has different pairs than {TEST}; run dvc repro")
    return table


def licenses() -> list[str | None]:
    """The licences of the data. Raises a Fault if the list that preprocess wrote cannot be read."""
    try:
        found: list[str | None] = read_json(LICENSES)
    except (OSError, ValueError) as error:
        raise Fault(
            f"{LICENSES} cannot be read ({error}), expected a list; run dvc repro"
        ) from None
    return found


def require_shown(path: Path) -> None:
    """Raises a Fault if the record of train cannot be read or lacks what the card shows."""
    if missing := card.SHOWN - recorded(path).keys():
        raise Fault(
            f"{path} lacks {', '.join(sorted(missing))}, so another version of this project wrote "
            "it; run dvc repro"
        )


def longer(evaluated: pa.Table) -> npt.NDArray[np.integer]:
    """The number of tokens of each pair's longer text: [pairs]."""
    return np.maximum(*(evaluated[name].to_numpy() for name in TOKENS))


def pack_size(evaluated: pa.Table) -> int:
    """The pack size that evaluate used. In half precision, rounding depends on it.

    Raises a Fault if evaluate has not recorded it.
    """
    found = (evaluated.schema.metadata or {}).get(PACK_SIZE)
    if found is None or not found.isdigit() or not int(found):
        raise Fault(
            f"{REWARDS}: tokens_per_pack in its metadata is {found!r}, expected a positive "
            "integer; run dvc repro"
        )
    return int(found)


def score_elsewhere(
    folder: Path,
    clients: Literal["light", "all"],
    tokens_per_pack: int,
    compared: list[int],
) -> pa.Table:
    """The rewards of the clients, computed in a new process on a linked copy of the export.

    The copy is next to `folder`, because the folder for temporary files may be too small.
    Raises a Fault if a client ends without rewards.
    """
    # Quantized weights and their modules form reference cycles, so they would stay on the GPU.
    gc.collect()
    torch.cuda.empty_cache()
    with partial_folder(folder.absolute().with_name("clients")) as elsewhere:
        linked = elsewhere / "reward-model"
        link_folder(folder, linked)
        paths = (str(linked), str(TEST.absolute()), str(BASE.absolute()))
        request = Request(*paths, clients, tokens_per_pack, compared)
        done = gate.run_clients(request, elsewhere)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            raise Fault(
                f"{EXPORT}: the process that checks it with its clients failed with status "
                f"{done.returncode}; its output is above"
            )
        return pyarrow.parquet.read_table(elsewhere / FOUND)


def require_alike(
    by_client: ByClient,
    clients: Sequence[Client],
    options: Export,
    quantization: Quantization,
    deviation: float,
) -> None:
    """Raises a Fault for the first client whose rewards differ by more than the tolerance.

    Also raises a Fault if nothing was compared.

    PACKS computes as the evaluation does. The other clients round differently, and the errors grow
    with the rewards: for them, the tolerance is multiplied by `deviation`, the standard deviation
    of the rewards, if that is above 1. For a mixture of experts, the median counts.
    """
    trained_in_half = quantization.dtype != DTYPES["float32"]
    for client in clients:
        if client.name not in by_client:
            continue
        merged_in_half = client.merged and options.merge == "bfloat16"
        allowed, key = options.tolerance, "tolerance"
        if client != PACKS:
            if trained_in_half or merged_in_half:
                allowed, key = options.tolerance_in_half, "tolerance_in_half"
            allowed *= max(1.0, deviation)
        for form, figures in by_client[client.name].items():
            by_median = client != PACKS and MEDIAN in figures
            figure, by = (MEDIAN, "by a median of") if by_median else (LARGEST, "by up to")
            if figures["pairs"] and not figures[figure] <= allowed:
                raise Fault(
                    f"{EXPORT}: the rewards in {client.name} ({form}) differ from {REWARDS} {by} "
                    f"{figures[figure]:.3g}, expected at most {allowed:.3g} (export.{key})"
                )
    require_compared(by_client)


def require_compared(by_client: ByClient) -> None:
    """Raises a Fault if PACKS is the only client that fits in memory or got a pair."""
    if by_client.keys() == {PACKS.name}:
        raise Fault(
            f"{EXPORT}: no client except packs fits in memory, expected at least one; run dvc "
            "repro on a machine with more memory"
        )
    others = [forms for name, forms in by_client.items() if name != PACKS.name]
    if not any(figures["pairs"] for forms in others for figures in forms.values()):
        raise Fault(f"{EXPORT}: no client except packs got a pair of {TEST}, expected at least one")


def headline(figures: dict[str, Any]) -> dict[str, float]:
    """The content of metrics/export.json: the worst figures of all clients.

    The names have a slash, so `dvc exp show --drop '.*/.*'` leaves them out.
    """
    compared = [
        form for forms in figures["clients"].values() for form in forms.values() if form["pairs"]
    ]
    return {
        "clients/difference": max(form["difference_max"] for form in compared),
        "clients/flips": max(form["flips"] for form in compared),
        "clients/left_out": len(figures["left_out"]),
    }


def report(figures: dict[str, Any]) -> None:
    """Print how far each client's rewards are from the evaluation's."""
    print(f"{'client':<22}{'form':<8}{'pairs':>6}  {'largest':>8}  {'mean':>8}  flips  accuracy")
    for client, forms in figures["clients"].items():
        for form, found in forms.items():
            print(f"{client:<22}{form:<8}{in_columns(found)}")
    others = [forms for name, forms in figures["clients"].items() if name != PACKS.name]
    forms = [form for each in others for form in each.values()]
    if medians := [form[MEDIAN] for form in forms if MEDIAN in form]:
        print(
            f"note       the median difference is judged, at most {max(medians):.2g} here, because "
            "rounding decides between experts that are almost tied"
        )
    for name in figures["left_out"]:
        print(f"{name:<22}left out: it does not fit in memory")
    for client, forms in figures["clients"].items():
        if not any(found["pairs"] for found in forms.values()):
            print(
                f"warning    nothing was compared in {client}, because it takes text, and no text "
                "of a test pair gives it the token ids of training"
            )
    if original := figures.get(ORIGINAL.name):
        print(f"{'on the original base':<30}{in_columns(original)}")
        print(
            f"warning    on the original, unquantized base the adapter's rewards differ by up to "
            f"{original['difference_max']:.2g}, which reorders {counted(original['flips'], 'pair')}"
        )
    print(f"exported   {EXPORT}; how to use it: {EXPORT}/README.md")


def in_columns(figures: Figures) -> str:
    """Figures as the end of a row of the table."""
    row = f"{figures['pairs']:>6}"
    if figures["pairs"]:
        row += (
            f"  {figures['difference_max']:8.2g}  {figures['difference_mean']:8.2g}"
            f"  {figures['flips']:5}"
        )
    if "accuracy" in figures:
        row += f"  {figures['accuracy']:8.4f}"
    return row


if __name__ == "__main__":
    run_stage("stages.export", __doc__, main)
