"""SwiGLU and rotary embeddings in one kernel on a GPU, where PyTorch's operations take several.

Each operation reads and writes whole tensors, which determines its time. PyTorch compiles the
kernels when they are first called, in about a second, and keeps them in ~/.cache/torch/kernels. A
kernel computes in fp32 and rounds its result once. Elsewhere than on a GPU, PyTorch's operations
compute the same, with the rounding of each.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.cuda.jiterator import _create_jit_fn, _create_multi_output_jit_fn
from torch.nn.functional import silu

# T is the type of the computation: fp32 for tensors in half precision.
SWIGLU: Any = _create_jit_fn(
    "template <typename T> T swiglu(T gate, T up) { return gate / (T(1) + std::exp(-gate)) * up; }"
)
SWIGLU_GRADIENTS: Any = _create_multi_output_jit_fn(
    """
    template <typename T> void swiglu_gradients(T gradient, T gate, T up, T& of_gate, T& of_up) {
        const T sigmoid = T(1) / (T(1) + std::exp(-gate));
        of_gate = gradient * up * sigmoid * (T(1) + gate * (T(1) - sigmoid));
        of_up = gradient * gate * sigmoid;
    }
    """,
    num_outputs=2,
)

# The halves of a head, u and v, are broadcast, so with one number at a time the kernel would spend
# its time on their indices. Here T is an int64 that holds four bf16 numbers. `part` is 0 for the
# first half of the result and 1 for the second, and 2 more for the opposite angle.
ROTATED: Any = _create_jit_fn(
    """
    template <typename T> T rotated(T u, T v, T cos, T sin, T part) {
        const bool second = part & 1, opposite = part >> 1;
        T found = 0;
        for (int place = 0; place < 64; place += 16) {
            const auto number = [place](T four) {
                return __uint_as_float(static_cast<unsigned int>(four >> place) << 16);
            };
            const float own = number(second ? v : u), other = number(second ? u : v);
            const float along = second == opposite ? -number(sin) : number(sin);
            const float turned = own * number(cos) + other * along;
            unsigned int bits = __float_as_uint(turned);
            // Round to the nearest, ties to even. NaN stays NaN.
            if (turned == turned) bits += 0x7fff + (bits >> 16 & 1);
            found |= static_cast<T>(bits >> 16) << place;
        }
        return found;
    }
    """
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, for tensors of one shape: Shazeer 2020, "GLU variants", equation 6."""
    if gate.is_cuda:
        found: Tensor = SWIGLU(gate, up)
        return found
    return silu(gate).mul_(up)


def swiglu_gradients(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, given that of the result.

    With s = sigmoid(gate), the derivative of silu is s (1 + gate (1 - s)).
    """
    if gate.is_cuda:
        of_gate, of_up = SWIGLU_GRADIENTS(gradient, gate, up)
        return of_gate, of_up
    return torch.ops.aten.silu_backward(gradient * up, gate), silu(gate).mul_(gradient)


def rotated(xs: Sequence[Tensor], cos: Tensor, sin: Tensor, sign: int) -> list[Tensor]:
    """x cos + sign rot(x) sin for each x, where rot turns the halves (u, v) of a head into (-v, u).

    Each x is [1, heads, tokens, size]; cos and sin are [1, 1, tokens, size], with equal halves.
    """
    if cos.is_cuda and all(map(in_fours, (*xs, cos, sin))):
        cos, sin = map(halves, (cos, sin))
        part = parts(cos.device)[sign]
        pairs = [halves(x).chunk(2, -2) for x in xs]
        return [ROTATED(u, v, cos, sin, part).view(torch.bfloat16).flatten(-2) for u, v in pairs]
    return [rotated_by_operations(x, cos, sin, sign) for x in xs]


def rotated_by_operations(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    found, half = x * cos, x.shape[-1] // 2
    found[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    found[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return found.to(x.dtype)


def in_fours(x: Tensor) -> bool:
    """Whether x, with four dimensions, is bf16 and four numbers of a half can be read as one."""
    a, b, c, last = x.stride()
    places = a | b | c | int(x.storage_offset())
    return x.dtype == torch.bfloat16 and x.shape[-1] % 8 == 0 and last == 1 and places % 4 == 0


def halves(x: Tensor) -> Tensor:
    """[..., 2, size / 8] from [..., size]: the halves of each head, four numbers in one."""
    return x.view(torch.int64).unflatten(-1, (2, -1))


@cache
def parts(device: torch.device) -> dict[int, Tensor]:
    """The kernel's argument `part` for both halves, for a rotation and for its opposite."""
    return {sign: torch.tensor([[a], [b]], device=device) for sign, a, b in ((1, 0, 1), (-1, 2, 3))}
