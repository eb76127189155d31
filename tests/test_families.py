"""The families of docs/models.md: conversion of their bases, and what is quantized."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from reward.model.base import (
    Quantization,
    adaptable,
    add_lora,
    load_base,
    precisions,
    weight_bytes,
)
from reward.model.converting import scaled
from reward.model.scoring import require_exact, score
from reward.model.suitable import problem_with
from reward.outputs import digest, read_json, write_json
from reward.process import Fault
from stages import fetch
from stages.train import report_precisions
from tests.support import FAMILIES, ROOT, SetParams, fetched, random_prompts, save_family

CONVERTED = {
    "Gemma 3": ("Gemma3ForCausalLM", "gemma3_text"),
    "Granite": ("LlamaForCausalLM", "llama"),
}
IDS = torch.arange(5, 45)[None]


@pytest.mark.parametrize("language", ["", ".zh"])
def test_table_in_the_docs_lists_the_tested_families(language: str) -> None:
    text = (ROOT / f"docs/models{language}.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^`\n]+?) \| `", text, re.MULTILINE)
    assert rows == list(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_configuration_of_every_family_is_accepted(family: str, tmp_path: Path) -> None:
    assert problem_with(read_json(fetched(family, tmp_path) / "config.json")) is None


@pytest.mark.parametrize(
    ("family", "found"),
    [("Llama 2", "default"), ("Llama 3, 3.1, 3.2", "llama3"), ("Phi-4-mini", "longrope")],
)
def test_families_have_the_rope_type_they_are_listed_for(
    family: str, found: str, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(fetched(family, tmp_path))
    assert model.model.rotary_emb.rope_type == found


@pytest.mark.parametrize("rope", ["dynamic", "linear", "yarn"])
def test_scaled_rope_is_accepted(rope: str) -> None:
    scaling = {"rope_type": rope, "factor": 2.0, "original_max_position_embeddings": 64}
    assert problem_with({"model_type": "llama", "rope_scaling": scaling}) is None
    refused = problem_with({"model_type": "stablelm", "rope_scaling": scaling})
    assert "does not receive the layout of its row" in str(refused)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "opt", "layerdrop": 0.9},
        {"model_type": "llama", "attn_implementation": "eager", "output_attentions": False},
        {
            "model_type": "cohere_compass_text",
            "pooling": "eos",
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        },
    ],
)
def test_settings_that_change_no_reward_are_accepted(config: dict[str, Any]) -> None:
    assert problem_with(config) is None


@pytest.fixture
def source(tmp_path: Path, tiny_base: Path) -> Path:
    """A model folder that so far has only the embedded tokenizer."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base / name, folder)
    return folder


# --- conversion ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", CONVERTED)
def test_converted_base_computes_the_same_logits(
    family: str, source: Path, set_params: SetParams
) -> None:
    """All logits of the published model match those of the model that fetch writes."""
    model = save_family(family, source)
    set_params("base", name=str(source))
    fetch.main()
    here = AutoModelForCausalLM.from_pretrained(fetch.BASE).eval()
    expected, found = (each(input_ids=IDS).logits for each in (model, here))
    assert (found - expected).norm() < 1e-5 * expected.norm()
    config = read_json(fetch.BASE / "config.json")
    assert (config["architectures"], config["model_type"]) == (
        [CONVERTED[family][0]],
        CONVERTED[family][1],
    )


@pytest.mark.parametrize("family", CONVERTED)
def test_converted_base_is_recorded_and_its_source_is_checked(
    family: str, source: Path, set_params: SetParams
) -> None:
    from stages.train import require_same_source

    save_family(family, source)
    set_params("base", name=str(source))
    fetch.main()
    base = read_json(fetch.BASE / "base.json")
    assert family.replace(" ", "") in base["converted"]
    for name in ("config.json", "model.safetensors"):
        assert base["source"][name] == digest(source / name) != base["files"][name]
    require_same_source()
    (source / "model.safetensors").write_bytes(b"others")
    with pytest.raises(Fault, match=r"has changed since it was copied .*\(model.safetensors\)"):
        require_same_source()


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_only_the_language_model_of_gemma_3_is_kept(
    prefix: str, source: Path, set_params: SetParams
) -> None:
    """The weights are in shards, one with only vision weights, under old or new names."""
    from safetensors.torch import save_file

    save_family("Gemma 3", source)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    text = {
        name.replace("language_model.model.", prefix): tensor
        for name, tensor in tensors.items()
        if "language_model" in name
    }
    shards = {
        "one.safetensors": dict(list(text.items())[::2]),
        "two.safetensors": dict(list(text.items())[1::2]),
        "vision.safetensors": {n: t for n, t in tensors.items() if "language_model" not in n},
    }
    for name, content in shards.items():
        save_file(content, source / name)
    places = {tensor: name for name, content in shards.items() for tensor in content}
    write_json(source / fetch.INDEX, {"weight_map": places})
    set_params("base", name=str(source))
    fetch.main()
    assert sorted(path.name for path in fetch.BASE.glob("*.safetensors")) == [
        "one.safetensors",
        "two.safetensors",
    ]
    index = read_json(fetch.BASE / fetch.INDEX)["weight_map"]
    assert {name.removeprefix("model.") for name in index} == {
        name.removeprefix(prefix) for name in text
    }
    given: Any = AutoModelForCausalLM.from_pretrained(fetch.BASE, output_loading_info=True)
    _, loading = given
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]


