"""The export: complete, with the same rewards in every client, and usable as its card says."""

import contextlib
import gc
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Params4bit
from huggingface_hub import ModelCard, ModelCardData
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from reward import params
from reward.after_training import Export
from reward.data import tokenized
from reward.data.tokens import Encoder, Template
from reward.exporting import clients, gate, portable
from reward.exporting.card import SHOWN, name_of
from reward.exporting.clients import FOUND, LEFT_OUT, PACKS, Request, fits, select
from reward.exporting.exported import Trained, load_exported, write_card, write_exported
from reward.exporting.inputs import COUNT_PADDING, Client, Exported, Score, paired
from reward.exporting.merging import SHARD, merged_weight, write_merged
from reward.model.base import (
    ALL_LINEAR,
    Quantization,
    add_lora,
    keep_weights_unpacked,
    load_base,
    load_stock,
    new_head,
    save,
    seal,
    silent_peft,
    weight_bytes,
)
from reward.model.packing import Texts
from reward.model.rankings import rankings_of, sides
from reward.model.scoring import score
from reward.outputs import digests, read_json, recorded, write_json
from reward.process import Fault
from stages import evaluate, export, preprocess, train
from tests.support import (
    EXPORTED,
    FAMILIES,
    LATENT,
    PARAMS,
    ROOT,
    SHAPE,
    fetched,
    random_prompts,
    run_clients_here,
    set_params,
    write_pairs,
)

NAME, COMMIT = "Qwen/Qwen2-0.5B", "c0ffee" * 6 + "cafe"
Change = dict[str, dict[str, Any]]
# The maximum size of a file, several times smaller than the weights of a small model.
FILE = 1 << 14
DEFAULT: Change = {
    "preprocess": {"template": "zh", "append_eos": False, "test_fraction": 0.2},
    "quantization": {"bits": 4},
    "train": {"max_steps": 2, "learning_rate": 1e-2},
    "export": {"merge": "float32", "clients": "all", "tolerance": 1e-4},
}
CHAT: Change = {
    "preprocess": {"template": "chat", "append_eos": True, "test_fraction": 0.2},
    "quantization": {"bits": "none"},
    "lora": {"use_dora": True},
    "train": {"max_steps": 2, "learning_rate": 3e-3},
    "export": {"merge": "bfloat16", "clients": "all", "tolerance_in_half": 0.02},
}
IN_HALF: Change = {
    "preprocess": {"template": "zh", "append_eos": False, "test_fraction": 0.2},
    "quantization": {"bits": 4, "compute_dtype": "bfloat16"},
    "train": {"max_steps": 2, "learning_rate": 1e-2},
    "export": {"merge": "bfloat16", "clients": "all", "tolerance_in_half": 0.05},
}
IN_FLOAT16: Change = {
    "preprocess": {"template": "zh", "append_eos": False, "test_fraction": 0.2},
    "quantization": {"bits": 4, "compute_dtype": "float16"},
    "train": {"max_steps": 2, "learning_rate": 1e-2},
    "export": {"merge": "float32", "clients": "light", "tolerance_in_half": 0.02},
}
ADAPTER = {"peft", "transformers_adapter", "pipeline_adapter", "trl_grpo_adapter"}
MERGED = {
    *("transformers_merged", "pipeline_merged", "cross_encoder_merged"),
    *("trl_reward_merged", "trl_grpo_merged"),
}
FORMS = {"right", "left", "single", "eos"}
FORMS_OF = {
    "packs": {"packs"},
    "cross_encoder_merged": {"right", "left", "single"},
    "trl_reward_merged": {"right", "eos"},
    "trl_grpo_adapter": {"right"},
    "trl_grpo_merged": {"right"},
}


@pytest.fixture(scope="module")
def evaluated(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Change], Path]:
    """A folder in which all stages before export have run, made once per set of parameters."""
    made: dict[str, Path] = {}

    def make(change: Change) -> Path:
        key = json.dumps(change)
        if key not in made:
            made[key] = folder = tmp_path_factory.mktemp("evaluated")
            shutil.copy(PARAMS, folder)
            for group, values in change.items():
                set_params(group, folder / "params.yaml", **values)
            shutil.copytree(tiny_base, folder / "models" / "base")
            write_pairs(folder / "data" / "raw" / "pairs.json", 20)
            (folder / "data" / "sets").mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.delenv("DVC_ROOT", raising=False)
                for stage in (preprocess, train, evaluate):
                    stage.main()
        return made[key]

    return make


@pytest.fixture(scope="module")
def exported(evaluated: Callable[[Change], Path]) -> Callable[[Change], Path]:
    """The same folder after export; only DEFAULT runs the clients in a fresh process.

    TMPDIR is a missing folder, because the export must not need one.
    """

    def make(change: Change) -> Path:
        folder = evaluated(change)
        if not (folder / export.EXPORT).exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.delenv("DVC_ROOT", raising=False)
                patch.setenv("TMPDIR", "/none")
                patch.setattr(tempfile, "tempdir", "/none")
                if change != DEFAULT:
                    patch.setattr(gate, "run_clients", run_clients_here)
                export.main()
        return folder

    return make


