"""The layers of a frozen base compute the same as PyTorch, bitsandbytes and PEFT."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gpt_neox import modeling_gpt_neox

from reward.model import layers
from reward.model.base import Quantization, add_lora, load_base, new_head
from reward.model.scoring import as_in_transformers
from reward.model.swapping import Swapped, swapped_out
from tests.support import compute_as_on_a_gpu

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ADAPTED = ["q_proj", "v_proj", "down_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
# The swapped modules that map one tensor to one tensor.
PARTS = (layers.AdaptedLayer, layers.FrozenLayer, layers.Norm, layers.Gated)


@pytest.fixture(params=["of a CPU", "of a GPU"])
def operations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations of a CPU or of a GPU; those of a GPU run on a CPU here."""
    if request.param == "of a GPU":
        compute_as_on_a_gpu(monkeypatch)


def features_of(module: Any) -> int:
    """The size of a module's input."""
    first = getattr(module, "gate_proj", module)
    size: int = first.in_features if hasattr(first, "in_features") else len(first.weight)
    return size


def reward_model(
    folder: Path, family: str = "qwen2", quantization: str = "4", dropout: float = 0.0, **more: Any
) -> PeftModel:
    """A tiny random model with non-trivial adapters and norms."""
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE))
    for name, parameter in causal.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    causal.save_pretrained(folder)
    bits: Any = 4 if quantization == "4" else "none"
    base = load_base(folder, Quantization(bits, "nf4", True, more.get("dtype", "float32")))
    new_head(base, 0)
    config = LoraConfig(r=4, lora_alpha=32, lora_dropout=dropout, target_modules=ADAPTED)
    config.init_lora_weights = False
    return add_lora(base, config)


def modules(model: PeftModel, kind: type | tuple[type, ...]) -> dict[str, Any]:
    return {name: each for name, each in model.named_modules() if isinstance(each, kind)}


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def outcome(function: Any, x: Tensor, seed: int = 0, of: Any = None) -> list[Tensor]:
    """The output of a module, then the gradients of its input and of its trained parameters.

    With `of`, the function computes what this module does, and the module has the parameters.
    """
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    trained = [p for p in (of or function).parameters() if p.requires_grad]
    found = function(x)
    weights = torch.linspace(-1, 2, found.numel()).view_as(found).to(found)
    return [found.detach(), *torch.autograd.grad((found * weights).sum(), [x, *trained])]


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 33, 57), (70, 128, 96)])
def test_product_matches_fp64_up_to_fp32_rounding(
    shape: tuple[int, int, int], onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "ONEDNN", onednn and layers.ONEDNN)
    rows, outputs, inputs = shape
    torch.manual_seed(1)
    x, weight, bias = (
        torch.randn(1, rows, inputs),
        torch.randn(outputs, inputs),
        torch.randn(outputs),
    )
    for given in (weight, weight.T.contiguous().T):
        expected = linear(x.double(), given.double(), bias.double())
        assert relative(layers.product(x, given, bias), expected) < 1e-6
    assert relative(layers.product(x, weight), linear(x.double(), weight.double())) < 1e-6