def test_model_without_its_text_part_is_refused(source: Path, set_params: SetParams) -> None:
    from safetensors.torch import save_file

    save_family("Gemma 3", source)
    save_file({"vision_tower.weight": torch.zeros(3)}, source / "model.safetensors")
    set_params("base", name=str(source))
    with pytest.raises(Fault, match=r"has no weights of the text part of Gemma3For.*, expected"):
        fetch.main()


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_granite_is_converted_with_tied_and_untied_embeddings(tied: bool, tmp_path: Path) -> None:
    more = {"tie_word_embeddings": tied, "attention_bias": True}
    model = save_family("Granite", tmp_path / "other", **more)
    here = AutoModelForCausalLM.from_pretrained(fetched("Granite", tmp_path, **more)).eval()
    expected, found = (each(input_ids=IDS).logits for each in (model, here))
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_scaling_never_rounds_a_weight() -> None:
    """A power of two keeps bf16; any other factor converts to fp32."""
    weights = torch.randn(100).to(torch.bfloat16)
    assert scaled(weights, 1) is weights
    assert scaled(weights, 0.125).dtype == torch.bfloat16
    assert scaled(weights, 0.22).dtype == torch.float32
    assert torch.equal(scaled(weights, 0.22), weights.float() * 0.22)


# --- quantized weights -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["Llama 3, 3.1, 3.2", "GPT-2", "Qwen3-MoE"])
def test_parameters_are_counted_by_precision(
    family: str, dtype: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compares with the dense model: linear layers are in 4 bits, and fused experts are not."""
    folder = fetched(family, tmp_path)
    dense = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).base_model
    linear = [each for each in dense.modules() if isinstance(each, (torch.nn.Linear, Conv1D))]
    quantized = sum(each.weight.numel() for each in linear)
    rest = sum(each.numel() for each in dense.parameters()) - quantized
    quantization = Quantization(4, "nf4", False, dtype)
    base = load_base(folder, quantization)
    model = add_lora(base, LoraConfig(target_modules=FAMILIES[family][2]))
    expected = {"four_bits": quantized, "half": 0, "full": rest}
    if dtype == "bfloat16":
        expected |= {"half": rest, "full": 0}
    assert precisions(model) == expected
    report_precisions(model, quantization)
    printed = capsys.readouterr().out
    assert (
        f"base       {quantized:,} parameters in 4 bits, {expected['half']:,} in half and"
        in printed
    )
    experts = 2 * 8 * 3 * 32 * 64  # two layers of 8 experts, each of three matrices
    assert (f"note       {experts:,} parameters are in experts, which" in printed) == (
        family == "Qwen3-MoE"
    )


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("Qwen3-MoE", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("DeepSeek-V2", {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
    ],
)
def test_only_attention_of_a_mixture_is_adapted(
    family: str, names: set[str], tmp_path: Path
) -> None:
    """PEFT would adapt the fused experts in place of the dense layer and the shared experts."""
    base = load_base(fetched(family, tmp_path), Quantization(4, "nf4", False, "float32"))
    with pytest.raises(Fault, match=r"target_modules names up_proj, but the layers .* k"):
        add_lora(base, LoraConfig(target_modules=["q_proj", "up_proj"]))
    model = add_lora(base, LoraConfig(target_modules="all-linear"))
    config: Any = model.peft_config["default"]
    assert config.target_modules == names
    assert not config.target_parameters


def test_routers_and_unusual_linear_layers_get_no_adapter(tmp_path: Path) -> None:
    class Router(torch.nn.Linear):
        """Returns several tensors, as that of PhiMoE."""

    base = load_base(fetched("Qwen3-MoE", tmp_path), Quantization.unquantized("float32"))
    decoder: Any = base.base_model
    layer = decoder.layers[1]
    layer.mlp.wg, layer.mlp.other = torch.nn.Linear(64, 8), Router(64, 8)
    layer.mlp.router = torch.nn.Sequential(torch.nn.Linear(64, 8))
    assert adaptable(base) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_null_instead_of_a_recipe_leaves_a_base_to_be_quantized(tmp_path: Path) -> None:
    folder = fetched("Llama 2", tmp_path)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"quantization_config": None})
    quantization = Quantization(4, "nf4", False, "float32")
    assert weight_bytes(folder, quantization) < 0.5 * weight_bytes(
        folder, Quantization.unquantized("float32")
    )
    model = add_lora(load_base(folder, quantization), LoraConfig(target_modules=["q_proj"]))
    assert precisions(model)["four_bits"] > 0
    pairs = random_prompts(0)
    assert len(score(model, pairs, 4096)) == sum(len(texts.ids) for texts in pairs)
    require_exact(model, pairs)


def test_nothing_is_in_4_bits_without_quantization(tmp_path: Path) -> None:
    base = load_base(fetched("Mixtral", tmp_path), Quantization.unquantized("float32"))
    model = add_lora(base, LoraConfig(target_modules=["q_proj"]))
    assert precisions(model)["four_bits"] == precisions(model)["half"] == 0