@pytest.fixture
def here(
    evaluated: Callable[[Change], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Change], None]:
    """Change to a copy of a folder that is ready for export."""

    def go(change: Change) -> None:
        shutil.copytree(evaluated(change), tmp_path, dirs_exist_ok=True)
        shutil.rmtree(export.EXPORT, ignore_errors=True)
        export.METRICS.unlink(missing_ok=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return go


@pytest.fixture
def ready(here: Callable[[Change], None]) -> None:
    """A folder that is ready to export only the adapter, with the light clients."""
    here(DEFAULT)
    set_export(clients="light", merge="none")


def set_export(**values: Any) -> None:
    set_params("export", **values)


def left_over() -> list[str]:
    """Finished and unfinished exports."""
    return sorted(path.name for path in Path("models").glob("export*"))


def assemble_here(merge: str = "none") -> str:
    """Write the export without the gate, and return its card."""
    export.EXPORT.mkdir()
    quantization = params.load("quantization", Quantization)
    trained = Trained(
        export.BASE, export.ADAPTER, quantization, recorded(export.EVALUATED), export.licenses()
    )
    write_card(export.EXPORT, write_exported(export.EXPORT, trained, merge))
    return (export.EXPORT / "README.md").read_text(encoding="utf-8")


def our_rewards(folder: Path, prompt: str, answers: list[str]) -> list[float]:
    """The rewards that the project's own scoring gives to answers."""
    encoder = Encoder(folder, Template.load(folder / "template.json"))
    texts = [encoder.render((("user", prompt),), (("assistant", each),)) for each in answers]
    rewards: list[float] = score(
        load_exported(folder), [Texts([ids], 0) for ids in encoder.encode(texts)], 512
    ).tolist()
    return rewards


# --- memory ----------------------------------------------------------------------------------


class Quantized:
    """Like a quantized model, it refers to itself, so only the garbage collector frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Turn off automatic garbage collection."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_written_model_is_freed_before_clients_load_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, alive = weakref.ref(Quantized()), []

    def looked_at(*_: Any) -> subprocess.CompletedProcess[str]:
        alive.append(written())
        return subprocess.CompletedProcess([], 1)

    monkeypatch.setattr(gate, "run_clients", looked_at)
    with pytest.raises(Fault, match="failed with status 1"):
        export.score_elsewhere(tmp_path, "light", 4096, [])
    assert alive == [None]


@pytest.mark.usefixtures("no_collector")
def test_model_of_a_client_is_freed_before_the_next_loads_its_own() -> None:
    before, alive = weakref.ref(Quantized()), []

    def opened(_: Exported) -> Score:
        alive.append(before())
        return lambda form: paired([], [])

    nothing: Any = None
    clients.found_by(Client("next", opened, (clients.PACKED,), merged=False), nothing)
    assert alive == [None]


# --- output ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "quantized"),
    [(DEFAULT, True), (CHAT, False), (IN_HALF, True)],
    ids=["default", "chat", "in half"],
)
def test_every_client_reproduces_the_evaluated_rewards(
    exported: Callable[[Change], Path], change: Change, quantized: bool
) -> None:
    folder = exported(change)
    found = read_json(folder / export.REPORTS / "figures.json")
    assert found["pairs"] == 4
    assert ("original_base" in found) == quantized
    assert set(found["clients"]) == {"packs"} | ADAPTER | MERGED
    for client, forms in found["clients"].items():
        assert set(forms) == FORMS_OF.get(client, FORMS)
        in_half = change == IN_HALF or (change == CHAT and client in MERGED)
        for figures in forms.values():
            # Each prompt has two pairs, and a GRPO step uses one of them.
            assert figures["pairs"] == (2 if "grpo" in client else 4)
            assert figures["difference_max"] <= (0.02 if in_half else 2e-5)
            assert figures["difference_mean"] <= figures["difference_max"]
            assert figures["flips"] == 0 or in_half


def test_metrics_are_those_of_the_worst_client(exported: Callable[[Change], Path]) -> None:
    folder = exported(CHAT)
    found = read_json(folder / export.REPORTS / "figures.json")["clients"].values()
    each = [figures for forms in found for figures in forms.values()]
    assert read_json(folder / export.METRICS) == {
        "clients/difference": max(figures["difference_max"] for figures in each),
        "clients/flips": max(figures["flips"] for figures in each),
        "clients/left_out": 0,
    }


def test_light_clients_reproduce_the_rewards_in_float16(exported: Callable[[Change], Path]) -> None:
    found = read_json(exported(IN_FLOAT16) / export.REPORTS / "figures.json")["clients"]
    assert set(found) == {each.name for each in select("light", merged=True)}
    assert found.pop("packs")["packs"]["difference_max"] == 0
    for forms in found.values():
        assert set(forms) == FORMS
        for figures in forms.values():
            assert figures["pairs"] == 4
            assert 0 < figures["difference_max"] <= 0.002


def test_export_holds_everything_needed_and_nothing_else(
    exported: Callable[[Change], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = exported(DEFAULT)
    assert set(digests(folder / export.EXPORT)) == EXPORTED
    assert [path.name for path in (folder / "models").glob("export*")] == ["export"]
    assert capfd.readouterr().err == ""


def test_export_is_reproducible(
    exported: Callable[[Change], Path], here: Callable[[Change], None]
) -> None:
    folder = exported(DEFAULT)
    here(DEFAULT)
    assemble_here("float32")
    assert digests(export.EXPORT) == digests(folder / export.EXPORT)


def test_configurations_hold_what_plain_loaders_read(exported: Callable[[Change], Path]) -> None:
    folder = exported(DEFAULT) / export.EXPORT
    pad = read_json(folder / "reward.json")["pad_token_id"]
    for name in ("base", "merged"):
        config = read_json(folder / name / "config.json")
        assert config["architectures"] == ["Qwen2ForSequenceClassification"]
        assert config["id2label"] == {"0": "reward"}
        assert config["problem_type"] == "regression"
        assert config["pad_token_id"] == pad == config["vocab_size"] - 1
        assert config["reward_model"] == read_json(folder / "reward.json")
        assert ("quantization_config" in config) == (name == "base")
    assert read_json(folder / "adapter_config.json")["base_model_name_or_path"] == "base"


def test_mean_and_std_in_reward_json_cover_all_test_answers(
    exported: Callable[[Change], Path],
) -> None:
    folder = exported(DEFAULT)
    table = pyarrow.parquet.read_table(folder / export.REWARDS)
    rewards = np.concatenate(
        [table[f"reward_{side}"].to_numpy() for side in ("chosen", "rejected")]
    )
    record = read_json(folder / export.EXPORT / "reward.json")
    assert record["mean"] == pytest.approx(rewards.mean(), rel=1e-5)
    assert record["std"] == pytest.approx(rewards.std(), rel=1e-5)
    evaluated = read_json(folder / export.EVALUATED)
    assert record["temperature"] == (evaluated["calibration"]["temperature"] or 1)
    assert (record["template"], record["append_eos"]) == ("问:{prompt}\n\n答:{answer}", False)


def use_hub_base() -> None:
    """Make models/base look fetched from the Hub, with a spare row for the pad token."""
    model = AutoModelForCausalLM.from_pretrained(export.BASE)
    model.resize_token_embeddings(4100, mean_resizing=False)
    model.save_pretrained(export.BASE)
    (export.BASE / "base.json").unlink()
    write_json(
        export.BASE / "base.json",
        {"name": NAME, "kind": "hub", "revision": COMMIT, "files": digests(export.BASE)},
    )
    seal(export.ADAPTER, export.BASE)


@pytest.mark.usefixtures("ready")
def test_hub_base_is_referenced_with_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub_base()
    set_export(clients="all")
    export.main()
    config = read_json(export.EXPORT / "adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == (NAME, COMMIT)
    assert set(digests(export.EXPORT)) == {name for name in EXPORTED if "/" not in name}
    assert set(read_json(export.REPORTS / "figures.json")["clients"]) == {"packs"} | ADAPTER
    card = (export.EXPORT / "README.md").read_text(encoding="utf-8")
    assert ModelCard(card).data.to_dict()["base_model"] == NAME
    assert ModelCard(card).content == card

    gate.hub_cache(tmp_path / "hub", export.BASE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = run_code(snippets_of(export.EXPORT)["PEFT"])
    assert f'revision="{COMMIT}"' not in card
    expected = our_rewards(export.EXPORT, names["prompt"], names["answers"])
    assert names["rewards"] == pytest.approx(expected, abs=2e-5)

    weights = tmp_path / "hub" / "models--Qwen--Qwen2-0.5B" / "snapshots" / COMMIT
    (weights / "model.safetensors").unlink()
    (weights / "model.safetensors").write_bytes(b"others")
    with pytest.raises(Fault, match=r"damaged, replaced or missing: model\.safetensors"):
        load_exported(export.EXPORT)
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(Fault, match=f"its base {NAME} at {COMMIT} cannot be downloaded"):
        load_exported(export.EXPORT)


@pytest.mark.usefixtures("ready")
def test_hub_base_without_room_for_the_pad_token_is_copied() -> None:
    base = read_json(export.BASE / "base.json")
    write_json(export.BASE / "base.json", base | {"name": NAME, "kind": "hub", "revision": COMMIT})
    assemble_here()
    config = read_json(export.EXPORT / "adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == ("base", None)
    assert (export.EXPORT / "base" / "model.safetensors").exists()


@pytest.mark.usefixtures("ready")
def test_converted_hub_base_is_copied_and_described() -> None:
    use_hub_base()
    base = read_json(export.BASE / "base.json")
    write_json(export.BASE / "base.json", base | {"converted": "another model as this one"})
    card = assemble_here()
    config = read_json(export.EXPORT / "adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == ("base", None)
    assert (export.EXPORT / "base" / "model.safetensors").exists()
    assert f"{NAME}, commit {COMMIT}, another model as this one, NF4." in card


@pytest.mark.usefixtures("ready")
def test_export_names_no_path_or_library_version_of_this_machine() -> None:
    base = read_json(export.BASE / "base.json")
    write_json(
        export.BASE / "base.json", base | {"name": f"{Path.cwd()}/my-model", "kind": "local"}
    )
    card = assemble_here("bfloat16")
    for path in filter(Path.is_file, export.EXPORT.rglob("*")):
        assert str(Path.cwd()).encode() not in path.read_bytes()
        assert b"transformers_version" not in path.read_bytes()
    assert "# Reward model based on my-model" in card


# --- loading ---------------------------------------------------------------------------------


def test_copied_export_loads_from_any_working_directory(
    exported: Callable[[Change], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(DEFAULT)
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder / export.EXPORT, copy)
    monkeypatch.chdir(tmp_path)
    ranked = rankings_of(tokenized.load(folder / export.TEST, folder / export.BASE))
    table = pyarrow.parquet.read_table(folder / export.REWARDS)
    found = score(load_exported(copy), [each.texts for each in ranked], 4096)
    j, k, rows = sides(found, ranked)
    for name, rewards in (("reward_chosen", j), ("reward_rejected", k)):
        assert rewards.tolist() == table[name].take(rows.numpy()).to_pylist()
    shutil.rmtree(copy / "merged")
    (copy / "README.md").write_text("# Mine", encoding="utf-8")
    load_exported(copy)


@pytest.mark.parametrize("name", ["models/adapter", "models/export/merged", "data", "missing"])
def test_folder_that_is_not_an_export_is_not_loaded(
    name: str, exported: Callable[[Change], Path]
) -> None:
    folder = exported(DEFAULT) / name
    found = "does not exist" if name == "missing" else "is not an exported folder"
    message = f"{folder} {found}, expected one such as models/export of dvc repro"
    with pytest.raises(Fault, match=f"^{re.escape(message)}$"):
        load_exported(folder)


@pytest.mark.parametrize("name", ["base/model.safetensors", "adapter_model.safetensors"])
def test_damaged_export_is_not_loaded(
    name: str, exported: Callable[[Change], Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(exported(DEFAULT) / export.EXPORT, tmp_path / "copy")
    with (copy / name).open("ab") as file:
        file.write(b"more")
    with pytest.raises(Fault, match=f"copy: damaged, replaced or missing: {name}"):
        load_exported(copy)


@pytest.mark.parametrize(
    "quantization",
    [
        Quantization(4, "nf4", False, "float32"),
        Quantization(4, "fp4", True, "float32"),
        Quantization.unquantized("float32"),
    ],
    ids=["nf4", "fp4 double", "plain"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_with_its_rewards(
    family: str, quantization: Quantization, tmp_path: Path
) -> None:
    """Adapter on the prepared base, and merged model; texts are padded on either side.

    The cases with double quantization adapt all linear layers with rank-stabilized LoRA; those
    quantized once use DoRA.
    """
    base = fetched(family, tmp_path / "of")
    model = load_base(base, quantization)
    new_head(model, 0)
    everything: bool = quantization.double_quant
    targets = ALL_LINEAR if everything else FAMILIES[family][2]
    lora = LoraConfig(r=4, lora_alpha=8, use_rslora=everything, target_modules=targets)
    lora.use_dora = quantization.bits == 4 and not everything
    lora.init_lora_weights = False
    trained = add_lora(model, lora)
    change_magnitudes(trained)
    prompts = random_prompts(0)
    expected = score(trained, prompts, 4096).tolist()
    save(trained, tmp_path, "base", quantization)

    model = load_stock(base, quantization)
    portable.take_head(model, tmp_path)
    rows = portable.embeddings(model)
    portable.prepare_model(model, portable.Pad("", rows, rows + 1), {})
    model.save_pretrained(tmp_path / "base")
    write_merged(model, tmp_path, torch.float32, tmp_path / "merged", shard=FILE)
    assert len([*(tmp_path / "merged").glob("model-*.safetensors")]) > 1
    with contextlib.chdir(tmp_path), silent_peft():
        adapter = AutoPeftModelForSequenceClassification.from_pretrained(".").eval()
    keep_weights_unpacked(adapter)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    for loaded in (adapter, merged):
        for left in (False, True):
            found = padded(loaded, [ids for texts in prompts for ids in texts.ids], rows, left)
            counts_padding = left and loaded.config.model_type in COUNT_PADDING
            assert (found == pytest.approx(expected, rel=1e-4, abs=3e-5)) is not counts_padding


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 16.0,
    "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.1,
}
# The shape of a tiny model of each type that counts padding.
SHAPES: dict[str, dict[str, Any]] = {
    "biogpt": {},
    "gpt-sw3": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "ministral3": {"head_dim": 16, "sliding_window": None, "rope_parameters": YARN},
    "mistral4": LATENT | {"q_lora_rank": 16, "rope_parameters": YARN},
}


def test_every_type_that_counts_padding_is_tested() -> None:
    assert SHAPES.keys() == COUNT_PADDING


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", *SHAPES])
def test_types_that_count_padding_compute_other_rewards_with_padding_on_the_left(kind: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE | SHAPES.get(kind, {}), num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    texts = [ids for texts in random_prompts(0) for ids in texts.ids]
    right, left = (padded(model, texts, 0, left) for left in (False, True))
    assert (left == pytest.approx(right, rel=1e-4, abs=3e-5)) is (kind not in COUNT_PADDING)


def change_magnitudes(model: PeftModel) -> None:
    """Change DoRA's magnitudes, as training does; they are initialized to the norms of the rows."""
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize(
    ("family", "quantization", "shard", "use_dora"),
    [
        ("Mixtral", Quantization(4, "nf4", False, "bfloat16"), SHARD, True),
        ("GPT-2", Quantization(4, "fp4", True, "float32"), FILE, False),
        ("GPT-2", Quantization.unquantized("bfloat16"), FILE, False),
        ("GPT-2", Quantization.unquantized("bfloat16"), FILE, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_weight_by_weight_gives_the_bytes_of_merging_in_memory(
    family: str,
    quantization: Quantization,
    shard: int | str,
    use_dora: bool,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    base = fetched(family, tmp_path / "of")
    model = load_base(base, quantization)
    new_head(model, 0)
    lora = LoraConfig(r=4, lora_alpha=32, use_dora=use_dora, target_modules=FAMILIES[family][2])
    lora.init_lora_weights = False
    trained = add_lora(model, lora)
    change_magnitudes(trained)
    save(trained, tmp_path, "base", quantization)

    model = load_stock(base, quantization)
    portable.take_head(model, tmp_path)
    conversions = getattr(model, "_weight_conversions", None)
    if quantization.recipe:
        model = model.dequantize(torch.float32)
    with silent_peft():
        whole = PeftModel.from_pretrained(model.float(), tmp_path).merge_and_unload()
    for name, module in load_stock(base, Quantization.unquantized("float32")).named_modules():
        linear = whole.get_submodule(name)
        if isinstance(module, Conv1D) and isinstance(linear, torch.nn.Linear):
            module.weight.data, module.bias = linear.weight.T.contiguous(), linear.bias
            whole.set_submodule(name, module)
    # Not in all versions does it survive dequantize, and the order of the weights depends on it.
    whole._weight_conversions = conversions
    whole.to(dtype).save_pretrained(tmp_path / "whole", max_shard_size=shard)

    model = load_stock(base, quantization)
    portable.take_head(model, tmp_path)
    write_merged(model, tmp_path, dtype, tmp_path / "merged", shard)
    assert digests(tmp_path / "merged") == digests(tmp_path / "whole")


@torch.no_grad()
def padded(model: Any, texts: list[Any], pad: int, left: bool) -> list[float]:
    """The rewards of texts in one padded batch."""
    longest = max(map(len, texts))
    rows, masks = [], []
    for ids in texts:
        filler = longest - len(ids)
        row, mask = [*ids, *[pad] * filler], [1] * len(ids) + [0] * filler
        rows.append(row[len(ids) :] + row[: len(ids)] if left else row)
        masks.append(mask[::-1] if left else mask)
    logits = model(input_ids=torch.tensor(rows), attention_mask=torch.tensor(masks)).logits
    rewards: list[float] = logits[:, 0].tolist()
    return rewards


# --- refused exports -------------------------------------------------------------------------


@pytest.mark.usefixtures("ready", "clients_here")
@pytest.mark.parametrize("part", ["score", "lora_B"])
def test_adapter_with_other_rewards_is_not_exported(part: str) -> None:
    path = export.ADAPTER / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if part in name:
            tensors[name] = tensors[name] * 1.1 + 0.01
    save_file(tensors, path)
    seal(export.ADAPTER, export.BASE)
    with pytest.raises(Fault, match=r"the rewards in packs \(packs\) differ from reports"):
        export.main()
    assert left_over() == []
    assert not export.METRICS.exists()


def merge_into_unquantized(model: PreTrainedModel, name: str) -> torch.Tensor:
    """A merge into the weights as they were before quantization."""
    merged, (place, _, kind) = merged_weight(model, name), name.rpartition(".")
    module = model.get_submodule(place)
    weight = getattr(getattr(module, "base_layer", module), kind, None)
    if not isinstance(weight, Params4bit):
        return merged
    original = load_file(export.BASE / "model.safetensors")[name]
    return merged - dequantize_4bit(weight.data, weight.quant_state) + original


def pad_is_eos(tokenizer: Tokenizer, _config: Any, _template: Any, rows: int) -> portable.Pad:
    return portable.Pad("<|endoftext|>", tokenizer.get_vocab()["<|endoftext|>"], rows)


@pytest.mark.usefixtures("ready", "clients_here")
@pytest.mark.parametrize(
    ("place", "fault", "client"),
    [
        ("merging.merged_weight", merge_into_unquantized, r"transformers_merged \(right\)"),
        ("portable.find_pad", pad_is_eos, r"peft \(eos\)"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_export_that_a_client_scores_wrongly_leaves_nothing(
    place: str, fault: Any, client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_export(merge="float32")
    monkeypatch.setattr(f"reward.exporting.{place}", fault)
    with pytest.raises(Fault, match=f"the rewards in {client} differ"):
        export.main()
    assert left_over() == []
    assert not export.METRICS.exists()


@pytest.mark.usefixtures("ready")
def test_output_of_a_failing_client_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "reward.exporting.exported.save_model", lambda model, folder, tokenizer: None
    )
    with pytest.raises(Fault, match="the process that checks it with its clients failed with"):
        export.main()
    assert "cannot be downloaded" in capsys.readouterr().err
    assert left_over() == []


@pytest.mark.usefixtures("ready")
def test_missing_library_is_named_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_export(clients="all")
    monkeypatch.setattr("reward.after_training.find_spec", lambda name: None)
    expected = "export.clients is all, but trl and sentence-transformers cannot be imported; run"
    with pytest.raises(Fault, match=expected):
        export.main()
    assert left_over() == []


@pytest.mark.usefixtures("ready")
def test_base_with_custom_code_is_not_exported() -> None:
    (export.BASE / "modeling_mine.py").touch()
    with pytest.raises(Fault, match=r"models/base contains code \(modeling_mine\.py\), expected"):
        export.main()
    assert left_over() == []


@pytest.mark.usefixtures("ready")
def test_adapter_of_another_version_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = export.ADAPTER / "training.json"
    training = read_json(path)
    assert training.keys() == SHOWN
    write_json(path, {name: training[name] for name in ("data", "lora", "quantization", "train")})
    seal(export.ADAPTER, export.BASE)
    monkeypatch.setattr(export, "write_exported", MagicMock(side_effect=AssertionError))
    message = (
        f"{path} lacks base_parameters, pairs, so another version of this project wrote it; run "
        "dvc repro"
    )
    with pytest.raises(Fault, match=f"^{re.escape(message)}$"):
        export.main()
    assert left_over() == []


@pytest.mark.usefixtures("ready")
def test_rewards_of_other_pairs_are_refused() -> None:
    table = pyarrow.parquet.read_table(export.REWARDS)
    pyarrow.parquet.write_table(table.slice(1), export.REWARDS)
    with pytest.raises(Fault, match="has different pairs than data/tokenized/test"):
        export.main()
    assert left_over() == []


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("recorded", [None, b"", b"0", b"-1", b"1.5", b"all"])
def test_rewards_with_an_unknown_pack_size_are_refused(recorded: bytes | None) -> None:
    table = pyarrow.parquet.read_table(export.REWARDS)
    assert table.schema.metadata == {b"tokens_per_pack": b"4096"}
    metadata = None if recorded is None else {b"tokens_per_pack": recorded}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), export.REWARDS)
    found = re.escape(f"tokens_per_pack in its metadata is {recorded!r}, expected a positive")
    with pytest.raises(Fault, match=f"rewards.parquet: {found} integer; run dvc repro"):
        export.main()
    assert left_over() == []


@pytest.mark.usefixtures("ready")
def test_packs_have_the_size_recorded_by_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    table = pyarrow.parquet.read_table(export.REWARDS)
    recorded = table.replace_schema_metadata({b"tokens_per_pack": b"60"})
    pyarrow.parquet.write_table(recorded, export.REWARDS)
    requests: list[Request] = []

    def run_clients(request: Request, _: Path) -> subprocess.CompletedProcess[str]:
        requests.append(request)
        return subprocess.CompletedProcess([], 1)

    monkeypatch.setattr(gate, "run_clients", run_clients)
    with pytest.raises(Fault, match="failed with status 1"):
        export.main()
    assert [request.tokens_per_pack for request in requests] == [60]


@pytest.mark.usefixtures("ready")
def test_longer_texts_choose_the_pairs_and_all_rewards_the_tolerance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen, judged = MagicMock(), MagicMock(side_effect=Fault)
    monkeypatch.setattr(gate, "select_pairs", chosen)
    monkeypatch.setattr(export, "require_alike", judged)
    for place, name in ((export, "write_exported"), (export, "score_elsewhere"), (gate, "measure")):
        monkeypatch.setattr(place, name, MagicMock())
    with pytest.raises(Fault):
        export.main()
    rows = pyarrow.parquet.read_table(export.REWARDS).to_pylist()
    lengths = [max(row["tokens_chosen"], row["tokens_rejected"]) for row in rows]
    assert chosen.call_args.args[0].tolist() == lengths
    rewards = [row[f"reward_{side}"] for row in rows for side in ("chosen", "rejected")]
    assert judged.call_args.args[-1] == pytest.approx(np.std(rewards))


def test_interpreter_may_be_relative_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in `PATH=.venv/bin:$PATH dvc repro`, and clients run in another folder."""
    python = Path(sys.executable)
    commands: list[list[Path]] = []
    monkeypatch.chdir(python.parent)
    monkeypatch.setattr(sys, "executable", python.name)
    monkeypatch.setattr(gate, "hub_cache", lambda *_: None)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    gate.run_clients(Request("f", "p", "b", "light", 1, []), tmp_path)
    assert [command[0] for command in commands] == [python]


def test_progress_of_the_clients_is_shown_and_their_other_output_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho progress\necho other >&2\n", encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(gate, "hub_cache", lambda *_: None)
    done = gate.run_clients(Request("f", "p", "b", "light", 1, []), tmp_path)
    assert (*capfd.readouterr(), done.stderr) == ("", "progress\n", "other\n")


def test_processes_other_than_the_first_only_score_packs(
    exported: Callable[[Change], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They leave before the first one runs the other clients, which may take longer than a wait."""
    folder, steps = exported(DEFAULT), []
    monkeypatch.setattr("reward.model.group.leads", lambda: False)
    monkeypatch.setattr("reward.model.group.leave", lambda: steps.append("leave"))
    monkeypatch.setattr(clients, "found_by", lambda client, _: steps.append(client.name))
    where, pairs, base = (str(folder / each) for each in (export.EXPORT, export.TEST, export.BASE))
    assert clients.find(Request(where, pairs, base, "light", 4096, [0])) is None
    assert steps == [PACKS.name, "leave"]


@pytest.mark.usefixtures("ready")
def test_several_processes_check_an_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the packs of the exported model, but not those of the original base."""
    set_export(pairs=2)
    monkeypatch.setenv("PET_NPROC_PER_NODE", "2")
    export.main()
    figures = read_json(export.REPORTS / "figures.json")
    assert (figures["original_base"]["pairs"], figures["left_out"]) == (4, [])


def test_clients_load_a_copy_next_to_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Request] = []

    def run_clients(request: Request, elsewhere: Path) -> subprocess.CompletedProcess[str]:
        asked.append(request)
        write_json(elsewhere / "request.json", asdict(request))
        monkeypatch.setattr("sys.argv", ["clients", str(elsewhere / "request.json")])
        clients.main()
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(gate, "run_clients", run_clients)
    monkeypatch.setattr(clients, "find", lambda request: paired([], []))
    (tmp_path / "export").mkdir()
    assert export.score_elsewhere(tmp_path / "export", "light", 60, [2, 5]) == paired([], [])
    assert asked[0].compared == [2, 5]
    assert Path(asked[0].folder) == tmp_path / "clients.partial" / "reward-model"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_process_of_the_clients_exits_with_the_export_and_finds_its_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []

    def started(_: Any, env: dict[str, str], **__: Any) -> subprocess.CompletedProcess[str]:
        seen.append(env)
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(subprocess, "run", started)
    monkeypatch.setattr(gate, "hub_cache", lambda *_: None)
    monkeypatch.setenv("PYTHONPATH", "/packages")
    gate.run_clients(Request("export", "test", "base", "light", 60, []), tmp_path)
    assert seen[0]["REWARD_LAUNCHER"] == str(os.getpid())
    assert seen[0]["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/packages"]


@pytest.mark.usefixtures("ready", "clients_here")
def test_client_that_does_not_fit_in_memory_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(_: Exported) -> Score:
        raise torch.OutOfMemoryError

    first, second, *_ = clients.LIGHT
    monkeypatch.setattr(clients, "LIGHT", (replace(first, open=too_large), second))
    set_export(pairs=3)
    export.main()
    figures = read_json(export.REPORTS / "figures.json")
    assert figures["left_out"] == ["peft"]
    assert set(figures["clients"]) == {"packs", "transformers_adapter"}
    assert figures["clients"]["packs"]["packs"]["pairs"] == 4
    assert {each["pairs"] for each in figures["clients"]["transformers_adapter"].values()} == {3}
    assert read_json(export.METRICS)["clients/left_out"] == 1
    card = (export.EXPORT / "README.md").read_text(encoding="utf-8")
    assert "because they did not fit in memory: peft." in card
    assert "peft                  left out" in capsys.readouterr().out
    load_exported(export.EXPORT)


def test_client_fits_in_memory_if_its_weights_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"export/base": 1, "base": 2, "export/merged": 3}
    exported: Any = SimpleNamespace(folder=tmp_path / "export", base=tmp_path / "base")
    for name, size in sizes.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * size)

    def fitting(free: int) -> list[str]:
        monkeypatch.setattr(clients, "free_memory", lambda: free)
        asked = (CLIENTS["peft"], clients.ORIGINAL, CLIENTS["transformers_merged"])
        return [client.name for client in asked if fits(client, exported)]

    names = ["peft", "original_base", "transformers_merged"]
    assert [fitting(free) for free in (1, 2, 3, 4)] == [names[:count] for count in range(4)]
    shutil.rmtree(exported.folder / "base")
    assert fitting(2) == []
    assert fitting(3) == names[:2]


# --- figures ---------------------------------------------------------------------------------

EVALUATED = np.array([[1.0, 0.0], [0.25, 0.5], [2.0, 2.0]])
DECIDED = np.array([True, False, True])
CLIENTS = {client.name: client for client in select("all", merged=True)}
Found = dict[int, list[float]]


def found_by(client: Client, forms: dict[str, Found]) -> pa.Table:
    """The result of a client with these rewards in these forms, and none in the others."""
    exported: Any = None
    tables = {form: paired([*found], [*chain(*found.values())]) for form, found in forms.items()}
    empty = paired([], [])
    fake = replace(client, open=lambda _: lambda form: tables.get(form.name, empty))
    return clients.found_by(fake, exported)


def measured(name: str, rewards: Found, form: str = "right") -> dict[str, Any]:
    """The figures of a client; two pairs that end in EOS have the rewards 5 and 4."""
    packs = {
        "packs": dict(enumerate(EVALUATED.tolist())),
        "eos": {0: [5.0, 4.0], 2: [5.0, 4.0]},
    }
    client = CLIENTS[name]
    found = pa.concat_tables([found_by(PACKS, packs), found_by(client, {form: rewards})])
    return gate.measure(leaving_out(found), [PACKS, client], EVALUATED, DECIDED)["clients"]


def leaving_out(found: pa.Table, *names: str) -> pa.Table:
    """The result when these clients do not fit in memory."""
    return found.replace_schema_metadata({LEFT_OUT: json.dumps(names)})


@pytest.mark.usefixtures("ready", "clients_here")
def test_unquantized_base_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cards that can train a base in 4 bits often cannot hold it unquantized."""
    kinds = Quantization(4, "nf4", True, "float32"), Quantization.unquantized("float32")
    sizes = [weight_bytes(Path("models/base"), kind) for kind in kinds]
    monkeypatch.setattr("reward.model.base.memory", lambda: sum(sizes) / 2)
    monkeypatch.setattr(clients, "LIGHT", clients.LIGHT[:1])
    export.main()
    figures = read_json(export.REPORTS / "figures.json")
    assert figures["left_out"] == ["original_base"]
    assert "original_base" not in figures


def test_client_that_is_left_out_is_not_compared() -> None:
    found = found_by(PACKS, {"packs": dict(enumerate(EVALUATED.tolist()))})
    figures = gate.measure(leaving_out(found, "peft"), [PACKS, CLIENTS["peft"]], EVALUATED, DECIDED)
    assert (set(figures["clients"]), figures["left_out"]) == ({"packs"}, ["peft"])
    group = Export("float32", "light", 200, 0, tolerance=0.01, tolerance_in_half=0.1)
    compared = (figures["clients"], [PACKS, CLIENTS["peft"]], group)
    with pytest.raises(Fault, match="no client except packs fits in memory"):
        export.require_alike(*compared, Quantization.unquantized("float32"), deviation=1)


def test_figures_cover_the_pairs_that_a_client_was_given() -> None:
    found = measured("peft", {2: [2.5, 2.0], 0: [-1.0, 0.0]})["peft"]["right"]
    assert found == {
        "pairs": 2,
        "difference_max": 2.0,
        "difference_mean": 0.625,
        "flips": 2,
        "accuracy": 0.5,
    }
    assert measured("peft", {})["peft"]["right"] == {"pairs": 0}


def test_accuracy_leaves_out_ties_as_in_evaluate() -> None:
    of_packs = measured("peft", {})["packs"]["packs"]
    assert (of_packs["pairs"], of_packs["accuracy"]) == (3, 0.75)
    only_ties = measured("peft", {1: [0.25, 0.5]})["peft"]["right"]
    assert only_ties["pairs"] == 1
    assert "accuracy" not in only_ties
    assert export.in_columns(only_ties).split() == ["1", "0", "0", "0"]


@pytest.mark.usefixtures("ready")
def test_ties_of_the_test_set_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    table = pyarrow.parquet.read_table(export.REWARDS)
    rest = len(table) - 1
    only = {
        "preference": [1.0] + [0.5] * rest,
        "reward_chosen": [-1.0] + [1.0] * rest,
        "reward_rejected": [1.0] + [-1.0] * rest,
    }
    for name, values in only.items():
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(values, table[name].type))
    pyarrow.parquet.write_table(table, export.REWARDS)
    rewards = dict(enumerate(gate.rewards_of(table).tolist()))
    alike = [
        found_by(PACKS, {"packs": rewards}),
        found_by(CLIENTS["peft"], {"right": rewards}),
        found_by(CLIENTS["transformers_adapter"], {"right": rewards}),
    ]
    monkeypatch.setattr(export, "score_elsewhere", lambda *_: leaving_out(pa.concat_tables(alike)))
    export.main()
    found = read_json(export.REPORTS / "figures.json")["clients"]["packs"]["packs"]
    assert (found["pairs"], found["accuracy"]) == (len(table), 0)


def test_texts_that_end_in_eos_are_compared_with_packs_of_the_same_texts() -> None:
    found = measured("peft", {0: [5.0, 4.0], 2: [5.0, 4.5]}, "eos")
    assert found["peft"]["eos"]["difference_max"] == 0.5
    assert set(found["packs"]) == {"packs"}


def test_nan_reward_survives_the_results_file(tmp_path: Path) -> None:
    found = found_by(CLIENTS["peft"], {"left": {1: [float("nan"), 0.5]}})
    pyarrow.parquet.write_table(found, tmp_path / FOUND)
    [row] = pyarrow.parquet.read_table(tmp_path / FOUND).to_pylist()
    assert np.isnan(row.pop("reward_chosen"))
    assert row == {"client": "peft", "form": "left", "pair": 1, "reward_rejected": 0.5}


def test_longest_closest_and_random_pairs_are_compared() -> None:
    lengths = np.array([9, 1, 1, 8, 1, 1, 1, 1, 1, 8])
    margins = np.array([0, 5, -1, 0, 2, 5, 5, 5, 5, 5])
    rewards = np.stack([margins, np.zeros(10)], axis=1)
    drawn = [gate.select_pairs(lengths, rewards, 8, seed) for seed in range(20)]
    for found in drawn:
        assert found == sorted(set(found))
        assert len(found) == 8
        assert {0, 3} | {2, 4} <= set(found)
    assert set(chain(*drawn)) == set(range(10))
    assert gate.select_pairs(lengths, rewards, 8, 3) == drawn[3]
    assert gate.select_pairs(lengths, rewards, 10, 0) == [*range(10)]


def test_clients_of_the_merged_model_need_a_merged_model() -> None:
    names = {
        which: {each.name for each in select(which, merged=False)} for which in ("all", "light")
    }
    assert names["all"] == {"packs"} | ADAPTER
    assert names["light"] == names["all"] - {"trl_grpo_adapter"}
    assert set(CLIENTS) == {"packs"} | ADAPTER | MERGED
    assert {name: {form.name for form in each.forms} for name, each in CLIENTS.items()} == {
        name: FORMS_OF.get(name, FORMS) for name in CLIENTS
    } | {"packs": {"packs", "eos"}}


def test_figures_are_printed_as_a_table_with_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {
        "pairs": 277,
        "difference_max": 0.5333,
        "difference_mean": 6.5e-7,
        "flips": 4,
        "accuracy": 0.75,
    }
    by_client = {"packs": {"packs": {"pairs": 0}}, "cross_encoder_merged": {"single": figures}}
    found = {"pairs": 277, "clients": by_client, "left_out": ["peft"], "original_base": figures}
    export.report(found)
    lines = capsys.readouterr().out.splitlines()
    header, nothing, row, left_out, unproven, original, warning, exported = lines
    assert unproven.startswith("warning    nothing was compared in packs, because ")
    assert len(header) == len(row) == len(original)
    assert left_out.split() == ["peft", "left", "out:", "it", "does", "not", "fit", "in", "memory"]
    assert nothing.split() == ["packs", "packs", "0"]
    expected = "cross_encoder_merged single 277 0.53 6.5e-07 4 0.7500"
    assert row.split() == expected.split()
    assert warning.endswith("differ by up to 0.53, which reorders 4 pairs")
    assert exported.startswith("exported   models/export; ")
    by_client["cross_encoder_merged"] = {"single": figures | {gate.MEDIAN: 1e-6}}
    export.report(found)
    assert "the median difference is judged, at most 1e-06 here, b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("client", "merge", "dtype", "shift", "key"),
    [
        ("peft", "float32", "float32", 0.009, None),
        ("peft", "float32", "float32", 0.011, "tolerance"),
        ("peft", "float32", "float32", float("nan"), "tolerance"),
        ("peft", "bfloat16", "float32", 0.011, "tolerance"),
        ("peft", "float32", "bfloat16", 0.09, None),
        ("peft", "float32", "bfloat16", 0.11, "tolerance_in_half"),
        ("pipeline_merged", "float32", "float32", 0.011, "tolerance"),
        ("pipeline_merged", "bfloat16", "float32", 0.09, None),
        ("pipeline_merged", "bfloat16", "float32", 0.11, "tolerance_in_half"),
        ("packs", "bfloat16", "bfloat16", 0.011, "tolerance"),
    ],
)
def test_rewards_may_differ_within_the_tolerance(
    client: str, merge: Any, dtype: Any, shift: float, key: str | None
) -> None:
    group = Export(merge, "light", 200, 0, tolerance=0.01, tolerance_in_half=0.1)
    quantization = Quantization(4, "nf4", False, dtype)
    rewards = paired([0, 1], [1.0, 0.0 + shift, 0.25, 0.5])
    found = {client: {"right": gate.difference(rewards, EVALUATED, DECIDED)}}
    given = (found, [CLIENTS[client]], group, quantization)
    if key is None:
        export.require_alike(*given, deviation=0.5)
    else:
        allowed = getattr(group, key)
        with pytest.raises(Fault, match=rf"expected at most {allowed} \(export\.{key}\)"):
            export.require_alike(*given, deviation=0.5)


@pytest.mark.parametrize(
    ("client", "dtype", "shift", "allowed"),
    [
        ("peft", "bfloat16", 0.39, None),
        ("peft", "bfloat16", 0.41, r"0\.4 \(export\.tolerance_in_half\)"),
        ("peft", "float32", 0.039, None),
        ("peft", "float32", 0.041, r"0\.04 \(export\.tolerance\)"),
        ("packs", "float32", 0.02, r"0\.01 \(export\.tolerance\)"),
    ],
)
def test_tolerance_grows_with_the_rewards_except_for_packs(
    client: str, dtype: Any, shift: float, allowed: str | None
) -> None:
    """The default run in bf16, with a standard deviation of 4, differs by more than 0.25."""
    group = Export("float32", "light", 200, 0, tolerance=0.01, tolerance_in_half=0.1)
    rewards = paired([0, 1], [1.0, 0.0 + shift, 0.25, 0.5])
    found = {client: {"right": gate.difference(rewards, EVALUATED, DECIDED)}}
    given = (found, [CLIENTS[client]], group, Quantization.unquantized(dtype))
    if allowed is None:
        export.require_alike(*given, deviation=4.0)
    else:
        with pytest.raises(Fault, match=f"at most {allowed}"):
            export.require_alike(*given, deviation=4.0)


@pytest.mark.usefixtures("ready", "clients_here")
@pytest.mark.parametrize("experts", [0, 8])
def test_median_is_recorded_for_a_mixture_of_experts(
    experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reward.exporting.exported.fused_experts", lambda _: experts)
    monkeypatch.setattr(clients, "LIGHT", clients.LIGHT[:1])
    export.main()
    figures = read_json(export.REPORTS / "figures.json")["clients"]["peft"]["right"]
    assert (gate.MEDIAN in figures) == (experts > 0)


@pytest.mark.parametrize(
    ("client", "rewards", "fault"),
    [
        ("peft", [1.0, 0.3, 0.25, 0.509], None),
        ("peft", [1.0, 0.3, 0.3, 0.509], r"by a median of 0\.0295, expected at most 0\.01 "),
        ("peft", [1.0, math.nan, 0.25, 0.5], "by a median of nan"),
        ("packs", [1.0, 0.3, 0.25, 0.5], r"by up to 0\.3, expected at most 0\.01 "),
    ],
)
def test_few_texts_of_a_mixture_of_experts_may_differ_by_more_than_the_tolerance(
    client: str, rewards: list[float], fault: str | None
) -> None:
    group = Export("float32", "light", 200, 0, tolerance=0.01, tolerance_in_half=0.1)
    found = {
        client: {
            "right": gate.difference(paired([0, 1], rewards), EVALUATED, DECIDED, mixture=True)
        }
    }
    given = (found, [CLIENTS[client]], group, Quantization.unquantized("float32"))
    if fault is None:
        export.require_alike(*given, deviation=1.0)
    else:
        with pytest.raises(Fault, match=fault):
            export.require_alike(*given, deviation=1.0)


def test_gate_fails_if_nothing_was_compared() -> None:
    group = Export("float32", "all", 200, 0, tolerance=0.01, tolerance_in_half=0.1)
    alike = gate.difference(paired([0, 1], [1.0, 0.0, 0.25, 0.5]), EVALUATED, DECIDED)
    found: gate.ByClient = {"packs": {"packs": alike}, "peft": {"right": {"pairs": 0}}}
    given = ([CLIENTS[name] for name in found], group, Quantization.unquantized("float32"))
    with pytest.raises(
        Fault, match=r"no client except packs got a pair of data/tokenized/test, expected"
    ):
        export.require_alike(found, *given, deviation=1.0)
    found["peft"]["left"] = alike
    export.require_alike(found, *given, deviation=1.0)


# --- the card --------------------------------------------------------------------------------


def run_code(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "snippet", "exec"), names)
    return names


def snippets_of(folder: Path) -> dict[str, str]:
    """The snippets of a card by heading."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^### (.+?)\n\n```python\n(.*?)```$", text, re.DOTALL | re.MULTILINE))


def snippets_of_the_docs() -> list[str]:
    text = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def go_to_export(
    exported: Callable[[Change], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Change], None]:
    """Change to a folder with models/export and models/base, and nothing else."""

    def go(change: Change) -> None:
        for path in (export.EXPORT, export.BASE):
            shutil.copytree(exported(change) / path, tmp_path / path)

    monkeypatch.chdir(tmp_path)
    return go


@pytest.mark.parametrize("change", [DEFAULT, CHAT], ids=["text", "chat"])
@pytest.mark.parametrize(
    "client", ["PEFT", "transformers", "transformers pipeline", "sentence-transformers"]
)
def test_code_in_the_card_gives_the_rewards(
    client: str, change: Change, go_to_export: Callable[[Change], None]
) -> None:
    go_to_export(change)
    names = run_code(snippets_of(export.EXPORT)[client])
    expected = our_rewards(export.EXPORT, names["prompt"], names["answers"])
    in_half = change == CHAT and client != "PEFT"
    assert names["rewards"] == pytest.approx(expected, abs=0.02 if in_half else 2e-5)


def test_code_in_the_card_trains_a_policy_on_the_rewards(
    go_to_export: Callable[[Change], None],
) -> None:
    go_to_export(DEFAULT)
    names = run_code(snippets_of(export.EXPORT)["TRL, as the reward in GRPO"])
    history = names["trainer"].state.log_history
    assert names["trainer"].state.global_step == 1
    assert any("rewards/merged/mean" in each for each in history)


def test_code_in_the_card_judges_pairs(go_to_export: Callable[[Change], None]) -> None:
    go_to_export(DEFAULT)
    names = run_code(snippets_of(export.EXPORT)["TRL, to evaluate pairs"])
    [row] = names["pairs"]
    answers = [row[side][-1]["content"] for side in ("chosen", "rejected")]
    chosen, rejected = our_rewards(export.EXPORT, row["chosen"][0]["content"], answers)
    assert names["figures"]["eval_margin"] == pytest.approx(chosen - rejected, abs=2e-5)


def test_card_shows_clients_of_the_merged_model_only_with_one(
    exported: Callable[[Change], Path], here: Callable[[Change], None]
) -> None:
    assert len(snippets_of(exported(DEFAULT) / export.EXPORT)) == 6
    card = (exported(DEFAULT) / export.EXPORT / "README.md").read_text(encoding="utf-8")
    also = " and, as `reward_model`, in the configuration of the merged model"
    assert f"\n`reward.json`{also}.\n" in card
    here(DEFAULT)
    assert "\n`reward.json`.\n" in assemble_here("none")
    assert set(snippets_of(export.EXPORT)) == {"PEFT"}


def test_reward_function_for_trl_trains_a_policy_as_documented(
    go_to_export: Callable[[Change], None],
) -> None:
    go_to_export(DEFAULT)
    [code] = [snippet for snippet in snippets_of_the_docs() if "reward.serving.scorer" in snippet]
    trainer = run_code(code)["trainer"]
    assert trainer.state.global_step == 1
    assert any("rewards/models/export/mean" in each for each in trainer.state.log_history)


def test_docs_contain_the_code_of_the_card(exported: Callable[[Change], Path]) -> None:
    code = snippets_of_the_docs()
    assert set(snippets_of(exported(DEFAULT) / export.EXPORT).values()) <= set(code)
    assert len(code) == 7


@pytest.mark.usefixtures("ready")
def test_card_escapes_quoted_text() -> None:
    figures = {"accuracy": 0.5, "low": 0.25, "high": 0.75, "pairs": 2}
    metrics = read_json(export.EVALUATED)
    metrics["by"] = {"so|urce": {"a | b\n# c": figures, "<script>": figures, "[x](y)": figures}}
    write_json(export.EVALUATED, metrics)
    base = read_json(export.BASE / "base.json")
    write_json(export.BASE / "base.json", base | {"name": "*tiny* <b> `x`\n# Another heading"})
    template = read_json(export.ADAPTER / "template.json")
    text = "```\nQ: {prompt}\n`A`: {answer}"
    write_json(export.ADAPTER / "template.json", template | {"template": text})
    seal(export.ADAPTER, export.BASE)
    card = assemble_here()
    slices = [line for line in card.splitlines() if "0.2500 to 0.7500" in line]
    assert [re.split(r"(?<!\\)\|", line)[1].strip() for line in slices] == [
        r"so\|urce: \<script\>",
        r"so\|urce: \[x\]\(y\)",
        r"so\|urce: a \| b \# c",
    ]
    assert all(len(re.split(r"(?<!\\)\|", line)) == 6 for line in slices)
    assert r"# Reward model based on \*tiny\* \<b\> \`x\` \# Another heading" in card.splitlines()
    assert r'with the template ```` "```\nQ: {prompt}\n`A`: {answer}" ````.' in card
    assert [line for line in card.splitlines() if line.startswith("# ")] == [
        r"# Reward model based on \*tiny\* \<b\> \`x\` \# Another heading"
    ]


def test_card_is_a_valid_hub_model_card(exported: Callable[[Change], Path]) -> None:
    text = (exported(DEFAULT) / export.EXPORT / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.content == text
    assert card.data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "lora"],
    }


@pytest.mark.parametrize(
    ("kind", "name", "shown"),
    [
        ("hub", "org/merged", "org/merged"),
        ("local", "/home/me/models/qwen/", "qwen"),
        ("local", "models/mine/merged", "mine/merged"),
        ("local", "merged", "merged"),
    ],
)
def test_card_names_a_merged_model_by_its_export_too(kind: str, name: str, shown: str) -> None:
    assert name_of({"kind": kind, "name": name}) == shown


@pytest.mark.usefixtures("ready")
def test_card_has_licences_and_a_citation() -> None:
    assert "licence of the base was not recorded" in (card := assemble_here())
    assert "licence of the data was not recorded" in card
    shutil.rmtree(export.EXPORT)
    base = read_json(export.BASE / "base.json")
    found = {"license": "other", "license_name": "a_b", "license_link": "https://a.example/?b=c"}
    write_json(export.BASE / "base.json", base | {"name": "100%_mine", "license": found})
    write_json(export.LICENSES, ["cc-by-4.0", "mit", None])
    assert "\nLicences of some of the data: cc-by-4.0, mit.\n" in assemble_here()
    shutil.rmtree(export.EXPORT)
    write_json(export.LICENSES, ["cc-by-4.0", "mit"])
    card = assemble_here()
    assert "\nLicence of the base: other, a\\_b, https://a.example/?b=c.\n" in card
    assert "\nLicences of the data: cc-by-4.0, mit.\n" in card
    sealed = read_json(export.EXPORT / "digests.json")["files"]
    assert sealed == {k: v for k, v in digests(export.EXPORT).items() if k != "digests.json"}
    assert f"has SHA-256 {sealed['adapter_model.safetensors']}}}" in card
    assert r"title = {Reward model based on 100\%\_mine}," in card
    data = ModelCard(card).data
    assert data.to_dict().items() >= found.items()
    ModelCard(card).save("card.md")
    again = ModelCard.load("card.md")
    assert again.content == card
    assert ModelCardData(**again.data.to_dict()).to_yaml() == data.to_yaml()


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize(
    ("center", "term"), [(0, ""), (0.01, " + 0.01 (r_chosen + r_rejected)^2")], ids=["off", "on"]
)
def test_card_has_the_whole_loss(center: float, term: str) -> None:
    training = read_json(export.ADAPTER / "training.json")
    training["train"]["center_rewards"] = center
    write_json(export.ADAPTER / "training.json", training)
    seal(export.ADAPTER, export.BASE)
    assert f"\n-log sigmoid(r_chosen - r_rejected){term}.\n" in assemble_here()


@pytest.mark.usefixtures("ready")
def test_card_has_data_parameters_and_figures() -> None:
    card, metrics = assemble_here(), read_json(export.EVALUATED)
    training = read_json(export.ADAPTER / "training.json")
    assert f"| pairwise accuracy \\(95% interval\\) | {metrics['accuracy']:.4f} " in card
    files = read_json(export.BASE / "base.json")["files"] | training["data"]
    assert all(digest in card for digest in files.values())
    [parameters] = re.findall(r"```json\n(.*?)```", card, re.DOTALL)
    bits, half, full = map(training["base_parameters"].get, ("four_bits", "half", "full"))
    assert f"parameters, {bits:,} are in 4 bits, {half:,} in half and\n{full:,} in full" in card
    assert json.loads(parameters) == {
        name: training[name] for name in ("quantization", "lora", "train")
    }