@pytest.mark.usefixtures("operations")
@pytest.mark.parametrize("quantization", ["4", "none"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt_neox", "phi"])
@pytest.mark.parametrize("training", [True, False])
def test_swapped_layers_match_the_original_ones(
    tmp_path: Path,
    family: str,
    quantization: str,
    training: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if family == "gpt_neox":
        monkeypatch.setattr(f"{__name__}.ADAPTED", ["query_key_value"])
    if family == "phi":
        monkeypatch.setattr(f"{__name__}.ADAPTED", ["q_proj", "fc1"])
    model = reward_model(tmp_path, family, quantization).train(training)
    compared = modules(model, PARTS)
    for name, module in compared.items():
        x = torch.randn(1, 9, features_of(module), generator=torch.Generator().manual_seed(2))
        found = outcome(module, x)
        with as_in_transformers(model):
            expected = outcome(module, x)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert relative(one, other) < 2e-6, name
    linears = modules(model, (nn.Linear, LoraLayer))
    assert {name for name in linears if ".layers." in name and "lora_" not in name} <= {*compared}


def test_norms_of_a_decoder_are_swapped(tmp_path: Path) -> None:
    norms = {n: m for n, m in reward_model(tmp_path).named_modules() if n.endswith("norm")}
    assert len(norms) == 5
    assert all(isinstance(module, Swapped) for module in norms.values())


def test_other_kinds_of_norms_are_not_swapped() -> None:
    """Gemma's norm has weights around 0; one that subtracts the mean can look like RMSNorm."""

    class Centered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.layer_norm(x, (8,), self.weight)

    assert not layers.is_rms_norm(Centered())
    for family in ("gemma", "gpt_neox"):
        causal = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE))
        assert not any(layers.is_rms_norm(module) for module in causal.modules())


@pytest.mark.usefixtures("operations")
def test_dropout_uses_the_same_random_numbers_as_peft(tmp_path: Path) -> None:
    """Output and gradients are therefore the same; in eval mode there is no dropout."""
    model = reward_model(tmp_path, dropout=0.5)
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(3))
    layer = next(module for module in modules(model, LoraLayer).values())
    for training in (True, False):
        model.train(training)
        found = outcome(layer, x)
        with as_in_transformers(model):
            expected = outcome(layer, x)
        for one, other in zip(found, expected, strict=True):
            assert relative(one, other) < 2e-6
    model.train()
    assert relative(outcome(layer, x, seed=0)[0], outcome(layer, x, seed=1)[0]) > 0.01


def test_forward_set_by_others_is_kept(tmp_path: Path) -> None:
    """Accelerate's hooks set one. Our classes are swapped out, and restored even after an error."""
    model = reward_model(tmp_path)
    layer = next(module for module in modules(model, LoraLayer).values())
    theirs = layer.forward = lambda x: x
    before = {name: type(module) for name, module in model.named_modules()}
    with swapped_out(model):
        assert not any(isinstance(module, Swapped) for module in model.modules())
        assert layer.forward is theirs
    with contextlib.suppress(ZeroDivisionError), swapped_out(model):
        raise ZeroDivisionError
    assert layer.forward is theirs
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert any(isinstance(module, Swapped) for module in model.modules())


def test_swapping_keeps_parameters_and_their_names(tmp_path: Path) -> None:
    model = reward_model(tmp_path)
    ours = dict(model.named_parameters())
    with swapped_out(model):
        assert list(ours.items()) == list(model.named_parameters())


def test_disabled_adapter_adds_nothing(tmp_path: Path) -> None:
    model = reward_model(tmp_path).eval()
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(4))
    layer = next(module for module in modules(model, LoraLayer).values())
    with model.disable_adapter():
        assert torch.equal(layer(x), layer.base_layer(x))
    assert not torch.equal(layer(x), layer.base_layer(x))


# --- projections of attention ----------------------------------------------------------------


@pytest.fixture
def of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(f"{__name__}.ADAPTED", [*layers.JOINED])


def projections(model: PeftModel) -> list[Any]:
    """The projections of the first layer to queries, keys and values."""
    attention = next(each for each in model.modules() if hasattr(each, "q_proj"))
    return [getattr(attention, name) for name in layers.JOINED]


def projected(model: PeftModel, x: Tensor, of_values: Tensor) -> list[Tensor]:
    """Queries, keys and values, of which one changes in place, then all gradients.

    `of_values` is the input of the values, the same tensor as `x` or an equal one.
    """
    q, k, v = projections(model)
    found = [q(x), k(x), v(of_values)]
    found[1].clamp_(-1, 1)
    weights = [torch.linspace(-1, 2, each.numel()).view_as(each).to(each) for each in found]
    trained = [p for each in (q, k, v) for p in each.parameters() if p.requires_grad]
    loss = torch.stack([(each * w).sum() for each, w in zip(found, weights, strict=True)]).sum()
    return [*(each.detach() for each in found), *torch.autograd.grad(loss, [x, *trained])]


