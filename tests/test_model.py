"""The reward model: quantization, the head, and what a reward depends on."""

import json
import random
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from reward.exporting.exported import exported_quantization
from reward.model import base, scoring
from reward.model.base import (
    Quantization,
    add_lora,
    head_of,
    load,
    load_base,
    load_stock,
    new_head,
    save,
    seal,
)
from reward.model.memory import TooLarge
from reward.model.packing import Pack, Texts, pack, tokens
from reward.model.scoring import as_in_transformers, rewards, score
from reward.outputs import digests, write_json
from reward.process import Fault
from tests.support import FAMILIES, ROOT, SEPARATE, chosen_and_rejected, fetched, pair_losses

NF4 = Quantization(bits=4, quant_type="nf4", double_quant=False, compute_dtype="float32")
PLAIN = Quantization(bits="none", quant_type="nf4", double_quant=False, compute_dtype="float32")
EOS = 0


def build(base: Path, quantization: Quantization = NF4, head_seed: int = 0) -> PeftModel:
    """A model as train builds it, but with non-zero adapters."""
    torch.manual_seed(0)
    model = load_base(base, quantization)
    new_head(model, head_seed)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    config.init_lora_weights = False
    return add_lora(model, config)


def some_pairs(count: int, seed: int = 0) -> list[Texts]:
    """Random pairs of 2 to 60 tokens with a shared prefix; in every third pair both end in EOS."""
    draw = random.Random(seed)
    pairs: list[Texts] = []
    for index in range(count):
        prefix = [draw.randrange(1, 1000) for _ in range(draw.randint(1, 20))]
        sides = [
            prefix + [draw.randrange(1, 1000) for _ in range(draw.randint(1, 40))] for _ in "jk"
        ]
        if index % 3 == 0:
            sides = [[*side, EOS] for side in sides]
        pairs.append(Texts(sides, len(prefix)))
    return pairs


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bits", [4, "none"])
def test_size_of_a_base_is_known_before_loading(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, bits: Any, double: bool
) -> None:
    quantization = Quantization(bits, "nf4", double, "float32")
    taken = 0
    for name, weight in load_base(tiny_base, quantization).named_parameters():
        if "score" not in name:
            taken += weight.nbytes
        if isinstance(weight, Params4bit):
            state = weight.quant_state
            taken += state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
    assert base.weight_bytes(tiny_base, quantization) == pytest.approx(taken, rel=0.01)
    monkeypatch.setattr(base, "memory", lambda: taken // 2)
    with pytest.raises(Fault, match=r"its weights take 0\.0 GB in .* free on the machine"):
        load_base(tiny_base, quantization)


def test_memory_that_runs_out_while_weights_are_quantized_is_recognized(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers catches the error, and raises another one that does not mention memory."""

    def quantized(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr(Params4bit, "to", quantized)
    with pytest.raises(TooLarge, match="memory ran out while they were loaded"):
        load_base(tiny_base, NF4)


def test_other_reason_why_weights_cannot_be_quantized_is_not_lost(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, bitsandbytes may have no library for the version of CUDA."""

    def quantized(*_: Any) -> Any:
        raise RuntimeError("no library for CUDA 99")

    monkeypatch.setattr(Params4bit, "to", quantized)
    with pytest.raises(RuntimeError, match="no library for CUDA 99"):
        load_base(tiny_base, NF4)


def quant_state(layer: Linear4bit) -> Any:
    """The quantization state of a layer."""
    assert isinstance(layer.weight, Params4bit)
    return layer.weight.quant_state


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the packed bytes of every 4-bit layer."""
    return {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- the base and the head -------------------------------------------------------------------


def test_exactly_the_projections_of_the_base_are_nf4(tiny_base: Path) -> None:
    model = load_base(tiny_base, NF4)
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    assert len(linear) == 2 * 7 + 1
    for name, module in linear.items():
        assert isinstance(module, Linear4bit) == (name != "score")
        if isinstance(module, Linear4bit):
            assert quant_state(module).quant_type == "nf4"
            assert not quant_state(module).nested
            assert module.compute_dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_quantization_follows_its_params(tiny_base: Path) -> None:
    fp4 = Quantization(bits=4, quant_type="fp4", double_quant=True, compute_dtype="bfloat16")
    model = load_base(tiny_base, fp4)
    states = [quant_state(m) for m in model.modules() if isinstance(m, Linear4bit)]
    assert {(state.quant_type, state.nested) for state in states} == {("fp4", True)}
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        (None, torch.float32),
        ((6, 1), torch.float32),
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_auto_picks_the_fast_dtype_of_the_gpu(
    capability: tuple[int, int] | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs that emulate bf16 claim to support it, unless emulation is excluded."""

    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or (capability or (0, 0)) >= (8, 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert Quantization(4, "nf4", False, "auto").dtype == dtype
    assert Quantization(4, "nf4", False, "float32").dtype == torch.float32


def test_gradients_in_float16_are_closer_to_float32_than_in_bfloat16(
    tiny_base: Path,
) -> None:
    """Even with a head as small as at first, gradients do not underflow without a loss scaler."""

    def gradient(dtype: Any) -> torch.Tensor:
        model = build(tiny_base, Quantization(4, "nf4", False, dtype))
        head_of(model.get_base_model()).weight.data.mul_(0.01)
        pair_losses(rewards(model, pack(some_pairs(4)))).mean().backward()
        found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat(found)

    exact = gradient("float32")
    in_fp16, in_bf16 = (
        ((gradient(dtype) - exact).norm() / exact.norm()).item()
        for dtype in ("float16", "bfloat16")
    )
    assert in_fp16 < 0.02
    assert in_fp16 < in_bf16


def test_bits_none_leaves_the_weights_unchanged(tiny_base: Path) -> None:
    from safetensors.torch import load_file

    model = load_base(tiny_base, PLAIN)
    stored = load_file(tiny_base / "model.safetensors")
    assert not any(isinstance(module, Linear4bit) for module in model.modules())
    for name, tensor in model.state_dict().items():
        if name != "score.weight":
            assert torch.equal(tensor, stored[name])


def test_nf4_rewards_match_the_dequantized_weights(tiny_base: Path) -> None:
    pairs = some_pairs(4)
    quantized = build(tiny_base)
    dense = build(tiny_base, PLAIN)
    sources = dict(quantized.named_modules())
    for name, module in dense.named_modules():
        source = sources[name]
        if isinstance(source, Linear4bit):
            weight = dequantize_4bit(source.weight.data, quant_state(source))
            assert isinstance(module, nn.Linear)
            assert not torch.equal(module.weight, weight)
            module.weight.data = weight
    found, expected = score(quantized, pairs, 4096), score(dense, pairs, 4096)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("quantization", [NF4, PLAIN])
def test_head_is_finite_trainable_fp32_and_not_quantized(
    tiny_base: Path, quantization: Quantization
) -> None:
    model = build(tiny_base, quantization)
    [(_, weight)] = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if "score" in name and parameter.requires_grad
    ]
    assert weight.dtype == torch.float32
    assert weight.shape == (1, 64)
    assert weight.isfinite().all()
    assert weight.std() > 0


def test_head_is_fp32_over_a_base_in_half_precision(tiny_base: Path) -> None:
    half = Quantization(bits=4, quant_type="nf4", double_quant=False, compute_dtype="bfloat16")
    model = build(tiny_base, half)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    chosen, _ = chosen_and_rejected(rewards(model, pack(some_pairs(2))))
    assert trained == {torch.float32}
    assert chosen.dtype == torch.float32


def test_head_has_its_own_seed(tiny_base: Path) -> None:
    one, again, other = (build(tiny_base, head_seed=seed).state_dict() for seed in (0, 0, 1))
    head = [name for name in one if "score.modules_to_save" in name]
    adapters = [name for name in one if "lora_A" in name]
    assert head
    assert adapters
    assert all(torch.equal(one[name], again[name]) for name in [*head, *adapters])
    assert not any(torch.equal(one[name], other[name]) for name in head)
    assert all(torch.equal(one[name], other[name]) for name in adapters)


def test_head_does_not_depend_on_the_global_random_state(tiny_base: Path) -> None:
    heads = []
    for seed in (3, 4):
        model = load_base(tiny_base, NF4)
        torch.manual_seed(seed)
        new_head(model, 5)
        heads.append(head_of(model).weight)
    assert torch.equal(*heads)


def test_unknown_targets_are_refused_with_the_known_ones(tiny_base: Path) -> None:
    model = load_base(tiny_base, NF4)
    with pytest.raises(Fault) as fault:
        add_lora(model, LoraConfig(target_modules=["q_proj", "query", "c_attn"]))
    assert "lora.target_modules names c_attn, query," in str(fault.value)
    assert "k_proj, o_proj, q_proj" in str(fault.value)


@pytest.mark.parametrize("quantization", [NF4, PLAIN])
@pytest.mark.parametrize("family", ["Phi-3", "GPT-NeoX", "GPT-2"])
def test_names_of_separate_projections_target_the_fused_one(
    family: str, quantization: Quantization, tmp_path: Path
) -> None:
    folder, [fused] = fetched(family, tmp_path), FAMILIES[family][2]
    model = add_lora(load_base(folder, quantization), LoraConfig(target_modules=SEPARATE))
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert len(adapted) == 3
    assert all(name.endswith(fused) for name in adapted)


@pytest.mark.parametrize("family", ["Qwen2, Qwen2.5", "OPT", "GPT-2"])
def test_all_linear_adapts_the_same_layers_as_peft(family: str, tmp_path: Path) -> None:
    def adapted(model: torch.nn.Module) -> set[str]:
        return {name for name, _ in model.named_parameters() if "lora_" in name}

    folder = fetched(family, tmp_path)
    lora = LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    with warnings.catch_warnings(action="ignore"):
        expected = adapted(get_peft_model(load_stock(folder, PLAIN), lora))
    model = add_lora(load_base(folder, NF4), LoraConfig(target_modules="all-linear"))
    assert adapted(model) == expected
    assert not any("score" in name for name in expected)


@pytest.mark.parametrize("quantization", [NF4, PLAIN])
@pytest.mark.parametrize("names", [["q_proj"], [*SEPARATE, "o_proj"], ["c_attn", "fc"]])
def test_unknown_targets_of_gpt2_are_refused_with_its_known_ones(
    names: list[str], quantization: Quantization, tmp_path: Path
) -> None:
    model = load_base(fetched("GPT-2", tmp_path), quantization)
    with pytest.raises(
        Fault, match=r"of GPT2For\w+ that can have an adapter are c_attn, c_fc, c_proj$"
    ) as fault:
        add_lora(model, LoraConfig(target_modules=names))
    assert f"lora.target_modules names {names[-1]}, but" in str(fault.value)


def test_only_adapters_and_head_are_trained(tiny_base: Path) -> None:
    trained = [name for name, p in build(tiny_base).named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2 + 1
    assert all("lora_" in name or "score" in name for name in trained)


def test_model_without_a_score_head_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(
            vocab_size=10,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(Fault, match="BertForSequenceClassification has no linear layer `score`"):
        load_base(tmp_path, PLAIN)


# --- rewards ---------------------------------------------------------------------------------


@torch.no_grad()
def alone(model: PeftModel, ids: Sequence[int]) -> float:
    """The reward of one unpadded text from transformers' stock classifier."""
    with as_in_transformers(model) as classifier:
        classifier.config.pad_token_id = None
        return float(classifier(input_ids=torch.tensor([ids])).logits.item())


@pytest.mark.parametrize("quantization", [NF4, PLAIN])
@pytest.mark.parametrize("tokens_per_pack", [1, 150, 10**6])
def test_reward_matches_the_text_alone_whatever_its_pack(
    tiny_base: Path, quantization: Quantization, tokens_per_pack: int
) -> None:
    model, pairs = build(tiny_base, quantization).eval(), some_pairs(6)
    expected = [alone(model, ids) for texts in pairs for ids in texts.ids]
    assert len({round(reward, 4) for reward in expected}) == 12
    assert score(model, pairs, tokens_per_pack).tolist() == pytest.approx(expected, abs=1e-5)


def test_eos_token_is_not_skipped(tiny_base: Path) -> None:
    model = build(tiny_base)
    short = Texts([[7, 8, 9], [7, 8, 9, EOS]], 2)
    longer = Texts([[*range(1, 30)], [5, 6]], 0)
    chosen, rejected = chosen_and_rejected(score(model, [short, longer], 10**6))
    model.eval()
    assert chosen[0].item() == pytest.approx(alone(model, [7, 8, 9]), abs=1e-5)
    assert rejected[0].item() == pytest.approx(alone(model, [7, 8, 9, EOS]), abs=1e-5)
    assert abs(chosen[0] - rejected[0]) > 1e-3


@pytest.mark.parametrize("room", [70, 150, 400])
def test_score_halves_its_packs_until_they_fit_in_memory(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    model, pairs = build(tiny_base), some_pairs(12)
    expected = score(model, pairs, 10**6)
    asked: list[int] = []

    def limited(model: PeftModel, batch: Pack) -> torch.Tensor:
        asked.append(batch.input_ids.shape[1])
        if asked[-1] > room:
            raise torch.OutOfMemoryError
        return rewards(model, batch)

    monkeypatch.setattr(scoring, "rewards", limited)
    found = score(model, pairs, 10**6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # Each text is computed once, and a shared prefix again only where its pair was divided.
    computed = sum(size for size in asked if size <= room)
    shared = sum(texts.prefix for texts in pairs)
    assert sum(map(tokens, pairs)) <= computed <= sum(map(tokens, pairs)) + shared


def test_prompt_too_long_for_memory_is_named(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(scoring, "rewards", never)
    model, pair = build(tiny_base).train(), Texts([[1, 2, 3], [1, 4]], 1)
    with pytest.raises(Fault, match=r"^scoring: out of memory for a text of 3 tokens; lower"):
        score(model, [pair, pair], 100)


def test_gradient_does_not_depend_on_packing(tiny_base: Path) -> None:
    pairs = some_pairs(6)

    def gradients(groups: list[list[Texts]]) -> list[torch.Tensor]:
        model = build(tiny_base)
        for group in groups:
            (pair_losses(rewards(model, pack(group))).sum() / len(pairs)).backward()
        return [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]

    together, apart = gradients([pairs]), gradients([[pair] for pair in pairs])
    assert len(together) == 2 * 2 * 2 + 1
    for one, other in zip(together, apart, strict=True):
        assert one.norm() > 0
        assert (one - other).norm() <= 1e-5 * one.norm()


@pytest.mark.parametrize("training", [True, False])
def test_score_keeps_the_order_of_pairs_and_the_mode_of_the_model(
    tiny_base: Path, training: bool
) -> None:
    model, pairs = build(tiny_base).train(training), some_pairs(12)
    chosen, rejected = chosen_and_rejected(score(model, pairs, 200))
    backward = chosen_and_rejected(score(model, pairs[::-1], 200))
    assert model.training is training
    assert not chosen.requires_grad
    assert chosen.shape == rejected.shape == (12,)
    torch.testing.assert_close(chosen, backward[0].flip(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(rejected, backward[1].flip(0), rtol=0, atol=1e-5)


def test_saved_model_has_the_same_rewards_and_bytes(tiny_base: Path, tmp_path: Path) -> None:
    model, pairs = build(tiny_base), some_pairs(5)
    save(model, tmp_path / "one", "models/base", NF4)
    save(build(tiny_base), tmp_path / "two", "models/base", NF4)
    for name in ("one", "two"):
        seal(tmp_path / name, tiny_base)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    files = {"adapter_config.json", "adapter_model.safetensors", "digests.json"}
    files |= {"quantization.json"}
    assert digests(tmp_path / "one").keys() == files
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "models/base"
    assert config["target_modules"] == ["q_proj", "v_proj"]
    loaded = load(tiny_base, tmp_path / "one", NF4)
    assert not loaded.training
    assert torch.equal(score(loaded, pairs, 200), score(model, pairs, 200))


def test_loading_the_libraries_prints_nothing() -> None:
    """In a fresh process, like a stage; bitsandbytes would print a warning on some processors."""
    command = [sys.executable, "-W", "error", "-c", "import stages.train"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (found.stdout, found.stderr) == ("", "")


# --- bitsandbytes on processors with AVX512-BF16 ---------------------------------------------


@pytest.fixture
def bf16_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build layers as on a processor with AVX512-BF16, whatever the real processor is."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)


@pytest.mark.usefixtures("bf16_processor")
def test_without_the_guard_a_pass_in_eval_mode_rewrites_the_weights(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "keep_weights_unpacked", lambda model: None)

    def product(x: torch.Tensor, *_: Any, quant_state: Any, **__: Any) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], quant_state.shape[0])

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", product)
    model = build(tiny_base)
    before = weights_of(model)
    with torch.no_grad(), as_in_transformers(model.eval()) as classifier:
        classifier(input_ids=torch.tensor([[5, 6, 7]]))
    assert not same(before, weights_of(model))


@pytest.mark.usefixtures("bf16_processor")
def test_with_the_guard_a_pass_in_eval_mode_keeps_the_weights(tiny_base: Path) -> None:
    model, pairs = build(tiny_base), some_pairs(3)
    before = weights_of(model)
    with_gradient = rewards(model, pack(pairs)).detach()
    without = score(model, pairs, 10**6)
    assert same(before, weights_of(model))
    torch.testing.assert_close(without, with_gradient, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("bf16_processor")
def test_evaluation_does_not_affect_training(tiny_base: Path) -> None:
    pairs = some_pairs(4)

    def gradients(evaluated: bool) -> list[torch.Tensor]:
        model = build(tiny_base).train()
        if evaluated:
            score(model, pairs, 4096)
        pair_losses(rewards(model, pack(pairs))).mean().backward()
        return [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)


def test_adapter_for_another_quantization_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    save(build(tiny_base), tmp_path, "models/base", NF4)
    seal(tmp_path, tiny_base)
    load(tiny_base, tmp_path, NF4)
    with pytest.raises(Fault, match=r"trained on a base loaded with .*nf4.*but here it would be"):
        load(tiny_base, tmp_path, Quantization(4, "nf4", False, "bfloat16"))


def test_adapter_for_another_dtype_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    fp32, bf16 = Quantization.unquantized("float32"), Quantization.unquantized("bfloat16")
    save(build(tiny_base, quantization=fp32), tmp_path, "models/base", fp32)
    seal(tmp_path, tiny_base)
    load(tiny_base, tmp_path, Quantization.unquantized("auto"))
    for other in (bf16, NF4):
        with pytest.raises(Fault, match=r"loaded with {'dtype': 'float32'}, but here it would be"):
            load(tiny_base, tmp_path, other)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_exported_quantization_is_that_of_training(
    kind: Literal["nf4", "fp4"], double: bool, tmp_path: Path
) -> None:
    trained = Quantization(4, kind, double, "bfloat16")
    for each in (trained, Quantization.unquantized("bfloat16")):
        write_json(tmp_path / "quantization.json", each.record)
        write_json(tmp_path / "reward.json", {"dtype": "bfloat16"})
        assert exported_quantization(tmp_path) == each
