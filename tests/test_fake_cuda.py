"""The path of a GPU without a GPU: devices, dtypes and waiting.

Tensors here say that they are on `cuda`, but hold their numbers on the CPU, where all operations
run. An operation that mixes both devices fails, as it does on a GPU. Operations for which the CPU
would wait until the GPU has finished its queue are recorded. Kernels that PyTorch has only for a
GPU are replaced by their formulas.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

from reward.model import attention, kernels, layers, scoring, trainer
from reward.model.scoring import score
from reward.model.steps import Step
from reward.model.trainer import RewardTrainer
from stages import preprocess
from tests import varlen
from tests.support import SetParams, new_trainer, random_prompts, write_pairs

GPU, CPU, META = map(torch.device, ("cuda:0", "cpu", "meta"))
aten = torch.ops.aten
# Operations whose result, or its size, the CPU has to know.
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class OnGpu(Tensor):
    """A tensor on the GPU; `held` has its numbers, on the CPU.

    PyTorch's C++ code takes it for a tensor on `meta`, because it cannot handle tensors on a GPU
    for which it was not built.
    """

    held: Tensor
    device = GPU
    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGpu":
        found: OnGpu = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=META,
        )
        found.held = held
        return found

    @classmethod
    def __torch_dispatch__(cls, operation: Any, *_: Any) -> Any:
        raise AssertionError(f"{operation} outside of the context Gpu")


class Gpu(TorchDispatchMode):
    """The context in which operations on the GPU's tensors run; `waits` has those that waited.

    Operations that need the CPU's tensors only are unchanged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        named = dict(named or {})
        given, _ = tree_flatten((arguments, named))
        tensors = [each for each in given if isinstance(each, Tensor)]
        here = [each for each in tensors if isinstance(each, OnGpu)]
        to = torch.device(named.get("device") or (META if here else CPU))
        if not here and to == CPU:
            return operation(*arguments, **named)
        kind = operation.overloadpacket
        if kind in (aten._to_copy, aten.copy_):
            self.note_copy(kind, arguments, named, to)
        elif kind in INDEXED:
            for index in (each for each in arguments[1] if each is not None):
                if index.device != GPU or index.dtype in (torch.bool, torch.uint8):
                    self.waits.append(f"{kind} by {index.dtype} on {index.device}")
        else:
            elsewhere = [each for each in tensors if each.device != GPU and each.dim()]
            assert not elsewhere, f"{operation}: tensors on cuda and on the CPU"
            if kind in READS:
                self.waits.append(str(kind))
        if "device" in named:
            named["device"] = CPU
        computed = FORMULAS.get(operation, operation)
        result = computed(*held(arguments), **held(named))
        if to == CPU:
            return result
        found = tree_map_only(Tensor, OnGpu, result)
        return return_and_correct_aliasing(operation, arguments, named, found) if here else found

    def note_copy(self, kind: Any, arguments: Any, named: Any, to: torch.device) -> None:
        """Record a copy from one device to the other for which the CPU waits."""
        if kind == aten.copy_:
            into, source, *rest = arguments
            to, queued = into.device, bool(rest and rest[0])
        else:
            [source], queued = arguments, named.get("non_blocking", False)
        if (source.device == CPU) == (to == CPU):
            return
        if to == CPU:
            self.waits.append("copy to the CPU")
        elif not (queued and getattr(source, "pinned", False) and source.is_contiguous()):
            self.waits.append("copy to the GPU")


def held(given: Any) -> Any:
    """The arguments with the CPU's tensors in place of the GPU's."""
    return tree_map_only(OnGpu, lambda each: each.held, given)


def product_in_fp32(one: Tensor, other: Tensor, out_dtype: torch.dtype) -> Tensor:
    assert one.dtype == other.dtype != out_dtype == torch.float32
    return one.float() @ other.float()


# The CPU has no kernel for these.
FORMULAS = {aten.mm.dtype: product_in_fp32}


class Flash(Function):
    """Variable-length attention on the GPU, by its emulation on the CPU."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        *cuts, most_queries, most_keys, named = rest
        attend: Any = varlen.varlen_attn
        assert {each.device for each in (query, key, value, *cuts)} == {GPU}
        assert query.dtype == key.dtype == value.dtype
        assert query.dtype in attention.FLASH_DTYPES
        ctx.inputs = [each.detach().requires_grad_() for each in held((query, key, value))]
        with torch.enable_grad():
            ctx.output = attend(*ctx.inputs, *held(cuts), most_queries, most_keys, **named)
        return OnGpu(ctx.output.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        found = torch.autograd.grad(ctx.output, ctx.inputs, held(gradients[0]))
        return *map(OnGpu, found), None, None, None, None, None


def kernel(formula: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel of the GPU, for tensors of one dtype."""

    def computed(*tensors: Tensor) -> Any:
        assert len({(each.device, each.dtype, each.shape) for each in tensors}) == 1
        assert tensors[0].device == GPU
        return tree_map_only(Tensor, OnGpu, formula(*held(tensors)))

    return computed