@pytest.mark.usefixtures("of_a_gpu")
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 2e-6), ("bfloat16", 0.01)])
@pytest.mark.parametrize(("family", "quantization"), [("qwen2", "4"), ("llama", "none")])
def test_projections_computed_together_match_separate_ones(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    quantization: str,
    dtype: str,
    rounding: float,
    same: bool,
) -> None:
    """Those of Qwen2 have biases. If the values' input is another tensor, they are separate."""
    model = reward_model(tmp_path, family, quantization, dtype=dtype)
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(5)).to(model.dtype)
    x.requires_grad_()
    calls: list[Any] = []
    product = layers.product

    def counted(*given: Any) -> Tensor:
        calls.append(given)
        return product(*given)

    monkeypatch.setattr(layers, "product", counted)
    found = projected(model, x, x if same else x.view_as(x))
    assert len(calls) == (2 if same else 4)
    joint = projections(model)[0].joint
    assert same == (joint.x is None and not joint.waiting)
    for each in projections(model):
        monkeypatch.setattr(each, "joint", None)
    expected = projected(model, x, x)
    assert len(calls) == (2 if same else 4) + 6
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert relative(one.float(), other.float()) < rounding


@pytest.mark.usefixtures("of_a_gpu")
@pytest.mark.parametrize(
    ("changed", "together"),
    [
        ({}, True),
        ({"lora_dropout": 0.1}, False),
        ({"alpha_pattern": {"k_proj": 3}}, False),
        ({"target_modules": ["q_proj", "v_proj"]}, False),
        ({"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 16}}, True),
    ],
)
def test_only_adapters_of_one_scaling_without_dropout_are_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], together: bool
) -> None:
    original = LoraConfig
    monkeypatch.setattr(f"{__name__}.LoraConfig", lambda **given: original(**given | changed))
    model = reward_model(tmp_path)
    found = [getattr(each, "joint", None) for each in projections(model)]
    assert len({*found}) == 1
    assert (None not in found) == together


@pytest.mark.parametrize("enough", [True, False])
def test_dequantized_weights_are_kept_if_there_is_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enough: bool
) -> None:
    """They are 7 projections per layer. The values are the same, and so is the state dict."""
    attention, mlp = 64 * (64 + 32 + 32) + 64 * 64, 3 * 64 * 96
    needed = 4 * 2 * (attention + mlp)
    monkeypatch.setattr(f"{__name__}.ADAPTED", [*layers.JOINED])
    compute_as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(layers, "memory_of", lambda device: 16 * needed - (not enough))
    model = reward_model(tmp_path)
    kept = [each for each in modules(model, Linear4bit).values() if "kept" in vars(each)]
    joints = {each.joint for each in projections(model)} - {None}
    assert (len(kept), len(joints)) == ((8, 1) if enough else (0, 0))
    assert not [name for name in model.state_dict() if "kept" in name]
    frozen = [each for each in kept if each.in_features == 64]
    x = torch.randn(1, 9, 64)
    with monkeypatch.context() as patch:
        patch.delattr(layers, "dequantize_4bit")
        found = [outcome(each, x) for each in frozen]
    for each in kept:
        del each.kept
    for one, layer in zip(found, frozen, strict=True):
        assert all(map(torch.equal, one, outcome(layer, x)))


# --- rotary embedding ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 6])
def test_rotation_and_its_gradient_match_transformers(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, heads, 9, 16).to(dtype).requires_grad_() for heads in (4, 2))
    angles = torch.randn(1, 9, width // 2).repeat(1, 1, 2)
    turn = angles.cos().to(dtype), angles.sin().to(dtype)
    found, stock = layers.rotate(q, k, *turn), modeling_gpt_neox.apply_rotary_pos_emb(q, k, *turn)
    weights = [torch.randn_like(each) for each in found]
    rounding = 1e-6 if dtype == torch.float32 else 0.01
    for one, other in zip(
        (*found, *torch.autograd.grad(found, (q, k), weights)),
        (*stock, *torch.autograd.grad(stock, (q, k), weights)),
        strict=True,
    ):
        assert one.dtype == other.dtype
        assert relative(one.float(), other.float()) < rounding


@pytest.mark.parametrize(
    ("family", "swapped"),
    [("llama", True), ("gpt_neox", True), ("cohere", False), ("gpt_oss", False), ("gpt2", False)],
)
def test_only_attention_that_rotates_halves_is_swapped(family: str, swapped: bool) -> None:
    """Cohere rotates neighbours, gpt-oss has another function, and GPT-2 does not rotate."""
    causal = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE))
    found = [type(each).__name__ for each in causal.modules() if layers.rotates_halves(each)]
    assert len(found) == (2 if swapped else 0)
    assert all(name.endswith("Attention") for name in found)


