"""Layers for a frozen base that take less time and memory, with the same results up to rounding.

Products in fp32 on a CPU use oneDNN if PyTorch has it, because MKL, PyTorch's default, runs at
about half speed on processors that are not from Intel. An adapter adds its part in place to the
result of its layer. Forward saves only what backward needs: a linear layer without an adapter saves
nothing, because its weights are frozen.

In half precision, the base's weights, inputs and outputs are fp16 or bf16. Adapters and their
gradients are fp32, and norms compute in fp32. In bf16, adapters are rounded to bf16 for their
products, as in automatic mixed precision. In fp16, whose smallest numbers are much larger, these
products are in fp32.

On a GPU, the CPU has to launch every operation, and unless a pack is large, this takes longer than
to compute it. So there, layers take fewer operations, and weights in 4 bits are dequantized only
once if there is memory for it.
"""

import inspect
from collections.abc import Sequence
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import linear, pad, rms_norm, silu
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from reward.model.kernels import rotated, swiglu, swiglu_gradients
from reward.model.swapping import Swapped, swap_in

LINEAR = (nn.Linear, Linear4bit)
# Products in half precision with a multiple of this many numbers per row have faster kernels on a
# GPU. For large inputs, adapters of other ranks get zeros.
RANKS = 8
# From about this many numbers, a pass over a tensor takes a GPU longer than two operations take the
# CPU to launch.
LARGE = 2**24
# The layers of attention that get the same input.
JOINED = ("q_proj", "k_proj", "v_proj")
# The share of a GPU's memory that dequantized weights may take.
KEPT_SHARE = 1 / 16
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def swap_layers(model: PeftModel) -> None:
    """Replace the linear layers, adapters and RMS norms of a decoder with those of this module.

    Layers of other kinds stay as they are, and so do PEFT's variants of LoRA, such as DoRA.
    """
    classifier = cast(PreTrainedModel, model.get_base_model())
    for module in classifier.base_model.modules():
        if isinstance(module, LoraLayer):
            if type(module.base_layer) in LINEAR and not module.lora_variant:
                swap_in(module, AdaptedLayer)
        elif any(parameter.requires_grad for parameter in module.parameters()):
            continue
        elif type(module) in LINEAR:
            swap_in(module, FrozenLayer)
        elif is_rms_norm(module):
            swap_in(module, Norm)
    few = prefers_few_operations(classifier.device)
    for module in classifier.base_model.modules():
        if is_swiglu(module):
            swap_in(module, Gated)
        elif few and rotates_halves(module):
            swap_in(module, Rotating)
    if few:
        keep_dense(classifier)


def prefers_few_operations(device: torch.device) -> bool:
    """Whether each operation has a high fixed cost, as on a GPU, where the CPU has to launch it.

    Where this is true, norms, rotary embeddings and the projections of attention take fewer
    operations. For large tensors, adapters take more operations but fewer passes over memory. On a
    CPU, neither would save time.
    """
    return device.type == "cuda"


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight' + bias: [..., outputs] from [..., inputs] and [outputs, inputs].

    The mark ' is the transpose. In half precision PyTorch uses oneDNN itself.
    """
    if ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    else:
        found = linear(x, weight, bias)
    return found.detach()  # because a model could not change a view in place


def multiplies_bf16() -> bool:
    """Whether the processor has instructions for bf16 products, which oneDNN uses."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def dense(layer: Any) -> Tensor:
    """The weights of a linear layer, [outputs, inputs]."""
    if layer.kept is not None:
        return cast(Tensor, layer.kept)
    if isinstance(layer, Linear4bit):
        weight: Any = layer.weight
        return dequantize_4bit(weight.data, weight.quant_state)
    return cast(Tensor, layer.weight)


