"""Export the reward model: an adapter and a merged model that every client scores alike.

    python -m stages.export

Reads models/base, models/adapter, data/tokenized/test and what evaluate wrote. Writes models/export
and metrics/export.json, or nothing: a fresh process loads a copy of the folder through each client
of reward.exporting.clients, and the rewards that it finds must be those that were evaluated.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from reward import params
from reward.data import tokenized
from reward.data.tokens import Template
from reward.exporting import card, clients
from reward.exporting import clients_trl as trainers
from reward.exporting.exported import EXPORTED_BASE, MERGED, REWARD, Forms, Found
from reward.exporting.portable import Pad, embeddings, prepare_model, prepare_tokenizer, save_model
from reward.model.base import (
    DIGESTS,
    DTYPES,
    Quantization,
    base_record,
    head_of,
    new_head,
    require_sealed,
    seal,
    silent_peft,
    stock,
)
from reward.outputs import (
    copy_file,
    read_json,
    recorded,
    whole_folder,
    write_json,
    write_text,
    writing,
)
from reward.params import Positive, ZeroOrMore
from reward.process import Fault, processors, run

BASE = Path("models/base")
ADAPTER = Path("models/adapter")
EXPORT = Path("models/export")
TEST = Path("data/tokenized/test")
REWARDS = Path("reports/evaluate/rewards.parquet")
EVALUATED = Path("metrics/evaluate.json")
METRICS = Path("metrics/export.json")

# Rewards of pairs, [pairs, 2]: chosen, rejected.
Rewards = npt.NDArray[np.float64]
Figures = dict[str, float]
ByClient = dict[str, dict[str, Figures]]


@dataclass(frozen=True)
class Export:
    """The group `export` of params.yaml, where each key is described."""

    merge: Literal["float32", "bfloat16", "none"]
    clients: Literal["light", "all"]
    tokens_per_pack: Positive
    tolerance: ZeroOrMore
    tolerance_in_half: ZeroOrMore


def main() -> None:
    group = params.load("export", Export)
    quantization = params.load("quantization", Quantization)
    if group.clients == "all":
        trainers.require_libraries()
    torch.set_num_threads(processors())
    wanted = evaluated_rewards(tokenized.load(TEST, BASE))
    with whole_folder(EXPORT) as folder:
        assemble(folder, quantization, group.merge)
        found = score_elsewhere(folder, group)
        metrics = measure(found, wanted)
        require_alike(metrics["clients"], group, quantization)
    write_json(METRICS, metrics)
    report(metrics)


# --- the folder ------------------------------------------------------------------------------


def assemble(folder: Path, quantization: Quantization, merge: str) -> None:
    """Adapter, base, merged model, tokenizer, template and model card, sealed.

    Raises a Fault for a damaged adapter.
    """
    require_sealed(ADAPTER, BASE)
    for path in sorted(ADAPTER.iterdir()):
        if path.name != DIGESTS:
            copy_file(path, folder / path.name)
    model = stock(BASE, quantization)
    rows = embeddings(model)
    pad = prepare_tokenizer(BASE, folder, Template.load(ADAPTER / "template.json"), rows)
    reward = reward_record(folder, quantization, pad)
    write_json(folder / REWARD, reward)
    take_head(model, folder)
    prepare_model(model, pad, reward)
    if name_base(folder, prepared=pad.rows > rows) == EXPORTED_BASE:
        save_model(model, folder / EXPORTED_BASE, folder)
    if merge != "none":
        save_model(merged(model, folder).to(DTYPES[merge]), folder / MERGED, folder)
    text = card.render(folder, base_record(BASE), recorded(EVALUATED))
    write_text(folder / "README.md", text)
    seal(folder, BASE)


def reward_record(folder: Path, quantization: Quantization, pad: Pad) -> dict[str, Any]:
    """What a client should know of the rewards: how texts are made, mean, deviation, temperature.

    Mean and deviation are those of all answers of the test pairs, chosen and rejected. The
    temperature is 1 where no finite one is best.
    """
    metrics, template = recorded(EVALUATED), Template.load(folder / "template.json")
    means, deviations = (
        [metrics[f"{side}_{name}"] for side in ("chosen", "rejected")] for name in ("mean", "std")
    )
    return {
        "accuracy": metrics["accuracy"],
        "append_eos": template.append_eos,
        "dtype": str(quantization.dtype).removeprefix("torch."),
        "max_length": template.max_length,
        "mean": float(np.mean(means)),
        "pad_token_id": pad.id,
        "std": float(np.sqrt(np.mean(np.square(deviations)) + np.var(means))),
        "temperature": metrics["calibration"]["temperature"] or 1.0,
        "template": template.template,
    }


def name_base(folder: Path, prepared: bool) -> str:
    """Have the adapter name its base: the Hub's at its commit, or, else, the one in the folder.

    It is in the folder too where it was prepared with another row.
    """
    base, config = base_record(BASE), read_json(folder / "adapter_config.json")
    if base["kind"] == "hub" and not prepared:
        config |= {"base_model_name_or_path": base["name"], "revision": base["revision"]}
    else:
        config["base_model_name_or_path"] = EXPORTED_BASE
    write_json(folder / "adapter_config.json", config)
    return str(config["base_model_name_or_path"])


def take_head(model: PreTrainedModel, adapter: Path) -> None:
    """Give the model the head that an adapter was trained with, in the numbers of the model.

    Plain loaders multiply the hidden states by the head as they are: in half precision a head of
    fp32 is an error. The adapter keeps the head in fp32.
    """
    tensors = load_file(adapter / "adapter_model.safetensors")
    [head] = [tensor for name, tensor in tensors.items() if name.endswith("score.weight")]
    new_head(model, seed=0)
    head_of(model).weight.data.copy_(head)
    head_of(model).to(model.dtype)


def merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model, whose weights are turned into the numbers that its 4 bits stand for, and LoRA's.

    PEFT's merge into 4 bits would quantize again, and the original weights are not what was
    trained: both change rewards. In fp32; `model` itself is used up.
    """
    if "quantization_config" in model.config:
        model = model.dequantize(DTYPES["float32"])
    with silent_peft():
        return PeftModel.from_pretrained(model.float(), adapter).merge_and_unload()