# --- SwiGLU ----------------------------------------------------------------------------------


def test_swiglu_and_its_gradients_match_pytorch() -> None:
    torch.manual_seed(0)
    gate, up = (30 * torch.randn(3, 50, dtype=torch.float64) for _ in range(2))
    gate[0, :2] = torch.tensor([-1000.0, 1000.0])
    exact = [each.clone().requires_grad_() for each in (gate, up)]
    expected = silu(exact[0]) * exact[1]
    direction = torch.randn(3, 50, dtype=torch.float64)
    ours = [each.float().requires_grad_() for each in (gate, up)]
    found = layers.Gate.apply(*ours)
    assert relative(found.double(), expected) < 1e-6
    for one, other in zip(
        torch.autograd.grad(found, ours, direction.float()),
        torch.autograd.grad(expected, exact, direction),
        strict=True,
    ):
        assert relative(one.double(), other) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_has_the_same_bytes_as_pytorch_on_a_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up = ((4 * torch.randn(3, 50)).to(dtype).requires_grad_() for _ in range(2))
    found, expected = layers.Gate.apply(gate, up), silu(gate) * up
    direction = torch.randn(3, 50).to(dtype)
    assert torch.equal(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, (gate, up), direction),
        torch.autograd.grad(expected, (gate, up), direction),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_gate_saves_only_its_inputs_for_backward() -> None:
    kept: list[Tensor] = []
    gate, up = (torch.randn(3, 50).bfloat16().requires_grad_() for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda nothing: gate):
        layers.Gate.apply(gate, up)
    assert [each.data_ptr() for each in kept] == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.parametrize(
    ("family", "swapped"), [("llama", True), ("gemma", False), ("phi", False), ("gpt2", False)]
)
def test_only_mlps_with_swiglu_are_swapped(family: str, swapped: bool) -> None:
    """Gemma has GELU in place of SiLU; Phi and GPT-2 have no gate."""
    causal = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE))
    found = [type(each).__name__ for each in causal.modules() if layers.is_swiglu(each)]
    assert found == (["LlamaMLP"] * 2 if swapped else [])


def test_mlp_with_another_order_of_its_parts_is_not_swapped() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
            self.act_fn = nn.SiLU()

        def forward(self, x: Tensor) -> Any:
            return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))

    assert not layers.is_swiglu(Reversed())


# --- half precision --------------------------------------------------------------------------


def by_definition(module: Any) -> Callable[[Tensor], Tensor]:
    """A linear layer with or without an adapter, an RMS norm or an MLP, by definition, in fp64."""

    def linear_layer(x: Tensor) -> Tensor:
        base: Any = getattr(module, "base_layer", module)
        found = x.double() @ layers.dense(base).double().T
        if base.bias is not None:
            found = found + base.bias.double()
        if isinstance(module, LoraLayer):
            lora: Any = module
            a, b = (part["default"].weight.double() for part in (lora.lora_A, lora.lora_B))
            found = found + lora.scaling["default"] * (x.double() @ a.T @ b.T)
        return found

    def norm(x: Tensor) -> Tensor:
        size = x.double().square().mean(-1, keepdim=True) + module.variance_epsilon
        return module.weight.double() * x.double() / size.sqrt()

    def mlp(x: Tensor) -> Tensor:
        gate, up, down = (by_definition(module.get_submodule(name)) for name in MLP)
        return down(silu(gate(x)) * up(x))

    if hasattr(module, "gate_proj"):
        return mlp
    return norm if hasattr(module, "variance_epsilon") else linear_layer