def keep_dense(classifier: PreTrainedModel) -> None:
    """Keep dense weights, those of layers with one input together, if a GPU has the memory.

    So weights in 4 bits are dequantized once, not in every pass, with the same values. Those of a
    Joint are a copy, even if the base is not quantized. A plain attribute is not part of the state
    dict.
    """
    modules = [*classifier.base_model.modules()]
    groups = [layers for module in modules if (layers := joinable(module))]
    joined = [layer.base_layer for layers in groups for layer in layers]
    quantized = [each for each in modules if isinstance(each, Linear4bit) and each not in joined]
    numbers = sum(each.out_features * each.in_features for each in (*joined, *quantized))
    if numbers * classifier.dtype.itemsize > KEPT_SHARE * memory_of(classifier.device):
        return
    for layers in groups:
        joint = Joint(layers)
        for place, layer in enumerate(layers):
            layer.joint, layer.place = joint, place
    for each in quantized:
        each.kept = dense(each)


def memory_of(device: torch.device) -> int:
    """The memory of a GPU in bytes; 0 for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def product_in_fp32(one: Tensor, other: Tensor) -> Tensor:
    """one @ other in fp32, [n, m] from [n, rows] and [rows, m]; the factors may be bf16."""
    if one.is_cuda and one.dtype != torch.float32:
        return torch.mm(one, other, out_dtype=torch.float32)
    return one.float() @ other.float()


def product_and_low_rank(
    x: Tensor, weight: Tensor, bias: Tensor | None, inner: Tensor, factor: Tensor
) -> Tensor:
    """x weight' + bias + inner factor': [..., outputs].

    x is [..., inputs], weight [outputs, inputs], inner [rows, rank] and factor [outputs, rank]. If
    x is fp16, the last two may be fp32.

    The second product is added in place, which is a pass over the result. If the result is much
    larger than x and the weights, a GPU takes less time to copy these for one product:
    [x, inner] [weight, factor]'.
    """
    outputs, inputs = weight.shape
    saved = len(inner) * (outputs - inputs) - outputs * inputs
    if prefers_few_operations(x.device) and saved > LARGE and inner.dtype == x.dtype:
        wide = torch.cat([x, inner.view(*x.shape[:-1], -1)], -1)
        return product(wide, torch.cat([weight, factor], 1), bias)
    found = product(x, weight, bias)
    flat = found.view(-1, outputs)
    if flat.dtype == inner.dtype:
        flat.addmm_(inner, factor.T)
    else:
        flat.add_(inner @ factor.T)
    return found


# --- linear layers and adapters --------------------------------------------------------------

# A Function defines an operation and its gradient. `backward` gets the gradient of the result of
# `forward` and returns a gradient for each argument of `forward`, None for those that have none.
# `ctx` carries what `backward` needs from `forward`.


class Frozen(Function):
    """x W' + bias for a frozen W.

    With G, the gradient of the result, the gradient of x is G W. It needs W but not x, so nothing
    is saved. Unless `keep_dense` keeps W, it is dequantized again in backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return product(x, dense(layer), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        [gradient] = gradients
        return product(gradient, dense(ctx.layer).T), None


class FrozenLayer(Swapped):
    """A linear layer with frozen weights; `kept` are the dense ones, if `keep_dense` keeps them."""

    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, Frozen.apply(x, self))