# --- the gate --------------------------------------------------------------------------------


def evaluated_rewards(test: Dataset) -> Rewards:
    """What evaluate found. Raises a Fault where it cannot be read, or is of other pairs."""
    try:
        table = pyarrow.parquet.read_table(REWARDS)
    except (OSError, pyarrow.ArrowException) as error:
        raise Fault(f"{REWARDS} cannot be read ({error}), wanted what evaluate writes") from None
    if table["id"].to_pylist() != list(test["id"]):
        raise Fault(f"{REWARDS} holds other pairs than {TEST}, wanted the same; run dvc repro")
    sides = [table[f"reward_{side}"].to_numpy() for side in ("chosen", "rejected")]
    return np.stack(sides, axis=1).astype(np.float64)


def score_elsewhere(folder: Path, group: Export) -> dict[str, Forms]:
    """What clients find in a fresh process, in an empty folder, on a copy of what was exported.

    Raises a Fault where a client ends otherwise than with rewards.
    """
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as name:
        elsewhere = Path(name)
        with writing(elsewhere):
            copied = shutil.copytree(folder, elsewhere / "reward-model")
        done = run_clients(copied, elsewhere, group)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            raise Fault(
                f"{EXPORT}: the process that loads it through its clients ended with status "
                f"{done.returncode}, wanted rewards; what it said is above"
            )
        found = read_json(elsewhere / "found.json")
    return {
        client: {
            form: {int(index): pair for index, pair in rewards.items()}
            for form, rewards in forms.items()
        }
        for client, forms in found.items()
    }