@pytest.mark.usefixtures("operations")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("family", "quantization"), [("qwen2", "4"), ("llama", "none")])
@pytest.mark.parametrize("training", [True, False])
def test_layers_in_half_precision_are_as_close_to_the_definition_as_the_original_ones(
    tmp_path: Path,
    family: str,
    quantization: str,
    training: bool,
    dtype: str,
) -> None:
    """Output, gradient of the input, and gradients of adapters, which are fp32.

    The original layers run in automatic mixed precision, which rounds adapters for products, too.
    """
    model = reward_model(tmp_path, family, quantization, dtype=dtype).train(training)
    kinds = set()
    for name, module in modules(model, PARTS).items():
        x = torch.randn(1, 40, features_of(module), generator=torch.Generator().manual_seed(2))
        x = x.to(getattr(torch, dtype))
        found, expected = outcome(module, x), outcome(by_definition(module), x.double(), of=module)
        with as_in_transformers(model), torch.autocast("cpu", x.dtype):
            stock = outcome(module, x)
        assert [each.dtype for each in found] == [each.dtype for each in stock]
        for ours, theirs, exact in zip(found, stock, expected, strict=True):
            rounding = relative(theirs.double(), exact.double())
            assert relative(ours.double(), exact.double()) < 1.05 * rounding + 1e-6, name
            assert rounding < 0.01, name
        kinds.add(type(module).__mro__[1])
    assert kinds == {*PARTS}


@pytest.mark.usefixtures("operations")
def test_dropout_in_half_precision_drops_the_same_as_peft(tmp_path: Path) -> None:
    model = reward_model(tmp_path, dropout=0.5, dtype="bfloat16").train()
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    layer = next(module for module in modules(model, LoraLayer).values())
    found = outcome(layer, x)
    with as_in_transformers(model):
        expected = outcome(layer, x)
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 0.02
    assert relative(outcome(layer, x, seed=1)[0], expected[0]) > 0.1


def test_small_gradients_do_not_underflow_in_the_adapters_of_an_fp16_base(tmp_path: Path) -> None:
    """Adapters have no gradient scaler. The smallest number of fp16 is 2^-24."""
    model = reward_model(tmp_path, quantization="none", dtype="float16")
    layer: Any = next(iter(modules(model, layers.AdaptedLayer).values()))
    torch.manual_seed(0)
    x = torch.randn(1, 40, layer.in_features).half()
    found, exact = layer(x), by_definition(layer)(x.double())
    direction = torch.randint(0, 2, found.shape).mul(2).sub(1).half() * 2**-23
    trained = [part["default"].weight for part in (layer.lora_A, layer.lora_B)]
    for one, other in zip(
        torch.autograd.grad(found, trained, direction),
        torch.autograd.grad(exact, trained, direction.double()),
        strict=True,
    ):
        assert relative(one, other) < 0.01


def test_tensors_saved_for_backward_are_in_half_precision(tmp_path: Path) -> None:
    """The exceptions are small: adapters, [rank, size], and one number per row of a norm."""
    model = reward_model(tmp_path, dtype="bfloat16").train()
    x = torch.randn(1, 50, 64).bfloat16().requires_grad_()
    for name, module in modules(model, PARTS).items():
        if "down_proj" in name:
            continue
        kept: list[Tensor] = []

        def keep(tensor: Tensor, to: list[Tensor] = kept) -> Tensor:
            to.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module(x)
        wide = [each for each in kept if each.dtype == torch.float32]
        assert all(each.numel() <= 4 * 96 for each in wide), name


# --- memory ----------------------------------------------------------------------------------


def test_frozen_layer_saves_nothing_for_backward(tmp_path: Path) -> None:
    """It saves no activation, and no copy of the dequantized weights."""
    model = reward_model(tmp_path)
    layer = next(
        module for name, module in modules(model, Linear4bit).items() if name.endswith("gate_proj")
    )
    x = torch.randn(1, 9, 64, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        layer(x)
    assert kept == []