class Adapted(Function):
    """x W' + bias + s (y A') B', where y is x after dropout, or None without dropout.

    W is frozen; A is [rank, inputs] and B is [outputs, rank]. With G, the gradient of the result,
    C = s B and S = G C, [rows, rank], the chain rule gives

        dx = G W,  dy = S A,  dA = S' y,  dB = s G' (y A').

    So forward saves y and the small product y A', [rows, rank]. Without dropout y is x, and dx and
    dy are added up in one tensor. PEFT's own forward also creates the adapter's output and its
    scaled copy, each as large as the layer's output, and in half precision an fp32 copy of x.

    The adapter's products are in the base's dtype, except that those of an fp16 base are in fp32:
    in fp16, S would underflow.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, a: Tensor, b: Tensor, scaling: float, layer: Any
    ) -> Tensor:
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        kept, rank = x if y is None else y, len(a)
        a, c = a.to(dtype), torch.mul(b, scaling, out=b.new_empty(b.shape, dtype=dtype))
        large = prefers_few_operations(x.device) and x.numel() > LARGE
        if large and rank % RANKS and dtype != torch.float32:
            a, c = pad(a, (0, 0, 0, -rank % RANKS)), pad(c, (0, -rank % RANKS))
        inner = kept.flatten(0, -2).to(dtype) @ a.T
        ctx.save_for_backward(kept, inner, a, c)
        ctx.rank, ctx.scaling, ctx.layer, ctx.dropped = rank, scaling, layer, y is not None
        return product_and_low_rank(x, dense(layer), layer.bias, inner, c)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        kept, inner, a, c = ctx.saved_tensors
        [gradient] = gradients
        rows = gradient.flatten(0, -2).to(a.dtype)
        scaled = rows @ c
        of_x = of_y = None
        if ctx.needs_input_grad[0]:
            weight = dense(ctx.layer).T
            of_x = (
                product(gradient, weight)
                if ctx.dropped
                else product_and_low_rank(gradient, weight, None, scaled, a.T)
            )
        if ctx.needs_input_grad[1]:
            of_y = (scaled @ a).to(kept.dtype).view_as(kept)
        of_a = product_in_fp32(scaled.T, kept.flatten(0, -2).to(a.dtype))
        of_b = product_in_fp32(rows.T, inner).mul_(ctx.scaling)
        return of_x, of_y, of_a[: ctx.rank], of_b[:, : ctx.rank], None, None


class AdaptedLayer(Swapped):
    """A LoRA layer with one adapter on a linear layer.

    Without dropout, PEFT's dropout module returns x itself.
    """

    # What computes this layer together with others, and its place among them.
    joint: "Joint | None" = None
    place = 0

    def forward(self, x: Tensor) -> Tensor:
        lora: Any = self
        if lora.disable_adapters:
            return cast(Tensor, super().forward(x))
        if self.joint and (found := self.joint.output(self.place, x)) is not None:
            return found
        a, b, scaling, dropout = adapter_of(self)
        y = dropout(x)
        kept = None if y is x else y
        return cast(Tensor, Adapted.apply(x, kept, a.weight, b.weight, scaling, lora.base_layer))


def adapter_of(lora: Any) -> list[Any]:
    """A, B, the scaling and the dropout of a LoRA layer with one adapter."""
    [name] = lora.active_adapters
    parts = (lora.lora_A, lora.lora_B, lora.scaling, lora.lora_dropout)
    return [part[name] for part in parts]


class Joint:
    """LoRA layers with one input, as a single layer that has the outputs of all, one after another.

    This takes fewer operations and fewer passes over the input and its gradient. A model calls the
    layers separately. The call of the first computes the outputs of all, and the calls of the
    others return theirs if they have the same input.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        """`layers` are those that `joinable` returns."""
        bases = [layer.base_layer for layer in layers]
        self.a, self.b, (self.scaling, *_), _ = zip(*map(adapter_of, layers), strict=True)
        self.sizes = [base.out_features for base in bases]
        self.bias = None if bases[0].bias is None else torch.cat([base.bias for base in bases])
        self.kept = torch.cat([dense(base) for base in bases])
        self.x: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}

    def output(self, place: int, x: Tensor) -> Tensor | None:
        """The output of the layer at a place, or None if it has to be computed alone."""
        if place == 0:
            a = torch.cat([each.weight for each in self.a])
            b = torch.block_diag(*(each.weight for each in self.b))
            found = Adapted.apply(x, None, a, b, self.scaling, self)
            # unsafe, because a model may change one of the outputs in place.
            outputs = torch.unsafe_split_with_sizes(found, self.sizes, -1)
            self.x, self.waiting = x, dict(enumerate(outputs))
        found = self.waiting.pop(place, None) if x is self.x else None
        if not self.waiting:
            self.x = None
        return found

    def forget(self) -> None:
        """Drop the outputs that wait, which keep all that backward would need of earlier layers."""
        self.x, self.waiting = None, {}


