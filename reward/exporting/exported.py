"""The exported folder: its files, how they are written and loaded, and what is rejected.

README.md                                             the model card
adapter_config.json, adapter_model.safetensors        LoRA and the head
template.json, tokenizer.json, tokenizer_config.json  how texts become ids
quantization.json, training.json                      how the adapter was trained
reward.json                                           what is known about the rewards
base/, merged/                                        the base and the merged model, if exported
digests.json                                          SHA-256 of the files and of the base's
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel

from reward.data.tokens import Template
from reward.exporting import card
from reward.exporting.merging import write_merged
from reward.exporting.portable import (
    PortableTokenizer,
    embeddings,
    finish,
    prepare_model,
    prepare_tokenizer,
    save_model,
    take_head,
)
from reward.model.base import (
    ADAPTER_WEIGHTS,
    DIGESTS,
    DTYPES,
    VERSIONS,
    Quantization,
    adapt,
    base_record,
    dtype_name,
    fused_experts,
    load_base,
    load_stock,
    names_kernel,
    objects_in,
    require_sealed,
    seal,
)
from reward.outputs import (
    copy_file,
    digest,
    read_json,
    recorded,
    require_files,
    write_json,
    write_text,
)
from reward.process import Fault, as_written

EXPORTED_BASE, MERGED = "base", "merged"
ADAPTER_CONFIG, CARD, REWARD = "adapter_config.json", "README.md", "reward.json"
QUANTIZATION, TEMPLATE, TRAINING = "quantization.json", "template.json", "training.json"
# Files of the adapter that are exported unchanged.
AS_TRAINED = (ADAPTER_WEIGHTS, QUANTIZATION, TRAINING)
# What scoring reads, besides the base.
NEEDED = {
    *(ADAPTER_CONFIG, ADAPTER_WEIGHTS, QUANTIZATION, TEMPLATE),
    *("tokenizer.json", "tokenizer_config.json"),
}
BASE_NAME = "base_model_name_or_path"
# Configuration keys whose values transformers and PEFT import as code.
NAMING_CODE = {"auto_map", "auto_mapping", "custom_pipelines", "megatron_config", VERSIONS}


@dataclass(frozen=True)
class Trained:
    """A trained reward model: its base, its adapter and the metrics of its evaluation.

    `licenses` are the known licences of its data, and None if some of the data has none.
    """

    base: Path
    adapter: Path
    quantization: Quantization
    metrics: dict[str, Any]
    licenses: Sequence[str | None] = ()


# --- writing ---------------------------------------------------------------------------------


def write_exported(folder: Path, trained: Trained, merge: str) -> card.Facts:
    """Write all files of an exported folder except the card; returns the facts for the card.

    The folder must be empty. `merge` is the dtype of the merged model, or none. The loaded base and
    one merged weight must fit in memory. Raises a Fault if the adapter is damaged.
    """
    base, adapter = trained.base, trained.adapter
    require_sealed(adapter, base)
    model = load_stock(base, trained.quantization)
    rows, mixture = embeddings(model), fused_experts(model) > 0
    tokenizer = prepare_tokenizer(base, Template.load(adapter / TEMPLATE), rows)
    reward = reward_record(trained, tokenizer)
    config = adapter_config(trained, prepared=tokenizer.pad.rows > rows)
    take_head(model, adapter)
    prepare_model(model, tokenizer.pad, reward)
    model = model.cpu()

    for name in AS_TRAINED:
        copy_file(adapter / name, folder / name)
    write_json(folder / ADAPTER_CONFIG, config)
    write_json(folder / REWARD, reward)
    tokenizer.template.save(folder / TEMPLATE)
    tokenizer.save(folder)
    if has_base := config[BASE_NAME] == EXPORTED_BASE:
        save_model(model, folder / EXPORTED_BASE, tokenizer)
    if merge != "none":
        write_merged(model, adapter, DTYPES[merge], folder / MERGED)
        finish(folder / MERGED, tokenizer)
    seal(folder, base)
    return card.Facts(
        base=base_record(base),
        training=read_json(adapter / TRAINING),
        recipe=recorded_recipe(adapter),
        reward=reward,
        pad=tokenizer.pad.token,
        metrics=trained.metrics,
        has_base=has_base,
        has_merged=merge != "none",
        mixture=mixture,
        adapter=digest(folder / ADAPTER_WEIGHTS),
        licenses=trained.licenses,
    )


def write_card(folder: Path, facts: card.Facts) -> None:
    """Write the card of an exported folder and add its digest to those of the other files."""
    write_text(folder / CARD, card.render(facts))
    sealed = read_json(folder / DIGESTS)
    sealed["files"][CARD] = digest(folder / CARD)
    write_json(folder / DIGESTS, sealed)


def reward_record(trained: Trained, tokenizer: PortableTokenizer) -> dict[str, Any]:
    """What a client needs to know about the rewards: how texts are built, mean, std, temperature.

    Mean and standard deviation are over the answers of all test pairs that are not ties, chosen and
    rejected. The temperature is 1 if no finite temperature is optimal.
    """
    metrics, template = trained.metrics, tokenizer.template
    means, deviations = (
        [metrics[f"{side}_{name}"] for side in ("chosen", "rejected")] for name in ("mean", "std")
    )
    return {
        "accuracy": metrics["accuracy"],
        "append_eos": template.append_eos,
        "dtype": dtype_name(trained.quantization.dtype),
        "max_length": template.max_length,
        "mean": float(np.mean(means)),
        "pad_token_id": tokenizer.pad.id,
        "std": float(np.sqrt(np.mean(np.square(deviations)) + np.var(means))),
        "temperature": metrics["calibration"]["temperature"] or 1.0,
        "template": template.template,
    }


def adapter_config(trained: Trained, prepared: bool) -> dict[str, Any]:
    """The adapter's configuration with its base: a model on the Hub at a commit, or base/.

    A base from the Hub is exported to base/ too if it was converted or got an extra row for the pad
    token.
    """
    base, config = base_record(trained.base), read_json(trained.adapter / ADAPTER_CONFIG)
    if base["kind"] == "hub" and not prepared and "converted" not in base:
        return config | {BASE_NAME: base["name"], "revision": base["revision"]}
    return config | {BASE_NAME: EXPORTED_BASE}


# --- loading ---------------------------------------------------------------------------------


def load_exported(folder: Path) -> PeftModel:
    """The reward model of an exported folder, ready to score, on the exported base or the Hub's.

    Raises a Fault if the folder is not an exported one, if it contains code or damaged files, or if
    the base cannot be downloaded from the Hub. The card and the merged model affect no reward, so
    they may be changed or missing.
    """
    record = exported_digests(folder)
    if missing := sorted(NEEDED - record["files"].keys()):
        raise Fault(f"{folder}/{DIGESTS} lacks {missing[0]}, expected a complete export")
    require_no_code(folder)
    not_needed = (CARD, f"{MERGED}/")
    require_files(
        folder, {k: v for k, v in record["files"].items() if not k.startswith(not_needed)}
    )
    if (kind := recorded(folder / ADAPTER_CONFIG).get("peft_type")) != "LORA":
        # Other adapters of PEFT may name further models, which it would download.
        raise Fault(f"{folder}/{ADAPTER_CONFIG}: peft_type is {as_written(kind)}, expected LORA")
    base = folder / EXPORTED_BASE
    if not base.is_dir():
        base = hub_base(folder, record["base"])
    return adapt(load_base(base, exported_quantization(folder)), folder)


def exported_digests(folder: Path) -> dict[str, Any]:
    """The digests of an exported folder. Raises a Fault for any other folder, such as merged/."""
    path = folder / DIGESTS
    record = recorded(path) if path.is_file() else {}
    if REWARD not in record.get("files", {}):
        found = "is not an exported folder" if folder.is_dir() else "does not exist"
        raise Fault(f"{folder} {found}, expected one such as models/export of dvc repro")
    return record


def exported_quantization(folder: Path) -> Quantization:
    """The quantization and compute dtype with which an exported adapter was trained."""
    recipe = recorded_recipe(folder)
    dtype = read_json(folder / REWARD)["dtype"]
    if recipe is None:
        return Quantization.unquantized(dtype)
    double = recipe["bnb_4bit_use_double_quant"]
    return Quantization(4, recipe["bnb_4bit_quant_type"], double, dtype)


def recorded_recipe(folder: Path) -> dict[str, Any] | None:
    """The `Quantization.recipe` with which the adapter in a folder was trained."""
    found: dict[str, Any] = read_json(folder / QUANTIZATION) or {}
    return found if "load_in_4bit" in found else None


def hub_base(folder: Path, files: dict[str, str]) -> Path:
    """Weights and configuration of the base that an exported folder names, from the Hub or a cache.

    `files` are the SHA-256 of the base's files. Raises a Fault if they cannot be downloaded.
    """
    from huggingface_hub import errors, snapshot_download

    config = read_json(folder / ADAPTER_CONFIG)
    name, revision = config[BASE_NAME], config["revision"]
    needed = {k: v for k, v in files.items() if k == "config.json" or k.startswith("model")}
    try:
        path = snapshot_download(name, revision=revision, allow_patterns=sorted(needed))
    # HTTPError is from httpx or httpx2, depending on the version of huggingface_hub.
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        raise Fault(
            f"{folder}: its base {name} at {revision} cannot be downloaded "
            f"({type(error).__name__}); check the network, set HF_ENDPOINT to a mirror, or put the "
            "model into the Hub's cache"
        ) from None
    require_files(Path(path), needed)
    return Path(path)


# --- what is rejected ------------------------------------------------------------------------


def require_no_code(folder: Path) -> None:
    """Raises a Fault if a folder contains code, or a configuration that names code to import.

    The digests only show that a folder is intact, not who made it.
    """
    files = files_below(folder)
    code = [path for path in files if path.suffix in (".py", ".pyc", ".so")]
    code += [path for path in files if path.name.endswith("config.json") and names_code(path)]
    if code:
        names = ", ".join(path.relative_to(folder).as_posix() for path in code)
        raise Fault(
            f"{folder}: {names} is code or names code to import, expected only weights and "
            "configurations; nothing was loaded"
        )


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, also through links to folders, which rglob does not follow."""
    found: list[Path] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(here)
        if place in seen:  # a link to a folder above would have no end
            folders.clear()
            continue
        seen.add(place)
        found += (Path(here, name) for name in names)
    return sorted(filter(Path.is_file, found))


def names_code(path: Path) -> bool:
    """Whether a configuration names code or a kernel at any level."""
    return any(
        names_kernel(part) or any(part.get(key) for key in NAMING_CODE)
        for part in objects_in(recorded(path))
    )