def run_clients(folder: Path, elsewhere: Path, group: Export) -> subprocess.CompletedProcess[str]:
    """Run reward.exporting.clients on a folder; it writes `elsewhere`/found.json.

    A base of the Hub is taken from models/base, as if the Hub had been asked for it.
    """
    hub_cache(elsewhere / "hub")
    (elsewhere / "empty").mkdir()
    paths = (folder, TEST.absolute(), BASE.absolute(), elsewhere / "found.json")
    where = {
        "PYTHONPATH": str(Path(clients.__file__).parents[2]),
        "HF_HUB_CACHE": str(elsewhere / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        [
            *(sys.executable, "-m", clients.__name__, *map(str, paths)),
            *(group.clients, str(group.tokens_per_pack)),
        ],
        cwd=elsewhere / "empty",
        env=os.environ | where,
        capture_output=True,
        text=True,
        check=False,
    )


def hub_cache(cache: Path) -> None:
    """A cache of the Hub that holds models/base as the model and commit it came from."""
    base = base_record(BASE)
    if base["kind"] != "hub":
        return
    repository = cache / f"models--{base['name'].replace('/', '--')}"
    snapshot, reference = (repository / part / base["revision"] for part in ("snapshots", "refs"))
    snapshot.mkdir(parents=True)
    reference.parent.mkdir()
    reference.write_text(base["revision"])
    for name in base["files"]:
        (snapshot / name).symlink_to(BASE.absolute() / name)


def measure(found: dict[str, Forms], evaluated: Rewards) -> dict[str, Any]:
    """The content of metrics/export.json: figures of each client by the form of what it was given.

    Rewards of texts that end in eos are compared with those of packs of such texts.
    """
    plain = dict(enumerate(evaluated.tolist()))
    ended = found["packs"].pop("eos")
    original = found.pop(clients.ORIGINAL, {})
    by_client = {
        name: {
            form: difference(rewards, ended if form == "eos" else plain)
            for form, rewards in forms.items()
        }
        for name, forms in found.items()
    }
    metrics: dict[str, Any] = {"pairs": len(evaluated), "clients": by_client}
    if original:
        metrics[clients.ORIGINAL] = difference(original["packs"], plain)
    return metrics


def difference(found: Found, wanted: Found) -> Figures:
    """How far the rewards of some pairs are from those that are wanted; of none their number."""
    if not found:
        return {"pairs": 0}
    here, there = (np.array([rewards[index] for index in found]) for rewards in (found, wanted))
    apart, margin = np.abs(here - there), here[:, 0] - here[:, 1]
    return {
        "pairs": len(here),
        "difference_max": three_digits(apart.max()),
        "difference_mean": three_digits(apart.mean()),
        "flips": int((np.sign(margin) != np.sign(there[:, 0] - there[:, 1])).sum()),
        "accuracy": float(np.heaviside(margin, 0.5).mean()),
    }


def three_digits(number: float) -> float:
    return float(f"{number:.3g}")


def require_alike(by_client: ByClient, group: Export, quantization: Quantization) -> None:
    """Raises a Fault for the first client whose rewards are further off than is allowed.

    Packs are computed as in evaluation; every other client in its own way, in which half precision
    rounds otherwise.
    """
    trained_in_half = quantization.dtype != DTYPES["float32"]
    for client, forms in by_client.items():
        merged_in_half = client.endswith(MERGED) and group.merge == "bfloat16"
        allowed, key = group.tolerance, "tolerance"
        if client != "packs" and (trained_in_half or merged_in_half):
            allowed, key = group.tolerance_in_half, "tolerance_in_half"
        for form, figures in forms.items():
            if figures["pairs"] and not figures["difference_max"] <= allowed:
                raise Fault(
                    f"{EXPORT}: loaded by {client} ({form}), its rewards differ from {REWARDS} by "
                    f"up to {figures['difference_max']:.3g}, at most {allowed} is allowed "
                    f"(export.{key})"
                )


def report(metrics: dict[str, Any]) -> None:
    print(f"{'client':<22}{'form':<8}{'pairs':>6}  {'largest':>8}  {'mean':>8}  flips  accuracy")
    for client, forms in metrics["clients"].items():
        for form, figures in forms.items():
            print(f"{client:<22}{form:<8}{in_columns(figures)}")
    if original := metrics.get(clients.ORIGINAL):
        print(f"{'on the original base':<30}{in_columns(original)}")
        print(
            f"warning    on the original, unquantized base the adapter's rewards are off by up to "
            f"{original['difference_max']:.2g}: {original['flips']} pairs change their order"
        )
    print(f"exported   {EXPORT}; {EXPORT}/README.md says how to use it")


def in_columns(figures: Figures) -> str:
    """Figures as the end of a row of the table."""
    row = f"{figures['pairs']:>6}"
    if figures["pairs"]:
        row += (
            f"  {figures['difference_max']:8.2g}  {figures['difference_mean']:8.2g}"
            f"  {figures['flips']:5}  {figures['accuracy']:8.4f}"
        )
    return row


if __name__ == "__main__":
    run(main)