def joinable(module: nn.Module) -> list[Any]:
    """The layers JOINED of a module if all are there and a Joint can compute them, else none.

    It can if their adapters have no dropout and one scaling, and all or none have a bias.
    """
    layers: list[Any] = [getattr(module, name, None) for name in JOINED]
    if not all(isinstance(layer, AdaptedLayer) for layer in layers):
        return []
    _, _, scalings, dropouts = zip(*map(adapter_of, layers), strict=True)
    bases = [layer.base_layer for layer in layers]
    kinds = {(base.in_features, base.bias is None) for base in bases}
    alike = len(kinds) == len({*scalings}) == 1 and {*map(type, dropouts)} == {nn.Identity}
    return layers if alike else []


def forget_waiting(model: nn.Module) -> None:
    """Let all Joints of a model forget, after a pass that has failed."""
    for module in model.modules():
        if isinstance(module, AdaptedLayer) and module.joint:
            module.joint.forget()


# --- norms -----------------------------------------------------------------------------------


class RootMeanSquare(Function):
    """w x / sqrt(mean(x^2) + eps): Zhang and Sennrich 2019, equation 4.

    Of tensors as large as x, only x itself is saved. Let c = 1 / sqrt(mean(x^2) + eps), one number
    per row, and n the number of features. The derivative of c with respect to x is -c^3 x / n. With
    the gradient G of the result, the gradient of x is therefore

        dx = c w G - c^3 / n (w G . x) x.

    All of this is computed in fp32. As in transformers, the normalized x is rounded to the dtype of
    x before it is multiplied by w. PyTorch's kernel for a GPU rounds only the result.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(size.square_().div_(x.shape[-1]).add_(epsilon))
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        [gradient], wide = gradients, x.float()
        scaled = gradient.float() * weight
        along = (scaled * wide).sum(-1, keepdim=True)
        along.mul_(scale.pow(3)).div_(-x.shape[-1])
        return scaled.mul_(scale).addcmul_(wide, along).to(x.dtype), None, None


class Norm(Swapped):
    """An RMS norm with a frozen weight."""

    def forward(self, x: Tensor) -> Tensor:
        return root_mean_square(self, x)


def root_mean_square(module: Any, x: Tensor) -> Tensor:
    """The RMS norm of x. On a GPU, PyTorch has one kernel for it and one for its gradient."""
    if prefers_few_operations(x.device):
        return rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
    return cast(Tensor, RootMeanSquare.apply(x, module.weight, module.variance_epsilon))


@torch.no_grad()
def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module has the attributes of an RMS norm and computes the same on a test input."""
    weight = getattr(module, "weight", None)
    if not hasattr(module, "variance_epsilon") or not isinstance(weight, Tensor):
        return False
    x = torch.linspace(-1, 3, 2 * len(weight)).view(2, -1).to(weight)
    found, expected = root_mean_square(module, x), module(x)
    rounding = 1e-5 if weight.dtype == torch.float32 else 1e-2
    close = (found - expected).norm() <= rounding * expected.norm()
    return found.shape == expected.shape and bool(close)


# --- SwiGLU ----------------------------------------------------------------------------------

# What the forward of an MLP with SwiGLU uses in transformers.
SWIGLU_PARTS = ("down_proj", "act_fn", "gate_proj", "up_proj")