def pinned(tensor: Tensor) -> Tensor:
    """A copy in memory that a GPU can read by itself, with the strides of the tensor."""
    found: Any = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    found.copy_(tensor)
    found.pinned = True
    return found


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU for the context of this test, with the kernels that PyTorch has only for a GPU."""
    for name in ("manual_seed", "set_rng_state", "_lazy_init", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(0))
    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    monkeypatch.setattr(kernels, "SWIGLU", kernel(kernels.swiglu))
    monkeypatch.setattr(kernels, "SWIGLU_GRADIENTS", kernel(kernels.swiglu_gradients))
    # Because tensors here cannot be viewed as another dtype, as the kernel of rotations needs.
    monkeypatch.setattr(kernels, "in_fours", lambda x: False)
    grouped = attention.gqa_flag(varlen.varlen_attn)
    monkeypatch.setattr(
        attention, "flash", lambda *given, **named: Flash.apply(*given, named | grouped)
    )
    return Gpu()


@pytest.fixture
def prepared(workspace: Path) -> None:
    write_pairs(workspace / "data" / "raw" / "pairs.json", 20)
    preprocess.main()


def move(model: nn.Module) -> None:
    """Move a model to the GPU."""
    for module in model.modules():
        for name, weight in [*module.named_parameters(recurse=False)]:
            moved: Any = nn.Parameter(OnGpu(weight.detach().as_subclass(Tensor)), False)
            moved.requires_grad_(weight.requires_grad)
            if state := getattr(weight, "quant_state", None):
                moved.quant_state = copy.copy(state)
                moved.quant_state.absmax, moved.quant_state.code = map(
                    OnGpu, (state.absmax, state.code)
                )
            setattr(module, name, moved)
        for name, buffer in [*module.named_buffers(recurse=False)]:
            setattr(module, name, OnGpu(buffer))
        if "kept" in vars(module):
            vars(module)["kept"] = OnGpu(vars(module)["kept"])
    joints: set[Any] = {getattr(each, "joint", None) for each in model.modules()}
    for joint in joints - {None}:
        joint.kept, joint.bias = OnGpu(joint.kept), OnGpu(joint.bias)


def gradient(ours: RewardTrainer, step: Step) -> Tensor:
    """The gradient of a step, flattened and on the CPU."""
    ours.training_step(ours.reward_model, {"step": step})
    return torch.cat([held(each.grad).flatten() for each in ours.trained])


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    ("dtype", "flash", "rounding"),
    [("bfloat16", True, 0.02), ("float16", False, 0.005), ("float32", False, 1e-5)],
)
def test_step_and_scores_match_a_cpu_and_never_wait(
    set_params: SetParams,
    monkeypatch: pytest.MonkeyPatch,
    gpu: Gpu,
    dtype: str,
    flash: bool,
    rounding: float,
    large: bool,
) -> None:
    """Adapters take other operations for large tensors, and layers for weights that are kept.

    Scores are read once for each pack.
    """
    set_params("quantization", compute_dtype=dtype)
    set_params("lora", r=6)
    on_cpu = new_trainer()
    step, prompts = on_cpu.steps[0], random_prompts(0)
    expected = gradient(on_cpu, step), score(on_cpu.reward_model, prompts, 4096)
    monkeypatch.setattr(trainer, "device", lambda: GPU)
    monkeypatch.setattr(scoring, "device", lambda: GPU)
    monkeypatch.setattr(attention, "has_flash", lambda device: flash)
    monkeypatch.setattr(layers, "prefers_few_operations", lambda device: True)
    monkeypatch.setattr(layers, "memory_of", lambda device: 2**40 if large else 0)
    ours = new_trainer()
    monkeypatch.setattr(layers, "LARGE", -(2**30) if large else layers.LARGE)
    with gpu:
        move(ours.reward_model)
        ours.trained = [each for each in ours.reward_model.parameters() if each.requires_grad]
        found = gradient(ours, step)
        assert gpu.waits == []
        scores = score(ours.reward_model, prompts, 4096)
    assert gpu.waits == ["copy to the CPU"]
    for one, other in zip((found, scores), expected, strict=True):
        assert (one - other).norm() <= rounding * other.norm()


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x[torch.tensor([0])], 1),
        (lambda x: x.cpu(), 1),
        (lambda x: torch.zeros(3).to(GPU), 1),
        (lambda x: torch.zeros(3).to(GPU, non_blocking=True), 1),
        (lambda x: torch.zeros(3, 2).pin_memory().T.to(GPU, non_blocking=True), 1),
        (lambda x: torch.zeros(3).pin_memory().to(GPU, non_blocking=True), 0),
        (lambda x: x[x.long()] * torch.tensor(2.0), 0),
    ],
)
def test_waiting_is_recorded(gpu: Gpu, work: Callable[[Tensor], Any], waits: int) -> None:
    with gpu:
        work(torch.zeros(3, device=GPU))
    assert len(gpu.waits) == waits


def test_mixed_devices_fail(gpu: Gpu) -> None:
    with gpu, pytest.raises(AssertionError, match="tensors on cuda and on the CPU"):
        torch.zeros(3, device=GPU) + torch.zeros(3)