class Gate(Function):
    """silu(gate) * up. Only these two are saved; silu(gate), as large, is computed again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        [gradient] = gradients
        return swiglu_gradients(gradient, *ctx.saved_tensors)


class Gated(Swapped):
    """An MLP with SwiGLU."""

    def forward(self, x: Tensor) -> Tensor:
        mlp: Any = self
        return cast(Tensor, mlp.down_proj(Gate.apply(mlp.gate_proj(x), mlp.up_proj(x))))


def is_swiglu(module: nn.Module) -> bool:
    """Whether a module is an MLP with SwiGLU, by its parts and what its forward does with them."""
    forward: Any = inspect.unwrap(type(module).forward)
    if {*names_in(forward)} != {*SWIGLU_PARTS}:
        return False
    if not isinstance(module.act_fn, nn.SiLU | SiLUActivation):
        return False
    x = torch.linspace(-3, 3, 7)
    parts = SimpleNamespace(
        gate_proj=lambda x: x - 1,
        up_proj=lambda x: x + 2,
        down_proj=lambda x: 3 * x,
        act_fn=silu,
    )
    return torch.allclose(forward(parts, x), 3 * swiglu(x - 1, x + 2), rtol=1e-5, atol=1e-6)


# --- rotary embedding ------------------------------------------------------------------------

# The function of a family's module that its attention calls.
ROTARY = "apply_rotary_pos_emb"


class Rotation(Function):
    """x cos + rot(x) sin, where rot turns the halves (u, v) of each head into (-v, u).

    Su et al. 2021, "RoFormer", equation 34, for pairs of numbers half a head apart. Queries and
    keys are [1, heads, tokens, size]; cos and sin are [1, 1, tokens, size], and their halves are
    equal. So the gradient is the rotation by the opposite angle. PyTorch's own gradient of slices
    and their concatenation takes three times as many operations.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        return tuple(rotated((q, k), cos, sin, 1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return *rotated(gradients, cos, sin, -1), None, None


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """The rotated queries and keys, [1, heads, tokens, size]; cos and sin are [1, tokens, size].

    The parameters are those of the function in transformers. If cos is narrower than a head, only
    the head's first numbers are rotated.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    size = cos.shape[-1]
    parts = (x if x.shape[-1] == size else x[..., :size] for x in (q, k))
    turned_q, turned_k = cast(tuple[Tensor, Tensor], Rotation.apply(*parts, cos, sin))
    if q.shape[-1] == size:
        return turned_q, turned_k
    return torch.cat([turned_q, q[..., size:]], -1), torch.cat([turned_k, k[..., size:]], -1)


class Rotating(Swapped):
    """An attention layer with `rotate` in place of its family's function."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        stock: Any = self.stock
        return with_rotate(stock)(self, *arguments, **named)


@cache
def with_rotate(kind: Any) -> FunctionType:
    """The forward of a class with `rotate` in place of the function ROTARY.

    A forward reads this function from the globals of its module. The same code runs here with
    globals in which the name has another value. Decorators of the forward do not apply.
    """
    forward = inspect.unwrap(kind.forward)
    changed = FunctionType(
        forward.__code__,
        forward.__globals__ | {ROTARY: rotate},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed


def names_in(function: Any) -> tuple[str, ...]:
    """The global names and attributes that a function uses; none if it is not a Python function."""
    return function.__code__.co_names if isinstance(function, FunctionType) else ()


@torch.no_grad()
def rotates_halves(module: nn.Module) -> bool:
    """Whether a module calls a function that computes the same as `rotate` on a test input."""
    forward: Any = inspect.unwrap(type(module).forward)
    if ROTARY not in names_in(forward):
        return False
    function = inspect.unwrap(forward.__globals__.get(ROTARY))
    if "rotate_half" not in names_in(function):
        return False
    q, k = torch.linspace(-1, 3, 48).view(1, 2, 3, 8), torch.linspace(-2, 1, 24).view(1, 1, 3, 8)
    angles = torch.linspace(0, 2, 12).view(1, 3, 4).repeat(1, 1, 2)
    arguments = q, k, angles.cos(), angles.sin()
    return all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-6)
        for one, other in zip(rotate(*arguments), function(*arguments), strict=True)
    )
